"""Promises of `main.py --mode single` about the baselines: each runs by name with a study's accounting, or says why not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.baseline_optimizers import BASELINES, available
from experiments.galore import galore_nbytes
from experiments.study_baselines import BaselineTrainer
from mango_env.workloads import make_workload
from train_policy.run_study import Args, check_study, run_method
from train_policy.state_bytes import state_nbytes
from train_policy.study_methods import REGISTERED, Method, find_method, methods, register_method

ROOT = Path(__file__).parents[1]


def test_galore_by_its_name_is_a_process_with_a_row_like_the_others(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "main.py"), *"--mode single --optimizer galore --epochs 1".split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "runs" / "study" / "study.json").read_text())["rows"]
    ours = run_method(Args(epochs=1), methods()["adamw"], 0)
    assert row["policy"] == "galore" and row["steps"] == ours["steps"] and row["adamw_bytes"] == ours["adamw_bytes"]
    assert set(row) == {*ours, "what"} and row["val_loss"] < row["loss_curve"][0]
    assert galore_nbytes(128, 64, 8) < row["state_bytes_peak"] < ours["state_bytes_peak"]


def test_an_unknown_name_lists_what_is_known_and_what_cannot_run_says_why(tmp_path: Path) -> None:
    main = [sys.executable, str(ROOT / "main.py"), "--mode", "single", "--optimizer"]
    failed = subprocess.run([*main, "nobody"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "unknown optimizer 'nobody'" in failed.stderr and all(name in failed.stderr for name in BASELINES)
    impossible = next((name for name in BASELINES if available(name) is not None), None)
    if impossible is None:
        pytest.skip("every baseline runs on this machine")
    failed = subprocess.run([*main, impossible], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and f"the optimizer {impossible!r} cannot run here: {available(impossible)}" in failed.stderr


@pytest.mark.parametrize("name", [name for name in BASELINES if available(name) is None])
def test_every_baseline_that_runs_here_is_a_method_and_takes_two_steps(name: str) -> None:
    args = Args(optimizer=name, steps=2)
    check_study(args)
    method = find_method(name, "demo")
    assert name in methods() or method is REGISTERED[name]
    row = run_method(args, method, 0)
    assert row["steps"] == 2 and row["state_bytes_peak"] > 0


def test_rates_and_the_length_of_the_run_reach_a_baseline() -> None:
    workload = make_workload("digits_mlp", 0)
    assert BaselineTrainer("adafactor", workload, 0.5, 10).optimizer.param_groups[0]["lr"] == 0.5
    assert BaselineTrainer("adafactor", workload, None, 10).optimizer.param_groups[0]["lr"] == BASELINES["adafactor"].lr
    trainer = BaselineTrainer("adamw_amp_fp16", workload, None, 10)
    assert trainer.mode == "fp16" and trainer.scaler.is_enabled() and float(trainer.step(workload.loss)) > 0
    assert state_nbytes(trainer.optimizer) > 8 * sum(p.numel() for p in workload.model.parameters())


def test_a_name_is_registered_once_and_not_over_one_of_a_studys_own() -> None:
    for name in ("adamw", "galore"):
        with pytest.raises(ValueError, match=f"method '{name}' is already known"):
            register_method(Method(name, "another"))
