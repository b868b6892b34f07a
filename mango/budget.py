"""The byte budget: how many bytes there are, and which choice each layer gets so that the sum stays within them."""

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
UNLIMITED = 1 << 62                           # bytes, where there is no limit
FREE_SHARE = 0.5                              # of the free memory, where no budget is given
SAMPLE = 256                                  # layers that tell the price to look at in a knapsack of more
ROUNDS = 8                                    # over the steps after the first that did not fit, before they are all sorted
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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


def parse_budget(
    budget: int | float | str | None, adamw_bytes: int, device: torch.device | None = None, name: str = "memory_budget"
) -> int:
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
            raise ValueError(f"{name}={budget!r} is no size; give {allowed}, units {', '.join(UNITS)}")
        return int(float(match[1]) * UNITS[match[2].lower()])
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
        raise ValueError(f"{name}={budget!r} is no positive amount; give {allowed}")
    return budget if isinstance(budget, int) else int(budget * adamw_bytes)


class MemoryBudget:
    """Bytes available to one optimizer, and the allocation of them among its layers.

    `fixed` bytes (tensors too small to be layers, statistics) are spent before any layer gets its choice.
    """

    def __init__(self, total: int, fixed: int = 0, paged: int = 0) -> None:
        self.total = total
        self.fixed = fixed
        self.paged = paged                                   # bytes that layers may take elsewhere, beyond the total
        self.unusable = 0                                    # bytes left over where no layer fits: none is split in two
        self.price = 0.0                                     # score given up per byte at the margin of the last allocation

    @property
    def room(self) -> int:
        """All bytes that there are; unlimited pages count as much as the budget beside them."""
        return self.total + (self.paged if self.paged < UNLIMITED else self.total)

    @property
    def available(self) -> int:
        return self.total + self.paged - self.fixed - self.unusable

    def require(self, least: int) -> None:
        """Raise ValueError unless `least` bytes for all layers, beside the fixed ones, fit."""
        if least > self.available:
            least += self.unusable - self.paged
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
        if len(scores) == 0:
            return np.zeros(0, dtype=np.int64)
        pick = _cheapest(scores, nbytes)
        self.require(_total(nbytes, pick))
        low, high = _bracket(scores, nbytes, pick, self.available)
        pick, left, self.price = _climb(scores, nbytes, low, high, self.available - _total(nbytes, low))
        rows = _upgradable(scores, nbytes, pick, left, np.arange(len(pick)))
        left = _climb_on(scores, nbytes, pick, left, rows)
        _spend_rest(scores, nbytes, pick, left, rows)
        return pick


class _Steps(NamedTuple):
    """Upgrades along the upper hulls of (bytes, score) of some layers."""

    slope: Floats                                            # (S,) score gained per byte; does not rise along a layer
    layer: Ints                                              # (S,)
    choice: Ints                                             # (S,) what the layer then has
    extra: Ints                                              # (S,) bytes

    def steepest_first(self) -> "_Steps":
        """Sorted by slope; ties by layer, and within a layer as they follow each other."""
        order = np.lexsort((self.layer, -self.slope))
        return _Steps(self.slope[order], self.layer[order], self.choice[order], self.extra[order])


def _total(nbytes: Ints, pick: Ints) -> int:
    return int(nbytes[np.arange(len(pick)), pick].sum())


def _cheapest(scores: Floats, nbytes: Ints) -> Ints:
    """The cheapest allowed choice of each layer (L,); of equally cheap ones the best scored."""
    if scores.min() == -np.inf:
        closed = np.isneginf(scores)
        if closed.all(1).any():
            raise ValueError(f"every choice of layer {int(closed.all(1).argmax())} is forbidden (-inf); allow one at least")
        nbytes = np.where(closed, np.iinfo(np.int64).max, nbytes)
    return _foremost(nbytes == nbytes.min(1, keepdims=True), scores)


def _foremost(allowed: NDArray[np.bool_], scores: NDArray[Any]) -> Ints:
    """Of the allowed choices of each layer the best scored (L,)."""
    only = np.count_nonzero(allowed) == len(allowed)
    pick: Ints = (allowed if only else np.where(allowed, scores, -np.inf)).argmax(1)
    return pick


