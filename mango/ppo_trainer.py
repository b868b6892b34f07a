"""Online PPO for the published LSTM policy, inside somebody's own training loop: collect, update, repeat.

For training on recorded or simulated runs use `train_policy` (behaviour cloning, offline RL, Stable-Baselines3); this
trainer needs torch alone and learns from the one run that it sees.
"""

import json
import math
import os
import pickle
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mango.config import CompressionConfig
from mango.networks import Heads
from mango.trunks import State

FORMAT = "mango-ppo-1"
STATISTICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm", "reward", "samples")
_LONGEST_HOLD = 256                                      # experiences in one segment: bounds what is kept

Choice = CompressionConfig | Mapping[str, Any] | Sequence[CompressionConfig | Mapping[str, Any]] | Tensor


@runtime_checkable
class Agents(Protocol):
    """What `PPOTrainer` trains, an `nn.Module`: `CompressionPolicyNet` is the one of this package.

    Observations are (A, F) of A agents, actions (A, K) in the form of `encode`.
    """

    num_parameter_groups: int
    architecture: dict[str, Any]                         # JSON: what a checkpoint must agree with

    @property
    def trunk(self) -> nn.Module: ...

    @property
    def value_head(self) -> nn.Linear: ...

    def rows(self, features: Mapping[str, Any] | Tensor) -> Tensor: ...

    def pool(self, rows: Tensor) -> Tensor: ...

    def encode(self, choices: Sequence[Mapping[str, Any] | CompressionConfig]) -> Tensor: ...

    def evaluate(self, obs: Tensor, state: State | None = None) -> Heads: ...

    def log_prob(self, heads: Heads, actions: Tensor) -> Tensor: ...

    def entropy(self, heads: Heads) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass
class _Segment:
    """Consecutive observations of A agents, and the experiences made under each of them."""

    state: State | None                                  # of the LSTM before the first observation
    observations: list[Tensor] = field(default_factory=list)                   # each (A, F)
    seen: list[int] = field(default_factory=list)                              # (T,) the observation of each experience
    actions: list[Tensor] = field(default_factory=list)                        # T times (A, K)
    log_probs: list[Tensor] = field(default_factory=list)                      # T times (A,)
    values: list[Tensor] = field(default_factory=list)                         # T times (A,)
    rewards: list[Tensor] = field(default_factory=list)                        # T times (A,)


@dataclass
class _Batch:
    """A segment ready for the loss; agents first."""

    observations: Tensor                                 # (A, U, F)
    state: State | None
    seen: Tensor                                         # (T,) indices into U
    actions: Tensor                                      # (A, T, K)
    log_probs: Tensor                                    # (A, T)
    advantages: Tensor                                   # (A, T)
    returns: Tensor                                      # (A, T)
    weight: float                                        # its experiences over the mean of all segments: each counts once


