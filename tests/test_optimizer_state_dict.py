"""Checkpoints: plain tensors and numbers, read with weights_only, resumed bit for bit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.config import FULL
from tests.rungs import R8

CASES: dict[str, dict[str, Any]] = {
    "full": {"policy": FULL},
    "water-filling": {"memory_budget": 0.4},
    "random": {"policy": "random", "memory_budget": 0.6},
    "stochastic": {"policy": CompressionConfig(momentum_bits=2, variance_bits=4)},
    "feedback": {"policy": CompressionConfig(gradient_bits=4, sparsity=0.9, momentum_bits=8, variance_bits=8)},
    "rank": {"policy": R8},
    "release": {"policy": CompressionConfig(gradient_bits=4, momentum_bits=4, variance_bits=0), "release_gradients": True},
    "release random": {"policy": "random", "memory_budget": 0.8, "release_gradients": True},
    "maximize": {"policy": "random", "maximize": True, "weight_decay": 0.1},
}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def build(options: dict[str, Any]) -> tuple[nn.Sequential, MANGO]:
    model = network()
    return model, MANGO(
        model.named_parameters(), **({"lr": 1e-2, "policy_update_freq": 4, "total_steps": 60, "memory_budget": 3.0} | options)
    )


def go(model: nn.Module, optimizer: MANGO, steps: range) -> list[Tensor]:
    seen: list[Tensor] = []
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :4].square()).square().mean()
        loss.backward()
        optimizer.observe_loss(loss)
        optimizer.step()
        seen.append(optimizer.observe())
    return seen


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stop", [1, 21, 55])
def test_a26_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name: str, stop: int, tmp_path: Path) -> None:
    """Stops in the middle of an interval and past a refresh of the projector; through a file read with weights_only."""
    model, optimizer = build(CASES[name])
    go(model, optimizer, range(stop))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    ahead = go(model, optimizer, range(stop, 60))
    other, resumed = build(CASES[name] | {"seed": 99})
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    again = go(other, resumed, range(stop, 60))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ahead, again, strict=True))
    assert resumed.applied == optimizer.applied and resumed.steps == optimizer.steps
    assert (
        resumed.memory_report() == optimizer.memory_report()
        and resumed.get_compression_stats() == optimizer.get_compression_stats()
    )
    one, two = optimizer.state_dict(), resumed.state_dict()
    assert one["mango"]["seed"] == two["mango"]["seed"]
    for index in one["state"]:
        assert all(torch.equal(v, two["state"][index][k]) for k, v in one["state"][index].items() if isinstance(v, Tensor))


def test_a26_held_gradients_survive_a_checkpoint_between_micro_batches() -> None:
    finals = []
    for interrupt in (False, True):
        model, optimizer = build(CASES["release"])
        go(model, optimizer, range(5))
        optimizer.zero_grad()
        model(torch.ones(2, 16)).square().sum().backward()
        if interrupt:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = MANGO(
                model.named_parameters(), lr=1e-2, policy_update_freq=4, total_steps=60, memory_budget=3.0, **CASES["release"]
            )
            optimizer.load_state_dict(state)
        optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_a_state_dict_holds_tensors_and_json_able_values_only() -> None:
    model, optimizer = build(CASES["feedback"])
    go(model, optimizer, range(6))

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return list(value.shape)
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    assert json.loads(json.dumps(plain(optimizer.state_dict())))["mango"]["steps"] == 6


def test_a_state_dict_is_a_snapshot_and_loading_it_leaves_it_alone() -> None:
    model, optimizer = build(CASES["full"])
    go(model, optimizer, range(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    go(model, optimizer, range(3, 6))
    for _ in range(2):
        optimizer.load_state_dict(saved)
        go(model, optimizer, range(3, 6))
    for index, state in kept["state"].items():
        assert all(torch.equal(v, saved["state"][index][k]) for k, v in state.items() if isinstance(v, Tensor))
    assert torch.equal(kept["mango"]["statistics"]["mean"], saved["mango"]["statistics"]["mean"])


def test_a_loaded_state_owns_its_bytes_alone(tmp_path: Path) -> None:
    """Tensors of a memory-mapped or shared file would count, and keep, the whole of it."""
    model, optimizer = build(CASES["feedback"])
    go(model, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    before = optimizer.state_bytes()
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
    assert optimizer.state_bytes() == before


def test_loading_into_a_smaller_budget_cuts_the_state_to_it() -> None:
    model, optimizer = build(CASES["full"])
    go(model, optimizer, range(5))
    other, smaller = build({"policy": "hold", "memory_budget": 0.4})
    smaller.load_state_dict(optimizer.state_dict())
    assert smaller.state_bytes() <= smaller.memory_budget < optimizer.state_bytes()
    go(other, smaller, range(5, 10))
    assert smaller.state_bytes() <= smaller.memory_budget


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("release", [True, False])
def test_loading_under_other_options_keeps_what_these_store(feedback: bool, release: bool) -> None:
    config = CompressionConfig(gradient_bits=4, momentum_bits=8, variance_bits=8)
    model, optimizer = build({"policy": config, "error_feedback": not feedback, "release_gradients": not release})
    go(model, optimizer, range(5))
    other, changed = build({"policy": config, "error_feedback": feedback, "release_gradients": release, "residual_bits": 4})
    other.load_state_dict(model.state_dict())
    changed.load_state_dict(optimizer.state_dict())
    assert changed.state_bytes() <= changed.planned_bytes()
    go(other, changed, range(5, 10))
    assert changed.state_bytes() <= changed.planned_bytes() and all(p.isfinite().all() for p in other.parameters())


def test_foreign_and_ill_shaped_state_dicts_are_refused_in_words() -> None:
    model, optimizer = build(CASES["full"])
    go(model, optimizer, range(2))
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="not MANGO's"):
        optimizer.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match=r"has 2 layers, this optimizer 1"):
        MANGO(network().parameters(), min_numel=2000).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError):
        MANGO([Parameter(torch.zeros(64, 32))]).load_state_dict(optimizer.state_dict())
    one, other = MANGO([Parameter(torch.ones(64, 32))], policy=FULL), MANGO([Parameter(torch.ones(32, 64))], policy=FULL)
    one.param_groups[0]["params"][0].grad = torch.ones(64, 32)
    one.step()
    with pytest.raises(ValueError, match=r"has shape \(32, 64\)"):
        other.load_state_dict(one.state_dict())


def test_learning_rates_and_groups_come_back() -> None:
    model, optimizer = build(CASES["full"])
    optimizer.param_groups[0]["lr"] = 0.123
    other, resumed = build(CASES["full"])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    go(other, resumed, range(1))
    resumed.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in other.parameters()]
    go(other, resumed, range(1, 3))
    assert all(
        torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True)
    )  # the loaded group is the one that counts


def test_an_automatic_budget_is_that_of_the_run_not_of_the_free_memory_at_the_time_of_loading() -> None:
    first = MANGO([torch.nn.Parameter(torch.ones(64, 64))], memory_budget=None)
    saved = first.state_dict()
    saved["mango"]["budget"] = 123_456_789
    second = MANGO([torch.nn.Parameter(torch.ones(64, 64))], memory_budget=None)
    second.load_state_dict(saved)
    assert second.memory_budget == 123_456_789
    asked = MANGO([torch.nn.Parameter(torch.ones(64, 64))], memory_budget="64KiB")
    asked.load_state_dict(saved)
    assert asked.memory_budget == 64 * 1024
