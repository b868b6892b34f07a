"""How good is a policy? Paired training runs under a byte budget, beside torch.optim.AdamW on the same seeds.

Policies run as they are deployed: inside the optimizer, which asks them every `interval` steps and cuts what they
answer to the budget. Nothing is skipped silently: a fixed config that does not fit a budget leaves a row that says so.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mango.config import FULL, LADDER
from mango.optimizer import Decision
from mango.policies import POLICIES, FixedPolicy, RandomPolicy
from mango.policy_file import load_policy, shipped_policies
from mango_env.recorder import name_of
from mango_env.reward import Reward
from mango_env.run import DEFAULT_INTERVAL, TrainingRun
from mango_env.schedules import rate_factor
from mango_env.twin import score, twin_of
from mango_env.workloads import workload_name
from mango_env.workloads.base import WorkloadBuilder
from train_policy.fitting import progress_line
from train_policy.gate import bootstrap_interval
from train_policy.seeding import borrowed_rng

Budget = float | int | str
HEURISTICS = ("random", "water-filling", "adaptive", "scheduled")
SHADOW_STEPS = 3                                         # AdamW steps timed per interval, on copies of the parameters
STATUSES = ("ok", "diverged", "does not fit")


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One training run. Losses are None where there is none; bytes are measured."""

    policy: str
    workload: str
    seed: int
    budget_bytes: int
    state_bytes_peak: int | None
    val_loss: float | None
    val_loss_adamw: float | None                         # torch.optim.AdamW, same workload, seed, steps and learning rate
    step_time_ratio: float | None                        # optimizer step with its decisions over AdamW's, in the same run
    decisions: list[list[str]]                           # config names in force: one list over layers per decision
    budget: Budget                                       # as it was asked for
    status: str                                          # one of STATUSES
    fits: bool                                           # False: this fixed config needs more than the budget
    within_budget: bool                                  # measured at every step
    final_train_loss: float | None                       # mean over the last interval
    returns: float | None                                # undiscounted, mean over layers
    horizon: int
    message: str                                         # why, where status is not "ok"

    @property
    def diverged(self) -> bool:
        return self.status == "diverged"

    @property
    def gap(self) -> float | None:
        """Validation loss above AdamW's, in per cent of it."""
        if self.val_loss is None or self.val_loss_adamw is None:
            return None
        return 100 * (self.val_loss - self.val_loss_adamw) / max(abs(self.val_loss_adamw), 1e-12)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "diverged": self.diverged}


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One policy on one workload under one budget, over seeds. Gaps are in per cent of AdamW's validation loss."""

    policy: str
    workload: str
    budget: Budget
    budget_bytes: int
    seeds: int                                           # runs with a validation loss
    failed: int                                          # runs without one: diverged or did not fit
    val_loss: float | None
    gap: float | None
    gap_low: float | None                                # bootstrap interval of the mean gap; None below 2 seeds
    gap_high: float | None
    state_bytes_peak: int | None
    within_budget: bool
    step_time_ratio: float | None
    returns: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class EvaluationArgs:
    """What all runs of an evaluation share."""

    horizon: int | None = None                           # optimizer steps; None: the workload's own
    interval: int = DEFAULT_INTERVAL                     # optimizer steps per decision
    lr: float | None = None                              # None: the workload's own
    rule: str = "adamw"                                  # base rule of the policies' runs; the reference is AdamW's
    schedule: str = "constant"                           # of the learning rate
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

    `fixed:RUNG` (name or index on the ladder), a heuristic's name, a shipped policy's name, the path of a frozen policy,
    or an object, which is passed on.
    """
    if isinstance(spec, Path):
        return load_policy(spec)
    if not isinstance(spec, str):
        return spec
    if spec.startswith("fixed:"):
        return FixedPolicy(LADDER[LADDER.index(spec.removeprefix("fixed:"))])
    if spec == "random":
        return RandomPolicy(seed=seed)
    if spec in HEURISTICS:
        return POLICIES[spec]()
    if spec in shipped_policies() or Path(spec).is_file():
        return load_policy(spec)
    shipped = ", ".join(shipped_policies()) or "none yet"
    raise ValueError(
        f"unknown policy {spec!r}; give adamw, {', '.join(HEURISTICS)}, fixed:RUNG with one of {', '.join(LADDER.names)}, "
        f"a shipped policy ({shipped}) or the path of a frozen one"
    )


def spec_name(spec: Any) -> str:
    """How tables call a policy spec: rungs by name, files by their stem."""
    if isinstance(spec, str) and spec.startswith("fixed:"):
        return f"fixed:{LADDER.names[LADDER.index(spec.removeprefix('fixed:'))]}"
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


def best_fixed(rows: Iterable[EvaluationRow], workload: str, budget: Budget) -> str | None:
    """The fixed rung with the lowest mean validation loss among those that fitted the budget on every seed; None without one."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        if row.policy.startswith("fixed:") and row.workload == workload and row.budget == budget:
            found.setdefault(row.policy, []).append(row.val_loss)
    means = {name: statistics.fmean(losses) for name, losses in found.items() if all(loss is not None for loss in losses)}  # type: ignore[arg-type]
    return min(means, key=lambda name: means[name]) if means else None


