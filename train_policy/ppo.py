"""PPO through Stable-Baselines3, starting from offline weights, with the guards that keep it from unlearning them.

Fine-tuning a cloned policy with PPO's defaults loses quality. What holds it: large rollouts, a small step, `target_kl`,
a critic that is fitted before the actor may move, and optionally a KL anchor to the policy it started from. Whether the
result is used is decided by `train_policy.gate`, not here.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mango.networks import PolicyNetwork
from train_policy.fitting import Advance, TrainingInterrupted, progress_line, save_checkpoint
from train_policy.seeding import borrowed_rng
from train_policy.transfer import check_head, clone, from_sb3, import_sb3, sb3_policy_kwargs, to_sb3

if TYPE_CHECKING:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecEnv

    from train_policy.sb3_modules import AnchoredPolicy

_LOGGED = ("approx_kl", "entropy_loss", "value_loss", "policy_gradient_loss", "explained_variance", "clip_fraction")


@dataclass(frozen=True, slots=True)
class PpoArgs:
    """How to fine-tune. A timestep is one decision for one layer."""

    total_timesteps: int = 40_960
    rollout: int = 4_096                                 # timesteps per update, over all slots; small ones unlearn
    batch_size: int = 512
    n_epochs: int = 4
    learning_rate: float = 1e-4                          # of the actor; above 1e-4 a cloned policy is lost
    critic_learning_rate: float = 1e-3                   # during the warm-up
    critic_warmup: int = 4_096                           # timesteps with a frozen actor
    target_kl: float | None = 0.02
    clip_range: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.95
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    kl_anchor: float = 0.0                               # weight of KL(policy || start); 0: none
    head: str = "rung"                                   # "rung" for a Discrete space, "knobs" for MultiDiscrete
    seed: int = 0

    def __post_init__(self) -> None:
        check_head(self.head)
        for name in ("total_timesteps", "rollout", "batch_size", "n_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: advantages are normalised within a batch")


@dataclass(frozen=True, slots=True)
class PpoResult:
    """The fine-tuned network, which head was trained, and one row of numbers per rollout."""

    network: PolicyNetwork
    head: str
    timesteps: int
    curves: tuple[dict[str, float], ...] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.curves[-1]) if self.curves else {}


def build(network: PolicyNetwork, env: "VecEnv", args: PpoArgs) -> "PPO":
    """An SB3 PPO whose actor and critic carry the network's weights; `ppo.save(path)` and `learn` work as always.

    SB3 seeds and draws from the global generators; here it gets no seed, and whoever calls `learn` does so inside
    `borrowed_rng` (as `train` does).
    """
    sb3 = import_sb3()
    from train_policy.sb3_modules import AnchoredPolicy

    kwargs = sb3_policy_kwargs(network)
    n_steps, batch_size = rollout_shape(args.rollout, args.batch_size, env.num_envs)
    anchored = args.kl_anchor > 0
    with borrowed_rng(args.seed):
        ppo: PPO = sb3.PPO(
            AnchoredPolicy,
            env,
            learning_rate=args.learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=args.n_epochs,
            gamma=args.gamma,
            gae_lambda=args.gae_lambda,
            clip_range=args.clip_range,
            ent_coef=1.0 if anchored else args.ent_coef,
            vf_coef=args.vf_coef,
            max_grad_norm=args.max_grad_norm,
            target_kl=args.target_kl,
            policy_kwargs=kwargs,
            device="cpu",
            seed=None,
        )
    # SB3's default logger makes a folder among the temporary files for every run, and leaves it there.
    ppo.set_logger(sb3.common.logger.Logger(folder=None, output_formats=[]))
    policy = policy_in(ppo)
    to_sb3(network, policy, args.head)
    if anchored:
        reference = clone(network).eval().requires_grad_(False)
        policy.anchor(reference, args.head, kl_weight=args.kl_anchor, entropy_weight=args.ent_coef)
    return ppo


def policy_in(ppo: "PPO") -> "AnchoredPolicy":
    """The policy of a PPO that `build` made."""
    policy: Any = ppo.policy
    found: AnchoredPolicy = policy
    return found


def train(
    network: PolicyNetwork, env: "VecEnv", args: PpoArgs | None = None, *, checkpoint: Path | None = None, progress: bool = False
) -> PpoResult:
    """Fine-tune `network` on a vector environment such as `LayerVecEnv`; the given network is left as it was.

    `checkpoint`: policy file rewritten after every rollout; on Ctrl-C it is written once more and
    `TrainingInterrupted` is raised. The same arguments and seed give the same weights.
    """
    args = args or PpoArgs()
    ppo = build(network, env, args)
    card = {"stage": "ppo", "args": asdict(args)}

    def save() -> None:
        save_checkpoint(from_sb3(policy_in(ppo), network).network, checkpoint, head=args.head, card=card)

    with progress_line("PPO", args.total_timesteps, progress) as advance, borrowed_rng(args.seed):
        env.seed(args.seed)
        callback, curves = _callback(args, advance, save)
        try:
            ppo.learn(args.total_timesteps, callback=callback, log_interval=None)  # type: ignore[arg-type]
        except KeyboardInterrupt as interrupt:
            save()
            raise TrainingInterrupted("PPO", checkpoint, f"{ppo.num_timesteps} timesteps") from interrupt
    save()
    return PpoResult(from_sb3(policy_in(ppo), network).network, args.head, ppo.num_timesteps, tuple(curves))


def rollout_shape(rollout: int, batch_size: int, slots: int) -> tuple[int, int]:
    """(n_steps per slot, batch size) with about `rollout` timesteps that split into equal batches of at most `batch_size`.

    SB3 warns about, and learns from, a truncated last batch; a slightly longer rollout usually divides well.

    >>> rollout_shape(4096, 512, 3)
    (1392, 464)
    """
    least = max(math.ceil(rollout / slots), math.ceil(2 / slots))

    def largest(total: int) -> int:
        return max(d for d in range(1, min(batch_size, total) + 1) if total % d == 0)

    n_steps = max(range(least, least + max(1, least // 50) + 1), key=lambda steps: (largest(steps * slots), -steps))
    return n_steps, largest(n_steps * slots)


def _callback(args: PpoArgs, advance: Advance, save: Callable[[], None]) -> tuple[Any, list[dict[str, float]]]:
    """SB3's callback: freezes the actor during the warm-up, keeps one row per rollout, moves the progress line."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.utils import FloatSchedule

    curves: list[dict[str, float]] = []

    class Guard(BaseCallback):
        seen = 0

        def _on_rollout_start(self) -> None:
            self.close_row()
            warming = self.num_timesteps < min(args.critic_warmup, args.total_timesteps)
            policy: Any = self.model.policy
            for module in (policy.pi_features_extractor, policy.action_net):
                module.requires_grad_(not warming)
            self.model.lr_schedule = FloatSchedule(args.critic_learning_rate if warming else args.learning_rate)

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            model: Any = self.model
            reward = float(np.mean(model.rollout_buffer.rewards))
            curves.append({"timesteps": float(self.num_timesteps), "reward": reward})
            advance(self.num_timesteps - self.seen, status=f"reward {reward:+.4f}")
            self.seen = self.num_timesteps

        def _on_training_end(self) -> None:
            self.close_row()

        def close_row(self) -> None:
            """Add what the update after the last rollout reported, and save."""
            if curves and "approx_kl" not in curves[-1]:
                logged = self.logger.name_to_value
                curves[-1].update({name: float(logged[f"train/{name}"]) for name in _LOGGED if f"train/{name}" in logged})
                save()

    return Guard(), curves
