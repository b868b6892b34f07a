"""From what a policy wants to what the budget allows: one config per layer whose bytes fit together."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mango.budget import MemoryBudget
from mango.codecs import Shape
from mango.config import CompressionConfig, Ladder
from mango.layers import Layer
from mango.paging import Pager
from mango.policies import Choice, WaterFillingPolicy
from mango.policy_choice import proposals, rung_scores
from mango.state import StorageOptions, predicted_bytes


def released(ladder: Ladder) -> Ladder:
    """The ladder where gradients are held: each rung holds them at the bits of its first moment, 4 at least."""
    return Ladder(tuple(replace(r, gradient_bits=r.factor_bits_q if r.rank else max(4, r.momentum_bits)) for r in ladder))


class Allocator:
    """Knows the bytes of every config for every layer, and cuts choices to the budget."""

    def __init__(
        self, layers: Sequence[Layer], ladder: Ladder, options: StorageOptions, budget: MemoryBudget,
        shapes: Sequence[Shape | None] | None = None, pager: Pager | None = None,
    ) -> None:  # fmt: skip
        """`shapes`: of what is kept here of each layer, where that is not all of it; None: nothing."""
        self.layers, self.ladder, self.options, self.budget = layers, ladder, options, budget
        self.shapes = [layer.shape for layer in layers] if shapes is None else shapes
        self.pager = Pager(None, torch.device("cpu")) if pager is None else pager
        self.rung_bytes = torch.tensor(                                              # (L, R)
            [self.nbytes([rung] * len(layers)) for rung in ladder], dtype=torch.int64
        ).reshape(len(ladder), len(layers)).T.contiguous()
        self.require()

    def require(self) -> None:
        """Raise ValueError unless the layers at their cheapest fit."""
        least = self.pager.least_room(self.rung_bytes.min(1).values.tolist(), self.budget.paged)
        self.budget.require(least + self.budget.paged)

    def nbytes(self, configs: Sequence[CompressionConfig]) -> list[int]:
        """State bytes of each layer under its config."""
        return [
            0 if shape is None else predicted_bytes(shape, config, self.options, layer.rule)
            for layer, shape, config in zip(self.layers, self.shapes, configs, strict=True)
        ]

    def fits(self, configs: Sequence[CompressionConfig]) -> bool:
        nbytes = self.nbytes(configs)
        return sum(nbytes) <= self.budget.available and self._excess(nbytes) <= 0

    def _excess(self, nbytes: Sequence[int]) -> int:
        """Bytes too many for the memory or for the pages, where layers are in one of them as a whole."""
        return self.pager.excess(nbytes, self.budget.total - self.budget.fixed, self.budget.paged)

    def resolve(
        self, choice: Choice, in_force: Sequence[CompressionConfig], observe: Callable[[], Tensor]
    ) -> list[CompressionConfig]:
        """One config per layer within the budget. `observe` gives (L, 64) where it takes estimates of error to decide."""
        least = int(self.rung_bytes.min(1).values.sum())
        try:
            while True:
                configs = self._resolve(choice, in_force, observe)
                over = self._excess(self.nbytes(configs))
                if over <= 0 or choice is None:
                    return configs
                self.budget.unusable += min(over, max(1, self.budget.available - least))
        finally:
            self.budget.unusable = 0

    def _resolve(
        self, choice: Choice, in_force: Sequence[CompressionConfig], observe: Callable[[], Tensor]
    ) -> list[CompressionConfig]:
        if choice is None or not self.layers:
            return list(in_force)
        scores = rung_scores(choice, len(self.layers), len(self.ladder))
        if scores is not None:
            return [self.ladder[int(rung)] for rung in self.budget.allocate(scores, self.rung_bytes.numpy())]
        wanted = proposals(choice, len(self.layers))
        if self.fits(wanted):
            self.budget.price = 0.0
            return wanted
        return self._demote(wanted, observe())

    def _demote(self, wanted: list[CompressionConfig], observation: Tensor) -> list[CompressionConfig]:
        """Take back bytes where it costs least: each layer keeps what was wanted or gets a rung of fewer bytes."""
        asked = torch.tensor(self.nbytes(wanted))[:, None]                           # (L, 1)
        least = self.rung_bytes.min(1, keepdim=True).values
        smaller = (self.rung_bytes < asked) | (self.rung_bytes == least)             # (L, R) one rung at least
        scores = WaterFillingPolicy(ladder=self.ladder).scores(observation).double()
        scores = torch.cat([scores.masked_fill(~smaller, -torch.inf), torch.zeros(len(wanted), 1).double()], 1)
        picks = self.budget.allocate(scores.numpy(), torch.cat([self.rung_bytes, asked], 1).numpy())
        return [wanted[i] if pick == len(self.ladder) else self.ladder[int(pick)] for i, pick in enumerate(picks)]
