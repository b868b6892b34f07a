"""How good is a policy? Paired training runs under a byte budget, beside torch.optim.AdamW and full precision on the same seeds.

Policies run as they are deployed: inside the optimizer, which asks them every `interval` steps and cuts what they
answer to the budget. Nothing is skipped silently: a fixed config that does not fit a budget leaves a row that says so.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mango.config import FULL, LADDER, CompressionConfig
from mango.optimizer import Decision
from mango.policies import POLICIES, FixedPolicy, RandomPolicy
from mango.policy_file import load_policy, shipped_policies
from mango_env.recorder import name_of
from mango_env.reward import Reward
from mango_env.run import DEFAULT_INTERVAL, TrainingRun
from mango_env.schedules import rate_factor
from mango_env.twin import Twin, score, twin_of
from mango_env.workloads import workload_name
from mango_env.workloads.base import WorkloadBuilder
from train_policy.evaluation_rows import (
    AgainstFixed,
    Budget,
    EvaluationRow,
    SummaryRow,
    against_best_fixed,
    best_fixed,
    returns_by_run,
    summary,
)
from train_policy.fitting import progress_line
from train_policy.seeding import borrowed_rng
from train_policy.workers import worker_pool

__all__ = [
    "HEURISTICS",
    "AgainstFixed",
    "Budget",
    "EvaluationArgs",
    "EvaluationRow",
    "SummaryRow",
    "against_best_fixed",
    "best_fixed",
    "evaluate",
    "listed",
    "policy_of",
    "returns_by_run",
    "spec_name",
    "start_run",
    "summary",
]
HEURISTICS = ("random", "water-filling", "sensitivity", "error-constrained", "adaptive", "scheduled")
SHADOW_STEPS = 3                                         # AdamW steps timed per interval, on copies of the parameters


@dataclass(frozen=True, slots=True)
class EvaluationArgs:
    """What all runs of an evaluation share, or of a collection (`CollectArgs`)."""

    horizon: int | None = None                           # optimizer steps; None: the workload's own
    interval: int = DEFAULT_INTERVAL                     # optimizer steps per decision
    lr: float | None = None                              # None: the workload's own
    rule: str = "adamw"                                  # base rule of the policies' runs and of full precision
    schedule: str = "constant"                           # of the learning rate
    max_grad_norm: float | None = None                   # gradients are scaled to that norm at most; None: as they are
    matrix_lr_scale: float = 1.0                         # Muon's rate over `lr`, for the matrices that it moves
    reward: Reward = dataclasses.field(default_factory=Reward)


@dataclass(frozen=True, slots=True)
class _Task:
    """All runs of one workload and seed: they share AdamW's run."""

    policies: tuple[Any, ...]
    workload: str | WorkloadBuilder
    seed: int
    budgets: tuple[Budget, ...]
    args: EvaluationArgs


def policy_of(spec: Any, seed: int = 0) -> Any:
    """A fresh policy object from a spec.

    `fixed:RUNG` (name or index on the ladder, or the name of another config, as r4p8q8v0), a heuristic's name, a shipped
    policy's name, the path of a frozen policy, or an object, which is passed on.
    """
    if isinstance(spec, Path):
        return load_policy(spec)
    if not isinstance(spec, str):
        return spec
    if spec.startswith("fixed:"):
        return FixedPolicy(fixed_config(spec))
    if spec == "random":
        return RandomPolicy(seed=seed)
    if spec in HEURISTICS:
        return POLICIES[spec]()
    if spec in shipped_policies() or spec.startswith("hf://") or Path(spec).is_file():
        return load_policy(spec)
    shipped = ", ".join(shipped_policies()) or "none yet"
    raise ValueError(
        f"unknown policy {spec!r}; give adamw, {', '.join(HEURISTICS)}, fixed:RUNG with one of {', '.join(LADDER.names)}, "
        f"a shipped policy ({shipped}) or the path of a frozen one"
    )


def fixed_config(spec: str) -> CompressionConfig:
    """The config of `fixed:RUNG`: a rung of the ladder by name or index, or the name of any other config."""
    rung = spec.removeprefix("fixed:")
    try:
        return CompressionConfig.from_name(rung)
    except ValueError:
        return LADDER[LADDER.index(rung)]


def spec_name(spec: Any) -> str:
    """How tables call a policy spec: rungs by name, files by their stem."""
    if isinstance(spec, str) and spec.startswith("fixed:"):
        return f"fixed:{fixed_config(spec).name}"
    if isinstance(spec, str | Path):
        return Path(spec).stem if str(spec).endswith(".safetensors") else str(spec)
    return name_of(spec)


