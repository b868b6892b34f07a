"""Bytes that an optimizer keeps between steps: every tensor it holds, on the device or on the host. Nothing to run by itself."""

from collections.abc import Iterable, Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Place = tuple[str, int]                                                        # device, address
NO_STATE = (nn.Module, ModuleType, type, FunctionType, BuiltinFunctionType, MethodType, torch.Generator)


def state_nbytes(optimizer: Optimizer) -> int:
    """Bytes of all storages that an optimizer keeps, each counted once and whole.

    Found are tensors (and NumPy arrays) in its state, its groups and its attributes, however deep: inside containers, inside
    objects such as GaLore's projector, inside other optimizers, inside quantised tensors (torchao's). A view counts with all
    of what it keeps alive, since that is what is taken; a codebook that many tensors share counts once. Parameters, their
    gradients and networks that decide (a policy's size does not depend on the run) are no state.

    >>> parameter = nn.Parameter(torch.zeros(10))
    >>> parameter.grad = torch.ones(10)
    >>> optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    >>> optimizer.step()
    >>> state_nbytes(optimizer)                         # its momentum buffer
    40
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    theirs = [tensor for p in parameters for tensor in (p.data, p.grad) if tensor is not None]
    foreign = {place for tensor in theirs for place in _storages(tensor)}
    found: dict[Place, int] = {}
    for tensor in _tensors(optimizer):
        found |= _storages(tensor)
    return sum(nbytes for place, nbytes in found.items() if place not in foreign)


def _storages(x: Tensor | np.ndarray[Any, Any]) -> dict[Place, int]:
    """Where a tensor's bytes are, and how many; a tensor that is made of others has theirs."""
    if isinstance(x, np.ndarray):
        owner: Any = x
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return {("cpu", owner.__array_interface__["data"][0]): owner.nbytes}
    inner = getattr(x, "__tensor_flatten__", None)
    if inner is not None:
        places: dict[Place, int] = {}
        for name in inner()[0]:
            places |= _storages(getattr(x, name))
        return places
    storage = x.untyped_storage()
    return {(str(x.device), storage.data_ptr()): storage.nbytes()} if storage.nbytes() else {}


def _tensors(root: Any) -> Iterable[Tensor | np.ndarray[Any, Any]]:
    """Every tensor that can be reached from an object, without what `NO_STATE` names."""
    pending, seen = [root], {id(root): root}                                   # seen things stay alive, and so do ids
    while pending:
        found = pending.pop()
        if isinstance(found, Tensor | np.ndarray):
            yield found
            continue
        for child in _children(found):
            if id(child) not in seen and not isinstance(child, NO_STATE):
                seen[id(child)] = child
                pending.append(child)


def _children(x: Any) -> Iterable[Any]:
    if isinstance(x, str | bytes):
        return []
    own: list[Any] = list(getattr(x, "__dict__", {}).values())
    own += [getattr(x, name) for kind in type(x).__mro__ for name in _slots(kind) if hasattr(x, name)]
    if isinstance(x, Mapping):
        return [*own, *x.values()]                                             # the keys are parameters
    if isinstance(x, list | tuple | Set):
        return [*own, *x]
    return own


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
