"""What docs/theory.md claims, in quick versions: declared bounds, convergence, feedback, low rank, noise scale."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn import Parameter

from experiments.gradient_noise import known_noise_scale
from experiments.theory import Args, WarmRank, bad_block, convergence, shares, top_rows, variance_reduction, watched
from mango import MANGO, CompressionConfig
from mango.blockwise import LOG6_STEP
from mango.bounds import BF16, LOG6_BOUNDS, Rounding, action_bounds, contraction_bound, feedback_bound, low_rank_bound
from mango.codecs import Codec, encode
from mango.feedback import error_feedback
from mango.formats import SIGNED, UNSIGNED, gradient_codec
from mango.lowrank import find, matricise, project, refresh, unproject
from mango.policies import random_action
from mango.state import StorageOptions, slots
from mango_env.run import TrainingRun

FORMATS: dict[str, Codec] = {codec.name: codec for codec in [*SIGNED.values(), *UNSIGNED.values()]}
FORMATS |= {f"{bits} bits, {s:g}": gradient_codec(bits, s) for bits in SIGNED for s in (0.5, 0.9, 0.99)}
GRIDS = ("signed8", "nf4", "ternary2", "unsigned8")      # fixed levels: the bound is the worst block's, not an estimate
EPS = torch.finfo(torch.float32).eps
entries = st.one_of(st.just(0.0), st.floats(-1, 1, width=32), st.sampled_from([1.0, -1.0, 0.5, 0.1, 1e-4, -1e-8]))
quick = settings(max_examples=25, deadline=None)


def signed(codec: Codec) -> bool:
    return codec not in UNSIGNED.values() or codec.name in ("float32", "bfloat16")


@pytest.mark.parametrize("name", FORMATS)
@given(values=st.lists(entries, min_size=1, max_size=300), exponent=st.integers(-20, 18), key=st.none() | st.integers(0, 9))
@quick
def test_h2_nothing_that_is_coded_loses_more_than_its_format_declares(
    name: str, values: list[float], exponent: int, key: int | None
) -> None:
    """Any values, by themselves or one far above equal others; to nearest, or whatever chance does."""
    codec = FORMATS[name]
    x = torch.tensor(values, dtype=torch.float64).mul(10.0**exponent).float()
    repeated = x[:1].expand(255)
    for case in (x, torch.cat([repeated, x.abs().amax()[None]])):
        sample = case if signed(codec) else case.abs()
        bound = contraction_bound(codec, tuple(sample.shape), "nearest" if key is None else "any")
        lost = (encode(codec, sample, key).decode().double() - sample.double()).square().sum()
        assert lost <= bound * (1 + 1e-12) * sample.double().square().sum() + 2.0**-230  # blocks below 2^-100 are not promised


@pytest.mark.parametrize("shape", [(8, 8), (30, 7)])
def test_h2_factors_may_lose_more_than_there_is_but_never_more_than_declared(shape: tuple[int, int]) -> None:
    """A row and a column of ones: of n x n their crossing is given as n / 2, and n / 8 of the squared norm is lost."""
    x = torch.full(shape, 1e-6)
    x[0], x[:, 0] = 1.0, 1.0
    lost = (encode(UNSIGNED[0], x).decode() - x).square().sum() / x.square().sum()
    assert 0.5 < lost <= contraction_bound(UNSIGNED[0], shape)


@pytest.mark.parametrize("name", GRIDS)
def test_h2_the_bound_of_a_fixed_grid_is_nearly_reached(name: str) -> None:
    """What is missing to it: the bfloat16 scale, which the bound takes at its worst, and the spacing of what is tried."""
    bound = contraction_bound(FORMATS[name], (10_000,))
    assert 0.8 * bound < bad_block(FORMATS[name], chance=False) <= bound


@pytest.mark.parametrize("name", ["signed8", "nf4", "ternary2", "lognormal6", "unsigned8", "log4", "bfloat16"])
def test_h2_by_chance_the_mean_loss_is_within_its_bound(name: str) -> None:
    """The mean of 512 draws of the worst block found, a share of at most 1 with a deviation below 0.2: 5 standard errors."""
    bound = contraction_bound(FORMATS[name], (10_000,), "mean")
    assert bad_block(FORMATS[name], chance=True) <= bound * (1 + 5 * 0.2 / math.sqrt(512))


def six_bits_excess(span: int, rounding: Rounding, bound: float, multipliers: Tensor, cells: int) -> Tensor:
    """By Lagrange's duality at least how far a block of 6-bit codes can lose more than `bound`, per multiplier (M, 1).

    Its levels below 1 are `ratio` apart. Where x is below the lowest, d = ln(max / |x|) is limited: the sum of all d^2 is at most
    k^2 variance (k values that are not zero), and the span tells the variance up to half its unit (240: any larger one). The
    codec reads logarithms off the floats, right up to 0.07: a chord for the curve, 1/128 octave, the scale's rounding.
    """
    ratio, share = LOG6_STEP**span, (span + 0.5) / 240
    ends = ratio**30 * torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    lower, upper = ends[:-1], ends[1:]                                             # every cell at its worst: an upper bound
    error = torch.minimum(upper, ends[-1] - lower) if rounding == "nearest" else torch.maximum(upper, ends[-1] - lower)
    squared = upper * (ends[-1] - lower) if rounding == "mean" else error.square()
    below = (squared - bound * lower.square() - multipliers * (-upper.log() - 0.07).clamp(min=0).square()).amax(1)
    gap = 1 - ratio                                                                # between levels, relative to the upper one
    between = (gap**2 if rounding == "any" else gap**2 / 4) - bound * ratio**2
    each = below.clamp(min=between if between > 0 else between * ratio**60)        # zeros are not counted in k, nor by the codec
    top = {"nearest": BF16**2, "mean": max(BF16**2, BF16 * gap), "any": max(BF16**2, gap**2)}[rounding]
    variance = 0.6 * share**2 / (1 - share**2) if share < 1 else math.inf
    spent = (multipliers[:, 0] * variance).nan_to_num(0.0, math.inf)               # 0 * inf: that constraint is not used
    most = torch.maximum(spent, 63 * each + 64**2 * spent)                         # convex in k = 1..64: largest at an end
    return most + top - bound * (1 - BF16) ** 2


@pytest.mark.parametrize("rounding", ["nearest", "mean", "any"])
def test_h2_the_bound_of_six_bits_holds_for_every_span(rounding: Rounding) -> None:
    """A multiplier found on few cells is a proof on many: any multiplier gives a bound, and cells are taken at their worst."""
    multipliers = torch.cat([torch.zeros(1), torch.logspace(-5, 4, 150)]).double()[:, None]
    for span in range(1, 241):
        promising = six_bits_excess(span, rounding, LOG6_BOUNDS[rounding], multipliers, 400).argmin()
        assert six_bits_excess(span, rounding, LOG6_BOUNDS[rounding], multipliers[promising, None], 20_000) <= 0, span


@pytest.mark.parametrize("feedback", [True, False, "marina"])
def test_h2_no_tensor_of_a_real_run_loses_more_than_its_action_declares(feedback: bool | str) -> None:
    """Everything stored while random configs come and go: gradients, moments, projectors, residuals, references."""
    run = TrainingRun("digits_mlp", 0, horizon=24, interval=2, memory_budget=4.0, optimizer_options={"error_feedback": feedback})
    chance = Generator().manual_seed(0)
    with watched() as found:
        while not run.done:
            run.apply(random_action(len(run.layers), chance))
            run.advance()
    assert sum(map(len, found.values())) > 100 and len(found) > 10
    assert {of: max(worst) for of, worst in found.items() if max(worst) > 1} == {}


@pytest.mark.parametrize("config", [CompressionConfig(gradient_bits=b, sparsity=s) for b in (16, 8, 6, 4, 2) for s in (0.0, 0.9)],
                         ids=lambda c: c.name)  # fmt: skip
def test_h2_without_feedback_the_error_that_is_logged_is_within_its_bound(config: CompressionConfig) -> None:
    """With feedback what is coded is gradient plus residual, and the logged error, of the gradient alone, has no such bound."""
    param = Parameter(torch.zeros(40, 50))
    optimizer = MANGO([param], policy=config, memory_budget="1MiB", error_feedback=False)
    bound = action_bounds((40, 50), config, optimizer.options)["gradient"]
    for step in range(5):
        param.grad = torch.randn(40, 50, generator=Generator().manual_seed(step)) ** 3
        optimizer.steps += 1
        (work,) = optimizer.compress_gradients()
        assert float(work[4]) ** 2 <= bound
        optimizer.update_parameters([work])


def test_h2_an_action_declares_a_bound_for_whatever_it_stores() -> None:
    chance = Generator().manual_seed(0)
    options = StorageOptions(error_feedback="marina", residual_bits=4)
    for config in [c for _ in range(40) for c in map(CompressionConfig.from_action, random_action(1, chance).tolist())]:
        bounds = action_bounds((12, 20), config, options)
        assert set(bounds) == {"gradient", *slots((12, 20), config, options, "adamw")}
        assert all(math.isfinite(bound) and bound >= 0 for bound in bounds.values())


def test_h1_compressed_sgd_converges_as_one_over_the_root_of_its_steps() -> None:
    """T = 100, 316, 1000 here; to 100,000 in `experiments.theory`. Without feedback sparse gradients do not."""
    found = {row["method"]: row for row in convergence(Args(horizon=1000, rows=3))["methods"]}
    for name, row in found.items():
        if not name.endswith("no feedback"):
            assert row["slope_min"]["mean"] <= -0.45 and row["slope_mean"]["mean"] <= -0.45, name
    assert found["sparsity 0.99, no feedback"]["slope_mean"]["mean"] > -0.45


def test_h1_what_the_study_drops_is_what_the_codec_drops() -> None:
    x = torch.randn(5, 256, generator=Generator().manual_seed(0))
    rows = torch.stack([encode(gradient_codec(32, 0.99), row).decode() for row in x])
    assert torch.equal(top_rows(0.99)(x), rows)


@pytest.mark.parametrize("coded", [(8, 0.0), (6, 0.0), (4, 0.0), (2, 0.0), (32, 0.5), (32, 0.9), (4, 0.9)], ids=str)
@given(seed=st.integers(0, 2**31), same=st.booleans(), steps=st.integers(1, 40))
@settings(max_examples=8, deadline=None)
def test_h3_the_residual_is_within_the_lemma_at_the_declared_contraction(
    coded: tuple[int, float], seed: int, same: bool, steps: int
) -> None:
    """Karimireddy et al. 2019, lemma 3, for gradients of any scales, or of one that stays."""
    chance, codec = Generator().manual_seed(seed), gradient_codec(*coded)
    lemma, owed, largest = feedback_bound(contraction_bound(codec, (200,))), torch.zeros(200), 0.0
    first = torch.randn(200, generator=chance)
    for _ in range(steps):
        grad = first if same else torch.randn(200, generator=chance) * 10 ** float(torch.randn((), generator=chance))
        largest = max(largest, float(grad.norm()))
        _, owed = error_feedback(grad, owed, lambda x: encode(codec, x).decode())
        assert float(owed.norm()) <= lemma * largest * (1 + steps * EPS)


@given(st.floats(0, 0.999))
def test_h3_the_lemma_is_above_the_recursion_s_fixed_point(contraction: float) -> None:
    root = math.sqrt(contraction)
    assert root / (1 - root) <= feedback_bound(contraction) * (1 + 1e-12)


def test_h3_a_compressor_that_may_lose_all_has_no_bound() -> None:
    with pytest.raises(ValueError, match="contraction=1"):
        feedback_bound(1.0)


def outside(matrix: Tensor, projector: Tensor) -> float:
    return float((matrix - unproject(projector, project(projector, matrix))).square().sum() / matrix.square().sum())


@given(seed=st.integers(0, 2**31), decay=st.sampled_from([0.0, 0.5, 1.0, 3.0]), rank=st.integers(1, 12))
@quick
def test_d9_an_iteration_never_loses_what_a_subspace_holds(seed: int, decay: float, rank: int) -> None:
    chance = Generator().manual_seed(seed)
    scales = torch.arange(1, 13).float() ** -decay
    matrix = torch.linalg.qr(torch.randn(12, 12, generator=chance)).Q * scales @ torch.randn(12, 20, generator=chance)
    projector = torch.linalg.qr(torch.randn(12, rank, generator=chance)).Q
    for _ in range(4):
        before, projector = outside(matrix, projector), refresh(matrix, projector)
        assert outside(matrix, projector) <= before + 1e-5                         # float32, and the old columns' weight of 1e-6


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_d9_rank_and_rounding_lose_no_more_than_declared(rank: int, decay: float) -> None:
    chance = Generator().manual_seed(rank)
    matrix = torch.linalg.qr(torch.randn(24, 24, generator=chance)).Q * torch.arange(1, 25).float() ** -decay
    matrix = matricise(matrix @ torch.linalg.qr(torch.randn(40, 24, generator=chance)).Q.T)
    p = find(matrix, rank, chance)
    for bits in (16, 8, 4):
        stored = [encode(SIGNED[bits], factor).decode() for factor in (p, project(p, matrix))]
        lost = float((matrix - unproject(*stored)).square().sum() / matrix.square().sum())
        bound = low_rank_bound((24, 40), rank, SIGNED[bits], SIGNED[bits])
        assert lost <= bound * (1.0 if decay else 1 + 1e-3)                        # singular values all equal: any subspace


def test_d9_no_constant_serves_all_sizes_where_the_spectrum_is_flat() -> None:
    """At half the rank half is lost, so c is at least (1/2) / (2 / m + 2^-16): it grows with the matrix."""
    for m in (16, 64, 256):
        lost = outside(torch.eye(m), find(torch.eye(m), m // 2, Generator().manual_seed(0)))
        assert lost / (2 / m + 2.0**-16) == pytest.approx(m / 4, rel=0.01)


def test_d9_rows_of_matrices_are_each_projected_as_a_refresh_would() -> None:
    x, warm = torch.randn(3, 256, generator=Generator().manual_seed(0)), WarmRank(4)
    found, start = warm(x), torch.eye(16)[:, :4]
    for row, applied in zip(x, found, strict=True):
        p = refresh(row.view(16, 16), start)
        assert torch.allclose(unproject(p, project(p, row.view(16, 16))).view(-1), applied, atol=1e-3)


def test_d8_marina_gains_where_gradients_change_slowly_and_loses_where_batches_are_drawn_anew() -> None:
    full, half, tenth = variance_reduction(Args(), seeds=1, steps=20)
    assert full["mean"] < 0.5 < 2 < half["mean"] and tenth["mean"] > 2


@pytest.mark.parametrize(("window", "scale"), [(10, 0.1), (10, 1.0), (100, 10.0)])
def test_b13_the_noise_scale_is_within_ten_percent_of_a_known_one(window: int, scale: float) -> None:
    """Of G + noise with G fixed: the median of some windows."""
    found = known_noise_scale(scale, window, 0, windows=40 // window + 1)
    assert abs(found[len(found) // 2] - 1) <= 0.1


def test_a_row_of_zeros_has_no_share_to_lose() -> None:
    assert shares(SIGNED[8], torch.tensor([[0.0, 0.0], [1.0, 0.0]])).shape == (1,)


def test_the_results_say_what_the_document_says(root: Path) -> None:
    """In the committed file no measured loss is above its bound, and every slope, residual and ratio is where it is claimed."""
    found = json.loads((root / "benchmarks" / "results" / "theory.json").read_text(encoding="utf-8"))
    for row in found["contraction"]:
        measured = "worst" if row["rounding"] == "nearest" else "mean"
        assert max(part[measured] for part in row.values() if isinstance(part, dict)) <= row["bound"] * (1 + 1e-3), row["format"]
    assert all(row["worst_of_bound"] <= 1 for row in found["run"])
    assert all(row["slope_min"]["mean"] <= -0.45 for row in found["convergence"]["methods"] if "no feedback" not in row["method"])
    assert all(row["holds"] for row in found["feedback"])
