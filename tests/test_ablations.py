"""Promises of the ablations: three tables with standard errors, paired by seed; a repeated command does nothing twice."""

import json
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from experiments import ablations
from experiments.ablations import TABLES, Args
from experiments.tuning import TUNING_SEED

TINY = "tests.tiny_workload:tiny"


def test_f19_three_tables_have_means_with_standard_errors_and_gaps_that_are_paired(tmp_path: Path) -> None:
    args = Args(workloads=TINY, budgets="1.5", seeds=2, steps=3, rates="1,2", out=tmp_path / "ablations.json")
    ablations.train(args)
    found = json.loads(args.out.read_text())
    assert {"command", "commit", "hardware", "versions", "args"} <= set(found)
    deciders = {"learned", "water-filling", "adaptive", "scheduled", "random", "one rung"}
    assert {row["method"] for row in found["allocation"]} == deciders
    subspaces = [row for row in found["low_rank"] if row["method"].startswith("r")]
    assert len(subspaces) == 3 and all(not row["reference"].startswith("r") for row in subspaces)
    assert len(found["error_feedback"]) == 1 + 2 * 5
    for table in TABLES:
        runs = [run for run in found["runs"] if run["table"] == table and run["seed"] != TUNING_SEED]
        for row in found[table]:
            mine, theirs = ({run["seed"]: run["val_loss"] for run in runs if run["method"] == name}
                            for name in (row["method"], row["reference"]))  # fmt: skip
            assert row["seeds"] == len(mine) == 2 and row["val_loss"] == pytest.approx(fmean(mine.values()))
            gaps = [100 * (mine[seed] / theirs[seed] - 1) for seed in range(2)]
            assert row["percent_above"] == pytest.approx(fmean(gaps))
            assert row["percent_above_se"] == pytest.approx(stdev(gaps) / math.sqrt(2))
            tried = {run["lr"]: run["val_loss"] for run in found["runs"]
                     if (run["table"], run["method"], run["seed"]) == (table, row["method"], TUNING_SEED)}  # fmt: skip
            assert len(tried) >= 2 and row["lr"] == min(tried, key=lambda lr: tried[lr])

    def fail(*_: object) -> None:
        raise AssertionError("a run that is there was done again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "run_method", fail)
        ablations.train(args)
    assert json.loads(args.out.read_text())["runs"] == found["runs"]


def test_a_method_that_diverges_is_a_row_without_a_loss(tmp_path: Path) -> None:
    exploding = "tests.tiny_workload:exploding"
    args = Args(workloads=exploding, tables="low_rank", seeds=2, steps=4, rates="1", out=tmp_path / "a.json")
    ablations.train(args)
    found = json.loads(args.out.read_text())
    assert found["low_rank"] == [] and all(run["val_loss"] is None and run["message"] for run in found["runs"])


@pytest.mark.parametrize(
    ("changed", "told"), [({"tables": "luck"}, "unknown tables luck; known: allocation, low_rank"), ({"seeds": 1}, "seeds=1")]
)
def test_bad_input_ends_with_2_and_one_line(
    changed: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["ablations", "--out", str(tmp_path / "a.json"), *given])
    with pytest.raises(SystemExit) as stopped:
        ablations.main()
    assert stopped.value.code == 2 and told in (error := capsys.readouterr().err) and error.count("\n") == 1
