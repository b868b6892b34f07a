"""What the tests of the CUDA kernels share. Imported, it loads Triton: to be interpreted, where there is no GPU."""

import sys
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig, master
from mango.codecs import Encoded
from mango.fused import Work
from mango.fused_cuda import FusedUpdateCUDA
from tests.rungs import M8V8
from tests.test_native import EPS, agree, flips, twins

if find_spec("triton") is None:
    pytest.skip("the CUDA kernels are written in Triton, which is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
if not ON_GPU and "triton" in sys.modules:
    pytest.skip("Triton was loaded before, and not to be interpreted: run these tests by themselves", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    if not ON_GPU:
        _patch.setenv("TRITON_INTERPRET", "1")
    import triton as triton
    import triton.language as tl

    from mango import kernel_formats as kernel_formats
    from mango import kernels as kernels

    @triton.jit  # type: ignore[untyped-decorator]
    def draw(out, keys, starts, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The noise of two rows from entry `starts` on."""
        bits = kernel_formats.hashes(tl.load(keys).to(tl.uint32), tl.load(starts), ROWS)
        tl.store(out + kernel_formats.places(ROWS, 0, 1), kernel_formats.share_of(bits, 0))
        tl.store(out + kernel_formats.places(ROWS, 1, 1), kernel_formats.share_of(bits, 1))


DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES: list[tuple[int, ...]] = [(5, 65), (3, 128)]
KINDS = {"float32": (torch.float32, 16), "bfloat16": (torch.bfloat16, 16), "24": (torch.bfloat16, 24), "32": (torch.bfloat16, 32)}


def build(kind: str, config: CompressionConfig, shapes: list[tuple[int, ...]] = SHAPES, **options: Any) -> MANGO:
    """An optimizer whose decisions play no part. Steps are taken by `by_twins` and `by_kernels`."""
    dtype, bits = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]
    common: dict[str, Any] = {"lr": 0.01, "min_numel": 1, "policy_update_freq": 10**6, "memory_budget": "1GiB"}
    return MANGO(params, policy=config, master_bits=bits, **(common | options))


def gradients(optimizer: MANGO, step: int, scale: float = 0.1) -> list[Tensor]:
    """Normal ones with some zeros among them, in float32."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for target in optimizer.targets:
        grad = torch.randn(target.param.shape, generator=generator) * scale
        grad = grad.masked_fill(torch.rand(grad.shape, generator=generator) < 0.1, 0.0)
        found.append(grad.to(DEVICE, target.param.dtype).float())
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
    """After one step from one state: before rounding a parameter differs by the last bits of a quotient, afterwards by a unit
    where those decide, and so do codes by a level."""
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


def step_alike(mine: MANGO, twin: MANGO, grads: list[Tensor], step: int, fused: FusedUpdateCUDA | None = None) -> None:
    """From one state: `mine` takes a step by the kernels, `twin` by the twins, and they are the `same` after it."""
    before = values(twin)
    by_kernels(mine, grads, step, fused)
    by_twins(twin, grads, step)
    same(mine, twin, before)


def left_to_the_twins(why: str) -> MANGO:
    """An optimizer nothing of which the kernels cover, for a reason that they tell once."""
    optimizer = build("float32", M8V8)
    work = works(optimizer, gradients(optimizer, 1))
    fused = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed)
    with pytest.warns(UserWarning, match=why):
        assert not fused.covers(work[0].target, work[0].state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(fused.covers(w.target, w.state) for w in work)
    assert fused.settle() == 0
    return optimizer


def stored(optimizer: MANGO, i: int) -> list[Tensor]:
    """Copies of a parameter and of all that is kept for it."""
    param = optimizer.targets[i].param
    state = optimizer.state[param]["tensor"]
    return [param.detach().clone(), *(part.clone() for enc in state.encoded.values() for part in enc.parts.values())]


def steps(optimizer: MANGO) -> list[int]:
    return [optimizer.state[target.param]["tensor"].step for target in optimizer.targets]
