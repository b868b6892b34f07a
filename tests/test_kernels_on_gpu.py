"""The CUDA kernels on a GPU: they compile for one without one, and where there is one they neither wait nor dawdle."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from mango import MANGO, CompressionConfig
from mango.fused_cuda import FusedUpdateCUDA
from tests.on_kernels import DEVICE, ON_GPU, steps, stored, triton, works
from tests.rungs import M8V8

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


# ---- what a GPU would run ----
COMPILE = """
import re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mango import kernels
from mango.fused_cuda import Combination, FusedUpdateCUDA
tool, types = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", {"table": "*i64", "chunks": "*i64", "clock": "*i64"}
chunk = type("Chunk", (), {"_chunk": 16384})
for pair in sys.argv[1:]:
    m, v = map(int, pair.split("/"))
    options = FusedUpdateCUDA._options(chunk, Combination(0, 1, 1, m, v, 0, False, True, True), False)
    launch = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion", "maxnreg")}
    names = kernels.update.arg_names
    signature = {name: "constexpr" if name in options else types.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in options}
    source = ASTSource(kernels.update, signature, options, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    Path("made.cubin").write_bytes(made.asm["cubin"])
    used = subprocess.run([tool, "-res-usage", "made.cubin"], capture_output=True, text=True, check=True).stdout
    wide = [made.asm["ptx"].count(access + ".global.v4.b32") for access in ("ld", "st")]
    print(m, v, re.search(r"STACK:([0-9]+)", used)[1], *wide)
"""


def compiled(tmp_path: Path, *pairs: str) -> list[list[int]]:
    """Of each pair of formats: the two, bytes of the stack, and how many loads and stores are of 16 bytes."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not all((tools / name).exists() for name in ("ptxas", "cuobjdump")):
        pytest.skip("this build of Triton comes without ptxas and cuobjdump")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", COMPILE, *pairs]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
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
def many(config: CompressionConfig, numel: int = 1 << 26) -> MANGO:
    """Eight bfloat16 matrices with gradients."""
    params = [Parameter(torch.randn(numel // 8 // 1024, 1024, device=DEVICE, dtype=torch.bfloat16)) for _ in range(8)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return MANGO(params, policy=config, policy_update_freq=10**6, memory_budget="16GiB")


def ready(optimizer: MANGO) -> tuple[FusedUpdateCUDA, list[Tensor]]:
    """Its kernels, compiled, and its gradients."""
    fused = FusedUpdateCUDA(optimizer.targets, optimizer.statistics, optimizer.seed, strict=True)
    grads = [t.param.grad for t in optimizer.targets if t.param.grad is not None]
    assert all(fused.covers(w.target, w.state) for w in works(optimizer, grads))
    return fused, grads


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("config", [M8V8, CompressionConfig(momentum_bits=6, variance_bits=0)])
def test_a_step_does_not_wait_for_the_device(config: CompressionConfig) -> None:
    optimizer = many(config)
    fused, grads = ready(optimizer)
    with torch.no_grad():
        fused.run(works(optimizer, grads), 1, False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2, 5):
                fused.run(works(optimizer, [g.clone() for g in grads]), step, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert fused.settle() == 0 and set(steps(optimizer)) == {4}


@pytest.mark.gpu
@needs_gpu
def test_a_step_can_be_captured_with_a_learning_rate_on_the_device() -> None:
    mine, other = many(M8V8, 1 << 22), many(M8V8, 1 << 22)
    lr, graph = torch.tensor(1e-3, device=DEVICE), torch.cuda.CUDAGraph()
    for a, b in zip(other.targets, mine.targets, strict=True):
        a.param.detach().copy_(b.param.detach())
        a.param.grad = b.param.grad
        a.group["lr"] = b.group["lr"] = lr
    (captured, grads), (live, _) = ready(mine), ready(other)
    with torch.no_grad():
        for fused, optimizer in ((captured, mine), (live, other)):
            fused.run(works(optimizer, grads), 1, False)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured.run(works(mine, grads), 2, False)
        for step in (2, 3, 4):
            lr.mul_(0.5)
            graph.replay()
            live.run(works(other, grads), step, False)
    captured.settle()
    assert all(torch.equal(a, b) for i in range(8) for a, b in zip(stored(mine, i), stored(other, i), strict=True))
    assert set(steps(mine)) == {4}


@pytest.mark.gpu
@needs_gpu
def test_a_step_at_8_bits_takes_no_longer_than_fused_adamw_in_float32() -> None:
    """It moves less than half the bytes. Large enough that launching plays no part; the median of turns."""
    mine = many(M8V8, 1 << 28)
    params = [Parameter(t.param.detach().float()) for t in mine.targets]
    fused, grads = ready(mine)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.float()
    adamw = torch.optim.AdamW(params, fused=True)
    times: dict[str, list[float]] = {"mine": [], "adamw": []}
    for step in range(1, 12):
        for name in times:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            with torch.no_grad():
                fused.run(works(mine, grads), step, False) if name == "mine" else adamw.step()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    assert np.median(times["mine"][3:]) <= np.median(times["adamw"][3:])
