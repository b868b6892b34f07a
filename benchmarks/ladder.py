"""What each candidate of the ladder costs (bytes, error of the update, loss), and the ladder that follows from it.

    python -m benchmarks.ladder --seeds 2 --out benchmarks/results/ladder.json --write mango/ladder.json

Bytes are those of a 512 x 512 matrix. The error of the update is taken along one full-precision AdamW run: every candidate
follows the same gradients in its own stored state, and its direction is compared with the exact one. Losses are of whole
trainings, paired by seed with torch's AdamW (rule adamw) or with full precision (rule muon). Losses are compared workload by
workload, within two standard errors over seeds: what is a fifth of a loss near zero and what is a hundredth of a large one
do not add up. A candidate is off the ladder where a cheaper one has no larger error of the update and no larger loss on
any workload; or where another of less than half again its bytes has a smaller mean loss by 5 % under one rule, and no larger
loss on any workload.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from benchmarks.record import mean_error, parse, stamp, write
from mango import MANGO, CompressionConfig, Ladder
from mango.noise import step_key
from mango.rules import Hyper
from mango.state import StorageOptions, TensorState, predicted_bytes
from mango_env.workloads import make_workload

SHAPE = (512, 512)
MOMENTS = [(2, 0), (4, 0), (6, 0), (8, 0), (4, 4), (6, 4), (8, 4), (6, 8), (8, 8), (16, 8), (16, 16), (32, 32)]
RANKS = [(1, 8), (4, 8), (8, 4), (32, 4)]
CANDIDATES = (
    [CompressionConfig(momentum_bits=0, variance_bits=0)]
    + [CompressionConfig(rank=rank, factor_bits_p=bits, factor_bits_q=bits, variance_bits=0) for rank, bits in RANKS]
    + [CompressionConfig(momentum_bits=m, variance_bits=v) for m, v in MOMENTS]
)
RULES = ("adamw", "muon")
WORKLOADS = ("digits_mlp", "digits_cnn", "source_lm")


@dataclass(frozen=True)
class Args:
    steps: int = 150                                    # optimizer steps per run
    seeds: int = 2                                      # runs per candidate, rule and workload
    lr: float = 2e-3                                    # the same for all
    threads: int = 1                                    # torch threads
    choose_only: bool = False                           # from the rows that `out` has, measuring nothing
    out: Path = Path("benchmarks/results/ladder.json")
    write: Path = Path("mango/ladder.json")             # the table that the ladder is read from


def val_loss(workload: str, seed: int, steps: int, build: Callable[[torch.nn.Module], Optimizer]) -> float:
    """Train once."""
    task = make_workload(workload, seed)
    optimizer = build(task.model)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss().backward()                          # type: ignore[no-untyped-call]
        optimizer.step()
    return task.evaluate()["val_loss"]


def mango(config: CompressionConfig, rule: str, lr: float) -> Callable[[torch.nn.Module], Optimizer]:
    return lambda model: MANGO(model.named_parameters(), lr=lr, policy=config, rule=rule, policy_update_freq=10**9)


def update_errors(args: Args) -> dict[str, float]:
    """Relative l2 error of each candidate's direction, mean over layers, late steps and workloads."""
    found: dict[str, list[float]] = {config.name: [] for config in CANDIDATES}
    hyper = Hyper(1.0, (0.9, 0.999), 1e-8, 0.0, 0.0)
    for workload in WORKLOADS:
        task = make_workload(workload, 0)
        optimizer = AdamW(task.model.parameters(), lr=args.lr, weight_decay=0)
        layers = [p for p in task.model.parameters() if p.numel() >= 1024]
        exact_states = [TensorState(tuple(p.shape), CompressionConfig(), StorageOptions()) for p in layers]
        states = {(i, c): TensorState(tuple(p.shape), c, StorageOptions()) for i, p in enumerate(layers) for c in CANDIDATES}
        for state in [*exact_states, *states.values()]:
            state.create(torch.device("cpu"))
        for step in range(args.steps):
            optimizer.zero_grad()
            task.loss().backward()                      # type: ignore[no-untyped-call]
            with torch.no_grad():
                for i, param in enumerate(layers):
                    if param.grad is None:
                        continue
                    exact = _direction(exact_states[i], param.grad, hyper, step_key(0, i, step))
                    for config in CANDIDATES:
                        own = _direction(states[i, config], param.grad, hyper, step_key(1, i, step))
                        if step >= args.steps // 2 and step % 5 == 0:
                            found[config.name].append(float((own - exact).norm() / exact.norm().clamp(min=1e-30)))
            optimizer.step()
    return {name: mean(errors) for name, errors in found.items()}


def _direction(state: TensorState, grad: torch.Tensor, hyper: Hyper, key: int) -> torch.Tensor:
    moved = torch.zeros_like(grad)
    state.update(moved, grad.clone(), hyper, key)
    return -moved