def evaluate(
    policies: Any | Sequence[Any],
    workloads: str | WorkloadBuilder | Sequence[str | WorkloadBuilder],
    budgets: Budget | Sequence[Budget],
    seeds: int | Sequence[int] = 3,
    args: EvaluationArgs | None = None,
    *,
    workers: int = 1,
    progress: bool = False,
) -> list[EvaluationRow]:
    """Train every workload with every policy under every budget and seed; one row per run, in that order.

    `policies`: specs, see `policy_of`, or "adamw" (one row per seed, its budget its own bytes). `seeds`: a list, or how
    many. `workers` > 1 spreads (workload, seed) pairs over processes, which need specs that can be pickled.

    Raises ValueError before anything is trained for unknown names and impossible budgets.
    """
    args = args or EvaluationArgs()
    specs, works = listed(policies), listed(workloads)
    sizes, draws = listed(budgets), list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not specs or not works or not sizes or not draws:
        raise ValueError("evaluate needs at least one policy, workload, budget and seed")
    _check(specs, works, sizes, args)
    tasks = [_Task(tuple(specs), work, seed, tuple(sizes), args) for work in works for seed in draws]
    rows: list[EvaluationRow] = []
    with progress_line("evaluating", len(tasks), progress) as advance:
        for done in _results(tasks, workers):
            rows += done
            advance(1, status=f"{done[0].workload} seed {done[0].seed}")
    names = [spec_name(spec) for spec in specs]
    labels = [workload_name(work) for work in works]
    rows.sort(key=lambda row: (names.index(row.policy), labels.index(row.workload), row.budget_bytes, draws.index(row.seed)))
    return rows


def listed(value: Any) -> list[Any]:
    """`value` as a list: one of its own if it is no list or tuple."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _check(specs: Sequence[Any], works: Sequence[Any], sizes: Sequence[Budget], args: EvaluationArgs) -> None:
    """Build everything once: a wrong name or an impossible budget must not surface after an hour of training."""
    names = [spec_name(spec) for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"policies {twice} are given twice; rename the objects or files")
    for spec in specs:
        if spec != "adamw":
            policy_of(spec)
    for work in works:
        for budget in sizes:
            start_run(work, 0, budget, "hold", args)


def start_run(work: str | WorkloadBuilder, seed: int, budget: Budget, policy: Any, args: EvaluationArgs) -> TrainingRun:
    """One training run under the settings that all share, before its first step."""
    return TrainingRun(
        work, seed, horizon=args.horizon, interval=args.interval, memory_budget=budget, lr=args.lr, rule=args.rule,
        schedule=args.schedule, max_grad_norm=args.max_grad_norm, policy=policy,
        optimizer_options={"matrix_lr_scale": args.matrix_lr_scale} if args.matrix_lr_scale != 1 else None,
    )  # fmt: skip


def _results(tasks: Sequence[_Task], workers: int) -> Iterable[list[EvaluationRow]]:
    if workers <= 1:
        yield from map(_evaluate_seed, tasks)
        return
    with worker_pool(min(workers, len(tasks))) as pool:
        yield from pool.map(_evaluate_seed, tasks)


def _evaluate_seed(task: _Task) -> list[EvaluationRow]:
    baseline = _adamw(task.workload, task.seed, task.args)
    rows = [baseline] if "adamw" in task.policies else []
    for spec in task.policies:
        if spec != "adamw":
            rows += [_evaluate_one(task, spec, budget, baseline) for budget in task.budgets]
    return rows


@lru_cache(maxsize=16)
def _adamw(work: str | WorkloadBuilder, seed: int, args: EvaluationArgs) -> EvaluationRow:
    """The reference: torch.optim.AdamW on the run's own model, data and random numbers."""
    run = start_run(work, seed, 4.0, FULL, args)                   # the budget never binds: MANGO only lends the workload
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=run.lr, weight_decay=0.0)
    losses: list[float] = []
    with borrowed_rng(seed):
        torch.set_rng_state(run.snapshot().random[0])              # as MANGO's runs start: dropout and the like are paired
        for step in range(run.horizon):
            optimizer.param_groups[0]["lr"] = run.lr * rate_factor(run.schedule, step, run.horizon)
            optimizer.zero_grad()
            loss = run.workload.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            if args.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
    val_loss = run.evaluate()["val_loss"]
    nbytes = run.optimizer.adamw_bytes
    last = statistics.fmean(losses[-args.interval :])
    finite = math.isfinite(val_loss) and math.isfinite(last)
    return EvaluationRow(
        policy="adamw",
        workload=run.workload_name,
        seed=seed,
        budget_bytes=nbytes,
        state_bytes_peak=nbytes,
        val_loss=_finite(val_loss),
        val_loss_adamw=_finite(val_loss),
        step_time_ratio=1.0,
        decisions=[],
        budget=1.0,
        status="ok" if finite else "diverged",
        fits=True,
        within_budget=True,
        final_train_loss=_finite(last),
        returns=None,
        horizon=run.horizon,
        message="" if finite else "AdamW's loss is not finite",
        val_loss_full=_finite(val_loss) if args.rule == "adamw" else None,
    )


