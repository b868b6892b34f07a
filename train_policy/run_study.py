"""Studies on workloads: one optimizer, several against each other, or components switched off, with the same seeds.

Every run is a real training; a method that fails is reported and the others go on. Results are JSON and CSV:

    mango run single --optimizer adamw --workload digits_mlp --seeds 3 --output-dir runs/single
    mango run comparative --workload digits_cnn --seeds 3
    mango run ablation --workload digits_mlp --budget 0.125
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mango.config import LADDER, CompressionConfig
from mango_env.run import DEFAULT_LR, TrainingRun
from mango_env.workloads import Workload, make_workload, workload_name
from mango_env.workloads.base import WorkloadBuilder
from train_policy.seeding import borrowed_rng

MODES = ("single", "comparative", "ablation")
COMPARED = ("adam", "adamw", "sgd", "mango_adaptive", "mango_learned")
SGD_LR_FACTOR = 25.0                                     # SGD with momentum wants a larger rate than Adam's 2e-3: 0.05


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train: a torch optimizer by name, or MANGO with a policy and options."""

    name: str
    what: str
    torch_rule: str | None = None                        # "adam", "adamw", "sgd"; None: MANGO
    policy: Any = None                                   # as MANGO takes it; None: water-filling
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budgeted(self) -> bool:
        return self.torch_rule is None


@dataclass(frozen=True, slots=True)
class Args:
    """What a study runs."""

    mode: str = "single"                                 # see MODES
    optimizer: str = "adamw"                             # the method of a single study, see `methods`
    workload: str | WorkloadBuilder = "digits_mlp"       # a name of WORKLOADS, module:function or a callable f(seed)
    policy: str = "demo"                                 # the frozen policy of mango_learned: a shipped name or a path
    budget: float | str = 0.25                           # of MANGO: a fraction of AdamW's state bytes, a size, or bytes
    steps: int | None = None                             # optimizer steps; None: the workload's own
    epochs: float | None = None                          # instead of steps, where the workload knows its epoch
    batch_size: int | None = None                        # None: the workload's own
    learning_rate: float | None = None                   # None: the workload's own (25 times that for SGD)
    rule: str = "adamw"                                  # base rule of MANGO, see mango.rules
    interval: int = 10                                   # optimizer steps per decision
    seeds: int = 1                                       # runs per method
    seed: int = 0                                        # the first of them
    target: float | None = None                          # a validation-free goal: the first step whose training loss reaches it

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known: {', '.join(MODES)}")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")


Row = dict[str, Any]
Report = Callable[[str], None]


def methods(policy: str = "demo") -> dict[str, Method]:
    """Every method that a single study can run, by name."""
    eight = CompressionConfig(momentum_bits=8, variance_bits=8)
    coarse = replace(eight, gradient_bits=4)
    free: dict[str, Any] = {"memory_budget": None}
    table = [
        Method("adam", "torch.optim.Adam", torch_rule="adam"),
        Method("adamw", "torch.optim.AdamW", torch_rule="adamw"),
        Method("sgd", "torch.optim.SGD, momentum 0.9", torch_rule="sgd"),
        Method("mango_full", "MANGO at full precision, no limit", policy=CompressionConfig(), options=free),
        Method("mango_8bit", "MANGO, 8-bit moments everywhere", policy=eight),
        Method("mango_adaptive", "MANGO, the phase heuristic", policy="adaptive"),
        Method("mango_scheduled", "MANGO, from full precision down the ladder", policy="scheduled"),
        Method("mango_water_filling", "MANGO, least error per byte", policy="water-filling"),
        Method("mango_random", "MANGO, random rungs", policy="random"),
        Method("mango_learned", f"MANGO, the frozen policy {policy!r}", policy=policy),
        Method("mango_g4", "4-bit gradients with error feedback, 8-bit moments, no limit", policy=coarse, options=free),
        Method("mango_g4_no_ef", "4-bit gradients without error feedback, 8-bit moments, no limit", policy=coarse,
               options={"error_feedback": False} | free),
    ]  # fmt: skip
    return {method.name: method for method in table}


def chosen(args: Args) -> list[Method]:
    """The methods of a study, in the order of its table."""
    table = methods(args.policy)
    if args.mode == "comparative":
        return [table[name] for name in COMPARED]
    if args.mode == "ablation":
        return ablation(args, table)
    if args.optimizer not in table:
        raise ValueError(f"unknown optimizer {args.optimizer!r}; known: {', '.join(table)}")
    return [table[args.optimizer]]


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


