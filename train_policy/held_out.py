"""Held-out measures of a run: looks on the way, the best of them, and the first that reaches a goal."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mango_env.workloads import Workload

TRAINING_LOSS = "loss"                                   # the metric that needs no evaluation
LOWER_IS_BETTER = ("loss", "perplexity", "bits")         # parts of the names of such metrics
GOAL_EVERY = 100                                         # optimizer steps between looks, where a held-out goal asks for some
log = logging.getLogger("mango.study")


def falls(metric: str) -> bool:
    """Whether less of it is better."""
    return any(part in metric for part in LOWER_IS_BETTER)


def held_out(workload: Workload, evaluate: Callable[[], dict[str, float]], metric: str) -> dict[str, float]:
    """A workload's measures, and BLEU of a translator where that is asked for: it takes longer than all the others."""
    measures = {name: float(value) for name, value in evaluate().items()}
    if metric == "bleu":
        from mango_env.workloads.multi30k import Translation
        from train_policy.bleu import bleu

        if not isinstance(workload, Translation):
            raise ValueError("metric='bleu' is of translations: take the workload multi30k_translation")
        measures["bleu"] = bleu(workload)
    return measures


@dataclass(slots=True)
class Looks:
    """What was measured, and after how many steps; `every` None: at the end alone."""

    every: int | None
    found: list[dict[str, float]] = field(default_factory=list)

    def at(self, step: int, last: bool, measure: Callable[[], Mapping[str, float]]) -> dict[str, float] | None:
        """The measures after `step` steps where a look is due, or at the end; else None."""
        before = self.found[-1]["step"] if self.found else 0
        if not last and (self.every is None or step - before < self.every):
            return None
        measures = dict(measure())
        self.found.append({"step": step} | measures)
        log.debug("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in measures.items()))
        return measures

    def best(self) -> dict[str, float | None]:
        """The best of every measure and its step, over all looks; None where there was the last one alone."""
        result: dict[str, float | None] = {}
        for name in [name for name in self.found[-1] if name != "step"]:
            pick = min if falls(name) else max
            looks = [look for look in self.found if math.isfinite(look[name])] if len(self.found) > 1 else []
            best = pick(looks, key=lambda look: look[name]) if looks else {}
            result |= {f"best_{name}": best.get(name), f"best_{name}_step": best.get("step")}
        return result


@dataclass(slots=True)
class Goal:
    """When a run first reaches a target, in optimizer steps and in seconds of training."""

    target: float | None
    metric: str
    steps: int | None = None
    seconds: float | None = None
    looked: int = 0                                      # training losses that were looked at

    def look(self, losses: Sequence[float], seconds: float, measures: Mapping[str, float] | None) -> None:
        """After `len(losses)` steps: has it been reached? `measures`: held out, where they were taken."""
        if self.target is None or self.steps is not None:
            return
        found = None
        if self.metric == TRAINING_LOSS:
            found = next((i + 1 for i in range(self.looked, len(losses)) if losses[i] <= self.target), None)
            self.looked = len(losses)
        elif measures is not None:
            if self.metric not in measures:
                raise ValueError(f"unknown metric {self.metric!r}; this workload has {TRAINING_LOSS}, {', '.join(measures)}")
            value = measures[self.metric]
            found = len(losses) if (value <= self.target if falls(self.metric) else value >= self.target) else None
        if found is not None:
            self.steps, self.seconds = found, seconds
