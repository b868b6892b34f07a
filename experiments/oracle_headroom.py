"""How much better than the best fixed rung is the oracle at equal bytes? That is the room that learning has.

    python -m experiments.oracle_headroom          # about 15 minutes on a core; writes benchmarks/results/oracle_headroom.json

At every decision the oracle (`train_policy/oracle.py`) tries every rung of every layer on a fork of the run, on the batches that
will come, and the knapsack takes the allocation of least measured loss over the next interval. It chooses among the rungs that it
is compared with, each of which has one run with that rung everywhere, at the best rate of full precision. Beside them stand
`universal`, water-filling and, as the floor of the noise, a run at 16 bits without a budget: what two runs differ by that differ
in rounding alone. What trials promised is compared with what the interval then brought. The file is written after every
run, and a repeated command adds what is missing.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments import transfer
from experiments.transfer import names
from mango.config import LADDER, Ladder
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.twin import score, twin_of
from train_policy.gate import bootstrap_interval
from train_policy.oracle import OraclePolicy

LOSS_ALONE = Reward(beta=0.0, gamma=0.0)                # the budget is hard: what is left to decide is the loss


@dataclass(frozen=True)
class Args:
    workloads: str = "mnist_mlp,source_lm+width=64+depth=1+batch=8"
    rules: str = "adamw,muon"
    budgets: str = "0.0625,0.125"                       # of AdamW's state bytes
    policies: str = "universal,water-filling"
    fixed: str = "m0v0,r32p4q4v0,m2v0,m4v0,m6v0,m8v0"   # rungs, and all that the oracle chooses from
    noise: str = "m16v16"                               # rounding alone, without a budget
    seeds: int = 3
    steps: int = 160
    interval: int = 40                                  # optimizer steps per decision
    window: int = 1                                     # decisions that a trial lasts
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    matrix_lr_scale: float = 4.0                        # Muon's rate over AdamW's, as tuned in benchmarks/quality.py
    rates: str = "0.5,1,2,4"                            # times the workload's own: tried in full precision
    budget_minutes: float = 1e9                         # start nothing after this
    out: Path = Path("benchmarks/results/oracle_headroom.json")

    @property
    def study(self) -> transfer.Args:
        """The same as a study of policies and fixed rungs, which knows no oracle."""
        return transfer.Args(
            workloads=self.workloads, rules=self.rules, budgets=self.budgets, policies=self.policies,
            fixed=f"{self.fixed},{self.noise}", seeds=self.seeds, steps=self.steps, interval=self.interval,
            schedule=self.schedule, max_grad_norm=self.max_grad_norm, matrix_lr_scale=self.matrix_lr_scale, rates=self.rates,
        )  # fmt: skip


def oracle_run(facts: dict[str, Any], args: Args) -> dict[str, Any]:
    """One run that the oracle decides; `facts`: what `transfer.FACTS` names."""
    torch.set_num_threads(1)
    rungs = Ladder(tuple(LADDER[LADDER.index(name)] for name in names(args.fixed)))
    options = {"ladder": rungs} | ({"matrix_lr_scale": args.matrix_lr_scale} if facts["rule"] == "muon" else {})
    run = TrainingRun(
        facts["workload"], facts["seed"], horizon=args.steps, interval=args.interval, memory_budget=facts["budget"],
        lr=facts["lr"], rule=facts["rule"], schedule=args.schedule, max_grad_norm=args.max_grad_norm or None,
        optimizer_options=options,
    )  # fmt: skip
    oracle, twin, began = OraclePolicy(LOSS_ALONE, args.window), twin_of(run), time.process_time()
    peak, decisions, promised, brought = run.optimizer.state_bytes(), [], list[float](), list[float]()
    while not run.done:
        held = [rungs.index(config.name) if config in tuple(rungs) else -1 for config in run.optimizer.applied]
        scores = oracle.decide(run)
        picked = [rungs.index(config.name) for config in run.apply(scores)]
        interval = run.advance()
        peak = max(peak, interval.state_bytes_peak)
        decisions.append([rungs.names[rung] for rung in picked])
        if min(held) >= 0 and args.window == 1:          # a trial of what was held stands in every layer's row
            gains = [scores[layer, rung] - scores[layer, held[layer]] for layer, rung in enumerate(picked)]
            promised.append(100 * float(sum(gains)))
            brought.append(100 * (score(LOSS_ALONE, interval, twin).reward - float(scores[0, held[0]])))
    measures, problem = run.evaluate_or_error()
    loss = measures.get("val_loss", math.nan)
    failed = run.diverged or not math.isfinite(loss)
    return facts | {
        "budget_bytes": run.budget, "state_bytes_peak": peak, "val_loss": None if failed else loss, "val_loss_adamw": None,
        "val_loss_full": twin.evaluation.get("val_loss"), "status": "diverged" if failed else "ok",
        "within_budget": peak <= run.budget, "step_time_ratio": None, "horizon": run.horizon,
        "message": (interval.error or problem or "the training loss diverged") if failed else "",
        "cpu_seconds": time.process_time() - began, "decisions": decisions, "promised": promised, "brought": brought,
    }  # fmt: skip


def jobs(args: Args, runs: Sequence[dict[str, Any]], rates: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The oracle's runs that are missing, seed by seed."""
    lr = {(row["workload"], row["rule"]): row["lr"] for row in rates}
    for seed in range(args.seeds):
        for work in names(args.workloads):
            for rule in names(args.rules):
                for budget in map(float, names(args.budgets)):
                    facts = {"workload": work, "rule": rule, "lr": lr[work, rule], "seed": seed, "policy": "oracle",
                             "weights": "", "budget": budget}  # fmt: skip
                    if transfer.possible(work, rule, budget) and find_run(runs, facts) is None:
                        yield facts