def returns_by_run(rows: Iterable[EvaluationRow]) -> dict[tuple[str, int, int], float]:
    """Returns per (workload, seed, budget in bytes) of one policy's rows, as the gate pairs them; nan where there is none."""
    found: dict[tuple[str, int, int], float] = {}
    for row in rows:
        key = (row.workload, row.seed, row.budget_bytes)
        if key in found:
            raise ValueError(f"two rows for {key}: give the rows of one policy, one budget once")
        found[key] = math.nan if row.returns is None else row.returns
    return found


def summary(rows: Iterable[EvaluationRow], level: float = 0.95) -> list[SummaryRow]:
    """One row per policy, workload and budget: mean and bootstrap interval over seeds of the gap to AdamW."""
    groups: dict[tuple[str, str, str], list[EvaluationRow]] = {}
    for row in rows:
        groups.setdefault((row.policy, row.workload, str(row.budget)), []).append(row)
    return [_summarise(group, level) for group in groups.values()]


def _summarise(group: Sequence[EvaluationRow], level: float) -> SummaryRow:
    gaps = [row.gap for row in group if row.gap is not None]
    low, high = bootstrap_interval(gaps, level) if len(gaps) >= 2 else (None, None)
    peaks = [row.state_bytes_peak for row in group if row.state_bytes_peak is not None]
    first = group[0]
    return SummaryRow(
        policy=first.policy,
        workload=first.workload,
        budget=first.budget,
        budget_bytes=first.budget_bytes,
        seeds=len(gaps),
        failed=len(group) - len(gaps),
        val_loss=_mean(row.val_loss for row in group),
        gap=_mean(gaps),
        gap_low=low,
        gap_high=high,
        state_bytes_peak=max(peaks, default=None),
        within_budget=all(row.within_budget for row in group),
        step_time_ratio=_mean(row.step_time_ratio for row in group),
        returns=_mean(row.returns for row in group),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


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
            _run(work, 0, budget, "hold", args)


def _run(work: str | WorkloadBuilder, seed: int, budget: Budget, policy: Any, args: EvaluationArgs) -> TrainingRun:
    return TrainingRun(
        work, seed, horizon=args.horizon, interval=args.interval, memory_budget=budget, lr=args.lr, rule=args.rule,
        schedule=args.schedule, policy=policy,
    )  # fmt: skip


def _results(tasks: Sequence[_Task], workers: int) -> Iterable[list[EvaluationRow]]:
    if workers <= 1:
        yield from map(_evaluate_seed, tasks)
        return
    context, count = get_context("spawn"), min(workers, len(tasks))
    with ProcessPoolExecutor(count, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_evaluate_seed, tasks)


def _evaluate_seed(task: _Task) -> list[EvaluationRow]:
    baseline = _adamw(task)
    rows = [baseline] if "adamw" in task.policies else []
    for spec in task.policies:
        if spec != "adamw":
            rows += [_evaluate_one(task, spec, budget, baseline) for budget in task.budgets]
    return rows


def _adamw(task: _Task) -> EvaluationRow:
    """The reference: torch.optim.AdamW on the run's own model, data and random numbers."""
    run = _run(task.workload, task.seed, 4.0, FULL, task.args)     # the budget never binds: MANGO only lends the workload
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=run.lr, weight_decay=0.0)
    losses: list[float] = []
    with borrowed_rng(task.seed):
        torch.set_rng_state(run.snapshot().random[0])              # as MANGO's runs start: dropout and the like are paired
        for step in range(run.horizon):
            optimizer.param_groups[0]["lr"] = run.lr * rate_factor(run.schedule, step, run.horizon)
            optimizer.zero_grad()
            loss = run.workload.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
    val_loss = run.evaluate()["val_loss"]
    nbytes = run.optimizer.adamw_bytes
    last = statistics.fmean(losses[-task.args.interval :])
    finite = math.isfinite(val_loss) and math.isfinite(last)
    return EvaluationRow(
        policy="adamw",
        workload=run.workload_name,
        seed=task.seed,
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
    )


def _evaluate_one(task: _Task, spec: Any, budget: Budget, baseline: EvaluationRow) -> EvaluationRow:
    policy = policy_of(spec, task.seed)
    try:
        run = _run(task.workload, task.seed, budget, policy, task.args)
    except ValueError as error:
        if not isinstance(policy, FixedPolicy):
            raise
        budget_bytes = _run(task.workload, task.seed, budget, "hold", task.args).budget    # raises where nothing would fit
        return _no_row(spec, task, budget, budget_bytes, baseline, str(error))
    decisions = [[config.name for config in run.optimizer.applied]]
    handle = run.optimizer.register_decision_hook(_log(decisions, run.horizon))
    twin = twin_of(run) if task.args.reward.loss == "twin" else None
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
    )


def _no_row(spec: Any, task: _Task, budget: Budget, budget_bytes: int, baseline: EvaluationRow, why: str) -> EvaluationRow:
    return dataclasses.replace(
        baseline,
        policy=spec_name(spec),
        budget=budget,
        budget_bytes=budget_bytes,
        state_bytes_peak=None,
        val_loss=None,
        step_time_ratio=None,
        final_train_loss=None,
        status="does not fit",
        fits=False,
        message=why,
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
