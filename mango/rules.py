"""Base rules: the mathematics of an update as plain functions on dense float32 tensors, apart from how state is stored."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

UPDATE_LIMIT = 10.0                          # no entry moves by more than this many learning rates where state is compressed


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One AdamW step in place (Loshchilov & Hutter 2019, algorithm 2), operation by operation as torch.optim.AdamW does it."""
    beta1, beta2 = betas
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    _moments(grad, exp_avg, exp_avg_sq, betas)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def adamw_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """Advance the moments in place and return the bounded Adam direction, of the shape of `exp_avg`.

    For moments that were stored compressed: an entry whose second moment is zero does not move, and none moves by more
    than `UPDATE_LIMIT` learning rates.
    """
    beta1, beta2 = betas
    _moments(grad, exp_avg, exp_avg_sq, betas)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    direction = (exp_avg / denominator).mul_(1 / (1 - beta1**step)).clamp_(-UPDATE_LIMIT, UPDATE_LIMIT)
    return direction.masked_fill_(exp_avg_sq == 0, 0.0)


def _moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]) -> None:
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (m, r) of the span of the columns (m, r)."""
    q: Tensor = torch.linalg.qr(columns).Q
    return q


def range_basis(matrix: Tensor, start: Tensor) -> Tensor:
    """An orthonormal basis (m, r) of the leading left singular directions of (m, n), from random columns (n, r).

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) with two power iterations: within a few
    per cent of the best rank-r error on decaying spectra.
    """
    basis = orthonormal(matrix @ start)
    for _ in range(2):
        basis = orthonormal(matrix @ (matrix.T @ basis))
    return basis


def check_positive(**numbers: int) -> None:
    """Raise ValueError for anything that is not a positive whole number."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} is not a positive whole number")


def check_hyper(group: Mapping[str, Any]) -> None:
    """Raise ValueError for hyper-parameters that AdamW is not defined for."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}={group[name]!r} is not a finite number >= 0")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} are not two numbers in [0, 1)")
