"""Low rank: nearly the best subspace, GaLore's update, moments carried over, and nothing dense kept alive."""

import importlib
import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from mango.blockwise import NF4_LEVELS, NormalFloat4
from mango.codecs import Encoded
from mango.config import KNOBS
from mango.formats import SIGNED
from mango.lowrank import (
    adamw_in_subspace,
    energies,
    find,
    matricise,
    orthonormal,
    project,
    range_basis,
    rank_schedule,
    refresh,
    seeded_projector,
    subspace,
    transport,
    unmatricise,
    unproject,
)

CPU = torch.device("cpu")
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "k^-1/2": lambda k: k**-0.5,
    "k^-1": lambda k: k**-1.0,
    "k^-2": lambda k: k**-2.0,
    "0.9^k": lambda k: 0.9**k,
    "0.5^k": lambda k: 0.5**k,
}
SHAPES = [(64, 96), (96, 64), (64, 64), (7,), (16, 8, 3, 3), (200, 4, 5), (1, 30), ()]
ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.0}


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(m: int, n: int, values: Tensor, generator: Generator) -> Tensor:
    """A random matrix (m, n) of the given singular values (m,)."""
    left = torch.linalg.qr(torch.randn(m, m, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, m, generator=generator)).Q
    matrix: Tensor = (left * values) @ right.T
    return matrix


def outside(matrix: Tensor, projector: Tensor) -> float:
    """Norm of what the subspace leaves out."""
    return float((matrix - unproject(projector, project(projector, matrix))).norm())


