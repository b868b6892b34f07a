"""Three ablations, paired by seed: who allocates, with and without low rank, what becomes of a compressed gradient's error.

    python -m experiments.ablations --out benchmarks/results/ablations.json

    allocation      a learned policy against heuristics and one fixed rung for all layers, in the same budgets
    low_rank        moments in a subspace of rank 32 or 8 against whole ones, at three precisions, in all layers
    error_feedback  gradients in 2 bits, or a hundredth of their entries: no feedback, error feedback, EF21, MARINA, momentum
                    correction, against whole gradients; moments in full precision

Every method tunes its rate over the same grid on a seed that is not among those reported. A table has the mean held-out loss
over seeds with its standard error, and how many per cent it is above that of the row's reference, paired by seed, with the
standard error of that mean. A repeated command goes on where it was.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.record import earlier_runs, find_run, mean_error, program, stamp, write
from experiments.transfer import weights_of
from experiments.tuning import TUNING_SEED, tune
from mango.config import CompressionConfig
from mango_env.run import DEFAULT_LR
from mango_env.workloads import make_workload
from train_policy import run_study
from train_policy.cli_support import one_line
from train_policy.run_study import run_method
from train_policy.study_methods import Method

Row = dict[str, Any]


@dataclass(frozen=True)
class Args:
    workloads: str = "digits_cnn,source_lm+batch=8"     # comma-separated
    tables: str = "allocation,low_rank,error_feedback"  # which
    policy: str = "universal"                           # the learned one: a shipped name or a path
    budgets: str = "0.0625,0.125"                       # of AdamW's bytes, where policies allocate
    seeds: int = 5                                      # runs per method
    steps: int = 120                                    # optimizer steps of each
    rates: str = "0.5,1,2,4"                            # tried: times the workload's own rate; one is taken untried
    out: Path = Path("benchmarks/results/ablations.json")


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    method: Method
    reference: str                                      # the method it is compared with, in the same budget
    budget: float | None = None                         # None: no limit


def allocation(args: Args, workload: str) -> list[Line]:
    lines = []
    for budget in map(float, args.budgets.split(",")):
        fixed = run_study.largest_rung(run_study.Args(workload=workload, budget=budget, steps=args.steps))
        deciders = {"learned": args.policy, "water-filling": "water-filling", "adaptive": "adaptive", "scheduled": "scheduled",
                    "random": "random", "one rung": fixed}  # fmt: skip
        lines += [Line(Method(name, "", policy=policy), "learned", budget) for name, policy in deciders.items()]
    return lines


def low_rank(args: Args, workload: str) -> list[Line]:
    pairs = [
        (CompressionConfig(), {"rank": 32}),
        (CompressionConfig(momentum_bits=8, variance_bits=8), {"rank": 32, "factor_bits_p": 8, "factor_bits_q": 8}),
        (CompressionConfig(momentum_bits=4, variance_bits=0), {"rank": 8, "factor_bits_p": 4, "factor_bits_q": 4}),
    ]
    lines = []
    for whole, subspace in pairs:
        configs = (whole, replace(whole, momentum_bits=32, **subspace))
        lines += [Line(unlimited(config.name, config), whole.name) for config in configs]
    return lines


def error_feedback(args: Args, workload: str) -> list[Line]:
    modes: dict[str, dict[str, Any]] = {
        "none": {"error_feedback": False}, "error feedback": {}, "EF21": {"error_feedback": "ef21"},
        "MARINA": {"error_feedback": "marina"}, "momentum correction": {"momentum_correction": True},
    }  # fmt: skip
    lines = [Line(unlimited("whole gradients", CompressionConfig()), "whole gradients")]
    for told, config in (("2 bits", CompressionConfig(gradient_bits=2)), ("0.99 sparse", CompressionConfig(sparsity=0.99))):
        lines += [Line(unlimited(f"{told}, {mode}", config, **options), "whole gradients") for mode, options in modes.items()]
    return lines


TABLES = {"allocation": allocation, "low_rank": low_rank, "error_feedback": error_feedback}


def unlimited(name: str, config: CompressionConfig, **options: Any) -> Method:
    """One config for all layers, and no budget."""
    return Method(name, "", policy=config, options={"memory_budget": None} | options)


class Study:
    """The runs done so far, and how to add one."""

    def __init__(self, args: Args) -> None:
        unknown = [name for name in args.tables.split(",") if name not in TABLES]
        if unknown:
            raise ValueError(f"unknown tables {', '.join(unknown)}; known: {', '.join(TABLES)}")
        if args.seeds < 2:
            raise ValueError(f"seeds={args.seeds} give no standard error: take at least 2")
        self.args, self.head = args, stamp(args)
        self.runs = earlier_runs(args.out)
        self.lines = {(table, workload): TABLES[table](args, workload)
                      for table in args.tables.split(",") for workload in args.workloads.split(",")}  # fmt: skip

    def save(self) -> None:
        tables = {name: [row for place in self.lines if place[0] == name for row in self.table(*place)]
                  for name in self.args.tables.split(",")}  # fmt: skip
        write(self.args.out, self.head | tables | {"runs": self.runs})

    def facts(self, table: str, workload: str, line: Line, seed: int) -> Row:
        return {"table": table, "workload": workload, "method": line.method.name, "seed": seed, "steps": self.args.steps,
                "rates": self.args.rates, "policy": self.args.policy if line.budget else None, "budget": line.budget,
                "weights": weights_of(line.method.policy)}  # fmt: skip

    def get(self, table: str, workload: str, line: Line, seed: int, lr: float) -> Row:
        """A run, done now unless it was before; one that fails has no loss."""
        facts = self.facts(table, workload, line, seed) | {"lr": lr}
        if before := find_run(self.runs, facts):
            return before
        args = run_study.Args(workload=workload, steps=self.args.steps, budget=line.budget or 1.0, learning_rate=lr)
        try:
            done = run_method(args, line.method, seed)
            numel = done["adamw_bytes"] / 8
            told = {"val_loss": done["val_loss"], "state_bytes_per_param": done["state_bytes_peak"] / numel, "message": ""}
        except RuntimeError as error:
            told = {"val_loss": None, "state_bytes_per_param": None, "message": one_line(error)}
        self.runs.append(facts | told)
        self.save()
        what = f"{table} {workload} {line.method.name} {line.budget or ''} seed {seed} lr {lr:g}"
        print(f"{what}: {told['val_loss'] or told['message']}", flush=True)
        return self.runs[-1]

    def loss(self, table: str, workload: str, line: Line, lr: float) -> float:
        """Of the tuning seed; infinite where the run fails."""
        found = self.get(table, workload, line, TUNING_SEED, lr)["val_loss"]
        return math.inf if found is None else float(found)

    def all(self) -> None:
        """Tunes every method, then runs all of them seed by seed."""
        multiples = [float(one) for one in self.args.rates.split(",")]
        plan: list[tuple[str, str, Line, float]] = []
        for (table, workload), lines in self.lines.items():
            own = float(getattr(make_workload(workload, 0), "lr", DEFAULT_LR))
            for line in lines:
                tuned = tune(own, multiples, partial(self.loss, table, workload, line), further=2)
                plan.append((table, workload, line, tuned.lr))
        for seed in range(self.args.seeds):
            for table, workload, line, lr in plan:
                self.get(table, workload, line, seed, lr)
        self.save()

    def table(self, table: str, workload: str) -> list[Row]:
        """Its rows, of the seeds that are done."""

        def losses(line: Line) -> dict[int, Row]:
            wanted = self.facts(table, workload, line, 0).items() - {("seed", 0)}
            return {run["seed"]: run for run in self.runs
                    if run["seed"] != TUNING_SEED and wanted <= run.items() and run["val_loss"] is not None}  # fmt: skip

        lines = self.lines[table, workload]
        found = {(line.method.name, line.budget): losses(line) for line in lines}
        rows = []
        for line in lines:
            mine, theirs = found[line.method.name, line.budget], found[line.reference, line.budget]
            if len(mine) < 2:
                continue
            values = [run["val_loss"] for run in mine.values()]
            above = [100 * (run["val_loss"] / theirs[seed]["val_loss"] - 1) for seed, run in mine.items() if seed in theirs]
            rows.append({
                "workload": workload, **({"budget": line.budget} if line.budget else {}), "method": line.method.name,
                "seeds": len(mine), "lr": next(iter(mine.values()))["lr"],
                "state_bytes_per_param": max(run["state_bytes_per_param"] for run in mine.values()),
                "val_loss": fmean(values), "val_loss_se": mean_error(values), "reference": line.reference,
                "percent_above": fmean(above) if above else None,
                "percent_above_se": mean_error(above),
            })  # fmt: skip
        return rows


def train(args: Args) -> Path:
    torch.set_num_threads(1)
    study = Study(args)
    study.all()
    for place in study.lines:
        for row in study.table(*place):
            where = f"{row['workload']:20s} {row.get('budget', ''):<7} {row['method']:32s}"
            print(f"{where} {row['val_loss']:.4f} +- {row['val_loss_se']:.4f} {row['percent_above']:+6.2f} +-"
                  f" {row['percent_above_se']:.2f} % {row['state_bytes_per_param']:.3f} B/param, rate {row['lr']:g}")  # fmt: skip
    return args.out


def main() -> None:
    program(train, Args, __doc__)


if __name__ == "__main__":
    main()
