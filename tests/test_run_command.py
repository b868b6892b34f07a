"""Promises of `mango run`'s options (rows F6 to F8): each takes effect; what cannot take effect is an error, never ignored."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mango_env.workloads import make_workload
from tests.study_command import mango_run
from tests.test_large_models import data
from tests.test_workloads import made
from train_policy.held_out import Goal, Looks
from train_policy.run_study import Args, run_method
from train_policy.study_methods import methods
from train_policy.throughput import Watch, check_device, peak_bytes, rates, start_peak

__all__ = ["data", "made"]                                                     # fixtures
TINY_RESNET = "cifar100_resnet+depth=50+width=4+units=1+val_size=20"
NUMBERS = ("val_loss", "loss_curve", "best_train_loss", "state_bytes_peak", "decisions")  # that follow from the seed


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(folder: str = "runs/study") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(folder, "study.json").read_text())["rows"]
    return found


def test_one_seed_is_one_result_and_another_seed_another() -> None:
    results = []
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        mango_run("single", "--optimizer", "mango_adaptive", "--steps", "20", "--seed", seed, "--output-dir", folder)
        results.append({name: rows_of(folder)[0][name] for name in NUMBERS})
    assert results[0] == results[1]
    assert results[0]["loss_curve"] != results[2]["loss_curve"]


def test_batch_size_epochs_and_learning_rate_take_effect() -> None:
    mango_run("single", "--epochs", "0.5", "--batch-size", "100", "--learning-rate", "0.0", code=2)
    mango_run("single", "--epochs", "0.5", "--batch-size", "100", "--learning-rate", "1e-9")
    (still,) = rows_of()
    assert still["steps"] == round(0.5 * (1438 // 100))
    assert still["samples_per_second"] * still["train_seconds"] == pytest.approx(still["steps"] * 100)
    untouched = make_workload("digits_mlp", 0, batch=100).evaluate()["val_loss"]
    assert still["val_loss"] == pytest.approx(untouched, rel=1e-4)
    mango_run("single", "--epochs", "0.5", "--batch-size", "100")
    assert rows_of()[0]["val_loss"] < 0.9 * untouched


def test_data_dir_and_output_dir_take_effect(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_DATA", "nowhere")
    words = ("single", "--workload", TINY_RESNET, "--steps", "1", "--batch-size", "8", "--output-dir", "out")
    failed = mango_run(*words, code=2)
    assert "cifar100_train_jpeg.npz, which does not exist" in failed.stderr and failed.stderr.count("\n") == 1
    assert not Path("out").exists()
    mango_run(*words, "--data-dir", str(data))
    assert sorted(path.name for path in Path("out").iterdir()) == ["study.csv", "study.json"]
    failed = mango_run(*words, "--data-dir", "missing", code=2)
    assert "--data-dir missing is no folder" in failed.stderr


def test_f7_one_epoch_of_a_resnet50_runs_and_logs_its_accuracy(data: Path) -> None:
    mango_run("single", "--workload", TINY_RESNET, "--epochs", "0.5", "--batch-size", "12", "--optimizer", "mango_adaptive")
    (row,) = rows_of()
    assert row["steps"] == round(0.5 * (120 // 12)) and 0 <= row["val_accuracy"] <= 1
    assert row["state_bytes_peak"] <= row["budget_bytes"]


@pytest.mark.parametrize("words", [("nothing",), ("gpt2+size=9B",), ("digits_mlp+colour=red",), ("digits_mlp+width=0",)])
def test_a_workload_that_cannot_be_made_ends_the_command_with_code_2(words: tuple[str, ...], data: Path) -> None:
    failed = mango_run("comparative", "--workload", *words, code=2)
    assert failed.stderr.startswith("mango: error: ") and failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("level", "told", "untold"),
    [("debug", ["step 10: loss", "val_loss"], []), ("info", ["val_loss"], ["step 10"]), ("error", [], ["val_loss", "step"])],
)
def test_the_log_level_decides_what_stderr_tells(level: str, told: list[str], untold: list[str]) -> None:
    done = mango_run("single", "--optimizer", "mango_adaptive", "--steps", "20", "--log-level", level)
    assert all(text in done.stderr for text in told) and not any(text in done.stderr for text in untold)
    assert "mango_adaptive" in done.stdout                                     # results are no log
    assert "failed: unknown policy" in mango_run(
        "single", "--optimizer", "mango_learned", "--policy", "nobody", "--steps", "2", "--log-level", level, code=1
    ).stderr  # fmt: skip


def test_options_that_cannot_take_effect_are_errors() -> None:
    for words, message in (
        (("--log-level", "loud"), "unknown log level 'loud'; known: debug, info, warning, error"),
        (("--device", "tpu"), "unknown device 'tpu'; give cpu, cuda or cuda:N"),
        (("--device", "meta"), "unknown device 'meta'"),
        (("--device", "cpu", "--gpu-memory-fraction", "0.5"), "the run is on the CPU; leave it out"),
        (("--gpu-memory-fraction", "1.5", "--device", "cpu"), "--gpu-memory-fraction 1.5 must be in (0, 1]"),
        (("--device", "cuda:99"), "device 'cuda:99': torch finds"),
        (("--batch-size", "0"), "batch_size=0 must be positive"),
        (("--metric", "val_loss"), "give the target too"),
        (("--metric", "bleu", "--target", "27"), ""),
    ):
        failed = mango_run("single", "--steps", "2", *words, code=1 if "bleu" in words else 2)
        assert message in failed.stderr
    assert "metric='bleu' is of translations" in failed.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_share_of_a_gpu_that_is_not_there_is_an_error() -> None:
    failed = mango_run("single", "--steps", "2", "--gpu-memory-fraction", "0.5", code=2)
    assert "torch finds 0 CUDA devices; use --device cpu" in failed.stderr


def test_a_share_of_a_gpus_memory_is_set_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append((share, device)))
    assert check_device("cuda", 0.25) == torch.device("cuda")
    assert asked == [(0.25, torch.device("cuda"))]


@pytest.mark.gpu
def test_f9_a_run_on_a_gpu_stays_under_its_share() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mango_run("single", "--optimizer", "mango_adaptive", "--steps", "20", "--gpu-memory-fraction", "0.1")
    (row,) = rows_of()
    assert 0 < row["peak_memory_bytes"] <= 0.1 * torch.cuda.get_device_properties(0).total_memory


# ---- speed, peak, goals


def test_perplexity_and_tokens_per_second_are_columns(data: Path) -> None:
    spec = "gpt2+size=tiny+merges=40+context=16+val_windows=4"
    done = mango_run("single", "--workload", spec, "--steps", "3", "--batch-size", "4")
    (row,) = rows_of()
    assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    assert row["tokens_per_second"] == pytest.approx(16 * row["samples_per_second"])
    assert row["samples_per_second"] * row["train_seconds"] == pytest.approx(4 * 3)
    assert row["train_seconds"] <= row["seconds"] and row["peak_memory_bytes"] > 10_000_000
    assert "tokens/s, peak" in done.stderr
    (line,) = json.loads(Path("runs/study/study.json").read_text())["summary"]
    assert line["val_perplexity"] == row["val_perplexity"] and line["tokens_per_second"] == row["tokens_per_second"]


def test_a_goal_is_a_training_loss_or_a_held_out_measure() -> None:
    table = methods()
    for method in (table["adamw"], table["mango_adaptive"]):
        rows = [run_method(Args(steps=60, target=target, metric=metric, evaluate_every=20), method, 0)
                for metric, target in (("loss", 1.5), ("val_accuracy", 0.5), ("val_loss", 0.0))]  # fmt: skip
        assert rows[0]["steps_to_target"] == next(i + 1 for i, loss in enumerate(rows[0]["loss_curve"]) if loss <= 1.5)
        assert rows[1]["steps_to_target"] in (20, 40, 60) and rows[1]["seconds_to_target"] <= rows[1]["train_seconds"]
        assert rows[2]["steps_to_target"] is None and rows[2]["seconds_to_target"] is None
        assert rows[0]["val_loss"] == rows[1]["val_loss"] == rows[2]["val_loss"]  # looking changes nothing
    with pytest.raises(ValueError, match="unknown metric 'val_bleu'; this workload has loss, val_loss, val_accuracy"):
        run_method(Args(steps=10, target=1, metric="val_bleu"), table["adamw"], 0)


def test_a_goal_looks_when_it_is_due_and_at_the_end() -> None:
    goal, looks = Goal(0.5, "val_accuracy"), Looks(20)
    for step in range(10, 60, 10):
        goal.look([1.0] * step, float(step), looks.at(step, step == 50, lambda: {"val_accuracy": 0.1}))
    assert [look["step"] for look in looks.found] == [20, 40, 50] and goal.steps is None
    goal = Goal(0.5, "loss")
    goal.look([1.0, 0.4, 0.3], 9.0, None)
    assert (goal.steps, goal.seconds) == (2, 9.0)


def test_g5_the_best_held_out_measures_stand_beside_the_final_ones() -> None:
    for optimizer in ("adamw", "mango_adaptive"):
        words = ("single", "--optimizer", optimizer, "--learning-rate", "0.03", "--steps", "60", "--interval", "5")
        mango_run(*words, "--output-dir", "end")
        done = mango_run(*words, "--evaluate-every", "15")
        (row,), (alone,) = rows_of(), rows_of("end")
        looks = row["evaluations"]
        assert [look["step"] for look in looks] == [15, 30, 45, 60] and [look["step"] for look in alone["evaluations"]] == [60]
        assert row["best_val_loss"] == min(look["val_loss"] for look in looks)
        assert row["best_val_accuracy"] == max(look["val_accuracy"] for look in looks)
        assert looks[-1] == {"step": 60, "val_loss": row["val_loss"], "val_accuracy": row["val_accuracy"]}
        assert {look["step"]: look["val_loss"] for look in looks}[row["best_val_loss_step"]] == row["best_val_loss"]
        assert row["loss_curve"] == alone["loss_curve"] and row["val_loss"] == alone["val_loss"]   # looking changes nothing
        assert alone["best_val_loss"] is None            # nobody looked on the way
        assert f"best {row['best_val_loss']:.4f} at step {row['best_val_loss_step']}" in done.stderr
        (line,) = json.loads(Path("runs/study/study.json").read_text())["summary"]
        assert line["best_val_loss"] == row["best_val_loss"] and line["best_val_accuracy"] == row["best_val_accuracy"]
        header, values = (line.split(",") for line in Path("runs/study/study.csv").read_text().splitlines())
        assert float(values[header.index("best_val_loss")]) == row["best_val_loss"] and "evaluations" not in header


def test_the_best_is_the_highest_of_what_should_rise_and_the_lowest_of_what_should_fall() -> None:
    looks = Looks(1)
    for step, (loss, accuracy) in enumerate([(2.0, 0.5), (1.0, 0.9), (math.nan, 0.7)], start=1):
        looks.at(step, step == 3, lambda loss=loss, accuracy=accuracy: {"val_loss": loss, "val_accuracy": accuracy})  # type: ignore[misc]
    assert looks.best() == {"best_val_loss": 1.0, "best_val_loss_step": 2, "best_val_accuracy": 0.9, "best_val_accuracy_step": 2}


def test_a_watch_counts_its_blocks_alone_and_a_peak_sees_what_was_held() -> None:
    device = torch.device("cpu")
    watch = Watch(device)
    with watch.running():
        pass
    with pytest.raises(RuntimeError), watch.running():
        raise RuntimeError
    assert 0 < watch.seconds < 1
    assert rates(object(), 5, 2.0) == {
        "train_seconds": 2.0, "steps_per_second": 2.5, "samples_per_second": None, "tokens_per_second": None
    }  # fmt: skip
    start_peak(device)
    before = peak_bytes(device)
    held = torch.ones(25_000_000)
    assert peak_bytes(device) >= before + 80_000_000 and held.sum() > 0
