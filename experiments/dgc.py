"""Deep Gradient Compression: SGD with momentum that applies (and sends) a thousandth of its gradient entries per step.

Lin et al. 2018, "Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training" (arXiv 1712.01887):
local accumulation (section 3.1), momentum correction and local clipping (3.2), momentum factor masking and warm-up (3.3). There
is no kept package of it. Nothing to run by itself.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mango.feedback import Velocity, momentum_correction


def density_at(step: int, warmup: int, first: float = 0.1, last: float = 0.001) -> float:
    """The share of entries that is applied at a step: from `first` to `last` over `warmup` steps, each by the same factor.

    Warm-up (section 3.3): early gradients change fast and are large, so the sparsity rises exponentially, in the paper over
    the first four of its epochs.

    >>> [round(density_at(step, 4), 4) for step in range(6)]
    [0.1, 0.0316, 0.01, 0.0032, 0.001, 0.001]
    """
    if not 0 < last <= first <= 1:
        raise ValueError(f"densities {first} to {last} do not fall within (0, 1]")
    return float(first * (last / first) ** min(1.0, step / max(1, warmup)))


def largest(x: Tensor, density: float) -> Tensor:
    """The entries of greatest size, a share of them (one at least); zeros elsewhere. Of equals, as many as the share says."""
    flat = x.flatten()
    kept = flat.abs().topk(max(1, math.floor(density * flat.numel() + 0.5))).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(x)


class DGC(Optimizer):
    """SGD whose velocity is accumulated here and applied sparsely; each tensor gives its largest entries.

    Kept are a velocity and what was not applied yet, 8 bytes per parameter: what is saved is what travels. `exchange` stands
    for the wire: it gets the sparse tensor of a parameter and returns the mean over `workers`, which clip their gradients at
    `clip` / sqrt(workers) before they accumulate (section 3.2). Without it one worker applies its own.
    """

    def __init__(
        self, params: ParamsT, *, lr: float, momentum: float = 0.9, first_density: float = 0.1, density: float = 0.001,
        warmup: int = 100, clip: float | None = None, workers: int = 1, weight_decay: float = 0.0,
        exchange: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        if workers < 1 or warmup < 0 or (clip is not None and clip <= 0):
            raise ValueError(f"workers={workers}, warmup={warmup} and clip={clip} must be positive")
        density_at(0, warmup, first_density, density)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.densities, self.warmup, self.steps = (first_density, density), warmup, 0
        self.clip, self.workers, self.exchange = clip, workers, exchange

    @property
    def density(self) -> float:
        """The share of entries that the next step applies."""
        return density_at(self.steps, self.warmup, *self.densities)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        keep, shrink = partial(largest, density=self.density), self._shrink()
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                state = self.state[param] or {"momentum_buffer": torch.zeros_like(param), "pending": torch.zeros_like(param)}
                before = Velocity(state["momentum_buffer"], state["pending"])
                grad = param.grad * shrink + group["weight_decay"] * param
                applied, after = momentum_correction(grad, before, keep, group["momentum"])
                self.state[param] = {"momentum_buffer": after.momentum, "pending": after.pending}
                param.sub_(applied if self.exchange is None else self.exchange(applied), alpha=group["lr"])
        self.steps += 1
        return loss

    def _shrink(self) -> float:
        """The factor that clips the norm over all gradients."""
        if self.clip is None:
            return 1.0
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0
        limit = self.clip / math.sqrt(self.workers)
        return min(1.0, limit / norm) if norm > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = int(state_dict["steps"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "steps"})
