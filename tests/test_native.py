"""The CPU kernels give what their PyTorch twins give: the same codes, the same updates, with any number of threads."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, master, native, noise
from mango.blockwise import unpack6
from mango.codecs import CODECS, Encoded, encode, unpack
from mango.config import FULL
from mango.fused import FusedUpdate
from tests.rungs import M8V8

FORMATS = {                # bits, block
    "signed8": (8, 128), "lognormal6": (6, 64), "nf4": (4, 64), "ternary2": (2, 64), "unsigned8": (8, 256), "log4": (4, 128),
}  # fmt: skip
SIZES = [0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4097, 70001]
# Share of entries so close to a tie that another rounding of a root or quotient decides: nearest 8-bit codes take a root that
# is off by 2^-14, of 127 bins.
FLIPS = 1.2e-3
EPS = 2.0**-23


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    if os.environ.get("MANGO_NATIVE") == "0" or native.load() is None:
        pytest.skip("needs the CPU kernels: a C compiler (cc, gcc, clang or $CC), and not MANGO_NATIVE=0")


@contextmanager
def twins() -> Iterator[None]:
    """Without kernels inside: everything by the PyTorch twins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda strict=False: None)
        yield


def codes_of(enc: Encoded) -> Tensor:
    bits, _ = FORMATS[enc.codec]
    codes = enc.parts["codes"]
    n = int(torch.tensor(enc.shape).prod())
    if bits == 6:                                            # sign and magnitude
        found = unpack6(codes, n).int()
        return torch.where(found > 31, 32 - found, found)
    return (codes if bits == 8 else unpack(codes, bits, n)).int()


def flips(n: int) -> float:
    """How many of `n` entries may flip: the expected number, six deviations, and a pair of equal neighbours."""
    return FLIPS * n + 6 * math.sqrt(FLIPS * n) + 2


