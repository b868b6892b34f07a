"""Hyper-parameter search over our trainers, on recorded runs: a space in YAML, trials, and a table ranked on held-out runs.

A space is written as rl-zoo3's users think of one: `name: {values: [...]}`, or `name: {low, high, log: true}`. Trial i is drawn
from (seed, i) alone, so a search that was interrupted, or gets more trials later, goes on as if it had never stopped. Random
search is what optuna's samplers are hard to beat from with some tens of trials (Bergstra and Bengio 2012, sec. 2), and needs
no dependency and no database.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from mango.networks import PolicyNetwork
from mango_env.cache import TrajectoryCache
from train_policy import bc, offline
from train_policy.batches import split_runs
from train_policy.cli_support import one_line, plain, write_json
from train_policy.provenance import about
from train_policy.recipes import from_recipe
from train_policy.report_data import write_csv

SEARCHES = ("random", "grid")
# what says which runs are held out, or what they hold: scores under other values cannot be compared
KEPT = ("algo", "seed", "validation", "policies", "top", "head")
NETWORK = "network."                                     # prefix of a new network's own settings
FQE = "fqe_value"                                        # metric: fitted Q evaluation of the trained policy on the held-out runs
DRAWS_PER_TRIAL = 100                                    # at most, to find settings that were not tried yet


@dataclass(frozen=True, slots=True)
class Dimension:
    """One hyper-parameter: some values, or a range, drawn uniformly or (log) uniformly in the logarithm."""

    values: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    points: int | None = None                            # of a range in a grid, both ends included
    whole: bool = False                                  # a whole number

    def __post_init__(self) -> None:
        ranged = self.low is not None and self.high is not None
        if bool(self.values) == ranged or (self.low is None) != (self.high is None):
            raise ValueError("give values, or both low and high")
        if self.low is not None and self.high is not None:
            if not self.low < self.high or not (math.isfinite(self.low) and math.isfinite(self.high)):
                raise ValueError(f"low={self.low} must be below high={self.high}")
            if self.log and self.low <= 0:
                raise ValueError(f"low={self.low} must be above 0 where log is true")
        if self.points is not None and self.points < 2:
            raise ValueError(f"points={self.points} must be at least 2")

    def draw(self, rng: np.random.Generator) -> Any:
        return self.values[int(rng.integers(len(self.values)))] if self.values else self._at(float(rng.random()))

    def grid(self) -> list[Any]:
        """All values; of a range `points` of them."""
        if self.values:
            return list(self.values)
        if self.points is None:
            raise ValueError("a range in a grid needs points, how many of it to try")
        return list(dict.fromkeys(self._at(i / (self.points - 1)) for i in range(self.points)))

    def _at(self, fraction: float) -> Any:
        assert self.low is not None and self.high is not None
        if self.log:
            found = math.exp(math.log(self.low) + fraction * (math.log(self.high) - math.log(self.low)))
        else:
            found = self.low + fraction * (self.high - self.low)
        found = min(max(found, self.low), self.high)
        return round(found) if self.whole else float(f"{found:.6g}")


def check_trainer(trainer: str) -> str:
    known = ["bc", *(f"offline:{algo}" for algo in offline.ALGOS)]
    if trainer not in known:
        raise ValueError(f"unknown trainer {trainer!r}; known: {', '.join(known)}")
    return trainer


@dataclass(frozen=True, slots=True)
class SweepArgs:
    """What to search. `recipe` holds what all trials share, `space` what they differ in."""

    trainer: str                                         # "bc" or "offline:ALGO"
    space: Mapping[str, Any]                             # hyper-parameter -> {values} or {low, high, log, points}
    recipe: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = "mlp"                            # of every trial's new network
    trials: int | None = None                            # None: 20 of a random search, the whole grid
    search: str = "random"                               # or "grid"
    metric: str | None = None                            # None: agreement with the recorded decisions on held-out runs
    minimise: bool | None = None                         # None: losses and errors are minimised, all else maximised
    seed: int = 0

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ValueError(f"unknown search {self.search!r}; known: {', '.join(SEARCHES)}")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials={self.trials} must be at least 1")
        if not self.space:
            raise ValueError("the space names no hyper-parameter")
        kept = sorted(set(self.space) & set(KEPT))
        if kept:
            raise ValueError(f"{kept} cannot be searched: trials are compared on the same held-out runs; set them for all trials")
        self.arguments({})                               # the recipe alone must be sound
        self.dimensions()

    @property
    def kind(self) -> type[bc.BcArgs] | type[offline.OfflineArgs]:
        """The dataclass that the trainer takes."""
        return bc.BcArgs if check_trainer(self.trainer) == "bc" else offline.OfflineArgs

    def arguments(self, settings: Mapping[str, Any]) -> bc.BcArgs | offline.OfflineArgs:
        """The trainer's arguments under a trial's settings."""
        own = {name: value for name, value in settings.items() if not name.startswith(NETWORK)}
        algo = {} if self.trainer == "bc" else {"algo": self.trainer.removeprefix("offline:")}
        return from_recipe(self.kind, {**self.recipe, "seed": self.seed, **algo, **own})

    def dimensions(self) -> dict[str, Dimension]:
        hints = get_type_hints(self.kind)
        found = {}
        for name, given in self.space.items():
            if not name.startswith(NETWORK) and name not in hints:
                raise ValueError(f"unknown hyper-parameter {name!r} of {self.trainer}; known: {', '.join(hints)}, {NETWORK}NAME")
            if not isinstance(given, Mapping):
                raise ValueError(f"{name}: {given!r} is neither {{values: [...]}} nor {{low, high, log}}")
            try:
                dimension = from_recipe(Dimension, given, whole=hints.get(name) is int)
                if self.search == "grid":
                    dimension.grid()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            found[name] = dimension
        return found

    def target(self) -> tuple[str, bool]:
        """The metric that ranks, and whether less of it is better."""
        agreement = f"{'accuracy' if self.trainer == 'bc' else 'agreement'}_{self.arguments({}).head}"
        metric = self.metric or agreement
        return metric, self.minimise if self.minimise is not None else "loss" in metric or "error" in metric

    def settings(self) -> Iterator[dict[str, Any]]:
        """What each trial changes. The first of a random search changes nothing: it is the recipe, to be beaten."""
        dimensions = self.dimensions()
        if self.search == "grid":
            product = itertools.product(*(dimension.grid() for dimension in dimensions.values()))
            yield from (dict(zip(dimensions, values, strict=True)) for values in itertools.islice(product, self.trials))
            return
        wanted = 20 if self.trials is None else self.trials
        tried: list[dict[str, Any]] = [{}]
        yield {}
        for draw in range(wanted * DRAWS_PER_TRIAL):
            if len(tried) >= wanted:
                return
            rng = np.random.default_rng([self.seed, draw])
            drawn = {name: dimension.draw(rng) for name, dimension in dimensions.items()}
            if drawn not in tried:
                tried.append(drawn)
                yield drawn


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Trials, the best first and the failed last, and the files that hold them."""

    rows: list[dict[str, Any]]
    path: Path                                           # JSON; the table is beside it as CSV
    metric: str
    minimise: bool

    @property
    def failed(self) -> int:
        return sum(row["status"] != "ok" for row in self.rows)


