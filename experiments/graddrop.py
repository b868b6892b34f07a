"""GradDrop: where gradients of several losses disagree in sign, one sign is drawn and the other one dropped.

Chen et al. 2020, "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout" (arXiv 2010.06808). There is
no kept package of it. Nothing to run by itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


def keep_probability(gradients: Tensor) -> Tensor:
    """Gradient positive sign purity P = (1 + sum g / sum |g|) / 2 (equation 1) of T losses' gradients: (T, ...) to (...).

    The probability that positive entries are kept, and negative ones dropped. Where all are zero it is a half.

    >>> keep_probability(torch.tensor([[1.0, 1.0, 1.0], [2.0, -1.0, -3.0]]))
    tensor([1.0000, 0.5000, 0.2500])
    """
    return _purity(gradients.clamp(min=0).sum(0), gradients.clamp(max=0).sum(0))


def _purity(positive: Tensor, negative: Tensor) -> Tensor:
    size = positive - negative
    return 0.5 * (1 + (positive + negative) / torch.where(size > 0, size, 1.0))


def pick_sign(positive: Tensor, negative: Tensor, draws: Tensor, leak: float = 0.0) -> Tensor:
    """The gradient of algorithm 1 from sums of positive and of negative entries, all (...); `draws` are uniform in [0, 1).

    sum_i (leak + (1 - leak) M_i) g_i with M_i = [P > U][g_i > 0] + [P < U][g_i < 0]. One draw serves all losses, so the sums
    say enough, and no loss's gradient need be kept.
    """
    kept = torch.where(_purity(positive, negative) > draws, positive, negative)
    return kept + leak * (positive + negative - kept)


class GradDrop(Optimizer):
    """Another optimizer behind GradDrop: its gradients come from `losses` backward passes, one sign of each entry is kept.

    Losses are tasks, or micro-batches of one task. `step()` takes the gradient of one loss and moves the parameters at
    every `losses`-th call, so an ordinary loop works; a loop over tasks calls `collect()` after each backward pass but the
    last. Gradients go into two sums, of positive and of negative entries: 8 bytes per parameter until they are applied.

    >>> weight = Parameter(torch.zeros(2))
    >>> optimizer = GradDrop(torch.optim.SGD([weight], lr=1.0))
    >>> for gradient in ([1.0, 3.0], [1.0, 2.0]):       # two tasks that agree
    ...     weight.grad = torch.tensor(gradient)
    ...     optimizer.collect()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([-2., -5.])
    """

    def __init__(self, inner: Optimizer, *, losses: int = 1, leak: float = 0.0, mean: bool = False, seed: int = 0) -> None:
        if losses < 1 or not 0 <= leak <= 1:
            raise ValueError(f"losses={losses} must be at least 1 and leak={leak} in [0, 1]")
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner, self.losses, self.leak, self.mean = inner, losses, leak, mean
        self.param_groups, self.state = inner.param_groups, inner.state
        self.sums: dict[Parameter, tuple[Tensor, Tensor]] = {}
        self.collected = 0
        self.generator = Generator().manual_seed(seed)

    @torch.no_grad()
    def collect(self) -> None:
        """Take the gradient of one loss from the parameters."""
        for param in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            positive, negative = param.grad.clamp(min=0), param.grad.clamp(max=0)
            if param in self.sums:
                self.sums[param][0].add_(positive)
                self.sums[param][1].add_(negative)
            else:
                self.sums[param] = (positive, negative)
            param.grad = None
        self.collected += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self.collect()
        if self.collected < self.losses:
            return loss
        for param, (positive, negative) in self.sums.items():
            draws = torch.rand(param.shape, generator=self.generator).to(param.device)
            picked = pick_sign(positive, negative, draws, self.leak)
            param.grad = picked / self.collected if self.mean else picked
        self.sums, self.collected = {}, 0
        self.inner.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's: save between steps, since gradients that were collected are not in it."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
