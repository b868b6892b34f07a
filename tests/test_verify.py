"""Promises about `deploy/verify.py`: it passes what is sound, and each of its checks fails when its promise is broken."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deploy import verify
from deploy.verify import Args, Check, Record
from mango import KNOBS, LADDER, MANGO, CompressionConfig, Decision, PolicyNetwork, freeze

ROOT = Path(__file__).resolve().parent.parent
SPIRALS = f"{ROOT / 'deploy' / 'custom_workload.py'}:spirals"
ARGS = Args(policy="water-filling", workload=SPIRALS, memory_budget="0.25", steps=20, interval=5)


@pytest.fixture(params=["rung", "knobs"])
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An untrained policy as a file, by either head."""
    with torch.random.fork_rng(devices=[]):
        return freeze(PolicyNetwork(), tmp_path / "policy.safetensors", head=request.param, card={})


def as_spec(workload: Any) -> Any:
    """A callable in place of the name that the command line would give."""
    return lambda seed: workload


def failed(args: Args) -> set[str]:
    return {check.name for check in verify.verify(args)[0] if not check.passed}


@pytest.mark.parametrize("workload", [SPIRALS, "digits_mlp"])
@pytest.mark.parametrize("policy", ["water-filling", "random", "adaptive", "scheduled"])
def test_heuristics_pass_on_any_workload(policy: str, workload: str) -> None:
    assert failed(replace(ARGS, policy=policy, workload=workload)) == set()


