"""Speed of `MemoryBudget.allocate`: one choice for each of 10,000 layers x 16 rungs.

    python -m benchmarks.knapsack                   # a few seconds; writes benchmarks/results/knapsack.json

Kinds of problem: scores and bytes at random; concave scores along random bytes; one ladder over layers of all sizes
(bytes over a factor of 16,000); five giants beside small layers; layers that are all alike. Each at several budgets, as
shares of the way from the least to the most bytes. The target is for the slowest median; turns of all problems
alternate, so that a busy machine slows all alike, and times are the processor's, so that other processes do not count.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import parse, stamp, write
from mango.budget import MemoryBudget

TARGETS = {"milliseconds": 20.0}
SHARES = (0.02, 0.1, 0.5, 0.9, 1.0)
Problem = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass
class Args:
    layers: int = 10_000
    rungs: int = 16                 # choices per layer
    turns: int = 15                 # per problem and budget; one more warms up
    seed: int = 0
    out: Path = Path("benchmarks/results/knapsack.json")


def problems(args: Args) -> dict[str, Problem]:
    """Scores and bytes (L, R) of every kind."""
    rng, rung, shape = np.random.default_rng(args.seed), np.arange(1, args.rungs + 1), (args.layers, args.rungs)
    sizes = 2 ** rng.integers(10, 24, (args.layers, 1))
    giants = np.where(np.arange(args.layers)[:, None] < 5, 10**8, rng.integers(900, 1100, (args.layers, 1)))
    falling = -rng.random((args.layers, 1)) * 2.0**-rung
    return {
        "random": (rng.random(shape), rng.integers(1, 10**6, shape)),
        "concave": (falling, np.sort(rng.integers(1, 10**6, shape), 1)),
        "sizes": (-rng.lognormal(0, 2, (args.layers, 1)) / rung, sizes * rung),
        "giants": (-rng.lognormal(0, 1, (args.layers, 1)) * giants**0.9 / rung, giants * rung),
        "alike": (np.tile(-1 / rung, (args.layers, 1)), np.tile(1024 * rung, (args.layers, 1))),
    }


def milliseconds(budget: MemoryBudget, problem: Problem) -> float:
    began = time.process_time()
    budget.allocate(*problem)
    return 1e3 * (time.process_time() - began)


def run(args: Args) -> Path:
    cases: list[tuple[str, float, MemoryBudget, Problem]] = []
    for kind, problem in problems(args).items():
        least, most = int(problem[1].min(1).sum()), int(problem[1].max(1).sum())
        cases += [(kind, share, MemoryBudget(least + round(share * (most - least))), problem) for share in SHARES]
    took: list[list[float]] = [[] for _ in cases]
    for turn in range(args.turns + 1):
        for times, (_, _, budget, problem) in zip(took, cases, strict=True):
            spent = milliseconds(budget, problem)
            if turn:
                times.append(spent)
    measured: list[dict[str, Any]] = []
    for times, (kind, share, budget, (scores, nbytes)) in zip(took, cases, strict=True):
        pick = budget.allocate(scores, nbytes)
        unused = budget.total - int(nbytes[np.arange(args.layers), pick].sum())
        spread = {"median": median(times), "min": min(times), "max": max(times)}
        measured.append({"kind": kind, "share": share, "milliseconds": spread, "unused": unused / budget.total})
        print(f"{kind:8} {share:4}: {spread['median']:5.1f} ms ({spread['min']:.1f} to {spread['max']:.1f})")
    slowest = max(case["milliseconds"]["median"] for case in measured)
    fastest = max(case["milliseconds"]["min"] for case in measured)
    print(f"slowest median {slowest:.1f} ms, slowest minimum {fastest:.1f} ms; the target is {TARGETS['milliseconds']} ms")
    reached = {"median": slowest < TARGETS["milliseconds"], "min": fastest < TARGETS["milliseconds"]}
    return write(args.out, {**stamp(args), "targets": TARGETS, "reached": reached, "cases": measured})


def main() -> None:
    print(run(parse(Args, __doc__)))


if __name__ == "__main__":
    main()
