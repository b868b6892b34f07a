"""Peak memory of a real training run, and the largest model that fits under a cap: MANGO beside AdamW.

    python -m benchmarks.memory --width 768 --depth 12 --out benchmarks/results/memory.json

Each method trains a GPT for a few steps in a process of its own, after it trained a tiny one, so that what libraries load at
their first use is not counted. On a CPU the peak is the growth of resident memory since then (VmHWM after clear_refs), on
CUDA torch's own peak; both hold weights, gradients, states and all temporaries, over a batch so small that activations
hardly count. Beside it stands what is counted: bytes of parameters, gradients and states. The largest model under
`--cap-mib` is found by bisection over the width on counted bytes. Under `--measured-cap-mib` it is found on measured ones:
each probe trains a model of a width for two steps in a process of its own, and fits if its peak does.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from benchmarks.record import parse, stamp, write
from mango import MANGO, CompressionConfig
from mango_env.workloads.text import Transformer

CONTEXT, HEADS = 64, 4
WIDTH_STEP, WIDTH_LIMIT = 16, 2048                      # of the measured bisection


@dataclass(frozen=True)
class Args:
    width: int = 768
    depth: int = 12
    steps: int = 3
    threads: int = 2                                    # torch threads
    cap_mib: int = 1024                                 # for the largest model by counted bytes
    measured_cap_mib: int = 512                         # for the largest model by measured peaks; 0: not sought
    measured_depth: int = 6                             # blocks of that model
    bisected: str = "adamw_fp32,adamw_bf16,mango_m4v0_release,mango_m2v0_release"  # whose largest model is measured
    device: str = "cpu"                                 # "cpu" or "cuda"
    only: str = ""                                      # one method, in this process: used by the program itself
    out: Path = Path("benchmarks/results/memory.json")


@dataclass(frozen=True)
class Method:
    dtype: torch.dtype
    build: Callable[[torch.nn.Module], Optimizer]
    what: str


def mango(config: CompressionConfig, **options: Any) -> Callable[[torch.nn.Module], Optimizer]:
    return lambda model: MANGO(model.named_parameters(), lr=1e-4, policy=config, policy_update_freq=10**9, **options)


def rung(momentum: int, variance: int, gradient: int = 32) -> CompressionConfig:
    return CompressionConfig(momentum_bits=momentum, variance_bits=variance, gradient_bits=gradient)


RELEASED: dict[str, Any] = {"release_gradients": True, "error_feedback": False}
METHODS: dict[str, Method] = {
    "adamw_fp32": Method(torch.float32, lambda m: AdamW(m.parameters(), lr=1e-4, fused=True), "torch AdamW, float32"),
    "adamw_bf16": Method(torch.bfloat16, lambda m: AdamW(m.parameters(), lr=1e-4, fused=True), "torch AdamW, all bfloat16"),
    "mango_m8v8": Method(torch.bfloat16, mango(rung(8, 8)), "8-bit moments, bfloat16 parameters rounded by chance"),
    "mango_m4v0": Method(torch.bfloat16, mango(rung(4, 0)), "NF4 and factors, bfloat16 parameters rounded by chance"),
    "mango_m4v0_24": Method(torch.bfloat16, mango(rung(4, 0), master_bits=24), "the same with 24-bit master weights"),
    "mango_m4v0_release": Method(torch.bfloat16, mango(rung(4, 0, 4), **RELEASED), "NF4, factors, gradients released at 4 bits"),
    "mango_m2v0_release": Method(torch.bfloat16, mango(rung(2, 0, 4), **RELEASED), "2-bit momentum, factors, released"),
}  # fmt: skip


def resident() -> int:
    """Peak resident bytes since `clear`."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def clear() -> int:
    """Start a new peak; returns the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def held_bytes(model: torch.nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """Bytes of gradients and of the optimizer's state as they are now; gradients that it holds encoded are in the latter."""
    dense = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    if isinstance(optimizer, MANGO):
        return dense, optimizer.state_bytes()
    return dense, sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())


def descend(method: Method, width: int, depth: int, steps: int, device: torch.device) -> dict[str, int]:
    """Train a model of this size: its parameters, its bytes, and the most bytes of gradients and states."""
    with torch.device(device):
        torch.set_default_dtype(method.dtype)           # never hold a float32 copy of a bfloat16 model
        model = Transformer(width, depth, HEADS, CONTEXT)
        torch.set_default_dtype(torch.float32)
    optimizer = method.build(model)
    gradients = states = 0
    for _ in range(steps):
        symbols = torch.randint(90, (1, CONTEXT + 1), device=device)
        optimizer.zero_grad()
        logits = model(symbols[:, :-1]).float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        before = held_bytes(model, optimizer)
        optimizer.step()
        after = held_bytes(model, optimizer)
        gradients, states = max(gradients, before[0]), max(states, before[1], after[1])
    weights, numel = sum(p.numel() * p.element_size() for p in model.parameters()), sum(p.numel() for p in model.parameters())
    return {"parameters": numel, "weights": weights, "gradients": gradients, "states": states}


