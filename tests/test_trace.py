"""Promises of the traces of a run (row J5): one JSON per N steps, bounded in all, and times that add up to the clock."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mango import MANGO
from train_policy.cli import app
from train_policy.trace import LONGEST, PHASES, Tracer, Tracing


def steps(optimizer: torch.optim.Optimizer, model: nn.Module, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().mean().backward()
        optimizer.step()


def contents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize("kind", ["mango", "adamw"])
def test_j5_there_is_one_file_per_n_steps_with_phases_that_add_up_and_the_bytes_held(kind: str, tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    if kind == "mango":
        optimizer = MANGO(model.named_parameters(), policy="random", memory_budget=0.5, policy_update_freq=5)
    began = time.perf_counter()
    with Tracer(optimizer, Tracing(every=10), tmp_path):
        steps(optimizer, model, 34)
    clock = time.perf_counter() - began
    found = contents(tmp_path)
    assert [(one["first_step"], one["last_step"]) for one in found] == [(1, 10), (11, 20), (21, 30)]
    total = 0.0
    for one in found:
        for phase in PHASES:
            times = one["seconds_per_step"][phase]
            assert len(times) == 10 and all(seconds >= 0 for seconds in times)
            assert one["seconds"][phase] == pytest.approx({"total": sum(times), "mean": sum(times) / 10, "max": max(times)})
            total += sum(times)
        decided = [i + 1 for i, seconds in enumerate(one["seconds_per_step"]["decision"]) if seconds > 0]
        assert decided == ([5, 10] if kind == "mango" else [])
        assert one["about"]["hardware"]["cores"] and one["peak_memory_bytes"] > 0
        if kind == "mango":
            assert 0 < one["memory"]["total"] <= optimizer.memory_budget and len(one["memory"]["layers"]) == 1
        else:
            assert one["memory"] == {"total": 8 * 65 * 64 + 4 * 2}             # two moments, and torch's counts of steps
    assert 0 < total < clock
    before = sorted(tmp_path.iterdir())
    steps(optimizer, model, 10)                          # nobody watches any more
    assert sorted(tmp_path.iterdir()) == before


def test_j5_the_number_of_files_and_the_size_of_each_are_bounded(tmp_path: Path) -> None:
    model = nn.Linear(64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    (tmp_path / "step-00000001.json").write_text("of an earlier run")
    (tmp_path / "mine.txt").write_text("not the tracer's")
    with Tracer(optimizer, Tracing(every=2, files=3), tmp_path):
        steps(optimizer, model, 21)
    names = [f"step-{step:08d}.json" for step in (16, 18, 20)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", *names]
    with Tracer(optimizer, Tracing(every=2 * LONGEST, files=3), tmp_path):
        steps(optimizer, model, 2 * LONGEST)
    (long,) = contents(tmp_path)
    assert long["first_step"] == 1 and {len(times) for times in long["seconds_per_step"].values()} == {LONGEST}
    with pytest.raises(ValueError, match="trace_files=0 must be at least 1"):
        Tracing(files=0)


def test_what_is_done_between_intervals_is_in_no_step(tmp_path: Path) -> None:
    model = nn.Linear(64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Tracer(optimizer, Tracing(every=1), tmp_path) as tracer:
        time.sleep(0.2)
        tracer.mark()
        with tracer.deciding():
            time.sleep(0.05)
        steps(optimizer, model, 1)
    (one,) = contents(tmp_path)
    assert one["seconds"]["decision"]["total"] >= 0.05 and one["seconds"]["forward_backward"]["total"] < 0.2


@pytest.mark.parametrize("optimizer", ["mango_learned", "adamw"])
def test_a_study_writes_traces_and_a_chrome_trace_that_names_its_operations(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "single", "--optimizer", optimizer, "--steps", "20", "--trace-every", "4", "--trace-files", "2"]
    done = CliRunner().invoke(app, [*words, "--profile", "profiles"])
    assert done.exit_code == 0, done.output
    found = contents(Path(f"runs/study/trace/{optimizer}-seed0"))
    assert [one["last_step"] for one in found] == [16, 20]
    if optimizer == "mango_learned":
        assert found[0]["memory"]["layers"] and found[-1]["seconds"]["decision"]["total"] > 0
    events = json.loads(Path(f"profiles/{optimizer}-seed0.json").read_text())["traceEvents"]
    assert {"aten::linear", "aten::addmm"} & {event.get("name") for event in events}
    marks = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(marks) == 3
    failed = CliRunner().invoke(app, ["run", "single", "--trace-every", "0"])
    assert failed.exit_code == 2 and "trace_every=0 must be at least 1" in failed.stderr
    failed = CliRunner().invoke(app, ["run", "single", "--steps", "1", "--profile", "short"])
    assert failed.exit_code == 1 and "a profile takes at least 2 optimizer steps" in failed.stderr and not Path("short").exists()
