"""Promises of the study of tolerance: forks leave the run alone, predictions are the policy's, correlations are Spearman's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from experiments.tolerance import Args, correlate, measure, moments, predictions, repeats, spearman, train
from mango.config import LADDER
from mango.policies import WaterFillingPolicy
from mango_env.run import TrainingRun

TINY = "tests.tiny_workload:tiny"
ARGS = Args(workloads=TINY, rules="adamw", moments="early:2,late:4", window=4, interval=2, seeds=2)


def test_a_measured_layer_leaves_the_run_as_it_was() -> None:
    run, alone = (TrainingRun(TINY, 0, horizon=8, interval=2, memory_budget=None, policy="hold") for _ in range(2))
    for one in (run, alone):
        one.advance()
    found = measure(run, run.fork(), ARGS)
    assert list(found["percent_above"]) == ["m2v0", "m0v0"]
    assert all(len(values) == 2 and any(values) for values in found["percent_above"].values())
    assert run.advance().losses.tolist() == alone.advance().losses.tolist()


def test_water_filling_s_prediction_is_what_the_policy_scores() -> None:
    run = TrainingRun(TINY, 0, horizon=8, interval=2, memory_budget=None, policy="hold")
    run.advance()
    obs, rung = torch.from_numpy(run.observe()), LADDER.index("m2v0")
    told = predictions(obs, LADDER[rung])["water_filling"]
    assert told == pytest.approx((-WaterFillingPolicy().scores(obs)[:, rung]).tolist(), rel=1e-4)


def test_the_correlation_is_scipys_of_the_means_and_certain_where_all_seeds_agree() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 5, 9))
    assert float(spearman(one[0], other[0])) == pytest.approx(spearmanr(one[0], other[0]).statistic)
    found = correlate(one, other)
    assert found["spearman"] == pytest.approx(spearmanr(one.mean(0), other.mean(0)).statistic)
    assert found["low"] <= found["spearman"] <= found["high"]
    sure = np.tile(np.arange(9.0), (4, 1)) + 0.01 * rng.normal(size=(4, 9))
    assert correlate(sure, 2 * sure) == pytest.approx({"spearman": 1, "low": 1, "high": 1}) and repeats(sure) == pytest.approx(1)


def test_b8_the_study_ranks_every_predictor_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    args = Args(**{**vars(ARGS), "out": tmp_path / "tolerance.json"})
    train(args)
    found = json.loads(args.out.read_text())
    assert len(found["runs"]) == 2 * 2 and len(found["cells"]) == 2 * 2 * 8
    assert {row["predictor"] for row in found["predictors"]} >= {"water_filling", "learned", "noise_scale"}
    said: list[str] = []
    train(args, said.append)
    assert not any("seed" in line for line in said)
    assert json.loads(args.out.read_text())["runs"] == found["runs"]


def test_a_moment_between_decisions_is_refused() -> None:
    with pytest.raises(ValueError, match="a moment at step 3 is not after a whole interval of 2 steps"):
        moments(Args(**{**vars(ARGS), "moments": "odd:3"}))
