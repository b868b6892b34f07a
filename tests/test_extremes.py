"""Gradients and tensors of every odd kind, in every rung and rule: nothing breaks, nothing moves that should not."""

import copy
import math
import os
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cosine_similarity

from mango import MANGO, CompressionConfig, master
from mango.codecs import CODECS, matrix_shape
from mango.config import FULL, KNOBS, LADDER
from mango.formats import index_bits
from mango.state import StorageOptions, predicted_bytes
from mango.statistics import sample_stride
from tests.rungs import M2V0, M4V4, M8V8, R8, SPARSE

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
thorough = settings(max_examples=1000 if NIGHTLY else 12, deadline=None)
RULES = ("adamw", "adam", "sgd", "lion", "muon")
CONFIGS = [*LADDER.rungs, SPARSE, CompressionConfig(gradient_bits=2, momentum_bits=6, variance_bits=4)]
SHAPES: list[tuple[int, ...]] = [(24, 20), (300,), (1,), (), (3, 2, 5, 5)]


def direct(config: CompressionConfig, scale: float, steps: int = 30, **options: Any) -> Tensor:
    """The last of some updates from zero weights, at gradients of a scale."""
    param = Parameter(torch.zeros(96, 96))
    optimizer = MANGO([param], lr=1e-3, policy=config, **options)
    before = param.detach().clone()
    for step in range(steps):
        before = param.detach().clone()
        param.grad = torch.randn(96, 96, generator=torch.Generator().manual_seed(step)) * scale
        optimizer.step()
    return param.detach() - before


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("m", "v", "norm"), [(8, 8, 0.02), (8, 4, 0.1), (4, 4, 0.1), (6, 8, 0.1)])
def test_updates_are_adamw_s_at_any_scale_of_the_gradients(m: int, v: int, norm: float, scale: float) -> None:
    """With an eps below all of them; at 4 bits the direction is as good as at scale one."""
    config = CompressionConfig(momentum_bits=m, variance_bits=v)
    ideal = direct(FULL, scale, eps=1e-12 * min(1.0, scale))
    moved, at_one = direct(config, scale, eps=1e-12 * min(1.0, scale)), direct(config, 1.0, eps=1e-12)
    assert abs(float(moved.norm() / ideal.norm()) - 1) < norm
    cosine, expected = (float(cosine_similarity(x.flatten(), ideal.flatten(), dim=0)) for x in (moved, at_one))
    assert cosine > expected - 0.01 and cosine > (0.999 if m == 8 and v == 8 else 0.94)  # 4 bits: errors of 0.1 to 0.2 in each


VALUES = st.one_of(
    st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e-45, 1e-40, 3e38, -3e38, 1.0, 1e18]),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@given(values=st.lists(VALUES, min_size=1, max_size=6), constant=st.booleans(), release=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 9))  # fmt: skip
