"""The gate lets a policy pass only when paired runs prove it better."""

import math

import numpy as np
import pytest

from train_policy.gate import MIN_PAIRS, bootstrap_interval, decide, gate


def test_the_gate_accepts_a_clear_and_paired_advantage() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, size=12)              # between runs, far larger than the advantage
    decision = decide(difficulty + 1 + rng.normal(0, 0.2, 12), difficulty)
    assert decision.accepted and 0 < decision.low < decision.difference < decision.high
    assert decision.pairs == 12 and decision.reason.startswith("accepted")


def test_the_gate_refuses_a_sabotaged_candidate_and_noise() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=10)
    assert not decide(base - 1, base).accepted
    assert decide(base - 1, base).high < 0
    assert not decide(base + rng.normal(0, 1, 10) - 0.1, base).accepted
    assert not decide(base, base).accepted               # equal is not better


def test_the_gate_pairs_mappings_by_run() -> None:
    keys = [("digits_mlp", seed, budget) for seed in range(3) for budget in (0.1, 0.2)]
    incumbent = {key: float(i) for i, key in enumerate(keys)}
    candidate = {key: incumbent[key] + 1 for key in reversed(keys)}
    assert decide(candidate, incumbent).difference == 1
    with pytest.raises(ValueError, match="not paired"):
        decide({**candidate, ("digits_mlp", 9, 0.1): 0.0}, incumbent)


def test_the_gate_refuses_a_candidate_that_is_not_finite_and_says_so() -> None:
    decision = decide([math.nan, 5, 5, 5, 5], [0.0] * 5)
    assert not decision.accepted and "1 of 5" in decision.reason


@pytest.mark.parametrize(
    ("candidate", "incumbent", "message"),
    [([1.0] * 4, [0.0] * 4, "at least 5"), ([1.0] * 6, [0.0] * 5, "not paired"), ([1.0] * 5, [math.inf] * 5, "incumbent")],
)
def test_the_gate_names_what_is_wrong_with_its_input(candidate: list[float], incumbent: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(candidate, incumbent)


def test_the_gate_keeps_the_incumbent_unless_the_candidate_is_proven() -> None:
    runs = {"old": dict.fromkeys(range(6), 0.0), "worse": dict.fromkeys(range(6), -1.0), "better": dict.fromkeys(range(6), 1.0)}
    assert gate("worse", "old", runs.__getitem__)[0] == "old"
    assert gate("better", "old", runs.__getitem__)[0] == "better"


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    samples = rng.normal(3.0, 1.0, size=(300, MIN_PAIRS * 3))
    hits = 0
    for sample in samples:
        low, high = bootstrap_interval(sample, 0.9, resamples=400)
        hits += low <= 3.0 <= high
    # 300 draws of a 0.9 coin have a standard deviation of 0.017; a small-sample bootstrap loses a few points
    assert 0.82 <= hits / 300 <= 0.96
