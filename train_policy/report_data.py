"""What a results file holds, in one form: rows, learning curves, stages, provenance; and what is computed from rows."""

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mango.policies import POLICIES

Row = dict[str, Any]
NEEDED = ("policy", "workload", "seed", "state_bytes_peak", "val_loss")
HEAT_MAPS = 4                                            # at most as many traces are drawn
NESTED = ("decisions", "layers", "state_bytes", "loss_curve", "ppo_stats", "evaluations")  # columns of a row that no table shows


@dataclass(frozen=True, slots=True)
class Curve:
    """One learning curve; curves of one group share a figure."""

    group: str
    name: str
    x: Sequence[float]
    y: Sequence[float]
    x_title: str = "step"
    y_title: str = "value"


@dataclass(frozen=True, slots=True)
class Result:
    """What a results file holds, in one form."""

    title: str
    rows: list[Row]
    curves: list[Curve] = field(default_factory=list)
    stages: list[Row] = field(default_factory=list)      # name, seconds, outcome
    about: dict[str, Any] = field(default_factory=dict)
    summary: list[Row] = field(default_factory=list)     # a line per method or policy, over seeds
    failures: list[Row] = field(default_factory=list)
    gates: list[Row] = field(default_factory=list)       # policy, against, accepted, reason
    verdicts: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trace:
    """The decisions of one run: a rung per decision and layer, and the bytes that were held."""

    label: str
    layers: list[str]                                    # L names
    rungs: list[list[str]]                               # (T, L) names of configs
    state_bytes: list[int]                               # (T,), empty where it was not recorded
    budget: int | None


@dataclass(frozen=True, slots=True)
class Point:
    """One policy at one budget on one workload, over seeds."""

    policy: str
    nbytes: float                                        # mean of the peaks
    loss: float                                          # mean held-out loss, over AdamW's where that is known
    error: float                                         # its standard error, nan for one seed
    dominated: bool


def read_result(path: Path) -> Result:
    """A results file, whichever program wrote it; ValueError says what it lacks."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if isinstance(content, list):
        content = {"rows": content}
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} holds no rows; give a file written by mango evaluate, mango demo or mango run")
    rows: list[Row] = content["rows"]
    for i, row in enumerate(rows):
        missing = [key for key in NEEDED if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"row {i} of {path} lacks {', '.join(missing)}; a row has at least {', '.join(NEEDED)}")
    if not rows:
        raise ValueError(f"{path} has no rows: nothing finished")
    curves = [Curve(**curve) for curve in content.get("curves", [])] + loss_curves(rows)
    kind = str(content.get("kind", "evaluation"))
    rest = {name: content[name] for name in ("stages", "about", "summary", "failures", "gates", "verdicts") if name in content}
    return Result(f"MANGO: {kind}", rows, curves, **rest)


def loss_curves(rows: Sequence[Row]) -> list[Curve]:
    """Training losses that rows carry, the first seed of each policy and workload."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.get("loss_curve"):
            first.setdefault((row["workload"], row["policy"]), row)
    found = []
    for (workload, policy), row in first.items():
        steps = row.get("steps", len(row["loss_curve"]))
        x = [(i + 1) * steps / len(row["loss_curve"]) for i in range(len(row["loss_curve"]))]
        found.append(Curve(f"Training loss on {workload}", policy, x, row["loss_curve"], "optimizer step", "training loss"))
    return found


def traces(rows: Sequence[Row]) -> list[Trace]:
    """Up to `HEAT_MAPS` traces: one per policy and workload first, learned before heuristic, varied before constant."""
    found: list[tuple[tuple[bool, bool, int], Trace]] = []
    seen: set[tuple[str, str]] = set()
    for row in rows:
        rungs = row.get("decisions")
        if not isinstance(rungs, list) or not rungs or not rungs[0]:
            continue
        key = (row["policy"], row["workload"])
        label = f"{row['policy']} on {row['workload']}, seed {row['seed']}, budget {bytes_text(row.get('budget_bytes'))}"
        layers = row.get("layers") or [f"layer {i}" for i in range(len(rungs[0]))]
        varied = len({rung for one in rungs for rung in one})
        known = row["policy"].split(":")[0] in POLICIES
        trace = Trace(label, layers, rungs, row.get("state_bytes") or [], row.get("budget_bytes"))
        found.append(((key in seen, known, -varied), trace))
        seen.add(key)
    return [trace for _, trace in sorted(found, key=lambda item: item[0])[:HEAT_MAPS]]


def points(rows: Sequence[Row]) -> list[Point]:
    """Rows of one workload by policy and budget, with those marked that another has beaten in both bytes and loss."""
    groups: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        if row["val_loss"] is not None and row["state_bytes_peak"] is not None:
            groups.setdefault((row["policy"], row.get("budget_bytes")), []).append(row)
    summed = []
    for (policy, _), members in groups.items():
        losses = [m["val_loss"] / (m.get("val_loss_adamw") or 1.0) for m in members]
        mean = sum(losses) / len(losses)
        error = math.nan
        if len(losses) > 1:
            error = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1) / len(losses))
        summed.append((policy, sum(m["state_bytes_peak"] for m in members) / len(members), mean, error))
    return [
        Point(*one, dominated=any(o[1] <= one[1] and o[2] <= one[2] and (o[1], o[2]) != (one[1], one[2]) for o in summed))
        for one in summed
    ]


def bytes_text(count: float | None) -> str:
    """
    >>> bytes_text(1536), bytes_text(None)
    ('1.5 KiB', 'none')
    """
    if count is None:
        return "none"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns that a table of rows has, in the order in which they first appear."""
    return [name for name in dict.fromkeys(key for row in rows for key in row) if name not in NESTED]


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as CSV, without their nested columns; written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, path)
    return path
