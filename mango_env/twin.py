"""The uncompressed twin of a run: the same workload, seed and steps at full precision, what compression is compared with.

A twin is trained once and remembered: in memory, and as JSON in `$MANGO_CACHE/twins` (default `~/.cache/mango/twins`)
where its workload can be told apart by its source. A folder that cannot be written costs time, never a run.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch

from mango.config import CompressionConfig
from mango_env.energy import Energy, metered
from mango_env.locks import locked
from mango_env.reward import Reward, RewardTerms
from mango_env.run import DEFAULT_INTERVAL, Interval, TrainingRun
from mango_env.workloads import WORKLOADS, split_options
from mango_env.workloads.base import WorkloadBuilder

WORKLOAD_PACKAGE = "mango_env.workloads"


@dataclass(frozen=True, slots=True)
class Twin:
    """Training losses per optimizer step and the final held-out measures. `error`: what ended it early, if anything did."""

    losses: tuple[float, ...]
    evaluation: dict[str, float]
    error: str | None = None
    step_seconds: float | None = None                        # per optimizer step, where it was trained for its costs
    step_joules: float | None = None

    def mean(self, start: int, stop: int) -> float | None:
        """Mean loss over the optimizer steps [start, stop); None where the twin did not get that far."""
        window = self.losses[start:stop]
        return float(np.mean(window)) if len(window) == stop - start > 0 and bool(np.isfinite(window).all()) else None


@dataclass(frozen=True)
class TwinIdentity:
    """All that a twin depends on. The interval is not part of it: at full precision nothing is decided."""

    workload: str | WorkloadBuilder
    seed: int
    horizon: int
    lr: float
    rule: str
    schedule: str
    max_grad_norm: float | None
    options_json: str                                        # of the two below
    kwargs: Mapping[str, Any] = field(compare=False, repr=False)
    hyper: Mapping[str, Any] = field(compare=False, repr=False)

    def digest(self) -> str | None:
        """Names the file of the twin; None where the workload cannot be told apart by its source."""
        source = source_of(self.workload)
        if source is None:
            return None
        facts = {
            "workload": source,
            "seed": self.seed,
            "horizon": self.horizon,
            "lr": self.lr,
            "rule": self.rule,
            "schedule": self.schedule,
            "options": self.options_json,
            "data": os.environ.get("MANGO_DATA", ""),
            "mango": _version(),
            "torch": torch.__version__,
        }
        if self.max_grad_norm is not None:                   # twins from before there was clipping keep their names
            facts["max_grad_norm"] = self.max_grad_norm
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def twin_of(run: TrainingRun) -> Twin:
    """The twin of a run, from memory, from disk, or trained now. Never raises for what the twin's training does."""
    return _remembered(identity_of(run), os.environ.get("MANGO_CACHE"))


def identity_of(run: TrainingRun) -> TwinIdentity:
    kwargs, hyper = run.workload_kwargs, run.hyper
    return TwinIdentity(
        workload=run.spec,
        seed=run.seed,
        horizon=run.horizon,
        lr=run.lr,
        rule=run.rule,
        schedule=run.schedule,
        max_grad_norm=run.max_grad_norm,
        options_json=json.dumps([kwargs, hyper], sort_keys=True, default=repr),
        kwargs=kwargs,
        hyper=hyper,
    )


def costed_twin_of(run: TrainingRun, costs: Iterable[str]) -> Twin:
    """The twin with what its steps cost: trained in this process, since another machine's or day's seconds say nothing here."""
    return _costed(identity_of(run), frozenset(costs))


@functools.lru_cache(maxsize=512)
def _costed(identity: TwinIdentity, costs: frozenset[str]) -> Twin:
    return train_twin(identity, costs)


def costs_of(reward: Reward, interval: Interval, twin: Twin | None, joules: float | None) -> dict[str, float]:
    """Seconds and Joules per step relative to the twin's, minus 1: those that the reward weighs."""
    steps = max(1, interval.stop - interval.start)
    measured = {
        "time": (interval.step_seconds / steps, None if twin is None else twin.step_seconds),
        "energy": (None if joules is None else joules / steps, None if twin is None else twin.step_joules),
    }
    found = {}
    for cost in reward.costly:
        mine, theirs = measured[cost]
        if mine is None or not theirs:
            weight = f"{cost}_weight={reward.costly[cost]}"
            raise ValueError(f"{weight}: {cost} per step is unavailable for the run or its twin; set the weight to 0")
        found[cost] = mine / theirs - 1
    return found