@thorough
def test_no_gradient_leaves_anything_that_is_not_finite(
    rule: str, config: CompressionConfig, values: list[float], constant: bool, release: bool, dtype: torch.dtype, seed: int
) -> None:
    """Parameters, states and observations stay finite; a tensor whose gradient is not stays as it was."""
    params = [Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = MANGO(params, rule=rule, policy=config, min_numel=1, policy_update_freq=2, release_gradients=release,
                      memory_budget="1MiB", seed=seed, master_bits=24 if seed % 2 else 16)  # fmt: skip
    for step, value in enumerate(values):
        generator = torch.Generator().manual_seed(step)
        before = [p.detach().clone() for p in params]
        for param in params:
            noise = torch.randn(param.shape, generator=generator)
            param.grad = (torch.full_like(noise, value) if constant else noise).to(dtype)
            if not constant and step % 2 == 0:
                param.grad.view(-1)[-1] = value
        finite = [p.grad is not None and bool(p.grad.isfinite().all()) for p in params]
        optimizer.step()
        for param, old, good in zip(params, before, finite, strict=True):
            assert param.isfinite().all() and (good or torch.equal(param, old))
            for enc in optimizer.state[param]["tensor"].encoded.values():
                assert enc.decode().isfinite().all()
        assert optimizer.observe().isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("release", [False, True])
def test_empty_tensors_and_single_numbers_are_parameters_too(rule: str, config: CompressionConfig, release: bool) -> None:
    shapes: list[tuple[int, ...]] = [(0,), (0, 7), (7, 0), (), (1,), (1, 1), (1, 5), (5, 1), (2, 3, 0)]
    params = [Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = MANGO(params, rule=rule, policy=config, min_numel=1, policy_update_freq=2, release_gradients=release, lr=0.1)
    for _ in range(5):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.observe().isfinite().all() and optimizer.state_bytes() <= optimizer.memory_budget
    numbers = [p for p in params if p.numel()]
    assert all(p.isfinite().all() for p in numbers) and (params[3] != 1).all() and (params[4] != 1).all()
    optimizer.load_state_dict(optimizer.state_dict())
    for name in KNOBS["momentum_bits"]:
        optimizer.apply(CompressionConfig(momentum_bits=int(name), variance_bits=8))
        optimizer.step()


@pytest.mark.parametrize("rule", ["adamw", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [c for c in LADDER.rungs if not c.rank], ids=lambda c: c.name)
def test_an_entry_without_a_second_moment_does_not_move(rule: str, dtype: torch.dtype, config: CompressionConfig) -> None:
    """Whole rows and columns, so that factors see the zeros too."""
    param = Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = MANGO([param], rule=rule, policy=config, lr=0.1)
    silent = torch.zeros(64, 64, dtype=torch.bool)
    silent[:8], silent[:, :8] = True, True
    for step in range(12):
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).masked_fill(silent, 0.0)
        param.grad = gradient.to(dtype)
        optimizer.step()
    assert (param[silent] == 1).all() and (param[~silent] != 1).float().mean() > 0.9


HUGE: list[tuple[int, ...]] = [(2**31 + 5,), (2**16, 2**15 + 1), (50_000, 30_000), (2**33,), (10**6, 10**6)]


@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_sizes_of_billions_are_counted_exactly(shape: tuple[int, ...]) -> None:
    """The arithmetic alone, against whole numbers."""
    n = math.prod(shape)
    rows, columns = matrix_shape(shape)
    assert rows * columns == n
    per = {"float32": (32, 1, 0), "bfloat16": (16, 1, 0), "signed8": (8, 128, 2), "nf4": (4, 64, 2), "ternary2": (2, 64, 2),
           "unsigned8": (8, 256, 4), "log4": (4, 128, 6), "lognormal6": (6, 64, 3)}  # fmt: skip
    for name, (bits, block, scale) in per.items():
        assert CODECS[name].nbytes(shape) == -(-n * bits // 8) + -(-n // block) * scale, name
    assert CODECS["factored"].nbytes(shape) == 4 * (rows + columns)
    config = CompressionConfig(momentum_bits=8, variance_bits=8)
    assert predicted_bytes(shape, config, StorageOptions()) == CODECS["signed8"].nbytes(shape) + CODECS["unsigned8"].nbytes(shape)
    assert 2 ** index_bits(n) >= n > 2 ** (index_bits(n) - 1)
    stride, count = sample_stride(n, columns)
    assert count == 256 and 0.5 * n < (count - 1) * stride < n and math.gcd(stride, columns) == 1


def test_a_complex_parameter_is_refused_and_its_real_view_is_not() -> None:
    param = torch.zeros(40, 40, dtype=torch.complex64)
    with pytest.raises(TypeError, match="view_as_real"):
        MANGO([Parameter(param)])
    real = Parameter(torch.view_as_real(param))
    optimizer = MANGO([real])
    real.grad = torch.ones_like(real)
    optimizer.step()
    assert (real != 0).all()


CASES: dict[str, dict[str, Any]] = {
    "adamw": {"policy": M4V4},
    "adam": {"policy": M2V0, "rule": "adam", "weight_decay": 0.1},
    "sgd": {"policy": CompressionConfig(momentum_bits=4), "rule": "sgd"},
    "lion": {"policy": CompressionConfig(momentum_bits=6), "rule": "lion", "maximize": True},
    "muon": {"policy": CompressionConfig(momentum_bits=4), "rule": "muon"},
    "rank": {"policy": R8},
    "feedback": {"policy": SPARSE, "residual_bits": 4},
    "random": {"policy": "random", "memory_budget": 0.8},
    "held": {"policy": M4V4, "release_gradients": True},
}


DTYPES = [(torch.float32, 16), *((torch.bfloat16, bits) for bits in (16, 24, 32)), (torch.float16, 16), (torch.float64, 16)]


def model(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((40, 48), (1100,), (5,))]


def go(params: list[Parameter], optimizer: MANGO, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "bits"), DTYPES[:4])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict"])
def test_a_copy_in_the_middle_goes_on_bit_for_bit(name: str, dtype: torch.dtype, bits: int, how: str) -> None:
    options = CASES[name] | {"policy_update_freq": 3, "master_bits": bits, "lr": 1e-2}
    params = model(dtype)
    optimizer = MANGO(params, **options)
    go(params, optimizer, range(7))
    if how == "state dict":
        others = [Parameter(p.detach().clone()) for p in params]
        other = MANGO(others, **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        pair = (params, optimizer)
        others, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for param in params:
        param.grad = None
    go(others, other, range(7, 14))
    go(params, optimizer, range(7, 14))
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        one, two = optimizer.state[a]["tensor"], other.state[b]["tensor"]
        assert (one.correction is None) == (two.correction is None)
        assert one.correction is None or torch.equal(one.correction, two.correction)
        assert all(torch.equal(x.parts[k], two.encoded[slot].parts[k]) for slot, x in one.encoded.items() for k in x.parts)


@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize("after", DTYPES, ids=str)
def test_a_state_goes_over_to_a_model_of_another_dtype(before: tuple[torch.dtype, int], after: tuple[torch.dtype, int]) -> None:
    """Moments are kept as they are; a correction is there exactly where the new parameters have one, and counted."""
    config = M8V8
    params = model(before[0])
    optimizer = MANGO(params, policy=config, master_bits=before[1])
    go(params, optimizer, range(4))
    others = [Parameter(p.detach().to(after[0])) for p in params]
    other = MANGO(others, policy=config, master_bits=after[1])
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(params, others, strict=True):
        one, two = optimizer.state[a]["tensor"], other.state[b]["tensor"]
        assert all(torch.equal(x.decode(), two.encoded[slot].decode()) for slot, x in one.encoded.items())
        dtype = {24: torch.int8, 32: torch.int16}.get(after[1])
        assert (None if two.correction is None else two.correction.dtype) == dtype
        if {after[1], before[1]} == {24, 32}:                # what one keeps beyond the other's bits is lost, no more
            joined = master.join(a, one.correction), master.join(b, two.correction)
            assert ((joined[0] - joined[1]).abs() <= 2.0**-15 * joined[0].abs()).all()
    go(others, other, range(4, 8))
    assert all(p.isfinite().all() and p.dtype == after[0] for p in others)
    assert other.state_bytes() <= other.planned_bytes() <= other.memory_budget
