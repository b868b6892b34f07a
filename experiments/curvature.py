"""Does a policy's choice follow the curvature of the loss? Hessian traces and eigenvalues beside its decisions.

    python -m experiments.curvature --policy universal --workloads source_lm,digits_mlp --out benchmarks/results/curvature.json

A workload is trained under a policy and a budget. At every decision the loss of one batch, always the same and apart from
those trained on, gives the trace of each layer's block of the Hessian (Hutch++) and the top eigenvalue of the whole
(Lanczos), at the parameters of that moment. Two questions are asked of the record:

  bytes and trace      do layers with more curvature per parameter get more bytes per parameter? Spearman's correlation over
                       the layers, mean over decisions and seeds; p from permuting the layers, alike in all decisions
  changes              do configs change where the top eigenvalue does? Spearman's correlation over decisions of the share of
                       layers whose config changed with the eigenvalue's relative change since the decision before, mean over
                       seeds, raw and with the trend over time taken out; p from shifting one series around in time

The first decision, before any gradient, is left out. `mango report FILE` draws the curves.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from benchmarks.record import parse, stamp, write
from mango.config import LADDER, CompressionConfig
from mango.policy_choice import as_policy
from mango_env.recorder import choose
from mango_env.run import TrainingRun
from mango_env.workloads import make_workload
from mango_env.workloads.base import ResumableWorkload
from train_policy.cli_support import parse_budget
from train_policy.curvature import Hessian, block_traces, top_eigenvalue

Floats = NDArray[np.float64]
DRAWS = 10_000                                           # permutations; all of them where there are no more
BATCH_SEED = 1_000_003                                   # of the batch that curvature is measured on, plus the run's
KNOWN = 0.05                                             # p below which a correlation counts as found


@dataclass(frozen=True)
class Args:
    policy: str = "water-filling"                       # a heuristic, a shipped name or the path of a frozen policy
    workloads: str = "source_lm,digits_mlp"             # comma-separated
    budget: str = "0.15"                                # a fraction of AdamW's state, a size, or bytes
    seeds: int = 2                                      # runs per workload
    seed: int = 0                                       # of the first
    steps: int = 150
    interval: int = 10                                  # optimizer steps per decision
    batch: int = 4                                      # examples that curvature is measured on
    products: int = 9                                   # Hessian-vector products per layer's trace
    lanczos: int = 20                                   # of them per top eigenvalue, at most
    tolerance: float = 0.01                             # of the eigenvalue's residual, relative
    threads: int = 1                                    # torch threads
    out: Path = Path("benchmarks/results/curvature.json")


def watch(workload: str, seed: int, args: Args) -> dict[str, Any]:
    """One run: per decision and layer what was decided and how the loss curves there."""
    began = time.perf_counter()
    run = TrainingRun(
        workload, seed, horizon=args.steps, interval=args.interval, memory_budget=parse_budget(args.budget), policy="hold"
    )
    policy = as_policy(args.policy, LADDER)
    policy.reset()
    fixed = make_workload(workload, BATCH_SEED + seed, batch=args.batch)
    if not isinstance(fixed, ResumableWorkload):
        raise ValueError(f"workload {workload!r} cannot repeat a batch: give it state_dict() and load_state_dict()")
    first_batch, generator = fixed.state_dict(), Generator().manual_seed(seed)
    fixed.model.eval()                                   # nothing by chance
    layers, numel = [layer.name for layer in run.layers], np.array([layer.numel for layer in run.layers])
    record: dict[str, list[Any]] = {name: [] for name in MEASURED}
    peak = 0
    while not run.done:
        applied = run.apply(choose(policy, run, run.observe()))
        held = np.array(run.optimizer.allocator.nbytes(applied))
        fixed.model.load_state_dict(run.model.state_dict())
        fixed.load_state_dict(first_batch)
        hessian = Hessian(fixed.loss, dict(fixed.model.named_parameters()))
        traces = block_traces(hessian, layers, generator=generator, products=args.products)
        top = top_eigenvalue(hessian, generator=generator, products=args.lanczos, tolerance=args.tolerance)
        interval = run.advance()
        peak = max(peak, interval.state_bytes_peak)
        for name, value in {
            "step": interval.start, "loss_curve": interval.loss, "decisions": [config.name for config in applied],
            "state_bytes": interval.state_bytes_peak, "bytes_per_param": (held / numel).tolist(),
            "bits": [moment_bits(config) for config in applied],
            "rank": [float(config.rank or min(layer.shape)) for config, layer in zip(applied, run.layers, strict=True)],
            "trace_per_param": [t.value / n for t, n in zip(traces, numel.tolist(), strict=True)],
            "trace_error": [t.error / n for t, n in zip(traces, numel.tolist(), strict=True)],
            "top_eigenvalue": top.value, "top_residual": top.residual,
        }.items():  # fmt: skip
            record[name].append(value)
    return {
        "policy": args.policy, "workload": workload, "seed": seed, "budget": args.budget, "budget_bytes": run.budget,
        "state_bytes_peak": peak, "steps": run.t, "layers": layers, "seconds": time.perf_counter() - began,
        **run.evaluate(), **record,
    }  # fmt: skip


MEASURED = (
    *("step", "loss_curve", "decisions", "state_bytes", "bytes_per_param", "bits", "rank"),
    *("trace_per_param", "trace_error", "top_eigenvalue", "top_residual"),
)


def moment_bits(config: CompressionConfig) -> float:
    """Bits per value of both moments, of a subspace's where there is one."""
    return float((config.factor_bits_q if config.rank else config.momentum_bits) + config.variance_bits)