def is_projector(p: Tensor, m: int, r: int) -> bool:
    """Orthonormal up to float32 rounding of m products, in its own m * r * 4 bytes."""
    close = torch.allclose(p.T @ p, torch.eye(r), atol=4 * m * torch.finfo(torch.float32).eps)
    return close and p.shape == (m, r) and p.is_contiguous() and p.untyped_storage().nbytes() == 4 * m * r


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_d5_every_shape_is_a_matrix_with_the_smaller_side_first_and_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=seeded(0))
    matrix = matricise(x)
    m, n, r = subspace(shape, 4)
    assert matrix.shape == (m, n) and m <= n and m * n == x.numel() and r == min(4, m)
    assert torch.equal(unmatricise(matrix, shape), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_d5_a_subspace_of_full_rank_loses_nothing_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=seeded(1))
    matrix = matricise(x)
    p = find(matrix, matrix.shape[0], seeded(2))
    assert torch.allclose(unmatricise(unproject(p, project(p, matrix)), shape), x, atol=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_d1_the_error_is_at_most_a_tenth_above_the_best_of_that_rank(spectrum: str, rank: int) -> None:
    """Eckart & Young 1936: the best error is the norm of the singular values left out."""
    for seed in range(10):
        values = SPECTRA[spectrum](torch.arange(1, 65).float())
        matrix = with_spectrum(64, 96, values, seeded(seed))
        assert outside(matrix, find(matrix, rank, seeded(seed + 100))) <= 1.1 * float(values[rank:].norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_d1_a_warm_start_reaches_the_best_on_a_gradient_that_stays(spectrum: str, rank: int) -> None:
    """Steps of one power iteration each from a random start; a fresh start takes three with more columns."""
    values = SPECTRA[spectrum](torch.arange(1, 65).float())
    matrix = with_spectrum(64, 96, values, seeded(3))
    p = orthonormal(torch.randn(64, rank, generator=seeded(4)))
    for _ in range(12):
        p = refresh(matrix, p)
    assert is_projector(p, 64, rank) and outside(matrix, p) <= 1.1 * float(values[rank:].norm())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_d1_the_scale_of_a_gradient_changes_no_subspace(scale: float) -> None:
    matrix = with_spectrum(32, 48, SPECTRA["k^-1"](torch.arange(1, 33).float()), seeded(0))
    scale = 2.0 ** round(math.log2(scale))                                 # a power of two rounds nothing
    assert torch.equal(find(scale * matrix, 4, seeded(1)), find(matrix, 4, seeded(1)))
    start = orthonormal(torch.randn(32, 4, generator=seeded(2)))
    assert torch.equal(refresh(scale * matrix, start), refresh(matrix, start))


def test_d1_a_gradient_that_says_nothing_keeps_the_columns() -> None:
    p = orthonormal(torch.randn(32, 4, generator=seeded(0)))
    assert torch.allclose((refresh(torch.zeros(32, 48), p).T @ p).abs(), torch.eye(4), atol=1e-5)
    rank_one = torch.outer(torch.randn(32, generator=seeded(1)), torch.randn(48, generator=seeded(2)))
    assert is_projector(refresh(rank_one, p), 32, 4) and is_projector(find(torch.zeros(32, 48), 4, seeded(3)), 32, 4)


@given(m=st.integers(1, 40), extra=st.integers(0, 40), rank=st.integers(1, 50), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_no_projector_keeps_a_dense_factorisation_alive(m: int, extra: int, rank: int, seed: int) -> None:
    """`U[:, :r]` without a copy holds all of U: galore-torch stores 43 % more than it needs."""
    matrix = torch.randn(m, m + extra, generator=seeded(seed))
    r = min(rank, m)
    found = find(matrix, rank, seeded(seed))
    assert is_projector(found, m, r)
    assert is_projector(refresh(matrix, found), m, r)
    assert is_projector(seeded_projector((m, m + extra), rank, seed, CPU), m, r)
    assert is_projector(range_basis(matrix, torch.randn(m + extra, r, generator=seeded(seed))), m, r)


def test_a_seed_regenerates_its_projector_and_another_seed_another() -> None:
    first = seeded_projector((64, 8, 3, 3), 8, 7, CPU)
    assert torch.equal(first, seeded_projector((64, 8, 3, 3), 8, 7, CPU))
    assert not torch.allclose(first, seeded_projector((64, 8, 3, 3), 8, 8, CPU))


def test_random_projectors_keep_the_mean_square_norm() -> None:
    """E |P^T x|^2 = r/m |x|^2 for a uniform subspace; its share has variance 2 r (m - r) / (m^2 (m + 2)): five sigma."""
    m, r, draws = 32, 8, 400
    x = torch.randn(m, 1, generator=seeded(0))
    kept = [float(project(seeded_projector((m, m), r, seed, CPU), x).square().sum() / x.square().sum()) for seed in range(draws)]
    sigma = math.sqrt(2 * r * (m - r) / (m**2 * (m + 2)) / draws)
    assert abs(sum(kept) / draws - r / m) <= 5 * sigma


@given(r=st.integers(1, 6), s=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_d7_moments_carried_to_another_subspace_are_those_of_its_coordinates(r: int, s: int, seed: int) -> None:
    """The first moment is the projection of what the old one stood for; the second the variance of independent entries."""
    g = seeded(seed)
    old, new = orthonormal(torch.randn(16, r, generator=g)), orthonormal(torch.randn(16, s, generator=g))
    exp_avg, exp_avg_sq = torch.randn(r, 20, generator=g), torch.rand(r, 20, generator=g)
    turn = new.T @ old
    moved, moved_sq = transport(exp_avg, exp_avg_sq, turn)
    assert torch.allclose(moved, project(new, unproject(old, exp_avg)), atol=1e-5)
    for column in range(20):
        covariance = turn @ torch.diag(exp_avg_sq[:, column]) @ turn.T
        assert torch.allclose(moved_sq[:, column], covariance.diagonal(), atol=1e-5)
    assert (moved_sq >= 0).all()
    same, same_sq = transport(exp_avg, exp_avg_sq, torch.eye(r))
    assert torch.equal(same, exp_avg) and torch.equal(same_sq, exp_avg_sq)


def literal_galore(weight: Tensor, grad: Tensor, p: Tensor, m: Tensor, v: Tensor, step: int, eps: float, scale: float) -> Tensor:
    """GaLore's algorithm 2 (Zhao et al. 2024), line by line, in float64, for m <= n."""
    beta1, beta2 = 0.9, 0.999
    r = p.T @ grad
    m.copy_(beta1 * m + (1 - beta1) * r)
    v.copy_(beta2 * v + (1 - beta2) * r**2)
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    n = m_hat / (v_hat.sqrt() + eps)
    return weight - 0.01 * scale * (p @ n)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_d10_rank_only_float32_is_galore_algorithm_2(shape: tuple[int, int]) -> None:
    g = seeded(0)
    weight = torch.randn(shape, generator=g)
    p = find(matricise(torch.randn(shape, generator=g)), 4, g)
    _, n, r = subspace(shape, 4)
    exp_avg, exp_avg_sq = torch.zeros(r, n), torch.zeros(r, n)
    theirs, m, v = matricise(weight).double(), torch.zeros(r, n).double(), torch.zeros(r, n).double()
    for step in range(1, 21):
        grad = torch.randn(shape, generator=g)
        theirs = literal_galore(theirs, matricise(grad).double(), p.double(), m, v, step, 1e-8, 0.25)
        adamw_in_subspace(weight, grad, p, exp_avg, exp_avg_sq, eps=1e-8, step=step, scale=0.25, **ADAM)  # type: ignore[arg-type]
        torch.testing.assert_close(matricise(weight).double(), theirs, rtol=1e-6, atol=1e-6)


def test_d10_rank_only_float32_is_the_public_package() -> None:
    """galore-torch puts eps inside the bias correction, torch and algorithm 2 outside: an eps of 1e-12 tells no difference."""
    if importlib.util.find_spec("galore_torch") is None:
        pytest.skip("galore-torch is not installed: pip install mango-optim[baselines]")
    try:
        galore = importlib.import_module("galore_torch.adamw")
    except ImportError as error:
        pytest.skip(f"galore-torch does not load: {error}; pip install mango-optim[baselines]")
    for shape, kind in (((24, 40), "std"), ((40, 24), "std"), ((32, 32), "reverse_std")):   # ours: a square is projected left
        g = seeded(1)
        weight = torch.randn(shape, generator=g)
        param = torch.nn.Parameter(weight.clone())
        group = {"params": [param], "rank": 4, "update_proj_gap": 1000, "scale": 0.25, "proj_type": kind}
        optimizer = galore.AdamW([group], lr=0.01, betas=(0.9, 0.999), eps=1e-12, no_deprecation_warning=True)
        _, n, r = subspace(shape, 4)
        exp_avg, exp_avg_sq = torch.zeros(r, n), torch.zeros(r, n)
        for step in range(1, 21):
            grad = torch.randn(shape, generator=g)
            param.grad = grad.clone()
            optimizer.step()
            theirs = optimizer.state[param]["projector"].ortho_matrix
            p = theirs if theirs.shape[0] == min(shape) and theirs.shape[1] == 4 else theirs.T
            adamw_in_subspace(weight, grad, p, exp_avg, exp_avg_sq, eps=1e-12, step=step, scale=0.25, **ADAM)  # type: ignore[arg-type]
            torch.testing.assert_close(weight, param.detach(), rtol=1e-6, atol=1e-6)


def low_rank_quantised(matrix: Tensor, rank: int, bits: int) -> Tensor:
    """G ~ P Q with both factors stored at `bits` bits."""
    p = find(matrix, rank, seeded(9))
    factors = [SIGNED[bits].encode(factor).decode() for factor in (p, project(p, matrix))]
    return unproject(factors[0], factors[1])


def test_d9_the_error_of_low_rank_and_rounding_is_bounded_by_one_constant() -> None:
    """|G - C(G)|^2 / |G|^2 <= c (1/r + 2^-b) for singular values 1/k, with c from theory, not from a fit.

    The tail: sum over k > r of 1/k^2 is below 1/r, the whole above 1, and find is within 1.1 of the best. Each factor
    rounds with a relative error of at most a half 2^-(b/2) in the norm (2^-2 covers NF4's 0.09 at b = 4), and errors add.
    """
    c = 1.1**2 + 1.0
    for seed in range(3):
        matrix = with_spectrum(64, 96, SPECTRA["k^-1"](torch.arange(1, 65).float()), seeded(seed))
        for rank in (1, 4, 8, 32):
            errors = []
            for bits in (16, 8, 4):
                delta = float((matrix - low_rank_quantised(matrix, rank, bits)).norm() / matrix.norm()) ** 2
                assert delta <= c * (1 / rank + 2.0**-bits), (rank, bits, delta)
                errors.append(delta)
            assert errors[0] <= errors[1] * (1 + 1e-3) <= errors[2] * (1 + 1e-3) ** 2  # coarser factors are no better


def test_d3_nf4_levels_and_codes_are_those_of_bitsandbytes() -> None:
    """With its float32 scale every code agrees; with ours in bfloat16 a code may differ where the input is that near a tie."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install mango-optim[baselines]")
    functional = importlib.import_module("bitsandbytes.functional")
    levels = torch.tensor(NF4_LEVELS)
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), levels)
    x = torch.randn(1000 * 64, generator=seeded(0))
    packed, _ = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1).long()
    blocks = x.view(-1, 64)
    y = blocks / blocks.abs().amax(1, keepdim=True)
    assert torch.equal((y.reshape(-1, 1) - levels).abs().argmin(1), theirs)
    decoded = NormalFloat4(block=64).encode(x).decode().view(-1, 64)
    scale = decoded.abs().amax(1, keepdim=True)                                      # the largest decodes to the scale
    ours = (decoded / scale).reshape(-1, 1).sub(levels).abs().argmin(1)
    differ = ours != theirs
    assert float(differ.float().mean()) < 0.01 and int((ours - theirs).abs().max()) <= 1
    between = (levels[ours] + levels[theirs])[differ] / 2                            # the tie that they fell on two sides of
    off = (y.reshape(-1)[differ] - between).abs()
    assert (off <= 2.0**-8 * between.abs() + 1e-6).all()                             # half a bfloat16 step is 2^-9 of a scale


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    st.floats(0, 1e6),
    st.floats(0, 0.99),
    st.sampled_from([None, 1, 4, 8, 128]),
)
@settings(max_examples=100, deadline=None)
def test_d11_the_schedule_gives_the_least_menu_rank_that_keeps_enough(
    energy: list[float], rest: float, lost: float, now: int | None
) -> None:
    energy = sorted(energy, reverse=True)
    menu = [int(rank) for rank in KNOBS["rank"] if rank]
    total = sum(energy) + rest
    rank = rank_schedule(energy, total, menu, lost=lost, now=now)
    allowed = sorted(r for r in menu if now is None or r <= now)
    assert rank in allowed
    assert all(total - sum(energy[:smaller]) > lost * total for smaller in allowed if smaller < rank)
    if total - sum(energy[:rank]) > lost * total:
        assert rank == allowed[-1]


def test_d11_a_gradient_whose_energy_gathers_gets_fewer_ranks() -> None:
    menu, ranks = (1, 4, 8, 32), []
    for decay in (0.99, 0.9, 0.7, 0.3):
        matrix = with_spectrum(64, 96, decay ** torch.arange(64).float(), seeded(0))
        inside, total = energies(matrix, find(matrix, 32, seeded(1)))
        ranks.append(rank_schedule(inside.tolist(), float(total), menu))
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == 32 and ranks[-1] == 1


def test_d11_energies_are_squared_singular_values() -> None:
    matrix = with_spectrum(16, 24, SPECTRA["0.5^k"](torch.arange(1, 17).float()), seeded(0))
    inside, total = energies(matrix, find(matrix, 16, seeded(1)))
    exact = torch.linalg.svdvals(matrix).square()
    assert torch.allclose(inside, exact, atol=1e-6) and math.isclose(float(total), float(exact.sum()), rel_tol=1e-5)


def test_d11_a_menu_without_a_rank_is_refused() -> None:
    for menu, now in (((), None), ((0, 4), None), ((4, 8), 2)):
        with pytest.raises(ValueError, match="has no rank from 1"):
            rank_schedule([1.0], 1.0, menu, now=now)
    with pytest.raises(ValueError, match="not a share"):
        rank_schedule([1.0], 1.0, (1,), lost=1.0)


def test_an_encoded_projector_holds_its_codes_alone() -> None:
    p = find(torch.randn(64, 256, generator=seeded(0)), 8, seeded(1))
    enc: Encoded = SIGNED[16].encode(p)
    assert enc.nbytes == 64 * 8 * 2
