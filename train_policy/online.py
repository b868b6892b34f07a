"""A frozen policy goes on learning by PPO while it decides about a training run: what `mango run --online` does.

Each layer is an agent that draws from the policy's probabilities, a little off the best scores that a frozen policy takes, and
is paid the reward of `mango_env.reward` against the interval before: a run that is trained once has no twin. What it learns
from is what was applied, after the budget, with the probability of that rung by itself: exact without a budget, an
approximation under one. The guards are those of `train_policy.ppo`: a small rate, few passes, an end at `target_kl`.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mango.config import LADDER, CompressionConfig, Ladder
from mango.networks import FactoredCategorical, Heads, PolicyNetwork
from mango.policy_choice import as_policy
from mango.policy_file import FrozenPolicy
from mango.ppo_trainer import PPOTrainer
from mango.trunks import State
from mango_env.reward import Reward
from mango_env.run import Interval, TrainingRun
from mango_env.twin import score

REWARD = Reward(loss="raw")
UPDATE_EVERY = 16                                        # decisions; the rest is learned from at the end of the run
EXPLORATION = 0.3                                        # nats of entropy per layer at the start, at most
SHARPEST = 100.0                                         # largest factor of the scores to that end
GUARDS: dict[str, Any] = {"lr": 1e-4, "entropy_coef": 0.0, "target_kl": 0.02}


class NetworkAgents(nn.Module):
    """One head of a `PolicyNetwork` as `PPOTrainer` trains it: an agent per layer, draws from its own generator."""

    num_parameter_groups = 1

    def __init__(self, network: PolicyNetwork, head: str = "rung", ladder: Ladder = LADDER, *, seed: int = 0) -> None:
        super().__init__()
        self.network, self.head, self.ladder = network, head, ladder
        self.generator = torch.Generator().manual_seed(seed)
        self.architecture = {**network.architecture, "head": head}
        self._nvec = (len(ladder),) if head == "rung" else None
        self._state: State | None = None

    @property
    def trunk(self) -> nn.Module:
        return self.network.trunk

    @property
    def value_head(self) -> nn.Linear:
        return self.network.value_head

    def rows(self, features: Mapping[str, Any] | Tensor) -> Tensor:
        layers: Tensor = features["layers"] if isinstance(features, Mapping) else features
        return layers.detach().float()

    def pool(self, rows: Tensor) -> Tensor:
        raise ValueError("every layer is an agent of its own: give a config per layer")

    def encode(self, choices: Sequence[Mapping[str, Any] | CompressionConfig]) -> Tensor:
        """Rungs, or configs, as actions (L, 1) or (L, 7)."""
        configs = [choice if isinstance(choice, CompressionConfig) else CompressionConfig.from_dict(choice) for choice in choices]
        if self.head == "rung":
            return torch.tensor([[self.ladder.rungs.index(config)] for config in configs])
        return torch.tensor([config.to_action() for config in configs])

    def evaluate(self, obs: Tensor, state: State | None = None) -> Heads:
        """The head's logits and the value for observations (L, 64) or (L, T, 64), with gradients."""
        output = self.network(obs, state)
        logits = output.rung_logits if self.head == "rung" else output.knob_logits
        return Heads({self.head: logits}, output.value, output.state)

    def distribution(self, heads: Heads) -> FactoredCategorical:
        return self._choice(heads.logits[self.head])

    def _choice(self, logits: Tensor) -> FactoredCategorical:
        return FactoredCategorical(logits) if self._nvec is None else FactoredCategorical(logits, self._nvec)

    def log_prob(self, heads: Heads, actions: Tensor) -> Tensor:
        return self.distribution(heads).log_prob(actions)

    def entropy(self, heads: Heads) -> Tensor:
        return self.distribution(heads).entropy()

    def decide(self, obs: Tensor, explore: bool = True) -> Tensor:
        """A decision on observations (L, 64) as the optimizer takes it; the memory moves on.

        Knob indices (L, 7), or scores (L, R), to explore with Gumbel noise: without a budget their maxima are draws from the
        policy's probabilities, under one the best combination of them that fits is a draw as well.
        """
        with torch.no_grad():
            heads = self.evaluate(obs, self._state)
        self._state = heads.state
        if self.head == "knobs":
            said = self.distribution(heads)
            return said.sample(self.generator) if explore else said.mode()
        if not explore:
            return heads.logits["rung"].log_softmax(-1)
        uniform = torch.rand(heads.logits["rung"].shape, generator=self.generator).clamp(1e-9, 1 - 1e-7)
        return heads.logits["rung"].log_softmax(-1) - (-uniform.log()).log()

    def sharpen(self, obs: Tensor, nats: float) -> float:
        """Scale the head until its mean entropy is at most `nats` on observations (L, 64); the factor, from 1 to `SHARPEST`.

        The scores of a frozen policy need not be meant as probabilities (`universal` adds up costs, and would draw almost at
        random). The best rungs, and the best combination under a budget, stay what they are.
        """
        layer = self.network.rung_head if self.head == "rung" else self.network.knob_head
        with torch.no_grad():
            logits = self.evaluate(obs).logits[self.head]
            low, high = 0.0, math.log(SHARPEST)
            for _ in range(40):                          # bisection: entropy falls with the factor
                middle = (low + high) / 2
                entropy = self._choice(logits * math.exp(middle)).entropy().mean()
                low, high = (low, middle) if entropy <= nats else (middle, high)
            factor = math.exp(high) if high > 1e-9 else 1.0
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        return factor