def ranks(values: Floats) -> Floats:
    """Ranks along the last axis, of mean zero and length one; ties share theirs, a constant row is all zeros."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    rank = below + (equal - 1) / 2
    rank = rank - rank.mean(-1, keepdims=True)
    length = np.sqrt((rank**2).sum(-1, keepdims=True))
    unit: Floats = np.divide(rank, length, out=np.zeros_like(rank), where=length > 0)
    return unit


def over_layers(one: Floats, other: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """Mean over rows of Spearman's correlation over columns of two tables (T, L), and its two-sided p.

    Layers keep their rank for many decisions, so decisions are no independent draws: p permutes the layers, the same way in
    every row. A table that is the same for all layers correlates with nothing: (nan, 1).
    """
    if not (ranks(one).any() and ranks(other).any()):
        return math.nan, 1.0
    together = ranks(one).T @ ranks(other) / len(one)                          # (L, L)
    count = together.shape[0]
    found, columns = float(np.trace(together)), np.arange(count)
    if math.factorial(count) <= DRAWS:
        drawn = np.array([together[columns, order].sum() for order in permutations(range(count))])
        return found, float(np.mean(np.abs(drawn) >= abs(found) - 1e-12))
    drawn = np.array([together[columns, rng.permutation(count)].sum() for _ in range(DRAWS)])
    return found, float((1 + np.sum(np.abs(drawn) >= abs(found) - 1e-12)) / (1 + DRAWS))


def over_time(pairs: Sequence[tuple[Floats, Floats]], rng: np.random.Generator, detrend: bool) -> tuple[float, float]:
    """Mean over runs of Spearman's correlation of two series (T,), and its two-sided p.

    Neighbours in time are alike, so p shifts one series around by a random number of decisions, in every run by another.
    `detrend` takes the rank of time out of both (partial correlation). A constant series correlates with nothing: (nan, 1).
    """

    def prepared(series: Floats) -> Floats:
        rank = ranks(series)
        if detrend:
            clock = ranks(np.arange(len(series), dtype=np.float64))
            rank = rank - (rank @ clock) * clock
            length = np.linalg.norm(rank)
            rank = rank / length if length > 1e-9 else np.zeros_like(rank)
        return rank

    units = [(prepared(one), prepared(other)) for one, other in pairs]
    if not (any(one.any() for one, _ in units) and any(other.any() for _, other in units)):
        return math.nan, 1.0
    shifted = [np.array([one @ np.roll(other, k) for k in range(len(one))]) for one, other in units]
    found = float(np.mean([each[0] for each in shifted]))
    drawn = np.mean([rng.choice(each, DRAWS) for each in shifted], axis=0)
    return found, float((1 + np.sum(np.abs(drawn) >= abs(found) - 1e-12)) / (1 + DRAWS))


def changes(row: dict[str, Any]) -> tuple[Floats, Floats]:
    """Per decision from the third on: the share of layers whose config changed, and the eigenvalue's relative change."""
    configs = np.array(row["decisions"])[1:]                                   # (T, L) names
    top = np.array(row["top_eigenvalue"])[1:]
    changed = (configs[1:] != configs[:-1]).mean(1)
    scale = np.maximum(np.maximum(np.abs(top[1:]), np.abs(top[:-1])), np.finfo(float).tiny)
    return changed, np.abs(top[1:] - top[:-1]) / scale


