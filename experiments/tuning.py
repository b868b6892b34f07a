"""The learning rate of least held-out loss on a small grid of factors of two. Nothing to run by itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TUNING_SEED = 1000                                       # of the runs that choose a rate: no result is of it


@dataclass(frozen=True)
class Tuned:
    """The best rate and everything that was tried; a run that failed has an infinite loss."""

    lr: float
    tried: tuple[tuple[float, float], ...]               # (rate, held-out loss), by rate

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest that was tried: a better one may lie beyond."""
        rates = [rate for rate, _ in self.tried]
        return len(rates) > 1 and self.lr in (min(rates), max(rates))

    def to_dict(self) -> dict[str, object]:
        finite = [{"lr": lr, "val_loss": loss if math.isfinite(loss) else None} for lr, loss in self.tried]
        return {"lr": self.lr, "at_edge": self.at_edge, "tried": finite}


def tune(own: float, multiples: Sequence[float], loss_of: Callable[[float], float], further: int = 3) -> Tuned:
    """Tries multiples of a rate, then up to `further` ones beyond an edge of them, by factors of two, while the best is there.

    `loss_of(lr)`: the held-out loss, infinite or nan where the run failed. A single multiple is taken as it is, untried.
    """
    if len(multiples) == 1:
        return Tuned(own * multiples[0], ())
    losses: dict[float, float] = {}

    def attempt(multiple: float) -> None:
        loss = loss_of(own * multiple)
        losses[multiple] = loss if math.isfinite(loss) else math.inf

    for multiple in sorted(multiples):
        attempt(multiple)
    best = min(losses, key=lambda one: losses[one])
    while best in (min(losses), max(losses)) and len(losses) < len(multiples) + further:
        attempt(best * 2 if best == max(losses) else best / 2)
        best = min(losses, key=lambda one: losses[one])
    return Tuned(own * best, tuple((own * one, losses[one]) for one in sorted(losses)))
