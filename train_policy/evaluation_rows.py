"""The rows of an evaluation, one per training run, and what is computed from them: means, intervals, comparisons."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from train_policy.gate import bootstrap_interval

Budget = float | int | str
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
    val_loss_full: float | None = None                   # the same rule at full precision: same workload, seed, steps, rate

    @property
    def diverged(self) -> bool:
        return self.status == "diverged"

    @property
    def gap(self) -> float | None:
        """Validation loss above AdamW's, in per cent of it."""
        return percent_above(self.val_loss, self.val_loss_adamw)

    @property
    def gap_full(self) -> float | None:
        """Validation loss above that of the same rule at full precision, in per cent of it."""
        return percent_above(self.val_loss, self.val_loss_full)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**dataclasses.asdict(self), "diverged": self.diverged}


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One policy on one workload under one budget, over seeds.

    Gaps are in per cent of AdamW's validation loss, or (`gap_full`) of that of the same rule at full precision.
    """

    policy: str
    workload: str
    budget: Budget
    budget_bytes: int
    seeds: int                                           # runs with a validation loss
    failed: int                                          # runs without one, but for those below: they diverged
    unfit: int                                           # runs of a fixed config that does not fit the budget
    val_loss: float | None
    gap: float | None
    gap_low: float | None                                # bootstrap interval of the mean gap; None below 2 seeds
    gap_high: float | None
    state_bytes_peak: int | None
    within_budget: bool
    step_time_ratio: float | None
    returns: float | None
    gap_full: float | None
    gap_full_low: float | None                           # as of `gap`
    gap_full_high: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class AgainstFixed:
    """A policy beside the best fixed rung on one workload under one budget, in per cent of full precision's loss."""

    policy: str
    workload: str
    budget: Budget
    rung: str | None                                     # see `best_fixed`
    seeds: list[int]                                     # on which both have a gap to full precision
    differences: list[float]                             # (seeds,) gap_full of the policy minus the rung's; below 0: better
    failed: int                                          # further seeds of the policy: no loss, or nothing to pair it with
    mean: float | None
    low: float | None                                    # bootstrap interval of the mean; None below 2 seeds
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def best_fixed(rows: Iterable[EvaluationRow], workload: str, budget: Budget) -> str | None:
    """The fixed rung with the lowest mean validation loss among those that fitted the budget on every seed; None without one."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        if row.policy.startswith("fixed:") and row.workload == workload and row.budget == budget:
            found.setdefault(row.policy, []).append(row.val_loss)
    means = {name: statistics.fmean(losses) for name, losses in found.items() if all(loss is not None for loss in losses)}  # type: ignore[arg-type]
    return min(means, key=lambda name: means[name]) if means else None


def against_best_fixed(rows: Iterable[EvaluationRow], policy: str, level: float = 0.95) -> list[AgainstFixed]:
    """A policy beside the best fixed rung of equal budget, seed by seed, per workload and budget.

    The rung is chosen by the same runs that it is then compared on, which favours it.
    """
    rows = list(rows)
    cases = dict.fromkeys((row.workload, row.budget) for row in rows if row.policy == policy)
    return [_against(rows, policy, work, budget, level) for work, budget in cases]


def _against(rows: Sequence[EvaluationRow], policy: str, workload: str, budget: Budget, level: float) -> AgainstFixed:
    rung = best_fixed(rows, workload, budget)
    here = [row for row in rows if row.workload == workload and row.budget == budget]
    mine, theirs = ({row.seed: row.gap_full for row in here if row.policy == name} for name in (policy, rung))
    paired = {seed: (gap, theirs.get(seed)) for seed, gap in mine.items()}
    known = {seed: ours - other for seed, (ours, other) in paired.items() if ours is not None and other is not None}
    differences = list(known.values())
    return AgainstFixed(
        policy, workload, budget, rung, list(known), differences, len(mine) - len(known), _mean(differences),
        *_interval(differences, level),
    )  # fmt: skip


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
    """One row per policy, workload and budget: mean and bootstrap interval over seeds of its gaps."""
    groups: dict[tuple[str, str, str], list[EvaluationRow]] = {}
    for row in rows:
        groups.setdefault((row.policy, row.workload, str(row.budget)), []).append(row)
    return [_summarise(group, level) for group in groups.values()]


def _summarise(group: Sequence[EvaluationRow], level: float) -> SummaryRow:
    gaps = [row.gap for row in group if row.gap is not None]
    low, high = _interval(gaps, level)
    full = [row.gap_full for row in group if row.gap_full is not None]
    full_low, full_high = _interval(full, level)
    peaks = [row.state_bytes_peak for row in group if row.state_bytes_peak is not None]
    first = group[0]
    return SummaryRow(
        policy=first.policy,
        workload=first.workload,
        budget=first.budget,
        budget_bytes=first.budget_bytes,
        seeds=len(gaps),
        failed=sum(row.gap is None and row.fits for row in group),
        unfit=sum(not row.fits for row in group),
        val_loss=_mean(row.val_loss for row in group),
        gap=_mean(gaps),
        gap_low=low,
        gap_high=high,
        state_bytes_peak=max(peaks, default=None),
        within_budget=all(row.within_budget for row in group),
        step_time_ratio=_mean(row.step_time_ratio for row in group),
        returns=_mean(row.returns for row in group),
        gap_full=_mean(full),
        gap_full_low=full_low,
        gap_full_high=full_high,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _interval(values: Sequence[float], level: float) -> tuple[float, float] | tuple[None, None]:
    return bootstrap_interval(values, level) if len(values) >= 2 else (None, None)


def percent_above(loss: float | None, reference: float | None) -> float | None:
    """How far a loss is above a reference, in per cent of it; None where either is unknown."""
    return None if loss is None or reference is None else 100 * (loss - reference) / max(abs(reference), 1e-12)
