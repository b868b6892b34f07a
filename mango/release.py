"""Gradients released during backward: each is encoded as it appears and `p.grad` is dropped, until the next step."""

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mango.state import Target, TensorState, dense_gradient

TRIM_AFTER = 1 << 24                         # bytes of float32 gradients held or taken on a CPU until freed memory is given back


@cache
def _malloc_trim() -> Any:
    """The C library's; None where it has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return the pages of freed blocks to the system, where the C library is glibc.

    Its heap grows otherwise: what is held lies in the gaps that dense gradients left, and the next dense one, no smaller
    than the last, finds no gap and goes on top. Measured: up to 7 bytes per parameter of gaps after two steps.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


class HeldGradients:
    """The encoded gradients of an optimizer: accumulated over backward passes, scaled as one, taken at the step.

    All are held in the scale of their backward passes. What clipping and torch's GradScaler multiply gradients by is one
    number here, a float32 value, applied when a gradient is taken.
    """

    def __init__(self, state_of: Callable[[Target], TensorState], key_of: Callable[[Target], int]) -> None:
        self._state_of, self._key_of = state_of, key_of
        self._targets: list[Target] = []
        self._hooks: dict[Target, RemovableHandle] = {}
        self._passes: dict[Target, int] = {}                              # gradients that came since the last step
        self._broken: dict[Target, float] = {}                            # norms that are not finite
        self._factor = 1.0                                                # that clipping and unscaling ask for
        self._asked: Tensor | None = None                                 # the factor while a GradScaler works on it
        self._dropped = 0                                                 # bytes since memory was given back

    def watch(self, targets: Sequence[Target]) -> None:
        """Encode the gradients of these parameters from now on, and of no others; what is held of them stays."""
        self.close()
        self._targets = list(targets)
        now = {target.param: target for target in targets}
        self._passes = {now[t.param]: passes for t, passes in self._passes.items() if t.param in now}
        self._broken = {now[t.param]: norm for t, norm in self._broken.items() if t.param in now}
        self._hook_thawed()

    def _hook_thawed(self) -> None:
        """Hook the parameters that need gradients and had no hook: all at first, later those that were unfrozen."""

        def hold(target: Target) -> Callable[[Tensor], None]:
            return lambda param: self.hold(target)

        for target in self._targets:
            if target.param.requires_grad and target not in self._hooks:
                self._hooks[target] = target.param.register_post_accumulate_grad_hook(hold(target))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}

    def in_turn(self) -> Iterator[list[Target]]:
        """All targets in batches whose dense gradients together are no larger than the largest one."""
        limit = max((target.param.numel() for target in self._targets), default=0)
        batch: list[Target] = []
        size = 0
        for target in self._targets:
            if size + target.param.numel() > limit:
                yield batch
                batch, size = [], 0
            batch.append(target)
            size += target.param.numel()
        yield batch

    @torch.no_grad()
    def hold(self, target: Target) -> None:
        """Encode the parameter's gradient, add it to what is held, and drop it.

        A gradient that is not finite, or one that an exception kept from being stored, breaks the tensor's step.
        """
        if target.param.grad is None:
            return
        gradient = dense_gradient(target.name, target.param.grad)
        if self.factor() != 1.0:
            self._apply_factor()
        self._passes[target] = passes = self._passes.get(target, 0) + 1
        if target not in self._broken:
            self._broken[target] = math.nan
            if self._state_of(target).hold_gradient(gradient, self._key(target, passes)):
                del self._broken[target]
            else:
                self._broken[target] = math.inf if not gradient.isnan().any() else math.nan
        target.param.grad = None
        self._count(target)

    def _count(self, target: Target) -> None:
        """Another dense gradient came and goes: give memory back after so many bytes of them."""
        if target.param.device.type == "cpu":
            self._dropped += 4 * target.param.numel()
            if self._dropped >= TRIM_AFTER:
                self._dropped = 0
                give_back()

    def _key(self, target: Target, passes: int) -> int:
        return self._key_of(target) + 0x10000 * passes

    def _collect(self) -> None:
        """Hold what was set by hand, or came for a parameter that was unfrozen since the last step."""
        for target in self._targets:
            self.hold(target)

    def take(self, target: Target) -> tuple[Tensor | None, bool]:
        """The held gradient, dense and scaled, and whether it was finite."""
        self.hold(target)
        if target not in self._passes:
            return None, True
        self._count(target)
        state, broken, dense = self._state_of(target), target in self._broken, None
        if broken:
            state.drop_gradient()
        else:
            dense = state.encoded.pop("held").decode()
            if self.factor() != 1.0:
                dense.mul_(self.factor())                                 # popped, so nobody else's
        self._forget(target)
        return dense, not broken

    def _forget(self, target: Target) -> None:
        del self._passes[target]
        self._broken.pop(target, None)
        if not self._passes:
            self._factor, self._asked = 1.0, None
            self._hook_thawed()

    def clip(self, max_norm: float) -> Tensor:
        """Have the gradients' global l2 norm be at most `max_norm` at the step; returns the norm before: float32 ().

        As torch.nn.utils.clip_grad_norm_ has it, with one dense gradient at a time.
        """
        self._collect()
        norms = [self._norm(target) for target in self._targets if target in self._passes]
        if not norms:
            return torch.zeros(())
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        self._factor = float(self.factor() * (max_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def _norm(self, target: Target) -> Tensor:
        if target in self._broken:
            return torch.tensor(self._broken[target])
        norm: Tensor = torch.linalg.vector_norm(self._state_of(target).encoded["held"].decode()) * self.factor()
        return norm

    def factor(self) -> float:
        """What gradients are multiplied by when they are taken."""
        if self._asked is not None:
            self._factor, self._asked = float(self._asked), None
        return self._factor

    def _apply_factor(self) -> None:
        """Scale what is held where it lies: more gradients come, in a scale of their own."""
        factor, self._factor = self.factor(), 1.0
        for target, passes in self._passes.items():
            if target not in self._broken:
                self._passes[target] = passes + 1
                self._state_of(target).scale_gradient(factor, self._key(target, passes + 1))

    def drop(self) -> None:
        """Forget what is held."""
        for target in list(self._passes):
            self._state_of(target).drop_gradient()
            self._forget(target)
        self._hook_thawed()

    def as_gradients(self) -> list[dict[str, Any]]:
        """Parameter groups for torch.amp.GradScaler: one number's gradient in place of all that are held.

        The scaler multiplies the gradients it finds, in place, and looks whether they are finite. It finds the factor, or
        infinity where a held gradient is broken; what it makes of the factor holds for all.
        """
        self._collect()
        if not self._passes:
            return []
        stand_in = torch.zeros((), device=self._targets[0].param.device)
        stand_in.grad = torch.full_like(stand_in, math.inf if self._broken else self.factor())
        if not self._broken:
            self._asked = stand_in.grad
        return [{"params": [stand_in]}]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": {}, "_factor": self.factor(), "_asked": None}

    def state_dict(self) -> dict[str, Any]:
        """What is to be known of held gradients beside their codes, by the targets' numbers. JSON-able."""
        place = {target: i for i, target in enumerate(self._targets)}
        return {
            "passes": {str(place[t]): passes for t, passes in self._passes.items()},
            "broken": {str(place[t]): str(norm) for t, norm in self._broken.items()},
            "factor": self.factor(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state_dict` gave. None: from an optimizer that holds no gradients."""
        state = {"passes": {}, "broken": {}, "factor": 1.0} if state is None else state
        self._passes = {self._targets[int(i)]: passes for i, passes in state["passes"].items()}
        self._broken = {self._targets[int(i)]: float(norm) for i, norm in state["broken"].items()}
        self._factor, self._asked = state["factor"], None


class Releasing(Optimizer):
    """An optimizer that may hold its gradients, and shows them to torch.amp.GradScaler in its `param_groups`.

    A scaler visits every `p.grad` of an optimizer's groups. Held gradients are not there, and torch has no other way to tell
    it of them, so the groups are others when it is a scaler's method that asks.
    """

    held: HeldGradients | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's."""
        if self.held is not None and sys._getframe(1).f_code.co_name == "_unscale_grads_":
            return self.held.as_gradients()
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; drops held gradients too."""
        if set_to_none:                                      # torch's own takes longer than a small model's backward
            for group in self.__dict__["param_groups"]:
                for param in group["params"]:
                    param.grad = None
        else:
            super().zero_grad(False)
        if self.held is not None:
            self.held.drop()
