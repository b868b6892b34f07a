"""Promises of the search: trials follow from the seed, nothing done is lost or repeated, tables are ranked, failures are rows."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mango.policy_file import load_policy
from mango_env.cache import TrajectoryCache
from train_policy import bc, offline, ope
from train_policy.cli import app
from train_policy.recipes import CONFIGS, load_recipe
from train_policy.sweep import Dimension, SweepArgs, ranked, sweep

QUICK = {"updates": 5, "batch_size": 32, "report_every": 5}
SPACE = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "expectile": {"values": [0.6, 0.8]}}
ARGS: dict[str, Any] = {"trainer": "offline:iql", "space": SPACE, "recipe": QUICK, "trials": 3}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates of all trainings that are really done."""
    done: list[float] = []
    train = offline.train

    def counting(network: Any, cache: Any, args: Any, **more: Any) -> Any:
        done.append(args.learning_rate)
        if args.expectile == 0.8 and args.batch_size == 31:
            raise RuntimeError("no luck\nat all")
        return train(network, cache, args, **more)

    monkeypatch.setattr(offline, "train", counting)
    return done


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_f18_a_sweep_writes_a_ranked_table_and_goes_on_where_it_stopped(
    riddle: TrajectoryCache, tmp_path: Path, counted: list[float]
) -> None:
    first = sweep(riddle, SweepArgs(**ARGS), tmp_path)
    assert len(counted) == 3 and first.failed == 0 and first.metric == "agreement_rung" and not first.minimise
    scores = [row["metrics"]["agreement_rung"] for row in first.rows]
    assert scores == sorted(scores, reverse=True) and [row["rank"] for row in first.rows] == [1, 2, 3]
    again = sweep(riddle, SweepArgs(**ARGS), tmp_path)
    assert again.rows == first.rows and len(counted) == 3
    more = sweep(riddle, SweepArgs(**{**ARGS, "trials": 4}), tmp_path)
    assert len(counted) == 4 and len(more.rows) == 4
    rows = table(tmp_path)
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert {"trial", "status", "agreement_rung", "learning_rate", "expectile", "seconds", "policy", "error"} <= set(rows[0])
    assert load_policy(tmp_path / rows[0]["policy"]).card["stage"] == "offline:iql"
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["data_digest"] == riddle.digest and "commit" in content["about"] and len(content["trials"]) == 4


def test_trials_follow_from_the_seed_and_the_first_is_the_recipe() -> None:
    few, many = (list(SweepArgs(**{**ARGS, "trials": n}).settings()) for n in (3, 9))
    assert many[:3] == few and few[0] == {} and len({str(one) for one in many}) == 9
    assert all(1e-4 <= one["learning_rate"] <= 1e-2 and one["expectile"] in (0.6, 0.8) for one in many[1:])
    assert list(SweepArgs(**ARGS, seed=1).settings())[1:] != few[1:]


def test_a_small_space_ends_when_everything_was_tried() -> None:
    args = SweepArgs(**{**ARGS, "space": {"expectile": {"values": [0.6, 0.8]}}, "trials": 50})
    assert {one.get("expectile") for one in args.settings()} == {None, 0.6, 0.8} and len(list(args.settings())) == 3


def test_a_grid_is_the_whole_product() -> None:
    rates = {"low": "1e-4", "high": "1e-2", "log": True, "points": 3}
    space = {"learning_rate": rates, "batch_size": {"low": 8, "high": 9, "points": 2}}
    args = SweepArgs("offline:iql", space, QUICK, search="grid")
    found = [(one["learning_rate"], one["batch_size"]) for one in args.settings()]
    assert found == [(rate, size) for rate in (1e-4, 1e-3, 1e-2) for size in (8, 9)]
    assert all(type(size) is int for _, size in found)


def test_a_failing_trial_is_a_row_that_says_so_and_is_tried_again(
    riddle: TrajectoryCache, tmp_path: Path, counted: list[float]
) -> None:
    args = SweepArgs("offline:iql", {"expectile": {"values": [0.8, 0.6]}}, {**QUICK, "batch_size": 31}, search="grid")
    result = sweep(riddle, args, tmp_path)
    assert result.failed == 1 and [row["status"] for row in result.rows] == ["ok", "failed"]
    assert result.rows[1]["rank"] is None and result.rows[1]["error"] == "no luck at all"
    assert [(row["rank"], row["error"]) for row in table(tmp_path)] == [("1", ""), ("", "no luck at all")]
    sweep(riddle, args, tmp_path)
    assert len(counted) == 3


