"""What deciding costs: statistics, policy, knapsack and transcoding, as a share of the training time between decisions.

    python -m benchmarks.deciding                  # about two minutes; writes benchmarks/results/deciding.json

A model trains under a policy; every iteration (loss, backward, step) and every step of the optimizer is timed. Steps are compared
by their place in the interval: a decision is the last step of one, statistics are taken there and on the step before, and the
first one begins a window. What the median step at these places costs beyond the median step elsewhere is what deciding costs;
its share is that over the median iteration times the interval. On a CPU it is processor time, so that other processes do
not count; on a GPU wall clock between synchronisations. Interval 100 is measured on runs of that interval, not computed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.record import parse, stamp, write
from mango import MANGO
from mango.networks import PolicyNetwork
from mango_env.workloads import make_workload
from mango_env.workloads.base import split_options

GOALS = {10: 0.05, 100: 0.01}                           # share of training time, by interval


@dataclass(frozen=True)
class Args:
    workloads: str = "digits_mlp,source_lm,source_lm+width=192+depth=4"
    policies: str = "universal,water-filling,adaptive,lstm,tinyformer"             # the last two: networks, untrained
    memory_budget: float = 0.125                        # of AdamW's state bytes
    decisions: int = 12                                 # measured per run of interval 10; a quarter of that of interval 100
    device: str = "cpu"
    threads: int = 1
    out: Path = Path("benchmarks/results/deciding.json")


def clock(device: str) -> Callable[[], float]:
    """Seconds: of this process on a CPU, between synchronisations on a GPU."""
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def policy_named(name: str) -> Any:
    """A shipped policy or heuristic by name; an untrained network of an architecture."""
    return PolicyNetwork(name) if name in ("lstm", "tinyformer") else name


def measure(args: Args, name: str, policy: str, interval: int) -> dict[str, Any]:
    """One run: seconds of every step and iteration by their place in the interval."""
    decisions = args.decisions if interval < 100 else max(3, args.decisions // 4)
    base, options = split_options(name)
    workload = make_workload(base, 0, **options)
    workload.model.to(args.device)
    torch.manual_seed(0)
    optimizer = MANGO(
        workload.model.named_parameters(), lr=getattr(workload, "lr", 2e-3), memory_budget=args.memory_budget,
        policy=policy_named(policy), policy_update_freq=interval, total_steps=(decisions + 1) * interval,
    )  # fmt: skip
    now = clock(args.device)
    steps, iterations = np.zeros((decisions + 1, interval)), np.zeros((decisions + 1, interval))
    for i in range(steps.size):
        began = now()
        optimizer.zero_grad()
        loss = workload.loss()
        loss.backward()                                  # type: ignore[no-untyped-call]
        before = now()
        optimizer.observe_loss(loss)
        optimizer.step()
        ended = now()
        steps.flat[i], iterations.flat[i] = ended - before, ended - began
    steps, iterations = steps[1:], iterations[1:]         # the first interval warms up
    usual = median(steps[:, 1:-2].flat)
    beyond = (np.median(steps, 0) - usual)[[0, -2, -1]]   # the places that differ: a window begins; statistics; the decision
    train = median(iterations[:, 1:-2].flat) * interval
    layers = len(optimizer.layers)
    share = float(max(0.0, beyond.sum()) / (train + max(0.0, beyond.sum())))
    return {
        "workload": name, "layers": layers, "parameters": sum(p.numel() for p in workload.model.parameters()), "policy": policy,
        "interval": interval, "decisions": decisions, "step_ms": 1e3 * usual, "iteration_ms": 1e3 * train / interval,
        "deciding_ms": 1e3 * float(beyond.sum()), "deciding_ms_per_layer": 1e3 * float(beyond.sum()) / layers,
        "share": share, "goal": GOALS.get(interval), "met": share < GOALS[interval] if interval in GOALS else None,
    }  # fmt: skip


def run(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.workloads.split(","):
        for policy in args.policies.split(","):
            for interval in GOALS:
                row = measure(args, name, policy, interval)
                rows.append(row)
                what = f"{name:28s} {policy:14s} every {interval:3d}"
                print(f"{what}: {row['deciding_ms']:6.1f} ms, {row['share']:6.2%} of training", flush=True)
    return write(args.out, stamp(args) | {"goals": {str(interval): goal for interval, goal in GOALS.items()}, "rows": rows})


if __name__ == "__main__":
    print(run(parse(Args, __doc__)))
