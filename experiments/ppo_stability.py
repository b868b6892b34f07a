"""Does PPO from scratch end alike whatever its seed? Final returns over seeds: mean, standard deviation, none nan.

    python -m experiments.ppo_stability --out benchmarks/results/ppo_stability.json

A policy without any training before is trained by PPO on runs of a small workload, once per seed. Each is judged, greedy, on the
same runs that it never saw, beside a policy that draws rungs at random: the return of a run is the sum of its rewards over
decisions, mean over layers. Curves are the mean reward of every rollout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.record import earlier_runs, find_run, program, stamp, write
from mango.networks import PolicyNetwork
from mango.policies import RandomPolicy
from mango.policy_file import freeze, load_policy
from mango_env.recorder import record_run
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from train_policy import ppo

REWARD = Reward(alpha=1.0, beta=1.0, gamma=0.2, loss="raw")
UNSEEN = 1000                                            # seeds of the runs that policies are judged on begin here


@dataclass(frozen=True)
class Args:
    workload: str = "digits_mlp"                        # a name or module:function
    steps: int = 40                                     # optimizer steps of a run
    interval: int = 5                                   # of them per decision
    budget: float = 0.25                                # of AdamW's bytes
    seeds: int = 5                                      # trainings
    judged: int = 6                                     # unseen runs that each policy is judged on
    timesteps: int = 1536                               # decisions for a layer that a training sees
    lr: float = 2e-3                                    # of PPO
    out: Path = Path("benchmarks/results/ppo_stability.json")


def returns_of(policy: Any, args: Args) -> float:
    """Mean return over unseen runs."""
    setting: Mapping[str, Any] = {"horizon": args.steps, "interval": args.interval, "memory_budget": args.budget}
    runs = [TrainingRun(args.workload, UNSEEN + i, **setting) for i in range(args.judged)]
    return fmean(record_run(run, policy, None, REWARD).returns for run in runs)


def trained(seed: int, args: Args) -> dict[str, Any]:
    """One training and what it is worth; the policy that draws at random has the same seed."""
    from mango_env.layer_vec_env import LayerVecEnv

    settings = ppo.PpoArgs(
        total_timesteps=args.timesteps, rollout=min(384, args.timesteps), batch_size=128, n_epochs=8, learning_rate=args.lr,
        critic_warmup=0, target_kl=None, gamma=0.5, gae_lambda=0.5, seed=seed,
    )  # fmt: skip
    env = LayerVecEnv(args.workload, n_runs=2, horizon=args.steps, interval=args.interval, memory_budget=args.budget,
                      reward=REWARD, actions="rung", seeds=8, seed=seed)  # fmt: skip
    try:
        result = ppo.train(PolicyNetwork("mlp", hidden=(32,), seed=seed), env, settings)
    finally:
        env.close()
    with TemporaryDirectory() as folder:                 # frozen, as it would be used
        policy = load_policy(freeze(result.network, Path(folder) / "trained", head=result.head, card={}))
    return {
        "final_return": returns_of(policy, args),
        "random_return": returns_of(RandomPolicy(seed=seed, persistence=0.0), args),
        "curve": [row["reward"] for row in result.curves],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: mean and standard deviation of the final return, and of its gain over random choice."""
    finals, gains = [run["final_return"] for run in runs], [run["final_return"] - run["random_return"] for run in runs]
    numbers = [*finals, *gains, *(reward for run in runs for reward in run["curve"])]
    return {
        "seeds": len(runs), "final_return_mean": fmean(finals), "final_return_sd": stdev(finals),
        "random_return_mean": fmean(run["random_return"] for run in runs), "gain_mean": fmean(gains), "gain_sd": stdev(gains),
        "not_finite": sum(not math.isfinite(number) for number in numbers),
    }  # fmt: skip


def train(args: Args) -> Path:
    if args.seeds < 2:
        raise ValueError(f"seeds={args.seeds} have no standard deviation: take at least 2")
    torch.set_num_threads(1)
    head, runs = stamp(args), earlier_runs(args.out)
    facts = {name: getattr(args, name) for name in ("workload", "steps", "interval", "budget", "judged", "timesteps", "lr")}
    for seed in range(args.seeds):
        if not find_run(runs, facts | {"seed": seed}):
            runs.append(facts | {"seed": seed} | trained(seed, args))
            print(f"seed {seed}: return {runs[-1]['final_return']:+.3f}, random {runs[-1]['random_return']:+.3f}", flush=True)
            write(args.out, head | {"runs": runs})
    mine = [run for seed in range(args.seeds) if (run := find_run(runs, facts | {"seed": seed}))]
    found = summary(mine)
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return write(args.out, head | {"summary": found, "runs": runs})


def main() -> None:
    program(train, Args, __doc__)


if __name__ == "__main__":
    main()
