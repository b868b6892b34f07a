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
    HEURISTICS,
    EvaluationArgs,
    EvaluationRow,
    against_best_fixed,
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
    "decisions", "val_loss_full",
}  # fmt: skip
ARGS = EvaluationArgs(horizon=12, interval=4)
TINY = "tests.tiny_workload:tiny"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze(PolicyNetwork(hidden=(8,)), tmp_path_factory.mktemp("policy") / "mine", card={})


@pytest.fixture(scope="module")
def rows(frozen: Path) -> list[EvaluationRow]:
    fixed = ["fixed:full", f"fixed:{LADDER.index('m8v8')}", "fixed:m4v0"]
    specs = ["adamw", *fixed, *HEURISTICS, str(frozen)]
    return evaluate(specs, TINY, [0.5, 1.5], 2, ARGS)


def test_every_kind_of_policy_has_a_row_per_budget_and_seed(rows: list[EvaluationRow]) -> None:
    assert len(rows) == 2 + 10 * 2 * 2
    names = list(dict.fromkeys(row.policy for row in rows))
    assert names == ["adamw", "fixed:full", "fixed:m8v8", "fixed:m4v0", *HEURISTICS, "mine"]
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


def test_full_precision_of_the_same_rule_is_the_second_reference(rows: list[EvaluationRow]) -> None:
    """MANGO's own full precision is its own reference to the last bit; AdamW's row is one only where AdamW is the rule."""
    for row in rows:
        assert row.val_loss_full is not None and row.val_loss_full == pytest.approx(row.val_loss_adamw, rel=1e-4)
        assert (row.gap_full is None) == (row.val_loss is None)
        if row.policy in ("adamw", "fixed:full") and row.fits:
            assert row.gap_full == 0
    args = replace(ARGS, rule="muon", horizon=24, matrix_lr_scale=4.0)
    adamw, full, coarse = evaluate(["adamw", "fixed:full", "fixed:m4v0"], TINY, 1.5, [0], args)
    assert adamw.val_loss_full is None and adamw.gap_full is None and adamw.gap == 0
    assert full.gap_full == 0 and full.gap is not None and abs(full.gap) > 0.1
    assert coarse.val_loss_full == full.val_loss and coarse.gap_full is not None and abs(coarse.gap_full) < abs(full.gap)
    (unfit,) = evaluate("fixed:full", TINY, 0.3, [0], args)
    assert (unfit.val_loss_full, unfit.gap_full) == (full.val_loss, None)


def test_muon_s_rate_reaches_the_runs_and_their_reference() -> None:
    slow, fast = (
        evaluate("fixed:m8v8", TINY, 1.5, [0], replace(ARGS, rule="muon", matrix_lr_scale=scale))[0] for scale in (1.0, 4.0)
    )
    assert slow.val_loss != fast.val_loss and slow.val_loss_full != fast.val_loss_full
    assert slow.val_loss_adamw == fast.val_loss_adamw
    with pytest.raises(ValueError, match="matrix_lr_scale"):
        evaluate("fixed:m8v8", TINY, 1.5, [0], replace(ARGS, rule="muon", matrix_lr_scale=0.0))


def test_rows_of_before_there_was_a_second_reference_still_load(rows: list[EvaluationRow]) -> None:
    old = [{k: v for k, v in row.to_dict().items() if k not in ("val_loss_full", "diverged")} for row in rows]
    loaded = [EvaluationRow(**row) for row in old]
    assert all(row.gap_full is None for row in loaded)
    assert {(line.gap_full, line.gap_full_low) for line in summary(loaded)} == {(None, None)}
    assert [line.gap for line in summary(loaded)] == [line.gap for line in summary(rows)]
    (line,) = against_best_fixed([row for row in loaded if row.budget == 1.5], "adaptive")
    assert (line.differences, line.failed, line.mean, line.low) == ([], 2, None, None)


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
    assert (line.seeds, line.failed, line.unfit, line.gap) == (0, 1, 0, None)
    assert row.val_loss_full is None and line.gap_full is None


def test_the_summary_is_over_seeds_with_an_interval(rows: list[EvaluationRow]) -> None:
    lines = {(line.policy, line.budget): line for line in summary(rows)}
    adaptive = lines["adaptive", 1.5]
    mine = [row for row in rows if row.policy == "adaptive" and row.budget == 1.5]
    assert adaptive.seeds == 2 and adaptive.gap == pytest.approx(sum(row.gap or 0 for row in mine) / 2)
    assert adaptive.gap_low is not None and adaptive.gap is not None and adaptive.gap_low <= adaptive.gap
    assert lines["adamw", 1.0].gap == 0 and (lines["fixed:full", 0.5].failed, lines["fixed:full", 0.5].unfit) == (0, 2)
    assert adaptive.gap_full == pytest.approx(sum(row.gap_full or 0 for row in mine) / 2)
    assert adaptive.gap_full_low is not None and adaptive.gap_full_high is not None
    assert adaptive.gap_full_low <= adaptive.gap_full <= adaptive.gap_full_high  # type: ignore[operator]


def test_the_best_fixed_rung_is_the_best_that_fits(rows: list[EvaluationRow]) -> None:
    fitting = {"fixed:m8v8", "fixed:m4v0"}
    assert best_fixed(rows, TINY, 0.5) in fitting
    assert best_fixed(rows, TINY, 1.5) in fitting | {"fixed:full"}
    assert best_fixed(rows, "another", 0.5) is None


def made(policy: str, seed: int, loss: float | None, budget: float = 0.5) -> EvaluationRow:
    status = "ok" if loss else "diverged"
    return EvaluationRow(policy, "w", seed, 100, 90, loss, 1.0, None, [], budget, status, True, True, None, None, 12, "", 1.0)


def test_a_policy_is_compared_seed_by_seed_with_the_best_fixed_rung_of_its_budget() -> None:
    rows = [made("fixed:a", seed, 1.2) for seed in range(3)] + [made("fixed:b", seed, 1.1 + seed / 100) for seed in range(3)]
    rows += [made("mine", 0, 1.05), made("mine", 1, 1.1), made("mine", 2, None), made("mine", 3, 1.0)]
    rows += [made("fixed:a", 0, 1.1, budget=0.25), made("mine", 0, 1.2, 0.25), made("mine", 0, 1.2, 0.125)]
    half, quarter, eighth = against_best_fixed(rows, "mine")
    assert (half.workload, half.budget, half.rung, half.seeds, half.failed) == ("w", 0.5, "fixed:b", [0, 1], 2)
    assert half.differences == pytest.approx([-5, -1]) and half.mean == pytest.approx(-3)
    assert half.low is not None and half.high is not None and half.low < -3 < half.high
    assert quarter.rung == "fixed:a" and quarter.differences == pytest.approx([10]) and quarter.low is None
    assert (eighth.rung, eighth.differences, eighth.failed) == (None, [], 1)
    assert json.dumps(half.to_dict(), allow_nan=False)


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
