"""Studies on workloads: one optimizer, several against each other, or components switched off, with the same seeds.

Every run is a real training; a method that fails is reported and the others go on. Results are JSON and CSV:

    mango run single --optimizer adamw --workload digits_mlp --seeds 3 --output-dir runs/single
    mango run comparative --workload digits_cnn --seeds 3
    mango run ablation --workload digits_mlp --budget 0.125
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from mango.config import LADDER, CompressionConfig
from mango.policies import POLICIES
from mango_env.run import TrainingRun
from mango_env.workloads import Workload, make_workload, workload_name
from mango_env.workloads.base import WorkloadBuilder
from train_policy.held_out import GOAL_EVERY, TRAINING_LOSS, Goal, Looks, held_out
from train_policy.online import OnlineLearner
from train_policy.seeding import borrowed_rng
from train_policy.state_bytes import state_nbytes
from train_policy.study_methods import COMPARED, LEARNED, Method, Start, find_method, methods
from train_policy.throughput import Watch, peak_bytes, rates, start_peak
from train_policy.trace import UNTRACED, Tracer, Tracing

BEST = ("val_loss", "val_accuracy")                      # measures whose best look is in the tables
MODES = ("single", "comparative", "ablation")


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    return mode


@dataclass(frozen=True, slots=True)
class Args:
    """What a study runs."""

    mode: str = "single"                                 # see MODES
    optimizer: str = "adamw"                             # the method of a single study, see `methods`
    workload: str | WorkloadBuilder = "digits_mlp"       # a name of WORKLOADS, module:function or a callable f(seed)
    policy: str = "demo"                                 # the frozen policy of mango_learned: a shipped name or a path
    budget: float | int | str = 0.25                     # of MANGO: a fraction of AdamW's state bytes, a size, or bytes
    steps: int | None = None                             # optimizer steps; None: the workload's own
    epochs: float | None = None                          # instead of steps, where the workload knows its epoch
    batch_size: int | None = None                        # None: the workload's own
    learning_rate: float | None = None                   # None: the workload's own (25 times that for SGD)
    rule: str = "adamw"                                  # base rule of MANGO, see mango.rules
    interval: int = 10                                   # optimizer steps per decision
    seeds: int = 1                                       # runs per method
    seed: int = 0                                        # the first of them
    target: float | None = None                          # a goal: the first step at which `metric` reaches it
    metric: str = TRAINING_LOSS                          # or a held-out measure: val_loss, val_accuracy, bleu, ...
    evaluate_every: int | None = None                    # steps between held-out measures; None: the end, 100 for a goal
    device: str = "cpu"                                  # where the model is
    online: bool | None = None                           # mango_learned learns by PPO meanwhile; None: as `learns_online` has it

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        for name in ("steps", "epochs", "batch_size", "learning_rate", "interval", "evaluate_every"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.online and self.mode == "single" and self.optimizer != LEARNED:
            raise ValueError(f"online: {self.optimizer!r} has no policy that could learn; {LEARNED} has")
        if self.metric != TRAINING_LOSS and self.target is None:
            raise ValueError(f"metric={self.metric!r} says what a target is of; give the target too")


log = logging.getLogger("mango.study")
Row = dict[str, Any]
Report = Callable[[str], None]
Watched = Callable[[Optimizer], Tracer]


def chosen(args: Args) -> list[Method]:
    """The methods of a study, in the order of its table."""
    table = methods(args.policy)
    if args.mode == "comparative":
        return [table[name] for name in COMPARED]
    if args.mode == "ablation":
        return ablation(args, table)
    return [find_method(args.optimizer, args.policy)]


def ablation(args: Args, table: Mapping[str, Method]) -> list[Method]:
    """The learned policy, then with one component replaced at a time; error feedback by itself."""
    learned = table["mango_learned"]
    return [
        learned,
        replace(table["mango_water_filling"], name="without_learning", what="water-filling decides instead of the policy"),
        replace(table["mango_random"], name="without_a_policy", what="random rungs instead of the policy"),
        Method("without_adaptation", "one fixed rung for all layers, the largest that fits", policy=largest_rung(args)),
        replace(learned, name="without_a_budget", what="the policy without a limit on bytes", options={"memory_budget": None}),
        table["mango_g4"],
        table["mango_g4_no_ef"],
    ]


def largest_rung(args: Args) -> CompressionConfig:
    """The largest rung of the ladder that all layers can have within the budget."""
    for rung in reversed(LADDER.rungs):
        try:
            training_run(args, Method("fits", "", policy=rung), args.seed)
        except ValueError as error:
            if "memory_budget" not in str(error):
                raise
            continue
        return rung
    return LADDER[0]


def learns_online(args: Args, method: Method) -> bool:
    """Whether the policy of a method learns during its run: in a single study unless told otherwise, elsewhere if asked.

    Where methods are compared, mango_learned is the frozen file; where it is trained with alone, it goes on learning. A
    heuristic has nothing that could learn.
    """
    if method.name != LEARNED:
        return False
    return args.mode == "single" and method.policy not in POLICIES if args.online is None else args.online


def training_run(args: Args, method: Method, seed: int) -> TrainingRun:
    """A MANGO run that decides by itself."""
    options = dict(method.options)
    return TrainingRun(
        builder(args),
        seed,
        horizon=horizon(args, seed),
        interval=args.interval,
        memory_budget=options.pop("memory_budget", args.budget),
        lr=args.learning_rate,
        rule=args.rule,
        policy=method.policy,
        workload_kwargs=workload_options(args),
        optimizer_options=options,
    )


def builder(args: Args) -> str | WorkloadBuilder:
    """What makes the workload of a study, its model on the study's device."""
    return args.workload if args.device == "cpu" else partial(placed, args.workload, args.device)