def score(reward: Reward, interval: Interval, twin: Twin | None, joules: float | None = None) -> RewardTerms:
    """The reward of one interval of a run: against its twin over the same steps, or against the interval before."""
    if reward.loss == "twin":
        reference = None if twin is None else twin.mean(interval.start, interval.stop)
    else:
        reference = interval.previous_loss
    return reward.terms(
        loss=interval.loss,
        reference=reference,
        first=interval.first_loss,
        layer_bytes=interval.bytes,
        adamw_bytes=interval.adamw_bytes,
        errors=interval.errors,
        lost_decisions=1 + interval.decisions_left if interval.diverged else 0,
        costs=None if interval.diverged else costs_of(reward, interval, twin, joules),
    )


@functools.lru_cache(maxsize=512)
def _remembered(identity: TwinIdentity, cache: str | None) -> Twin:
    digest = identity.digest()
    folder = Path(cache) if cache else Path.home() / ".cache" / "mango"
    path = None if digest is None else folder / "twins" / f"{digest}.json"
    if path is None:
        return train_twin(identity)
    twin = read_twin(path)
    if twin is not None:
        return twin
    with _one_at_a_time(path):
        twin = read_twin(path)                               # somebody may have made it meanwhile
        if twin is None:
            twin = train_twin(identity)
            write_twin(path, twin)
    return twin


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Processes that want the same twin wait for the first of them. Where no lock can be had, each trains its own."""
    lock = path.with_suffix(".lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock))
            stack.callback(lock.unlink, missing_ok=True)     # who waits for it finds the twin; who comes later, too
        yield


def train_twin(identity: TwinIdentity, costs: Collection[str] = ()) -> Twin:
    """Train at full precision, with its "time" and "energy" on demand; a workload that raises gives a twin that ends there."""
    run = TrainingRun(
        identity.workload,
        identity.seed,
        horizon=identity.horizon,
        interval=max(DEFAULT_INTERVAL, identity.horizon // 20),
        memory_budget=4.0,                                   # times AdamW's state: it never binds
        lr=identity.lr,
        rule=identity.rule,
        schedule=identity.schedule,
        max_grad_norm=identity.max_grad_norm,
        policy=CompressionConfig(),
        workload_kwargs=identity.kwargs,
        optimizer_options=identity.hyper,
    )
    run.optimizer.policy_update_freq = run.horizon + 1       # nobody decides, so nothing has to be looked at
    losses: list[float] = []
    error: str | None = None
    seconds = 0.0
    with metered() if "energy" in costs else contextlib.nullcontext(Energy()) as used:
        while not run.done:
            interval = run.advance()
            losses += interval.losses.tolist()
            seconds += interval.step_seconds
            error = interval.error or ("the loss diverged" if interval.diverged else None)
    evaluation, problem = run.evaluate_or_error()
    steps = max(1, run.t)
    joules = None if used.joules is None else used.joules / steps
    return Twin(tuple(losses), evaluation, error or problem, seconds / steps if "time" in costs else None, joules)


def read_twin(path: Path) -> Twin | None:
    """A remembered twin; None where there is none or the file is damaged (it is then made again)."""
    try:
        stored = json.loads(path.read_text())
        return Twin(tuple(map(float, stored["losses"])), dict(stored["evaluation"]), stored["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_twin(path: Path, twin: Twin) -> None:
    """Written aside and renamed, so that a reader sees all of it or nothing; a full or closed disk is no error."""
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({name: value for name, value in asdict(twin).items() if not name.startswith("step_")}))
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def source_of(workload: str | WorkloadBuilder) -> str | None:
    """Name and hash of the code that builds a workload; None for closures, partials and what has no source file."""
    workload, options = split_options(workload)
    if options:
        source = source_of(workload)
        return None if source is None else f"{source}:{json.dumps(options, sort_keys=True, default=repr)}"
    builder: Any = workload
    if isinstance(workload, str):
        name, colon, attribute = workload.rpartition(":")
        builder = WORKLOADS.get(workload)
        if builder is None and colon:
            module = Path(name).expanduser() if name.endswith(".py") else sys.modules.get(name)
            source = _module_source(module)
            return None if source is None else f"{name}:{attribute}:{source}"
    if isinstance(builder, FunctionType) and builder.__closure__:
        return None
    if not isinstance(builder, FunctionType | type):
        return None
    package = sys.modules[WORKLOAD_PACKAGE].__file__
    if builder.__module__.startswith(WORKLOAD_PACKAGE) and package is not None:  # they share code between files
        text = "".join(_module_source(path) or "" for path in sorted(Path(package).parent.glob("*.py")))
        source = hashlib.sha256(text.encode()).hexdigest()
    else:
        source = _module_source(sys.modules.get(builder.__module__))
    return None if source is None else f"{builder.__module__}:{builder.__qualname__}:{source}"


def _module_source(module: Any) -> str | None:
    try:
        text = module.read_text() if isinstance(module, Path) else inspect.getsource(module)
    except (OSError, TypeError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("mango-optim")
    except importlib.metadata.PackageNotFoundError:
        return "unreleased"
