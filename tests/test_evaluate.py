"""Evaluation: every row is measured, paired with AdamW, and says what happened; nothing is skipped silently."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mango.config import LADDER, CompressionConfig
from mango.networks import PolicyNetwork
from mango.policies import FixedPolicy
from mango.policy_file import freeze
from tests.tiny_workload import exploding, tiny
from train_policy.evaluate import (
    EvaluationArgs,
    EvaluationRow,
    best_fixed,
    evaluate,
    policy_of,
    returns_by_run,
    spec_name,
    summary,
)
from train_policy.gate import decide

REQUIRED = {
    "policy", "workload", "seed", "budget_bytes", "state_bytes_peak", "val_loss", "val_loss_adamw", "step_time_ratio",
    "decisions",
}  # fmt: skip
ARGS = EvaluationArgs(horizon=12, interval=4)
TINY = "tests.tiny_workload:tiny"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze(PolicyNetwork(hidden=(8,)), tmp_path_factory.mktemp("policy") / "mine", card={})


@pytest.fixture(scope="module")
def rows(frozen: Path) -> list[EvaluationRow]:
    fixed = ["fixed:full", f"fixed:{LADDER.index('m8v8')}", "fixed:m4v0"]
    specs = ["adamw", *fixed, "random", "water-filling", "adaptive", "scheduled", str(frozen)]
    return evaluate(specs, TINY, [0.5, 1.5], 2, ARGS)


def test_every_kind_of_policy_has_a_row_per_budget_and_seed(rows: list[EvaluationRow]) -> None:
    assert len(rows) == 2 + 8 * 2 * 2
    names = list(dict.fromkeys(row.policy for row in rows))
    heuristics = ["random", "water-filling", "adaptive", "scheduled"]
    assert names == ["adamw", "fixed:full", "fixed:m8v8", "fixed:m4v0", *heuristics, "mine"]
    plain = json.loads(json.dumps([row.to_dict() for row in rows], allow_nan=False))
    assert all(set(row) >= REQUIRED for row in plain)


def test_the_budget_holds_in_every_row_and_bytes_are_measured(rows: list[EvaluationRow]) -> None:
    for row in rows:
        assert row.within_budget and row.horizon == 12
        if row.fits:
            assert row.state_bytes_peak is not None and 0 < row.state_bytes_peak <= row.budget_bytes
    assert len({row.state_bytes_peak for row in rows if row.status == "ok"}) > 3


def test_a_fixed_config_that_does_not_fit_leaves_a_row_that_says_so(rows: list[EvaluationRow]) -> None:
    unfit = [row for row in rows if row.policy == "fixed:full" and row.budget == 0.5]
    assert len(unfit) == 2
    for row in unfit:
        assert not row.fits and row.status == "does not fit" and "needs" in row.message
        assert (row.val_loss, row.step_time_ratio, row.returns, row.decisions) == (None, None, None, [])


def test_full_precision_is_paired_with_adamw_to_rounding(rows: list[EvaluationRow]) -> None:
    """Same weights, batches and dropout: MANGO at full precision is torch.optim.AdamW."""
    full = [row for row in rows if row.policy == "fixed:full" and row.fits]
    reference = {row.seed: row.val_loss for row in rows if row.policy == "adamw"}
    assert len(full) == 2
    for row in full:
        assert row.val_loss_adamw == reference[row.seed]
        assert row.val_loss == pytest.approx(row.val_loss_adamw, rel=1e-4)


def test_decisions_are_what_was_in_force(rows: list[EvaluationRow]) -> None:
    for row in rows:
        if row.policy == "fixed:m8v8" and row.fits:
            assert row.decisions == [["m8v8", "m8v8"]] * 3                     # at steps 0, 4 and 8; at 12 all is over
        if row.policy == "random":
            assert len(row.decisions) == 3 and all(len(layers) == 2 for layers in row.decisions)
    assert all(row.step_time_ratio is None or row.step_time_ratio > 0 for row in rows)


def test_evaluation_repeats_and_processes_agree(rows: list[EvaluationRow]) -> None:
    def facts(found: list[EvaluationRow]) -> list[dict[str, Any]]:
        return [replace(row, step_time_ratio=None).to_dict() for row in found]

    again = evaluate(["random", "water-filling"], TINY, [0.5, 1.5], 2, ARGS, workers=2)
    assert facts(again) == facts([row for row in rows if row.policy in ("random", "water-filling")])


def test_a_diverged_run_is_a_row_and_not_an_error() -> None:
    (row,) = evaluate("water-filling", exploding, 1.5, [0], ARGS)
    assert row.status == "diverged" and row.diverged and row.val_loss is None and row.message
    assert row.returns is not None and row.returns < -1
    assert json.dumps(row.to_dict(), allow_nan=False)
    (line,) = summary([row])
    assert (line.seeds, line.failed, line.gap) == (0, 1, None)


def test_the_summary_is_over_seeds_with_an_interval(rows: list[EvaluationRow]) -> None:
    lines = {(line.policy, line.budget): line for line in summary(rows)}
    adaptive = lines["adaptive", 1.5]
    mine = [row for row in rows if row.policy == "adaptive" and row.budget == 1.5]
    assert adaptive.seeds == 2 and adaptive.gap == pytest.approx(sum(row.gap or 0 for row in mine) / 2)
    assert adaptive.gap_low is not None and adaptive.gap is not None and adaptive.gap_low <= adaptive.gap
    assert lines["adamw", 1.0].gap == 0 and lines["fixed:full", 0.5].failed == 2


def test_the_best_fixed_rung_is_the_best_that_fits(rows: list[EvaluationRow]) -> None:
    fitting = {"fixed:m8v8", "fixed:m4v0"}
    assert best_fixed(rows, TINY, 0.5) in fitting
    assert best_fixed(rows, TINY, 1.5) in fitting | {"fixed:full"}
    assert best_fixed(rows, "another", 0.5) is None


def test_a_sabotaged_policy_does_not_pass_the_gate() -> None:
    """Real paired runs: a subspace at 4 bits everywhere, which tiny layers do not bear, against 4 bits."""
    budgets, seeds = [0.5, 1.5], range(3)
    args = replace(ARGS, horizon=40)
    sabotaged, good = (
        returns_by_run(evaluate(spec, TINY, budgets, list(seeds), args)) for spec in ("fixed:r32p4q4v0", "fixed:m4v0")
    )
    assert not decide(sabotaged, good).accepted
    accepted = decide(good, sabotaged)
    assert accepted.accepted and accepted.pairs == 6 and accepted.low > 0


def test_objects_are_policies_too() -> None:
    (row,) = evaluate(FixedPolicy(CompressionConfig(momentum_bits=16)), tiny, "64KiB", [5], ARGS)
    assert row.policy == "fixed" and row.seed == 5 and row.budget_bytes == 65536 and row.decisions[0] == ["m16v32"] * 2


@pytest.mark.parametrize(
    ("policy", "workload", "budget", "message"),
    [
        ("nonsense", TINY, 0.5, "unknown policy 'nonsense'; give adamw, random"),
        ("fixed:m1v1", TINY, 0.5, "unknown rung"),
        ("random", "nowhere", 0.5, "unknown workload"),
        ("random", TINY, 1e-4, "least feasible"),
        (["random", "random"], TINY, 0.5, "given twice"),
    ],
)
def test_mistakes_are_named(policy: Any, workload: str, budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(policy, workload, budget, 1, ARGS)


def test_specs_have_names(frozen: Path) -> None:
    assert spec_name("fixed:0") == f"fixed:{LADDER.names[0]}" and spec_name(frozen) == "mine" and spec_name("random") == "random"
    assert policy_of("random", seed=3).generator.initial_seed() == 3
    assert policy_of(frozen).name == "mine"
