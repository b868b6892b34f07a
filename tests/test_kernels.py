"""The CUDA kernels give what the PyTorch twins give: under Triton's interpreter, and on a GPU where there is one."""

import math
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, master, native, noise
from mango.blockwise import NF4_LEVELS
from mango.codecs import Encoded
from mango.fused import FusedUpdate, Work
from mango.fused_cuda import NUMBERS, SMALL, FusedUpdateCUDA, chunk_table, tile_shape
from tests.rungs import M8V8
from tests.test_native import EPS, agree, flips, twins

if find_spec("triton") is None:
    pytest.skip("the CUDA kernels are written in Triton, which is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and "triton" in sys.modules:
    pytest.skip("Triton was loaded before, and not to be interpreted: run this file by itself", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    if not ON_GPU:
        _patch.setenv("TRITON_INTERPRET", "1")
    import triton
    import triton.language as tl

    from mango import kernel_formats, kernels

    @triton.jit
    def draw(out, keys, starts, ROWS: tl.constexpr):
        bits = kernel_formats.hashes(tl.load(keys).to(tl.uint32), tl.load(starts), ROWS)
        tl.store(out + kernel_formats.places(ROWS, 0, 1), kernel_formats.share_of(bits, 0))
        tl.store(out + kernel_formats.places(ROWS, 1, 1), kernel_formats.share_of(bits, 1))


DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES: list[tuple[int, ...]] = [(5, 65), (3, 128)]
KINDS = {"float32": (torch.float32, 16), "bfloat16": (torch.bfloat16, 16), "24": (torch.bfloat16, 24), "32": (torch.bfloat16, 32)}
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")              # numpy's, of the interpreter: 1 / 0 where it is not used


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def build(kind: str, config: CompressionConfig, shapes: list[tuple[int, ...]] = SHAPES, **options: Any) -> MANGO:
    """An optimizer whose decisions play no part. Steps are taken by `by_twins` and `by_kernels`."""
    dtype, bits = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]
    common: dict[str, Any] = {"lr": 0.01, "min_numel": 1, "policy_update_freq": 10**6, "memory_budget": "1GiB", "master_bits": bits}
    return MANGO(params, policy=config, **(common | options))


def gradients(optimizer: MANGO, step: int, scale: float = 0.1) -> list[Tensor]:
    """Normal ones with some zeros among them, in float32."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for target in optimizer.targets:
        grad = torch.randn(target.param.shape, generator=generator) * scale
        found.append(grad.masked_fill(torch.rand(grad.shape, generator=generator) < 0.1, 0.0).to(DEVICE, target.param.dtype).float())
    return found


def by_twins(optimizer: MANGO, grads: list[Tensor], step: int) -> None:
    optimizer.steps = step
    with twins(), torch.no_grad():
        for target, grad in zip(optimizer.targets, grads, strict=True):
            optimizer.update_parameter(Work(target, optimizer._state(target), grad, False, torch.zeros(())))


def works(optimizer: MANGO, grads: list[Tensor], fresh: bool = True) -> list[Work]:
    return [Work(t, optimizer._state(t), g, fresh, torch.zeros(())) for t, g in zip(optimizer.targets, grads, strict=True)]


def by_kernels(optimizer: MANGO, grads: list[Tensor], step: int, fused: FusedUpdateCUDA | None = None) -> FusedUpdateCUDA:
    optimizer.steps = step
    fused = fused or FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed, strict=True)
    work = works(optimizer, [g.to(t.param.dtype) for t, g in zip(optimizer.targets, grads, strict=True)])
    assert all(fused.covers(w.target, w.state) and fused.accepts(w.gradient) for w in work)
    with torch.no_grad():
        fused.run(work, step, measure=False)
    return fused


def on_cpu(encoded: Encoded) -> Encoded:
    return Encoded(encoded.codec, encoded.shape, {name: part.cpu() for name, part in encoded.parts.items()})


def values(optimizer: MANGO) -> list[Tensor]:
    """The parameters in float32."""
    states = [optimizer.state[t.param].get("tensor") for t in optimizer.targets]
    return [master.join(t.param, s and s.correction).clone().cpu() for t, s in zip(optimizer.targets, states, strict=True)]


def same(mine: MANGO, twin: MANGO, before: list[Tensor]) -> None:
    """After one step from one state: before rounding a parameter differs by the last bits of a quotient, afterwards by one unit
    where those decide; codes by one level, where they decide."""
    for i, (a, b, start) in enumerate(zip(values(mine), values(twin), before, strict=True)):
        target, other = mine.targets[i], twin.targets[i]
        gap, most = (a - b).abs(), (b - start).abs().max()
        close = gap <= 4 * EPS * b.abs() + 1e-5 * most
        unit = {16: 2.0**-7, 24: 2.0**-15, 32: 0.0}[mine.master_bits] if target.param.dtype == torch.bfloat16 else 0.0
        assert int((~close).sum()) <= flips(a.numel()) * (unit > 0), (i, float(gap.max()), float(most))
        assert (close | (gap <= unit * torch.maximum(a.abs(), b.abs()))).all()
        own, its = mine.state[target.param]["tensor"], twin.state[other.param]["tensor"]
        assert own.step == its.step and own.encoded.keys() == its.encoded.keys()
        for slot, enc in its.encoded.items():
            if enc.codec in ("float32", "factored"):
                for name, part in enc.parts.items():
                    atol = 1e-6 * float(part.abs().max()) if slot == "exp_avg" else 0.0
                    assert torch.allclose(own.encoded[slot].parts[name], part, rtol=1e-5, atol=atol), (slot, name)
            else:
                agree(on_cpu(own.encoded[slot]), on_cpu(enc))


def compare(kind: str, config: CompressionConfig, shapes: list[tuple[int, ...]] = SHAPES, scale: float = 0.1, **options: Any) -> None:
    """One step by the kernels and one by the twins, from a state that two steps of the twins made."""
    mine, twin = build(kind, config, shapes, **options), build(kind, config, shapes, **options)
    for step in (1, 2):
        for optimizer in (mine, twin):
            by_twins(optimizer, gradients(optimizer, step, scale), step)
    before = values(twin)
    by_kernels(mine, gradients(mine, 3, scale), 3)
    by_twins(twin, gradients(twin, 3, scale), 3)
    same(mine, twin, before)


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
    before, grads = values(twin), gradients(twin, 1)
    askew = [torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(g.shape) for g in grads]
    assert all(g.data_ptr() % 16 for g in askew) and all(FusedUpdateCUDA.accepts(g) for g in askew)
    by_kernels(mine, askew, 1)
    by_twins(twin, grads, 1)
    same(mine, twin, before)


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
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone(bad: float) -> None:
    """1e30 is finite, but its square is not, nor would the second moment be."""
    config = CompressionConfig(momentum_bits=4, variance_bits=0)
    mine, twin = build("bfloat16", config), build("bfloat16", config)
    fused = by_kernels(mine, gradients(mine, 1), 1)
    by_twins(twin, gradients(twin, 1), 1)
    spoilt = mine.targets[0]
    before = [spoilt.param.clone(), *(p.clone() for e in mine.state[spoilt.param]["tensor"].encoded.values() for p in e.parts.values())]
    grads = gradients(mine, 2)
    grads[0].view(-1)[17] = bad
    by_kernels(mine, grads, 2, fused)
    after = [spoilt.param, *(p for e in mine.state[spoilt.param]["tensor"].encoded.values() for p in e.parts.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert mine.statistics.count.tolist() == [1, 2]
    assert fused.settle() == 1 and fused.settle() == 0
    assert [mine.state[t.param]["tensor"].step for t in mine.targets] == [1, 2]
    for target in twin.targets[1:]:
        twin.steps = 2
        with twins(), torch.no_grad():
            twin.update_parameter(Work(target, twin._state(target), grads[1], False, torch.zeros(())))
    start = values(twin)
    by_kernels(mine, gradients(mine, 3), 3, fused)                             # the bias correction is that of the steps taken
    by_twins(twin, gradients(twin, 3), 3)
    gaps = [(a - b).abs() for a, b in zip(values(mine), values(twin), strict=True)]
    for gap, b in zip(gaps, values(twin), strict=True):
        assert int((gap > 1e-4 * (b - start[0].new_zeros(())).abs()).sum()) <= flips(gap.numel()) + 0.02 * gap.numel()


def test_steps_taken_elsewhere_are_known_to_the_device() -> None:
    mine, twin = build("float32", M8V8), build("float32", M8V8)
    fused = by_kernels(mine, gradients(mine, 1), 1)
    fused.settle()
    twin.load_state_dict(mine.state_dict())
    for target, other in zip(mine.targets, twin.targets, strict=True):
        other.param.detach().copy_(target.param.detach())
    for optimizer in (mine, twin):
        by_twins(optimizer, gradients(optimizer, 2), 2)
    before = values(twin)
    by_kernels(mine, gradients(mine, 3), 3, fused)
    by_twins(twin, gradients(twin, 3), 3)
    same(mine, twin, before)
    assert [mine.state[t.param]["tensor"].step for t in mine.targets] == [3, 3]
    fused.settle()
    assert [mine.state[t.param]["tensor"].step for t in mine.targets] == [3, 3]


def test_a_changed_config_and_changed_numbers_are_followed() -> None:
    mine, twin = build("float32", M8V8), build("float32", M8V8)
    fused = by_kernels(mine, gradients(mine, 1), 1)
    fused.settle()
    twin.load_state_dict(mine.state_dict())
    for target, other in zip(mine.targets, twin.targets, strict=True):
        other.param.detach().copy_(target.param.detach())
    for optimizer in (mine, twin):
        optimizer.apply(CompressionConfig(momentum_bits=16, variance_bits=16))
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-4)
    before = values(twin)
    by_kernels(mine, gradients(mine, 2), 2, fused)
    by_twins(twin, gradients(twin, 2), 2)
    same(mine, twin, before)
    assert float((before[0] - values(mine)[0]).abs().max()) < 2e-4               # it was 1e-2


# ---- statistics ----
def test_statistics_are_those_of_the_cpu_kernels() -> None:
    if native.load() is None:
        pytest.skip("needs the CPU kernels: a C compiler (cc, gcc, clang or $CC), and not MANGO_NATIVE=0")
    if ON_GPU:
        pytest.skip("the CPU kernels take tensors of the CPU")
    mine, other = build("float32", M8V8, [(70, 65), (300,)], maximize=True), build("float32", M8V8, [(70, 65), (300,)], maximize=True)
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
        moves, expected = fused.run(works(mine, grads), 3, True).on_host(), theirs.run(works(other, grads), 3, True)
    for name in ("finite", "grad_norm", "moved", "param_norm", "alignment"):
        assert np.allclose(getattr(moves, name), getattr(expected, name), rtol=1e-4), name
    for name in ("mean", "square", "previous", "norm", "running_norm", "cosine", "count"):
        a, b = mine.statistics.tensors[name], other.statistics.tensors[name]
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (name, a, b)
    assert np.allclose(mine.statistics.moved.numpy(), expected.moved, rtol=1e-4)


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
    optimizer = build("float32", M8V8)
    work = works(optimizer, gradients(optimizer, 1))
    fused = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed)
    with pytest.warns(UserWarning, match="no such instruction"):
        assert not fused.covers(work[0].target, work[0].state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(fused.covers(w.target, w.state) for w in work)
    strict = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed, strict=True)
    with pytest.raises(RuntimeError, match="no such instruction"):
        strict.covers(work[0].target, work[0].state)


def test_where_triton_is_missing_the_twins_step_in_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mango.kernels", None)
    monkeypatch.delattr("mango.kernels", raising=False)
    optimizer = build("float32", M8V8)
    work = works(optimizer, gradients(optimizer, 1))
    fused = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed)
    with pytest.warns(UserWarning, match="Triton is missing"):
        assert not fused.covers(work[0].target, work[0].state)
    assert not fused.covers(work[1].target, work[1].state) and fused.settle() == 0


def test_subspaces_and_other_dtypes_are_not_covered() -> None:
    optimizer = build("float32", CompressionConfig(rank=4, variance_bits=8), [(40, 40)])
    fused = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed, strict=True)
    assert not fused.covers(optimizer.targets[0], optimizer._state(optimizer.targets[0]))
    assert not FusedUpdateCUDA.accepts(torch.zeros(4, 4).T) and not FusedUpdateCUDA.accepts(torch.zeros(4, dtype=torch.float16))


# ---- what a GPU would run ----
COMPILE = """
import re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mango import kernels
from mango.fused_cuda import Combination, FusedUpdateCUDA
types = {"table": "*i64", "chunks": "*i64", "clock": "*i64"}
for m, v in (tuple(map(int, pair.split("/"))) for pair in sys.argv[1:]):
    fake = type("Fused", (), {"_chunk": 16384})
    options = FusedUpdateCUDA._options(fake, Combination(0, 1, 1, m, v, 0, False, True, True), False)
    launch = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion", "maxnreg")}
    names = kernels.update.arg_names
    signature = {name: "constexpr" if name in options else types.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in options}
    made = triton.compile(ASTSource(kernels.update, signature, options, aligned), target=GPUTarget("cuda", 90, 32), options=launch)
    Path("made.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    used = subprocess.run([tool, "-res-usage", "made.cubin"], capture_output=True, text=True, check=True).stdout
    print(m, v, re.search(r"STACK:([0-9]+)", used)[1], made.asm["ptx"].count("ld.global.v4.b32"), made.asm["ptx"].count("st.global.v4.b32"))
"""


def compiled(tmp_path: Path, *pairs: str) -> list[list[int]]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not all((tools / name).exists() for name in ("ptxas", "cuobjdump")):
        pytest.skip("this build of Triton comes without ptxas and cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, "-c", COMPILE, *pairs], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [[int(number) for number in line.split()] for line in result.stdout.splitlines()]


def test_the_8_bit_kernel_compiles_for_an_h100_with_wide_accesses_and_nothing_spilt(tmp_path: Path) -> None:
    """Gradient and parameter are read, and the parameter written, 16 bytes at a time, in two halves of a tile."""
    assert compiled(tmp_path, "2/5") == [[2, 5, 0, 4, 2]]


@pytest.mark.slow
def test_all_kernels_of_the_ladder_compile_for_an_h100_and_nothing_is_spilt(tmp_path: Path) -> None:
    pairs = ("0/0", "1/1", "1/5", "3/7", "3/6", "8/7", "8/5", "9/7", "4/6")
    assert [row[2] for row in compiled(tmp_path, *pairs)] == [0] * len(pairs)


# ---- on a GPU ----
def many(config: CompressionConfig, numel: int = 1 << 26, **options: Any) -> MANGO:
    params = [Parameter(torch.randn(numel // 8, 8 // 8, device=DEVICE, dtype=torch.bfloat16).view(-1, 4096)) for _ in range(8)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return MANGO(params, policy=config, policy_update_freq=10**6, memory_budget="16GiB", **options)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("config", [M8V8, CompressionConfig(momentum_bits=4, variance_bits=0)])
def test_a_step_does_not_wait_for_the_device(config: CompressionConfig) -> None:
    optimizer = many(config)
    fused = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed, strict=True)
    grads = [t.param.grad for t in optimizer.targets if t.param.grad is not None]
    work = works(optimizer, grads)
    assert all(fused.covers(w.target, w.state) for w in work)
    with torch.no_grad():
        fused.run(work, 1, False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2, 5):
                fused.run(works(optimizer, [g.clone() for g in grads]), step, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert fused.settle() == 0 and {w.state.step for w in work} == {4}


@pytest.mark.gpu
@needs_gpu
def test_a_step_can_be_captured_with_a_learning_rate_on_the_device() -> None:
    mine, other = many(M8V8, 1 << 22), many(M8V8, 1 << 22)
    lr = torch.tensor(1e-3, device=DEVICE)
    for optimizer in (mine, other):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for a, b in zip(other.targets, mine.targets, strict=True):
            a.param.detach().copy_(b.param.detach())
            a.param.grad = b.param.grad
    ways = [FusedUpdateCUDA(o.targets, o.statistics, o.seed, strict=True) for o in (mine, other)]
    grads = [t.param.grad for t in mine.targets if t.param.grad is not None]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for fused, optimizer in zip(ways, (mine, other), strict=True):
            assert all(fused.covers(w.target, w.state) for w in works(optimizer, grads))
            fused.run(works(optimizer, grads), 1, False)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            ways[0].run(works(mine, grads), 2, False)
        for step in (2, 3, 4):
            lr.mul_(0.5)
            graph.replay()
            ways[1].run(works(other, grads), step, False)
    torch.cuda.synchronize()
    assert all(torch.equal(a.param, b.param) for a, b in zip(mine.targets, other.targets, strict=True))
    ways[0].settle()
    assert {mine.state[t.param]["tensor"].step for t in mine.targets} == {4}


@pytest.mark.gpu
@needs_gpu
def test_a_step_at_8_bits_takes_no_longer_than_fused_adamw() -> None:
    """Half the bytes are moved (optimizers.md: 0.55). The median of interleaved rounds; large enough that launching plays no part."""
    mine = many(M8V8, SMALL * 16)
    params = [Parameter(t.param.detach().clone()) for t in mine.targets]
    states = [Parameter(p.detach().float()) for p in params]                   # fp32 moments, as mixed-precision training keeps them
    for state, target in zip(states, mine.targets, strict=True):
        assert target.param.grad is not None
        state.grad = target.param.grad.float()
    adamw = torch.optim.AdamW(states, fused=True)
    fused = FusedUpdateCUDA(mine.targets, mine.statistics, mine.seed, strict=True)
    grads = [t.param.grad for t in mine.targets if t.param.grad is not None]
    times: dict[str, list[float]] = {"mine": [], "adamw": []}
    assert all(fused.covers(w.target, w.state) for w in works(mine, grads))
    with torch.no_grad():
        for step in range(1, 12):
            for name, call in (("mine", lambda: fused.run(works(mine, grads), step, False)), ("adamw", adamw.step)):  # noqa: B023
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(end))
    assert np.median(times["mine"][3:]) <= np.median(times["adamw"][3:])
