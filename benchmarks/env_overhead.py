"""What wrapping a training run costs: `MangoEnv` and `TrainingRun` against the bare loop, same optimizer, same workload.

    python -m benchmarks.env_overhead --workloads digits_mlp source_lm --intervals 40 --out benchmarks/results/env_overhead.json

All three train side by side, one decision interval each in turn, in changing order; a ratio is taken per interval, so
that a busy machine slows both of its sides alike. The bare loop holds its configs; the environment is told to hold them.
Medians and quartiles of the ratios are written with hardware and commit. No run reaches its
end here: the held-out evaluation that ends an episode is no part of the bare loop.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import stamp, write
from mango import MANGO
from mango_env.env import MangoEnv
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.workloads import make_workload

GOALS = {"source_lm": 1.05, "digits_mlp": 1.3}               # wall clock of the environment over the bare loop


@dataclass
class Args:
    workloads: list[str] = field(default_factory=lambda: ["digits_mlp", "digits_cnn", "source_lm"])
    intervals: int = 40                                      # measured intervals per workload
    interval: int = 10                                       # optimizer steps per decision
    memory_budget: float = 0.25                              # fraction of AdamW's state bytes
    seed: int = 0
    threads: int = 1
    out: Path = Path("benchmarks/results/env_overhead.json")


def bare_loop(args: Args, name: str, horizon: int) -> Callable[[], None]:
    """One interval of the loop that a user would write."""
    workload = make_workload(name, args.seed)
    optimizer = MANGO(
        workload.model.named_parameters(),
        lr=getattr(workload, "lr", 2e-3),
        memory_budget=args.memory_budget,
        policy="hold",
        policy_update_freq=args.interval,
        total_steps=horizon,
    )

    def train() -> None:
        for _ in range(args.interval):
            optimizer.zero_grad()
            loss = workload.loss()
            loss.backward()                                  # type: ignore[no-untyped-call]
            optimizer.observe_loss(loss)
            optimizer.step()

    return train


def wrapped_run(args: Args, name: str, horizon: int) -> Callable[[], None]:
    """One interval of a `TrainingRun`, with its observation."""
    run = TrainingRun(name, args.seed, horizon=horizon, interval=args.interval, memory_budget=args.memory_budget)

    def train() -> None:
        run.advance()
        run.observe()

    return train


def environment(args: Args, name: str, horizon: int) -> Callable[[], None]:
    """One step of `MangoEnv`: propose what is in force, train, score, observe."""
    options: dict[str, Any] = {"horizon": horizon, "interval": args.interval, "memory_budget": args.memory_budget}
    env = MangoEnv(name, reward=Reward(loss="raw"), seeds=[args.seed], **options)
    env.reset(seed=args.seed)

    def step() -> None:
        assert env.run is not None
        env.step(np.concatenate([config.to_action() for config in env.run.optimizer.applied]))

    return step


def measure(args: Args, name: str) -> dict[str, Any]:
    """Ratios of wall clock and of CPU time to the bare loop, interval by interval."""
    # One interval more than is measured to warm up, and one more so that no run reaches its end.
    horizon = (args.intervals + 2) * args.interval
    builders = {"bare": bare_loop, "run": wrapped_run, "env": environment}
    sides = {side: build(args, name, horizon) for side, build in builders.items()}
    wall: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    order = list(sides)
    for i in range(args.intervals + 1):
        for side in order:
            began, used = time.perf_counter(), time.process_time()
            sides[side]()
            if i:
                wall[side].append(time.perf_counter() - began)
                cpu[side].append(time.process_time() - used)
        order = order[1:] + order[:1]
    step_ms = 1e3 * float(np.median(wall["bare"])) / args.interval
    result: dict[str, Any] = {"workload": name, "goal": GOALS.get(name), "bare_step_ms": step_ms}
    for side in ("run", "env"):
        for clock, times in (("wall", wall), ("cpu", cpu)):
            ratios = np.divide(times[side], times["bare"])
            low, median, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
            result[f"{side}_{clock}"] = {"median": median, "quartiles": [low, high]}
    result["met"] = None if result["goal"] is None else result["env_wall"]["median"] <= result["goal"]
    return result


def main(arguments: list[str] | None = None) -> None:
    defaults = Args()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=defaults.workloads)
    parser.add_argument("--intervals", type=int, default=defaults.intervals)
    parser.add_argument("--interval", type=int, default=defaults.interval)
    parser.add_argument("--memory-budget", type=float, default=defaults.memory_budget)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--out", type=Path, default=defaults.out)
    args = Args(**vars(parser.parse_args(arguments)))
    torch.set_num_threads(args.threads)
    rows = [measure(args, name) for name in args.workloads]
    for row in rows:
        goal = "no goal" if row["goal"] is None else f"goal {row['goal']}: {'met' if row['met'] else 'missed'}"
        print(f"{row['workload']:12s} run {row['run_wall']['median']:.3f}x  env {row['env_wall']['median']:.3f}x  ({goal})")
    print(write(args.out, stamp(args) | {"results": rows}))


if __name__ == "__main__":
    main()
