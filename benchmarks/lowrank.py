"""Speed of finding and refreshing a projector against a full singular value decomposition, and their errors.

    python -m benchmarks.lowrank                    # a minute or two on one core; writes benchmarks/results/lowrank.json
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.record import parse, stamp, write
from mango.lowrank import find, project, refresh, unproject

TARGETS = {"error": 1.1, "speed": 1.0}         # at most, of the best of that rank; at least, times as fast as the full one
RANKS = (1, 4, 8, 128)


@dataclass
class Args:
    size: int = 2048                # rows and columns
    turns: int = 3
    seed: int = 0
    out: Path = Path("benchmarks/results/lowrank.json")


def timed(make: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    made = make()
    return time.perf_counter() - began, made


def run(args: Args) -> Path:
    generator = torch.Generator().manual_seed(args.seed)
    left, right = (torch.linalg.qr(torch.randn(args.size, args.size, generator=generator)).Q for _ in range(2))
    values = 1 / torch.arange(1, args.size + 1)
    matrix = (left * values) @ right
    took: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for _ in range(args.turns):
        seconds, _ = timed(lambda: torch.linalg.svd(matrix, full_matrices=False).U)
        took.setdefault("svd", []).append(seconds)
        for rank in RANKS:
            seconds, found = timed(lambda rank=rank: find(matrix, rank, generator))  # type: ignore[misc]
            took.setdefault(f"find {rank}", []).append(seconds)
            errors[f"find {rank}"] = float((matrix - unproject(found, project(found, matrix))).norm() / values[rank:].norm())
            seconds, _ = timed(lambda found=found: refresh(matrix, found))  # type: ignore[misc]
            took.setdefault(f"refresh {rank}", []).append(seconds)
    full = median(took["svd"])
    measured = {
        name: {
            "seconds": {"median": median(t), "min": min(t), "max": max(t)},
            "speed": full / median(t),
            "error": errors.get(name),
        }
        for name, t in took.items()
    }
    for name, row in measured.items():
        print(f"{name:12} {1e3 * median(took[name]):8.1f} ms, {row['speed']:6.1f} times as fast, error {row['error']}")
    reached = {
        "error": all(error <= TARGETS["error"] for error in errors.values()),
        "speed": all(full / median(t) >= TARGETS["speed"] for name, t in took.items() if name != "svd"),
    }
    return write(args.out, {**stamp(args), "targets": TARGETS, "reached": reached, "measured": measured})


def main() -> None:
    print(run(parse(Args, __doc__)))


if __name__ == "__main__":
    main()
