"""Collection: what it records, that it goes on where it stopped, and that Ctrl-C and dead processes cost little."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mango.config import FULL, LADDER
from mango.features import FEATURE_INDEX
from mango.policies import FixedPolicy, WaterFillingPolicy
from mango_env.dataset import TrajectoryDataset, recorded_layers
from mango_env.recorder import record_run
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from tests.tiny_workload import tiny
from train_policy.behaviours import ExploringPolicy, FactorialPolicy, RandomKnobsPolicy, behaviours
from train_policy.collect import CollectArgs, collect
from train_policy.oracle import OraclePolicy, affordable

ARGS = CollectArgs(horizon=6, interval=3, reward=Reward(loss="raw"))
ROOT = Path(__file__).resolve().parent.parent
TINY = "tests.tiny_workload:tiny"


def test_every_combination_is_recorded_once_and_asking_again_records_nothing(tmp_path: Path) -> None:
    policies = ["random", "random-knobs", "fixed:m8v8", "water-filling", "adaptive", "explore:water-filling"]
    first = collect(tiny, policies, 2, [0.5, 1.5], tmp_path / "s", ARGS)
    assert (first.recorded, first.skipped, first.over_budget, first.diverged) == (24, 0, 0, 0)
    assert first.episodes == 48 and first.decisions == 96 and set(first.returns) == set(policies)
    dataset = TrajectoryDataset(tmp_path / "s")
    assert len(dataset) == 48
    assert Counter(facts["policy"] for facts in dataset.attributes) == dict.fromkeys(policies, 8)
    again = collect(tiny, policies, 3, [0.5, 1.5], tmp_path / "s", ARGS)           # one seed more
    assert (again.recorded, again.skipped) == (12, 24)
    assert len(TrajectoryDataset(tmp_path / "s")) == 72


def test_the_same_collection_has_the_same_digest_and_another_seed_another(tmp_path: Path) -> None:
    def digest(name: str, args: CollectArgs = ARGS) -> str:
        collect(tiny, ["random", "explore:water-filling"], 1, 1.5, tmp_path / name, args)
        return TrajectoryDataset(tmp_path / name).digest

    first, second = digest("a"), digest("b")
    other = digest("c", CollectArgs(horizon=6, interval=3, reward=Reward(loss="raw"), seed=1))
    assert first == second != other


def test_fixed_means_every_rung() -> None:
    assert behaviours(["fixed", "random"]) == [*(f"fixed:{name}" for name in LADDER.names), "random"]


def test_a_run_that_was_cut_short_gets_its_missing_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between two episodes of a run, and a salvage."""
    from mango_env.store import TrajectoryWriter

    original, added = TrajectoryWriter.add, 0

    def dies(self: Any, episode: Any) -> None:
        nonlocal added
        added += 1
        if added == 4:                                           # the second layer of the second run
            raise KeyboardInterrupt
        original(self, episode)

    monkeypatch.setattr(TrajectoryWriter, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny, ["water-filling"], 3, 1.5, tmp_path / "s", ARGS)
    monkeypatch.setattr(TrajectoryWriter, "add", original)
    assert sorted(len(layers) for layers, _ in recorded_layers(tmp_path / "s").values()) == [1, 2]
    resumed = collect(tiny, ["water-filling"], 3, 1.5, tmp_path / "s", ARGS)
    assert (resumed.recorded, resumed.skipped) == (2, 1)
    collect(tiny, ["water-filling"], 3, 1.5, tmp_path / "whole", ARGS)
    assert TrajectoryDataset(tmp_path / "s").digest == TrajectoryDataset(tmp_path / "whole").digest


def test_processes_record_what_one_process_records(tmp_path: Path) -> None:
    one = collect(TINY, ["random", "fixed:m8v8"], 2, 1.5, tmp_path / "one", ARGS)
    two = collect(TINY, ["random", "fixed:m8v8"], 2, 1.5, tmp_path / "two", ARGS, workers=2)
    assert one.returns == two.returns and two.recorded == 4
    assert TrajectoryDataset(tmp_path / "one").digest == TrajectoryDataset(tmp_path / "two").digest


