"""Six bits for values whose magnitudes are near log-normal: error, exact zeros and bytes, chance, and the CPU kernel."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, native
from mango.blockwise import LogNormal6, pack6, unpack6
from mango.codecs import CODECS, encode, head
from mango.config import FULL
from mango.formats import SIGNED
from mango.state import StorageOptions, predicted_bytes

CODEC = LogNormal6()
BF16 = 2.0**-8                                               # a bfloat16 scale is off by half a unit of 8 bits at most
SPREADS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
quick = settings(max_examples=60, deadline=None)


def log_normal(n: int, spread: float, seed: int = 0) -> Tensor:
    """exp(spread * normal) with a random sign."""
    generator = Generator().manual_seed(seed)
    return torch.exp(spread * torch.randn(n, generator=generator)) * torch.randn(n, generator=generator).sign()


def relative_error(x: Tensor, key: int | None = None) -> float:
    return float((encode(CODEC, x, key).decode() - x).double().norm() / x.double().norm())


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("n", [10_000, 100_000, 1_000_000])
def test_b11_the_relative_error_on_log_normal_data_is_below_four_percent(n: int, spread: float) -> None:
    for seed in range(max(1, 50_000 // n)):
        assert relative_error(log_normal(n, spread, seed)) < 0.04


@pytest.mark.parametrize("spread", SPREADS)
def test_b11_so_it_is_at_a_thousand_values_in_99_samples_of_100(spread: float) -> None:
    """There a few entries are nearly all of the norm, and two of them may share a block: 0.5 % of samples exceed it."""
    errors = sorted(relative_error(log_normal(1000, spread, seed)) for seed in range(200))
    assert errors[100] < 0.035 and errors[-3] < 0.04 and errors[-1] < 0.06


@pytest.mark.parametrize("exponent", [-126, -80, -30, 0, 30, 100])
def test_b11_the_error_does_not_depend_on_the_scale(exponent: int) -> None:
    """Powers of two leave mantissas alone: codes are the same bit for bit, where nothing is subnormal."""
    x = log_normal(5000, 1.0)
    one, other = encode(CODEC, x), encode(CODEC, x * 2.0**exponent)
    if exponent > -126:
        assert torch.equal(one.parts["codes"], other.parts["codes"])
    assert relative_error(x * 2.0**exponent) == pytest.approx(relative_error(x), rel=1e-3 if exponent > -126 else 0.5)


@given(values=st.lists(st.floats(-1, 1, width=32), max_size=200), exponent=st.integers(-30, 30), key=st.sampled_from([None, 3]))
@quick
def test_an_error_is_at_most_a_gap_between_levels(values: list[float], exponent: int, key: int | None) -> None:
    """Levels m e^(-s k / 1500), k = 0 .. 30, s = 1 .. 240 by block, and 0: half a gap to nearest, all of it by chance."""
    x = torch.tensor(values, dtype=torch.float64).mul(10.0**exponent).float()
    enc = encode(CODEC, x, key)
    most = torch.cat([part.abs().max().expand(part.numel()) for part in x.split(64)]) if len(x) else x  # type: ignore[no-untyped-call]
    span = enc.parts["scale_span"].repeat_interleave(64)[: len(x)].double()
    assert (enc.parts["scale_span"] >= 1).all() and (enc.parts["scale_span"] <= 240).all()
    ratio, least = (span / 1500).exp(), most * (-span / 50).exp() * (1 + BF16)
    gap = torch.where(x.abs() < least, least, x.abs() * (1 + BF16) * (ratio - 1))
    bound = gap * (0.5 if key is None else 1.0) + 2 * BF16 * x.abs()
    tiny = 2 * torch.finfo(torch.float32).tiny                                 # a subnormal scale loses digits
    assert ((enc.decode() - x).abs() <= bound * (1 + 1e-4) + tiny).all()
    assert (enc.decode()[x == 0] == 0).all() and (enc.decode() * x.sign() >= 0).all()


def test_the_largest_value_of_a_block_and_all_of_equal_magnitude_lose_only_what_the_scale_does() -> None:
    x = log_normal(640, 2.0).view(10, 64)
    largest = x.abs().argmax(1, keepdim=True)
    stored = encode(CODEC, x).decode()
    assert torch.allclose(stored.gather(1, largest), x.gather(1, largest), rtol=BF16)
    same = torch.full((200,), -3.0)
    assert torch.equal(encode(CODEC, same).decode(), same)


def test_code_zero_is_zero_and_nothing_else_is_minus_zero() -> None:
    codes = unpack6(encode(CODEC, log_normal(4096, 3.0)).parts["codes"], 4096)
    stored = encode(CODEC, log_normal(4096, 3.0)).decode()
    assert torch.equal(codes == 0, stored == 0) and (codes != 32).all() and int(codes.max()) <= 63
    assert (encode(CODEC, torch.zeros(300), 1).decode() == 0).all()


def test_chance_is_unbiased_between_neighbouring_levels() -> None:
    """The mean over n draws is within 6 standard errors; a draw deviates by half its gap (Popoviciu)."""
    n, x = 4000, log_normal(256, 1.0)
    draws = encode(CODEC, x.repeat(n, 1).reshape(-1), 5).decode().view(n, -1)
    low, high = draws.amin(0), draws.amax(0)
    inside = (x >= low) & (x <= high)                                          # all but what a rounded scale cuts
    bias = (draws.mean(0) - x).abs()
    assert (bias <= 6 * 0.5 * (high - low) / math.sqrt(n) + 1e-6 * x.abs())[inside].all()
    assert inside.float().mean() > 0.95 and (bias <= BF16 * x.abs())[~inside].all()


@given(codes=st.lists(st.integers(0, 63), max_size=50))
@quick
def test_four_codes_are_packed_in_three_bytes(codes: list[int]) -> None:
    x = torch.tensor(codes, dtype=torch.uint8)
    packed = pack6(x)
    assert packed.untyped_storage().nbytes() == math.ceil(len(codes) * 6 / 8) and torch.equal(unpack6(packed, len(codes)), x)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 63, 64, 65, 255, 256, 257, 1000, 4099])
def test_bytes_are_three_quarters_per_value_and_three_per_block(n: int) -> None:
    for enc in (encode(CODEC, torch.ones(n)), CODEC.encode(torch.ones(n))):
        assert enc.nbytes == CODEC.nbytes((n,)) == math.ceil(3 * n / 4) + 3 * math.ceil(n / 64)
    assert torch.equal(head(encode(CODEC, log_normal(n, 1.0)), 70), encode(CODEC, log_normal(n, 1.0)).decode()[:70])


@pytest.mark.parametrize("n", [0, 1, 2, 3, 63, 64, 65, 255, 256, 257, 1000, 70_001])
@pytest.mark.parametrize("key", [None, 0, 12345])
def test_the_kernel_gives_its_twin_s_parts_bit_for_bit(n: int, key: int | None) -> None:
    """Spans come from whole numbers and levels from products alone, so there is nothing that two libraries do differently."""
    if os.environ.get("MANGO_NATIVE") == "0" or native.load() is None:
        pytest.skip("needs the CPU kernels: a C compiler (cc, gcc, clang or $CC), and not MANGO_NATIVE=0")
    for exponent in (-44, -38, -30, 0, 30):
        x = (log_normal(n, 1.5).double() * 10.0**exponent).float()
        x[::7] = 0
        mine, twin = encode(CODEC, x, key), CODEC.encode(x, key)
        assert all(torch.equal(mine.parts[name], twin.parts[name]) for name in twin.parts)
        assert torch.equal(mine.decode(), CODEC.decode(twin))


def test_six_bits_are_on_the_menus_of_gradients_and_first_moments() -> None:
    assert SIGNED[6] == CODECS["lognormal6"] == CODEC
    config = CompressionConfig(gradient_bits=6, momentum_bits=6, variance_bits=8)
    assert CompressionConfig.from_action(config.to_action()) == config and config.name == "g6m6v8"
    sizes = [predicted_bytes((512, 512), CompressionConfig(momentum_bits=bits), StorageOptions()) for bits in (8, 6, 4)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("config", [CompressionConfig(momentum_bits=6), CompressionConfig(gradient_bits=6),
                                    CompressionConfig(gradient_bits=6, sparsity=0.5, momentum_bits=6, variance_bits=8)],
                         ids=lambda c: c.name)  # fmt: skip
def test_adamw_at_six_bits_comes_as_near_to_a_minimum_as_at_full_precision(config: CompressionConfig) -> None:
    """A quadratic, 400 steps: the distance that is left is full precision's, and a tenth of it more at most."""
    left = {}
    for each in (FULL, config):
        param, wanted = Parameter(torch.zeros(40, 40)), torch.randn(40, 40, generator=Generator().manual_seed(0))
        optimizer = MANGO([param], policy=each, memory_budget="1MiB", residual_bits=6)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
            param.grad = param.detach() - wanted
            optimizer.step()
        assert optimizer.state[param]["tensor"].nbytes == predicted_bytes((40, 40), each, optimizer.options)
        left[each] = float((param.detach() - wanted).norm())
    assert left[config] <= 1.1 * left[FULL] < 0.1 * float(wanted.norm())
