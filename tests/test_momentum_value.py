"""The study of what the first moment is worth: what it measures, adds up, and that it goes on."""

import json
from pathlib import Path

import pytest

from experiments import momentum_value as study
from experiments.transfer import NOISE

ARGS = study.Args(
    workloads="digits_mlp", rules="adamw", batches="8", formats="full,m0v0", seeds=2, steps=4, rates="1,2", workers=1
)  # fmt: skip
CASE = {"workload": "w", "rule": "adamw", "batch": 8, "steps": 4}


def runs(*losses: float | None) -> list[dict[str, object]]:
    return [{"lr": 0.1, "seed": seed, "val_loss": loss} for seed, loss in enumerate(losses)]


def test_gaps_are_paired_by_seed_and_unknown_where_a_run_diverged() -> None:
    assert study.gaps(runs(1.1, 2.0), runs(1.0, 2.0)) == pytest.approx({"mean": 5.0, "low": 0.0, "high": 10.0})
    assert study.gaps(runs(1.1, None), runs(1.0, 2.0))["mean"] is None


def test_a_format_is_compared_at_its_own_rate_and_at_full_precisions() -> None:
    rows = [CASE | {"format": "full", "lr": 0.1, "at_edge": False, "runs": runs(1.0, 1.0)},
            CASE | {"format": "m0v0", "lr": 0.2, "at_edge": True, "runs": runs(1.01, 1.03)}]  # fmt: skip
    same = [CASE | {"format": "m0v0", "runs": runs(1.2, 1.4)}, CASE | {"format": NOISE, "runs": runs(0.99, 1.0)}]
    (line,) = study.summary(rows, same)
    assert line["rate_over_full"] == 2 and line["at_edge"]
    assert (line["gap_percent"], line["gap_at_full_rate"], line["noise_percent"]) == pytest.approx((2.0, 30.0, -0.5))
    assert "+2.00" in study.table([line]) and "+30.00" in study.table([line])


def test_the_study_trains_tunes_and_goes_on(tmp_path: Path) -> None:
    args = study.Args(**{**vars(ARGS), "out": tmp_path / "m.json"})
    study.train(args)
    first = json.loads(args.out.read_text())
    assert {row["format"] for row in first["rows"]} == {"full", "m0v0"}
    assert all(len(row["tried"]) >= 2 and row["lr"] in [one["lr"] for one in row["tried"]] for row in first["rows"])
    assert first["summary"][0]["gap_percent"] is not None and first["summary"][0]["noise_percent"] is not None
    study.train(args)
    assert json.loads(args.out.read_text())["rows"] == first["rows"]


def test_unknown_formats_and_a_missing_reference_are_refused(tmp_path: Path) -> None:
    for formats in ("full,m3v3", "m0v0"):
        with pytest.raises(SystemExit, match="give full and rungs of the ladder"):
            study.train(study.Args(formats=formats, out=tmp_path / "m.json"))
