"""Time, bandwidth and memory of one optimizer step on a GPU, against torch's AdamW and against a copy, in one run.

    python benchmarks/gpu_step.py --out benchmarks/results/gpu_step.json

The tensors are those of a transformer in bfloat16, 1 billion parameters by default. All optimizers live in one process and
take turns; each turn's order is reversed every other round; ratios are medians over rounds of one round's times. AdamW comes
in two kinds: with parameters, gradients and moments in float32 (28 bytes moved per parameter), and all in bfloat16 (14). One
with bfloat16 parameters and float32 moments, which torch does not have, would move 22: `ratio_floor` is to the time that a
copy of that many bytes takes. Bandwidth counts the bytes that must be moved, gradients twice, as they are looked at first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.record import median_error, parse, stamp, write
from mango import MANGO, CompressionConfig

FLOOR_BYTES = 22                                        # per parameter: 2 x (2 + 4 + 4) read and written, 2 of gradient read


@dataclass(frozen=True)
class Args:
    params: int = 1_000_000_000                         # parameters, about
    width: int = 2048                                   # of the transformer
    rounds: int = 9                                     # turns of every optimizer
    steps: int = 5                                      # steps per turn
    seed: int = 0                                       # of parameters and gradients
    out: Path = Path("benchmarks/results/gpu_step.json")


def shapes_of(params: int, width: int) -> list[tuple[int, ...]]:
    """Blocks of a transformer, with norms, until there are `params` parameters or one block more, and an embedding."""
    block: list[tuple[int, ...]] = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block += [(width,), (width,)]
    vocabulary = min(32_000, max(1, params // (4 * width)))
    each = sum(torch.Size(shape).numel() for shape in block)
    depth = max(1, round((params - vocabulary * width) / each))
    return [(vocabulary, width), *(block * depth)]


def optimizers() -> dict[str, tuple[torch.dtype, Callable[[list[Tensor]], Optimizer]]]:
    """What takes turns, and on parameters of which dtype. Fixed configs, so that deciding plays no part."""

    def mango(momentum: int, variance: int, **options: Any) -> Callable[[list[Tensor]], Optimizer]:
        options |= {"policy": CompressionConfig(momentum_bits=momentum, variance_bits=variance), "policy_update_freq": 10**9}
        return lambda params: MANGO(params, memory_budget=1 << 40, strict=True, **options)

    half, single = torch.bfloat16, torch.float32
    return {
        "adamw_fused_float32": (single, lambda params: AdamW(params, fused=True)),
        "adamw_fused_bfloat16": (half, lambda params: AdamW(params, fused=True)),
        "mango_32_32": (half, mango(32, 32)),
        "mango_16_16": (half, mango(16, 16)),
        "mango_8_8": (half, mango(8, 8)),
        "mango_8_8_master24": (half, mango(8, 8, master_bits=24)),
        "mango_6_factored": (half, mango(6, 0)),
        "mango_4_4": (half, mango(4, 4)),
        "mango_4_factored": (half, mango(4, 0)),
        "mango_0_factored": (half, mango(0, 0)),
    }


def timed(call: Callable[[], object], times: int) -> float:
    """Milliseconds per call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / times


def copy_bandwidth(rounds: int) -> float:
    """Bytes per millisecond, read and written, of a copy that no cache holds."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), 5) for _ in range(rounds + 1)][1:]
    return 2 * source.numel() / median(times)


def moved_bytes(optimizer: Optimizer, params: list[Tensor]) -> int:
    """What a step must read and write: parameters and state both, gradients once, or twice where they are looked at first."""
    values = sum(p.numel() * p.element_size() for p in params)
    if isinstance(optimizer, MANGO):
        return 2 * values + 2 * values + 2 * (optimizer.state_bytes() - optimizer.statistics.nbytes)
    return 2 * values + values + 2 * 2 * values


def measure(args: Args) -> dict[str, dict[str, Any]]:
    """Per optimizer: ms per step, ratios to both AdamW and the floor, share of a copy's bandwidth, memory."""
    shapes = shapes_of(args.params, args.width)
    generator = torch.Generator("cuda").manual_seed(args.seed)
    gradients = {dtype: [torch.randn(s, generator=generator, device="cuda").mul_(1e-3).to(dtype) for s in shapes]
                 for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
    copied = copy_bandwidth(args.rounds)
    alive: dict[str, Optimizer] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, (dtype, build) in optimizers().items():
        params = [torch.zeros(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
        for param, gradient in zip(params, gradients[dtype], strict=True):
            param.grad = gradient                               # shared: no optimizer changes it
        alive[name] = build(params)
        first = timed(alive[name].step, 1)
        torch.cuda.synchronize()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        alive[name].step()
        torch.cuda.synchronize()
        optimizer, numel = alive[name], sum(p.numel() for p in params)
        own = optimizer.state_bytes() if isinstance(optimizer, MANGO) else 2 * numel * params[0].element_size()
        rows[name] = {
            "first_ms": first,
            "state_bytes_per_param": own / numel,
            "moved_bytes_per_param": moved_bytes(optimizer, params) / numel,
            "step_peak_bytes_per_param": (torch.cuda.max_memory_allocated() - resident) / numel,
        }
    times: dict[str, list[float]] = {name: [] for name in alive}
    for number in range(args.rounds):
        for name in list(alive)[:: -1 if number % 2 else 1]:
            alive[name].step()
            times[name].append(timed(alive[name].step, args.steps))
    count = sum(torch.Size(shape).numel() for shape in shapes)
    for name, row in rows.items():
        middle = median(times[name])
        row |= {"ms": middle, "ms_min": min(times[name]), "ms_max": max(times[name])}
        row["bandwidth_share"] = row["moved_bytes_per_param"] * count / middle / copied
        row["ratio_floor"] = middle * copied / (FLOOR_BYTES * count)
        for kind in ("float32", "bfloat16"):
            ratios = [a / b for a, b in zip(times[name], times[f"adamw_fused_{kind}"], strict=True)]
            row |= {f"ratio_{kind}": median(ratios), f"ratio_{kind}_se": median_error(ratios)}
    return rows | {"copy": {"bytes_per_ms": copied, "parameters": count}}


def train(args: Args) -> Path:
    rows = measure(args)
    copied = rows.pop("copy")
    print(f"{copied['parameters']:,.0f} parameters; a copy moves {copied['bytes_per_ms'] / 1e6:,.0f} GB/s\n")
    heads = ("x fp32", "x bf16", "x floor", "of copy", "B/param", "peak B")
    print(f"{'':22s} {'ms':>8s} " + " ".join(f"{head:>7s}" for head in heads))
    for name, row in rows.items():
        columns = ("ratio_float32", "ratio_bfloat16", "ratio_floor", "bandwidth_share", "state_bytes_per_param",
                   "step_peak_bytes_per_param")  # fmt: skip
        print(f"{name:22s} {row['ms']:8.2f} " + " ".join(f"{row[column]:7.2f}" for column in columns))
    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    steps = [{"optimizer": name} | row for name, row in rows.items()]
    return write(args.out, stamp(args) | {"device": device, "copy": copied, "steps": steps})


def main() -> None:
    args = parse(Args, __doc__)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_step measures a GPU, and torch sees no CUDA device here")
    train(args)


if __name__ == "__main__":
    main()
