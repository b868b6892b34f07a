"""GaLore: AdamW in the leading subspace of each matrix's gradient, of one rank for the whole run. Nothing to run by itself.

Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507), algorithm 2. The
package galore-torch is a peer of its own; it keeps all singular vectors alive, 43 % more state than the method needs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from mango.lowrank import adamw_in_subspace, matricise
from mango.rules import adamw_update


def galore_nbytes(rows: int, columns: int, rank: int) -> int:
    """Bytes of state of one float32 matrix: projector (m, r) and two moments (r, n), m <= n: 4 r (m + 2 n).

    >>> galore_nbytes(256, 128, 8)
    20480
    """
    m, n = sorted((rows, columns))
    return 4 * min(rank, m) * (m + 2 * n)


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (m, r) of (m, n), m <= n, in storage of their own."""
    vectors: Tensor = torch.linalg.svd(matrix, full_matrices=False).U
    return vectors[:, :rank].clone(memory_format=torch.contiguous_format)


class GaLore(Optimizer):
    """AdamW of rank `rank` for the matrices named hidden, dense for the rest. Their updates are scaled by `scale` (alpha).

    Every `every` steps (T) the subspace is that of the gradient at hand; moments stay as they are, in new coordinates.

    >>> model = torch.nn.Linear(16, 8)
    >>> optimizer = GaLore(model.named_parameters(), lr=0.01, hidden={"weight"}, rank=2)
    >>> model(torch.ones(1, 16)).sum().backward(); optimizer.step()
    >>> {name: tuple(x.shape) for name, x in optimizer.state[model.weight].items() if name != "step"}
    {'projector': (8, 2), 'exp_avg': (2, 16), 'exp_avg_sq': (2, 16)}
    """

    def __init__(
        self, params: Iterable[tuple[str, Parameter]], *, lr: float, hidden: set[str], rank: int = 8, every: int = 200,
        scale: float = 0.25, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        if rank < 1 or every < 1:
            raise ValueError(f"rank={rank} and every={every} must be at least 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.hidden, self.rank, self.every, self.scale = hidden, rank, every, scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyper = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if param.grad is not None:
                    self._move(param, name in self.hidden, hyper)
        return loss

    def _move(self, param: Parameter, low_rank: bool, hyper: dict[str, Any]) -> None:
        state, grad = self.state[param], param.grad
        assert grad is not None
        matrix = matricise(grad) if low_rank else grad                               # (m, n), m <= n
        step = state["step"] = state.get("step", 0) + 1
        if low_rank and (step - 1) % self.every == 0:
            state["projector"] = leading_directions(matrix, self.rank)
        if "exp_avg" not in state:
            shape = (state["projector"].shape[1], matrix.shape[1]) if low_rank else param.shape
            state["exp_avg"], state["exp_avg_sq"] = matrix.new_zeros(shape), matrix.new_zeros(shape)
        if low_rank:
            adamw_in_subspace(param, grad, state["projector"], state["exp_avg"], state["exp_avg_sq"],
                              **hyper, step=step, scale=self.scale)  # fmt: skip
        else:
            adamw_update(param, grad, state["exp_avg"], state["exp_avg_sq"], **hyper, step=step)
