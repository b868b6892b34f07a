"""The budget may be set while training: a smaller one holds at once, a larger one is used, an impossible one changes nothing."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mango import MANGO, CompressionConfig
from mango.accounting import PeakMemory
from mango.config import FULL, LADDER
from mango.state import predicted_bytes
from tests.test_state import Meter, backward, network, train


def made(share: float | int | str | None, **more: Any) -> tuple[nn.Sequential, MANGO]:
    model = network(width=96)
    arguments: dict[str, Any] = {"memory_budget": share, "policy_update_freq": 3, "lr": 1e-2} | more
    return model, MANGO(model.named_parameters(), **arguments)


def picture(optimizer: MANGO) -> Any:
    """All that a refused budget must leave as it was."""
    saved = copy.deepcopy(optimizer.state_dict())
    return saved, optimizer.memory_budget, list(optimizer.applied), optimizer.budget_asked, optimizer.usage


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize("policy", ["water-filling", "random", "hold"])
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("midway", [False, True], ids=["between steps", "mid accumulation"])
def test_a16_shrinking_holds_at_once_and_never_takes_more_on_the_way(
    policy: str, release: bool, midway: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made(1.5, policy=policy, release_gradients=release)
    meter = Meter(optimizer, monkeypatch)
    train(model, optimizer, 4)
    for share in (0.9, 0.5, 0.31 + 0.1 * release):
        if midway:
            backward(model, 7)
        before = optimizer.memory_budget
        meter.peak = 0
        optimizer.memory_budget = share
        assert optimizer.memory_budget == int(share * optimizer.adamw_bytes) < before
        assert meter.peak <= before and optimizer.state_bytes() <= optimizer.planned_bytes() <= optimizer.memory_budget
        for target, state in zip(optimizer.targets, optimizer.kept(), strict=True):
            config = FULL if target.layer is None else optimizer.applied[target.layer]
            assert state is not None and state.config == config
            assert state.nbytes <= predicted_bytes(state.shape, config, optimizer.options)
        meter.peak = 0
        train(model, optimizer, 5)
        assert meter.peak <= optimizer.memory_budget
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_shrunk_budget_takes_from_where_it_costs_least_and_leaves_what_fits() -> None:
    model, optimizer = made(1.5, policy="hold")
    train(model, optimizer, 4)
    before = picture(optimizer)
    optimizer.memory_budget = optimizer.planned_bytes()                     # smaller, and all fits
    assert equal(before[0], picture(optimizer)[0] | {"mango": before[0]["mango"]}) and optimizer.applied == [FULL] * 2
    optimizer.memory_budget = optimizer.planned_bytes() - 1
    assert FULL in optimizer.applied and optimizer.applied != [FULL] * 2    # one layer pays, the other stays


def test_a_larger_budget_is_there_for_the_next_decision() -> None:
    model, optimizer = made(0.15)
    train(model, optimizer, 4)
    small = optimizer.planned_bytes()
    before = picture(optimizer)
    optimizer.memory_budget = 1.5
    assert equal(before[0]["state"], picture(optimizer)[0]["state"]) and optimizer.planned_bytes() == small
    train(model, optimizer, 3)                                              # the third of them decides
    assert 1.5 * small < optimizer.state_bytes() <= optimizer.memory_budget


@pytest.mark.parametrize("release", [False, True])
def test_c5_an_infeasible_budget_names_the_least_feasible_bytes_and_changes_nothing(release: bool) -> None:
    model, optimizer = made(1.2, release_gradients=release)
    train(model, optimizer, 4)
    backward(model, 9)
    before = picture(optimizer)
    with pytest.raises(ValueError, match="the least feasible is") as error:
        optimizer.memory_budget = 100
    assert equal(before, picture(optimizer))
    found = re.search(r"least feasible is ([\d,]+) bytes", str(error.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    with pytest.raises(ValueError, match=f"{least:,}"):
        optimizer.memory_budget = least - 1
    assert equal(before, picture(optimizer))
    optimizer.memory_budget = least
    train(model, optimizer, 4)
    assert optimizer.state_bytes() <= optimizer.memory_budget == least


@pytest.mark.parametrize("wrong", ["3 apples", -1, 0, float("nan"), True, [1]])
def test_what_is_no_budget_is_refused_and_changes_nothing(wrong: Any) -> None:
    model, optimizer = made(0.7)
    train(model, optimizer, 2)
    before = picture(optimizer)
    with pytest.raises(ValueError, match="memory_budget="):
        optimizer.memory_budget = wrong
    assert equal(before, picture(optimizer))


def test_a_fixed_policy_refuses_a_budget_that_its_config_exceeds() -> None:
    model, optimizer = made(1.0, policy=CompressionConfig(momentum_bits=8, variance_bits=8))
    train(model, optimizer, 2)
    needed = optimizer.planned_bytes()
    before = picture(optimizer)
    with pytest.raises(ValueError, match=rf"'m8v8' needs {needed:,} bytes"):
        optimizer.memory_budget = needed - 1
    assert equal(before, picture(optimizer))
    optimizer.memory_budget = needed
    train(model, optimizer, 4)
    assert {config.name for config in optimizer.applied} == {"m8v8"}


def test_a17_none_is_a_share_of_free_memory_again_and_sizes_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = made(0.7)
    monkeypatch.setattr("mango.budget.free_memory", lambda device: 4_000_000)
    optimizer.memory_budget = None
    assert optimizer.memory_budget == 2_000_000
    optimizer.memory_budget = "1MiB"
    assert optimizer.memory_budget == 2**20 == optimizer.memory_report()["budget"]


def test_a_fraction_set_later_is_one_of_the_grown_model_too() -> None:
    model, optimizer = made(1.5)
    optimizer.memory_budget = 0.5
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(96, 96))], "param_names": ["more"]})
    assert optimizer.memory_budget == int(0.5 * 8 * (sum(p.numel() for p in model.parameters()) + 96 * 96))


def test_a_budget_set_in_mid_run_survives_a_checkpoint_within_the_new_one() -> None:
    model, optimizer = made(1.5)
    train(model, optimizer, 4)
    optimizer.memory_budget = 0.4
    twin, other = made(0.4)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.applied == optimizer.applied
    for network_, its in ((model, optimizer), (twin, other)):
        train(network_, its, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


SHARES = st.floats(0.05, 1.6)


@given(shares=st.lists(st.tuples(SHARES, st.integers(0, 2)), min_size=1, max_size=6), release=st.booleans(),
       rungs=st.lists(st.integers(0, len(LADDER) - 1), min_size=2, max_size=2))  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_a16_any_sequence_of_budgets_holds_at_every_instant(
    shares: list[tuple[float, int]], release: bool, rungs: list[int]
) -> None:
    model, optimizer = made(1.6, policy="hold", release_gradients=release)
    with pytest.MonkeyPatch.context() as patch:
        meter = Meter(optimizer, patch)
        optimizer.apply([optimizer.ladder[rung] for rung in rungs])
        train(model, optimizer, 1)
        for share, steps in shares:
            backward(model, 3)
            before = optimizer.memory_budget
            meter.peak = 0
            try:
                optimizer.memory_budget = share
            except ValueError:
                assert optimizer.memory_budget == before
            assert meter.peak <= max(before, optimizer.memory_budget)
            meter.peak = 0
            train(model, optimizer, steps)
            assert max(meter.peak, optimizer.state_bytes()) <= optimizer.memory_budget
    assert all(p.isfinite().all() for p in model.parameters())


class Card:
    """torch.cuda as far as peaks go, with a card of 1,000 bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.peak = self.now = 100
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: setattr(self, "peak", self.now))
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=1000))

    def use(self, nbytes: int) -> None:
        self.peak = max(self.peak, nbytes)


def test_d6_the_feature_is_the_peak_since_the_last_decision_and_spikes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made card: without a GPU this shows when torch is asked and what is kept, not what torch counts."""
    card = Card(monkeypatch)
    model, optimizer = made(0.9)
    optimizer.peak = PeakMemory(torch.device("cuda"))
    seen = []
    optimizer.register_decision_hook(lambda decision: seen.append(decision.observation))
    for step in range(12):
        card.use({4: 700, 7: 300}.get(step, 200))
        backward(model, step)
        optimizer.step()
        optimizer.observe()                                                 # looking does not start an interval
        optimizer.zero_grad()
    from mango.features import FEATURES

    column = [feature.name for feature in FEATURES].index("peak_memory")
    assert [round(float(observation[0, column]), 3) for observation in seen] == [0.2, 0.7, 0.3, 0.2]
    assert optimizer.get_memory_usage()["peak_memory_gb"] == pytest.approx(700e-9)
    card.use(900)
    assert optimizer.get_memory_usage()["peak_memory_gb"] == pytest.approx(900e-9)
