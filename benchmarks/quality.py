"""Loss against bytes: base rules and stored formats on a character GPT of 1 M parameters, paired with tuned AdamW.

    python -m benchmarks.quality --out benchmarks/results/quality.json

Every method trains the same model from the same start over the same batches: 3 layers of width 160, contexts of 64,
768 characters per step, 600 steps, warm-up 50 and a cosine to a tenth, gradients clipped at norm 1, no weight decay.
Learning rates are tuned per data set on a seed that is not among those reported, over the grids below, for AdamW and for
Muon in full precision; compressed runs take the rate of their rule. The file is written after every run and a repeated
command goes on where it was; MANGO_DATA holds the texts.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from mango import MANGO, CompressionConfig
from mango_env.workloads import Workload
from mango_env.workloads.data import TextData
from mango_env.workloads.text import LanguageModel, books, shakespeare

TUNING_SEED = 1000
ADAMW_GRID = (1.5e-3, 3e-3, 6e-3)
MUON_GRID = (1.0, 2.0, 4.0, 8.0)                        # matrix_lr_scale: Muon's rate over AdamW's tuned one


@dataclass(frozen=True)
class Args:
    data: str = "shakespeare,books"                     # texts, comma-separated
    methods: str = "adamw,m8v8,m4v4,m4v0,m2v0,muon-full,muon-m8v0,muon-m4v0"  # rule-rung, or a rung of AdamW
    seeds: int = 5                                      # runs per method
    steps: int = 600
    width: int = 160
    depth: int = 3
    batch: int = 12                                     # windows of 64 characters
    threads: int = 1                                    # torch threads
    budget_minutes: float = 1e9                         # stop before a run that would end after this
    out: Path = Path("benchmarks/results/quality.json")


def read(data: str) -> TextData:
    """Tiny Shakespeare, or the first 4 M characters of the books, with held-out parts."""
    return shakespeare("benchmarks.quality") if data == "shakespeare" else books("benchmarks.quality")


def config_of(rung: str) -> CompressionConfig:
    """'m4v0' as a config, 'full' as full precision."""
    if rung == "full":
        return CompressionConfig()
    momentum, variance = rung[1:].split("v")
    return CompressionConfig(momentum_bits=int(momentum), variance_bits=int(variance))


def builder(method: str, lr: float, scale: float) -> Callable[[torch.nn.Module, int], Optimizer]:
    """What makes the optimizer of a method: torch's AdamW, or MANGO with a rule and a fixed rung."""
    if method == "adamw":
        return lambda model, seed: AdamW(model.parameters(), lr=lr, weight_decay=0, fused=True)
    rule, _, rung = method.rpartition("-")
    return lambda model, seed: MANGO(
        model.named_parameters(), lr=lr, policy=config_of(rung), rule=rule or "adamw", matrix_lr_scale=scale, seed=seed,
        policy_update_freq=10**9,
    )  # fmt: skip


