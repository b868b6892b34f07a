"""What is the first moment worth, by batch size, each format at its own best learning rate?

    python -m experiments.momentum_value --out benchmarks/results/momentum_value.json

Of SGD it is known that momentum is worth little where the gradient's noise, not curvature, limits the rate (Shallue et al.
2019, "Measuring the effects of data parallelism", sec. 4.3; Wang et al. 2024, "The marginal value of momentum for small learning
rate SGD"). Here the same is asked of AdamW and Muon whose first moment is stored in fewer bits or not at all: a small model is
trained for the same number of steps with batches of several sizes, the rate of every format tuned for itself on a seed of its own
(factors of two, further ones while the best is at an edge; linear to zero, gradients clipped at norm 1; `match_lr=False`, so that
no rate is changed but here). Gaps are per cent of held-out loss above full precision at *its* best rate, paired by seed. Beside
them stands the gap at full precision's rate, which is what a user sees who changes the format and nothing else, and the gap of 16
bits: what rounding alone decides. The file is written after every format, and a repeated command goes on where it was.
"""

import math
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments.transfer import NOISE, UNLIMITED
from experiments.tuning import TUNING_SEED, tune
from mango.config import LADDER
from mango_env.run import TrainingRun
from train_policy.evaluation_rows import percent_above
from train_policy.workers import worker_pool

FULL = "full"                                           # the reference


@dataclass(frozen=True)
class Args:
    workloads: str = "shakespeare_lm+width=64"          # with options, without the batch
    rules: str = "adamw,muon"
    batches: str = "4,16,64"
    formats: str = "full,m4v0,m2v0,m0v0"                # rungs of the ladder
    seeds: int = 2
    steps: int = 300
    rates: str = "1,2,4,8"                              # times the workload's own
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    matrix_lr_scale: float = 4.0                        # Muon's rate over AdamW's
    workers: int = 2
    out: Path = Path("benchmarks/results/momentum_value.json")


@dataclass(frozen=True)
class Case:
    """One model, rule and batch size."""

    workload: str
    rule: str
    batch: int
    args: Args

    @property
    def facts(self) -> dict[str, Any]:
        return {"workload": self.workload, "rule": self.rule, "batch": self.batch, "steps": self.args.steps}

    def loss(self, rung: str, lr: float | None, seed: int) -> float:
        """Held-out loss after training; infinite where the run diverged. `lr` None: the workload's own."""
        run = self.start(rung, lr, seed)
        while not run.done:
            run.advance()
        loss = math.inf if run.diverged else run.evaluate()["val_loss"]
        return loss if math.isfinite(loss) else math.inf

    def start(self, rung: str, lr: float | None, seed: int) -> TrainingRun:
        scale = self.args.matrix_lr_scale if self.rule == "muon" else 1.0
        return TrainingRun(
            f"{self.workload}+batch={self.batch}", seed, horizon=self.args.steps, interval=self.args.steps,
            memory_budget=UNLIMITED, lr=lr, rule=self.rule, schedule=self.args.schedule, max_grad_norm=self.args.max_grad_norm,
            policy=LADDER[LADDER.index(rung)], optimizer_options={"matrix_lr_scale": scale, "match_lr": False},
        )  # fmt: skip


def measure(case: Case, rung: str) -> dict[str, Any]:
    """The format's best rate, and its losses there on every seed."""
    own = case.start(rung, None, TUNING_SEED).lr
    found = tune(own, [float(one) for one in case.args.rates.split(",")], lambda lr: case.loss(rung, lr, TUNING_SEED))
    return case.facts | {"format": rung} | found.to_dict() | {"runs": at_rate(case, rung, found.lr)}


def at_rate(case: Case, rung: str, lr: float) -> list[dict[str, Any]]:
    """Losses at one rate, by seed."""
    losses = [case.loss(rung, lr, seed) for seed in range(case.args.seeds)]
    return [{"lr": lr, "seed": seed, "val_loss": loss if math.isfinite(loss) else None} for seed, loss in enumerate(losses)]


