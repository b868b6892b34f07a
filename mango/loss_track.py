"""The training loss as the optimizer is told it: step by step, and as means over intervals of decisions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Number = float | Tensor                      # a tensor stays on its device until somebody asks, so telling costs no wait


@dataclass(slots=True)
class LossTrack:
    """Bounded: the last two losses, and the sum and last two means of an interval."""

    now: Number | None = None                # at the current parameters
    before: Number | None = None             # one step earlier
    total: Number = 0.0
    count: int = 0
    mean: float | None = None                # of the last interval
    previous_mean: float | None = None       # of the interval before it

    def observe(self, loss: Number) -> None:
        self.now = loss.detach() if isinstance(loss, Tensor) else float(loss)
        self.total = self.total + self.now
        self.count += 1

    def next_step(self) -> None:
        self.before, self.now = self.now, None

    @property
    def change(self) -> float:
        """Loss now minus loss a step earlier; 0 where one of them is unknown."""
        return 0.0 if self.now is None or self.before is None else float(self.now) - float(self.before)

    @property
    def slope(self) -> float:
        """Change of the interval's mean, relative to the one before; 0 where one of them is unknown."""
        if self.mean is None or not self.previous_mean:
            return 0.0
        return (self.mean - self.previous_mean) / abs(self.previous_mean)

    def close_interval(self) -> float:
        """The mean since the last call: nan where no loss was told."""
        mean = float(self.total) / self.count if self.count else math.nan
        self.previous_mean = self.mean
        if math.isfinite(mean):
            self.mean = mean
        self.total, self.count = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in self.__slots__}
        return {name: float(x) if isinstance(x, Tensor) else x for name, x in numbers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.__slots__:
            setattr(self, name, state[name])