def training_run(args: Args, method: Method, seed: int) -> TrainingRun:
    """A MANGO run that decides by itself."""
    options = dict(method.options)
    return TrainingRun(
        args.workload,
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


def run_method(args: Args, method: Method, seed: int) -> Row:
    """Train once and measure. Raises what the training raises."""
    started = time.perf_counter()
    measured = mango_losses(args, method, seed) if method.budgeted else torch_losses(args, method, seed)
    seconds = time.perf_counter() - started
    losses: list[float] = measured.pop("losses")
    if not losses or not math.isfinite(measured["val_loss"]):
        raise RuntimeError(f"{method.name} diverged on {workload_name(args.workload)} with seed {seed} after {len(losses)} steps")
    reached = None if args.target is None else next((i + 1 for i, loss in enumerate(losses) if loss <= args.target), None)
    return {
        "policy": method.name,
        "workload": workload_name(args.workload),
        "seed": seed,
        **measured,
        "steps": len(losses),
        "best_train_loss": min(losses),
        "steps_to_target": reached,
        "seconds": seconds,
        "steps_per_second": len(losses) / seconds,
        "loss_curve": [sum(part) / len(part) for part in chunks(losses, max(1, len(losses) // 100))],
    }


def mango_losses(args: Args, method: Method, seed: int) -> Row:
    """Train with MANGO: losses per step, held-out measures, bytes, and the config of every layer in every interval."""
    run = training_run(args, method, seed)
    losses: list[float] = []
    decisions: list[list[str]] = []
    held: list[int] = []
    while not run.done:
        decisions.append([config.name for config in run.optimizer.applied])
        interval = run.advance()
        if interval.error is not None:
            raise RuntimeError(interval.error)
        losses += interval.losses.tolist()
        held.append(interval.state_bytes_peak)
    limited = method.options.get("memory_budget", args.budget) is not None
    return {
        "losses": losses,
        **run.evaluate(),
        "budget_bytes": run.budget if limited else None,
        "state_bytes_peak": max(held),
        "adamw_bytes": run.optimizer.adamw_bytes,
        "layers": [layer.name for layer in run.layers],
        "decisions": decisions,
        "state_bytes": held,
    }


def torch_losses(args: Args, method: Method, seed: int) -> Row:
    """Train with a torch optimizer on the same workload, seed and batches."""
    steps = horizon(args, seed)
    with borrowed_rng(seed):                             # as TrainingRun does: what the model draws repeats with the seed
        workload = make_workload(args.workload, seed, **workload_options(args))
        optimizer = torch_optimizer(method, workload, args.learning_rate)
        losses = [float(loss) for loss in train(workload, optimizer, steps or workload.steps)]
        measures = {name: float(value) for name, value in workload.evaluate().items()}
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return {
        "losses": losses,
        **measures,
        "budget_bytes": None,
        "state_bytes_peak": sum(t.numel() * t.element_size() for t in tensors if t.dim()),
        "adamw_bytes": 8 * sum(p.numel() for p in workload.model.parameters()),
        "decisions": [],
    }


def torch_optimizer(method: Method, workload: Workload, learning_rate: float | None) -> torch.optim.Optimizer:
    params = list(workload.model.parameters())
    lr = float(getattr(workload, "lr", DEFAULT_LR)) if learning_rate is None else learning_rate
    if method.torch_rule == "sgd":
        return torch.optim.SGD(params, lr=lr if learning_rate is not None else SGD_LR_FACTOR * lr, momentum=0.9)
    rule = torch.optim.AdamW if method.torch_rule == "adamw" else torch.optim.Adam
    return rule(params, lr=lr, weight_decay=0)


def train(workload: Workload, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = workload.loss()
        loss.backward()                                  # type: ignore[no-untyped-call]
        optimizer.step()
        yield loss.detach()


def chunks(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def study(args: Args, report: Report = print) -> tuple[list[Row], list[Row]]:
    """Run every method on every seed: the rows of those that finished, and of those that failed with their error."""
    rows: list[Row] = []
    failures: list[Row] = []
    for method in chosen(args):
        for seed in range(args.seed, args.seed + args.seeds):
            try:
                rows.append({**run_method(args, method, seed), "what": method.what})
            except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
                reason = " ".join(str(error).split())
                failures.append({"policy": method.name, "workload": workload_name(args.workload), "seed": seed, "error": reason})
                report(f"{method.name}, seed {seed}: failed: {reason}")
                continue
            loss, state = rows[-1]["val_loss"], rows[-1]["state_bytes_peak"]
            report(f"{method.name}, seed {seed}: val_loss {loss:.4f}, {state:,} bytes of state")
    return rows, failures


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
            "val_accuracy": sum(r.get("val_accuracy", math.nan) for r in mine) / len(mine),
            "state_bytes_peak": max(r["state_bytes_peak"] for r in mine), "adamw_bytes": mine[0]["adamw_bytes"],
            "seconds": sum(r["seconds"] for r in mine) / len(mine),
        })  # fmt: skip
    return lines


def run_study(args: Args, folder: Path, report: Report = print) -> tuple[Path, list[Row], list[Row]]:
    """Run a study and write `study.json` and `study.csv` into `folder`: the JSON's path, the rows, the failures."""
    from train_policy.cli_support import write_json
    from train_policy.provenance import about
    from train_policy.report_data import write_csv

    rows, failures = study(args, report)
    path = folder / "study.json"
    facts = {"kind": "study", "about": about(), "args": {**asdict(args), "workload": workload_name(args.workload)}}
    write_json(path, {**facts, "failures": failures, "summary": summary(rows), "rows": rows})
    write_csv(folder / "study.csv", rows)
    return path, rows, failures
