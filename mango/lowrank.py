"""Low rank: a gradient's subspace as plain functions on dense float32 tensors, apart from how factors are stored.

A tensor of any shape is a matrix (m, n) with its smaller side first; a projector P (m, r) has orthonormal columns, and
moments live in (r, n). Every projector that is returned owns its m * r * 4 bytes: a view of a factorisation would keep
all of it alive.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from mango.codecs import Shape, matrix_shape, safe
from mango.rules import adamw_direction

OVERSAMPLE = 4                         # columns beyond the rank that a fresh range is sought with (Halko et al. 2011, sec. 4.2)
POWER_ITERATIONS = 2                   # of a fresh range; a warm start takes one
KEEP = 1e-6                            # of the energy: 1e-3, as it once was, hid singular values below 3 % of the norm


def subspace(shape: Shape, rank: int) -> tuple[int, int, int]:
    """(m, n, r) of the matrix whose smaller side m is projected to r <= m dimensions.

    >>> subspace((16, 8, 3, 3), 4)
    (16, 72, 4)
    """
    rows, columns = matrix_shape(shape)
    small, large = min(rows, columns), max(rows, columns)
    return small, large, min(rank, small)


def matricise(x: Tensor) -> Tensor:
    """The tensor as a float32 matrix with the smaller side first: (m, n), m <= n. A convolution's kernels are rows."""
    rows, columns = matrix_shape(tuple(x.shape))
    matrix = x.detach().float().reshape(rows, columns)
    return matrix.T if rows > columns else matrix


def unmatricise(matrix: Tensor, shape: Shape) -> Tensor:
    """Undo `matricise`."""
    rows, columns = matrix_shape(shape)
    return (matrix.T if rows > columns else matrix).reshape(shape)


def project(projector: Tensor, matrix: Tensor) -> Tensor:
    """Into the subspace: (m, r), (m, n) to (r, n)."""
    return projector.T @ matrix


def unproject(projector: Tensor, inside: Tensor) -> Tensor:
    """Back from the subspace: (m, r), (r, n) to (m, n)."""
    return projector @ inside


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (m, r) of the span of the columns (m, r), in storage of its own."""
    return _own(torch.linalg.qr(columns).Q)


def range_basis(matrix: Tensor, start: Tensor, rank: int | None = None) -> Tensor:
    """An orthonormal basis (m, r) of the leading left singular directions of (m, n), from random columns (n, k), k >= r.

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1): the k columns settle on a
    range, and the best `rank` directions inside it are kept (all without a rank).
    """
    unit = _unit(matrix)
    basis = orthonormal(unit @ start)
    for _ in range(POWER_ITERATIONS):
        basis = orthonormal(unit @ (unit.T @ basis))
    if rank is None or rank >= basis.shape[1]:
        return basis
    inside = basis.T @ unit                                                          # (k, n)
    leading = torch.linalg.eigh(inside @ inside.T).eigenvectors[:, -rank:].flip(1)   # (k, r), largest first
    return _own(basis @ leading)


def find(matrix: Tensor, rank: int, generator: Generator | None = None) -> Tensor:
    """A projector (m, r) for a first gradient (m, n), within a few per cent of the best."""
    small, large = matrix.shape
    columns = min(rank + OVERSAMPLE, small)
    start = torch.randn(large, columns, device=matrix.device, generator=generator)
    return range_basis(matrix, start, min(rank, small))


def refresh(matrix: Tensor, projector: Tensor) -> Tensor:
    """One power iteration from the projector in force (PowerSGD, Vogels et al. 2019, algorithm 1; LDAdam, Robert et al. 2025).

    A twentieth of the cost of a singular value decomposition. Where the gradient says nothing (zero, or of lower rank)
    the old columns stay: they enter with a weight below every direction that squares in float32 can tell from noise.
    """
    unit = _unit(matrix)
    keep = KEEP * unit.norm().square().clamp(min=1)
    return orthonormal(unit @ (unit.T @ projector) + keep * projector)


def transport(exp_avg: Tensor, exp_avg_sq: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (r, n) of an old subspace in a new one (s, n), with `turn` = new.T @ old (s, r).

    The first moment is linear, and its part outside the new subspace is dropped. The second is the variance of
    independent coordinates, which add up by squares: never negative.
    """
    return turn @ exp_avg, turn.square() @ exp_avg_sq


def seeded_projector(shape: Shape, rank: int, seed: int, device: torch.device) -> Tensor:
    """A random orthonormal projector (m, r) for a tensor of `shape`, the same at every call: a seed is all that is stored.

    Uniformly distributed over subspaces: the sign of each column is that of the factorisation's diagonal (Mezzadri 2007).
    It keeps norms, not directions: enough where only row or column norms are wanted (APOLLO, Zhu et al. 2025, sec. 4).
    """
    small, _, rank = subspace(shape, rank)
    generator = torch.Generator(device).manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(small, rank, device=device, generator=generator))
    return _own(q * torch.where(r.diagonal() < 0, -1.0, 1.0))


def adamw_in_subspace(
    param: Tensor,
    grad: Tensor,
    projector: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scale: float = 1.0,
) -> None:
    """One AdamW step in place on P^T G, moved back by P (GaLore, Zhao et al. 2024, algorithm 2). Moments are (r, n)."""
    inside = project(projector, matricise(grad))
    direction = adamw_direction(inside, exp_avg, exp_avg_sq, betas=betas, eps=eps, step=step)
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.add_(unmatricise(unproject(projector, direction), tuple(param.shape)), alpha=-lr * scale)


def energies(matrix: Tensor, projector: Tensor) -> tuple[Tensor, Tensor]:
    """Energy (squared singular values) of the matrix inside the subspace, (r,) falling, and in all, ()."""
    inside = project(projector, matrix)                                              # (r, n)
    values = torch.linalg.eigvalsh(inside @ inside.T).clamp(min=0).flip(0)
    return values, matrix.square().sum()


def rank_schedule(
    energy: Sequence[float], total: float, menu: Sequence[int], *, lost: float = 0.1, now: int | None = None
) -> int:
    """The smallest rank on the menu that loses at most a share `lost` of the energy; the largest where none does.

    AdaRankGrad (Refael et al. 2025, sec. 3, adaptive subspace selection): r is the least rank with
    |G - P_r G|^2 <= lost |G|^2, and it falls as training goes on. With `now` it never rises above the rank in force.
    `energy` are squared singular values, largest first; beyond the last known one all that is left counts as lost.

    >>> rank_schedule([80.0, 15.0, 4.0], 100.0, (1, 2, 4))
    2
    """
    ranks = sorted(rank for rank in menu if now is None or rank <= now)
    if not ranks or ranks[0] < 1:
        raise ValueError(f"menu {tuple(menu)} has no rank from 1 to {now if now is not None else 'any'}; give positive ranks")
    if not 0 <= lost < 1:
        raise ValueError(f"lost={lost!r} is not a share in [0, 1)")
    enough = [rank for rank in ranks if total - sum(energy[:rank]) <= lost * total]
    return enough[0] if enough else ranks[-1]


def _own(x: Tensor) -> Tensor:
    """Row by row in storage of its own, and no more."""
    return x.clone(memory_format=torch.contiguous_format)


def _unit(matrix: Tensor) -> Tensor:
    """The matrix over its largest entry, so that powers neither overflow nor vanish."""
    return matrix / safe(matrix.abs().max())