def cases(runs: Sequence[dict[str, Any]], args: Args) -> list[dict[str, Any]]:
    """Per workload, rule and budget: mean gaps to full precision in per cent; `headroom` is best fixed minus oracle."""
    cells = transfer.cells(runs, args.study)
    found = []
    for key in dict.fromkeys((row["workload"], row["rule"], row["budget"]) for row in cells if row["policy"] == "oracle"):
        at = {row["policy"]: row for row in cells if (row["workload"], row["rule"], row["budget"]) == key}
        mine = [run for run in runs if (run["workload"], run["rule"]) == key[:2]]
        noise = [transfer.gap(run) for run in mine if run["policy"] == f"fixed:{args.noise}"]
        trials = [run for run in mine if run["policy"] == "oracle" and run["budget"] == key[2]]
        known = [value for value in noise if value is not None]
        best = at["oracle"]
        found.append({
            "workload": key[0], "rule": key[1], "budget": key[2], "seeds": best["seeds"], "oracle": best["gap_percent"],
            "best_fixed": best["best_fixed"], "best_fixed_gap": best["best_fixed_gap_percent"],
            **{policy: at[policy]["gap_percent"] for policy in names(args.policies) if policy in at},
            "headroom": _minus(best["difference"]), "headroom_by_seed": by_seed(runs, key, best["best_fixed"]),
            "noise": math.sqrt(fmean(value**2 for value in known)) if known else None,
            "promised": _mean([value for run in trials for value in run["promised"]]),
            "brought": _mean([value for run in trials for value in run["brought"]]),
            "oracle_cpu_seconds": _mean([run["cpu_seconds"] for run in trials]),
            "failed": sum(row["failed"] for row in at.values()),
        })  # fmt: skip
    return found


def by_seed(runs: Sequence[dict[str, Any]], key: tuple[str, str, float], rung: str | None) -> list[float]:
    """The best fixed rung's gap minus the oracle's, for every seed that has both."""
    mine = [run for run in runs if (run["workload"], run["rule"]) == key[:2]]
    fixed = {run["seed"]: transfer.gap(run) for run in mine if run["policy"] == f"fixed:{rung}"}
    oracle = {run["seed"]: transfer.gap(run) for run in mine if run["policy"] == "oracle" and run["budget"] == key[2]}
    pairs = [(fixed.get(seed), value) for seed, value in sorted(oracle.items())]
    return [theirs - ours for theirs, ours in pairs if theirs is not None and ours is not None]


def totals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per rule and budget, and over all: the head-room's mean over cases and seeds, its bootstrap interval, the noise."""
    groups = [(rule, budget) for rule in dict.fromkeys(row["rule"] for row in rows)
              for budget in dict.fromkeys(row["budget"] for row in rows)]  # fmt: skip
    found = []
    for rule, budget in [*groups, ("all", None)]:
        here = [row for row in rows if budget is None or (row["rule"], row["budget"]) == (rule, budget)]
        each = [value for row in here for value in row["headroom_by_seed"]]
        noise = [row["noise"] for row in here if row["noise"] is not None]
        if not each:
            continue
        low, high = bootstrap_interval(each) if len(each) > 1 else (None, None)
        found.append({
            "rule": rule, "budget": budget, "pairs": len(each), "headroom": float(np.mean(each)), "low": low, "high": high,
            "noise": math.sqrt(fmean(value**2 for value in noise)) if noise else None,
            "oracle": _mean([row["oracle"] for row in here if row["oracle"] is not None]),
            "best_fixed": _mean([row["best_fixed_gap"] for row in here if row["best_fixed_gap"] is not None]),
        })  # fmt: skip
    return found


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def train(args: Args) -> Path:
    head, began = stamp(args), time.perf_counter()
    rates, runs = earlier_runs(args.out, "rates"), earlier_runs(args.out)

    def keep() -> None:
        rows = cases(runs, args)
        write(args.out, head | {"rates": rates, "runs": runs, "cases": rows, "totals": totals(rows)})

    def late() -> bool:
        return (time.perf_counter() - began) / 60 > args.budget_minutes

    for work in names(args.workloads):
        for rule in names(args.rules):
            if find_run(rates, {"workload": work, "rule": rule}) is None:
                rates.append(transfer.rate_of(work, rule, args.study))
                keep()
                print("{workload} {rule}: rate {lr:g}".format(**rates[-1]), flush=True)
    for unit in transfer.units(args.study, runs, rates):
        if late():
            break
        runs += [run | {"commit": head["commit"]} for run in transfer.measure(unit)]
        keep()
        print(f"{unit.workload} {unit.rule} seed {unit.seed}: policies and fixed rungs done", flush=True)
    for facts in jobs(args, runs, rates):
        if late():
            print("the time is spent; run the command again to go on")
            break
        runs.append(oracle_run(facts, args) | {"commit": head["commit"]})
        keep()
        print("{workload} {rule} seed {seed} budget {budget}: {val_loss} ({cpu_seconds:.0f} s)".format(**runs[-1]), flush=True)
    keep()
    for row in totals(cases(runs, args)):
        print(row)
    return args.out


if __name__ == "__main__":
    print(f"wrote {train(parse(Args, __doc__))}")