def agree(mine: Encoded, twin: Encoded) -> None:
    """Codes a level apart at most, and in `FLIPS` of the entries; so are bfloat16 scales, which take their block along."""
    n = int(torch.tensor(twin.shape).prod())
    assert (mine.codec, mine.shape) == (twin.codec, twin.shape) and mine.nbytes == twin.nbytes
    if mine.codec == "bfloat16":
        a, b = mine.parts["values"].reshape(-1), twin.parts["values"].reshape(-1)
        apart = a != b
        assert int(apart.sum()) <= flips(n)
        assert ((a.float() - b.float()).abs() <= 2.0**-7 * b.float().abs() + 1e-40)[apart].all()
        return
    _, block = FORMATS[mine.codec]
    moved = torch.zeros(-(-n // block), dtype=torch.bool)
    for name in (name for name in twin.parts if name.startswith("scale")):
        a, b = mine.parts[name], twin.parts[name]
        if a.dtype == torch.float32:
            assert torch.allclose(a, b, rtol=1e-5, atol=0)
        else:
            moved |= a != b
            units = torch.int16 if a.dtype == torch.bfloat16 else torch.uint8
            assert ((a.view(units).int() - b.view(units).int()).abs() <= (units == torch.int16)).all()
    assert int(moved.sum()) <= 0.01 * len(moved) + 1
    apart = (codes_of(mine) - codes_of(twin)).abs()
    assert apart.numel() == 0 or int(apart.max()) <= 1
    still = ~moved.repeat_interleave(block)[:n]
    assert int((apart[still] > 0).sum()) <= flips(n)


def sample(n: int, name: str, exponent: float, seed: int = 0) -> Tensor:
    """Normal values and, among them, zeros, equal neighbours and values much smaller than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x[torch.rand(n, generator=generator) < 0.1] = 0
    x[1::7] = x[::7][: len(x[1::7])]
    x[3::11] *= 1e-4
    x = (x * math.pow(10.0, exponent)).float()
    if name not in ("unsigned8", "log4"):
        return x
    return x.square() if exponent > -16 else x.abs()


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16"])
@pytest.mark.parametrize("key", [None, 12345])
@pytest.mark.parametrize("n", SIZES)
def test_a_kernel_encodes_as_its_twin_does(name: str, key: int | None, n: int) -> None:
    for exponent in (-30, -12, 0, 10) if n < 5000 else (0,):
        x = sample(n, name, exponent, seed=n)
        mine, twin = encode(CODECS[name], x, key), CODECS[name].encode(x, key)
        agree(mine, twin)
        decoded = CODECS[name].decode(mine)
        assert (decoded[x == 0] == 0).all() and decoded.isfinite().all()


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16"])
@pytest.mark.parametrize("n", SIZES)
def test_a_kernel_decodes_as_its_twin_does(name: str, n: int) -> None:
    for exponent in (-30, 0, 10) if n < 5000 else (0,):
        twin = CODECS[name].encode(sample(n, name, exponent, seed=n), 7)
        mine, expected = twin.decode(), CODECS[name].decode(twin)
        assert torch.allclose(mine, expected, rtol=1e-5 if name == "log4" else 0, atol=0)  # exp and log are another library's


ODD = {
    "zeros": torch.zeros(300),
    "denormals": torch.linspace(0, 1, 300) * 1e-39,
    "least denormals": torch.full((300,), 1e-45),
    "one entry": torch.nn.functional.one_hot(torch.tensor(257), 300).float() * 3,
    "constant": torch.full((300,), 0.37),
    "huge": torch.linspace(0, 1, 300) * 1e37,
    "wide": torch.logspace(-38, 37, 300),
}


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16"])
@pytest.mark.parametrize("key", [None, 3])
@pytest.mark.parametrize("kind", ODD)
def test_kernels_and_twins_agree_on_odd_values(name: str, key: int | None, kind: str) -> None:
    x = ODD[kind] if name in ("unsigned8", "log4") else ODD[kind] * torch.tensor([1.0, -1.0, -1.0]).repeat(100)
    mine, twin = encode(CODECS[name], x, key), CODECS[name].encode(x, key)
    agree(mine, twin)
    decoded = mine.decode()
    assert decoded.isfinite().all() and (decoded[x == 0] == 0).all() and (decoded * x >= 0).all()
    if name in ("unsigned8", "log4") and kind not in ("denormals", "least denormals"):
        assert torch.equal(decoded > 0, x > 0)


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16"])
def test_kernels_take_views_and_other_dtypes(name: str) -> None:
    base = sample(24 * 30, name, 0).view(24, 30)
    for view in (base.T, base[::2, 1::3], base[:, 0], base.to(torch.bfloat16), base.double(), base.half()):
        dense = view.detach().float().clone(memory_format=torch.contiguous_format)
        one, other = encode(CODECS[name], view, 5), encode(CODECS[name], dense, 5)
        assert one.shape == tuple(view.shape) and torch.equal(one.decode(), other.decode())


SHAPES: list[tuple[int, ...]] = [(37, 53), (300,), (1,), (4, 3, 3, 3), (2, 257)]
KINDS = {"float32": (torch.float32, 16), "bfloat16": (torch.bfloat16, 16), "24": (torch.bfloat16, 24), "32": (torch.bfloat16, 32)}
DENSE = ("mean", "square", "previous", "norm", "running_norm", "cosine", "count", "moved")


def build(kind: str, config: CompressionConfig, **options: Any) -> tuple[list[Parameter], MANGO]:
    dtype, bits = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    common: dict[str, Any] = {"lr": 0.01, "min_numel": 1, "policy_update_freq": 3, "memory_budget": "1MiB"}
    return params, MANGO(params, policy=config, master_bits=bits, **common, **options)


def feed(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * 0.1
        param.grad = grad.masked_fill(torch.rand(param.shape, generator=generator) < 0.1, 0.0).to(param.dtype)


def same_moves(mine: MANGO, twin: MANGO, before: list[Tensor]) -> None:
    """Before rounding a parameter differs by the last bits of a quotient; after it, by one unit where that decides."""
    for target, other, start in zip(mine.targets, twin.targets, before, strict=True):
        states = mine.state[target.param]["tensor"], twin.state[other.param]["tensor"]
        a, b = (master.join(t.param, s.correction) for t, s in zip((target, other), states, strict=True))
        gap, most = (a - b).abs(), (b - start).abs().max()
        close = gap <= 4 * EPS * b.abs() + 1e-5 * most
        unit = {16: 2.0**-7, 24: 2.0**-15, 32: 0.0}[mine.master_bits] if target.param.dtype == torch.bfloat16 else 0.0
        assert int((~close).sum()) <= flips(a.numel()) * (unit > 0), (target.name, float(gap.max()))
        assert (close | (gap <= unit * torch.maximum(a.abs(), b.abs()))).all()
        assert states[0].step == states[1].step
        for slot, enc in states[1].encoded.items():
            own = states[0].encoded[slot]
            if enc.codec in ("float32", "factored"):
                for name, part in enc.parts.items():
                    atol = 1e-6 * float(part.abs().max()) if slot == "exp_avg" else 0.0
                    assert torch.allclose(own.parts[name], part, rtol=1e-5, atol=atol)
            else:
                agree(own, enc)


COMBINATIONS = [(rule, m, v) for rule in ("adamw", "adam") for m in (32, 16, 8, 6, 4, 2, 0) for v in (32, 16, 8, 4, 0)]
COMBINATIONS += [(rule, m, 32) for rule in ("sgd", "lion") for m in (32, 16, 8, 6, 4, 2, 0)]


@pytest.mark.parametrize(("rule", "m", "v"), COMBINATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_update_is_that_of_pytorch(rule: str, m: int, v: int, kind: str) -> None:
    """Step by step from one state: what differs by a tie once does not add up."""
    both: dict[str, Any] = {"weight_decay": 0.1, "maximize": True}
    for options in ({"weight_decay": 0.1}, {"maximize": True}) if kind == "float32" else (both,):
        config = CompressionConfig(momentum_bits=m, variance_bits=v)
        params, mine = build(kind, config, rule=rule, **options)
        others, twin = build(kind, config, rule=rule, **options)
        for step in range(3):
            feed(params, step)
            feed(others, step)
            before = [master.join(p, mine.state[p]["tensor"].correction if step else None).clone() for p in params]
            assert step == 0 or all(FusedUpdate.covers(t, mine.state[t.param]["tensor"]) for t in mine.targets)
            mine.step()
            with twins():
                twin.step()
            same_moves(mine, twin, before)
            for name in DENSE:
                a, b = mine.statistics.tensors[name], twin.statistics.tensors[name]
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name
            twin.load_state_dict(mine.state_dict())
            for a, b in zip(params, others, strict=True):
                b.detach().copy_(a)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-17, 1e-9, 1e-3, 1e3, "mixed"])
@pytest.mark.parametrize(("rule", "decay"), [("adamw", 0.0), ("adamw", 0.1), ("adam", 0.0)])
@pytest.mark.parametrize(("m", "v"), [(8, 8), (8, 0), (4, 0)])
def test_moments_are_updated_in_registers_as_in_pytorch(m: int, v: int, rule: str, decay: float, scale: float | str) -> None:
    """Whole blocks between decisions, in which nothing is measured; "mixed" has blocks of all these sizes side by side."""
    shape, config, generator = (16, 160), CompressionConfig(momentum_bits=m, variance_bits=v), torch.Generator().manual_seed(1)
    sizes = torch.tensor([0.0, 1e-30, 1e-17, 1e-9, 1e-3, 1e3])
    params = [Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    options: dict[str, Any] = {"policy": config, "rule": rule, "weight_decay": decay, "min_numel": 1, "policy_update_freq": 1000}
    mine, twin = (MANGO([param], lr=1e-2, **options) for param in params)
    for step in range(6):
        grad = torch.randn(shape, generator=generator)
        grad = (grad.view(-1, 128) * (sizes[torch.arange(20) % 6, None] if scale == "mixed" else float(scale))).view(shape)
        for param in params:
            param.grad = grad.masked_fill(torch.arange(160) % 7 == step, 0.0)
        before = [params[0].detach().clone()]
        mine.step()
        with twins():
            twin.step()
        same_moves(mine, twin, before)
        twin.load_state_dict(mine.state_dict())
        params[1].detach().copy_(params[0])


def test_the_error_that_a_probe_finds_on_a_window_is_that_of_the_tensor() -> None:
    """Of 4,096 like entries the window has 1,024: the estimates differ by the sampling error, some 10 %."""
    found = []
    for kernels in (True, False):
        param = Parameter(torch.zeros(64, 64))
        with pytest.MonkeyPatch.context() as patch:
            if not kernels:
                patch.setattr(native, "load", lambda strict=False: None)
            optimizer = MANGO([param], policy=CompressionConfig(momentum_bits=4, variance_bits=4), policy_update_freq=5)
            for step in range(5):
                feed([param], step)
                optimizer.step()
        found.append(optimizer.observe())
    names = [f for f in range(64) if not torch.allclose(found[0][:, f], found[1][:, f], rtol=1e-3, atol=0.1)]
    assert not names


THREADS = """
import hashlib, sys, torch
from mango import MANGO, CompressionConfig
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
shapes = (350, 400), (150_001,), (3, 70_000), *[(40, 30)] * 6
for rule, m, v in [("adamw", b, b) for b in (32, 16, 8, 4)] + [("adam", 2, 0), ("lion", 6, 0), ("sgd", 8, 0)]:
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
        config = CompressionConfig(momentum_bits=m, variance_bits=v)
        optimizer = MANGO(params, rule=rule, policy=config, policy_update_freq=9, weight_decay=0.1)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            optimizer.step()
        for p in params:
            digest.update(p.detach().view(torch.uint8).numpy().tobytes())
            for enc in optimizer.state[p]["tensor"].encoded.values():
                for part in enc.parts.values():
                    digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def python(program: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own: kernels are loaded once per process."""
    own = {key: value for key, value in os.environ.items() if key not in ("MANGO_NATIVE", "CC", "OMP_NUM_THREADS")} | environment
    command = [sys.executable, "-c", program, *args]
    return subprocess.run(command, capture_output=True, text=True, env=own, check=False, timeout=300)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    found = [python(THREADS, threads) for threads in ("1", "2")]
    assert [run.returncode for run in found] == [0, 0], found[0].stderr
    assert found[0].stdout == found[1].stdout and len(found[0].stdout) == 65


SMALL = """
import sys, warnings, torch
from mango import MANGO, CompressionConfig, native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        param = torch.nn.Parameter(torch.ones(40, 40))
        optimizer = MANGO([param], policy=CompressionConfig(momentum_bits=8, variance_bits=8))
        for _ in range(3):
            param.grad = torch.ones(40, 40)
            optimizer.step()
    assert (param < 1).all() and param.isfinite().all()
try:
    MANGO([param], strict=True)
    strict = "fine"
except native.CompileError as error:
    strict = "raised"
print(native._load.cache_info().misses, native.load() is not None, len(caught), strict, *[str(w.message) for w in caught])
"""


def test_kernels_can_be_turned_off() -> None:
    run = python(SMALL, MANGO_NATIVE="0")
    assert run.stdout.strip() == "1 False 0 raised", run.stderr


def test_without_a_compiler_all_works_with_one_warning_and_strict_raises(tmp_path: Path) -> None:
    run = python(SMALL, CC=str(tmp_path / "nonexistent"), MANGO_CACHE=str(tmp_path / "cache"))
    assert run.stdout.startswith("1 False 1 raised MANGO's CPU kernels are not available"), run.stdout + run.stderr
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho no such architecture >&2; exit 1\n")
    broken.chmod(0o755)
    run = python(SMALL, CC=str(broken), MANGO_CACHE=str(tmp_path / "cache"))
    assert run.stdout.startswith("1 False 1 raised") and "no such architecture" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("fault", ["garbage", "file", "read only", "compiler with options"])
def test_a_broken_cache_folder_does_not_matter(fault: str, tmp_path: Path) -> None:
    cache, environment = tmp_path / "cache", {}
    if fault == "file":
        cache.write_text("not a folder")
    elif fault == "garbage":
        library = native.build(cache)
        library.write_bytes(b"not a library")
    elif fault == "read only":
        cache.mkdir()
        cache.chmod(0o500)
    else:
        environment["CC"] = "cc -pipe"
    run = python(SMALL, MANGO_CACHE=str(cache), **environment)
    assert run.stdout.strip() == "1 True 0 fine", run.stdout + run.stderr


INSIDE = """
#include "SOURCE"
uint32_t at_base(uint32_t key, int64_t start) { return block_key(key, start); }
void at_decode(int format, void *codes, void *scale, void *low, int64_t start, float *out) {
    decode(format, codes, scale, low, start, BLOCK, out);
}
void at_encode(int format, void *codes, void *scale, void *low, int64_t start, const float *x, uint32_t key, uint32_t chance) {
    encode(format, codes, scale, low, start, BLOCK, x, key, chance);
}
void at_update(Job *job, int64_t start) {
    Part part = {1.0f, 0, 0, 0, 0};
    Ahead none = {0};
    update_range(job, start, start + 2 * BLOCK, &part, &none);
}
"""
FAR = 3 * 2**40 + 256 * 1000                                 # a position in a tensor of 3 * 10^12 entries


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions inside native.c."""
    folder = tmp_path_factory.mktemp("inside")
    (folder / "inside.c").write_text(INSIDE.replace("SOURCE", str(native.SOURCE)))
    if not (compiler := os.environ.get("CC") or shutil.which("cc")):
        pytest.skip("needs a C compiler")
    command = [compiler, *"-std=gnu11 -O2 -march=native -fPIC -shared -w inside.c -o inside.so -lm".split()]
    subprocess.run(command, cwd=folder, check=True)
    library: Any = ctypes.CDLL(str(folder / "inside.so"))
    p, i64, u32, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int
    library.at_base.argtypes, library.at_base.restype = [u32, i64], u32
    library.at_decode.argtypes = [i32, p, p, p, i64, p]
    library.at_encode.argtypes = [i32, p, p, p, i64, p, u32, u32]
    library.at_update.argtypes = [p, i64]
    return library


def shifted(parts: dict[str, Tensor], codec: str, start: int) -> list[int]:
    """Addresses such that entry `start` of the tensor is the first of these parts: nothing of that size is allocated."""
    entries = native._FORMATS[codec][1]
    found = []
    for name, part in parts.items():
        each, own, _ = entries[name]
        address = (part.data_ptr() - start * own // each * part.element_size()) % 2**64
        found.append(address - 2**64 if address >= 2**63 else address)
    return found + [0] * (3 - len(found))


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16", "float32"])
def test_kernels_reach_entries_beyond_two_to_the_forty(name: str, inside: Any) -> None:
    x = sample(256, name, 0)
    number = native.format_number(name)
    near, far = native.empty_parts(name, 256), native.empty_parts(name, 256)
    for chance in (0, 1):
        key = inside.at_base(99, FAR)
        inside.at_encode(number, *shifted(near, name, 0), 0, x.data_ptr(), key, chance)
        inside.at_encode(number, *shifted(far, name, FAR), FAR, x.data_ptr(), 99, chance)
        assert all(torch.equal(near[part], far[part]) for part in near)
    out = torch.zeros(2, 256)
    inside.at_decode(number, *shifted(near, name, 0), 0, out[0].data_ptr())
    inside.at_decode(number, *shifted(far, name, FAR), FAR, out[1].data_ptr())
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], Encoded(name, (256,), near).decode())


@pytest.mark.parametrize("start", [0, 256, 2**31, 2**32 - 256, 2**32, 2**33 + 512, FAR])
def test_kernels_and_twins_draw_the_same_noise_beyond_two_to_the_thirty_two(start: int, inside: Any) -> None:
    for key in (0, 1, 2**32 - 1):
        assert inside.at_base(key, start) == int(noise._bases(torch.tensor([start]), key)) & 0xFFFFFFFF


@pytest.mark.parametrize("v", ["float32", "log4", "unsigned8", "factored"])
def test_updates_reach_entries_beyond_two_to_the_forty(v: str, inside: Any) -> None:
    """Rounded to nearest, since the noise of another position is another."""
    columns, results = 512, []
    start = 3 * 2**40
    for at in (0, start):
        param, grad = sample(512, "", 0, 1), sample(512, "", 0, 2)
        exp_avg = encode(CODECS["signed8"], sample(512, "", 0, 3))
        job = np.zeros(1, native.JOB)
        job["numel"], job["columns"], job["scale"], job["window"] = at + 512, columns, 1.0, 1.0
        job["param"], job["grad"] = param.data_ptr() - 4 * at, grad.data_ptr() - 4 * at
        job["lr"], job["beta1"], job["beta2"], job["correction1"], job["correction2"], job["eps"] = 0.1, 0.9, 0.99, 0.5, 0.5, 1e-8
        job["m_format"], job["v_format"] = native.format_number("signed8"), native.format_number(v)
        job["m_codes"], job["m_scale"], _ = shifted(exp_avg.parts, "signed8", at)
        if v == "factored":
            parts = {"values_row": torch.ones(1), "values_column": sample(512, "log4", 0, 4)}
            job["v_codes"], job["v_scale"] = parts["values_row"].data_ptr() - at // columns * 4, parts["values_column"].data_ptr()
        else:
            parts = encode(CODECS[v], sample(512, "log4", 0, 4)).parts
            job["v_codes"], job["v_scale"], job["v_low"] = shifted(parts, v, at)
        inside.at_update(job.ctypes.data, at)
        results.append([param, *exp_avg.parts.values(), *parts.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], sample(512, "", 0, 1))


def test_a_changed_parameter_is_noticed() -> None:
    """Backward through weights from before the step is an error, and so is a shape that the state does not have."""
    param = Parameter(torch.ones(40, 40))
    optimizer = MANGO([param])
    loss = param.square().sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
    param.grad = None
    param.data = torch.ones(8, 8)
    param.grad = torch.ones(8, 8)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


@pytest.mark.parametrize("bits", [16, 32])
def test_a_model_that_changes_its_dtype_goes_on(bits: int) -> None:
    layer = torch.nn.Linear(40, 40)
    optimizer = MANGO(layer.parameters(), lr=0.1, master_bits=bits, policy=CompressionConfig(momentum_bits=8, variance_bits=8))
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float16):
        layer.to(dtype)
        for _ in range(2):
            before = layer.weight.detach().clone()
            layer(torch.ones(2, 40, dtype=dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = (layer.weight - before).abs()
            assert 0 < moved.max() < 0.3 and layer.weight.isfinite().all()


@pytest.mark.parametrize("config", [FULL, M8V8], ids=lambda c: c.name)
@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced"])
def test_gradients_of_any_layout_are_read_as_they_are(kind: str, config: CompressionConfig) -> None:
    base = torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
    gradient = {"transposed": base[:40, :40].T, "expanded": base[:1, :40].expand(40, 40), "sliced": base[::2, ::2]}[kind]
    mine, theirs = Parameter(torch.zeros(40, 40)), Parameter(torch.zeros(40, 40))
    one, other = MANGO([mine], policy=config), MANGO([theirs], policy=config)
    for _ in range(3):
        mine.grad, theirs.grad = gradient, gradient.contiguous().clone()
        one.step()
        other.step()
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-8)
