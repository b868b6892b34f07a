"""How much better than the best fixed rung is the oracle at equal bytes? That is the room that learning has.

    python -m experiments.oracle_headroom          # about 15 minutes on a core; writes benchmarks/results/oracle_headroom.json

At every decision the oracle (`train_policy/oracle.py`) tries every rung of every layer on a fork of the run, on the batches that
will come, and the knapsack takes the allocation of least measured loss over the next interval. It chooses among the rungs that it
is compared with, each of which has one run with that rung everywhere, at the best rate of full precision. That oracle sees one
interval ahead; `hindsight` decides once, by the held-out loss at the end of runs in which one layer had another rung from the
start. Both add up what layers gained alone; what that promised is compared with what the allocation then brought. Beside them
stand `universal`, water-filling and, as the floor of the noise, a run at 16 bits without a budget: what two runs differ by
that differ in rounding alone. The file is written after every run, and a repeated command adds what is missing.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments import transfer
from experiments.transfer import NOISE, names
from mango.config import LADDER, CompressionConfig, Ladder
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.twin import score, twin_of
from train_policy.oracle import UNBOUNDED, OraclePolicy, affordable

LOSS_ALONE = Reward(beta=0.0, gamma=0.0)                # the budget is hard: what is left to decide is the loss


@dataclass(frozen=True)
class Args:
    workloads: str = "mnist_mlp,source_lm+width=64+depth=1+batch=8"
    rules: str = "adamw,muon"
    budgets: str = "0.0625,0.125"                       # of AdamW's state bytes
    policies: str = "universal,water-filling"
    fixed: str = "m0v0,r32p4q4v0,m2v0,m4v0,m6v0,m8v0"   # rungs, and all that the oracle chooses from
    noise: str = NOISE                                  # rounding alone, without a budget
    seeds: int = 3
    steps: int = 160
    interval: int = 40                                  # optimizer steps per decision
    oracles: str = "oracle,hindsight"
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


def begun(facts: dict[str, Any], args: Args) -> TrainingRun:
    """A run at its start, which holds what it is told; its ladder are the rungs that are compared."""
    rungs = Ladder(tuple(LADDER[LADDER.index(name)] for name in names(args.fixed)))
    return TrainingRun(
        facts["workload"], facts["seed"], horizon=args.steps, interval=args.interval, memory_budget=facts["budget"],
        lr=facts["lr"], rule=facts["rule"], schedule=args.schedule, max_grad_norm=args.max_grad_norm or None,
        optimizer_options={"ladder": rungs} | ({"matrix_lr_scale": args.matrix_lr_scale} if facts["rule"] == "muon" else {}),
    )  # fmt: skip


def hindsight(run: TrainingRun) -> Tensor:
    """Scores (L, R): minus 100 log of the held-out loss at the end, where one layer has one rung from here on."""
    fork, start, held, allowed = run.fork(), run.snapshot(), list(run.optimizer.applied), affordable(run)
    fork.optimizer.budget.total = UNBOUNDED

    def outcome(configs: list[CompressionConfig]) -> float:
        fork.restore(start)
        fork.apply(configs)
        while not fork.done:
            fork.advance()
        return -math.inf if fork.diverged else -100 * math.log(fork.evaluate()["val_loss"])

    scores = np.where(allowed, outcome(held), -np.inf)
    for layer, rung in np.argwhere(allowed).tolist():
        other = run.optimizer.ladder[rung]
        if other != held[layer]:
            scores[layer, rung] = outcome([*held[:layer], other, *held[layer + 1 :]])
    return torch.from_numpy(scores)


def oracle_run(facts: dict[str, Any], args: Args) -> dict[str, Any]:
    """One run that an oracle decides; `facts`: what `transfer.FACTS` names. Gains over holding what was held are in per cent."""
    torch.set_num_threads(1)
    run, oracle, began = begun(facts, args), OraclePolicy(LOSS_ALONE), time.process_time()
    ladder, twin, ahead = run.optimizer.ladder, twin_of(run), facts["policy"] == "oracle"
    peak, decisions = run.optimizer.state_bytes(), list[list[str]]()
    promised, brought = list[float](), list[float]()
    while not run.done:
        held, expected = list(run.optimizer.applied), None
        if ahead or not decisions:
            scores = 100 * oracle.decide(run) if ahead else hindsight(run)
            picked = [ladder.index(config.name) for config in run.apply(scores)]
            decisions.append([ladder.names[rung] for rung in picked])
            if all(config in tuple(ladder) for config in held):          # a trial of holding them stands in every layer's row
                before = [float(scores[layer, ladder.index(config.name)]) for layer, config in enumerate(held)]
                expected = before[0]
                promised.append(sum(float(scores[layer, rung]) - before[layer] for layer, rung in enumerate(picked)))
        interval = run.advance()
        peak = max(peak, interval.state_bytes_peak)
        if ahead and expected is not None:
            brought.append(100 * score(LOSS_ALONE, interval, twin).reward - expected)
        elif expected is not None:
            baseline = expected
    measures, problem = run.evaluate_or_error()
    loss = measures.get("val_loss", math.nan)
    failed = run.diverged or not math.isfinite(loss)
    if not ahead and promised and not failed:
        brought.append(-100 * math.log(loss) - baseline)
    return facts | {
        "budget_bytes": run.budget, "state_bytes_peak": peak, "val_loss": None if failed else loss, "val_loss_adamw": None,
        "val_loss_full": twin.evaluation.get("val_loss"), "status": "diverged" if failed else "ok",
        "within_budget": peak <= run.budget, "step_time_ratio": None, "horizon": run.horizon,
        "message": (interval.error or problem or "the training loss diverged") if failed else "",
        "cpu_seconds": time.process_time() - began, "decisions": decisions, "promised": promised, "brought": brought,
    }  # fmt: skip


def jobs(args: Args, runs: Sequence[dict[str, Any]], rates: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The oracles' runs that are missing, seed by seed."""
    lr = {(row["workload"], row["rule"]): row["lr"] for row in rates}
    every = (names(args.workloads), names(args.rules), names(args.budgets), names(args.oracles))
    for seed in range(args.seeds):
        for work, rule, budget, oracle in product(*every):
            facts = {"workload": work, "rule": rule, "lr": lr[work, rule], "seed": seed, "policy": oracle, "weights": "",
                     "budget": float(budget)}  # fmt: skip
            if transfer.possible(work, rule, float(budget)) and find_run(runs, facts) is None:
                yield facts