def gaps(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and extremes of the paired per cents above the reference's losses; None where a run diverged."""
    base = {one["seed"]: one["val_loss"] for one in reference}
    found = [percent_above(one["val_loss"], base.get(one["seed"])) for one in runs]
    known = [gap for gap in found if gap is not None]
    whole = len(known) == len(found) > 0
    return {"mean": fmean(known) if whole else None, "low": min(known) if whole else None, "high": max(known) if whole else None}


def summary(rows: Sequence[dict[str, Any]], same_rate: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case and format: its rate over full precision's, and its gap at its own rate and at full precision's."""
    lines = []
    for row in rows:
        key = {name: row[name] for name in ("workload", "rule", "batch", "steps")}
        full = find_run(rows, key | {"format": FULL})
        if full is None or row["format"] == FULL:
            continue
        there = find_run(same_rate, key | {"format": row["format"]})
        floor = find_run(same_rate, key | {"format": NOISE})
        own, same = gaps(row["runs"], full["runs"]), gaps(there["runs"], full["runs"]) if there else {}
        lines.append(key | {
            "format": row["format"], "full_lr": full["lr"], "rate_over_full": row["lr"] / full["lr"], "at_edge": row["at_edge"],
            "full_losses": [one["val_loss"] for one in full["runs"]],
            "gap_percent": own["mean"], "gap_low": own["low"], "gap_high": own["high"],
            "gap_at_full_rate": same.get("mean"), "noise_percent": gaps(floor["runs"], full["runs"])["mean"] if floor else None,
        })  # fmt: skip
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return f"{'':>8s}" if value is None else f"{value:+8.2f}"

    rows = [f"{'workload':24s} {'rule':6s} batch {'format':8s} own rate full rate  16 bits   rate over full precision's"]
    for one in lines:
        shown = " ".join(number(one[name]) for name in ("gap_percent", "gap_at_full_rate", "noise_percent"))
        case = "{workload:24s} {rule:6s} {batch:5d} {format:8s}".format(**one)
        rows.append(f"{case} {shown}   {one['rate_over_full']:g}")
    return "\n".join(rows)


def train(args: Args) -> Path:
    head, rows, same = stamp(args), earlier_runs(args.out, "rows"), earlier_runs(args.out, "same_rate")
    formats = args.formats.split(",")
    unknown = [rung for rung in formats if rung not in LADDER.names]
    if unknown or FULL not in formats:
        raise SystemExit(f"formats {args.formats}: give {FULL} and rungs of the ladder, {', '.join(LADDER.names)}")
    cases = [Case(work, rule, int(batch), args) for batch in args.batches.split(",") for work in args.workloads.split(",")
             for rule in args.rules.split(",")]  # fmt: skip

    def keep() -> None:
        write(args.out, head | {"rows": rows, "same_rate": same, "summary": summary(rows, same)})

    with worker_pool(args.workers) as pool:
        missing = [(case, rung) for case in cases for rung in formats if find_run(rows, case.facts | {"format": rung}) is None]
        for done in as_completed([pool.submit(measure, case, rung) for case, rung in missing]):
            rows.append(done.result())
            keep()
            print("{workload} {rule} batch {batch} {format}: rate {lr:g}".format(**rows[-1]), flush=True)
        waiting = {}
        for case in cases:
            full = find_run(rows, case.facts | {"format": FULL})
            for rung in (*formats, NOISE):
                facts = case.facts | {"format": rung}
                own = find_run(rows, facts)
                if full is None or rung == FULL or find_run(same, facts) is not None:
                    continue
                if own is not None and own["lr"] == full["lr"]:
                    same.append(facts | {"runs": own["runs"]})
                else:
                    waiting[pool.submit(at_rate, case, rung, full["lr"])] = facts
        for future in as_completed(waiting):
            same.append(waiting[future] | {"runs": future.result()})
            keep()
    keep()
    print(table(summary(rows, same)))
    return args.out


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