def test_ctrl_c_keeps_what_is_done(riddle: TrajectoryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, calls = bc.train, 0

    def interrupted(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train(*given, **more)

    monkeypatch.setattr(bc, "train", interrupted)
    args = SweepArgs("bc", {"network.hidden": {"values": [[8], [16, 8]]}}, {"epochs": 1, "top": 1.0}, search="grid")
    with pytest.raises(KeyboardInterrupt, match=r"1 of 2 trials are in .*sweep\.json; the same command goes on"):
        sweep(riddle, args, tmp_path)
    assert len(table(tmp_path)) == 1
    result = sweep(riddle, args, tmp_path)
    assert calls == 3 and result.metric == "accuracy_rung"
    hidden = {row["trial"]: load_policy(tmp_path / row["policy"]).network.architecture["hidden"] for row in result.rows}
    assert [list(hidden[trial]) for trial in (0, 1)] == [[8], [16, 8]]


def test_trials_can_be_ranked_by_fitted_q_evaluation(
    riddle: TrajectoryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ope, "OpeArgs", partial(ope.OpeArgs, updates=10, hidden=(8,)))
    result = sweep(riddle, SweepArgs(**{**ARGS, "trials": 1, "metric": "fqe_value"}), tmp_path)
    assert isinstance(result.rows[0]["metrics"]["fqe_value"], float) and result.rows[0]["rank"] == 1


def test_least_first_where_less_is_better_and_what_is_not_finite_last() -> None:
    rows = [{"trial": i, "status": "ok", "metrics": {"v_loss": x}} for i, x in enumerate([3.0, None, 1.0])]
    assert [(row["trial"], row["rank"]) for row in ranked(rows, "v_loss", True)] == [(2, 1), (0, 2), (1, None)]
    assert SweepArgs(**ARGS, metric="v_loss").target() == ("v_loss", True)
    assert SweepArgs(**ARGS, metric="v_loss", minimise=False).target() == ("v_loss", False)


def test_another_search_is_not_written_over_and_an_unknown_metric_is_named(riddle: TrajectoryCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not report 'luck'; it reports: .*agreement_rung"):
        sweep(riddle, SweepArgs(**{**ARGS, "trials": 1}, metric="luck"), tmp_path)
    assert sweep(riddle, SweepArgs(**{**ARGS, "trials": 1}), tmp_path).rows[0]["rank"] == 1          # its training is not lost
    with pytest.raises(ValueError, match=r"holds another search .*seed"):
        sweep(riddle, SweepArgs(**ARGS, seed=1), tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"trainer": "ppo"}, "unknown trainer 'ppo'; known: bc, offline:iql"),
        ({"space": {"lerning_rate": {"values": [1]}}}, "unknown hyper-parameter 'lerning_rate'"),
        ({"space": {"seed": {"values": [1]}}}, "cannot be searched"),
        ({"space": {}}, "names no hyper-parameter"),
        ({"space": {"gamma": [0.9]}}, "gamma: .* is neither"),
        ({"space": {"gamma": {"low": 0.5}}}, "gamma: give values, or both low and high"),
        ({"space": {"gamma": {"low": 0.9, "high": 0.5}}}, "gamma: low=0.9 must be below"),
        ({"space": {"gamma": {"low": 0, "high": 1, "log": True}}}, "gamma: low=0.0 must be above 0"),
        ({"space": {"gamma": {"low": 0, "high": 1}}, "search": "grid"}, "gamma: a range in a grid needs points"),
        ({"search": "tpe"}, "unknown search 'tpe'; known: random, grid"),
        ({"trials": 0}, "trials=0"),
    ],
)
def test_bad_arguments_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepArgs(**{**ARGS, **bad})


def test_the_shipped_spaces_fit_their_trainers() -> None:
    import yaml

    for trainer in yaml.safe_load((CONFIGS / "sweep.yml").read_text(encoding="utf-8")):
        assert len(list(SweepArgs(trainer, load_recipe("sweep", trainer), trials=5).settings())) == 5
    assert Dimension(low=8, high=32, log=True, points=3, whole=True).grid() == [8, 16, 32]


def test_the_command_ranks_prints_and_fails_where_a_trial_failed(riddle: TrajectoryCache, tmp_path: Path) -> None:
    space = tmp_path / "space.yml"
    space.write_text("offline:awr:\n  max_weight: {values: [5, 20]}\n  temperature: {values: [0.5, -1.0]}\n")
    words = ["sweep", str(space), "--data", str(riddle.path.parent.parent), "--trainer", "offline:awr", "--search", "grid"]
    words += ["--out", str(tmp_path / "out"), "--set", "updates=3", "--json", str(tmp_path / "found.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output
    assert "2 of 4 trials failed" in done.stderr and "temperature above 0" in done.stdout and "max_weight" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["rank"] for row in found["trials"]] == [1, 2, None, None]
    refused = CliRunner().invoke(app, ["sweep", str(space), "--data", "x", "--trainer", "offline:iql"])
    assert refused.exit_code == 2 and "has no recipe 'offline:iql'; it has: offline:awr" in refused.stderr
