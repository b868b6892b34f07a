"""Does a policy serve models that it has never seen? Held-out families, several rules and budgets, paired by seed.

    python -m experiments.transfer --policies universal,water-filling --out benchmarks/results/transfer.json

Every run is compared with the same rule in full precision on the same workload, seed, steps and rate. The rate is the best one
for full precision, per workload and rule: multiples of the workload's own are tried on a seed of their own, further ones
while the best is at an edge. Fixed rungs run once, and count at every budget that their measured bytes fit; the best of them
is chosen by the same runs that it is compared on, which favours it. A budget that a model cannot have is left out there. The
families are those that no policy was trained on (`HELD_OUT`), and one transformer wider and deeper than any of the training's.
The file is written after every (workload, rule, seed), and a repeated command adds what is missing.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.record import earlier_runs, parse, stamp, write
from experiments.tuning import TUNING_SEED, tune
from mango.config import LADDER
from mango.policy_file import FrozenPolicy
from mango_env.run import TrainingRun
from mango_env.twin import twin_of
from train_policy.evaluate import EvaluationArgs, evaluate, policy_of, spec_name, start_run
from train_policy.evaluation_rows import percent_above
from train_policy.gate import bootstrap_interval
from train_policy.workers import worker_pool

FACTS = ("workload", "rule", "lr", "seed", "policy", "weights", "budget")
KEPT = ("workload", "seed", "policy", "budget", "budget_bytes", "state_bytes_peak", "val_loss", "val_loss_adamw",
        "val_loss_full", "status", "within_budget", "step_time_ratio", "horizon", "message")  # fmt: skip
UNLIMITED = 4.0                                         # times AdamW's state: what a fixed rung runs under
NOISE = "m16v16"                                        # what it loses, two runs lose that differ by rounding alone


@dataclass(frozen=True)
class Args:
    workloads: str = "fashion_cnn,fashion_vit,sst2_classifier,multi30k_translation,source_lm+width=96+depth=4"
    rules: str = "adamw,muon"
    budgets: str = "0.03125,0.0625,0.125,0.25"          # of AdamW's state bytes
    policies: str = "universal,water-filling,sensitivity,error-constrained"        # what `mango evaluate` takes
    fixed: str = "m0v0,r32p4q4v0,m2v0,m4v0,m6v0,m8v0,m6v4,m8v4,m6v8,m16v16"        # rungs; the last fits no budget, see NOISE
    seeds: int = 3
    steps: int = 200
    interval: int = 20                                  # optimizer steps per decision
    schedule: str = "cosine"
    max_grad_norm: float = 0.0                          # gradients are scaled to that norm; 0: as they are
    matrix_lr_scale: float = 4.0                        # Muon's rate over AdamW's, as tuned in benchmarks/quality.py
    rates: str = "0.5,1,2,4"                            # times the workload's own: tried in full precision; one: taken as it is
    workers: int = 2
    budget_minutes: float = 1e9                         # start nothing after this
    out: Path = Path("benchmarks/results/transfer.json")


@dataclass(frozen=True)
class Unit:
    """Everything of one workload, rule and seed that is missing."""

    workload: str
    rule: str
    lr: float
    seed: int
    fixed: tuple[str, ...]
    policies: tuple[tuple[str, tuple[float, ...]], ...]  # and the budgets that each still needs
    args: Args


def weights_of(spec: Any) -> str:
    """Tells files of one name apart: the checksum of a frozen policy's weights; nothing for other policies."""
    policy = policy_of(spec)
    return policy.metadata["weights_sha256"][:12] if isinstance(policy, FrozenPolicy) else ""


@cache
def possible(workload: str, rule: str, budget: float) -> bool:
    """Whether a model can be trained under a budget at all: of a small one, what is never compressed may be too much."""
    try:
        TrainingRun(workload, 0, horizon=1, rule=rule, memory_budget=budget)
    except ValueError:
        return False
    return True


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def rate_of(workload: str, rule: str, args: Args) -> dict[str, Any]:
    """The rate of least held-out loss in full precision, and what was tried."""
    own = start_run(workload, TUNING_SEED, UNLIMITED, "hold", settings_of(args, rule)).lr

    def loss_of(lr: float) -> float:
        twin = twin_of(start_run(workload, TUNING_SEED, UNLIMITED, "hold", settings_of(args, rule, lr)))
        return math.inf if twin.error else twin.evaluation["val_loss"]

    return {"workload": workload, "rule": rule} | tune(own, [float(one) for one in names(args.rates)], loss_of).to_dict()


