"""The bytes of an optimizer: how many its state may take, how many it takes, and where they are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mango.accounting import PeakMemory, Usage, memory_report, prevailing
from mango.allocation import Allocator
from mango.budget import UNLIMITED, MemoryBudget, parse_budget
from mango.config import CompressionConfig
from mango.layers import Layer
from mango.paging import Pager
from mango.policies import Choice, FixedPolicy
from mango.ranks import Ranks
from mango.release import Releasing
from mango.state import Target, TensorState
from mango.statistics import GradientStatistics

Budget = int | float | str | None


class Budgeted(Releasing):
    """An optimizer that knows the bytes of its state and keeps to a budget. `mango.optimizer.MANGO` is the one to use."""

    targets: list[Target]
    layers: list[Layer]
    applied: list[CompressionConfig]         # in force, one per layer
    statistics: GradientStatistics
    ranks: Ranks
    usage: Usage
    policy: Any
    budget: MemoryBudget
    allocator: Allocator
    pager: Pager
    peak: PeakMemory
    budget_asked: Budget                     # as the user put it
    page_budget_asked: Budget
    _numel: int
    apply: Callable[[Choice], list[CompressionConfig]]
    observe: Callable[..., Tensor]

    def _device(self) -> torch.device:
        first: Tensor | None = next((param for group in self.param_groups for param in group["params"]), None)
        return torch.device("cpu") if first is None else first.device

    def _new_budget(self, fixed: int) -> MemoryBudget:
        """The budget that was asked for, with what it means at the present size of the model."""
        total = parse_budget(self.budget_asked, self.adamw_bytes, self._device())
        total = self.ranks.least(total) if self.budget_asked is None else total
        paged = 0
        if self.pager.store is not None:
            asked = self.page_budget_asked
            paged = UNLIMITED if asked is None else parse_budget(asked, self.adamw_bytes, name="page_budget")
        return MemoryBudget(total, fixed, paged)

    @property
    def memory_budget(self) -> int:
        """Bytes that all stored state may take, but for what is paged. Set it (as the argument) at any time.

        A smaller one holds at once: what exceeds it is transcoded, or paged. A larger one is there for the next decision.
        Where ranks train together, set it on all.

        Raises:
            ValueError: an impossible one (names the least feasible bytes), or one that a fixed policy's config exceeds;
                nothing is changed then.
            OSError: no room on the disk for what is to be paged; the budget stays.
        """
        return self.budget.total

    @memory_budget.setter
    def memory_budget(self, asked: Budget) -> None:
        before, self.budget_asked = (self.budget_asked, self.budget.total, self.budget.price), asked
        try:
            self.budget.total = self._new_budget(0).total
            self.allocator.require()
            if not self.ranks.all(self.allocator.fits(self.applied)):
                self.check_fixed(self.applied)
                self.apply(list(self.applied))
            elif self.budget.total < before[1]:
                self.place_layers()
        except (ValueError, OSError):
            self.budget_asked, self.budget.total, self.budget.price = before
            raise

    def place_layers(self) -> None:
        """Page what the configs in force ask for, and nothing else."""
        with self.pager.moved(self.allocator.nbytes(self.applied), self.budget.total - self.budget.fixed, self.kept_layers()):
            pass

    def check_fixed(self, configs: Sequence[CompressionConfig]) -> None:
        """Raise ValueError where configs that do not fit are what a fixed policy wants: it would never be obeyed."""
        if isinstance(self.policy, FixedPolicy):
            needed = sum(self.allocator.nbytes(configs)) + self.budget.fixed
            raise ValueError(
                f"fixed config {self.policy.initial.name!r} needs {needed:,} bytes, more than the memory_budget of"
                f" {self.budget.total:,}; choose a smaller config or policy=None (water-filling)"
            )

    @property
    def adamw_bytes(self) -> int:
        """What AdamW's two float32 moments would take: 8 bytes per parameter."""
        return 8 * self._numel

    def planned_bytes(self) -> int:
        """Bytes under the configs in force once every tensor has seen a gradient; `state_bytes` never exceeds it."""
        return sum(self.allocator.nbytes(self.applied)) + self.budget.fixed

    def layer_bytes(self) -> Tensor:
        """State bytes of each layer under the configs in force: (L,) int64."""
        return torch.tensor(self.allocator.nbytes(self.applied), dtype=torch.int64)

    def layer_errors(self) -> Tensor:
        """Relative error that storing added to each layer's update at the last probe: (L,) float32."""
        return self.statistics.compression_errors()

    def kept(self) -> list[TensorState | None]:
        """Every target's state; None where no gradient came yet, or it is on another rank."""
        return [self.state.get(target.param, {}).get("tensor") for target in self.targets]

    def kept_layers(self) -> list[TensorState | None]:
        """Every layer's state."""
        return [state for target, state in zip(self.targets, self.kept(), strict=True) if target.layer is not None]

    def state_bytes(self) -> int:
        """Bytes of every tensor that the optimizer keeps, measured on their storages, wherever they are."""
        return self.statistics.nbytes + sum(state.nbytes for state in self.kept() if state is not None)

    def paged_bytes(self) -> int:
        """Those of them that are paged: in the host's memory, or in a file."""
        return sum(self.pager.paged_bytes(state) for state in self.kept() if state is not None)

    def resident_bytes(self) -> int:
        """Those of them that are not, and the device's copies of paged ones: within `memory_budget`."""
        return self.state_bytes() - self.paged_bytes() + self.pager.near_bytes

    def memory_report(self) -> dict[str, Any]:
        """Bytes by component, their `total`, what of it is `paged`, the `budget`, what AdamW would take, the same per layer."""
        names = [(target.name, target.layer) for target in self.targets]
        report = memory_report(names, self.kept(), self.layers, self.applied, self.statistics.nbytes)
        for i, row in enumerate(report["layers"]):
            row["paged"] = i in self.pager.layers
        return report | {"paged": self.paged_bytes(), "budget": self.memory_budget, "adamw": self.adamw_bytes}

    def get_memory_usage(self) -> dict[str, float]:
        """Peak device memory (on a CPU: of the process) and stored state, in GB (10^9 bytes).

        The peak is of all the time since the optimizer was made. On a CUDA device torch's own counter starts anew at every
        decision, because policies see the peak of an interval.
        """
        paged = self.paged_bytes()
        sizes = {"state_gb": self.state_bytes(), "budget_gb": self.memory_budget} | ({"paged_gb": paged} if paged else {})
        return {"peak_memory_gb": self.peak.ever() / 1e9} | {name: size / 1e9 for name, size in sizes.items()}

    def get_compression_stats(self) -> dict[str, float]:
        """Averages over all steps so far, layers weighted by size: compression ratio, bits, sparsity; number of changes."""
        return self.usage.averages()

    def get_compression_config(self) -> dict[str, Any]:
        """The config in force on most parameters, as the three knobs of the earlier public interface."""
        return prevailing(self.layers, self.applied)