def losses(args: Args, rule: str) -> dict[str, list[float]]:
    """Per candidate the gaps in per cent, one per workload and seed."""
    gaps: dict[str, list[float]] = {config.name: [] for config in CANDIDATES}
    for workload in WORKLOADS:
        for seed in range(args.seeds):
            if rule == "adamw":
                reference = val_loss(workload, seed, args.steps, lambda m: AdamW(m.parameters(), lr=args.lr, weight_decay=0))
            else:
                reference = val_loss(workload, seed, args.steps, mango(CompressionConfig(), rule, args.lr))
            for config in CANDIDATES:
                own = val_loss(workload, seed, args.steps, mango(config, rule, args.lr))
                gaps[config.name].append(100 * (own / reference - 1))
            print(f"{rule} {workload} seed {seed}: {reference:.4f}", flush=True)
    return gaps


def frontier(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the candidates that are worth a rung, the cheapest first."""

    def worse(one: dict[str, Any], other: dict[str, Any], rule: str, by: float = 0.0, part: slice = slice(None)) -> bool:
        """Whether `one` loses more than `other` in those of the runs, beyond the noise and `by` per cent."""
        mine, theirs = one[rule]["gaps"][part], other[rule]["gaps"][part]
        noise = 2 * math.hypot(_standard_error(mine), _standard_error(theirs))
        return bool(mean(mine) > mean(theirs) + noise + by)

    def worse_somewhere(one: dict[str, Any], other: dict[str, Any]) -> bool:
        runs = len(one[RULES[0]]["gaps"])
        parts = [slice(at, at + runs // len(WORKLOADS)) for at in range(0, runs, runs // len(WORKLOADS))]
        return any(worse(one, other, rule, part=part) for rule in RULES for part in parts)

    def superfluous(row: dict[str, Any], other: dict[str, Any]) -> bool:
        cheaper = other["bytes_per_param"] < row["bytes_per_param"]
        return cheaper and other["update_error"] <= row["update_error"] and not worse_somewhere(other, row)

    def hopeless(row: dict[str, Any], other: dict[str, Any]) -> bool:
        near = other["bytes_per_param"] < 1.5 * row["bytes_per_param"]
        return near and not worse_somewhere(other, row) and any(worse(row, other, rule, by=5.0) for rule in RULES)

    rows = sorted(rows, key=lambda row: row["bytes_per_param"])
    return [r["rung"] for r in rows if not any(superfluous(r, other) or hopeless(r, other) for other in rows if other is not r)]


def _standard_error(found: list[float]) -> float:
    return mean_error(found) or 0.0


def train(args: Args) -> Path:
    torch.set_num_threads(args.threads)
    if args.choose_only:
        return publish(args, json.loads(args.out.read_text())["rows"])
    errors = update_errors(args)
    gaps = {rule: losses(args, rule) for rule in RULES}
    rows: list[dict[str, Any]] = []
    for config in CANDIDATES:
        bytes_per_param = predicted_bytes(SHAPE, config, StorageOptions()) / math.prod(SHAPE)
        row: dict[str, Any] = {"rung": config.name, "bytes_per_param": bytes_per_param, "update_error": errors[config.name]}
        for rule, found in gaps.items():
            own = found[config.name]
            row[rule] = {"gap_percent": mean(own), "se": _standard_error(own), "gaps": own}
        rows.append(row)
    return publish(args, rows)


def publish(args: Args, rows: list[dict[str, Any]]) -> Path:
    """Choose the ladder, write its table and the results."""
    chosen = frontier(rows)
    for row in rows:
        row["on_ladder"] = row["rung"] in chosen
        print(f"{row['rung']:10s} {row['bytes_per_param']:7.3f} B/param  error {row['update_error']:.3f}"
              f"  adamw {row['adamw']['gap_percent']:+7.2f} %  muon {row['muon']['gap_percent']:+7.2f} %"
              f"  {'' if row['on_ladder'] else 'not on the ladder'}")  # fmt: skip
    by_name = {config.name: config for config in CANDIDATES}
    rungs = [row | {"config": by_name[row["rung"]].to_dict()} for row in sorted(rows, key=lambda r: r["bytes_per_param"])
             if row["on_ladder"]]  # fmt: skip
    ladder = Ladder(tuple(by_name[name] for name in chosen))
    table = [{"config": row["config"], "bytes_per_param": round(row["bytes_per_param"], 4),
              "update_error": round(row["update_error"], 4)} for row in rungs]  # fmt: skip
    write(args.write, {"program": "benchmarks/ladder.py", "rungs": table})
    print("ladder:", ", ".join(ladder.names))
    return write(args.out, stamp(args) | {"rows": rows, "ladder": list(ladder.names)})


def main() -> None:
    path = train(parse(Args, __doc__))
    print(f"\n{len(json.loads(path.read_text())['rows'])} rows in {path}")


if __name__ == "__main__":
    main()
