"""Promises of the LoRA script: it runs, its loss falls, the model stands still, and bytes are those that are kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deploy import lora
from deploy.lora import Adapted, Args, adapt, merge
from mango_env.workloads import make_workload


def test_j7_adapters_alone_learn_and_their_state_is_a_quarter_of_adamw_s(tmp_path: Path) -> None:
    args = Args(pretrain=20, steps=20, folder=str(tmp_path))
    found = json.loads(lora.train(args).read_text())
    adamw, mango = found["rows"]
    for row in (adamw, mango):
        assert row["val_loss"] < row["val_loss_before"] - 0.1 and row["loss"] < row["first_loss"]
    assert adamw["state_bytes"] >= 8 * adamw["learning"] and mango["learning"] == adamw["learning"] < found["parameters"] / 5
    assert mango["state_bytes"] <= 0.25 * 8 * mango["learning"]
    adapters = load_file(tmp_path / "adapters.safetensors")
    assert sum(tensor.numel() for tensor in adapters.values()) == mango["learning"]
    assert all(".lora_" in name for name in adapters)


def test_an_adapted_model_begins_as_it_was_stands_still_and_can_be_merged() -> None:
    model = make_workload("source_lm", 0).model
    symbols = torch.arange(48).reshape(2, 24)
    before, weights = model(symbols), {name: p.detach().clone() for name, p in model.named_parameters()}
    learning = adapt(model, rank=4, alpha=8.0, whole="head")
    torch.testing.assert_close(model(symbols), before)
    assert {name for name, _ in learning if ".lora_" not in name} == {"head.weight"}
    optimizer = torch.optim.SGD([p for _, p in learning], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(symbols).square().mean().backward()
        optimizer.step()
    still = {name.replace("linear.", ""): p for name, p in model.named_parameters() if not p.requires_grad}
    assert len(still) == len(weights) - 1 and all(torch.equal(p, weights[name]) for name, p in still.items())
    after = model(symbols)
    assert not torch.allclose(after, before)
    merge(model)
    torch.testing.assert_close(model(symbols), after, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_a_part_that_is_not_there_ends_with_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no part 'tail'; it has 0, 1"):
        adapt(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 1, 1.0, "tail")
    monkeypatch.setattr(lora, "parse", lambda kind, about: replace(Args(), workload="nothing", folder=str(tmp_path)))
    with pytest.raises(SystemExit) as stopped:
        lora.main()
    assert stopped.value.code == 2 and (error := capsys.readouterr().err).count("\n") == 1 and "nothing" in error
