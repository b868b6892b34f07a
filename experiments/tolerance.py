"""Do a layer's own statistics tell what it loses by a coarse moment? Predicted beside measured loss, layer by layer.

    python -m experiments.tolerance --out benchmarks/results/tolerance.json

A workload is trained in full precision. At an early and a late moment the run is forked, once per layer and coarse rung: that
layer alone is stored so for a window of steps, on the same batches as a fork in full precision. Measured is how much higher
the training loss is over the window without its first interval. Beside it stands what can be told before, from the observation
of that moment:

  water_filling   the layer's cost as the policy has it: its size times the squared relative error of its update
  error           that relative error alone
  update_error    the norm of the error in the update: relative error times the norm of the last update
  first_order     that norm times the gradient's: the loss change of an error along the gradient
  grad_norm, noise_scale, numel    by themselves
  learned         what the policy `universal` charges for the rung, against full precision; it learned from runs of `source_lm`'s
                  kind and never saw `fashion_vit`

Both sides are means over seeds, then ranked over layers: Spearman's correlation, with its interval from drawing seeds again
(bootstrap, 95 %); beside it that with the size of what was measured, whatever its sign. "losing" is the share of layers whose
loss did rise: in short windows a coarse moment often lowers the loss. "repeats" is the same correlation of the measured losses
of one half of the seeds with the other's, which no prediction can be expected to exceed by much. The file is written after every
moment, and a repeated command goes on where it was.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from experiments.curvature import ranks
from mango.config import FULL, LADDER, CompressionConfig
from mango.policies import ScoringPolicy, WaterFillingPolicy, feature
from mango.policy_choice import as_policy
from mango_env.run import TrainingRun

Floats = NDArray[np.float64]
Row = dict[str, Any]
MEASURED = "percent_above"                               # of a run: rung -> a number per layer
DRAWS = 2000                                             # bootstrap samples of seeds


@dataclass(frozen=True)
class Args:
    workloads: str = "source_lm+batch=8,fashion_vit+width=48"  # comma-separated
    rules: str = "adamw,muon"
    rungs: str = "m2v0,m0v0"                            # coarse ones, names on the ladder
    moments: str = "early:20,late:120"                  # steps at which runs are forked
    window: int = 30                                    # steps that a fork trains
    interval: int = 10                                  # steps per decision and window of statistics
    seeds: int = 4
    out: Path = Path("benchmarks/results/tolerance.json")


def predictions(obs: Tensor, config: CompressionConfig) -> dict[str, list[float]]:
    """What each predictor says that every layer loses (L,) under a config."""

    def of(name: str) -> Tensor:
        return 10.0 ** feature(obs, name).double()

    squared = WaterFillingPolicy.squared_error(obs, config).double()
    update = of("update_ratio") * of("weight_rms") * of("numel").sqrt()
    policy = as_policy("universal", LADDER)
    assert isinstance(policy, ScoringPolicy)
    learned = policy.scores(obs)
    found = {
        "water_filling": of("numel") * squared, "error": squared.sqrt(), "update_error": update * squared.sqrt(),
        "first_order": of("grad_norm") * update * squared.sqrt(), "grad_norm": of("grad_norm"),
        "noise_scale": of("noise_scale"), "numel": of("numel"),
        "learned": learned[:, LADDER.index(FULL.name)] - learned[:, LADDER.index(config.name)],
    }  # fmt: skip
    return {name: values.tolist() for name, values in found.items()}


def window_loss(run: TrainingRun, args: Args) -> float:
    """Mean training loss of the window without its first interval; infinite where the run diverges."""
    losses: list[float] = []
    for _ in range(args.window // args.interval):
        interval = run.advance()
        if interval.diverged:
            return math.inf
        losses += interval.losses.tolist()
    return float(np.mean(losses[args.interval :]))


def measure(run: TrainingRun, fork: TrainingRun, args: Args) -> Row:
    """At the run's moment: per cent of loss that each layer costs in each rung, and what was predicted."""
    start, layers = run.snapshot(), len(run.layers)
    obs = torch.from_numpy(run.observe())

    def trial(configs: list[CompressionConfig]) -> float:
        fork.restore(start)
        fork.apply(configs)
        return window_loss(fork, args)

    usual = trial([FULL] * layers)
    measured: dict[str, list[float]] = {}
    for name in args.rungs.split(","):
        rung = LADDER[LADDER.index(name)]
        losses = [trial([rung if i == layer else FULL for i in range(layers)]) for layer in range(layers)]
        measured[name] = [100 * (loss / usual - 1) for loss in losses]
    told = {name: predictions(obs, LADDER[LADDER.index(name)]) for name in measured}
    return {"layers": [layer.name for layer in run.layers], "loss": usual, MEASURED: measured, "predicted": told}


def moments(args: Args) -> dict[str, int]:
    """Their steps, by name, in the order of time."""
    found = {name: int(step) for name, _, step in (one.partition(":") for one in args.moments.split(","))}
    for step in found.values():
        if step % args.interval or step < args.interval:
            raise ValueError(f"a moment at step {step} is not after a whole interval of {args.interval} steps")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def spearman(one: Floats, other: Floats) -> Floats:
    """Over the last axis of two tables (..., L)."""
    found: Floats = (ranks(one) * ranks(other)).sum(-1)
    return found