def one(args: Args) -> dict[str, Any]:
    """Train by one method in this process."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    method = METHODS[args.only]
    torch.manual_seed(0)
    descend(method, 64, 1, 2, device)                   # what libraries load at their first use is not the training's
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = clear()
    held = descend(method, args.width, args.depth, args.steps, device)
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else resident() - before
    numel, parts = held["parameters"], {name: held[name] for name in ("weights", "gradients", "states")}
    return {
        "method": args.only, "what": method.what, "parameters": numel, "peak_bytes_per_param": peak / numel,
        "counted_bytes_per_param": sum(parts.values()) / numel, "weights_bytes_per_param": parts["weights"] / numel,
        "gradient_bytes_per_param": parts["gradients"] / numel, "state_bytes_per_param": parts["states"] / numel,
    }  # fmt: skip


def measured(args: Args, name: str) -> dict[str, Any]:
    """The same in a process of its own."""
    shared = [f.name for f in fields(Args) if f.name not in ("only", "out")]
    options = [f"--{option.replace('_', '-')}={getattr(args, option)}" for option in shared]
    command = [sys.executable, "-m", "benchmarks.memory", *options, "--only", name]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def largest(bytes_per_param: float, cap: int) -> dict[str, int]:
    """The widest GPT of 12 blocks, in steps of 64, whose counted bytes fit: its width and parameters."""

    def parameters(width: int) -> int:
        return 12 * (12 * width**2 + 13 * width) + 2 * 97 * width + 2 * width

    low, high = 1, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(64 * middle) * bytes_per_param <= cap else (low, middle)
    return {"width": 64 * low, "parameters": parameters(64 * low)}


def widest(peak: Callable[[int], float], cap: float, step: int, limit: int) -> int:
    """The largest multiple of `step` below `limit` whose `peak` is at most `cap`, by bisection; 0 where none is.

    >>> widest(lambda width: width**2, 1000**2, 16, 2048)
    992
    """
    low, high = 0, limit // step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(step * middle) <= cap else (low, middle)
    return step * low


def largest_measured(args: Args, name: str) -> dict[str, Any]:
    """The widest GPT whose measured peak fits under the cap, and the peak of the next one, which does not."""
    probes: dict[int, dict[str, Any]] = {}

    def peak(width: int) -> float:
        probes[width] = measured(replace(args, width=width, depth=args.measured_depth, steps=2), name)
        return float(probes[width]["peak_bytes_per_param"] * probes[width]["parameters"])

    width = widest(peak, args.measured_cap_mib * 2**20, WIDTH_STEP, WIDTH_LIMIT)
    if width not in probes:
        raise ValueError(f"no model of {name} fits under {args.measured_cap_mib} MiB; give a larger --measured-cap-mib")
    best, over = probes[width], probes.get(width + WIDTH_STEP)
    mib = {w: p["peak_bytes_per_param"] * p["parameters"] / 2**20 for w, p in probes.items()}
    return {
        "method": name, "width": width, "parameters": best["parameters"], "peak_bytes_per_param": best["peak_bytes_per_param"],
        "peak_mib": mib[width], "next_peak_mib": mib[width + WIDTH_STEP] if over else None, "probes": len(probes),
    }  # fmt: skip


def train(args: Args) -> Path:
    rows = []
    for name in METHODS:
        row = measured(args, name)
        row["largest_under_cap"] = largest(row["counted_bytes_per_param"], args.cap_mib * 2**20)
        rows.append(row)
        times = row["largest_under_cap"]["parameters"] / rows[0]["largest_under_cap"]["parameters"]
        row["largest_over_adamw"] = times
        print(f"{name:22s} peak {row['peak_bytes_per_param']:6.2f}  counted {row['counted_bytes_per_param']:6.2f} B/param"
              f"  largest model {times:.1f}x AdamW's", flush=True)  # fmt: skip
    found: list[dict[str, Any]] = []
    for name in filter(None, args.bisected.split(",") if args.measured_cap_mib else []):
        row = largest_measured(args, name)
        found.append(row | {"over_adamw": row["parameters"] / (found or [row])[0]["parameters"]})
        print(f"{name:22s} width {row['width']:5d}: {row['parameters']:12,} parameters peak at {row['peak_mib']:.0f} MiB,"
              f" {found[-1]['over_adamw']:.2f}x {found[0]['method']}", flush=True)  # fmt: skip
    return write(args.out, stamp(args) | {"rows": rows, "largest_measured": found})


def main() -> None:
    args = parse(Args, __doc__)
    if args.only:
        print(json.dumps(one(args)))
        return
    print(f"wrote {train(args)}")


if __name__ == "__main__":
    main()