def train_task(task: Workload, optimizer: Optimizer, steps: int, before: Callable[[int], None] | None = None) -> None:
    """Warm-up and cosine, gradients clipped at norm 1. `before(step)` is called ahead of every step."""

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))

    scheduler = LambdaLR(optimizer, schedule)
    for step in range(steps):
        if before is not None:
            before(step)
        optimizer.zero_grad()
        task.loss().backward()                          # type: ignore[no-untyped-call]
        clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def run(text: TextData, seed: int, args: Args, build: Callable[[torch.nn.Module, int], Optimizer]) -> dict[str, float]:
    """One training."""
    task = LanguageModel(text, seed, steps=args.steps, batch=args.batch, context=64, width=args.width, depth=args.depth,
                         heads=4, lr=0.0, val_windows=1024)  # fmt: skip
    optimizer = build(task.model, seed)
    began = time.perf_counter()
    train_task(task, optimizer, args.steps)
    numel = sum(p.numel() for p in task.model.parameters())
    stored = optimizer.state_bytes() if isinstance(optimizer, MANGO) else 8 * numel
    return {"val_loss": task.evaluate()["val_loss"], "state_bytes_per_param": stored / numel, "parameters": numel,
            "seconds": time.perf_counter() - began}  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per data set and method: loss, and the paired difference to AdamW in per cent with a bootstrap interval."""
    rows = []
    generator = np.random.default_rng(0)
    for data in dict.fromkeys(r["data"] for r in runs):
        found = {(r["method"], r["seed"]): r for r in runs if r["data"] == data and r["seed"] != TUNING_SEED}
        for method in dict.fromkeys(method for method, _ in found):
            seeds = [s for m, s in found if m == method and ("adamw", s) in found]
            if not seeds:
                continue
            losses = [found[method, s]["val_loss"] for s in seeds]
            gaps = np.array([100 * (found[method, s]["val_loss"] / found["adamw", s]["val_loss"] - 1) for s in seeds])
            draws = gaps[generator.integers(len(gaps), size=(10_000, len(gaps)))].mean(1)
            rows.append({
                "data": data, "method": method, "seeds": len(seeds), "val_loss": mean(losses),
                "val_loss_sd": stdev(losses) if len(losses) > 1 else 0.0, "gap_percent": float(gaps.mean()),
                "gap_low": float(np.quantile(draws, 0.025)), "gap_high": float(np.quantile(draws, 0.975)),
                "state_bytes_per_param": found[method, seeds[0]]["state_bytes_per_param"],
            })  # fmt: skip
    return rows


class Study:
    """The runs done so far, and how to add one."""

    def __init__(self, args: Args) -> None:
        self.args, self.began = args, time.perf_counter()
        self.runs = earlier_runs(args.out)
        self.head = stamp(args)
        self.texts: dict[str, TextData] = {}

    def get(self, data: str, method: str, seed: int, lr: float, scale: float) -> float:
        """The validation loss of a run, done now unless it was done before."""
        facts = {"data": data, "method": method, "seed": seed, "lr": lr, "matrix_lr_scale": scale, "steps": self.args.steps}
        if done := find_run(self.runs, facts):
            return float(done["val_loss"])
        longest = max((r["seconds"] for r in self.runs), default=0.0)
        if (time.perf_counter() - self.began + longest) / 60 > self.args.budget_minutes:
            raise TimeoutError("the time is spent; run the command again to go on")
        if data not in self.texts:
            self.texts[data] = read(data)
        found = run(self.texts[data], seed, self.args, builder(method, lr, scale))
        self.runs.append(facts | found | {"commit": self.head["commit"]})
        write(self.args.out, self.head | {"runs": self.runs, "summary": summary(self.runs)})
        print(f"{data} {method} seed {seed} lr {lr:g} x {scale:g}: {found['val_loss']:.4f} at"
              f" {found['state_bytes_per_param']:.3f} B/param, {found['seconds']:.0f} s", flush=True)  # fmt: skip
        return float(found["val_loss"])

    def rates(self, data: str) -> tuple[float, float]:
        """AdamW's tuned rate and Muon's tuned scale on it."""
        lr = min(ADAMW_GRID, key=lambda rate: self.get(data, "adamw", TUNING_SEED, rate, 1.0))
        muon = any(method.startswith("muon") for method in self.args.methods.split(","))
        return lr, min(MUON_GRID, key=lambda s: self.get(data, "muon-full", TUNING_SEED, lr, s)) if muon else 1.0


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    study = Study(args)
    try:
        rates = {data: study.rates(data) for data in args.data.split(",")}
        for seed in range(args.seeds):                  # a seed of everything before the next: stopped early, it is still paired
            for data, (lr, scale) in rates.items():
                for method in args.methods.split(","):
                    study.get(data, method, seed, lr, scale if method.startswith("muon") else 1.0)
    except TimeoutError as spent:
        print(spent)
    for row in summary(study.runs):
        print(f"{row['data']:12s} {row['method']:12s} {row['state_bytes_per_param']:6.3f} B/param  {row['val_loss']:.4f}"
              f"  {row['gap_percent']:+.2f} % [{row['gap_low']:+.2f}, {row['gap_high']:+.2f}]  n={row['seeds']}")  # fmt: skip
    return args.out


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
