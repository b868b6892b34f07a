"""The study of held-out families and the program that makes the shipped policy: what they add up, and that they go on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import make_universal, transfer
from experiments.tuning import tune
from mango.policy_file import load_policy
from mango_env.cache import build_cache, flatten

ARGS = transfer.Args(
    workloads="digits_mlp", rules="adamw", budgets="0.25", policies="water-filling", fixed="m0v0,m4v0,m8v8", seeds=2, steps=6,
    interval=3, workers=1, rates="1,2",
)  # fmt: skip


def run(policy: str, seed: int, loss: float, budget: float = 4.0, peak: int = 10, limit: int = 100) -> dict[str, Any]:
    facts = {"workload": "digits_mlp", "rule": "adamw", "seed": seed, "policy": policy, "weights": "", "budget": budget}
    facts |= {"budget_bytes": limit, "state_bytes_peak": peak, "val_loss": loss, "val_loss_full": 1.0}
    return facts | {"within_budget": True}


RUNS = [
    run("fixed:m0v0", 0, 1.04), run("fixed:m0v0", 1, 1.06), run("fixed:m4v0", 0, 1.01, peak=101),
    run("fixed:m4v0", 1, 1.01, peak=101), run("fixed:m8v8", 0, 1.0, peak=90),
    run("water-filling", 0, 1.01, 0.25), run("water-filling", 1, 1.03, 0.25),
]  # fmt: skip


def test_the_best_fixed_rung_is_one_that_fits_on_every_seed() -> None:
    (cell,) = transfer.cells(RUNS, ARGS)
    assert cell["best_fixed"] == "m0v0"                      # m4v0 holds too much, m8v8 has one seed only
    assert cell["gap_percent"] == pytest.approx(2.0) and cell["best_fixed_gap_percent"] == pytest.approx(5.0)
    assert cell["difference"] == pytest.approx(-3.0) and cell["seeds"] == 2 and cell["failed"] == 0


def test_a_run_that_failed_is_counted_and_not_averaged() -> None:
    (cell,) = transfer.cells([*RUNS[:-1], run("water-filling", 1, 1.0, 0.25) | {"val_loss": None}], ARGS)
    assert cell["failed"] == 1 and cell["seeds"] == 1 and cell["gap_percent"] == pytest.approx(1.0)


def test_totals_name_the_worst_case_and_count_only_what_is_lost() -> None:
    rows = transfer.cells(RUNS, ARGS)
    other = {"workload": "other", "difference": 1.0, "gap_percent": -8.0, "best_fixed": "m2v0", "best_fixed_gap_percent": 0.5}
    (total,) = transfer.totals([*rows, rows[0] | other | {"noise": 0.25, "fixed": {"m0v0": 1.0, "m2v0": 0.5}}])
    assert total["above"] == pytest.approx(1.0) and total["best_fixed_above"] == pytest.approx(2.75)
    assert total["one_fixed"] == "m0v0" and total["one_fixed_above"] == pytest.approx(3.0)       # m2v0 does not fit everywhere
    assert total["saved"] == pytest.approx(2.0) and total["saved_low"] <= 1.0 and total["saved_high"] >= 3.0     # 3 and 1
    assert total["worst"] == 1.0 and total["worst_case"] == "other adamw" and total["cases"] == 2
    assert total["noise_above"] == 0.25                      # of the cells where it is known
    assert total["difference"] == pytest.approx(-1.0) and "m0v0 3.00" in transfer.table([total])


def test_the_study_runs_and_goes_on(tmp_path: Path) -> None:
    args = replace(ARGS, out=tmp_path / "t.json", seeds=1)
    transfer.train(args)
    kept = json.loads(args.out.read_text())
    runs, rates = kept["runs"], kept["rates"]
    assert sorted(r["policy"] for r in runs) == ["fixed:m0v0", "fixed:m4v0", "fixed:m8v8", "water-filling"]
    assert list(transfer.units(args, runs, rates)) == []
    (missing,) = transfer.units(replace(args, policies="water-filling,random"), runs, rates)
    assert missing.fixed == () and missing.policies == (("random", (0.25,)),)


def test_the_rate_is_the_best_for_full_precision() -> None:
    found = transfer.rate_of("digits_mlp", "adamw", replace(ARGS, steps=12, rates="0.01,0.02"))
    tried = {row["lr"]: row["val_loss"] for row in found["tried"]}
    assert len(tried) == 5 and max(tried) == pytest.approx(min(tried) * 2**4)                  # still rising with the rate
    assert found["lr"] == min(tried, key=lambda lr: tried[lr]) and found["at_edge"]


def test_a_grid_is_left_where_its_edge_is_best_and_not_otherwise() -> None:
    within = tune(0.1, [0.5, 1, 2], lambda lr: abs(lr - 0.1))
    assert within.lr == 0.1 and len(within.tried) == 3 and not within.at_edge
    beyond = tune(0.1, [0.5, 1, 2], lambda lr: abs(lr - 0.4))
    assert beyond.lr == pytest.approx(0.4) and len(beyond.tried) == 5
    failing = tune(0.1, [0.5, 1, 2], lambda lr: float("nan") if lr > 0.07 else 1.0)
    assert failing.lr == pytest.approx(0.05) and [row["val_loss"] for row in failing.to_dict()["tried"]][-1] is None  # type: ignore[attr-defined]
    assert tune(0.1, [2], lambda lr: 0.0).lr == 0.2


def test_a_slice_of_make_policies_records_learns_gates_and_freezes(tmp_path: Path) -> None:
    scale = replace(
        make_universal.SMALL, runs=6, updates=20, epochs=1, timesteps=128, gate_workloads=("digits_mlp",), gate_budgets=(0.25,),
        changes={"families": {"digits_mlp": {"weight": 1, "options": {"width": [32]}}}, "horizon": [8], "interval": [4]},
        study=replace(ARGS, policies="universal", fixed="m0v0", seeds=1), gate_seeds=3,
    )  # fmt: skip
    path = make_universal.make(scale, tmp_path / "root", tmp_path / "out", workers=1)
    card = load_policy(path).card
    assert card["runs"] == 6 and len(card["gates"]) == 4 and card["stage"] in ("untrained", "bc", "iql", "additive", "ppo")
    assert card["evaluation"] and {row["policy"] for row in card["evaluation"]} == {"universal"}
    gates = json.loads((tmp_path / "root" / "gates.json").read_text())
    assert gates["standing"] == card["stage"]
    recorded = build_cache(tmp_path / "root" / "data")
    _, again = make_universal.record(scale, tmp_path / "again", 1, flatten(recorded, tmp_path / "flat.h5"))
    assert again.digest == recorded.digest == card["training_data_digest"] and len(again) == len(recorded)
