"""Every codec: its error bound, exact zeros, exact bytes, any scale, any shape, unbiased chance."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from mango.blockwise import NF4_LEVELS, Log4
from mango.codecs import CODECS, Codec, Encoded, Float32, encode, flatten, head, pack, register_codec, unflatten, unpack
from mango.formats import SIGNED, UNSIGNED, Sparse, gradient_codec

NAMES = sorted(CODECS)
BLOCKWISE = ("signed8", "nf4", "ternary2", "unsigned8", "log4", "bfloat16", "float32")
DRAWS = ("nf4", "signed8", "ternary2", "unsigned8", "log4", "bfloat16")
SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (3, 0),
    (0, 4),
    (1, 1),
    (63,),
    (64,),
    (65,),
    (129,),
    (257,),
    (7, 19),
    (3, 5, 2, 2),
    (40, 33),
]
BF16 = 2.0**-8  # a bfloat16 scale is off by half a unit of its 8-bit mantissa at most
TINY = torch.finfo(torch.float32).tiny  # below it scales themselves underflow, and with them what they scale
quick = settings(max_examples=60, deadline=None)


def nonnegative(name: str) -> bool:
    return name in ("unsigned8", "log4", "factored")


def sample(shape: tuple[int, ...], seed: int = 0, name: str = "") -> Tensor:
    x = torch.randn(shape, generator=Generator().manual_seed(seed))
    return x.square() if nonnegative(name) else x


def scaled(values: list[float], exponent: int) -> Tensor:
    """Values in [-1, 1] times a power of ten, with exact zeros and equal neighbours among them."""
    return torch.tensor(values, dtype=torch.float64).mul(10.0**exponent).float()


lists = st.lists(st.one_of(st.just(0.0), st.floats(-1, 1, width=32), st.sampled_from([1.0, -1.0, 0.5, 1e-4])), max_size=300)
exponents = st.integers(-30, 18)


def per_block(x: Tensor, block: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """A slow, obvious reference: the reduction of each block, repeated for its entries (N,)."""
    flat = x.reshape(-1)
    return torch.cat([reduce(part).expand(part.numel()) for part in flat.split(block)]) if flat.numel() else flat  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stored_bytes_are_the_predicted_ones(name: str, shape: tuple[int, ...]) -> None:
    codec = CODECS[name]
    for key in (None, 0):
        enc = codec.encode(sample(shape, name=name), key)
        assert enc.nbytes == codec.nbytes(shape) == sum(p.numel() * p.element_size() for p in enc.parts.values())
        decoded = enc.decode()
        assert decoded.shape == shape and decoded.dtype == torch.float32 and decoded.isfinite().all()
        assert enc.codec == name and enc.shape == shape


@pytest.mark.parametrize("name", NAMES)
@given(values=lists, exponent=exponents, seed=st.integers(0, 3))
@quick
def test_zeros_stay_zero_and_signs_stay(name: str, values: list[float], exponent: int, seed: int) -> None:
    x = scaled(values, exponent)
    x = x.abs() if nonnegative(name) else x
    for key in (None, seed):
        decoded = CODECS[name].encode(x, key).decode()
        if name != "factored":
            assert (decoded[x == 0] == 0).all()
        assert (decoded * x.sign() >= 0).all() and decoded.isfinite().all()


@given(values=lists, exponent=exponents, seed=st.one_of(st.none(), st.integers(0, 3)))
@quick
def test_signed8_error_is_at_most_a_bin(values: list[float], exponent: int, seed: int | None) -> None:
    """Levels c^2 / 127^2: the gap above code c is (2c + 1) / 127^2 of the scale; half of it to nearest, all by chance."""
    x = scaled(values, exponent)
    decoded = CODECS["signed8"].encode(x, seed).decode()
    absmax = per_block(x, 128, lambda part: part.abs().max())
    code = (x.abs() / absmax.clamp(min=1e-45) / (1 - BF16)).clamp(max=1).sqrt() * 127
    gap = (2 * code + 2) / 127**2 * absmax * (1 + BF16)
    bound = gap * (0.5 if seed is None else 1.0) + BF16 * x.abs()  # and the scale may fall short of the largest
    assert ((decoded - x).abs() <= bound * (1 + 1e-5) + TINY).all()


@given(values=lists, exponent=exponents, seed=st.one_of(st.none(), st.integers(0, 3)))
@quick
def test_nf4_error_is_at_most_the_widest_bin(values: list[float], exponent: int, seed: int | None) -> None:
    x = scaled(values, exponent)
    decoded = CODECS["nf4"].encode(x, seed).decode()
    widest = max(b - a for a, b in itertools.pairwise(NF4_LEVELS))
    absmax = per_block(x, 64, lambda part: part.abs().max())
    bound = absmax * (1 + BF16) * widest * (0.5 if seed is None else 1.0) + BF16 * x.abs()
    assert ((decoded - x).abs() <= bound * (1 + 1e-5) + TINY).all()


@given(values=lists, exponent=st.integers(-28, 36), seed=st.one_of(st.none(), st.integers(0, 3)))
@quick
def test_unsigned8_error_is_at_most_a_bin_and_only_zero_is_zero(values: list[float], exponent: int, seed: int | None) -> None:
    x = scaled(values, exponent).abs()
    enc = CODECS["unsigned8"].encode(x, seed)
    most = per_block(x, 256, lambda part: part.max())
    gap = (2 * (x / most.clamp(min=1e-45)).sqrt() * 255 + 2) / 255**2 * most
    raised = most / 255**2  # what is not zero is raised to the first level
    bound = torch.maximum(gap * (0.5 if seed is None else 1.0), raised)
    assert ((enc.decode() - x).abs() <= bound * (1 + 1e-5) + TINY).all()
    assert torch.equal(enc.parts["codes"] > 0, x > 0)


@given(values=lists, exponent=st.integers(-28, 36), seed=st.one_of(st.none(), st.integers(0, 3)))
@quick
def test_log4_error_is_at_most_a_bin_and_only_zero_is_zero(values: list[float], exponent: int, seed: int | None) -> None:
    """15 levels over at most 8 decades: neighbours differ by a factor of 10^(8/14) at most; tiny entries are raised."""
    x = scaled(values, exponent).abs()
    decoded = CODECS["log4"].encode(x, seed).decode()
    most = per_block(x, 128, lambda part: part.max())
    least = per_block(x, 128, lambda part: part[part > 0].min() if (part > 0).any() else part.max())
    floor = torch.maximum(least, most * 1e-8).clamp(min=TINY) * (1 + BF16)
    ratio = (most / floor.clamp(min=1e-45)).clamp(min=1) ** (1 / 14) * (1 + 3 * BF16)
    assert torch.equal(decoded > 0, x > 0)
    raised = x < floor
    within = torch.where(raised, decoded <= floor * ratio, (decoded <= x * ratio) & (decoded >= x / ratio))
    assert within[x >= TINY].all() and (decoded <= (floor * ratio).clamp(min=2 * TINY))[x < TINY].all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", [None, 3])
def test_the_smallest_values_are_never_taken_for_large_ones(name: str, key: int | None) -> None:
    """Where scales underflow values may be lost or raised to the largest of their block, no further."""
    for small in (1.4e-45, 1e-42, 4e-41, 1e-38, 1e-35, 1e-32):
        for values in ([small], [small, 1.4e-45], [small, small / 8, 2e-41, 0.0], [0.0] * 70 + [small] * 70):
            x = torch.tensor(values)
            for decoded in (CODECS[name].encode(x, key).decode(), encode(CODECS[name], x, key).decode()):
                assert (decoded.abs() <= 1.5 * (1 + BF16) * x.max() + TINY).all() and decoded.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exponent", [-30, -20, -9, 0, 9, 18])
def test_relative_error_does_not_depend_on_the_scale(name: str, exponent: int) -> None:
    """Powers of two leave mantissas alone, so codes are the same bit for bit where nothing is subnormal."""
    x = sample((40, 33), name=name)
    factor = 2.0 ** round(exponent * math.log2(10))
    one, other = CODECS[name].encode(x).decode(), CODECS[name].encode(x * factor).decode()
    assert ((other / factor - one).norm() <= 2e-3 * one.norm()) and other.isfinite().all()
    if name != "log4":  # its levels pass through log and exp
        assert torch.equal(other / factor, one) or exponent == -30


@pytest.mark.parametrize(("bits", "bound"), [(32, 0.0), (16, 2e-3), (8, 1e-2), (4, 0.12), (2, 0.6)])
def test_a9_relative_error_on_a_normal_sample(bits: int, bound: float) -> None:
    x = torch.randn(100_000, generator=Generator().manual_seed(0))
    decoded = SIGNED[bits].encode(x).decode()
    assert (decoded - x).norm() / x.norm() <= bound
    assert (SIGNED[bits].encode(torch.zeros(1000)).decode() == 0).all()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_second_moments_keep_the_update_where_linear_codes_would_break_it(bits: int) -> None:
    """v over twelve decades: the error of 1/sqrt(v) stays bounded, since nothing positive becomes zero."""
    v = (10 ** torch.empty(4096).uniform_(-12, 0, generator=Generator().manual_seed(0))).sort().values
    decoded = UNSIGNED[bits].encode(v).decode()
    ratio = (v / decoded).sqrt()
    assert (decoded > 0).all() and (ratio < {16: 1.01, 8: 1.5, 4: 2.0}[bits]).all()


@pytest.mark.parametrize("name", [n for n in BLOCKWISE if n not in ("ternary2", "log4")])
@given(values=lists, exponent=st.integers(-20, 18))
@quick
def test_encoding_twice_changes_nothing(name: str, values: list[float], exponent: int) -> None:
    """To nearest, a decoded tensor is its own best code (the ternary scale follows the spread, which rounding changes)."""
    x = scaled(values, exponent)
    once = CODECS[name].encode(x.abs() if nonnegative(name) else x).decode()
    twice = CODECS[name].encode(once).decode()
    assert torch.allclose(twice, once, rtol=1e-6, atol=0)


def test_encoding_twice_changes_log_levels_by_their_scale_only() -> None:
    x = sample((2000,), name="log4")
    once = Log4().encode(x).decode()
    assert torch.allclose(Log4().encode(once).decode(), once, rtol=2 * BF16, atol=0)


@pytest.mark.parametrize("name", DRAWS)
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """The mean over n draws is within 6 standard errors of x: a draw deviates by at most its bin (Popoviciu: sd <= bin / 2)."""
    n, x = 4000, sample((256,), name=name).clamp(min=1e-3) if nonnegative(name) else sample((256,))
    if name == "ternary2":
        x = x.clamp(-0.8, 0.8)  # beyond 1.5 rms, the level, it saturates by design
    block = x.repeat(n, 1).reshape(-1)  # blocks divide 256, so every draw has the same scales
    draws = CODECS[name].encode(block, 0).decode().view(n, -1)
    nearest_two = draws.amax(0) - draws.amin(0)
    inside = (x <= draws.amax(0)) & (x >= draws.amin(0))  # all but entries cut by a scale that was rounded down
    tolerance = 6 * 0.5 * nearest_two / math.sqrt(n) + 1e-6 * x.abs()
    bias = (draws.mean(0) - x).abs()
    assert (bias <= tolerance)[inside].all() and inside.float().mean() > 0.95
    assert (bias <= BF16 * x.abs())[~inside].all()


@pytest.mark.parametrize("name", NAMES)
def test_the_key_alone_decides(name: str) -> None:
    x = sample((500,), name=name)
    first, again = (CODECS[name].encode(x, 7) for _ in range(2))
    assert all(torch.equal(first.parts[k], again.parts[k]) for k in first.parts)


@pytest.mark.parametrize("name", NAMES)
def test_views_and_half_precision_are_encoded_like_their_dense_copies(name: str) -> None:
    base = sample((24, 30), name=name)
    for view in (base.T, base[::2, 1::3], base[:, 0], base.to(torch.bfloat16), base.double()):
        direct, dense = CODECS[name].encode(view), CODECS[name].encode(view.float().clone(memory_format=torch.contiguous_format))
        one, other = direct.decode(), dense.decode()
        same = torch.allclose(one, other, rtol=1e-6, atol=0) if name == "factored" else torch.equal(one, other)  # sums reorder
        assert same and direct.nbytes == CODECS[name].nbytes(tuple(view.shape))


def test_what_is_stored_is_never_the_callers_tensor() -> None:
    for name in NAMES:
        x = sample((256,), name=name)
        enc = CODECS[name].encode(x)
        before = enc.decode().clone()
        x.zero_()
        assert torch.equal(enc.decode(), before), name


def test_a_slice_of_a_big_tensor_stores_its_own_bytes_only() -> None:
    big = torch.randn(10_000, generator=Generator().manual_seed(0))
    assert Float32().encode(big[:10]).nbytes == 40


@pytest.mark.parametrize("bits", [1, 2, 4])
@given(codes=st.lists(st.integers(0, 255), max_size=50))
@quick
def test_packing_is_exact(bits: int, codes: list[int]) -> None:
    x = torch.tensor(codes, dtype=torch.uint8) % (1 << bits)
    packed = pack(x, bits)
    assert packed.numel() == math.ceil(len(codes) * bits / 8) and torch.equal(unpack(packed, bits, len(codes)), x)


@pytest.mark.parametrize("bits", sorted(SIGNED))
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [1, 7, 100, 5000])
def test_a8_sparse_codes_keep_the_largest_entries_in_their_places(bits: int, sparsity: float, n: int) -> None:
    codec = gradient_codec(bits, sparsity)
    assert isinstance(codec, Sparse)
    x = sample((n,), seed=n)
    enc = codec.encode(x)
    kept = max(1, n - round(n * sparsity))
    places = x.abs().argsort(descending=True, stable=True)[:kept].sort().values
    dense = torch.zeros(n)
    dense[places] = encode(SIGNED[bits], x[places]).decode()
    assert torch.equal(enc.decode(), dense) and enc.nbytes == codec.nbytes((n,))
    if bits >= 8:  # coarser codes may round a kept entry to zero
        assert abs((enc.decode() == 0).double().mean() - sparsity) <= 1 / n or n == 1


def test_a8_places_cost_a_mask_or_indices_whichever_is_smaller() -> None:
    half, few = gradient_codec(8, 0.5).encode(sample((4096,))), gradient_codec(8, 0.99).encode(sample((4096,)))
    assert "mask" in half.parts and half.parts["mask"].numel() == 4096 // 8
    assert "indices" in few.parts and few.parts["indices"].numel() == 8 + math.ceil(41 * 12 / 8)


def test_factors_are_the_outer_product_of_row_and_column_means() -> None:
    v = sample((12, 5, 2), name="factored")
    matrix = v.reshape(12, 10).double()
    expected = (matrix.mean(1, keepdim=True) * matrix.mean(0, keepdim=True) / matrix.mean()).float().view(12, 5, 2)
    enc = CODECS["factored"].encode(v)
    assert torch.allclose(enc.decode(), expected, rtol=1e-5) and enc.nbytes == 4 * (12 + 10)
    rank_one = torch.rand(12, 1, generator=Generator().manual_seed(0)) @ torch.rand(1, 9, generator=Generator().manual_seed(1))
    assert torch.allclose(CODECS["factored"].encode(rank_one).decode(), rank_one, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoding_survives_a_state_dict(name: str, tmp_path: Any) -> None:
    enc = CODECS[name].encode(sample((100,), name=name), 0)
    torch.save(flatten(enc, "exp_avg"), tmp_path / "state.pt")
    loaded = unflatten(torch.load(tmp_path / "state.pt", weights_only=True), "exp_avg", torch.device("cpu"))
    assert torch.equal(loaded.decode(), enc.decode()) and loaded.nbytes == enc.nbytes and loaded.shape == enc.shape


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("sparse")])
@pytest.mark.parametrize("n", [0, 1, 63, 300, 5000])
def test_the_head_of_an_encoding_is_the_head_of_the_tensor(name: str, n: int) -> None:
    """It is decoded alone, and changing it changes nothing that is stored."""
    enc = CODECS[name].encode(sample((40, 33), name=name), 0)
    whole = enc.decode().clone()
    first = head(enc, n)
    assert torch.allclose(first, whole.reshape(-1)[:n], rtol=1e-6, atol=0)
    first.fill_(7.0)
    assert torch.equal(enc.decode(), whole)


def test_an_unknown_codec_in_a_state_dict_is_named() -> None:
    flat = flatten(CODECS["nf4"].encode(torch.ones(4)), "exp_avg") | {"exp_avg.codec": "nf5"}
    with pytest.raises(ValueError, match=r"unknown codec 'nf5'.*known.*nf4"):
        unflatten(flat, "exp_avg", torch.device("cpu"))


def test_a_codec_is_registered_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_codec(Float32)


def test_every_codec_of_the_menus_is_on_the_table() -> None:
    tables: list[dict[int, Codec]] = [SIGNED, UNSIGNED]
    for table in tables:
        for bits, codec in table.items():
            assert CODECS[codec.name] == codec
            assert codec.nbytes((4096, 64)) <= 4096 * 64 * max(bits, 1) / 8 * 1.13 + 4 * (4096 + 64) * (bits == 0)
    assert isinstance(CODECS["nf4"].encode(torch.ones(3)), Encoded)
