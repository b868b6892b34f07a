"""Every method on one bench: the same models, data, seeds and byte accounting, each at its own best rate.

    python -m experiments.compare --scale small --out runs/compare           # 20 minutes on 2 idle cores
    python -m experiments.compare --scale full --domains language --methods adamw,galore,mango --seeds 5

One table per domain (vision, language, finetuning). Of every method of `experiments/baseline_optimizers.py` the rate is tuned
on a grid of factors of two around the recommended one, on a seed of its own; then it trains on every seed, on the same batches
as the others. Time per step and peak memory are measured apart, in a process of its own per method, its steps taking turns
with AdamW's. What cannot run here is a row that says why, what diverges is a row that says so; a method that crashes makes
the command fail after the others have finished. The results are written after every run, and a repeated command goes on.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import as_completed
from typing import Any

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments.baseline_optimizers import BASELINES, available
from experiments.comparison_figures import draw
from experiments.comparison_runs import SCALES, Args, Task, cost, method_of, place_of, pretrained, rate_facts, run, tuned
from experiments.comparison_table import summary, table, write_tables
from mango_env.workloads import make_workload
from train_policy.cli_support import one_line
from train_policy.workers import worker_pool


def methods_of(args: Args) -> list[str]:
    return args.methods.split(",") if args.methods else list(BASELINES)


def unavailable(args: Args) -> dict[tuple[str, str], str]:
    """Why a method or a domain cannot be had on this machine, by (domain, method)."""
    found = {}
    for domain in args.domains.split(","):
        place = place_of(domain, args)
        try:
            for name in [place.workload, *([place.pretrained] if place.pretrained else [])]:
                make_workload(name, 0)
            missing = None
        except FileNotFoundError as error:
            missing = one_line(error)
        for method in methods_of(args):
            reason = missing or available(method_of(method)[0])
            if reason is not None:
                found[domain, method] = reason
    return found


class Study:
    """What has been found so far, kept in `compare.json` after every run."""

    def __init__(self, args: Args) -> None:
        self.args, self.path, self.head = args, args.out / "compare.json", stamp(args)
        earlier = {"runs": earlier_runs(self.path)} | {kind: earlier_runs(self.path, kind) for kind in ("rates", "costs")}
        self.found = {kind: [row for row in rows if row["status"] != "failed"] for kind, rows in earlier.items()}
        self.missing = unavailable(args)

    def keep(self, kind: str, row: dict[str, Any]) -> None:
        self.found[kind].append(row | {"commit": self.head["commit"]})
        self.save()

    def save(self) -> None:
        absent = [{"domain": domain, "policy": method, "reason": why} for (domain, method), why in self.missing.items()]
        write(self.path, self.head | {"kind": "comparison", **self.found, "unavailable": absent, "summary": self.summary()})

    def wanted(self) -> Iterator[tuple[str, str]]:
        for domain in self.args.domains.split(","):
            for method in methods_of(self.args):
                if (domain, method) not in self.missing:
                    yield domain, method

    def train(self) -> None:
        """Everything that is missing: rates, then runs seed by seed, then costs, one process each."""
        args = self.args
        with worker_pool(args.workers) as pool:
            known = {(domain, method): rate_facts(domain, method, args) for domain, method in self.wanted()}
            for domain in dict.fromkeys(domain for domain, _ in known):
                if place_of(domain, args).pretrained:
                    pretrained(place_of(domain, args), args)
            new = [pair for pair, facts in known.items() if find_run(self.found["rates"], facts) is None]
            for done in as_completed([pool.submit(tuned, domain, method, args) for domain, method in new]):
                self.keep("rates", done.result())
                print("{domain} {policy}: rate {lr:g} {status}".format(**self.found["rates"][-1]), flush=True)
            found = {pair: find_run(self.found["rates"], facts) for pair, facts in known.items()}
            rates = {pair: float(row["lr"]) for pair, row in found.items() if row is not None}
            tasks = [Task(d, m, seed, lr, args) for seed in range(args.seeds) for (d, m), lr in rates.items()]
            tasks = [task for task in tasks if find_run(self.found["runs"], task.facts) is None]
            for done in as_completed([pool.submit(run, task) for task in tasks]):
                self.keep("runs", done.result())
                row = self.found["runs"][-1]
                loss = row["message"] if row["val_loss"] is None else f"{row['val_loss']:.4f}"
                print(f"{row['domain']} {row['policy']} seed {row['seed']}: {row['status']} {loss}", flush=True)
        if not args.costs:
            return
        for task in (Task(domain, method, 0, lr, args) for (domain, method), lr in rates.items()):
            if find_run(self.found["costs"], {"domain": task.domain, "policy": task.method, "device": args.device}) is None:
                with worker_pool(1) as alone:
                    self.keep("costs", alone.submit(cost, task).result())

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [row for rows in self.found.values() for row in rows if row["status"] == "failed"]

    def summary(self) -> list[dict[str, Any]]:
        """A line per domain and method."""
        methods = methods_of(self.args)
        return [line for domain in self.args.domains.split(",")
                for line in summary(domain, methods, self.found, self.missing, self.args)]  # fmt: skip


def check(args: Args) -> None:
    """ValueError, in one line, for what a comparison cannot be."""
    if args.scale not in SCALES:
        raise ValueError(f"unknown scale {args.scale!r}; known: {', '.join(SCALES)}")
    for domain in args.domains.split(","):
        if domain not in SCALES[args.scale]:
            raise ValueError(f"unknown domain {domain!r}; known: {', '.join(SCALES[args.scale])}")
    for method in methods_of(args):
        method_of(method)
    if args.seeds < 1 or args.workers < 1:
        raise ValueError(f"seeds={args.seeds} and workers={args.workers} must be at least 1")


def compare(args: Args) -> Study:
    """Run what is missing and write everything; the study says what failed."""
    check(args)
    study = Study(args)
    study.save()
    study.train()
    lines = study.summary()
    print(table(lines))
    runs = study.found["runs"]
    for path in [*write_tables(args.out, lines, runs, study.failures, study.head), *draw(args.out, lines, runs)]:
        print(f"wrote {path}")
    return study


def main() -> None:
    args = parse(Args, __doc__)
    try:
        study = compare(args)
    except ValueError as error:
        print(f"compare: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    for row in study.failures:
        print(f"{row['domain']} {row['policy']}: failed: {row['message']}")
    raise SystemExit(1 if study.failures else 0)


if __name__ == "__main__":
    main()