def sweep(
    cache: TrajectoryCache,
    args: SweepArgs,
    out: Path,
    *,
    report: Callable[[str], None] | None = None,
    progress: bool = False,
) -> SweepResult:
    """Train every trial and rank them; `sweep.json`, `sweep.csv` and the trials' policies go into `out`.

    Files are rewritten after every trial. Called again with the same arguments it goes on: trials that are done stay,
    failed ones are tried once more. `trials`, `metric` and `minimise` may change in between.

    Raises ValueError where `out` holds another search, and for a metric that the trainer does not report; KeyboardInterrupt,
    with what is done kept, at Ctrl-C.
    """
    metric, minimise = args.target()
    path, identity = out / "sweep.json", _identity(args, cache)
    done = _done(path, identity)
    wanted = list(args.settings())

    def save() -> SweepResult:
        rows = ranked([done[i] for i in sorted(done)], metric, minimise)
        write_json(path, {"about": about(), "metric": metric, "minimise": minimise, **identity, "trials": rows})
        write_csv(path.with_suffix(".csv"), [_flat(row, metric) for row in rows])
        return SweepResult(rows, path, metric, minimise)

    for number, settings in enumerate(wanted):
        if number in done and done[number]["status"] == "ok" and (metric != FQE or FQE in done[number]["metrics"]):
            continue
        try:
            done[number] = _trial(number, settings, cache, args, out, metric, progress)
        except KeyboardInterrupt as interruption:
            left = sum(i in done for i in range(len(wanted)))
            text = f"{left} of {len(wanted)} trials are in {path}; the same command goes on" if left else "no trial was finished"
            raise KeyboardInterrupt(text) from interruption
        row = done[number]
        save()
        if report is not None:
            told = row["error"] or f"{metric} {row['metrics'].get(metric, math.nan):.4g}"
            report(f"trial {number + 1} of {len(wanted)}: {told}")
        if row["status"] == "ok" and metric not in row["metrics"]:
            raise ValueError(f"{args.trainer} does not report {metric!r}; it reports: {', '.join(row['metrics'])}, {FQE}")
    return save()


