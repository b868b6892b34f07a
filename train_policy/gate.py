"""The gate between two stages: a policy replaces another only if paired runs say, with an interval, that it is better.

Fine-tuning a cloned policy loses quality as often as it gains some, so no stage is trusted because it is later.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

MIN_PAIRS = 5                                            # below, all-positive differences are likelier than 1 in 20 by chance

P = TypeVar("P")
Returns = Mapping[Any, float] | Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What the gate decided and the numbers it decided on; returns are of paired runs (same workload, seed and budget)."""

    accepted: bool
    difference: float                                    # mean of candidate minus incumbent
    low: float                                           # lower end of the interval of that mean
    high: float
    level: float                                         # of the two-sided interval
    pairs: int
    candidate: float                                     # mean return
    incumbent: float                                     # mean return
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], level: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,), N >= 2.

    Deviations are widened by sqrt(N / (N - 1)), without which the interval of a small sample is too narrow
    (Hesterberg 2015, "What teachers should know about the bootstrap", sec. 4.1.4).

    >>> low, high = bootstrap_interval([1.0, 1.2, 0.9, 1.1, 1.0])
    >>> 0.9 < low < 1.04 < high < 1.2
    True
    """
    sample = np.asarray(values, dtype=np.float64)
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not a fraction in (0, 1), such as 0.95")
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"an interval needs at least 2 finite values in one row; got {sample.tolist()}")
    picks = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    means = sample.mean() + np.sqrt(len(sample) / (len(sample) - 1)) * (sample[picks].mean(axis=1) - sample.mean())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def decide(
    candidate: Returns,
    incumbent: Returns,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    min_pairs: int = MIN_PAIRS,
) -> GateDecision:
    """Accept the candidate only if the interval of its paired advantage lies above zero.

    Returns are given per run: two sequences in the same order, or two mappings with the same keys, for example
    (workload, seed, budget). A candidate with a non-finite return is refused; such an incumbent is an error.
    """
    ours, theirs = _paired(candidate, incumbent)
    if len(ours) < min_pairs:
        raise ValueError(f"the gate compares at least {min_pairs} paired runs; got {len(ours)}: add seeds, budgets or workloads")
    if not np.isfinite(theirs).all():
        raise ValueError("the incumbent has a non-finite return: it cannot be the reference; evaluate it again")
    if not np.isfinite(ours).all():
        bad = int((~np.isfinite(ours)).sum())
        nan = float("nan")
        reason = f"refused: {bad} of {len(ours)} returns of the candidate are not finite"
        return GateDecision(False, nan, nan, nan, level, len(ours), nan, float(theirs.mean()), reason)
    gain = ours - theirs
    low, high = bootstrap_interval(gain, level, resamples=resamples, seed=seed)
    accepted = low > 0
    verdict = "accepted" if accepted else "refused"
    interval = f"{level:.0%} interval [{low:+.4g}, {high:+.4g}]"
    reason = f"{verdict}: mean advantage {gain.mean():+.4g}, {interval} over {len(gain)} pairs"
    return GateDecision(
        accepted, float(gain.mean()), low, high, level, len(gain), float(ours.mean()), float(theirs.mean()), reason
    )


def gate(
    candidate: P,
    incumbent: P,
    returns: Callable[[P], Mapping[Any, float]],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[P, GateDecision]:
    """Measure both with `returns` (policy -> return per run, same runs for both) and keep the better-proven one."""
    decision = decide(returns(candidate), returns(incumbent), level=level, resamples=resamples, seed=seed)
    return (candidate if decision.accepted else incumbent), decision


def _paired(candidate: Returns, incumbent: Returns) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as aligned rows (N,)."""
    if isinstance(candidate, Mapping) and isinstance(incumbent, Mapping):
        if set(candidate) != set(incumbent):
            odd = sorted(map(str, set(candidate) ^ set(incumbent)))[:4]
            raise ValueError(f"returns are not paired: {odd} were run for one policy only")
        keys = list(candidate)
        return np.array([candidate[k] for k in keys], float), np.array([incumbent[k] for k in keys], float)
    if isinstance(candidate, Mapping) or isinstance(incumbent, Mapping):
        raise TypeError("give both policies' returns in the same form: two sequences or two mappings")
    if len(candidate) != len(incumbent):
        raise ValueError(f"returns are not paired: {len(candidate)} runs of the candidate, {len(incumbent)} of the incumbent")
    return np.asarray(candidate, float), np.asarray(incumbent, float)
