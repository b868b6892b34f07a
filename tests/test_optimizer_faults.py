"""Gradients that are not finite: the layer's step is skipped and counted, states stay finite, other layers move."""

import math
import warnings

import pytest
import torch
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.config import FULL
from tests.rungs import M2V0, M4V4, M8V8, R8

CONFIGS = [
    FULL,
    R8,
    M2V0,
    M4V4,
    M8V8,
    CompressionConfig(gradient_bits=4, sparsity=0.9, momentum_bits=8, variance_bits=8),
]


def states_are_finite(optimizer: MANGO) -> bool:
    return all(enc.decode().isfinite().all() for slot in optimizer.state.values() for enc in slot["tensor"].encoded.values())


def feed(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("first", [0, 3])
def test_a_layer_whose_gradient_is_not_finite_is_skipped(
    config: CompressionConfig, fault: float, release: bool, first: int
) -> None:
    params = [Parameter(torch.ones(40, 40)), Parameter(torch.ones(40, 40)), Parameter(torch.ones(7))]
    optimizer = MANGO(params, policy=config, policy_update_freq=2, release_gradients=release)
    for step in range(6):
        feed(params, step)
        if step == first:
            assert params[0].grad is not None and params[2].grad is not None
            params[0].grad[3, 5] = params[2].grad[1] = fault
            before = [p.detach().clone() for p in params]
            states = {k: v.decode().clone() for k, v in optimizer.state[params[0]]["tensor"].encoded.items()} if step else {}
        optimizer.step()
        if step == first:
            assert optimizer.skipped == 2
            assert (
                torch.equal(before[0], params[0]) and torch.equal(before[2], params[2]) and not torch.equal(before[1], params[1])
            )
            now = optimizer.state[params[0]]["tensor"].encoded
            assert all(torch.equal(now[slot].decode(), dense) for slot, dense in states.items())
        assert states_are_finite(optimizer) and optimizer.observe().isfinite().all()
    assert optimizer.skipped == 2 and all(p.isfinite().all() for p in params)


def test_a_skipped_step_does_not_count_for_bias_correction() -> None:
    """The parameter goes on as if the broken step had never been, like torch's AdamW that was not stepped."""
    mine, theirs = Parameter(torch.ones(40, 40)), Parameter(torch.ones(40, 40))
    one, other = MANGO([mine], policy=FULL), torch.optim.AdamW([theirs], weight_decay=0)
    for step in range(8):
        feed([mine], step)
        feed([theirs], step)
        if step in (0, 4):
            mine.grad = torch.full_like(mine, torch.nan)
        else:
            other.step()
        one.step()
    assert (mine - theirs).abs().max() < 1e-6 and one.skipped == 2


def test_one_broken_micro_batch_skips_the_accumulated_step_and_no_further_one() -> None:
    param = Parameter(torch.ones(40, 40))
    optimizer = MANGO([param], policy=FULL, release_gradients=True)
    for factor in (1.0, math.nan, 1.0):
        (param * factor).sum().backward()  # type: ignore[no-untyped-call]
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(before, param) and optimizer.skipped == 1
    (param * 1.0).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert not torch.equal(before, param) and optimizer.skipped == 1
    (param * math.nan).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()  # forgets the broken one too
    (param * 1.0).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert optimizer.skipped == 1


def test_a_norm_that_overflows_counts_as_not_finite() -> None:
    param = Parameter(torch.ones(40, 40))
    optimizer = MANGO([param])
    param.grad = torch.full((40, 40), 3e38)
    optimizer.step()
    assert optimizer.skipped == 1 and (param == 1).all()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0, 0.0])
def test_losses_of_any_kind_leave_decisions_legal(loss: float) -> None:
    param = Parameter(torch.ones(40, 40))
    optimizer = MANGO([param], policy_update_freq=2, memory_budget=0.8)
    for step in range(6):
        feed([param], step)
        optimizer.observe_loss(loss if step % 2 else torch.tensor(loss))
        optimizer.step()
        assert optimizer.observe().isfinite().all() and optimizer.state_bytes() <= optimizer.memory_budget


def test_a_policy_that_fails_does_not_leave_the_optimizer_broken() -> None:
    class Failing:
        def act(self, obs: torch.Tensor) -> CompressionConfig:
            raise RuntimeError("no answer")

        def reset(self) -> None: ...

    param = Parameter(torch.ones(40, 40))
    optimizer = MANGO([param], policy=Failing(), policy_update_freq=2)
    decisions: list[int] = []
    optimizer.register_decision_hook(lambda decision: decisions.append(decision.step))
    feed([param], 0)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"last decision stays: RuntimeError: no answer"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for _ in range(4):
            before = param.detach().clone()
            optimizer.step()
            assert not torch.equal(before, param)
    assert optimizer.applied == [FULL] and optimizer.steps == 6 and param.isfinite().all() and decisions == [2, 4, 6]
    strict = MANGO([param], policy=Failing(), policy_update_freq=2, strict=True)
    strict.step()
    with pytest.raises(RuntimeError, match="no answer"):
        strict.step()
    strict.step()  # between decisions all goes on
    assert strict.applied == [FULL] and strict.steps == 3 and param.isfinite().all()
