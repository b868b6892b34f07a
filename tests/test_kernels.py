"""The CUDA kernels give what the PyTorch twins give: under Triton's interpreter, and on a GPU where there is one."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mango import MANGO, CompressionConfig, native, noise
from mango.blockwise import NF4_LEVELS
from mango.fused import FusedUpdate
from mango.fused_cuda import NUMBERS, FusedUpdateCUDA, chunk_table, tile_shape
from tests.on_kernels import (
    DEVICE,
    ON_GPU,
    SHAPES,
    build,
    by_kernels,
    by_twins,
    draw,
    gradients,
    kernel_formats,
    kernels,
    left_to_the_twins,
    step_alike,
    steps,
    stored,
    values,
    works,
)  # fmt: skip
from tests.rungs import M8V8

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")              # of the interpreter: 1 / 0 where it is not used


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def compare(
    kind: str, config: CompressionConfig, shapes: list[tuple[int, ...]] = SHAPES, scale: float = 0.1, **options: Any
) -> None:
    """One step by the kernels and one by the twins, from the state that two steps of the twins left."""
    mine, twin = build(kind, config, shapes, **options), build(kind, config, shapes, **options)
    for step in (1, 2):
        for optimizer in (mine, twin):
            by_twins(optimizer, gradients(optimizer, step, scale), step)
    step_alike(mine, twin, gradients(mine, 3, scale), 3)


# ---- formats and rules ----
FORMATS = [(32, 32), (16, 16), (8, 8), (6, 0), (4, 4), (2, 0), (0, 8), (32, 4), (8, 32), (16, 0)]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "v"), FORMATS)
def test_an_update_is_that_of_the_twins_in_every_format(m: int, v: int, kind: str) -> None:
    compare(kind, CompressionConfig(momentum_bits=m, variance_bits=v), weight_decay=0.1)


@pytest.mark.parametrize(("rule", "m"), [("adam", 8), ("sgd", 32), ("sgd", 8), ("sgd", 0), ("lion", 16), ("lion", 6)])
def test_an_update_is_that_of_the_twins_by_every_rule(rule: str, m: int) -> None:
    compare("float32", CompressionConfig(momentum_bits=m, variance_bits=8), rule=rule, weight_decay=0.1, maximize=True)


@pytest.mark.parametrize("kind", ["24", "32"])
def test_corrections_make_master_weights_as_the_twins_do(kind: str) -> None:
    compare(kind, M8V8, weight_decay=0.1)


@pytest.mark.parametrize("config", [(2, 4), (4, 0), (6, 8), (8, 16)])
def test_tensors_of_odd_sizes_are_cut_and_packed_as_the_twins_do(config: tuple[int, int]) -> None:
    compare("bfloat16", CompressionConfig(momentum_bits=config[0], variance_bits=config[1]), [(1,), (7,), (255,), (3, 419)])


def test_a_tensor_of_several_chunks_is_that_of_the_twins() -> None:
    compare("bfloat16", M8V8, [(4096 + 513,)])


def test_factors_of_several_bands_and_tiles_are_those_of_the_twins() -> None:
    assert tile_shape(260, 600) == (512, 2, 3)
    compare("float32", CompressionConfig(momentum_bits=16, variance_bits=0), [(260, 20), (2, 600)])


@pytest.mark.parametrize(("m", "scale"), [(8, 1e-9), (6, 1e-15), (8, 1e4)])
def test_gradients_of_any_magnitude_are_as_good(m: int, scale: float) -> None:
    compare("float32", CompressionConfig(momentum_bits=m, variance_bits=8), scale=scale, eps=0.0)


def test_a_gradient_that_lies_askew_is_read_as_well() -> None:
    """Its address is not a multiple of 16 bytes, as in a bucket of a distributed run."""
    mine, twin = build("float32", M8V8), build("float32", M8V8)
    askew = [torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(g.shape) for g in gradients(mine, 1)]
    assert all(g.data_ptr() % 16 for g in askew) and all(FusedUpdateCUDA.accepts(g) for g in askew)
    step_alike(mine, twin, askew, 1)


# ---- noise and places ----
def drawn(key: int, start: int) -> Tensor:
    out = torch.empty(512, device=DEVICE)
    draw[(1,)](out, torch.tensor([key], device=DEVICE), torch.tensor([start], device=DEVICE), ROWS=2)
    return out.cpu()


@pytest.mark.parametrize("key", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_the_noise_is_that_of_the_twins(key: int) -> None:
    assert torch.equal(drawn(key, 0), noise.uniform(512, key))


@pytest.mark.parametrize("start", [2**31, 2**32 - 256, 2**32, 5 * 2**32 + 768])
def test_the_noise_is_that_of_the_twins_far_into_a_tensor(start: int) -> None:
    key, golden, expected = 77, 0x9E3779B9, []
    for at in (start, start + 256):
        base = (noise.split(key, at >> 32) if at >> 32 else key) + (at & 0xFFFFFFFF) * golden
        bits = [noise.split(base + lane * golden & 0xFFFFFFFF, 0) for lane in range(128)]
        expected += [b & 0xFFFF for b in bits] + [b >> 16 for b in bits]
    assert drawn(key, start).tolist() == [k * 2.0**-16 + 2.0**-17 for k in expected]


def test_chunks_of_tensors_beyond_2_31_entries_are_counted_in_64_bits() -> None:
    numel = 5 * 2**30 + 3
    table = chunk_table([(0, 10), (7, numel), (9, 1)], 16384)
    assert table.dtype == np.int64 and len(table) == 1 + 327681 + 1
    assert table[0].tolist() == [0, 0] and table[1].tolist() == [7, 0] and table[-1].tolist() == [9, 0]
    assert table[-2].tolist() == [7, 5 * 2**30] and (np.diff(table[1:-1, 1]) == 16384).all()


def test_entries_beyond_2_31_are_updated_where_they_are() -> None:
    """The tensor is said to have 2^33 entries before the 300 that are there, and its addresses are moved down by as many: the
    chunk that begins at 2^33 falls on the 300. Its noise is that of 2^33."""
    far, n = 2**33, 300
    near, away = (build("float32", CompressionConfig(momentum_bits=8, variance_bits=32), [(n,)]) for _ in range(2))
    grads = gradients(near, 1)
    by_kernels(near, grads, 1)
    fused = FusedUpdateCUDA(away.targets, away.statistics, away.seed, strict=True)
    work = works(away, grads)
    assert fused.covers(work[0].target, work[0].state)
    with torch.no_grad():
        plan = fused._plan(work)
        fused._set_hypers(plan.hypers)
        column, bytes_of = fused._column, {"param": 4, "grad": 4, "m_codes": 1, "v_codes": 4}
        for name, size in bytes_of.items():
            plan.host[0, column[name]] -= far * size
        plan.host[0, column["m_scale"]] -= far // 128 * 2
        plan.host[0, column["numel"]] += far
        table, chunks = torch.tensor(plan.host, device=DEVICE), torch.tensor([[0, far]], device=DEVICE)
        numbers, sums = torch.zeros(1, NUMBERS, device=DEVICE), torch.ones(1, device=DEVICE)
        kernels.prepare[(1,)](table, fused._hyper_table, sums, fused._counts, numbers, WIDTH=1024)
        (combination,) = plan.updates
        kernels.update[(1,)](table, numbers, chunks, fused._clock, fused._levels, sums, **fused._options(combination, False))
    for slot in ("exp_avg", "exp_avg_sq"):
        one, other = (o.state[o.targets[0].param]["tensor"].encoded[slot].parts for o in (near, away))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(near.targets[0].param, away.targets[0].param)


def test_the_cells_of_nf4_hold_one_level_at_most() -> None:
    table = kernel_formats.nf4_table(NF4_LEVELS)
    for cell in range(33):
        level, before, after, number = table[16 + 4 * cell : 20 + 4 * cell]
        for y in np.linspace(max(-1, (cell - 16.5) / 16), min(1, (cell - 15.5) / 16), 9)[1:-1]:
            place = number + (y - level) * (after if y >= level else before)
            assert place == pytest.approx(np.interp(y, NF4_LEVELS, range(16)), abs=1e-9)


# ---- gradients that are not finite, counts of steps ----
def hand_over(mine: MANGO, twin: MANGO) -> None:
    """The twin goes on from where the other is."""
    twin.load_state_dict(mine.state_dict())
    for target, other in zip(mine.targets, twin.targets, strict=True):
        other.param.detach().copy_(target.param.detach())


@pytest.mark.parametrize("bad", [-math.inf, math.nan, 1e30])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone(bad: float) -> None:
    """1e30 is finite, but its square is not, nor would the second moment be."""
    config = CompressionConfig(momentum_bits=4, variance_bits=0)
    mine, twin = build("bfloat16", config), build("bfloat16", config)
    fused = by_kernels(mine, gradients(mine, 1), 1)
    before, other = stored(mine, 0), stored(mine, 1)
    grads = gradients(mine, 2)
    grads[0].view(-1)[17] = bad
    by_kernels(mine, grads, 2, fused)
    assert all(torch.equal(a, b) for a, b in zip(before, stored(mine, 0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(other, stored(mine, 1), strict=True))
    assert mine.statistics.count.tolist() == [1, 2]
    assert fused.settle() == 1 and fused.settle() == 0 and steps(mine) == [1, 2]
    hand_over(mine, twin)
    step_alike(mine, twin, gradients(mine, 3), 3, fused)                       # the bias correction is that of the steps taken


def test_steps_taken_elsewhere_are_known_to_the_device() -> None:
    mine, twin = build("float32", M8V8), build("float32", M8V8)
    fused = by_kernels(mine, gradients(mine, 1), 1)
    fused.settle()
    hand_over(mine, twin)
    for optimizer in (mine, twin):
        by_twins(optimizer, gradients(optimizer, 2), 2)
    step_alike(mine, twin, gradients(mine, 3), 3, fused)
    fused.settle()
    assert steps(mine) == [3, 3]


def test_a_changed_config_and_a_changed_learning_rate_are_followed() -> None:
    mine, twin = build("float32", M8V8), build("float32", M8V8)
    fused = by_kernels(mine, gradients(mine, 1), 1)
    fused.settle()
    hand_over(mine, twin)
    for optimizer in (mine, twin):
        optimizer.apply(CompressionConfig(momentum_bits=16, variance_bits=16))
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-4)
    before = values(twin)
    step_alike(mine, twin, gradients(mine, 2), 2, fused)
    assert float((before[0] - values(mine)[0]).abs().max()) < 2e-4             # it was 1e-2


# ---- statistics ----
def test_statistics_are_those_of_the_cpu_kernels() -> None:
    if native.load() is None:
        pytest.skip("needs the CPU kernels: a C compiler (cc, gcc, clang or $CC), and not MANGO_NATIVE=0")
    if ON_GPU:
        pytest.skip("the CPU kernels take tensors of the CPU")
    mine, other = (build("float32", M8V8, [(70, 65), (300,)], maximize=True) for _ in range(2))
    fused: FusedUpdateCUDA | None = None
    theirs = FusedUpdate(other.targets, other.statistics, other.seed)
    for step in (1, 2):
        grads = gradients(mine, step)
        fused = by_kernels(mine, grads, step, fused)
        with torch.no_grad():
            theirs.run(works(other, grads), step, False)
    assert fused is not None
    with torch.no_grad():
        grads = gradients(mine, 3)
        found, expected = fused.run(works(mine, grads), 3, True), theirs.run(works(other, grads), 3, True)
    for name in ("mean", "square", "previous", "norm", "running_norm", "cosine", "count"):
        a, b = mine.statistics.tensors[name], other.statistics.tensors[name]
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (name, a, b)
    assert (mine.statistics.moved == 0).all()                                  # a probe of this step needs that of the one before
    fused.settle()
    assert np.allclose(mine.statistics.moved.numpy(), expected.moved, rtol=1e-4)
    moves = found.on_host()
    for name in ("finite", "grad_norm", "moved", "param_norm", "alignment"):
        assert np.allclose(getattr(moves, name), getattr(expected, name), rtol=1e-4), name


def test_gradients_that_were_looked_at_before_leave_no_statistics() -> None:
    mine = build("float32", M8V8)
    fused = by_kernels(mine, gradients(mine, 1), 1)
    count = mine.statistics.count.clone()
    with torch.no_grad():
        fused.run(works(mine, gradients(mine, 2), fresh=False), 2, False)
    assert torch.equal(mine.statistics.count, count) and fused.settle() == 0


# ---- without kernels ----
def test_where_a_kernel_does_not_compile_the_twins_step_in_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(FusedUpdateCUDA, "_compile", broken)
    optimizer = left_to_the_twins("no such instruction")
    strict, target = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed, strict=True), optimizer.targets[0]
    with pytest.raises(RuntimeError, match="no such instruction"):
        strict.covers(target, optimizer._state(target))


def test_where_triton_is_missing_the_twins_step_in_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mango.kernels", None)
    monkeypatch.delattr("mango.kernels", raising=False)
    left_to_the_twins("Triton is missing")


def test_subspaces_and_other_dtypes_are_not_covered() -> None:
    optimizer = build("float32", CompressionConfig(rank=4, variance_bits=8), [(40, 40)])
    fused = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed, strict=True)
    assert not fused.covers(optimizer.targets[0], optimizer._state(optimizer.targets[0]))
    assert not FusedUpdateCUDA.accepts(torch.zeros(4, 4).T) and not FusedUpdateCUDA.accepts(torch.zeros(4, dtype=torch.float16))


# ---- the whole optimizer ----
def test_an_optimizer_decides_on_the_kernels_as_on_the_cpu() -> None:
    """Observations, counts and what is stored; and it goes on from a state dict as if nothing had been between."""
    generator = torch.Generator().manual_seed(1)
    wanted = [[torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES] for _ in range(6)]
    wanted[4][1][0, 0] = math.inf

    def on_kernels(self: MANGO) -> None:
        self.fused = FusedUpdateCUDA(self.targets, self.statistics, self.seed, strict=True)

    def run(on_cpu: bool = False, pause: bool = False) -> MANGO:
        with pytest.MonkeyPatch.context() as patch:
            if not on_cpu:
                patch.setattr(MANGO, "new_fused", on_kernels)
            optimizer = build("float32", M8V8, policy_update_freq=3)
            for step, grads in enumerate(wanted):
                for target, grad in zip(optimizer.targets, grads, strict=True):
                    target.param.grad = grad.to(DEVICE, copy=True)
                optimizer.observe_loss(1.0 / (1 + step))
                optimizer.step()
                if pause:
                    optimizer.load_state_dict(optimizer.state_dict())
        optimizer.skipped += optimizer.fused.settle()
        return optimizer

    mine, paused, other = run(), run(pause=True), run(on_cpu=True)
    assert torch.equal(mine.observe(), paused.observe()) and mine.skipped == paused.skipped == other.skipped == 1
    assert all(torch.equal(a, b) for i in range(2) for a, b in zip(stored(mine, i), stored(paused, i), strict=True))
    assert torch.allclose(mine.observe(), other.observe(), rtol=1e-2, atol=1e-2) and steps(mine) == steps(other) == [6, 5]
