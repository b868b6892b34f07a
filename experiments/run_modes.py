"""Modes of a run, apart from its optimizer: mixed precision, and activations computed again during backward.

Micikevicius et al. 2018, "Mixed Precision Training" (section 3.2: loss scaling); Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost" (section 3). Nothing to run by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.checkpoint import checkpoint

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MODES = ("fp32", *DTYPES)


def check_mode(mode: str) -> None:
    """Raise ValueError for a mode that is none of `MODES`."""
    if mode not in MODES:
        raise ValueError(f"unknown precision {mode!r}; known: {', '.join(MODES)}")


def autocast_of(mode: str, device: str | torch.device = "cpu") -> AbstractContextManager[Any]:
    """The context of a forward pass: matrix products in fp16 or bf16, parameters and sums in fp32; "fp32" changes nothing."""
    check_mode(mode)
    return torch.autocast(torch.device(device).type, dtype=DTYPES[mode]) if mode in DTYPES else nullcontext()


def scaler_of(mode: str, device: str | torch.device = "cpu") -> GradScaler:
    """What scales the loss of a run in fp16, whose small gradients would be zero otherwise; in other modes it does nothing."""
    check_mode(mode)
    return GradScaler(torch.device(device).type, enabled=mode == "fp16")


def train_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], scaler: GradScaler, mode: str) -> float:
    """One step of a run in a mode; returns the loss. Gradients are those of fp32 parameters, unscaled, when they are applied."""
    parameter = optimizer.param_groups[0]["params"][0]
    optimizer.zero_grad()
    with autocast_of(mode, parameter.device):
        found = loss()
    scaler.scale(found.float()).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    return float(found.detach())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the members with parameters of its outermost lists and sequences; without any, its children."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found.extend(child for child in module if any(True for _ in child.parameters()))
        else:
            for child in module.children():
                look(child)

    look(model)
    return found or list(model.children())


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """Within it each block of a model keeps its input alone, and what is between is computed again during backward.

    A third more computing for activations of one block at a time. Losses and gradients are the same bit for bit, dropout
    included: random numbers are repeated.
    """
    blocks = blocks_of(model)
    for block in blocks:
        if "forward" in vars(block):
            raise ValueError(f"the forward of {type(block).__name__} is replaced already; leave that context first")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield model
    finally:
        for block in blocks:
            del block.forward                                                  # the class's own is back


@dataclass
class Saved:
    """What autograd keeps for backward."""

    nbytes: int = 0


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[Saved]:
    """Counts what forward passes within it keep for backward, each storage once; the model's parameters are not counted."""
    saved = Saved()
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.nbytes += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved
