"""bfloat16 parameters: what rounding by chance and corrections of 8 and 16 bits keep."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, master
from mango.config import FULL
from tests.rungs import M2V0, M4V4, M8V4, M8V8, R8

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
quick = settings(max_examples=2000 if NIGHTLY else 60, deadline=None)
odd = [0.0, -0.0, 1e-45, 1e-39, 1 + 2.0**-8, -1 - 2.0**-8, 1 + 3 * 2.0**-8, 3e38]
floats = st.one_of(st.floats(-(2.0**127), 2.0**127, width=32), st.floats(-2, 2, width=32), st.sampled_from(odd))


def rounded(dense: Tensor, bits: int, key: int = 0) -> tuple[Tensor, Tensor | None]:
    param = torch.zeros(dense.shape, dtype=torch.bfloat16)
    correction = master.new_correction(param, bits)
    master.store(dense, param, correction, key)
    return param, correction


@given(values=st.lists(floats, min_size=1, max_size=200))
@quick
def test_32_bits_come_back_as_they_were(values: list[float]) -> None:
    """Every bit of a float32; the bfloat16 is the nearest, halves away from zero."""
    dense = torch.tensor(values)
    param, correction = rounded(dense, 32)
    assert torch.equal(master.join(param, correction).view(torch.int32), dense.view(torch.int32))
    assert correction is not None and correction.dtype == torch.int16
    tie = (dense.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param[~tie], dense.bfloat16()[~tie])
    assert ((param.float() - dense).abs() <= (dense.bfloat16().float() - dense).abs()).all()


@given(values=st.lists(floats, min_size=1, max_size=200))
@quick
def test_24_bits_are_within_a_128th_of_a_bfloat16_s_half_unit(values: list[float]) -> None:
    """Half of 2^8 units of the float32; a whole one where the rest rounds up to 128, which 8 bits do not hold."""
    dense = torch.tensor(values)
    param, correction = rounded(dense, 24)
    rest = dense.view(torch.int32) - param.float().view(torch.int32)             # of -2^15 to 2^15 - 1
    gap = (master.join(param, correction).view(torch.int32) - dense.view(torch.int32)).abs()
    assert (gap <= torch.where(rest >= 127 * 256 + 128, 256, 128)).all()
    assert correction is not None and correction.dtype == torch.int8


@pytest.mark.parametrize("bits", [24, 32])
def test_what_was_joined_is_stored_as_it_was(bits: int) -> None:
    """A step that moves nothing changes nothing, however often."""
    param, correction = rounded(torch.randn(5000, generator=torch.Generator().manual_seed(0)), bits)
    assert correction is not None
    before = param.clone(), correction.clone()
    for key in range(3):
        master.store(master.join(param, correction), param, correction, key)
    assert torch.equal(param, before[0]) and torch.equal(correction, before[1])


def test_rounding_by_chance_is_unbiased() -> None:
    """The mean of n draws is within six standard errors (half a unit at most each) of the value."""
    n, x = 4000, torch.randn(64, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([rounded(x, 16, key)[0].double() for key in range(n)])
    unit = 2.0 ** (torch.frexp(x).exponent - 8).double()
    assert ((draws.mean(0) - x).abs() <= 6 * 0.5 * unit / math.sqrt(n)).all()
    assert ((draws - x).abs() < unit).all()
    whole = torch.tensor([1.0, -0.5, 3.0, 0.0])
    assert torch.equal(rounded(whole, 16, 1)[0].float(), whole)


def test_float32_and_float64_are_worked_on_in_place_and_float16_is_rounded() -> None:
    for dtype in (torch.float32, torch.float64):
        param = torch.ones(4, dtype=dtype)
        master.join(param, None).add_(1)
        assert (param == 2).all()
    half = torch.ones(4, dtype=torch.float16)
    master.store(torch.full((4,), 1 / 3), half, None, 0)
    assert torch.equal(half, torch.full((4,), 1 / 3).half())


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_a_correction_takes_the_bytes_that_were_foretold(bits: int) -> None:
    param = Parameter(torch.zeros(50, 40, dtype=torch.bfloat16))
    correction = master.new_correction(param, bits)
    expected = 2000 * (bits - 16) // 8
    assert (0 if correction is None else correction.nbytes) == master.correction_bytes(param, (50, 40), bits) == expected
    assert master.new_correction(param.float(), bits) is None and master.correction_bytes(param.float(), (50, 40), bits) == 0
    optimizer = MANGO([param], policy=M8V8, master_bits=bits)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.memory_report().get("correction", 0) == expected
    assert optimizer.memory_report()["total"] == optimizer.state_bytes() <= optimizer.planned_bytes()


def test_a_master_of_other_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"master_bits=20 is not on the menu \(16, 24, 32\)"):
        MANGO([Parameter(torch.zeros(3))], master_bits=20)


def run(dtype: torch.dtype, bits: int, config: CompressionConfig, steps: int = 60) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (float32) and gradients that do not depend on how weights are stored: of a bfloat16's rounding."""
    shapes = (48, 40), (40,)
    params = [Parameter(torch.randn(s, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)) for s in shapes]
    optimizer = MANGO(params, lr=1e-3, policy=config, master_bits=bits, weight_decay=0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(dtype)
        optimizer.step()
    return [master.join(p, optimizer.state[p]["tensor"].correction) for p in params], [p.detach() for p in params]


@pytest.mark.parametrize("config", [FULL, M8V8, M4V4, M2V0, R8], ids=lambda c: c.name)
def test_a_32_bit_master_trains_as_float32_does(config: CompressionConfig) -> None:
    """Bit for bit, decay and stochastic moments included."""
    full, _ = run(torch.float32, 16, config)
    joined, stored = run(torch.bfloat16, 32, config)
    for a, b, c in zip(full, joined, stored, strict=True):
        assert torch.equal(a, b) and ((a - c.float()).abs() <= 2.0**-8 * a.abs()).all()


def test_more_bits_are_nearer_to_float32() -> None:
    full, _ = run(torch.float32, 16, FULL)
    found = {bits: run(torch.bfloat16, bits, FULL)[0] for bits in (16, 24, 32)}
    errors = [sum(float((a - b).norm()) for a, b in zip(full, weights, strict=True)) for weights in found.values()]
    assert errors[0] > 30 * errors[1] > 0 == errors[2]       # 8 bits apart, of which rounding by chance wins some back


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_small_updates_are_not_lost(bits: int) -> None:
    """1,000 steps of 2^-12 from 1, each a 32nd of a unit of bfloat16: nearest rounding would never leave 1."""
    param = Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = MANGO([param], lr=2.0**-12, policy=FULL, master_bits=bits)
    for _ in range(1000):
        param.grad = -torch.ones_like(param)
        optimizer.step()
    joined = master.join(param, optimizer.state[param]["tensor"].correction)
    # by chance the deviation of a sum of n independent roundings is sqrt(n p (1 - p)) units
    deviation = 2.0**-7 * math.sqrt(1000 / 32) / 64 if bits == 16 else 0.0
    assert abs(float(joined.mean()) - (1 + 1000 / 4096)) < 6 * deviation + 1e-3


@pytest.mark.parametrize("bits", [24, 32])
def test_a_checkpoint_keeps_the_correction(bits: int) -> None:
    def build() -> tuple[nn.Linear, MANGO]:
        layer = nn.Linear(48, 40).bfloat16()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(40, 48, generator=torch.Generator().manual_seed(0)))
            layer.bias.zero_()
        return layer, MANGO(layer.parameters(), policy=M8V4, master_bits=bits)

    def go(layer: nn.Linear, optimizer: MANGO, steps: range) -> None:
        for step in steps:
            for param in layer.parameters():
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()

    one, optimizer = build()
    go(one, optimizer, range(5))
    saved, weights = optimizer.state_dict(), {name: x.clone() for name, x in one.state_dict().items()}
    go(one, optimizer, range(5, 12))
    other, resumed = build()
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    go(other, resumed, range(5, 12))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["tensor"].correction, resumed.state[b]["tensor"].correction)