def _next_step(scores: Floats, nbytes: Ints, layer: Ints, at: Ints) -> tuple[Floats, Ints, Ints]:
    """Slope, choice and bytes of the next step along the hull of each given layer from `at`; slope 0: there is none."""
    gain, extra, rows = scores[layer], nbytes[layer], np.arange(len(layer))
    gain -= gain[rows, at][:, None]
    extra -= extra[rows, at][:, None]
    slope = gain / np.maximum(extra, 1)                                              # on a hull what costs no more gains nothing
    choice = slope.argmax(1)
    return np.maximum(slope[rows, choice], 0.0), choice, extra[rows, choice]


def _steps(scores: Floats, nbytes: Ints, layer: Ints, at: Ints, limit: Ints) -> _Steps:
    """The upgrades of the given layers along their hulls from `at`, as far as those of a layer add up to its `limit` bytes."""
    steepest = np.full(len(layer), np.inf)
    found = [_Steps(steepest[:0], layer[:0], layer[:0], layer[:0])]
    while len(layer):
        slope, choice, extra = _next_step(scores, nbytes, layer, at)
        fits = (slope > 0) & (extra <= limit)
        steepest = np.minimum(steepest, slope)[fits]                                 # rounding must not reorder a layer
        layer, at, extra, limit = layer[fits], choice[fits], extra[fits], limit[fits]
        found.append(_Steps(steepest, layer, at, extra))
        more = extra < limit
        layer, at, limit, steepest = layer[more], at[more], (limit - extra)[more], steepest[more]
    return _Steps(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _bracket(scores: Floats, nbytes: Ints, low: Ints, available: int) -> tuple[Ints, Ints]:
    """Choices on the hulls that fit, and choices on them that do not (or, where all that is good fits, the same), close by.

    Only the steps between them have to be found and sorted. At a price per byte a layer's choice is the best of
    score - price * bytes. A sample of layers tells which prices to try, and then a sample of the layers that are still
    open. A price that is off costs time, never the result.
    """
    rows, low, high = np.arange(len(low)), low.copy(), nbytes.argmax(1)
    for _ in range(2):
        if len(rows) <= SAMPLE:
            break
        left = available - _total(nbytes, low)
        part, cost = (scores, nbytes) if len(rows) == len(low) else (scores[rows], nbytes[rows])
        left += _total(cost, low[rows])                                              # what the open layers share
        for number, price in enumerate(_prices(part, cost, low[rows], high[rows], left)):
            pick = _at_price(part, cost, price * (1 - 1e-9))                         # layers that tie all go up
            fits = _total(cost, pick) <= left
            if not fits or price == 0:
                high[rows] = pick
            if not fits and number == 0:
                pick = _at_price(part, cost, price * (1 + 1e-9))                     # or none of them
            if fits or (number == 0 and _total(cost, pick) <= left):
                low[rows] = pick
            if not fits or price == 0:
                break
        rows = np.flatnonzero(low != high)
    return low, high


def _prices(scores: Floats, nbytes: Ints, low: Ints, high: Ints, left: int) -> list[float]:
    """Prices about the one at which `left` bytes run out, falling: from a sample of layers spread evenly over their bytes."""
    base = nbytes[np.arange(len(low)), low]
    span = np.maximum(nbytes[np.arange(len(low)), high] - base, 1)                   # bytes that a layer can take
    ends = span.cumsum()
    some = np.searchsorted(ends, (np.arange(SAMPLE) + 0.5) * (ends[-1] / SAMPLE))
    steps = _steps(scores[some], nbytes[some], np.arange(SAMPLE), low[some], span[some]).steepest_first()
    spent = (steps.extra / span[some[steps.layer]]).cumsum() / SAMPLE                # share of the spans, from steep to flat
    share = (left - int(base.sum())) / int(ends[-1])
    places = np.searchsorted(spent, share * np.array([0.97, 1.03, 1.3, 3.0]))
    slopes: list[float] = np.append(steps.slope, 0.0)[places].tolist()
    return [*slopes, 0.0]


def _at_price(scores: Floats, nbytes: Ints, price: float) -> Ints:
    """The choice of the largest score - price * bytes in each layer; without a price the cheapest of the best."""
    if price == 0:
        return _foremost(scores == scores.max(1, keepdims=True), -nbytes)
    value = nbytes * -price
    value += scores
    pick: Ints = value.argmax(1)
    return pick


def _climb(scores: Floats, nbytes: Ints, low: Ints, high: Ints, left: int) -> tuple[Ints, int, float]:
    """Take the steps from `low` to `high`, steepest first, until one does not fit: choices, bytes left, that step's slope."""
    rows = np.flatnonzero(low != high)
    span = nbytes[rows, high[rows]] - nbytes[rows, low[rows]]
    steps = _steps(scores, nbytes, rows, low[rows], span).steepest_first()
    spent = steps.extra.cumsum()
    fits = int(np.searchsorted(spent, left, side="right"))
    pick = low.copy()
    pick[steps.layer[:fits]] = steps.choice[:fits]                                   # a layer's last step stands
    price = float(steps.slope[fits]) if fits < len(spent) else 0.0
    return pick, left - int(spent[fits - 1]) if fits else left, price


def _climb_on(scores: Floats, nbytes: Ints, pick: Ints, left: int, rows: Ints) -> int:
    """Take the further steps that fit, steepest first, in place; a layer whose step did not fit takes none after it.

    In rounds over the steepest steps alone, those that would use up what is left; the last round takes them all.
    """
    slope, _, extra = _next_step(scores, nbytes, rows, pick[rows])
    for round_left in range(ROUNDS, -1, -1):
        fits = (slope > 0) & (extra <= left)                                         # once it does not, it never will
        rows, slope, extra = rows[fits], slope[fits], extra[fits]
        order = (-slope).argsort()
        enough = int(np.searchsorted(extra[order].cumsum(), left, side="right"))
        if enough > SAMPLE and round_left:                                           # only giants did not fit: start again
            part, cost, held = scores[rows], nbytes[rows], left + _total(nbytes[rows], pick[rows])
            low, high = _bracket(part, cost, pick[rows], held)
            pick[rows], left, _ = _climb(part, cost, low, high, held - _total(cost, low))
            slope, _, extra = _next_step(scores, nbytes, rows, pick[rows])
            continue
        flattest = slope[order[enough]] if enough < len(rows) and round_left else 0.0
        steep = slope >= flattest
        near = rows[steep]
        steps = _steps(scores, nbytes, near, pick[near], np.full(len(near), left)).steepest_first()
        count = int(np.searchsorted(-steps.slope, -flattest, side="right"))
        blocked: set[int] = set()
        for layer, choice, more in zip(*(column[:count].tolist() for column in steps[1:]), strict=True):
            if more > left:
                blocked.add(layer)
            elif layer not in blocked:
                pick[layer], left = choice, left - more
        if flattest == 0:
            break
        slope[steep], _, extra[steep] = _next_step(scores, nbytes, near, pick[near])
    return left


def _spend_rest(scores: Floats, nbytes: Ints, pick: Ints, left: int, rows: Ints) -> None:
    """Take single changes that fit, the largest gain first, in place. One per layer: a better one did not fit and never will."""
    rows = _upgradable(scores, nbytes, pick, left, rows)
    gain = scores[rows] - scores[rows, pick[rows]][:, None]
    extra = nbytes[rows] - nbytes[rows, pick[rows]][:, None]
    row, choice = np.nonzero((gain > 0) & (extra <= left))
    order = np.argsort(-gain[row, choice], kind="stable")
    row, choice = row[order], choice[order]
    moved: set[int] = set()
    for layer, to, more in zip(rows[row].tolist(), choice.tolist(), extra[row, choice].tolist(), strict=True):
        if more <= left and layer not in moved:
            moved.add(layer)
            pick[layer], left = to, left - more


def _upgradable(scores: Floats, nbytes: Ints, pick: Ints, left: int, rows: Ints) -> Ints:
    """Those of the given layers that have a better choice for `left` more bytes."""
    if len(rows) < len(pick):
        pick, scores, nbytes = pick[rows], scores[rows], nbytes[rows]
    places = np.arange(len(pick))
    better = scores > scores[places, pick][:, None]
    better &= nbytes <= (nbytes[places, pick] + left)[:, None]
    return rows[better.any(1)]