def correlate(predicted: Floats, measured: Floats) -> Row:
    """Spearman's correlation over layers of the means over seeds of two tables (S, L), with its interval over seeds."""
    seeds = np.random.default_rng(0).integers(len(measured), size=(DRAWS, len(measured)))
    low, high = np.quantile(spearman(predicted[seeds].mean(1), measured[seeds].mean(1)), [0.025, 0.975])
    return {"spearman": float(spearman(predicted.mean(0), measured.mean(0))), "low": float(low), "high": float(high)}


def repeats(measured: Floats) -> float:
    """Mean correlation over layers of one half of the seeds with the other, over random halves of a table (S, L)."""
    rng, half = np.random.default_rng(0), len(measured) // 2
    orders = np.array([rng.permutation(len(measured)) for _ in range(200)])
    return float(spearman(measured[orders[:, :half]].mean(1), measured[orders[:, half : 2 * half]].mean(1)).mean())


def cells(runs: Sequence[Row]) -> list[Row]:
    """Per workload, rule, moment and rung: every predictor's correlation with what was measured."""
    found = []
    for place in dict.fromkeys((r["workload"], r["rule"], r["moment"]) for r in runs):
        mine = [r for r in runs if (r["workload"], r["rule"], r["moment"]) == place]
        for rung in mine[0][MEASURED]:
            measured = np.array([r[MEASURED][rung] for r in mine])
            if len(mine) < 2 or not np.isfinite(measured).all():
                continue
            facts = dict(zip(("workload", "rule", "moment"), place, strict=True)) | {"rung": rung, "seeds": len(mine)}
            mean = measured.mean(0)
            facts |= {"least_percent": float(mean.min()), "most_percent": float(mean.max()), "losing": float((mean > 0).mean()),
                      "repeats": repeats(measured)}  # fmt: skip
            for name in mine[0]["predicted"][rung]:
                predicted = np.array([r["predicted"][rung][name] for r in mine])
                size = {"spearman_of_size": float(spearman(predicted.mean(0), np.abs(mean)))}
                found.append(facts | {"predictor": name} | correlate(predicted, measured) | size)
    return found


def _has(name: str, value: str, row: Row) -> bool:
    return bool(row[name] == value)


def over_cells(found: Sequence[Row]) -> list[Row]:
    """Per predictor: the mean correlation of its cells, and in how many it is above one half; of all cells, and of parts."""
    parts: dict[str, Callable[[Row], bool]] = {
        "all": lambda row: True, **{rung: partial(_has, "rung", rung) for rung in dict.fromkeys(row["rung"] for row in found)},
        **{rule: partial(_has, "rule", rule) for rule in dict.fromkeys(row["rule"] for row in found)},
        "most layers lose": lambda row: bool(row["losing"] > 0.5),
    }  # fmt: skip
    rows = []
    for predictor in dict.fromkeys(row["predictor"] for row in found):
        for part, belongs in parts.items():
            mine = [row for row in found if row["predictor"] == predictor and belongs(row)]
            if not mine:
                continue
            values = [row["spearman"] for row in mine]
            rows.append({
                "predictor": predictor, "part": part, "cells": len(values), "mean_spearman": float(np.mean(values)),
                "least": min(values), "most": max(values), "above_one_half": sum(value > 0.5 for value in values),
                "mean_of_size": float(np.mean([row["spearman_of_size"] for row in mine])),
                "proven_above_zero": sum(row["low"] > 0 for row in mine),
                "repeats": float(np.mean([row["repeats"] for row in mine])),
            })  # fmt: skip
    return rows


def train(args: Args, report: Callable[[str], None] = print) -> Path:
    torch.set_num_threads(1)
    head, runs, steps = stamp(args), earlier_runs(args.out), moments(args)
    for name in args.rungs.split(","):
        LADDER.index(name)                               # an unknown one is refused before anything runs

    def save() -> None:
        found = cells(runs)
        write(args.out, head | {"predictors": over_cells(found), "cells": found, "runs": runs})

    for seed in range(args.seeds):
        for workload in args.workloads.split(","):
            for rule in args.rules.split(","):
                facts = {"workload": workload, "rule": rule, "seed": seed, "window": args.window}
                if all(find_run(runs, facts | {"moment": name, "step": step}) for name, step in steps.items()):
                    continue
                run = TrainingRun(workload, seed, horizon=max(steps.values()) + args.window, interval=args.interval, rule=rule,
                                  memory_budget=None, policy="hold")  # fmt: skip
                fork = run.fork()
                for name, step in steps.items():
                    while run.t < step:
                        run.advance()
                    here = facts | {"moment": name, "step": step}
                    if not find_run(runs, here):
                        runs.append(here | measure(run, fork, args))
                        save()
                        report(f"{workload} {rule} seed {seed} {name}: loss {runs[-1]['loss']:.4f}")
    save()
    for row in over_cells(cells(runs)):
        report(f"{row['predictor']:14s} {row['part']:16s} {row['mean_spearman']:+.2f} [{row['least']:+.2f}, {row['most']:+.2f}]"
               f" of {row['cells']} cells, {row['above_one_half']} above 0.5, repeats at {row['repeats']:+.2f}")  # fmt: skip
    return args.out


def main() -> None:
    print(train(parse(Args, __doc__)))


if __name__ == "__main__":
    main()