def ranked(rows: list[dict[str, Any]], metric: str, minimise: bool) -> list[dict[str, Any]]:
    """Rows with their `rank`, the best first; equal ones in the order of their trials, failed ones (no rank) last."""

    def key(row: dict[str, Any]) -> tuple[bool, float, int]:
        value = row["metrics"].get(metric)
        usable = row["status"] == "ok" and value is not None and math.isfinite(value)
        return not usable, (value if minimise else -value) if usable else 0.0, row["trial"]

    ordered = sorted(rows, key=key)
    return [{**row, "rank": None if key(row)[0] else place + 1} for place, row in enumerate(ordered)]


def _identity(args: SweepArgs, cache: TrajectoryCache) -> dict[str, Any]:
    """What makes two searches the same, as JSON."""
    kept = {name: value for name, value in asdict(args).items() if name not in ("trials", "metric", "minimise")}
    found: dict[str, Any] = plain({**kept, "data_digest": cache.digest})
    return found


def _done(path: Path, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Rows of an earlier call by trial."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in identity if found.get(name) != identity[name]]
    if changed:
        raise ValueError(f"{path} holds another search (it differs in {', '.join(changed)}); choose another folder")
    return {row["trial"]: row for row in found["trials"]}


def _trial(
    number: int, settings: dict[str, Any], cache: TrajectoryCache, args: SweepArgs, out: Path, metric: str, progress: bool
) -> dict[str, Any]:
    """Train once; a trial that cannot be trained is a row that says why."""
    checkpoint = out / "trials" / f"{number:04}.safetensors"
    began, metrics, error = time.perf_counter(), {}, ""
    try:
        chosen = args.arguments(settings)
        own = {name.removeprefix(NETWORK): value for name, value in settings.items() if name.startswith(NETWORK)}
        network = PolicyNetwork(args.architecture, seed=args.seed, **own)
        result: Any
        if isinstance(chosen, bc.BcArgs):
            result = bc.train(network, cache, chosen, checkpoint=checkpoint, progress=progress)
        else:
            result = offline.train(network, cache, chosen, checkpoint=checkpoint, progress=progress)
        metrics = dict(result.metrics)
        if metric == FQE:
            metrics[FQE] = _held_out_value(result.network, cache, chosen, progress)
        if metric in metrics and not math.isfinite(metrics[metric]):
            error = f"{metric} is {metrics[metric]}"
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as problem:
        error = one_line(problem)
    return {
        "trial": number,
        "status": "failed" if error else "ok",
        "settings": settings,
        "metrics": metrics,
        "seconds": time.perf_counter() - began,
        "policy": str(checkpoint.relative_to(out)) if not error else None,
        "error": error,
    }


def _held_out_value(
    network: PolicyNetwork, cache: TrajectoryCache, args: bc.BcArgs | offline.OfflineArgs, progress: bool
) -> float:
    """Fitted Q evaluation of a trained policy on runs that its trainer held out (Paine et al. 2020: selection offline)."""
    from train_policy.ope import OpeArgs, evaluate_offline

    if isinstance(args, bc.BcArgs):
        raise ValueError(f"{FQE} is a metric of offline:ALGO; bc holds out among the runs that it imitates: use accuracy_rung")
    held = split_runs(cache, args.validation, args.seed)[1]
    value = evaluate_offline(network, held, OpeArgs(seed=args.seed), progress=progress).fqe.value
    assert value is not None
    return value


def _flat(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """A row of the CSV: rank, score, settings, all metrics."""
    first = {"rank": row["rank"], "trial": row["trial"], "status": row["status"], metric: row["metrics"].get(metric)}
    more = {"seconds": round(row["seconds"], 3), "policy": row["policy"], "error": row["error"]}
    return {**first, **row["settings"], **{k: v for k, v in row["metrics"].items() if k != metric}, **more}
