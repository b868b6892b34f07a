"""Learning-rate schedules of runs, and options in the names of workloads."""

from pathlib import Path

import pytest

from mango_env.dataset import TrajectoryDataset
from mango_env.run import TrainingRun
from mango_env.schedules import SCHEDULES, rate_factor
from mango_env.twin import twin_of
from mango_env.workloads import make_workload, register_workload, split_options
from train_policy.collect import CollectArgs, collect
from train_policy.evaluate import EvaluationArgs, evaluate


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("horizon", [1, 2, 10, 1000])
def test_factors_are_within_bounds_and_end_where_they_say(name: str, horizon: int) -> None:
    factors = [rate_factor(name, step, horizon) for step in range(horizon)]
    assert all(0 < factor <= 1 for factor in factors)
    if horizon == 1000:
        assert factors[-1] == pytest.approx({"constant": 1.0, "linear": 0.0, "cosine": 0.1}[name], abs=2e-3)
        assert max(factors) == 1.0 and (name == "constant" or factors[:50] == [(step + 1) / 50 for step in range(50)])


def rates(run: TrainingRun) -> list[float]:
    found = []
    while not run.done:
        run.advance()
        found.append(run.optimizer.param_groups[0]["lr"])
    return found


def test_a_run_follows_its_schedule_and_a_fork_goes_on_with_it() -> None:
    run = TrainingRun("digits_mlp", 0, horizon=40, interval=10, schedule="linear", lr=0.01)
    run.advance()
    fork, straight = run.fork(), rates(run)
    assert rates(fork) == straight
    assert straight == [0.01 * rate_factor("linear", step, 40) for step in (19, 29, 39)]


def test_a_schedule_has_a_twin_of_its_own() -> None:
    twins = [twin_of(TrainingRun("digits_mlp", 0, horizon=20, schedule=name)) for name in ("constant", "cosine")]
    assert twins[0].losses != twins[1].losses


def test_full_precision_under_a_schedule_is_adamw_under_it(tmp_path: Path) -> None:
    rows = evaluate(["adamw", "fixed:full"], "digits_mlp", [4.0], 1, EvaluationArgs(horizon=30, schedule="cosine"))
    assert rows[1].val_loss == pytest.approx(rows[0].val_loss, rel=1e-5)


def test_episodes_tell_schedule_and_options(tmp_path: Path) -> None:
    args = CollectArgs(horizon=20, schedule="cosine")
    first = collect("digits_mlp+width=32", "fixed:m4v0", 1, 0.5, tmp_path, args)
    again = collect("digits_mlp+width=32", "fixed:m4v0", 1, 0.5, tmp_path, args)
    other = collect("digits_mlp+width=32", "fixed:m4v0", 1, 0.5, tmp_path, CollectArgs(horizon=20))
    assert (first.recorded, again.recorded, other.recorded) == (1, 0, 1)
    found = [dict(episode.attributes) for episode in TrajectoryDataset(tmp_path)]
    assert {facts["schedule"] for facts in found} == {"cosine", "constant"}
    assert {facts["workload"] for facts in found} == {"digits_mlp+width=32"}


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'step'; known: constant, linear, cosine"):
        TrainingRun("digits_mlp", 0, schedule="step")


def test_options_follow_a_name() -> None:
    assert split_options("a:b+x=1+y=0.5+z=wide+t=True") == ("a:b", {"x": 1, "y": 0.5, "z": "wide", "t": True})
    assert split_options("folder+name/file.py:build") == ("folder+name/file.py:build", {})
    wide = make_workload("digits_mlp+width=96+depth=1", 0)
    assert {96} <= {size for p in wide.model.parameters() for size in p.shape}
    assert {48} <= {size for p in make_workload("digits_mlp+width=96", 0, width=48).model.parameters() for size in p.shape}


@pytest.mark.parametrize(
    ("spec", "error"),
    [("digits_mlp+width=1+width=2", "given twice"), ("nothing+width=1", "unknown workload 'nothing'")],
)
def test_bad_options_are_one_line(spec: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make_workload(spec, 0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        make_workload("digits_mlp+widht=3", 0)
    with pytest.raises(ValueError, match="without ':'"):
        register_workload("a+b")


def test_clipped_runs_take_clipped_steps_and_have_twins_of_their_own() -> None:
    """SGD's step is the gradient times the rate, so its length tells whether the norm was held."""
    options = {"momentum": 0.0}
    free, held = (
        TrainingRun("digits_mlp", 0, horizon=10, interval=1, rule="sgd", lr=0.1, max_grad_norm=limit, optimizer_options=options)
        for limit in (None, 0.05)
    )
    lengths = []
    for run in (free, held.fork()):
        before = [param.detach().clone() for param in run.model.parameters()]
        run.advance()
        moved = sum(float((a - b.detach()).square().sum()) for a, b in zip(before, run.model.parameters(), strict=True))
        lengths.append(moved**0.5)
    assert lengths[1] == pytest.approx(0.1 * 0.05, rel=1e-3)
    assert lengths[0] > 2 * lengths[1]
    assert twin_of(free).losses != twin_of(held).losses


def test_clipped_full_precision_is_clipped_adamw() -> None:
    args = EvaluationArgs(horizon=30, max_grad_norm=0.5)
    rows = evaluate(["adamw", "fixed:full"], "digits_mlp", [4.0], 1, args)
    assert rows[1].val_loss == pytest.approx(rows[0].val_loss, rel=1e-5)
    assert rows[0].val_loss != evaluate(["adamw"], "digits_mlp", [4.0], 1, EvaluationArgs(horizon=30))[0].val_loss


def test_episodes_tell_of_clipping_and_impossible_limits_are_refused(tmp_path: Path) -> None:
    for limit in (None, 1.0):
        collect("digits_mlp", "fixed:m4v0", 1, 0.5, tmp_path, CollectArgs(horizon=10, max_grad_norm=limit))
    found = {episode.attributes.get("max_grad_norm") for episode in TrajectoryDataset(tmp_path)}
    assert found == {None, 1.0}
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"max_grad_norm=.* must be a positive number, or None"):
            TrainingRun("digits_mlp", 0, max_grad_norm=limit)
