"""Time of one optimizer step against torch's AdamW, side by side in one run.

    python -m benchmarks.step_time --out benchmarks/results/step_time.json
    python -m benchmarks.step_time --peers 1 --out benchmarks/results/step_time_peers.json        # with the extra [baselines]

Two sets of tensors: the shapes of a 10 M-parameter transformer, and 60 small tensors. All optimizers live in one process
and take turns; each turn's order is reversed every other round; ratios are medians over rounds of one round's times, with the
bootstrap standard error of that median (`_se`).
"""

import time
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


@dataclass(frozen=True)
class Args:
    rounds: int = 7                                     # turns of every optimizer on every set
    steps: int = 3                                      # steps per turn
    threads: int = 1                                    # torch threads
    seed: int = 0                                       # of parameters and gradients
    device: str = "cpu"                                 # "cpu" or "cuda"
    peers: int = 0                                      # 1: bitsandbytes' and torchao's optimizers take turns too
    out: Path = Path("benchmarks/results/step_time.json")


def transformer_shapes(width: int = 512, depth: int = 3, vocabulary: int = 1024) -> list[tuple[int, ...]]:
    """Tensors of a GPT: 10.6 M parameters by default."""
    block: list[tuple[int, ...]] = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    block += [(3 * width,), (width,), (4 * width,), (width,), (width,), (width,), (width,), (width,)]
    return [(vocabulary, width), *(block * depth), (width,), (width,), (vocabulary, width)]


def small_shapes() -> list[tuple[int, ...]]:
    """60 tensors of 32 to 4,096 entries."""
    return [(64, 64), (64,), (32, 32), (32,)] * 15


def peers() -> dict[str, Callable[[list[Tensor]], Optimizer]]:
    """Others' optimizers with compressed state."""
    import bitsandbytes  # type: ignore[import-not-found]
    import torchao.optim  # type: ignore[import-not-found]

    return {
        "bitsandbytes_8bit": lambda params: bitsandbytes.optim.AdamW8bit(params),
        "torchao_8bit": lambda params: torchao.optim.AdamW8bit(params),
        "torchao_4bit": lambda params: torchao.optim.AdamW4bit(params),
    }


def optimizers() -> dict[str, Callable[[list[Tensor]], Optimizer]]:
    """What takes turns. Fixed configs, so that deciding plays no part."""

    def mango(momentum: int, variance: int) -> Callable[[list[Tensor]], Optimizer]:
        config = CompressionConfig(momentum_bits=momentum, variance_bits=variance)
        return lambda params: MANGO(params, policy=config, policy_update_freq=10**9)

    return {
        "adamw_fused": lambda params: AdamW(params, fused=True),
        "adamw_foreach": lambda params: AdamW(params, foreach=True),
        "mango_full": mango(32, 32),
        "mango_8_8": mango(8, 8),
        "mango_4_4": mango(4, 4),
        "mango_4_factored": mango(4, 0),
        "mango_2_factored": mango(2, 0),
        "mango_0_factored": mango(0, 0),
    }


def measure(shapes: list[tuple[int, ...]], args: Args) -> dict[str, dict[str, Any]]:
    """Milliseconds per step, first step, ratios to fused and foreach AdamW, and state bytes per parameter, by optimizer."""
    generator = torch.Generator().manual_seed(args.seed)
    gradients = [(torch.randn(s, generator=generator) * 1e-3).to(args.device) for s in shapes]
    alive: dict[str, Optimizer] = {}
    first: dict[str, float] = {}
    bpp: dict[str, float] = {}
    for name, build in (optimizers() | (peers() if args.peers else {})).items():
        params = [torch.zeros(s, device=args.device, requires_grad=True) for s in shapes]
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.clone()
        alive[name] = build(params)
        first[name] = timed(alive[name], 1, args.device)
        numel = sum(p.numel() for p in params)
        optimizer = alive[name]
        bpp[name] = stored_bytes(optimizer) / numel
    rounds: dict[str, list[float]] = {name: [] for name in alive}
    for number in range(args.rounds):
        for name in list(alive)[:: -1 if number % 2 else 1]:
            rounds[name].append(timed(alive[name], args.steps, args.device))

    def ratios(name: str, other: str) -> list[float]:
        return [a / b for a, b in zip(rounds[name], rounds[other], strict=True)]

    return {
        name: {
            "ms": 1e3 * median(times),
            "ms_min": 1e3 * min(times),
            "ms_max": 1e3 * max(times),
            "first_ms": 1e3 * first[name],
            "ratio_fused": median(ratios(name, "adamw_fused")),
            "ratio_fused_se": median_error(ratios(name, "adamw_fused")),
            "ratio_foreach": median(ratios(name, "adamw_foreach")),
            "ratio_foreach_se": median_error(ratios(name, "adamw_foreach")),
            "state_bytes_per_param": bpp[name],
        }
        for name, times in rounds.items()
    }


def stored_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors; quantised tensors of others count with what is inside them."""
    if isinstance(optimizer, MANGO):
        return optimizer.state_bytes()

    def size(tensor: Tensor) -> int:
        inner = getattr(tensor, "tensor_attrs", None) or getattr(type(tensor), "tensor_attrs", None)
        if inner:
            return sum(size(getattr(tensor, name)) for name in inner)
        return tensor.numel() * tensor.element_size()

    return sum(size(t) for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def timed(optimizer: Optimizer, steps: int, device: str) -> float:
    """Seconds per step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    sets = {"transformer_10M": transformer_shapes(), "small_60": small_shapes()}
    results = {name: measure(shapes, args) for name, shapes in sets.items()}
    for name, rows in results.items():
        print(f"\n{name:18s} {'ms':>8s} {'x fused':>8s} {'s.e.':>6s} {'x foreach':>9s} {'first ms':>9s} {'B/param':>8s}")
        for optimizer, row in rows.items():
            print(f"{optimizer:18s} {row['ms']:8.2f} {row['ratio_fused']:8.2f} {row['ratio_fused_se'] or 0:6.3f}"
                  f" {row['ratio_foreach']:9.2f} {row['first_ms']:9.1f} {row['state_bytes_per_param']:8.3f}")  # fmt: skip
    flat = {name: [{"optimizer": optimizer} | row for optimizer, row in rows.items()] for name, rows in results.items()}
    return write(args.out, stamp(args) | flat)


def main() -> None:
    train(parse(Args, __doc__))


if __name__ == "__main__":
    main()