def cases(runs: Sequence[dict[str, Any]], args: Args) -> list[dict[str, Any]]:
    """Per workload, rule and budget: mean gaps to full precision in per cent, of fixed rungs that of the best that fits.

    One row per oracle; `headroom` is the best fixed rung's gap minus the oracle's, on the oracle's seeds.
    """
    found = []
    for work, rule, size, oracle in product(names(args.workloads), names(args.rules), names(args.budgets), names(args.oracles)):
        mine = [run for run in runs if (run["workload"], run["rule"]) == (work, rule)]
        trials = [run for run in mine if run["policy"] == oracle and run["budget"] == float(size)]
        seeds = {run["seed"] for run in trials}
        cells = transfer.cells([run for run in mine if run["seed"] in seeds], replace(args.study, workloads=work, rules=rule))
        at = {row["policy"]: row for row in cells if row["budget"] == float(size)}
        if oracle not in at:
            continue
        rung = at[oracle]["best_fixed"]
        fixed = {run["seed"]: transfer.gap(run) for run in mine if run["policy"] == f"fixed:{rung}"}
        pairs = [(fixed.get(run["seed"]), transfer.gap(run)) for run in trials]
        noise = [transfer.gap(run) for run in mine if run["policy"] == f"fixed:{args.noise}"]
        found.append({
            "workload": work, "rule": rule, "budget": float(size), "oracle": oracle, "seeds": at[oracle]["seeds"],
            "gap": at[oracle]["gap_percent"], "best_fixed": rung, "best_fixed_gap": at[oracle]["best_fixed_gap_percent"],
            "headroom": [theirs - ours for theirs, ours in pairs if theirs is not None and ours is not None],
            **{policy: at[policy]["gap_percent"] for policy in names(args.policies) if policy in at},
            "noise": _rms([value for value in noise if value is not None]),
            "promised": _mean([value for run in trials for value in run["promised"]]),
            "brought": _mean([value for run in trials for value in run["brought"]]),
            "cpu_seconds": _mean([run["cpu_seconds"] for run in trials]), "failed": at[oracle]["failed"],
        })  # fmt: skip
    return found


def totals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per oracle, rule and budget: the head-room's mean over workloads and seeds, its extremes, the noise, and the policies'."""
    found = []
    for key in dict.fromkeys((row["oracle"], row["rule"], row["budget"]) for row in rows):
        here = [row for row in rows if (row["oracle"], row["rule"], row["budget"]) == key]
        each = [value for row in here for value in row["headroom"]]
        known = [row["noise"] for row in here if row["noise"] is not None]
        if each:
            found.append({
                "oracle": key[0], "rule": key[1], "budget": key[2], "pairs": len(each), "headroom": fmean(each),
                "least": min(each), "most": max(each), "noise": _rms(known),
                "gap": _mean([row["gap"] for row in here]), "best_fixed_gap": _mean([row["best_fixed_gap"] for row in here]),
            })  # fmt: skip
    return found


def _rms(values: Sequence[float]) -> float | None:
    return math.sqrt(fmean(value**2 for value in values)) if values else None


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
        told = "{policy}, {workload} {rule} at {budget}, seed {seed}: {val_loss}, {cpu_seconds:.0f} s"
        print(told.format(**runs[-1]), flush=True)
    keep()
    for row in totals(cases(runs, args)):
        print(row)
    return args.out


if __name__ == "__main__":
    print(f"wrote {train(parse(Args, __doc__))}")
