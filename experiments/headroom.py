"""Where adaptive precision pays: layer kind x phase x format -> loss, and what the right choice is worth at a budget.

    python -m experiments.headroom --data shakespeare,books --rules muon --out benchmarks/results/headroom.json

A small model is trained with every layer in one format, and with one format for the layers of one kind in one phase of
the run and another format elsewhere. Two maps come of it, per rule and data set:

  damage  the cheap format in one kind and phase, the dear one elsewhere: what is lost, against the dear one everywhere
  gain    the dear format in one kind and phase, the cheap one elsewhere: what is won, against the cheap one everywhere

both in per cent of loss, paired by seed. Cells are written `damage:KIND:PHASE`; `all` stands for every kind or phase,
several kinds are joined by a plus, and a phase is a part of the run (0 is the first). `extra` cells put together what the
maps found. Bytes are the mean over steps. Rates are those tuned in
benchmarks/quality.py. The file is written after every run and a repeated command goes on where it was.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.quality import config_of, read, train_task
from benchmarks.record import earlier_runs, find_run, parse, stamp, write
from mango import MANGO, CompressionConfig
from mango.layers import Layer
from mango_env.workloads import Workload, make_workload
from mango_env.workloads.data import TextData
from mango_env.workloads.text import LanguageModel

RATES = {"shakespeare": (3e-3, 4.0), "books": (3e-3, 4.0), "cifar10": (2e-3, 4.0)}      # AdamW's, and Muon's over it


@dataclass(frozen=True)
class Args:
    data: str = "shakespeare,books"                     # shakespeare, books, cifar10; comma-separated
    rules: str = "muon"                                 # adamw, muon
    dear: str = "m4v0"                                  # the format of both maps that costs more
    cheap: str = "m0v0"                                 # and the one that costs less
    uniform: str = "full,m8v0,m4v0,m2v0,m0v0"           # formats tried everywhere
    extra: str = "gain:attention_in+mlp_up:all,damage:mlp_down+attention_out:all"  # further cells
    maps: bool = True                                   # every kind and phase by itself
    phases: int = 2                                     # parts of the run
    seeds: int = 3                                      # runs per cell
    steps: int = 300
    width: int = 96                                     # of the transformer; cifar10 trains 16 channels
    depth: int = 2
    batch: int = 12                                     # windows of 64 characters
    threads: int = 1                                    # torch threads
    budget_minutes: float = 1e9                         # stop before a run that would end after this
    out: Path = Path("benchmarks/results/headroom.json")


def task_of(data: str, texts: dict[str, TextData], seed: int, args: Args) -> Workload:
    if data == "cifar10":
        return make_workload("cifar10_cnn", seed, steps=args.steps, batch=32)
    if data not in texts:
        texts[data] = read(data)
    return LanguageModel(texts[data], seed, steps=args.steps, batch=args.batch, context=64, width=args.width,
                         depth=args.depth, heads=4, lr=0.0, val_windows=1024)  # fmt: skip


def placed(layers: Sequence[Layer], cell: str, phase: int, args: Args) -> list[CompressionConfig]:
    """The configs of a cell in a phase, one per layer: a format's name, or `map:KIND:PHASE`."""
    if ":" not in cell:
        return [config_of(cell)] * len(layers)
    kind_of_map, kind, part = cell.split(":")
    usual, special = (args.dear, args.cheap) if kind_of_map == "damage" else (args.cheap, args.dear)
    here = part in (str(phase), "all")
    return [config_of(special if here and {layer.kind, "all"} & set(kind.split("+")) else usual) for layer in layers]


def cells(layers: Sequence[Layer], args: Args) -> list[str]:
    """Uniform formats first, then both maps."""
    kinds = ["all", *sorted({layer.kind for layer in layers if layer.kind != "norm"})]
    parts = ["all", *map(str, range(args.phases))]
    maps = [f"{name}:{kind}:{part}" for name in ("damage", "gain") for kind in kinds for part in parts if args.maps]
    return [*args.uniform.split(","), *args.extra.split(","), *(cell for cell in maps if not cell.endswith(":all:all"))]


def run(task: Workload, cell: str, rule: str, rates: tuple[float, float], seed: int, args: Args) -> dict[str, float]:
    """One training; the bytes are state bytes per parameter, averaged over the steps."""
    lr, scale = rates
    optimizer = MANGO(
        task.model.named_parameters(), lr=lr, policy="hold", rule=rule, matrix_lr_scale=scale if rule == "muon" else 1.0,
        seed=seed, policy_update_freq=10**9,
    )  # fmt: skip
    stored: list[int] = []
    phase = -1

    def before(step: int) -> None:
        nonlocal phase
        if step * args.phases // args.steps != phase:
            phase = step * args.phases // args.steps
            optimizer.apply(placed(optimizer.layers, cell, phase, args))
        if step:
            stored.append(optimizer.state_bytes())

    began = time.perf_counter()
    train_task(task, optimizer, args.steps, before)
    numel = sum(p.numel() for p in task.model.parameters())
    return task.evaluate() | {"bytes_per_param": mean(stored) / numel, "seconds": time.perf_counter() - began}


