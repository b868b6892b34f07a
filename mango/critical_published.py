"""What the public packages of Critical Gradients and Critical Momenta really do, for comparisons with their results.

`compatible="cg"` is cgoptimizer.optim, `"cg_eff"` cgoptimizer.optim_eff (both chandar-lab/CGOptimizer 997abaf), `"cm"`
cmoptimizer.optim (chandar-lab/CMOptimizer bdc7731). They differ from `mango.critical` and from one another in what is kept,
in how it is summed and in what an argument does; docs/critical.md lists it. One tensor after another, on the host.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mango.critical_buffer import FREE, CriticalBuffer

VARIANTS = ("cg", "cg_eff", "cm")


@dataclass(slots=True)
class Draws:
    """NumPy's legacy generator from a seed, as the packages draw from it; `count` numbers have been drawn."""

    seed: int
    count: int = 0
    source: np.random.RandomState | None = None

    def next(self) -> float:
        if self.source is None:                              # after loading: go to where it stood
            self.source = np.random.RandomState(self.seed)
            self.source.uniform(size=self.count)
        self.count += 1
        return float(self.source.uniform())


@dataclass(order=True, slots=True)
class _Entry:
    """An item of the heap, which compares priorities alone."""

    key: float
    slot: int = field(compare=False)


def recall(
    name: str, group: Mapping[str, Any], buffers: Sequence[CriticalBuffer], grads: Sequence[Tensor], items: Sequence[Tensor],
    draws: Draws,
) -> list[Tensor]:  # fmt: skip
    """What each tensor moves by, before its base rule: the `name`d class of the group's variant. Buffers take `items`."""
    variant = group["compatible"]
    sizes = [g.square().sum().sqrt() for g in grads]
    total = torch.stack(sizes).sum() if group["synced"] else None
    moves = []
    for buffer, item, size in zip(buffers, items, sizes, strict=True):
        moves.append(blend(name, group, buffer, item))
        priority = size if total is None else total
        chance = group["critical_test"] if variant == "cm" and name != "RMSprop_C" else 0.0
        slot = _admit_to_heap(buffer, priority) if variant == "cg" else _admit(buffer, priority, chance, draws)
        keys_of = buffer.rows["values"].dtype if variant == "cg_eff" else buffer.keys.dtype
        keys = buffer.keys.to(keys_of)                       # cg_eff's are of the items' dtype
        if slot is not None:
            _store(buffer, item, slot, keeps_sum=variant != "cg")
            keys[slot] = priority
        if not (variant == "cm" and name == "SGD_C" and group["decay"] == 0):
            keys = torch.where(keys > FREE, keys * group["decay"], keys)
        buffer.keys = keys.to(buffer.keys.dtype)
    return moves


def held(buffer: CriticalBuffer) -> int:
    """How many items there are."""
    return sum(key > FREE for key in buffer.keys.tolist())


def blend(name: str, group: Mapping[str, Any], buffer: CriticalBuffer, x: Tensor) -> Tensor:
    """The gradient with the buffer's items: `aggr` is cg's alone, `kappa` that of cg's SGD_C; cm's RMSprop_C drops x."""
    n = held(buffer)
    if n == 0:
        return x.clone()
    if buffer.running is not None:
        mean = buffer.running.div(n).view(x.shape)
        return mean.to(x.dtype, copy=True) if (group["compatible"], name) == ("cm", "RMSprop_C") else x + mean
    total = buffer.rows["values"].sum(0).view(x.shape)
    kappa = group["kappa"] if name == "SGD_C" else 1.0
    if group["aggr"] == "mean":
        return (x + kappa * total) / (n + 1)
    return (x + kappa * total / n) / (2 if group["aggr"] == "mid" else 1)


def _admit(buffer: CriticalBuffer, priority: Tensor, chance: float, draws: Draws) -> int | None:
    """The slot for a new item. What is to be FIFO overwrites the last slot that was found to be the least; `ages` marks it."""
    n = held(buffer)
    if n < buffer.keys.numel():
        return n
    if draws.next() < chance:
        slot: int | None = int(buffer.ages.argmax())
    else:
        least = int(buffer.keys.argmin())
        buffer.ages.zero_()[least] = 1
        slot = least if priority > buffer.keys[least] else None
    buffer.decisions[int(slot is None)] += 1
    return slot


def _admit_to_heap(buffer: CriticalBuffer, priority: Tensor) -> int | None:
    """The slot for a new item by a heap that is not repaired when its least item goes; `ages` is each slot's place in it."""
    keys, places, size = buffer.keys.tolist(), buffer.ages.tolist(), buffer.keys.numel()
    heap = sorted((slot for slot in range(size) if places[slot]), key=places.__getitem__)
    full = len(heap) == size
    if full:
        take = bool(priority > buffer.keys[heap[0]])         # not always the least: the heap was not repaired
        buffer.decisions[int(not take)] += 1
        if not take:
            return None
    entries = [_Entry(keys[slot], slot) for slot in heap] + [_Entry(float(priority), -1)]
    heapq.heapify(entries)
    free = entries.pop(0).slot if full else len(heap)
    for place, entry in enumerate(entries, 1):
        buffer.ages[free if entry.slot < 0 else entry.slot] = place
    return free


def _store(buffer: CriticalBuffer, item: Tensor, slot: int, keeps_sum: bool) -> None:
    """Write an item; the running sum loses the old one and gains the new one, rounded to its dtype each time."""
    values = buffer.rows["values"]
    if keeps_sum:
        if buffer.running is None:
            buffer.running = torch.zeros_like(values[0])
        buffer.running -= values[slot]
    values[slot] = item.reshape(-1)
    if buffer.running is not None:
        buffer.running += values[slot]


def momenta(
    group: Mapping[str, Any], buffers: Sequence[CriticalBuffer], exp_avgs: Sequence[Tensor], grads: Sequence[Tensor], draws: Draws
) -> list[Tensor]:
    """What Adam_CM moves by. A tensor's first step stores the gradient, leaves the momentum zero and moves nothing."""
    first = [held(buffer) == 0 for buffer in buffers]
    for exp_avg, grad, new in zip(exp_avgs, grads, first, strict=True):
        if not new:
            exp_avg.lerp_(grad, 1 - group["betas"][0])
    items = [grad if new else exp_avg for exp_avg, grad, new in zip(exp_avgs, grads, first, strict=True)]
    moves = recall("Adam_CM", group, buffers, grads, items, draws)
    return [torch.zeros_like(move) if new else move for move, new in zip(moves, first, strict=True)]
