"""Promises of power and time (row J3): averaged, exported, rewarded where asked for; never a number that was not measured."""

import csv
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mango_env import Reward, TrainingRun, TrajectoryRecorder
from mango_env.energy import Energy, metered, no_driver
from mango_env.env import MangoEnv
from mango_env.recorder import Recording
from mango_env.twin import costed_twin_of
from tests.tiny_workload import tiny

SAMPLES = [(0.0, 100.0), (0.5, 200.0), (2.0, 50.0), (2.1, 50.0)]


def test_j3_the_moving_average_is_that_of_its_definition_at_uneven_times() -> None:
    expected = [SAMPLES[0][1]]
    for (before, _), (when, watts) in pairwise(SAMPLES):
        kept = math.exp(-(when - before) / 0.7)
        expected.append(kept * expected[-1] + (1 - kept) * watts)
    assert Energy(SAMPLES).smoothed(0.7) == pytest.approx(expected)
    assert Energy([(t / 10, 80.0) for t in range(9)]).smoothed() == pytest.approx([80.0] * 9)
    assert Energy().smoothed() == []
    with pytest.raises(ValueError, match="seconds=0 must be positive"):
        Energy(SAMPLES).smoothed(0)


def test_j3_a_csv_has_a_line_per_sample_and_there_is_none_without_samples(tmp_path: Path) -> None:
    energy = Energy(SAMPLES)
    with energy.write_csv(tmp_path / "new" / "power.csv", 0.7).open() as file:
        rows = list(csv.DictReader(file))
    assert [(float(row["seconds"]), float(row["watts"])) for row in rows] == SAMPLES
    assert [float(row["watts_ewma"]) for row in rows] == energy.smoothed(0.7)
    with pytest.raises(ValueError, match="unavailable: there is no nvidia-smi"):
        Energy(problem="there is no nvidia-smi on this machine").write_csv(tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that tells 150 Watts."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 150.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.mark.usefixtures("driver")
def test_a_block_of_any_length_has_joules() -> None:
    with metered(interval=60.0) as energy:
        pass
    (first, _), (last, _) = energy.samples
    assert energy.joules == pytest.approx(150.0 * (last - first))


def episode(**reward: Any) -> list[tuple[float, dict[str, float], dict[str, float]]]:
    """Rewards, their components, and what the last interval took, of an episode of fixed decisions."""
    env = MangoEnv(tiny, horizon=8, interval=4, memory_budget=0.9, reward={"loss": "raw", **reward})
    env.reset(seed=0, options={"run_seed": 1})
    action = np.zeros_like(env.action_space.sample())
    found, over = [], False
    while not over:
        _, paid, over, _, info = env.step(action)
        interval = env._history[-1][1]
        took = {"seconds": interval.step_seconds / (interval.stop - interval.start)}
        if env.twin is not None:
            took |= {"twin": env.twin.step_seconds or 0.0}
        found.append((float(paid), info["reward_components"], took))
    return found


def test_j3_time_is_charged_relative_to_the_twins_and_only_where_it_is_asked_for() -> None:
    plain, timed = episode(), episode(time_weight=0.5)
    assert all("time" not in components for _, components, _ in plain)
    for (free, _, _), (paid, components, took) in zip(plain, timed, strict=True):
        above = min(max(took["seconds"] / took["twin"] - 1, -2.0), 2.0)
        assert components["time"] == pytest.approx(above, rel=1e-6)
        assert paid == pytest.approx(free - 0.5 * above, abs=1e-5)
    with pytest.raises(ValueError, match="time_weight=-1 must be a finite weight"):
        Reward(time_weight=-1)


@pytest.mark.usefixtures("driver")
def test_j3_energy_is_charged_where_the_driver_tells_it() -> None:
    for paid, components, _ in episode(energy_weight=0.5, alpha=0.0, beta=0.0, gamma=0.0):
        assert paid == pytest.approx(-0.5 * components["energy"], abs=1e-6) and -2 <= components["energy"] <= 2
    run = TrainingRun(tiny, 1, horizon=8)
    assert (costed_twin_of(run, ["energy"]).step_joules or 0) > 0 and costed_twin_of(run, ["time"]).step_joules is None


@pytest.mark.skipif(no_driver() is None, reason="is about machines without NVIDIA's driver")
def test_j3_energy_that_is_unavailable_is_an_error_and_never_0() -> None:
    with pytest.raises(ValueError, match=r"energy_weight=0.1: power is unavailable, there is no nvidia-smi"):
        MangoEnv(tiny, reward=Reward(energy_weight=0.1))
    with metered() as energy:
        pass
    assert energy.joules is None and str(energy.per_step(1)).startswith("unavailable")


def test_what_was_recorded_before_keeps_its_text_and_what_cannot_be_recomputed_is_not_recorded(tmp_path: Path) -> None:
    usual = {"alpha": 1.0, "beta": 0.1, "gamma": 0.1, "loss": "twin", "divergence_penalty": 2.0}
    assert Reward().to_json() == json.dumps(usual)
    timed = Reward(loss="raw", time_weight=0.5)
    assert Reward.from_json(timed.to_json()) == timed
    run = TrainingRun(tiny, 0, horizon=4)
    for record in (
        lambda: Recording(run, None, timed, "nobody"),
        lambda: TrajectoryRecorder(run.optimizer, tmp_path / "store", reward=timed),
        lambda: timed.combine(0.0, np.zeros(1), np.zeros(1)),
    ):
        with pytest.raises(ValueError, match="time_weight: time and energy are not stored"):
            record()
    assert not (tmp_path / "store").exists()
