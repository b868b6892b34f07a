"""bfloat16 parameters with a correction of 8 or 16 bits, or rounded by chance, against the same run in float32.

    python -m experiments.bf16_master --out benchmarks/results/bf16_master.json

Claim: training in bfloat16 with a correction ends at float32's loss, within noise. A small character GPT learns tiny
Shakespeare (MANGO_DATA holds it) by MANGO with full-precision moments, so that only the parameters differ; activations and
gradients are of the parameters' dtype. Runs of a seed start alike and see the same batches.

Training is chaotic: two runs that differ in a last bit end apart. How far tells a float32 run whose start was nudged by a
relative 1e-3, which is less than rounding it to bfloat16 does: its gaps to float32 are noise, of mean zero. A method is within
noise where zero lies in the 95 % interval of its mean gap (Student's t over the seeds), and no worse than noise where the mean
gap is below that of as many nudged runs in 95 of 100 studies; the latter is the sharper test, since arithmetic in bfloat16
nudges at every step. Beside the claim stands torch's AdamW in bfloat16, which rounds parameters and moments to nearest. The
file is written after every run and a repeated command goes on where it was.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from torch.optim import AdamW, Optimizer

from benchmarks import quality
from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from mango import MANGO, CompressionConfig
from mango_env.workloads.data import TextData
from mango_env.workloads.text import LanguageModel

NUDGE = 1e-3                                            # relative, normal
CONTROLS = ("nudged_1", "nudged_2")                     # float32 runs from a nudged start


@dataclass(frozen=True)
class Args:
    methods: str = "fp32,nudged_1,nudged_2,bf16_32,bf16_24,bf16_16,bf16_nearest"  # bf16_<master bits>, or torch's nearest
    seeds: int = 5                                      # runs per method
    steps: int = 300
    width: int = 128
    depth: int = 2
    batch: int = 12                                     # windows of 64 characters
    lr: float = 3e-3                                    # AdamW's tuned one in benchmarks/quality.py
    threads: int = 1                                    # torch threads
    out: Path = Path("benchmarks/results/bf16_master.json")


@torch.no_grad()
def nudge(model: Module, seed: int) -> None:
    """Multiply every weight by 1 + NUDGE times a normal number."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.mul_(1 + NUDGE * torch.randn(p.shape, generator=generator))


def build(method: str, lr: float, model: Module, seed: int) -> Optimizer:
    """The optimizer of a method; turns the model into what the method trains."""
    if method in CONTROLS:
        nudge(model, 1000 * int(method.removeprefix("nudged_")) + seed)
    if method.startswith("bf16"):
        model.bfloat16()
    if method == "bf16_nearest":
        return AdamW(model.parameters(), lr=lr, weight_decay=0, fused=True)
    bits = int(method.removeprefix("bf16_")) if method.startswith("bf16") else 16
    exact = CompressionConfig()
    return MANGO(model.named_parameters(), lr=lr, policy=exact, policy_update_freq=10**9, master_bits=bits, seed=seed)


def run(text: TextData, method: str, seed: int, args: Args) -> dict[str, float]:
    """One training: its loss as the model is, and with the same weights in float32 arithmetic."""
    shape = quality.Args(steps=args.steps, width=args.width, depth=args.depth, batch=args.batch)
    trained: list[Module] = []

    def made(model: Module, seed: int) -> Optimizer:
        trained.append(model)
        return build(method, args.lr, model, seed)

    found = quality.run(text, seed, shape, made)
    exact = LanguageModel(text, seed, steps=args.steps, batch=args.batch, context=64, width=args.width, depth=args.depth,
                          heads=4, lr=0.0, val_windows=1024)  # fmt: skip
    exact.model.load_state_dict(trained[0].state_dict())
    return found | {"val_loss_float32": exact.evaluate()["val_loss"]}


@cache
def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from a million draws."""
    return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, 1_000_000)), 0.95))


def bound(spread: list[float], runs: int, centre: float = 0.0) -> float:
    """Half the 95 % interval of the mean of `runs` numbers that scatter like these: by Student's t, about a known `centre` or
    (nan) about their own mean.

    >>> round(bound([-1.0, 1.0], 1), 1), round(bound([0.0, 2.0, 4.0], 3, math.nan), 1)
    (4.3, 5.0)
    """
    own = math.isnan(centre)
    freedom = len(spread) - own
    middle = mean(spread) if own else centre
    return student(freedom) * math.sqrt(sum((x - middle) ** 2 for x in spread) / freedom / runs)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method: loss, the paired gap to float32 in per cent, and whether that is within noise."""
    found = {(r["method"], r["seed"]): r for r in runs}

    def gaps(method: str, loss: str = "val_loss") -> list[float]:
        mine = [(r, found["fp32", s]) for (m, s), r in found.items() if m == method and ("fp32", s) in found]
        return [100 * (r[loss] / exact[loss] - 1) for r, exact in mine]

    noise = [gap for control in CONTROLS for gap in gaps(control)]
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        losses, gap = [r["val_loss"] for (m, _), r in found.items() if m == method], gaps(method)
        if len(losses) < 2 or len(gap) < 2 or not noise:
            continue
        row = {"method": method, "seeds": len(losses), "val_loss": mean(losses), "val_loss_sd": stdev(losses)}
        if method != "fp32":
            half = bound(gap, len(gap), math.nan)
            row |= {"gap_percent": mean(gap), "gap_low": mean(gap) - half, "gap_high": mean(gap) + half,
                    "gap_in_float32_arithmetic": mean(gaps(method, "val_loss_float32"))}  # fmt: skip
        if method not in ("fp32", *CONTROLS):
            noise_bound = bound(noise, len(gap))
            row |= {"noise_bound_percent": noise_bound, "within_noise": abs(mean(gap)) <= half,
                    "no_worse_than_noise": mean(gap) <= noise_bound}  # fmt: skip
        rows.append(row)
    return rows


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    runs = earlier_runs(args.out)
    head, text = stamp(args), quality.read("shakespeare")
    facts = {"steps": args.steps, "width": args.width, "depth": args.depth, "batch": args.batch, "lr": args.lr}
    one: Callable[..., dict[str, float]] = partial(run, text, args=args)
    for seed in range(args.seeds):                      # a seed of everything before the next: stopped early, it is still paired
        for method in args.methods.split(","):
            key = {"method": method, "seed": seed} | facts
            if find_run(runs, key):
                continue
            runs.append(key | one(method, seed))
            write(args.out, head | {"runs": runs, "summary": summary(runs)})
            print(f"{method:14s} seed {seed}  {runs[-1]['val_loss']:.4f}  {runs[-1]['val_loss_float32']:.4f} in float32"
                  f"  {runs[-1]['seconds']:.0f} s", flush=True)  # fmt: skip
    write(args.out, head | {"runs": runs, "summary": summary(runs)})
    for row in summary(runs):
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    return args.out


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
