"""The byte budget: how many bytes there are, and which choice each layer gets so that the sum stays within them."""

import re

import numpy as np
import torch
from numpy.typing import NDArray

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
FREE_SHARE = 0.5                              # of the free memory, where no budget is given


def free_memory(device: torch.device) -> int:
    """Free bytes on the device; on a CPU what the system calls available (MemAvailable)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_budget(budget: int | float | str | None, adamw_bytes: int, device: torch.device | None = None) -> int:
    """A budget in bytes. int: bytes; str: "6GiB"; float: fraction of AdamW's state bytes; None: half the free memory.

    >>> parse_budget("64KiB", 0), parse_budget(0.25, 1000), parse_budget(123, 0)
    (65536, 250, 123)
    """
    allowed = 'bytes (int), a size ("6GiB") or a fraction of AdamW\'s state bytes (float)'
    budget = budget.item() if isinstance(budget, np.number) else budget
    if budget is None:
        return int(FREE_SHARE * free_memory(device or torch.device("cpu")))
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]+)\s*", budget)
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(f"memory_budget={budget!r} is no size; give {allowed}, units {', '.join(UNITS)}")
        return int(float(match[1]) * UNITS[match[2].lower()])
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
        raise ValueError(f"memory_budget={budget!r} is no positive amount; give {allowed}")
    return budget if isinstance(budget, int) else int(budget * adamw_bytes)


class MemoryBudget:
    """Bytes available to one optimizer, and the allocation of them among its layers.

    `fixed` bytes (tensors too small to be layers, statistics) are spent before any layer gets its choice.
    """

    def __init__(self, total: int, fixed: int = 0) -> None:
        self.total = total
        self.fixed = fixed
        self.price = 0.0                                     # score given up per byte at the margin of the last allocation

    @property
    def available(self) -> int:
        return self.total - self.fixed

    def require(self, least: int) -> None:
        """Raise ValueError unless `least` bytes for all layers, beside the fixed ones, fit."""
        if least > self.available:
            raise ValueError(
                f"memory_budget of {self.total:,} bytes is impossible: the least feasible is {least + self.fixed:,} bytes"
                f" ({least:,} for the layers at their cheapest, {self.fixed:,} for small tensors and statistics)"
            )

    def allocate(self, scores: NDArray[np.float64], nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """One choice per layer (L,) that maximises the summed score within the budget: a multiple-choice knapsack.

        `scores` (L, R): higher is better; -inf forbids. `nbytes` (L, R): bytes of each choice. Greedy over the upper
        hulls of all layers by marginal score per byte (Sinha & Zoltners 1979), optimal up to one step, and then the
        bytes left over go to whatever single change gains most.
        """
        scores, nbytes = np.asarray(scores, dtype=np.float64), np.asarray(nbytes, dtype=np.int64)
        layers = np.arange(len(scores))
        if len(layers) == 0:
            return np.zeros(0, dtype=np.int64)
        open_bytes = np.where(np.isneginf(scores), np.iinfo(np.int64).max, nbytes)
        pick = self._cheapest(scores, open_bytes)
        self.require(int(open_bytes.min(1).sum()))
        left = self.available - int(nbytes[layers, pick].sum())
        steps = [step for layer in layers for step in _hull_steps(int(layer), scores[layer], nbytes[layer], int(pick[layer]))]
        steps.sort(key=lambda step: -step[0])
        self.price = 0.0
        blocked: set[int] = set()
        for slope, layer, choice, extra in steps:
            if layer in blocked:
                continue
            if extra > left:
                blocked.add(layer)
                self.price = max(self.price, slope)
                continue
            pick[layer], left = choice, left - extra
        self._spend_rest(pick, left, scores, nbytes)
        return pick

    @staticmethod
    def _cheapest(scores: NDArray[np.float64], nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The cheapest choice of each layer; of equally cheap ones the best scored."""
        tied = np.where(nbytes == nbytes.min(1, keepdims=True), scores, -np.inf)
        pick: NDArray[np.int64] = tied.argmax(1).astype(np.int64)
        return pick

    @staticmethod
    def _spend_rest(pick: NDArray[np.int64], left: int, scores: NDArray[np.float64], nbytes: NDArray[np.int64]) -> None:
        layers = np.arange(len(pick))
        for _ in range(4 * len(pick)):
            extra = nbytes - nbytes[layers, pick][:, None]
            gain = np.where(extra <= left, scores - scores[layers, pick][:, None], -np.inf)
            best = int(gain.argmax())
            layer, choice = divmod(best, scores.shape[1])
            if gain[layer, choice] <= 0:
                return
            left -= int(extra[layer, choice])
            pick[layer] = choice


def _hull_steps(
    layer: int, scores: NDArray[np.float64], nbytes: NDArray[np.int64], start: int
) -> list[tuple[float, int, int, int]]:
    """The upgrades along the upper hull of (bytes, score) from `start`: (slope, layer, choice, extra bytes)."""
    steps: list[tuple[float, int, int, int]] = []
    at = start
    while True:
        extra = nbytes - nbytes[at]
        gain = scores - scores[at]
        better = (extra > 0) & (gain > 0)
        if not better.any():
            return steps
        slope = np.where(better, gain / np.where(better, extra, 1), -np.inf)
        choice = int(slope.argmax())
        steps.append((float(slope[choice]), layer, choice, int(extra[choice])))
        at = choice
