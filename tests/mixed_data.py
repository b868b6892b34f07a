"""Recorded runs for the tests of training (`conftest.py`): by a teacher, by behaviours of mixed quality, and a puzzle."""

from pathlib import Path
from typing import Any

import numpy as np

from mango.config import LADDER
from mango.features import FEATURE_DIM
from mango.networks import PolicyNetwork
from mango.policy_file import freeze, load_policy
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.episode import INFOS, Episode, info_dtype
from mango_env.recorder import record_run
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.store import TrajectoryWriter
from train_policy.collect import CollectArgs, collect

WORKLOAD, AMPLE = "digits_mlp", 1.2                          # with an ample budget every decision is applied as it was made
MIXED, TEACHER = CollectArgs(horizon=30, interval=5), CollectArgs(horizon=80, interval=4)


def mixed(root: Path) -> TrajectoryCache:
    """Random, every fixed rung and an exploring heuristic: good decisions and bad ones."""
    collect([WORKLOAD], ["random", "fixed", "explore:water-filling"], 3, [AMPLE], root, MIXED)
    return build_cache(root)


def expert(root: Path) -> TrajectoryCache:
    """Water-filling, a deterministic teacher, under two budgets."""
    collect([WORKLOAD], ["water-filling"], 8, [0.25, AMPLE], root, TEACHER)
    return build_cache(root)


def puzzle(root: Path) -> TrajectoryCache:
    """Made-up runs with a known answer: rungs are drawn uniformly, one pays 1 (`answer` says which), the others nothing."""
    write_puzzle(root, 30)
    return build_cache(root)


def answer(observations: Any) -> Any:
    """The rung that pays (N,): 2, 5 or 8, by where the first feature lies."""
    return 2 + 3 * np.digitize(np.asarray(observations)[:, 0], [-5.0, 5.0])


def write_puzzle(root: Path, runs: int, *, rung: int | None = None, steps: int = 8, layers: int = 2) -> None:
    """`rung`: always that one, in place of a random one."""
    rng, reward = np.random.default_rng(0), Reward()
    with TrajectoryWriter(root, task="puzzle", policy="random", reward=reward) as writer:
        for run in range(runs):
            for layer in range(layers):
                seen = rng.uniform(-15, 15, (steps + 1, FEATURE_DIM)).astype(np.float32)
                seen[:, 1:] = 0                              # the other features say nothing
                rungs = rng.integers(len(LADDER), size=steps) if rung is None else np.full(steps, rung)
                infos = {name: np.zeros(steps, info_dtype(name)) for name in INFOS}
                infos["rung"] = rungs.astype(np.int16)
                last = np.arange(steps) == steps - 1
                writer.add(
                    Episode(
                        observations=seen,
                        actions=np.array([LADDER[int(r)].to_action() for r in rungs], np.int8),
                        rewards=(rungs == answer(seen[:-1])).astype(np.float32),
                        terminations=last,
                        truncations=np.zeros(steps, bool),
                        infos=infos,
                        attributes=facts(run, layer, layers, reward),
                    )
                )


def facts(run: int, layer: int, layers: int, reward: Reward) -> dict[str, Any]:
    return {
        "run_id": f"run{run}", "layer_index": layer, "layer_name": f"layer{layer}", "layer_kind": "linear", "n_layers": layers,
        "workload": "easy" if run % 2 else "hard", "policy": "random", "seed": run, "budget_bytes": 1000, "adamw_bytes": 4000,
        "horizon": 80, "interval": 10, "lr": 1e-3, "rule": "adamw", "numel": 500, "reward": reward.to_json(),
        "mango_version": "0",
    }  # fmt: skip


def fresh_return(network: PolicyNetwork, folder: Path, head: str = "rung", seeds: int = 3) -> float:
    """Mean return of the frozen network on runs, set up as those of `mixed`, that nobody recorded."""
    policy: Any = load_policy(freeze(network, folder / "policy", head=head, card={}))
    setting: dict[str, Any] = {"horizon": MIXED.horizon, "interval": MIXED.interval, "memory_budget": AMPLE}
    runs = [TrainingRun(WORKLOAD, 1000 + seed, **setting) for seed in range(seeds)]
    return sum(record_run(run, policy, None, MIXED.reward).returns for run in runs) / seeds