def correlations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per workload, every correlation with its p."""
    rng, found = np.random.default_rng(0), []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        counts = {"seeds": len(mine), "decisions": len(mine[0]["step"]) - 1, "layers": len(mine[0]["layers"])}

        def table(name: str, mine: Sequence[dict[str, Any]] = mine) -> Floats:
            return np.concatenate([np.array(row[name], np.float64)[1:] for row in mine])

        for name in ("bytes_per_param", "bits", "rank"):
            value, p = over_layers(table(name), table("trace_per_param"), rng)
            found.append({"workload": workload, **counts, "of": name, "with": "trace_per_param", "spearman": value, "p_value": p})
        for detrend in (False, True):
            value, p = over_time([changes(row) for row in mine], rng, detrend)
            told = {"of": "layers_changed", "with": "top_eigenvalue_change" + (", time taken out" if detrend else "")}
            found.append({"workload": workload, **counts, **told, "spearman": value, "p_value": p})
    return found


def verdicts(found: Sequence[dict[str, Any]]) -> list[str]:
    """What was found, in words, one line per workload and question."""
    lines = []
    for line in found:
        numbers = f"Spearman {line['spearman']:+.2f}, p = {line['p_value']:.3g}, {line['seeds']} x {line['decisions']} decisions"
        known, up = line["p_value"] < KNOWN, line["spearman"] > 0
        if math.isnan(line["spearman"]):
            same = {"bytes_per_param": "all layers get the same bytes", "layers_changed": "no config changes"}.get(line["of"])
            lines += [f"{line['workload']}: {same}, so there is nothing to compare."] if same else []
        elif line["of"] == "bytes_per_param":
            says = "layers with more curvature per parameter get " + (("more" if up else "fewer") + " bytes" if known else
                   "neither more nor fewer bytes, as far as this shows")  # fmt: skip
            least = 1 / math.factorial(line["layers"])
            few = f"; {line['layers']} layers cannot give a p below {least:.2g}" if least > KNOWN / 2 else ""
            lines.append(f"{line['workload']}: {says} ({numbers}, {line['layers']} layers{few}).")
        elif line["of"] == "layers_changed":
            says = "configs change " + (("more" if up else "less") + " where the top eigenvalue moves" if known else
                   "without regard to the top eigenvalue's moves, as far as this shows")  # fmt: skip
            trend = "with the trend over training taken out, " if "taken out" in line["with"] else ""
            lines.append(f"{line['workload']}: {trend}{says} ({numbers}).")
    return lines


def curves(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `mango report` draws, of each workload's first run."""
    drawn = []
    for row in {row["workload"]: row for row in reversed(rows)}.values():
        x, where = row["step"], f"on {row['workload']}, seed {row['seed']}"

        def curve(group: str, name: str, y: Sequence[float], title: str, x: list[int] = x, where: str = where) -> dict[str, Any]:
            return {"group": f"{group} {where}", "name": name, "x": x, "y": list(y), "x_title": "step", "y_title": title}

        drawn.append(curve("Top eigenvalue of the Hessian", "top eigenvalue", row["top_eigenvalue"], "eigenvalue"))
        changed = [0.0, 0.0, *changes(row)[0].tolist()]
        drawn.append(curve("Layers whose config changed", "share", changed, "share of layers"))
        for i, name in enumerate(row["layers"]):
            for title in ("Hessian trace per parameter", "Bytes per parameter"):
                measured = row["trace_per_param" if title.startswith("Hessian") else "bytes_per_param"]
                drawn.append(curve(title, name, [values[i] for values in measured], title.lower()))
    return drawn


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for workload in args.workloads.split(","):
        for seed in range(args.seed, args.seed + args.seeds):
            rows.append(watch(workload, seed, args))
            print(f"{workload} seed {seed}: {len(rows[-1]['step'])} decisions, {rows[-1]['seconds']:.0f} s", flush=True)
    found = correlations(rows)
    told = verdicts(found)
    print("\n".join(told))
    result = {"kind": "curvature", "about": stamp(args), "verdicts": told, "correlations": found}
    return write(args.out, result | {"rows": rows, "curves": curves(rows)})


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