def test_a_frozen_policy_passes_and_the_result_is_written(frozen: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out.json"
    arguments = ["--policy", str(frozen), "--workload", SPIRALS, "--memory-budget", "0.25", "--steps", "20", "--interval", "5"]
    assert verify.main([*arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["passed"] is True
    assert len(result["checks"]) == 9
    assert result["args"]["steps"] == 20
    assert len(result["record"]["losses"]) == 20
    assert [decision["step"] for decision in result["record"]["decisions"]] == [5, 10, 15, 20]
    assert max(result["record"]["state_bytes"]) <= result["record"]["report"]["budget"]
    assert result["about"]["versions"]["torch"] == torch.__version__


def test_it_runs_as_a_program_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "deploy" / "verify.py"), "--policy", "water-filling"]
    command += ["--workload", "digits_mlp", "--memory-budget", "64KiB", "--steps", "20", "--interval", "10"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("ok") >= 9
    assert "of 65,536 bytes" in " ".join(run.stdout.replace("│", " ").split())


def test_a_file_of_a_foreign_schema_is_a_failed_check(
    frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open(frozen, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}        # noqa: SIM118
        metadata = file.metadata() | {"schema_hash": "0" * 16}
    save_file(tensors, tmp_path / "foreign.safetensors", metadata)
    arguments = ["--policy", str(tmp_path / "foreign.safetensors"), "--workload", SPIRALS]
    assert verify.main([*arguments, "--json", str(tmp_path / "out.json")]) == 1
    assert "FAILED" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["passed"] is False
    assert "schema" in result["checks"][0]["detail"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "digits"], "unknown workload 'digits'; known: "),
        (["--memory-budget", "1KiB"], "least feasible"),
        (["--memory-budget", "much"], "memory_budget='much' is no size"),
        (["--steps", "10"], "steps=10 must be at least twice interval=10"),
        (["--interval", "0"], "interval=0"),
        (["--lr", "-1"], "lr"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(["--policy", "water-filling", "--workload", SPIRALS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("verify: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_workload_with_nothing_to_decide_is_refused() -> None:
    workload = SimpleNamespace(model=nn.Linear(4, 4), steps=9, loss=lambda: None, evaluate=dict)
    with pytest.raises(ValueError, match="no tensor of 1024 entries or more"):
        verify.verify(replace(ARGS, workload=as_spec(workload), memory_budget="1KiB"))


# ---- every check can fail


def test_a_budget_that_is_exceeded_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MANGO, "memory_budget", property(lambda self: 5000))
    assert failed(ARGS) == {"state is within the budget at all times"}


def test_a_report_that_leaves_something_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MANGO.memory_report
    monkeypatch.setattr(MANGO, "memory_report", lambda self: honest(self) | {"scales": 0})
    assert failed(ARGS) == {"memory report matches the storages"}


def test_a_dense_copy_beside_the_state_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MANGO.step

    def step(self: MANGO, closure: Any = None) -> Any:
        vars(self)["copies"] = {"weights": [torch.zeros(64, 64)]}
        return honest(self, closure)

    monkeypatch.setattr(MANGO, "step", step)
    checks, record = verify.verify(ARGS)
    assert [check.name for check in checks if not check.passed] == ["memory report matches the storages"]
    assert record.mismatches[0].endswith("bytes are held beside the state")


def test_state_that_is_not_counted_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MANGO.step

    def step(self: MANGO, closure: Any = None) -> Any:
        result = honest(self, closure)
        for slot in self.state.values():
            slot["average"] = torch.zeros(7)
        return result

    monkeypatch.setattr(MANGO, "step", step)
    checks, record = verify.verify(ARGS)
    assert [check.name for check in checks if not check.passed] == ["memory report matches the storages"]
    assert "storages hold" in record.mismatches[0]


def test_a_config_off_the_menus_fails() -> None:
    optimizer = SimpleNamespace(layers=[SimpleNamespace(name="a"), SimpleNamespace(name="b")], ladder=LADDER)
    scores = SimpleNamespace(scores=None)

    def problems(applied: list[Any], shadow: Any = scores) -> list[str]:
        optimizer.applied = applied
        return list(verify.illegal_configs(optimizer, shadow))                 # type: ignore[arg-type]

    assert problems([LADDER[0], LADDER[3]]) == []
    assert problems([LADDER[0]]) == ["1 configs for 2 layers"]
    assert problems([LADDER[0], {"momentum_bits": 8}]) == ["b has a dict, no CompressionConfig"]
    between = CompressionConfig(sparsity=0.7)
    assert "off the menus" in problems([LADDER[0], between])[0]
    off_ladder = CompressionConfig(momentum_bits=2, variance_bits=16)
    assert problems([LADDER[0], off_ladder]) == ["b has m2v16, which is no rung of the ladder"]
    assert problems([LADDER[0], off_ladder], SimpleNamespace(act=None)) == []


@pytest.mark.parametrize(
    ("shadow", "message"),
    [
        ({"scores": lambda obs: torch.zeros(3, len(LADDER))}, f"scores (3, {len(LADDER)}), expected finite (2, {len(LADDER)})"),
        ({"scores": lambda obs: torch.full((2, len(LADDER)), torch.nan)}, "expected finite"),
        ({"act": lambda obs: torch.full((2, len(KNOBS)), 9)}, "expected int64 indices"),
        ({"act": lambda obs: torch.zeros(2, len(KNOBS))}, "float32, expected int64 indices"),
        ({"act": lambda obs: torch.zeros(1, len(KNOBS), dtype=torch.int64)}, "expected (layers, knobs) = (2, 7)"),
        ({"act": lambda obs: "m8v8"}, "a decision is"),
        ({"act": lambda obs: torch.zeros(2, len(KNOBS), dtype=torch.int64)}, None),
        ({"act": lambda obs: None}, None),
    ],
)
def test_answers_that_are_not_legal_are_named(shadow: dict[str, Callable[[Tensor], Any]], message: str | None) -> None:
    decision = Decision(5, torch.zeros(2, 64), [], torch.zeros(2), torch.zeros(2), 0.0)
    problems = list(verify.wrong_answers(SimpleNamespace(**shadow), decision, len(LADDER)))
    assert (message is None) == (problems == [])
    assert message is None or message in problems[0]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda weight: weight.sum() * 0 + 1, {"loss falls"}),
        (lambda weight: weight.sum() * torch.nan, {"loss falls", "loss is finite", "gradients are finite"}),
    ],
)
def test_a_run_that_does_not_learn_fails(loss: Callable[[Tensor], Tensor], expected: set[str]) -> None:
    model = nn.Linear(64, 64)
    workload = SimpleNamespace(model=model, steps=9, loss=lambda: loss(model.weight), evaluate=lambda: {"val_loss": 0.0})
    assert failed(replace(ARGS, workload=as_spec(workload))) == expected


def test_decisions_that_do_not_come_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MANGO, "register_decision_hook", lambda self, hook: SimpleNamespace(remove=lambda: None))
    assert failed(ARGS) == {"decisions are taken on time"}


def test_the_exit_code_follows_the_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("one", True, "fine"), Check("two", False, "shape [2] is wrong")]
    monkeypatch.setattr(verify, "verify", lambda args: (checks, Record()))
    assert verify.main(["--policy", "water-filling", "--workload", "digits_mlp"]) == 1
    assert "shape [2] is wrong" in capsys.readouterr().out
