"""Trajectories of the public packages of Critical Gradients and Critical Momenta, and how a run of theirs is repeated.

All 712 lie in `cg_cm_reference.npz` and `.json`, in $MANGO_REFERENCE or in ../shared/reference beside the checkout. A part of
them that covers every class and every value of every option is tests/critical_fixture.npz, which this program makes:

    python -m tests.critical_reference
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from mango import critical

HERE = Path(__file__).resolve().parent
FIXTURE = HERE / "critical_fixture.npz"
STEPS = 50
SHAPES: dict[str, list[tuple[int, ...]]] = {"quad3": [(3,)], "mlp": [(8, 5), (8,), (3, 8), (3,)], "ties3": [(3,)]}


@dataclass(frozen=True)
class Trajectory:
    """What one class of one package did on fixed gradients."""

    facts: dict[str, Any]                                    # lib, cls, problem, dtype, numpy_seed, kwargs, resolved, tag
    start: list[NDArray[Any]]                                # parameters before the first step
    grads: list[NDArray[Any]]                                # (50, *shape) per tensor
    params: NDArray[Any]                                     # (50, N) after each step
    events: NDArray[Any]                                     # (50, tensors): 2 filled, 1 replaced, 0 refused
    priorities: NDArray[Any] | None = None                   # (tensors, topC) after the last step, rising, nan where free


def folder() -> Path | None:
    """Where the whole reference is; None where it is not."""
    found = Path(os.environ.get("MANGO_REFERENCE", HERE.parent.parent / "shared" / "reference"))
    return found if (found / "cg_cm_reference.npz").is_file() and (found / "cg_cm_reference.json").is_file() else None


def everything(source: Path) -> Iterator[Trajectory]:
    """All trajectories of the folder."""
    runs = json.loads((source / "cg_cm_reference.json").read_text())["runs"]
    with np.load(source / "cg_cm_reference.npz") as arrays:
        yield from (_read(run, arrays) for run in runs)


def _read(run: dict[str, Any], arrays: Any) -> Trajectory:
    problem, name = run["problem"], run["id"]
    places = range(len(SHAPES[problem]))
    return Trajectory(run, [arrays[f"{problem}.init.{i}"] for i in places], [arrays[f"{problem}.grads.{i}"] for i in places],
                      arrays[f"{name}.params"], arrays[f"{name}.events"], arrays[f"{name}.priorities"])  # fmt: skip


def some() -> Iterator[Trajectory]:
    """The trajectories of the fixture."""
    with np.load(FIXTURE) as arrays:
        runs = json.loads(str(arrays["runs"]))
        count = dict.fromkeys(SHAPES, 0)
        for run in runs:
            problem = run["problem"]
            row, places = count[problem], range(len(SHAPES[problem]))
            count[problem] += 1
            start, grads = ([arrays[f"{problem}.{what}.{i}"] for i in places] for what in ("init", "grads"))
            yield Trajectory(run, start, grads, arrays[f"{problem}.params"][row], arrays[f"{problem}.events"][row])


def build(facts: dict[str, Any], params: list[Parameter]) -> critical.SGD_C | critical.RMSprop_C | critical.Adam_C:
    """The optimizer that is to do as the package did. Our defaults are cg's and, of Adam_CM, cm's: then they are used."""
    own = facts["tag"] == "class defaults" and facts["lib"] != "cg_eff"
    options = dict(facts["kwargs"] if own else facts["resolved"] | facts["kwargs"])
    if options.get("buffer_dtype"):
        options["buffer_dtype"] = getattr(torch, options["buffer_dtype"].removeprefix("torch."))
    kind = getattr(critical, facts["cls"].removesuffix("_eff"))
    found: critical.Adam_C = kind(params, **options, compatible=facts["lib"], seed=facts["numpy_seed"])
    return found


def difference(run: Trajectory) -> tuple[float, int]:
    """The largest difference between our parameters and the package's, and how many decisions differ."""
    dtype: torch.dtype = getattr(torch, run.facts["dtype"])
    params = [Parameter(torch.from_numpy(x).to(dtype, copy=True)) for x in run.start]
    grads = [torch.from_numpy(x).to(dtype) for x in run.grads]
    optimizer = build(run.facts, params)
    moved, events, before = [], [], [[0, 0] for _ in params]
    for step in range(STEPS):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad[step].clone()
        optimizer.step()
        moved.append(torch.cat([p.detach().double().reshape(-1) for p in params]))
        after = [optimizer.state[p]["critical"].decisions.tolist() for p in params]
        events.append([2 if a == b else a[0] - b[0] for a, b in zip(after, before, strict=True)])
        before = after
    wrong = int((np.array(events) != run.events).sum())
    if run.priorities is not None:
        left = torch.stack([rising(optimizer.state[p]["critical"].keys) for p in params]).double().numpy()
        wrong += int((~np.isclose(left, run.priorities, rtol=1e-5, atol=0, equal_nan=True)).sum())
    return float(np.abs(torch.stack(moved).numpy() - run.params).max()), wrong


def rising(keys: Tensor) -> Tensor:
    """Priorities as the reference tells them."""
    return torch.where(keys == -torch.inf, torch.nan, keys).sort().values


def tolerance(facts: dict[str, Any]) -> float:
    """The promise: 1e-10 in float64, 2e-6 in float32 and with buffers in bfloat16."""
    return 1e-10 if facts["dtype"] == "float64" else 2e-6


def chosen(runs: list[Trajectory]) -> list[Trajectory]:
    """Runs that add a value of an option to what the earlier ones cover, small problems first; and an mlp of every class."""
    order = sorted(runs, key=lambda run: run.facts["problem"] == "mlp")
    seen: set[tuple[str, ...]] = set()
    kept = []
    for run in order:
        facts = run.facts
        words = {(facts["lib"], facts["cls"], name, str(value)) for name, value in (facts["resolved"] | facts["kwargs"]).items()}
        words |= {(facts["lib"], facts["cls"], name, facts[name]) for name in ("dtype", "tag", "problem")}
        if words - seen:
            seen |= words
            kept.append(run)
    return kept


def main() -> None:
    source = folder()
    if source is None:
        raise SystemExit("no reference: set MANGO_REFERENCE to the folder of cg_cm_reference.npz")
    kept = chosen(list(everything(source)))
    names = ("id", "lib", "cls", "problem", "dtype", "numpy_seed", "kwargs", "resolved", "tag")
    facts = [{name: run.facts[name] for name in names} for run in kept]
    arrays: dict[str, Any] = {"runs": np.array(json.dumps(facts))}
    for problem in SHAPES:
        mine = [run for run in kept if run.facts["problem"] == problem]
        arrays |= {f"{problem}.params": np.stack([run.params for run in mine]),
                   f"{problem}.events": np.stack([run.events for run in mine])}  # fmt: skip
        for i, (start, grads) in enumerate(zip(mine[0].start, mine[0].grads, strict=True)):
            arrays |= {f"{problem}.init.{i}": start, f"{problem}.grads.{i}": grads}
    np.savez_compressed(FIXTURE, **arrays)
    print(f"{len(kept)} runs, {FIXTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
