"""What becomes of a compressor's error: feedback, differences and references, as small recursions on dense tensors.

Every step takes the true gradient, what is kept and `compress`, and gives back (applied, kept): what the base rule sees
and what to keep until the next step. Nothing here stores or encodes; whoever calls decides at how many bits to keep.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Compress = Callable[[Tensor], Tensor]                       # the tensor as it comes back from a codec, dense


class Reference(NamedTuple):
    """What MARINA keeps: the estimate that was applied last, and the gradient that it estimated."""

    estimate: Tensor
    gradient: Tensor


class Velocity(NamedTuple):
    """What momentum correction keeps of each entry that is not sent yet: velocity, and its sum since it was."""

    momentum: Tensor
    pending: Tensor


def error_feedback(grad: Tensor, residual: Tensor, compress: Compress) -> tuple[Tensor, Tensor]:
    """Compress the gradient plus what is owed, and owe the difference (Karimireddy et al. 2019, algorithm 2).

    The sum of all that was applied is the sum of all gradients, less the residual of today.

    >>> import torch
    >>> error_feedback(torch.tensor([0.4, 1.0]), torch.tensor([0.3, 0.0]), torch.round)
    (tensor([1., 1.]), tensor([-0.3000,  0.0000]))
    """
    wanted = grad + residual
    applied = compress(wanted)
    return applied, wanted - applied


def thresholded_feedback(grad: Tensor, residual: Tensor, compress: Compress, threshold: float) -> tuple[Tensor, Tensor]:
    """Error feedback that pays only when the debt exceeds `threshold` times the gradient, in the l2 norm.

    Until then the error of each step is added to the debt, unpaid. 0 pays always; inf never does: what is applied is
    then C(grad), and the caller need not keep the residual at all.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold!r} is not a multiple of the gradient's norm, >= 0")
    # `pays` is a tensor: deciding costs no device synchronisation. inf * 0 is nan, and nothing compares to nan.
    pays = residual.norm() >= threshold * grad.norm() if threshold else residual.new_ones(()).bool()
    wanted = grad + residual.where(pays, residual.new_zeros(()))
    applied = compress(wanted)
    return applied, grad + residual - applied


def ef21(grad: Tensor, estimate: Tensor, compress: Compress) -> tuple[Tensor, Tensor]:
    """Apply an estimate that moves by the compressed difference (EF21, Richtarik et al. 2021, algorithm 2).

    g_{t+1} = g_t + C(grad - g_t). The estimate converges to a gradient that stays, whatever share C gives back. What is
    applied is what is kept: one tensor serves as both.
    """
    moved = estimate + compress(grad - estimate)
    return moved, moved


def marina(grad: Tensor, reference: Reference | None, compress: Compress, step: int, every: int) -> tuple[Tensor, Reference]:
    """The exact gradient every `every` steps, compressed differences in between (MARINA, Gorbunov et al. 2021, algorithm 1).

    g_t = grad_t if t is a multiple of `every` (or nothing is kept), else g_{t-1} + C(grad_t - grad_{t-1}). The paper
    draws the exact steps with probability 1 / every; a fixed period repeats. Differences of successive gradients are
    small where these change slowly, and an error lasts for one period at most.
    """
    if every < 1:
        raise ValueError(f"every={every!r} is not a positive number of steps")
    estimate = grad if reference is None or step % every == 0 else reference.estimate + compress(grad - reference.gradient)
    return estimate, Reference(estimate, grad)


def momentum_correction(
    grad: Tensor, velocity: Velocity, compress: Compress, momentum: float, *, masked: bool = True
) -> tuple[Tensor, Velocity]:
    """Sparse gradients without staleness: accumulate velocity, not gradients (DGC, Lin et al. 2018, sec. 3.1 and 3.2).

    u = momentum * u + grad, v = v + u, C(v) is applied as it is, with no momentum after it. An entry that was applied
    starts again from zero, velocity included (momentum factor masking), unless `masked` is False. Entries that are
    zero in C(v) were not applied; what rounding kept back of an applied one stays in v.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r} is not in [0, 1)")
    moved = momentum * velocity.momentum + grad
    wanted = velocity.pending + moved
    applied = compress(wanted)
    rest = moved.masked_fill(applied != 0, 0.0) if masked else moved
    return applied, Velocity(rest, wanted - applied)
