"""Base rules: the mathematics of an update as plain functions on dense float32 tensors, apart from how state is stored."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mango.codecs import matrix_shape, safe

UPDATE_LIMIT = 10.0                          # no entry moves by more than this many learning rates where state is compressed
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)    # coefficients of Muon's quintic iteration (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAMW = 0.2                           # of an update's entries in learning rates (Liu et al. 2025, sec. 2.2)
ROUNDING_ERROR = {2: 0.6, 4: 0.13, 6: 0.03, 8: 0.007}      # of a normal sample by bits, relative, rounded to nearest


@dataclass(frozen=True, slots=True)
class Hyper:
    """The numbers of one update, from the parameter group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    momentum: float

    @classmethod
    def of(cls, group: Mapping[str, Any], rule: str) -> "Hyper":
        momentum = group["momentum"]
        own = RULES[rule].momentum if momentum is None else momentum
        lr = float(group["lr"]) * (group["matrix_lr_scale"] if rule.startswith("muon") else 1.0)
        return cls(lr, group["betas"], group["eps"], group["weight_decay"], own)

    def without_momentum(self) -> "Hyper":
        """The same where no first moment is kept."""
        return replace(self, betas=(0.0, self.betas[1]), momentum=0.0)


# Advances the moments in place by a gradient and returns the direction to step in, in learning rates.
Direction = Callable[[Tensor, Tensor, Tensor | None, Hyper, int], Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """How a parameter moves. `variance`: it keeps a second moment; `decoupled`: weight decay shrinks the parameter itself."""

    direction: Direction
    variance: bool = False
    decoupled: bool = True
    momentum: float = 0.0                                   # where the group gives none
    by_chance: bool = True                                  # how a first moment of few bits rounds; Muon amplifies that noise
    pace: Callable[[float, int], float] = lambda momentum, bits: 1.0  # of its rate, by the bits of the first moment


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
    advance_moments(grad, exp_avg, exp_avg_sq, betas)
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
    advance_moments(grad, exp_avg, exp_avg_sq, betas)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    direction = (exp_avg / denominator).mul_(1 / (1 - beta1**step)).clamp_(-UPDATE_LIMIT, UPDATE_LIMIT)
    return direction.masked_fill_(exp_avg_sq == 0, 0.0)


def advance_moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]) -> None:
    """Adam's two moving averages, in place."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def _adam(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor | None, hyper: Hyper, step: int) -> Tensor:
    if exp_avg_sq is None:
        raise ValueError("Adam needs a second moment")
    return adamw_direction(grad, exp_avg, exp_avg_sq, betas=hyper.betas, eps=hyper.eps, step=step)


def _sgd(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor | None, hyper: Hyper, step: int) -> Tensor:
    """Heavy-ball momentum as torch.optim.SGD has it: the buffer is a sum, not a mean (Sutskever et al. 2013)."""
    return exp_avg.mul_(hyper.momentum).add_(grad).clone()


def _lion(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor | None, hyper: Hyper, step: int) -> Tensor:
    """The sign of an interpolation (Chen et al. 2023, algorithm 2)."""
    direction = torch.lerp(exp_avg, grad, 1 - hyper.betas[0]).sign_()
    exp_avg.lerp_(grad, 1 - hyper.betas[1])
    return direction


def _muon(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor | None, hyper: Hyper, step: int, blocks: int = 1) -> Tensor:
    """Nesterov momentum made orthogonal (Jordan et al. 2024), with the root mean square of AdamW's updates (Liu et al. 2025).

    So one learning rate serves Muon's matrices and AdamW's other tensors: torch.optim.Muon's "match_rms_adamw". `blocks`
    of rows are made orthogonal apart: a fused query-key-value matrix is three.
    """
    exp_avg.lerp_(grad, 1 - hyper.momentum)
    whole = torch.lerp(grad, exp_avg, hyper.momentum).reshape(matrix_shape(tuple(grad.shape)))
    parts = [orthogonal(part) * (RMS_OF_ADAMW * math.sqrt(max(part.shape))) for part in whole.chunk(blocks)]
    return torch.cat(parts).reshape(grad.shape)


def muon_pace(momentum: float, bits: int) -> float:
    """What Muon's rate is multiplied by where its first moment is stored in so many bits (0: not at all).

    Orthogonal updates have one size. Noise does not lengthen them, it takes from the way that they go: where gradients are
    mostly noise, an update goes only 1/sqrt(n) as far if its direction has n times the noise of full precision's. Without a
    moment n is the inverse of the share of noise that Nesterov's average lets through; in few bits, what rounding adds at
    every step and the moment keeps. A rate far below the largest stable one wants all of that made up for, the largest one
    nothing of it: the geometric mean of both is n^(1/4).

    >>> [round(muon_pace(0.9, bits), 2) for bits in (0, 2, 4, 8, 16, 32)]
    [1.94, 1.22, 1.01, 1.0, 1.0, 1.0]
    """
    kept = momentum**2
    share = (1 - kept) ** 2 + (kept * (1 - momentum)) ** 2 / (1 - kept)             # the squares of the average's weights
    more = 1 + ROUNDING_ERROR.get(bits, 0.0) ** 2 * kept**2 / (1 - kept)
    return float((more if bits else 1 / share) ** 0.25)


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, about: singular values end between 0.7 and 1.2. Scale-free; zeros stay zeros.

    Newton-Schulz in bfloat16, as torch.optim.Muon does it, after the matrix was brought to order one.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / safe(wide.abs().max())
    x = (x / safe(x.norm())).bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


RULES: dict[str, Rule] = {
    "adamw": Rule(_adam, variance=True),
    "adam": Rule(_adam, variance=True, decoupled=False),
    "sgd": Rule(_sgd, decoupled=False, momentum=0.9),
    "lion": Rule(_lion),
    "muon": Rule(_muon, momentum=0.9, by_chance=False, pace=muon_pace),
    "muon_qkv": Rule(partial(_muon, blocks=3), momentum=0.9, by_chance=False, pace=muon_pace),
}
CHOICES = ("adamw", "adam", "sgd", "lion", "muon")          # of `rule=`; the others follow from these and the layer
NOT_FOR_MUON = ("embedding", "head", "norm")                # kinds of layers that keep AdamW (Jordan et al. 2024)


def rule_for(rule: str, shape: tuple[int, ...], kind: str) -> str:
    """The rule that a tensor gets in a group: Muon's is for hidden matrices and kernels, AdamW takes the rest.

    Queries, keys and values in one matrix are three to Muon: made orthogonal together they lose 3 to 5 % of loss, and
    lose more when the momentum is stored in few bits (`experiments/muon_formats.py`).
    """
    if rule != "muon":
        return rule
    if len(shape) < 2 or kind in NOT_FOR_MUON:
        return "adamw"
    return "muon_qkv" if kind == "attention_in" and shape[0] == 3 * math.prod(shape[1:]) else "muon"


def check_positive(**numbers: int) -> None:
    """Raise ValueError for anything that is not a positive whole number."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} is not a positive whole number")


def check_hyper(group: Mapping[str, Any]) -> None:
    """Raise ValueError for hyper-parameters that the rule is not defined for."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}={group[name]!r} is not a finite number >= 0")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} are not two numbers in [0, 1)")
    if group["momentum"] is not None and not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']!r} is not a number in [0, 1), or None for the rule's own")
    if not 0 < group["matrix_lr_scale"] < math.inf:
        raise ValueError(f"matrix_lr_scale={group['matrix_lr_scale']!r} is not a finite number > 0")
    if group["rule"] not in CHOICES:
        raise ValueError(f"rule={group['rule']!r} is none of {', '.join(CHOICES)}")
