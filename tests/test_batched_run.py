"""Runs side by side: they are the runs that they would be alone, to float32's rounding, and stay runs of their own."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mango.config import CompressionConfig
from mango_env.batched_run import BatchedRuns, batchable
from mango_env.dataset import TrajectoryDataset
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from tests.tiny_workload import plain, tiny
from train_policy.collect import CollectArgs, Job, collect, groups, run_id

ARGS = CollectArgs(horizon=12, interval=4, reward=Reward(loss="raw"))
PLAIN = "tests.tiny_workload:plain"
# A loss is a mean over hundreds of products, each rounded to 2^-24 of itself; the sums are taken in another order, and twelve
# steps amplify what differs after the first. Measured: 3e-7.
RTOL = 1e-4


def start(workload: Any, seed: int, **options: Any) -> TrainingRun:
    return TrainingRun(workload, seed, **{"horizon": 12, "interval": 4, "memory_budget": 1.5} | options)


@pytest.mark.parametrize("workload", [PLAIN, "digits_mlp"])
def test_episodes_recorded_side_by_side_are_those_recorded_one_by_one(workload: str, tmp_path: Path) -> None:
    policies, budget = ["random", "random-knobs", "fixed:m8v8", "fixed:r32p4q4v0", "fixed:m4v0"], 1.5
    for name, batch in (("alone", 1), ("together", 8)):
        done = collect(workload, policies, 2, budget, tmp_path / name, ARGS, batch=batch)
        assert (done.recorded, done.over_budget, done.diverged) == (10, 0, 0)
    alone, together = (
        {(e.attributes["run_id"], e.attributes["layer_index"]): e for e in TrajectoryDataset(tmp_path / name)}
        for name in ("alone", "together")
    )
    assert alone.keys() == together.keys() and len(alone) >= 20
    for key, one in alone.items():
        other = together[key]
        assert np.array_equal(one.actions, other.actions) and np.array_equal(one.infos["bytes"], other.infos["bytes"])
        assert np.allclose(one.infos["loss"], other.infos["loss"], rtol=RTOL, atol=0)
        assert np.allclose(one.attributes["val_loss"], other.attributes["val_loss"], rtol=RTOL, atol=0)


def test_full_precision_follows_the_run_by_itself_step_by_step() -> None:
    full: dict[str, Any] = {"memory_budget": 4.0, "policy": CompressionConfig()}
    runs, alone = ([start("digits_mlp", seed, lr=lr, **full) for seed, lr in enumerate((1e-3, 5e-3))] for _ in range(2))
    batch = BatchedRuns(runs)
    while not runs[0].done:
        for interval, run in zip(batch.advance(), alone, strict=True):
            assert interval is not None
            assert np.allclose(interval.losses, run.advance().losses, rtol=RTOL, atol=0)
    for run, other in zip(runs, alone, strict=True):
        for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=RTOL, atol=1e-5)
        assert run.evaluate()["val_loss"] == pytest.approx(other.evaluate()["val_loss"], rel=RTOL)


def test_a_run_that_diverges_leaves_the_others_alone() -> None:
    runs = [start(plain, 0), start(plain, 1, lr=1e6), start(plain, 2)]
    alone = start(plain, 2)
    batch = BatchedRuns(runs)
    first = batch.advance()
    assert [interval is not None and interval.diverged for interval in first] == [False, True, False]
    second = batch.advance()
    assert second[1] is None and runs[1].done and runs[1].t == 4
    alone.advance()
    assert second[2] is not None and np.allclose(second[2].losses, alone.advance().losses, rtol=RTOL, atol=0)


def test_a_batched_run_can_be_forked_saved_and_restored() -> None:
    runs = [start(plain, seed) for seed in range(3)]
    batch = BatchedRuns(runs)
    batch.advance()
    saved, fork = [run.snapshot() for run in runs], runs[1].fork()
    intervals = batch.advance()
    assert intervals[1] is not None and np.allclose(fork.advance().losses, intervals[1].losses, rtol=RTOL, atol=0)
    for run, snapshot in zip(runs, saved, strict=True):
        run.restore(snapshot)
    again = batch.advance()
    for interval, repeated in zip(intervals, again, strict=True):
        assert interval is not None and repeated is not None and np.array_equal(interval.losses, repeated.losses)


def test_what_cannot_be_batched_is_named() -> None:
    assert batchable(start("digits_mlp", 0)) and not batchable(start(tiny, 0)) and not batchable(start("digits_cnn", 0))
    assert not batchable(start(plain, 0, optimizer_options={"release_gradients": True}))
    wrong: list[tuple[list[TrainingRun], str]] = [
        ([], "no run to batch"),
        ([start(tiny, 0), start(tiny, 1)], "cannot be batched"),
        ([start(plain, 0), start(plain, 1, interval=3)], "share"),
        ([start(plain, 0), start("digits_mlp", 1)], "share"),
    ]
    for runs, message in wrong:
        with pytest.raises(ValueError, match=message):
            BatchedRuns(runs)
    runs = [start(plain, 0), start(plain, 1)]
    batch = BatchedRuns(runs)
    runs[0].advance()
    with pytest.raises(ValueError, match="different steps"):
        batch.advance()


def test_runs_that_cannot_be_batched_are_recorded_one_by_one(tmp_path: Path) -> None:
    for name, batch in (("alone", 1), ("asked", 4)):
        collect(tiny, ["random", "fixed:m8v8"], 2, 1.5, tmp_path / name, ARGS, batch=batch)
    assert TrajectoryDataset(tmp_path / "alone").digest == TrajectoryDataset(tmp_path / "asked").digest


def test_groups_hold_every_job_once_and_leave_no_worker_without_one() -> None:
    settings = (ARGS, CollectArgs(horizon=8, interval=4, reward=Reward(loss="raw")))
    jobs = [Job(run_id(PLAIN, "random", s, 1.5, args), PLAIN, "random", s, 1.5, args) for s in range(11) for args in settings]
    for batch, workers in ((1, 1), (4, 1), (16, 1), (16, 4)):
        found = groups(jobs, batch, workers)
        assert Counter(job.run_id for group in found for job in group) == Counter(job.run_id for job in jobs)
        assert all(len(group) <= batch and len({job.args for job in group}) == 1 for group in found)
        assert len(found) >= workers
    assert [group[0] for group in groups(jobs, 1)] == jobs


def test_workers_record_batches_too(tmp_path: Path) -> None:
    done = collect(PLAIN, ["random", "fixed:m8v8"], 4, 1.5, tmp_path / "s", ARGS, workers=2, batch=3)
    assert (done.recorded, done.episodes, done.over_budget) == (8, 16, 0)
    assert collect(PLAIN, ["random", "fixed:m8v8"], 4, 1.5, tmp_path / "s", ARGS, batch=3).skipped == 8
    with pytest.raises(ValueError, match="batch=0"):
        collect(PLAIN, "random", 1, 1.5, tmp_path / "t", ARGS, batch=0)
