"""The bench of every method: what it runs and reports, that it goes on, what it does with methods that cannot."""

import csv
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD, Optimizer

from experiments import compare, comparison_runs, comparison_table
from experiments.baseline_optimizers import BASELINES, Baseline
from experiments.comparison_figures import FIGURES, pareto
from mango_env.energy import Energy, metered

METHODS = "adamw,mango@0.25,sgd,adam8bit"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    place = comparison_runs.Domain
    places = {"vision": place("digits_mlp", 8), "finetuning": place("digits_mlp", 6, "digits_mlp")}
    monkeypatch.setitem(comparison_runs.SCALES, "small", places)


@pytest.fixture
def args(tmp_path: Path) -> comparison_runs.Args:
    out = tmp_path / "c"
    return comparison_runs.Args(domains="vision", methods=METHODS, seeds=2, rates="1,2", costs=False, workers=1, out=out)


class InThisProcess:
    """An executor that knows what the test has changed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> Any:
        from concurrent.futures import Future

        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "worker_pool", InThisProcess)


def broken(named: Any, lr: float, **_: Any) -> Optimizer:
    raise RuntimeError("it broke\nin two lines")


def test_f4_f20_every_method_is_in_every_file(args: comparison_runs.Args, here: None) -> None:
    study = compare.compare(args)
    assert not study.failures
    names = ["report.json", "report.csv", "report.tex", "report.md", *(f"{name}.png" for name in FIGURES)]
    assert all((args.out / name).stat().st_size > 400 for name in names)
    for name in names[:4]:
        text = (args.out / name).read_text().replace("\\_", "_")
        assert all(method in text for method in METHODS.split(",")), name
    with (args.out / "report.csv").open() as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    report = json.loads((args.out / "report.json").read_text())
    assert {line["method"]: line["val_loss"] for line in report["summary"] if line.get("val_loss")} == {
        name: float(line["val_loss"]) for name, line in lines.items() if line["val_loss"]
    }
    page = (args.out / "comparison.html").read_text()
    assert "Loss against bytes" in page and "mango@0.25" in page
    by_bytes = {name: float(line["state_bytes_per_param"]) for name, line in lines.items() if line["state_bytes_per_param"]}
    assert by_bytes["adamw"] == pytest.approx(8, abs=0.01) and by_bytes["sgd"] == pytest.approx(4)
    assert by_bytes["mango@0.25"] < 2.6
    assert float(lines["adamw"]["gap_percent"]) == 0.0


def test_a_method_that_cannot_run_here_is_a_row_that_says_why(
    args: comparison_runs.Args, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Baseline("absent", "", "", broken, 1e-3, imports=("no_such_package",))
    monkeypatch.setitem(BASELINES, "absent", absent)
    study = compare.compare(replace(args, methods="adamw,absent", seeds=1, rates="1"))
    assert not study.failures
    (line,) = [line for line in study.summary() if line["method"] == "absent"]
    assert line["status"] == "unavailable" and "no_such_package is not installed" in line["message"]


def test_what_crashes_is_told_and_the_others_finish(
    args: comparison_runs.Args, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASELINES, "crash", Baseline("crash", "", "", broken, 1e-3))
    study = compare.compare(replace(args, methods="crash,adamw", seeds=1))
    assert [row["message"] for row in study.failures] == ["it broke in two lines"] * len(study.failures) and study.failures
    ends = {line["method"]: line["status"] for line in study.summary()}
    assert ends == {"adamw": "ok", "crash": "failed"}


def test_what_diverges_is_a_row_that_says_so(args: comparison_runs.Args, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = Baseline("wild", "", "", lambda named, lr, **_: SGD([p for _, p in named], lr=lr), 1e9)
    monkeypatch.setitem(BASELINES, "wild", wild)
    study = compare.compare(replace(args, methods="wild,adamw", seeds=1, rates="1"))
    (line,) = [line for line in study.summary() if line["method"] == "wild"]
    assert line["status"] == "diverged" and "loss" in line["message"] and "val_loss" not in line and not study.failures


def test_a_killed_comparison_goes_on_to_the_same_numbers(args: comparison_runs.Args, here: None) -> None:
    few = replace(args, methods="adamw,sgd")
    whole = compare.compare(few)
    kept = json.loads(whole.path.read_text())
    cut = replace(few, out=args.out.with_name("cut"))
    cut.out.mkdir()
    (cut.out / "compare.json").write_text(json.dumps(kept | {"runs": kept["runs"][:1], "rates": kept["rates"][:1]}))
    again, unlike = compare.compare(cut), {"steps_per_second": 0}
    assert [line | unlike for line in again.summary()] == [line | unlike for line in whole.summary()]
    before = again.path.read_text().count('"loss_curve"')
    compare.compare(cut)
    assert again.path.read_text().count('"loss_curve"') == before


def test_finetuning_starts_from_trained_weights(args: comparison_runs.Args) -> None:
    args.out.mkdir()
    fresh = comparison_runs.run(comparison_runs.Task("vision", "adamw", 0, 1e-3, args))
    tuned = comparison_runs.run(comparison_runs.Task("finetuning", "adamw", 0, 1e-3, args))
    assert tuned["status"] == "ok" and tuned["loss_curve"][0] < fresh["loss_curve"][0]


def test_f6_the_seed_repeats_and_the_rate_is_its_own(args: comparison_runs.Args) -> None:
    task = comparison_runs.Task("vision", "mango@0.25", 3, 2e-3, args)
    one, two = comparison_runs.run(task), comparison_runs.run(task)
    assert one["loss_curve"] == two["loss_curve"] and one["val_loss"] == two["val_loss"]
    assert comparison_runs.run(replace(task, lr=4e-3))["loss_curve"] != one["loss_curve"]


def test_g4_g9_time_and_memory_are_measured(args: comparison_runs.Args) -> None:
    found = comparison_runs.cost(comparison_runs.Task("vision", "sgd", 0, 1e-2, args))
    assert found["status"] == "ok" and found["step_time_ratio"] > 0 and found["step_time_ratio_se"] > 0
    assert found["peak_bytes_per_param"] >= found["median_bytes_per_param"]
    assert found["activation_bytes_per_param"] > 0
    assert isinstance(found["joules_per_step"], float) or found["joules_per_step"].startswith("unavailable: ")


def test_g6_the_target_is_the_first_step_that_reaches_it() -> None:
    row = {"loss_curve": [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], "points_every": 2}
    assert comparison_table.first_below(row, 1.6) == 10 and comparison_table.first_below(row, 0.9) is None
    assert comparison_table.first_below(row, 5.0) == 2


def test_f22_dominated_methods_are_not_on_the_front() -> None:
    lines = [{"method": name, "state_bytes_per_param": size, "val_loss": loss} for name, size, loss in
             [("a", 8.0, 1.0), ("b", 2.0, 1.0), ("c", 1.0, 1.2), ("d", 1.5, 1.3)]]  # fmt: skip
    assert pareto(lines) == {"b", "c"}


def test_g12_joules_are_the_integral_of_the_samples_or_unavailable() -> None:
    assert Energy([(0.0, 100.0), (1.0, 200.0), (3.0, 200.0)]).joules == pytest.approx(550.0)
    assert Energy([(0.0, 100.0), (1.0, 200.0)]).per_step(10) == pytest.approx(15.0)
    assert Energy(problem="no driver").per_step(3) == "unavailable: no driver"


def test_g12_the_power_of_all_devices_is_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '100.5\\n99.5\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with metered(interval=0.01) as energy:
        subprocess.run(["sleep", "0.3"], check=True)
    assert energy.problem is None and {watts for _, watts in energy.samples} == {200.0}
    assert energy.joules is not None and 0 < energy.joules < 200


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--methods", "nobody"], "unknown baseline 'nobody'"),
        (["--domains", "music"], "unknown domain 'music'; known: vision, language, finetuning"),
        (["--scale", "huge"], "unknown scale 'huge'"),
        (["--seeds", "0"], "seeds=0"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    options: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["compare", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    told_there = capsys.readouterr().err
    assert stopped.value.code == 2 and told in told_there and told_there.count("\n") == 1
