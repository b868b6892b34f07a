"""What can be learned at all: the studies of the oracle's head-room, of estimated returns, of other trunks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import oracle_headroom

HEADROOM = oracle_headroom.Args(
    workloads="digits_mlp", rules="adamw", budgets="0.125", policies="water-filling", fixed="m0v0,m4v0", seeds=1, steps=6,
    interval=3, rates="1",
)  # fmt: skip


def run(policy: str, seed: int, loss: float, budget: float = 4.0, **more: Any) -> dict[str, Any]:
    facts = {"workload": "digits_mlp", "rule": "adamw", "seed": seed, "policy": policy, "weights": "", "budget": budget}
    facts |= {"budget_bytes": 100, "state_bytes_peak": 10, "val_loss": loss, "val_loss_full": 1.0, "within_budget": True}
    return facts | more


def test_head_room_is_what_the_oracle_saves_of_the_best_rung_that_fits_and_noise_what_16_bits_differ_by() -> None:
    trials = {"promised": [2.0, 4.0], "brought": [1.0], "cpu_seconds": 5.0}
    runs = [run("fixed:m0v0", seed, 1.07) for seed in range(2)]
    runs += [run("fixed:m4v0", seed, 1.05 + 0.02 * seed, state_bytes_peak=90) for seed in range(2)]
    runs += [run("fixed:m16v16", seed, loss, state_bytes_peak=900) for seed, loss in enumerate((1.03, 0.96))]
    runs += [run("oracle", seed, 1.01 + 0.02 * seed, 0.125, **trials) for seed in range(2)]
    runs += [run("water-filling", seed, 1.02, 0.125) for seed in range(2)]
    (case,) = oracle_headroom.cases(runs, replace(HEADROOM, seeds=2))
    assert case["best_fixed"] == "m4v0" and case["best_fixed_gap"] == pytest.approx(6.0)
    assert case["oracle"] == pytest.approx(2.0) and case["headroom"] == pytest.approx(4.0)
    assert case["noise"] == pytest.approx((0.5 * (3.0**2 + 4.0**2)) ** 0.5)        # both ways of differing are noise
    assert case["promised"] == pytest.approx(3.0) and case["brought"] == pytest.approx(1.0) and case["failed"] == 0
    one, everything = oracle_headroom.totals([case])
    assert one["pairs"] == 2 and one["low"] <= one["headroom"] <= one["high"] and everything["rule"] == "all"


def test_the_oracles_study_runs_within_its_budget_and_goes_on(tmp_path: Path) -> None:
    args = replace(HEADROOM, out=tmp_path / "o.json")
    oracle_headroom.train(args)
    kept = json.loads(args.out.read_text())
    assert sorted(one["policy"] for one in kept["runs"]) == [
        "fixed:m0v0", "fixed:m16v16", "fixed:m4v0", "oracle", "water-filling"
    ]  # fmt: skip
    oracle = next(one for one in kept["runs"] if one["policy"] == "oracle")
    assert oracle["within_budget"] and {rung for row in oracle["decisions"] for rung in row} <= {"m0v0", "m4v0"}
    assert len(oracle["promised"]) == len(oracle["brought"]) and min(oracle["promised"]) > -1e-9
    assert kept["cases"][0]["noise"] < 1.0
    oracle_headroom.train(args)
    assert json.loads(args.out.read_text())["runs"] == kept["runs"]          # times too: nothing was run again
