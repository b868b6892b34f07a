"""Record the small real data set in `trajectories/fixture`: a few short training runs under several policies and budgets.

    python -m trajectories.make_fixture             # a few minutes; replaces trajectories/fixture

It is a packed store, below 1 MB, that tests and examples read. Record it again whenever the feature table, the menus or
the format change (`mango data validate trajectories/fixture` says so), and commit what comes out.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mango.config import LADDER
from mango.policies import FixedPolicy, RandomPolicy, WaterFillingPolicy
from mango_env.curate import compact
from mango_env.dataset import info
from mango_env.recorder import record_run
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.store import TrajectoryWriter
from mango_env.validate import validate

LARGEST = 1_000_000                                          # bytes of the whole fixture


@dataclass
class Args:
    out: Path = Path(__file__).parent / "fixture"
    workloads: list[str] = field(default_factory=lambda: ["digits_mlp", "digits_cnn"])
    budgets: list[float] = field(default_factory=lambda: [0.125, 0.5])     # fractions of AdamW's state bytes
    rungs: list[str] = field(default_factory=lambda: ["m8v8"])             # of the fixed policies
    seeds: int = 2                                           # runs of every kind
    horizon: int = 60                                        # optimizer steps per run
    interval: int = 10                                       # optimizer steps per decision


def policies(args: Args, seed: int) -> Iterator[tuple[str, Any]]:
    yield "random", RandomPolicy(seed=seed)
    yield "water-filling", WaterFillingPolicy()
    for rung in args.rungs:
        yield f"fixed-{rung}", FixedPolicy(LADDER[LADDER.index(rung)])


def record(args: Args, root: Path) -> None:
    with TrajectoryWriter(root, task="digits", policy="mixed", reward=Reward()) as writer:
        for workload in args.workloads:
            for seed in range(args.seeds):
                for budget in args.budgets:
                    for name, policy in policies(args, seed):
                        run = TrainingRun(workload, seed, horizon=args.horizon, interval=args.interval, memory_budget=budget)
                        run_id = f"{workload}-{name}-{budget:g}-{seed}"
                        record_run(run, policy, writer, policy_name=name, run_id=run_id)


def make(args: Args) -> Path:
    """Record aside, check, then replace the fixture. Returns its folder."""
    with tempfile.TemporaryDirectory() as folder:
        record(args, Path(folder) / "recorded")
        packed = compact(Path(folder) / "recorded", Path(folder) / "packed")
        report, size = validate(packed), sum(f.stat().st_size for f in packed.rglob("*") if f.is_file())
        if not report.ok or size > LARGEST:
            raise ValueError(f"{report}\n{size} bytes, {LARGEST} are allowed: record fewer or shorter runs")
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.move(packed, args.out)
    return args.out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Args()
    parser.add_argument("--out", type=Path, default=defaults.out)
    parser.add_argument("--workloads", nargs="+", default=defaults.workloads)
    parser.add_argument("--budgets", nargs="+", type=float, default=defaults.budgets)
    parser.add_argument("--rungs", nargs="+", default=defaults.rungs, choices=LADDER.names)
    parser.add_argument("--seeds", type=int, default=defaults.seeds)
    parser.add_argument("--horizon", type=int, default=defaults.horizon)
    parser.add_argument("--interval", type=int, default=defaults.interval)
    args = Args(**vars(parser.parse_args()))
    found = info(make(args))
    print(f"{args.out}: {found['episodes']} episodes of {found['runs']} runs, {found['bytes']} bytes")


if __name__ == "__main__":
    main()