@pytest.mark.parametrize(("workers", "group"), [(1, False), (2, False), (2, True)])
def test_ctrl_c_leaves_every_finished_episode_in_the_store(workers: int, group: bool, tmp_path: Path) -> None:
    """A real process and a real signal; a terminal sends it to the worker processes, too."""
    seeds = 100_000 if workers == 1 else 2000
    code = (
        "from train_policy.collect import CollectArgs, collect; from mango_env.reward import Reward; "
        "args = CollectArgs(horizon=6, interval=3, reward=Reward(loss='raw')); "
        f"collect({TINY!r}, ['random'], {seeds}, 1.5, {str(tmp_path / 's')!r}, args, workers={workers})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        full = 1 if workers == 1 else 4                          # shards of 50 episodes, or of a batch of 8 runs
        while len(list((tmp_path / "s" / "data" / "shards").glob("*.h5"))) < full and time.monotonic() < deadline:
            time.sleep(0.05)
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert b"KeyboardInterrupt" in errors
    assert not list((tmp_path / "s" / "data" / "shards").glob("*.tmp"))
    assert not list((tmp_path / "s" / "data" / "shards").glob("[!.]*.lock"))
    dataset = TrajectoryDataset(tmp_path / "s")
    assert len(dataset) >= 50 and all(len(layers) == total == 2 for layers, total in recorded_layers(tmp_path / "s").values())


def test_mistakes_are_named_before_anything_runs(tmp_path: Path) -> None:
    wrong: list[tuple[Any, str]] = [
        ((tiny, "clever", 1, 1.5), "unknown policy 'clever'"),
        ((tiny, "fixed:m3v3", 1, 1.5), "unknown rung 'm3v3'"),
        (("nowhere", "random", 1, 1.5), "unknown workload 'nowhere'"),
        ((tiny, "random", 1, 0.001), "least feasible"),
        ((tiny, "random", 0, 1.5), "at least one"),
    ]
    for (workload, policy, seeds, budget), message in wrong:
        with pytest.raises(ValueError, match=message):
            collect(workload, policy, seeds, budget, tmp_path / "s", ARGS)
    assert not (tmp_path / "s").exists()


def test_exploring_tries_rungs_around_a_policy_and_logs_their_probabilities() -> None:
    run = TrainingRun(tiny, 0, horizon=6, interval=3, memory_budget=1.5)
    seen = torch.from_numpy(run.observe()).repeat(500, 1)
    for inner in (WaterFillingPolicy(), FixedPolicy(FULL)):
        policy = ExploringPolicy(inner, epsilon=0.4, seed=1)
        choice = policy.act(seen)
        picked = [LADDER[int(r)] for r in choice.argmax(1)] if isinstance(choice, Tensor) else list(choice)  # type: ignore[arg-type]
        scored = isinstance(inner, WaterFillingPolicy)
        usual = [LADDER[int(r)] for r in inner.scores(seen).argmax(1)] if scored else [FULL] * len(seen)  # type: ignore[union-attr]
        same = np.array([a == b for a, b in zip(picked, usual, strict=True)])
        share = 0.6 + 0.4 / len(LADDER)                               # kept, or drawn by chance
        assert abs(same.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(same))
        assert policy.logp is not None and policy.logp.shape == (len(seen),)
        assert np.allclose(np.exp(policy.logp[same]), share) and np.allclose(np.exp(policy.logp[~same]), 0.4 / len(LADDER))


def test_logged_probabilities_reach_the_store(tmp_path: Path) -> None:
    collect(tiny, "explore:adaptive", 2, 1.5, tmp_path / "s", ARGS)
    logp = np.concatenate([episode.infos["behavior_logp"] for episode in TrajectoryDataset(tmp_path / "s")])
    assert (logp < 0).all() and len(np.unique(logp)) == 2


def test_random_knobs_keep_an_action_for_a_while() -> None:
    policy = RandomKnobsPolicy(seed=0, persistence=0.75)
    seen = torch.zeros(400, 64)
    first, second = policy.act(seen), policy.act(seen)
    kept = np.mean([a == b for a, b in zip(first, second, strict=True)])
    assert 0.65 < kept < 0.85 and len(set(first)) > 350


def test_the_designed_experiment_keeps_a_draw_for_a_phase_and_shares_it_within_kinds_in_half_of_the_runs() -> None:
    seen = torch.zeros(6, 64)
    seen[:3, FEATURE_INDEX["kind_conv"]] = seen[3:, FEATURE_INDEX["kind_head"]] = 1
    shared = cheap = 0
    for seed in range(200):
        policy = FactorialPolicy(seed=seed)
        early = policy.act(seen)
        assert policy.act(seen) == early                              # the same phase
        seen[:, FEATURE_INDEX["progress"]] = 0.5
        late = policy.act(seen)
        seen[:, FEATURE_INDEX["progress"]] = 0.0
        same_kind = len(set(early[:3])) == len(set(early[3:])) == len(set(late[:3])) == len(set(late[3:])) == 1
        shared += same_kind
        cheap += early[0].name == "m0v0"
        policy.reset()
    assert 70 < shared < 130 and 30 < cheap < 80                      # of 200: half, and 6 in 26


def test_j6_the_oracle_measures_every_affordable_rung_and_leaves_the_run_as_it_was() -> None:
    run = TrainingRun(tiny, 3, horizon=12, interval=3, memory_budget=0.5)
    untouched = TrainingRun(tiny, 3, horizon=12, interval=3, memory_budget=0.5)
    run.advance(), untouched.advance()
    scores = OraclePolicy(ARGS.reward).decide(run)
    allowed = torch.from_numpy(affordable(run))
    assert scores.shape == (2, len(LADDER)) and not allowed.all() and torch.equal(scores.isfinite(), allowed)
    run.apply(None), untouched.apply(None)
    assert np.array_equal(run.advance().losses, untouched.advance().losses)


def test_j6_the_oracle_earns_more_than_what_it_chooses_from() -> None:
    """One decision ahead its choice maximises the measured reward, here of runs with one layer that matters."""
    reward = Reward(alpha=1.0, beta=1.0, gamma=1.0, loss="raw")

    def earned(policy: Any, seed: int) -> float:
        return record_run(TrainingRun(tiny, seed, horizon=12, interval=3, memory_budget=1.5), policy, None, reward).returns

    seeds = range(3)
    oracle = [earned(OraclePolicy(reward), seed) for seed in seeds]
    for rung in ("full", "m8v8", "r32p4q4v0"):
        fixed = [earned(FixedPolicy(LADDER[LADDER.index(rung)]), seed) for seed in seeds]
        assert np.mean(oracle) >= np.mean(fixed) - 0.02


