"""AdaRankGrad's falling ranks in float32 against MANGO at the same mean bytes: loss on tiny Shakespeare.

    python -m experiments.rank_schedule --out benchmarks/results/rank_schedule.json

AdaRankGrad (Refael et al. 2025) keeps AdamW's moments of every hidden matrix in a subspace of its gradient. Every `--every`
steps the subspace is sought anew, with the least rank that loses no more than a share of the gradient's energy, and moments
are carried over. "falling-0.1": a tenth may be lost, and no rank is above the one in force before; "free-0.05": a twentieth,
and ranks may rise as well, since a small start has first gradients of rank one. Embedding, head and vectors have dense AdamW,
as in the paper. All is float32. MANGO gets the mean of AdaRankGrad's bytes over the steps as its `memory_budget`, which it
never exceeds: "mango" by water-filling over the shipped ladder, "mango_ranks" over a ladder of subspaces alone, where only
ranks and the bits of their factors change.

Every method tunes its rate over the same grid on a seed that is not among those reported; AdaRankGrad tunes the scale of its
matrices' updates too (GaLore's alpha), and its bytes, from which the budget comes, are those of its tuned run. The file is
written after every run and a repeated command goes on where it was; MANGO_DATA holds the text.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.nn import Module
from torch.optim import AdamW, Optimizer

from benchmarks import quality
from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments.adarankgrad import AdaRankGrad, hidden_matrices
from experiments.tuning import TUNING_SEED
from mango import MANGO
from mango.config import LADDER, CompressionConfig, Ladder
from mango_env.workloads.data import TextData

SUBSPACES = Ladder(tuple(                               # of MANGO: dynamic ranks, in factors of 4 and 8 bits
    CompressionConfig(rank=rank, factor_bits_p=bits, factor_bits_q=bits, variance_bits=variance)
    for rank in (4, 8, 32, 128) for bits, variance in ((4, 0), (8, 0), (8, 8))
))  # fmt: skip


@dataclass(frozen=True)
class Args:
    methods: str = "adarank,mango,mango_ranks"          # or "adamw": torch's, for the loss without any of this
    schedules: str = "falling-0.1,free-0.05"            # of AdaRankGrad's ranks: the share of energy that may be lost
    lr: str = "4e-3,8e-3,1.6e-2,3.2e-2"                 # the grid of rates
    scales: str = "0.25,1.0"                            # AdaRankGrad's: rate of its matrices over that of the rest
    seeds: int = 3                                      # runs per method
    steps: int = 300
    every: int = 50                                     # steps between subspaces, and between MANGO's decisions
    width: int = 128
    depth: int = 2
    batch: int = 12                                     # windows of 64 characters
    threads: int = 1                                    # torch threads
    out: Path = Path("benchmarks/results/rank_schedule.json")


@dataclass(frozen=True)
class Case:
    """One run: a method, and what its optimizer is given."""

    method: str
    schedule: str                                       # AdaRankGrad's, whose bytes count
    seed: int
    lr: float
    scale: float = 1.0
    budget: int = 0                                     # bytes, of MANGO


def run(text: TextData, case: Case, args: Args) -> dict[str, Any]:
    """One training, with the bytes of state after every step."""
    sizes: list[int] = []
    ranks: list[float] = []

    def build(model: Module, seed: int) -> Optimizer:
        named = list(model.named_parameters())
        optimizer: Optimizer
        if case.method == "adamw":
            return AdamW(model.parameters(), lr=case.lr, weight_decay=0, fused=True)
        if case.method == "adarank":
            optimizer = AdaRankGrad(named, lr=case.lr, hidden=hidden_matrices(model), schedule=case.schedule,
                                    every=args.every, seed=seed, scale=case.scale)  # fmt: skip
        else:
            ladder = SUBSPACES if case.method == "mango_ranks" else LADDER
            optimizer = MANGO(named, lr=case.lr, memory_budget=case.budget, ladder=ladder, policy_update_freq=args.every,
                              total_steps=args.steps, seed=seed)  # fmt: skip

        def look(optimizer: Any, *_: Any) -> None:
            sizes.append(optimizer.state_bytes())
            ranks.append(mean(optimizer.ranks().values()) if isinstance(optimizer, AdaRankGrad) else 0.0)

        optimizer.register_step_post_hook(look)
        return optimizer

    shape = quality.Args(steps=args.steps, width=args.width, depth=args.depth, batch=args.batch)
    found = quality.run(text, case.seed, shape, build)
    numel = found["parameters"]
    told = {"val_loss": found["val_loss"], "seconds": found["seconds"], "parameters": numel}
    if not sizes:
        return told | {"bytes_mean": 8 * numel, "bytes_peak": 8 * numel}
    told |= {"bytes_mean": math.floor(mean(sizes)), "bytes_peak": max(sizes)}
    return told | ({"rank_first": ranks[0], "rank_last": ranks[-1]} if case.method == "adarank" else {})


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per schedule and method: loss, bytes, and the paired gap to AdaRankGrad in per cent."""
    told = [r for r in runs if r["seed"] != TUNING_SEED]
    rows = []
    for place in dict.fromkeys((r["schedule"], r["method"]) for r in told):
        mine = {r["seed"]: r for r in told if (r["schedule"], r["method"]) == place}
        theirs = {r["seed"]: r for r in told if (r["schedule"], r["method"]) == (place[0], "adarank")}
        gaps = [100 * (r["val_loss"] / theirs[seed]["val_loss"] - 1) for seed, r in mine.items() if seed in theirs]
        if len(gaps) < 2:
            continue
        losses, numel = [r["val_loss"] for r in mine.values()], runs[0]["parameters"]
        rows.append({
            "schedule": place[0], "method": place[1], "seeds": len(mine), "lr": next(iter(mine.values()))["lr"],
            "val_loss": mean(losses), "val_loss_sd": stdev(losses), "gap_percent": mean(gaps), "gap_low": min(gaps),
            "gap_high": max(gaps), "at_most_1_percent_worse": mean(gaps) <= 1,
            "mean_bytes_per_param": mean(r["bytes_mean"] for r in mine.values()) / numel,
            "peak_bytes_per_param": max(r["bytes_peak"] for r in mine.values()) / numel,
        })  # fmt: skip
    return rows


