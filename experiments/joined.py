"""Several optimizers that are one: each has parameters of its own. Nothing to run by itself."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class Joined(Optimizer):
    """Optimizers side by side, as one that a scheduler, a gradient scaler and a checkpoint can take.

    The groups are the parts' own, one after another, and the state is one dictionary that all parts share.

    >>> from torch import nn, optim
    >>> model = nn.Linear(4, 2)
    >>> joined = Joined([optim.SGD([model.weight], lr=0.1), optim.Adam([model.bias], lr=0.01)])
    >>> [group["lr"] for group in joined.param_groups]
    [0.1, 0.01]
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = tuple(parts)
        if not self.parts:
            raise ValueError("give at least one optimizer")
        params = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        if len({id(p) for p in params}) < len(params):
            raise ValueError("a parameter is in two optimizers; give each its own")
        super().__init__(params, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        at = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[at : at + count], self.state
            at += count

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