class OnlineLearner:
    """Decides about a run, and learns from what came of it.

    `run` waits for decisions (`policy="hold"`); before each interval call `decide`, after it `learn`, at the end `finish`.
    `stats` has what every update was: its step, mean losses (`mango.ppo_trainer.STATISTICS`) and mean reward.
    """

    def __init__(self, policy: Any, run: TrainingRun, *, update_every: int = UPDATE_EVERY) -> None:
        frozen = as_policy(policy, run.optimizer.ladder)
        if not isinstance(frozen, FrozenPolicy):
            raise ValueError(f"only a frozen policy can go on learning; {policy!r} is {type(frozen).__name__}: take --no-online")
        network = copy.deepcopy(frozen.network).requires_grad_(True)
        self.run, self.update_every = run, update_every
        self.agents = NetworkAgents(network, frozen.head, frozen.ladder, seed=run.seed)
        self.trainer = PPOTrainer(self.agents, seed=run.seed, **GUARDS)
        self.stats: list[dict[str, float]] = []
        self._sharpened = 0.0                            # by which factor

    def decide(self) -> None:
        """Put in force what the policy says, within the budget. Before the first step there is nothing to explore on yet."""
        self._seen = torch.from_numpy(self.run.observe())
        if not self._sharpened and self.run.t > 0:
            self._sharpened = self.agents.sharpen(self._seen, EXPLORATION)
            self.trainer.optimizer.param_groups[0]["lr"] /= self._sharpened    # what the trunk learns is scaled with the head
        self._applied = self.run.apply(self.agents.decide(self._seen, explore=self.run.t > 0))

    def learn(self, interval: Interval) -> None:
        """What the last decision was worth; every `update_every` decisions an update."""
        if not self._sharpened:
            return
        rewards = torch.from_numpy(score(REWARD, interval, None).rewards)
        self.trainer.collect_experience(self._seen, self._applied, rewards)
        if len(self.trainer) >= self.update_every:
            self._update()

    def finish(self) -> None:
        """Learn from what is left, where there is enough of it."""
        if len(self.trainer) >= self.trainer.min_samples:
            self._update()

    def _update(self) -> None:
        self.stats.append({"step": self.run.t} | self.trainer.update_policy())