class Study:
    """The runs done so far, and how to add one."""

    def __init__(self, args: Args) -> None:
        self.args, self.head, self.text = args, stamp(args), quality.read("shakespeare")
        self.runs = earlier_runs(args.out)

    def save(self) -> None:
        write(self.args.out, self.head | {"runs": self.runs, "summary": summary(self.runs)})

    def get(self, case: Case) -> dict[str, Any]:
        """The facts of a run, done now unless it was done before."""
        facts = {field.name: getattr(case, field.name) for field in fields(case)}
        facts |= {name: getattr(self.args, name) for name in ("steps", "every", "width", "depth", "batch")}
        if before := find_run(self.runs, facts):
            return before
        self.runs.append(facts | run(self.text, case, self.args))
        self.save()
        done = self.runs[-1]
        print(f"{case.method:12s} {case.schedule} seed {case.seed} lr {case.lr:g} x {case.scale:g}: {done['val_loss']:.4f} at"
              f" {done['bytes_mean'] / done['parameters']:.3f} B/param, {done['seconds']:.0f} s", flush=True)  # fmt: skip
        return done

    def tuned(self, method: str, schedule: str, budget: int) -> dict[str, Any]:
        """The best run over the grid on the tuning seed; the grid goes on upwards while its highest rate is the best."""
        scales = [float(scale) for scale in self.args.scales.split(",")] if method == "adarank" else [1.0]
        rates = [float(lr) for lr in self.args.lr.split(",")]
        while True:
            cases = [Case(method, schedule, TUNING_SEED, lr, scale, budget) for lr in rates for scale in scales]
            best = min((self.get(case) for case in cases), key=lambda r: float(r["val_loss"]))
            if best["lr"] < rates[-1]:
                return best
            rates.append(2 * rates[-1])


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    study = Study(args)
    for schedule in args.schedules.split(","):
        budget = 0
        best: dict[str, Case] = {}
        for method in args.methods.split(","):          # AdaRankGrad first: its bytes are the others' budget
            done = study.tuned(method, schedule, budget)
            best[method] = Case(method, schedule, TUNING_SEED, done["lr"], done["scale"], budget)
            budget = done["bytes_mean"] if method == "adarank" else budget
        for seed in range(args.seeds):
            for method, case in best.items():
                study.get(Case(method, schedule, seed, case.lr, case.scale, case.budget))
    study.save()
    for row in summary(study.runs):
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    return args.out


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
