"""Time of a step with a memory of gradients against torch's AdamW, by how many are kept and how they are stored.

    python -m benchmarks.critical --out benchmarks/results/critical.json

Two sets of tensors: an MLP of 198 k parameters, and 60 small ones. All optimizers live in one process and take turns; each
turn's order is reversed every other round; ratios are medians over rounds of one round's times. On a CPU a time is the
thread's processor time, which does not count what other processes take. Gradients are of a size that varies from step to
step, so that full buffers take some and refuse others.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.record import parse, stamp, write
from benchmarks.step_time import small_shapes, stored_bytes
from benchmarks.step_time import timed as timed_on_wall
from mango.critical import Adam_CM, AdamW_C

MLP = [(200, 784), (200,), (200, 200), (200,)]


@dataclass(frozen=True)
class Args:
    rounds: int = 60                                    # turns of every optimizer on every set, of one step each
    warm_up: int = 24                                   # rounds before: until 20 gradients are kept
    threads: int = 1                                    # torch threads
    seed: int = 0                                       # of the gradients
    device: str = "cpu"                                 # "cpu" or "cuda"
    out: Path = Path("benchmarks/results/critical.json")


def optimizers() -> dict[str, Callable[[list[Tensor]], Optimizer]]:
    """What takes turns: torch's, then critical gradients and momenta by items and by storage."""
    found: dict[str, Callable[[list[Tensor]], Optimizer]] = {"adamw": AdamW, "adamw_fused": partial(AdamW, fused=True)}
    found |= {f"adamw_c_{size}": partial(AdamW_C, topC=size) for size in (1, 5, 20)}
    found |= {f"adam_cm_{size}": partial(Adam_CM, topC=size) for size in (1, 5, 20)}
    found |= {f"adamw_c_20_{codec}": partial(AdamW_C, topC=20, buffer_codec=codec) for codec in ("bf16", "int8", "int4")}
    found["adamw_c_20_no_sum"] = partial(AdamW_C, topC=20, running_sum=False)
    return found


def measure(shapes: list[tuple[int, ...]], args: Args) -> list[dict[str, Any]]:
    """A row per optimizer: milliseconds, ratios to both of torch's, bytes per parameter, and of decisions how many took."""
    generator = torch.Generator().manual_seed(args.seed)
    sizes = torch.rand(16, generator=generator) + 0.5
    gradients = [[(torch.randn(s, generator=generator) * 1e-3 * size).to(args.device) for s in shapes] for size in sizes]
    params = {name: [torch.zeros(s, device=args.device, requires_grad=True) for s in shapes] for name in optimizers()}
    alive = {name: build(params[name]) for name, build in optimizers().items()}
    times: dict[str, list[float]] = {name: [] for name in alive}
    for number in range(args.warm_up + args.rounds):
        for name in list(alive)[:: -1 if number % 2 else 1]:
            for param, gradient in zip(params[name], gradients[number % len(gradients)], strict=True):
                param.grad = gradient
            times[name].append(timed(alive[name], args.device))
    return [row(name, alive[name], {k: v[args.warm_up :] for k, v in times.items()}) for name in alive]


def timed(optimizer: Optimizer, device: str) -> float:
    """Seconds of one step."""
    if device != "cpu":
        return timed_on_wall(optimizer, 1, device)
    start = time.thread_time()
    optimizer.step()
    return time.thread_time() - start


def row(name: str, optimizer: Optimizer, times: dict[str, list[float]]) -> dict[str, Any]:
    numel = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    ratio, to_fused = ([a / b for a, b in zip(times[name], times[other], strict=True)] for other in ("adamw", "adamw_fused"))
    low, _, high = quantiles(ratio, n=4)
    found = {"optimizer": name, "ms": 1e3 * median(times[name]), "ratio": {"median": median(ratio), "quartiles": [low, high]},
             "ratio_to_fused": median(to_fused)}  # fmt: skip
    if isinstance(optimizer, AdamW_C | Adam_CM):
        decided = optimizer.get_offline_stats()
        taken = decided["yes"] / max(1, sum(decided.values()))
        return found | {"state_bytes_per_param": optimizer.state_bytes() / numel, "taken": taken}
    return found | {"state_bytes_per_param": stored_bytes(optimizer) / numel, "taken": None}


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    head = stamp(args)
    sets = {"mlp_198k": measure(MLP, args), "small_60": measure(small_shapes(), args)}
    for name, rows in sets.items():
        print(f"\n{name:24s} {'ms':>8s} {'x adamw':>8s} {'x fused':>8s} {'B/param':>8s}")
        for one in rows:
            print(f"{one['optimizer']:24s} {one['ms']:8.3f} {one['ratio']['median']:8.2f} {one['ratio_to_fused']:8.2f}"
                  f" {one['state_bytes_per_param']:8.2f}")  # fmt: skip
    return write(args.out, head | sets)


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
