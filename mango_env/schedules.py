"""Learning-rate schedules of a training run: by which factor the rate is multiplied, step by step."""

import math
from collections.abc import Callable

WARMUP = 0.05                                                # of the horizon, in which the rate rises linearly

# From the progress after the warm-up, in [0, 1], to a factor.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.55 + 0.45 * math.cos(math.pi * progress),
}


def check_schedule(name: str) -> str:
    """The name, if there is such a schedule; ValueError otherwise."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    return name


def rate_factor(name: str, step: int, horizon: int) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (from 0) of `horizon`.

    "constant" is 1 throughout. "linear" falls to 0 and "cosine" to a tenth (Loshchilov & Hutter 2017), both after a
    linear warm-up over the first `WARMUP` of the run.

    >>> [round(rate_factor("cosine", step, 100), 2) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.56, 0.1]
    """
    if name == "constant":
        return 1.0
    warm = max(1, math.ceil(WARMUP * horizon))
    if step < warm:
        return (step + 1) / warm
    return SCHEDULES[name]((step - warm) / max(1, horizon - warm))