def units(args: Args, runs: Sequence[dict[str, Any]], rates: Sequence[dict[str, Any]]) -> Iterator[Unit]:
    """What has not been run, seed by seed, so that a study that was stopped early is still paired."""
    have = {tuple(run[name] for name in FACTS) for run in runs}
    rate = {(row["workload"], row["rule"]): row["lr"] for row in rates}
    budgets = [float(size) for size in names(args.budgets)]
    weights = {spec: weights_of(spec) for spec in names(args.policies)}
    for seed in range(args.seeds):
        for work in names(args.workloads):
            for rule in names(args.rules):
                lr = rate[work, rule]
                fixed = [f"fixed:{rung}" for rung in names(args.fixed)]
                fixed = [spec for spec in fixed if (work, rule, lr, seed, spec, "", UNLIMITED) not in have]
                sizes = [size for size in budgets if possible(work, rule, size)]
                missing = [
                    (spec, tuple(size for size in sizes if (work, rule, lr, seed, spec_name(spec), digest, size) not in have))
                    for spec, digest in weights.items()
                ]
                wanted = tuple((spec, left) for spec, left in missing if left)
                if fixed or wanted:
                    yield Unit(work, rule, lr, seed, tuple(fixed), wanted, args)


def settings_of(args: Args, rule: str, lr: float | None = None) -> EvaluationArgs:
    """How runs of a rule are trained; without `lr` at the workload's own."""
    scale = args.matrix_lr_scale if rule == "muon" else 1.0
    return EvaluationArgs(
        horizon=args.steps, interval=args.interval, lr=lr, rule=rule, schedule=args.schedule, matrix_lr_scale=scale,
        max_grad_norm=args.max_grad_norm or None,
    )


def measure(unit: Unit) -> list[dict[str, Any]]:
    """Train them, one after another."""
    settings = settings_of(unit.args, unit.rule, unit.lr)
    found: list[dict[str, Any]] = []
    for specs, sizes in [([*unit.fixed], (UNLIMITED,)), *(([spec], sizes) for spec, sizes in unit.policies)]:
        facts = {"rule": unit.rule, "lr": unit.lr, "weights": weights_of(specs[0]) if specs else ""}
        rows = evaluate(specs, unit.workload, list(sizes), [unit.seed], settings) if specs else []
        found += [facts | {name: getattr(row, name) for name in KEPT} for row in rows]
    return found


def gap(run: dict[str, Any]) -> float | None:
    """Per cent of loss above the same rule's full precision; None where a run failed."""
    return percent_above(run["val_loss"], run["val_loss_full"])


def cells(runs: Sequence[dict[str, Any]], args: Args) -> list[dict[str, Any]]:
    """Per workload, rule, budget and policy: its gap, that of the best fixed rung of equal bytes, and their difference."""
    found = []
    for work in names(args.workloads):
        for rule in names(args.rules):
            mine = [run for run in runs if (run["workload"], run["rule"]) == (work, rule)]
            for size in map(float, names(args.budgets)):
                at = [run for run in mine if run["budget"] == size]
                seeds = sorted({run["seed"] for run in at})
                if not at:
                    continue
                limit = at[0]["budget_bytes"]
                rungs = _fitting(mine, seeds, limit)
                floor = _fitting(mine, seeds, 2**62).get(NOISE)
                best = min(rungs, key=lambda name: fmean(rungs[name].values()), default=None)
                for policy in sorted({run["policy"] for run in at}):
                    gaps = {run["seed"]: gap(run) for run in at if run["policy"] == policy}
                    known = {seed: value for seed, value in gaps.items() if value is not None}
                    paired = [known[seed] - rungs[best][seed] for seed in known if best is not None and seed in rungs[best]]
                    found.append({
                        "workload": work, "rule": rule, "budget": size, "policy": policy, "seeds": len(known),
                        "failed": len(gaps) - len(known), "gap_percent": fmean(known.values()) if known else None,
                        "fixed": {name: fmean(one.values()) for name, one in rungs.items()},
                        "best_fixed": best, "best_fixed_gap_percent": fmean(rungs[best].values()) if best else None,
                        "difference": fmean(paired) if paired else None, "noise": fmean(floor.values()) if floor else None,
                        "within_budget": all(run["within_budget"] for run in at if run["policy"] == policy),
                    })  # fmt: skip
    return found


def _fitting(runs: Sequence[dict[str, Any]], seeds: Sequence[int], limit: int) -> dict[str, dict[int, float]]:
    """Gaps by rung and seed of the fixed rungs that never held more than `limit` bytes and failed on no seed."""
    gaps: dict[str, dict[int, float | None]] = {}
    for run in runs:
        if run["policy"].startswith("fixed:") and run["seed"] in seeds and (run["state_bytes_peak"] or limit + 1) <= limit:
            gaps.setdefault(run["policy"].removeprefix("fixed:"), {})[run["seed"]] = gap(run)
    whole = {name: one for name, one in gaps.items() if len(one) == len(seeds) and None not in one.values()}
    return {name: {seed: float(value) for seed, value in one.items() if value is not None} for name, one in whole.items()}


