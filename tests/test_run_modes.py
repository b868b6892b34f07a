"""Promises of the modes of a run: mixed precision keeps the loss, checkpointing keeps it bit for bit with fewer bytes."""

import pytest
import torch
from torch import Generator, Tensor, nn

from experiments.run_modes import autocast_of, blocks_of, checkpointed, saved_activations, scaler_of, train_step
from mango_env.workloads import make_workload
from mango_env.workloads.initialise import build
from mango_env.workloads.text import VOCABULARY, Transformer


def transformer() -> Transformer:
    return build(lambda: Transformer(32, 4, 2, 16), Generator().manual_seed(0))


def batch() -> Tensor:
    return torch.randint(VOCABULARY, (8, 17), generator=Generator().manual_seed(1))


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def trained(mode: str, steps: int = 40) -> float:
    task = make_workload("source_lm", 0)
    optimizer, scaler = torch.optim.AdamW(task.model.parameters(), lr=3e-3), scaler_of(mode)
    for _ in range(steps):
        train_step(optimizer, task.loss, scaler, mode)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in task.model.parameters())
    return task.evaluate()["val_loss"]


@pytest.fixture(scope="module")
def full_precision() -> float:
    return trained("fp32")


@pytest.mark.parametrize(("mode", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_d14_a_run_under_autocast_is_within_1_percent_of_fp32_and_its_gradients_are_fp32(
    mode: str, dtype: torch.dtype, full_precision: float
) -> None:
    with autocast_of(mode):
        assert nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
    loss = trained(mode)
    assert loss == pytest.approx(full_precision, rel=0.01) and loss != full_precision


def test_gradients_in_float16_are_scaled_and_an_overflow_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), scaler_of("fp16")
    assert scaler_of("fp32").get_scale() == scaler_of("bf16").get_scale() == 1.0
    train_step(optimizer, lambda: (weight * 1e-3).sum(), scaler, "fp16")
    torch.testing.assert_close(weight.detach(), torch.full((4,), 1 - 1e-3))
    before, scale = weight.detach().clone(), scaler.get_scale()
    train_step(optimizer, lambda: (weight * float("inf")).sum(), scaler, "fp16")
    assert torch.equal(weight, before) and scaler.get_scale() < scale


def test_an_unknown_mode_is_told_the_known_ones() -> None:
    for call in (autocast_of, scaler_of):
        with pytest.raises(ValueError, match="unknown precision 'fp8'; known: fp32, fp16, bf16"):
            call("fp8")


def test_e6_checkpointing_keeps_fewer_activations_and_the_same_loss_and_gradients() -> None:
    model, text = transformer(), batch()
    with saved_activations(model) as plainly:
        loss = loss_of(model, text)
    loss.backward()                                                 # type: ignore[no-untyped-call]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with checkpointed(model):
        with saved_activations(model) as sparingly:
            again = loss_of(model, text)
        again.backward()                                            # type: ignore[no-untyped-call]
    assert torch.equal(loss, again)
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True) if p.grad is not None)
    assert 0 < sparingly.nbytes < 0.3 * plainly.nbytes
    assert all("forward" not in vars(block) for block in model.blocks)


def test_e6_dropout_is_drawn_alike_when_it_is_computed_again() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.ReLU()) for _ in range(3)))
    x, found = torch.ones(4, 16), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        if checkpointing:
            with checkpointed(model):
                model(x).sum().backward()
        else:
            model(x).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    model = transformer()
    assert blocks_of(model) == list(model.blocks)
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert blocks_of(layers) == [layers[0], layers[2]]
    with checkpointed(model), pytest.raises(ValueError, match="replaced already"), checkpointed(model):
        pass