def placed(spec: str | WorkloadBuilder, device: str, seed: int, **options: Any) -> Workload:
    """A workload whose model is on `device`; batches follow it."""
    workload = make_workload(spec, seed, **options)
    workload.model.to(device)
    return workload


def workload_options(args: Args) -> dict[str, Any]:
    return {} if args.batch_size is None else {"batch": args.batch_size}


def horizon(args: Args, seed: int) -> int | None:
    """Optimizer steps of a run; None: the workload's own."""
    if args.epochs is None:
        return args.steps
    workload = make_workload(args.workload, seed, **workload_options(args))
    per_epoch = getattr(workload, "steps_per_epoch", None)
    if per_epoch is None:
        raise ValueError(f"workload {workload_name(args.workload)!r} has no epochs (no steps_per_epoch); give steps instead")
    return max(1, round(args.epochs * int(per_epoch)))


def run_method(args: Args, method: Method, seed: int, tracing: Tracing = UNTRACED, folder: Path = Path()) -> Row:
    """Train once and measure; traces of its steps go into `folder`. Raises what the training raises."""
    started = time.perf_counter()
    start_peak(torch.device(args.device))
    goal = Goal(args.target, args.metric)
    looks = Looks(args.evaluate_every or (GOAL_EVERY if args.metric != TRAINING_LOSS else None))

    def watched(optimizer: Optimizer) -> Tracer:
        return Tracer(optimizer, tracing, folder / "trace" / f"{method.name}-seed{seed}")

    if method.start is None:
        measured = mango_losses(args, method, seed, goal, looks, watched)
    else:
        measured = other_losses(args, method.start, seed, goal, looks, watched)
    seconds = time.perf_counter() - started
    losses: list[float] = measured.pop("losses")
    if not losses or not math.isfinite(losses[-1]) or not math.isfinite(measured["val_loss"]):
        raise RuntimeError(f"{method.name} diverged on {workload_name(args.workload)} with seed {seed} after {len(losses)} steps")
    return {
        "policy": method.name,
        "workload": workload_name(args.workload),
        "seed": seed,
        **measured,
        **looks.best(),
        "evaluations": looks.found,
        "steps": len(losses),
        "best_train_loss": min(losses),
        "steps_to_target": goal.steps,
        "seconds_to_target": goal.seconds,
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes(torch.device(args.device)),
        "loss_curve": [sum(part) / len(part) for part in chunks(losses, max(1, len(losses) // 100))],
    }


def mango_losses(args: Args, method: Method, seed: int, goal: Goal, looks: Looks, watched: Watched) -> Row:
    """Train with MANGO: losses per step, held-out measures, bytes, and the config of every layer in every interval."""
    learns = learns_online(args, method)
    run = training_run(args, replace(method, policy="hold") if learns else method, seed)
    learner = OnlineLearner(method.policy, run) if learns else None
    watch = Watch(torch.device(args.device))
    losses: list[float] = []
    decisions: list[list[str]] = []
    held: list[int] = []
    measures: Mapping[str, float] | None = None
    measure = partial(held_out, run.workload, run.evaluate, args.metric)
    with watched(run.optimizer) as tracer:
        while not run.done:
            with watch.running():
                with tracer.deciding():
                    if learner is not None:
                        learner.decide()
                decisions.append([config.name for config in run.optimizer.applied])
                interval = run.advance()
                if learner is not None:
                    learner.learn(interval)
            if interval.diverged:
                why = f"{method.name} diverged: the loss is {interval.last_loss:.3g} at step {run.t}"
                raise RuntimeError(interval.error or why)
            losses += interval.losses.tolist()
            held.append(interval.state_bytes_peak)
            log.debug("%s, seed %d, step %d: loss %.4f", method.name, seed, run.t, interval.loss)
            measures = looks.at(len(losses), run.done, measure)
            goal.look(losses, watch.seconds, measures)
    if learner is not None:
        learner.finish()
    limited = method.options.get("memory_budget", args.budget) is not None
    return {
        "losses": losses,
        **(measures or {}),
        **rates(run.workload, len(losses), watch.seconds),
        "budget_bytes": run.budget if limited else None,
        "state_bytes_peak": max(held),
        "adamw_bytes": run.optimizer.adamw_bytes,
        "layers": [layer.name for layer in run.layers],
        "decisions": decisions,
        "state_bytes": held,
        **({} if learner is None else {"ppo_stats": learner.stats}),
    }


def other_losses(args: Args, start: Start, seed: int, goal: Goal, looks: Looks, watched: Watched) -> Row:
    """Train with another optimizer on the same workload, seed and batches."""
    steps = horizon(args, seed)
    watch = Watch(torch.device(args.device))
    with borrowed_rng(seed):                             # as TrainingRun does: what the model draws repeats with the seed
        workload = make_workload(builder(args), seed, **workload_options(args))
        left = steps or workload.steps
        trainer = start(workload, args.learning_rate, left)
        losses: list[float] = []
        held, measures = 0, None
        measure = partial(held_out, workload, workload.evaluate, args.metric)
        with watched(trainer.optimizer) as tracer:
            while left > 0:
                part = min(args.interval, left)
                with watch.running():
                    tracer.mark()
                    losses += [float(loss) for loss in [trainer.step(workload.loss) for _ in range(part)]]
                left -= part
                held = max(held, state_nbytes(trainer.optimizer))
                log.debug("seed %d, step %d: loss %.4f", seed, len(losses), sum(losses[-part:]) / part)
                measures = looks.at(len(losses), left == 0, measure)
                goal.look(losses, watch.seconds, measures)
    return {
        "losses": losses,
        **(measures or {}),
        **rates(workload, len(losses), watch.seconds),
        "budget_bytes": None,
        "state_bytes_peak": held,
        "adamw_bytes": 8 * sum(p.numel() for p in workload.model.parameters()),
        "decisions": [],
    }


def chunks(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def check_study(args: Args) -> None:
    """Raise what would keep a study from training: an unknown optimizer or policy, a workload that cannot be made."""
    horizon(args, args.seed)
    make_workload(args.workload, args.seed, **workload_options(args))
    for method in chosen(args):
        if method.budgeted:
            run = training_run(args, method, args.seed)
            if learns_online(args, method):
                OnlineLearner(method.policy, run)


def study(
    args: Args, report: Report = print, failed: Report | None = None, tracing: Tracing = UNTRACED, folder: Path = Path()
) -> tuple[list[Row], list[Row]]:
    """Run every method on every seed: the rows of those that finished, and of those that failed with their error.

    `report` is told each result, `failed` (None: the same) each failure; what happens inside a run goes to the logger
    `mango.study`. Raises what making the workload raises.
    """
    make_workload(args.workload, args.seed, **workload_options(args))  # a data set that is not there fails all methods alike
    rows: list[Row] = []
    failures: list[Row] = []
    for method in chosen(args):
        for seed in range(args.seed, args.seed + args.seeds):
            try:
                rows.append({**run_method(args, method, seed, tracing, folder), "what": method.what})
            except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
                reason = " ".join(str(error).split())
                failures.append({"policy": method.name, "workload": workload_name(args.workload), "seed": seed, "error": reason})
                (failed or report)(f"{method.name}, seed {seed}: failed: {reason}")
                continue
            report(f"{method.name}, seed {seed}: {told(rows[-1])}")
    return rows, failures


def told(row: Row) -> str:
    """A row in one line: held-out measures, state, speed, peak."""
    parts = [f"{name} {row[name]:.4f}" for name in ("val_loss", "val_accuracy", "val_perplexity", "bleu") if name in row]
    if row["best_val_loss"] is not None:
        parts.append(f"best {row['best_val_loss']:.4f} at step {row['best_val_loss_step']}")
    parts.append(f"{row['state_bytes_peak']:,} bytes of state")
    for what in ("samples", "tokens"):
        if row[f"{what}_per_second"] is not None:
            parts.append(f"{row[f'{what}_per_second']:,.0f} {what}/s")
    parts.append(f"peak {row['peak_memory_bytes'] / 1e9:.2f} GB")
    if row["steps_to_target"] is not None:
        parts.append(f"target after {row['steps_to_target']} steps, {row['seconds_to_target']:.1f} s")
    return ", ".join(parts)


def summary(rows: Sequence[Row]) -> list[Row]:
    """One line per method: mean and standard error of the held-out loss over seeds, largest state bytes."""
    lines = []
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == name]
        values = [row["val_loss"] for row in mine]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan
        lines.append({
            "policy": name, "what": mine[0]["what"], "seeds": len(mine),
            "val_loss": mean, "val_loss_se": spread / math.sqrt(len(mine)),
            **{m: sum(r.get(m, math.nan) for r in mine) / len(mine) for m in ("val_accuracy", "val_perplexity")},
            "state_bytes_peak": max(r["state_bytes_peak"] for r in mine), "adamw_bytes": mine[0]["adamw_bytes"],
            **{m: mean_of(mine, m) for m in ("seconds", "samples_per_second", "tokens_per_second", "seconds_to_target",
                                            *(f"best_{name}" for name in BEST))},
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in mine),
        })  # fmt: skip
    return lines


def mean_of(rows: Sequence[Row], name: str) -> float | None:
    """The mean of a column; None where a row lacks it."""
    values = [row.get(name) for row in rows]
    known = [value for value in values if value is not None]
    return None if len(known) < len(values) else sum(known) / len(known)


def run_study(
    args: Args, folder: Path, report: Report = print, failed: Report | None = None, tracing: Tracing = UNTRACED
) -> tuple[Path, list[Row], list[Row]]:
    """Run a study and write `study.json`, `study.csv` (and traces) into `folder`: the JSON's path, the rows, the failures."""
    from train_policy.cli_support import write_json
    from train_policy.provenance import about
    from train_policy.report_data import write_csv

    rows, failures = study(args, report, failed, tracing, folder)
    path = folder / "study.json"
    facts = {"kind": "study", "about": about(), "args": {**asdict(args), "workload": workload_name(args.workload)}}
    write_json(path, {**facts, "failures": failures, "summary": summary(rows), "rows": rows})
    write_csv(folder / "study.csv", rows)
    return path, rows, failures