def _evaluate_one(task: _Task, spec: Any, budget: Budget, baseline: EvaluationRow) -> EvaluationRow:
    policy = policy_of(spec, task.seed)
    try:
        run = start_run(task.workload, task.seed, budget, policy, task.args)
    except ValueError as error:
        if not isinstance(policy, FixedPolicy):
            raise
        held = start_run(task.workload, task.seed, budget, "hold", task.args)              # raises where nothing would fit
        return _no_row(spec, budget, held, baseline, str(error))
    decisions = [[config.name for config in run.optimizer.applied]]
    handle = run.optimizer.register_decision_hook(_log(decisions, run.horizon))
    twin = twin_of(run)
    stopwatch, ratios, peak, returns = _Stopwatch(run.optimizer), [], run.optimizer.state_bytes(), 0.0
    shadow = _Shadow(run.model)
    while not run.done:
        interval = run.advance()
        peak = max(peak, interval.state_bytes_peak)
        returns += score(task.args.reward, interval, twin).reward
        if not interval.diverged:
            ratios.append(stopwatch.mean() / shadow.mean_seconds())
    handle.remove()
    measures, problem = run.evaluate_or_error()
    val_loss = _finite(measures.get("val_loss", math.nan))
    failed = run.diverged or val_loss is None
    return EvaluationRow(
        policy=spec_name(spec),
        workload=run.workload_name,
        seed=task.seed,
        budget_bytes=run.budget,
        state_bytes_peak=peak,
        val_loss=None if run.diverged else val_loss,
        val_loss_adamw=baseline.val_loss,
        step_time_ratio=statistics.median(ratios) if ratios else None,
        decisions=decisions,
        budget=budget,
        status="diverged" if failed else "ok",
        fits=True,
        within_budget=peak <= run.budget,
        final_train_loss=_finite(interval.loss),
        returns=returns,
        horizon=run.horizon,
        message=(interval.error or problem or "the training loss diverged") if failed else "",
        val_loss_full=_full_loss(twin),
    )


def _full_loss(twin: Twin) -> float | None:
    """Held-out loss of the same rule at full precision; None where that run did not reach its end."""
    return None if twin.error is not None else _finite(twin.evaluation.get("val_loss", math.nan))


def _no_row(spec: Any, budget: Budget, run: TrainingRun, baseline: EvaluationRow, why: str) -> EvaluationRow:
    return dataclasses.replace(
        baseline,
        policy=spec_name(spec),
        budget=budget,
        budget_bytes=run.budget,
        state_bytes_peak=None,
        val_loss=None,
        step_time_ratio=None,
        final_train_loss=None,
        status="does not fit",
        fits=False,
        message=why,
        val_loss_full=_full_loss(twin_of(run)),
    )


def _log(decisions: list[list[str]], horizon: int) -> Any:
    def hook(decision: Decision) -> None:
        if decision.step < horizon:                      # what is decided after the last step governs nothing
            decisions.append([config.name for config in decision.applied])

    return hook


class _Stopwatch:
    """Wall clock inside an optimizer's `step`, decisions included."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._began = 0.0
        self._seconds: list[float] = []
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self._seconds.append(time.perf_counter() - self._began)

    def mean(self) -> float:
        """Mean seconds per step since the last call."""
        seconds, self._seconds = self._seconds, []
        return statistics.fmean(seconds)


class _Shadow:
    """torch.optim.AdamW on copies of a model's parameters: what its step costs here and now."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._params = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
        for param in self._params:
            param.grad = torch.full_like(param, 1e-3)
        self._optimizer = torch.optim.AdamW(self._params)
        self._optimizer.step()                           # the first one allocates

    def mean_seconds(self) -> float:
        began = time.perf_counter()
        for _ in range(SHADOW_STEPS):
            self._optimizer.step()
        return (time.perf_counter() - began) / SHADOW_STEPS


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
