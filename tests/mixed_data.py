"""Recorded runs for the tests of training: collected once per process, by a teacher and by behaviours of mixed quality."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mango.networks import PolicyNetwork
from mango.policy_file import freeze, load_policy
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.recorder import record_run
from mango_env.run import TrainingRun
from train_policy.collect import CollectArgs, collect

WORKLOAD = "digits_mlp"
SETTING = CollectArgs(horizon=30, interval=5)
TIGHT, AMPLE = 0.0625, 1.2                                   # fractions of AdamW's state bytes
MIXED = ("random", "fixed", "explore:water-filling")
_caches: dict[str, TrajectoryCache] = {}


def mixed(factory: pytest.TempPathFactory) -> TrajectoryCache:
    """Random, every fixed rung and an exploring heuristic under a tight budget: most of it is far from good."""
    return _once("mixed", factory, list(MIXED), 3, [AMPLE])


def expert(factory: pytest.TempPathFactory) -> TrajectoryCache:
    """Water-filling, a deterministic teacher, under two budgets."""
    return _once("expert", factory, ["water-filling"], 20, [0.25, AMPLE])


def _once(name: str, factory: pytest.TempPathFactory, policies: list[str], seeds: int, budgets: list[float]) -> TrajectoryCache:
    if name not in _caches:
        root = factory.mktemp(name) / "store"
        collect([WORKLOAD], policies, seeds, budgets, root, SETTING)
        _caches[name] = build_cache(root)
    return _caches[name]


def fresh_return(network: PolicyNetwork, folder: Path, head: str = "rung", seeds: int = 4) -> float:
    """Mean return of a frozen policy under the tight budget on runs that nobody recorded."""
    policy: Any = load_policy(freeze(network, folder / "policy", head=head, card={}))
    runs = [
        TrainingRun(WORKLOAD, 1000 + seed, horizon=SETTING.horizon, interval=SETTING.interval, memory_budget=AMPLE)
        for seed in range(seeds)
    ]
    return sum(record_run(run, policy, None, replace(SETTING).reward).returns for run in runs) / seeds