def summary(runs: Sequence[dict[str, Any]], args: Args) -> list[dict[str, Any]]:
    """Per data set, rule and cell: per cent of loss above what its map starts from, and above full precision; paired by seed."""
    rows = []
    losses = {(r["data"], r["rule"], r["cell"], r["seed"]): r["val_loss"] for r in runs}
    stored = {(r["data"], r["rule"], r["cell"]): r["bytes_per_param"] for r in runs}

    def above(data: str, rule: str, cell: str, other: str) -> dict[str, float] | None:
        seeds = [s for d, r, c, s in losses if (d, r, c) == (data, rule, cell) and (data, rule, other, s) in losses]
        gaps = [100 * (losses[data, rule, cell, s] / losses[data, rule, other, s] - 1) for s in seeds]
        return {"mean": mean(gaps), "low": min(gaps), "high": max(gaps), "seeds": len(gaps)} if gaps else None

    for data, rule, cell in stored:
        start = {"damage": args.dear, "gain": args.cheap}.get(cell.split(":")[0], "full")
        found = [losses[key] for key in losses if key[:3] == (data, rule, cell)]
        rows.append({
            "data": data, "rule": rule, "cell": cell, "bytes_per_param": stored[data, rule, cell], "val_loss": mean(found),
            "val_loss_sd": float(np.std(found, ddof=1)) if len(found) > 1 else 0.0,
            "percent_over_full": above(data, rule, cell, "full"), "percent_over_start": above(data, rule, cell, start),
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The formats everywhere, then both maps, as text."""
    lines = []
    for data, rule in dict.fromkeys((row["data"], row["rule"]) for row in rows):
        mine = {row["cell"]: row for row in rows if (row["data"], row["rule"]) == (data, rule)}
        lines.append(f"\n{data}, {rule}: per cent of loss over full precision at bytes per parameter")
        for cell, row in mine.items():
            gap = row["percent_over_full"]
            if ":" not in cell and gap:
                span = f"[{gap['low']:+.2f}, {gap['high']:+.2f}]"
                lines.append(f"  {cell:8s} {gap['mean']:+6.2f} {span:16s} {row['bytes_per_param']:.3f}")
        for name in ("damage", "gain"):
            places = [cell.split(":")[1:] for cell in mine if cell.startswith(name)]
            parts = list(dict.fromkeys(part for _, part in places))
            lines.append(f"  {name:26s} " + " ".join(f"{f'phase {part}':>16s}" for part in sorted(parts)))
            for kind in dict.fromkeys(kind for kind, _ in places):
                found = [mine.get(f"{name}:{kind}:{part}") for part in sorted(parts)]
                shown = [f"{r['percent_over_start']['mean']:+6.2f} at {r['bytes_per_param']:.3f}" if r and r["percent_over_start"]
                         else "" for r in found]  # fmt: skip
                lines.append(f"    {kind:24s} " + " ".join(f"{cell:>16s}" for cell in shown))
    return "\n".join(lines)


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    runs = earlier_runs(args.out)
    texts: dict[str, TextData] = {}
    head, began, longest = stamp(args), time.perf_counter(), 0.0
    size = {"steps": args.steps, "width": args.width, "depth": args.depth, "batch": args.batch, "phases": args.phases,
            "dear": args.dear, "cheap": args.cheap}  # fmt: skip
    for seed in range(args.seeds):                      # every cell of a seed before the next: stopped early, it is still paired
        for data in args.data.split(","):
            for rule in args.rules.split(","):
                layers = MANGO(task_of(data, texts, seed, args).model.named_parameters(), rule=rule).layers
                for cell in cells(layers, args):
                    facts = {"data": data, "rule": rule, "cell": cell, "seed": seed} | size
                    if find_run(runs, facts):
                        continue
                    if (time.perf_counter() - began + longest) / 60 > args.budget_minutes:
                        print("the time is spent; run the command again to go on")
                        print(table(summary(runs, args)))
                        return args.out
                    found = run(task_of(data, texts, seed, args), cell, rule, RATES[data], seed, args)
                    longest = max(longest, found["seconds"])
                    runs.append(facts | found | {"commit": head["commit"]})
                    write(args.out, head | {"runs": runs, "summary": summary(runs, args)})
                    print(f"{data} {rule} {cell} seed {seed}: {found['val_loss']:.4f} at {found['bytes_per_param']:.3f} B/param,"
                          f" {found['seconds']:.0f} s", flush=True)  # fmt: skip
    print(table(summary(runs, args)))
    return args.out


def main() -> None:
    print(f"wrote {train(parse(Args, __doc__))}")


if __name__ == "__main__":
    main()