def totals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per budget and policy, over workloads and rules: mean gaps, and beside them those of fixed rungs of equal bytes.

    `above` counts only what is lost: a loss below full precision's is as good as equal. `best_fixed` is another rung in every
    cell, chosen in hindsight; `one_fixed` the one rung that loses least over all cells, which is what a user could choose.
    `saved` is what the policy loses less than that rung, with the 95 % interval of its mean over the cases (bootstrap).
    `noise_above` is what runs lose by that measure which hold 16 bits: what a difference has to exceed to mean anything.
    """
    found = []
    for size in dict.fromkeys(row["budget"] for row in rows):
        here = [row for row in rows if row["budget"] == size and row["difference"] is not None]
        names_of = [set(row["fixed"]) for row in here]
        shared = {name: _above(row["fixed"][name] for row in here) for name in set.intersection(*names_of)} if here else {}
        one = min(shared, key=lambda name: shared[name], default=None)
        for policy in dict.fromkeys(row["policy"] for row in here):
            cases = [row for row in here if row["policy"] == policy]
            differences = [row["difference"] for row in cases]
            saved = [max(row["fixed"][one], 0.0) - max(row["gap_percent"], 0.0) for row in cases] if one else []
            (low, high), (least, most) = _interval(differences), _interval(saved) if saved else (None, None)
            floor = [row["noise"] for row in cases if row["noise"] is not None]
            worst = max(cases, key=lambda row: row["difference"])
            found.append({
                "budget": size, "policy": policy, "cases": len(cases),
                "gap_percent": fmean(row["gap_percent"] for row in cases), "above": _above(row["gap_percent"] for row in cases),
                "best_fixed_above": _above(row["best_fixed_gap_percent"] for row in cases),
                "one_fixed": one, "one_fixed_above": _above(row["fixed"][one] for row in cases) if one else None,
                "saved": fmean(saved) if saved else None, "saved_low": least, "saved_high": most,
                "difference": fmean(differences), "difference_low": low, "difference_high": high,
                "noise_above": _above(floor) if floor else None,
                "worst": worst["difference"], "worst_case": f"{worst['workload']} {worst['rule']}",
                "worst_gap_percent": max(row["gap_percent"] for row in cases), "failed": sum(row["failed"] for row in cases),
            })  # fmt: skip
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    return bootstrap_interval(values) if len(values) > 1 else (values[0], values[0])


def _above(gaps: Iterable[float]) -> float:
    return fmean(max(gap, 0.0) for gap in gaps)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["budget    policy              loss above full %   one fixed rung for all    best in hindsight   worst gap    noise"]
    for row in rows:
        one = f"{row['one_fixed']} {row['one_fixed_above']:.2f}" if row["one_fixed"] else "none"
        best, worst = f"{row['best_fixed_above']:18.2f}", f"{row['worst_gap_percent']:+10.2f}"
        noise = "" if row["noise_above"] is None else f"{row['noise_above']:9.2f}"
        lines.append(f"{row['budget']:<9g} {row['policy']:18s} {row['above']:17.2f}   {one:>22s}   {best}   {worst}{noise}")
    return "\n".join(lines)


def train(args: Args) -> Path:
    head, began = stamp(args), time.perf_counter()
    rates = earlier_runs(args.out, "rates")
    current = {spec_name(spec): weights_of(spec) for spec in names(args.policies)}
    runs = [run for run in earlier_runs(args.out) if run["weights"] == current.get(run["policy"], run["weights"])]

    def keep() -> None:
        rows = cells(runs, args)
        write(args.out, head | {"rates": rates, "runs": runs, "cells": rows, "totals": totals(rows)})

    def spent() -> float:
        return (time.perf_counter() - began) / 60

    with worker_pool(args.workers) as pool:
        known = {(row["workload"], row["rule"]) for row in rates}
        wanted = [(work, rule) for work in names(args.workloads) for rule in names(args.rules) if (work, rule) not in known]
        for done in as_completed([pool.submit(rate_of, work, rule, args) for work, rule in wanted]):
            rates.append(done.result())
            keep()
            print("{workload} {rule}: rate {lr:g}".format(**rates[-1]), flush=True)
        waiting = list(units(args, runs, rates))
        running: dict[Future[list[dict[str, Any]]], Unit] = {}
        while running or (waiting and spent() <= args.budget_minutes):
            while waiting and len(running) < args.workers and spent() <= args.budget_minutes:
                unit = waiting.pop(0)
                running[pool.submit(measure, unit)] = unit
            finished = next(as_completed(running))
            unit = running.pop(finished)
            runs += [run | {"commit": head["commit"]} for run in finished.result()]
            keep()
            print(f"{unit.workload} {unit.rule} seed {unit.seed}: done at {spent():.1f} min, {len(waiting)} to start", flush=True)
    if waiting:
        print("the time is spent; run the command again to go on")
    keep()
    print(table(totals(cells(runs, args))))
    return args.out


def main() -> None:
    args = parse(Args, __doc__)
    unknown = [rung for rung in names(args.fixed) if rung not in LADDER.names]
    if unknown:
        raise SystemExit(f"unknown rungs {unknown}; the ladder has {', '.join(LADDER.names)}")
    print(f"wrote {train(args)}")


if __name__ == "__main__":
    main()
