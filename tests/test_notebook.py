"""Promises of the notebook: it is one that Colab opens, and its cells run from the first to the last, on a GPU within 2 GB."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent / "deploy" / "cifar10_resnet18.ipynb"


def run_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that its code cells leave, run in order in one namespace, as a kernel does."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(PATH.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{PATH.name}, cell {number}", "exec"), names)
    return names


def test_f9_the_notebook_is_of_version_4_without_outputs_and_limits_the_gpu_before_anything_is_on_it() -> None:
    content = json.loads(PATH.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["metadata"]["kernelspec"]["language"]) == (4, "python")
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    text = "".join("".join(cell["source"]) for cell in code)
    limit = text.index("torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / total))")
    assert "LIMIT = 2 * 2**30" in text and limit < text.index(".to(device)") < text.index("peak <= LIMIT")


def test_f9_every_cell_of_the_notebook_runs_and_the_network_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("without a GPU the notebook trains a narrow network; with one the next test runs it")
    names = run_all(tmp_path, monkeypatch)
    assert sum(names["losses"][-10:]) < 0.5 * sum(names["losses"][:10]) and names["measures"]["val_accuracy"] > 0.5
    assert 0 < names["held"] <= names["optimizer"].memory_budget == names["report"]["adamw"] // 4
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_f9_on_a_gpu_resnet_18_stays_within_2_gb(mango_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    names = run_all(tmp_path, monkeypatch)
    assert 0 < names["peak"] <= names["LIMIT"] == 2 * 2**30 and names["measures"]["val_accuracy"] > 0.8