class PPOTrainer:
    """Proximal policy optimisation (Schulman et al. 2017) of a `CompressionPolicyNet` or other `Agents`, unrolled in time.

    Each `collect_experience` is one step of A agents: one per layer where the config names layers, else one per parameter
    group. While the features are equal tensors the LSTM does not move on: a decision that is held for 100 steps is one
    observation with 100 rewards. `update_policy` does `epochs` clipped passes over all experiences, then forgets them.

    Args:
        policy_net: the policy that the optimizer uses; in training mode, so that it explores.
        lr: learning rate of Adam.
        clip: the probability ratio is clipped to 1 +- clip.
        gamma: discount per experience; 0 makes a bandit of it.
        gae_lambda: mixing of the generalised advantage (Schulman et al. 2016).
        epochs: passes per update, ended early at a mean KL above `target_kl` nats.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        max_grad_norm: clip of the gradient's norm.
        target_kl: see `epochs`.
        sequence_length: observations through which gradients flow back.
        buffer_size: experiences kept for the next update; the oldest go first.
        min_samples: fewest experiences for an update; with fewer `update_policy` waits for more.
        seed: order of the minibatches.
    """

    def __init__(
        self,
        policy_net: Agents,
        lr: float = 3e-4,
        clip: float = 0.2,
        *,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        epochs: int = 4,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
        max_grad_norm: float = 0.5,
        target_kl: float = 0.05,
        sequence_length: int = 32,
        buffer_size: int = 4096,
        min_samples: int = 2,
        seed: int = 0,
    ) -> None:
        if not isinstance(policy_net, Agents):
            raise TypeError(f"PPOTrainer trains a CompressionPolicyNet; got {type(policy_net).__name__}")
        for name, value, low, high in (
            ("lr", lr, 1e-12, 1.0),
            ("clip", clip, 1e-6, 1.0),
            ("gamma", gamma, 0.0, 1.0),
            ("gae_lambda", gae_lambda, 0.0, 1.0),
            ("epochs", epochs, 1, 1000),
            ("sequence_length", sequence_length, 1, 4096),
            ("min_samples", min_samples, 2, buffer_size),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name}={value!r} is outside {low:g}..{high:g}")
        self.policy_net: Any = policy_net                # `Agents`, of the class that was given
        self.optimizer = torch.optim.Adam(policy_net.parameters(), lr=lr, eps=1e-5)
        self.clip, self.gamma, self.gae_lambda, self.epochs = clip, gamma, gae_lambda, epochs
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        self.max_grad_norm, self.target_kl = max_grad_norm, target_kl
        self.sequence_length, self.buffer_size, self.min_samples = sequence_length, buffer_size, min_samples
        self.generator = torch.Generator().manual_seed(seed)
        self.updates = 0                                 # calls of `update_policy` that changed the policy
        self.experiences = 0                             # collected in all
        self.dropped = 0                                 # not collected: their reward or features were not finite
        self.history: deque[dict[str, float]] = deque(maxlen=100)              # statistics of the last updates
        self._reward_moments = [0.0, 0.0, 0.0]           # count, mean, sum of squared deviations of all rewards
        self.reset()

    def reset(self) -> None:
        """Forget the collected experiences and the LSTM state: another model, or another run. What was learned stays."""
        self._segments: deque[_Segment] = deque()
        self._before: State | None = None                # LSTM state before the last observation, and after it
        self._after: State | None = None
        self._observation: Tensor | None = None          # (A, F) the last observation, and what the policy says of it
        self._heads: Heads | None = None

    def __len__(self) -> int:
        """Experiences waiting for the next update."""
        return sum(len(segment.seen) for segment in self._segments)

    def collect_experience(
        self, features: Mapping[str, Any] | Tensor, compression_config: Choice, reward: float | Tensor
    ) -> None:
        """Keep what was seen, what was applied, and what came of it.

        `features` as `optimizer.collect_gradient_features()` gives them, or (L, F); `compression_config` one choice for the whole
        model (a config or a dict of knobs), or one per layer (a list, knob indices (L, 7), or a dict with the list under
        "layers"); `reward` one number, or one per agent (A,). A reward that is not finite is counted in `dropped`, not kept.
        """
        rows, actions = self._agents(self.policy_net.rows(features), compression_config)
        rewards = torch.as_tensor(reward, dtype=torch.float32).detach().cpu().expand(len(rows))
        if not bool(rewards.isfinite().all() & rows.isfinite().all()):
            self.dropped += 1
            return
        if self._observation is not None and len(self._observation) != len(rows):
            if self._segments:
                raise ValueError(f"experience of {len(rows)} agents after {len(self._observation)}; call reset() between models")
            self.reset()
        segment = self._observe(rows)
        assert self._heads is not None
        with torch.no_grad():
            segment.log_probs.append(self.policy_net.log_prob(self._heads, actions.to(self._heads.value.device)))
        segment.values.append(self._heads.value)
        segment.seen.append(len(segment.observations) - 1)
        segment.actions.append(actions)
        segment.rewards.append(rewards)
        self.experiences += 1
        self._count_reward(float(rewards.mean()))
        while len(self._segments) > 1 and len(self) - len(self._segments[0].seen) >= self.buffer_size:
            self._segments.popleft()

    def update_policy(self) -> dict[str, float]:
        """Learn from the collected experiences; the update's mean losses (`STATISTICS`).

        With fewer than `min_samples` nothing changes: the last update's statistics come back (zeros before the first).
        """
        if len(self) < self.min_samples:
            return dict(self.history[-1]) if self.history else dict.fromkeys(STATISTICS, 0.0)
        batches = self._batches()
        sums = dict.fromkeys(STATISTICS, 0.0)
        steps = 0
        for _ in range(self.epochs):
            kl = 0.0
            for i in torch.randperm(len(batches), generator=self.generator).tolist():
                stats = self._learn(batches[i])
                kl += stats["approx_kl"] * batches[i].weight / len(batches)
                steps += 1
                for name, value in stats.items():
                    sums[name] += value * batches[i].weight
            if kl > self.target_kl:
                break
        result = {name: total / steps for name, total in sums.items()}
        result["samples"] = float(sum(batch.log_probs.numel() for batch in batches))
        result["reward"] = float(torch.stack([r for segment in self._segments for r in segment.rewards]).mean())
        self.history.append(result)
        self.updates += 1
        self._segments.clear()
        self._evaluate()                                 # the policy has changed: what does it say now?
        return dict(result)

    def get_training_summary(self) -> dict[str, float]:
        """Means over the last 10 updates (`recent_...`, 0.0 before the first: see `updates`) and counts."""
        recent = list(self.history)[-10:]
        means = {f"recent_{name}": sum(h[name] for h in recent) / max(len(recent), 1) for name in STATISTICS}
        counts = {"updates": self.updates, "experiences": self.experiences, "dropped": self.dropped, "pending": len(self)}
        return means | {name: float(count) for name, count in counts.items()}

    def save(self, path: str | Path) -> Path:
        """Write policy (its carried state and generator included), Adam and counts; collected experiences are not kept."""
        target = Path(path)
        content = {
            "format": FORMAT,
            "architecture": json.dumps(self.policy_net.architecture),
            "policy": self.policy_net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "reward_moments": list(self._reward_moments),
            "counts": [self.updates, self.experiences, self.dropped],
            "history": list(self.history),
        }
        aside = target.with_name(target.name + ".tmp")
        try:
            with aside.open("wb") as file:
                torch.save(content, file)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        return target

    def load(self, path: str | Path) -> None:
        """Continue from `save`, with a policy of the same architecture. Reads tensors and numbers only, never code."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is corrupt or no checkpoint of PPOTrainer: {str(error).splitlines()[0]}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is no checkpoint of PPOTrainer (expected the format {FORMAT!r})")
        own = json.dumps(self.policy_net.architecture)
        if content["architecture"] != own:
            raise ValueError(f"{path} holds a policy of the architecture {content['architecture']}; this one is {own}")
        self.reset()
        self.policy_net.load_state_dict(content["policy"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["generator"])
        self._reward_moments = list(content["reward_moments"])
        self.updates, self.experiences, self.dropped = content["counts"]
        self.history = deque(content["history"], maxlen=100)

    def _agents(self, rows: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """What each agent saw (A, F) and did (A, K)."""
        net = self.policy_net
        layers: Any = choice
        if isinstance(choice, Tensor):
            layers = [CompressionConfig.from_action(action) for action in choice.tolist()]
        elif isinstance(choice, Mapping) and "layers" in choice:
            layers = choice["layers"]
        elif isinstance(choice, Mapping | CompressionConfig):
            groups = choice.get("configs") if isinstance(choice, Mapping) else None
            return net.pool(rows), net.encode(groups or [choice]).expand(net.num_parameter_groups, -1)
        if len(layers) != len(rows):
            raise ValueError(f"{len(layers)} configs for {len(rows)} layers; give one per layer, or one for the whole model")
        return rows, net.encode(layers)

    def _observe(self, rows: Tensor) -> _Segment:
        """Let the policy see `rows` unless it just did; the segment that the experience belongs to."""
        new = self._observation is None or not torch.equal(rows, self._observation)
        if new:
            self._before, self._observation = self._after, rows
            self._evaluate()
        last = self._segments[-1] if self._segments else None
        if last is None or len(last.seen) >= _LONGEST_HOLD or (new and len(last.observations) >= self.sequence_length):
            last, new = _Segment(self._before), True
            self._segments.append(last)
        if new:
            last.observations.append(rows)
        return last

    def _evaluate(self) -> None:
        assert self._observation is not None
        with torch.no_grad():
            self._heads = self.policy_net.evaluate(self._observation.to(self.policy_net.value_head.weight.device), self._before)
        self._after = self._heads.state

    def _count_reward(self, reward: float) -> None:
        count, mean, squares = self._reward_moments                            # Welford 1962
        gap = reward - mean
        mean += gap / (count + 1)
        self._reward_moments = [count + 1, mean, squares + gap * (reward - mean)]

    def _batches(self) -> list[_Batch]:
        """The segments with their advantages, in units of the rewards' standard deviation."""
        count, mean, squares = self._reward_moments
        scale = math.sqrt(squares / count) or 1.0
        segments = list(self._segments)
        device = self.policy_net.value_head.weight.device
        rewards = (torch.stack([r for s in segments for r in s.rewards]).to(device) - mean) / scale           # (T, A)
        values = torch.stack([v for s in segments for v in s.values])                                         # (T, A)
        following = torch.cat([values[1:], values[-1:]])                       # the run goes on: no end, value stays
        surprise = rewards + self.gamma * following - values
        advantages = torch.empty_like(surprise)
        carried = torch.zeros_like(surprise[0])
        for t in range(len(surprise) - 1, -1, -1):
            carried = surprise[t] + self.gamma * self.gae_lambda * carried
            advantages[t] = carried
        returns = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        batches, start = [], 0
        for s in segments:
            span = slice(start, start + len(s.seen))
            start = span.stop
            batches.append(
                _Batch(
                    observations=torch.stack(s.observations, 1).to(device),
                    state=s.state,
                    seen=torch.tensor(s.seen, device=device),
                    actions=torch.stack(s.actions, 1).to(device),
                    log_probs=torch.stack(s.log_probs, 1),
                    advantages=advantages[span].T,
                    returns=returns[span].T,
                    weight=len(s.seen) * len(segments) / len(self),
                )
            )
        return batches

    def _learn(self, batch: _Batch) -> dict[str, float]:
        """One gradient step on the clipped objective; its statistics."""
        net = self.policy_net
        net.trunk.train()                                # cuDNN has no backward of an LSTM in eval mode; nothing else differs
        seen = net.evaluate(batch.observations, batch.state)                                                  # (A, U, ...)
        heads = Heads({k: x[:, batch.seen] for k, x in seen.logits.items()}, seen.value[:, batch.seen], seen.state)
        log_ratio = net.log_prob(heads, batch.actions) - batch.log_probs                                      # (A, T)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        policy_loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()
        value_loss = (heads.value - batch.returns).square().mean()
        entropy = net.entropy(heads).mean()
        self.optimizer.zero_grad()
        loss = policy_loss + self.value_coef * value_loss - self.entropy_coef * entropy
        (loss * batch.weight).backward()
        grad_norm = nn.utils.clip_grad_norm_(net.parameters(), self.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            return {
                "policy_loss": policy_loss.item(),
                "value_loss": value_loss.item(),
                "entropy": entropy.item(),
                "approx_kl": (ratio - 1 - log_ratio).mean().item(),
                "clip_fraction": (ratio != clipped).float().mean().item(),
                "grad_norm": grad_norm.item(),
            }
