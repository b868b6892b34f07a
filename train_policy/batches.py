"""What training reads: selections of a trajectory cache, split by run, as batches of tensors.

A run's layers share its loss, so runs are selected and split, never single layers and never single steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.features import FEATURE_DIM
from mango.networks import PolicyNetwork
from mango.trunks import TreeTrunk
from mango_env.cache import TrajectoryCache

NORMALISER_ROWS = 200_000                                # observations that fit a normaliser; more change nothing


@dataclass(frozen=True, slots=True)
class Steps:
    """Transitions as tensors: B rows, or B padded sequences of T steps (then every shape has T after B)."""

    observations: Tensor                                 # (B, 64) float32
    next_observations: Tensor                            # (B, 64) float32
    actions: Tensor                                      # (B, 7) int64 indices into KNOBS
    rungs: Tensor                                        # (B,) int64
    rewards: Tensor                                      # (B,) float32
    going_on: Tensor                                     # (B,) float32: 0 where the run came to its end, 1 elsewhere
    to_go: Tensor                                        # (B,) float32: discounted rewards from here to the end of the record
    mask: Tensor                                         # (B,) float32: 0 where a sequence is padding

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values (B,) over what is no padding."""
        return (values * self.mask).sum() / self.mask.sum().clamp(min=1)


class Loader:
    """Batches of a cache: single transitions, or whole episodes where `sequences` (for trunks with memory)."""

    def __init__(self, cache: TrajectoryCache, batch_size: int, seed: int, *, sequences: bool, gamma: float = 1.0) -> None:
        if not len(cache):
            raise ValueError("the selection holds no transitions; record more runs or select less strictly")
        self.cache, self.sequences = cache, sequences
        self.rng = np.random.default_rng(seed)
        self.rows = np.concatenate([np.arange(b, b + n) for b, n in zip(cache.begins, cache.lengths, strict=True)])
        self.size = max(1, round(batch_size / float(cache.lengths.mean()))) if sequences else batch_size
        self.to_go = returns_to_go(cache, gamma)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self._units // self.size)

    @property
    def _units(self) -> int:
        return len(self.cache.lengths) if self.sequences else len(self.rows)

    def epoch(self) -> Iterator[Steps]:
        """Everything once, in random order."""
        order = self.rng.permutation(self._units)
        for at in range(0, len(order), self.size):
            yield self._steps(order[at : at + self.size])

    def sample(self) -> Steps:
        """One batch, drawn with replacement."""
        return self._steps(self.rng.integers(0, self._units, self.size))

    def _steps(self, units: NDArray[np.int64]) -> Steps:
        if not self.sequences:
            return self._gather(self.rows[units], np.ones(len(units), np.float32))
        begins, lengths = self.cache.begins[units], self.cache.lengths[units]
        steps = np.arange(lengths.max())
        rows = begins[:, None] + np.minimum(steps, lengths[:, None] - 1)                  # padding repeats the last step
        return self._gather(rows, (steps < lengths[:, None]).astype(np.float32))

    def _gather(self, rows: NDArray[np.int64], mask: NDArray[np.float32]) -> Steps:
        c = self.cache.columns
        return Steps(
            observations=torch.from_numpy(c["observations"].take(rows, 0)),
            next_observations=torch.from_numpy(c["observations"].take(rows + 1, 0)),
            actions=torch.from_numpy(c["actions"].take(rows, 0)).long(),
            rungs=torch.from_numpy(c["rung"].take(rows)).long(),
            rewards=torch.from_numpy(c["rewards"].take(rows)),
            going_on=torch.from_numpy(~c["terminations"].take(rows)).float(),
            to_go=torch.from_numpy(self.to_go.take(rows)),
            mask=torch.from_numpy(mask),
        )


def returns_to_go(cache: TrajectoryCache, gamma: float) -> NDArray[np.float32]:
    """Discounted rewards from every step to the end of its episode, by row of the cache (R,)."""
    found = np.zeros(len(cache.columns["rewards"]), np.float32)
    for begin, length in zip(cache.begins.tolist(), cache.lengths.tolist(), strict=True):
        total = 0.0
        for row in range(begin + length - 1, begin - 1, -1):
            total = float(cache.columns["rewards"][row]) + gamma * total
            found[row] = total
    return found


def observations_of(cache: TrajectoryCache, seed: int = 0, most: int = NORMALISER_ROWS) -> Tensor:
    """Observations (N, 64) of a cache, a random part of them where there are more than `most`."""
    rows = np.concatenate([np.arange(b, b + n) for b, n in zip(cache.begins, cache.lengths, strict=True)])
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    seen = torch.from_numpy(cache.columns["observations"].take(rows, 0))
    return seen.reshape(-1, FEATURE_DIM)


def prepare_normaliser(network: PolicyNetwork, cache: TrajectoryCache, fit: bool | None, seed: int) -> None:
    """Fit the network's normaliser to the data: always, never, or (None) where it never was.

    Fitting that of a trained network would change what its weights mean.
    """
    own, fresh = network.trunk.normaliser, PolicyNetwork(**network.architecture).trunk.normaliser
    unfitted = torch.equal(own.mean, fresh.mean) and torch.equal(own.std, fresh.std)
    if fit or (fit is None and unfitted):
        network.fit_normaliser(observations_of(cache, seed))


def runs_of(cache: TrajectoryCache) -> NDArray[np.int64]:
    """The run of every episode (E,), numbered in order of appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(run, len(numbers)) for run in cache.attributes["run_id"]], np.int64)


def group_sums(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of the rows (N, ...) of each group (G, ...); groups (N,) are numbered from 0."""
    found = np.zeros((int(groups.max()) + 1, *values.shape[1:]))
    np.add.at(found, groups, values)
    return found


def run_returns(cache: TrajectoryCache) -> NDArray[np.float64]:
    """For every episode (E,) the return of its run: the mean over the run's layers."""
    runs, returns = runs_of(cache), cache.returns()
    means = np.bincount(runs, weights=returns) / np.bincount(runs)
    return np.asarray(means[runs], np.float64)


def split_runs(cache: TrajectoryCache, validation: float, seed: int) -> tuple[TrajectoryCache, TrajectoryCache]:
    """Training and validation episodes; no run is in both. Raises ValueError where either would be empty."""
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation} is not a fraction in (0, 1)")
    runs = runs_of(cache)
    count = int(runs.max()) + 1 if len(runs) else 0
    if count < 2:
        raise ValueError(f"a split by run needs at least 2 runs; the selection has {count}: record more, or select less strictly")
    held = np.random.default_rng(seed).permutation(count)[: min(count - 1, max(1, round(validation * count)))]
    is_held = np.isin(runs, held)
    return cache.select(~is_held), cache.select(is_held)


def select_policies(cache: TrajectoryCache, policies: Sequence[str]) -> TrajectoryCache:
    """Episodes that the named behaviours decided."""
    found = cache.attributes["policy"]
    unknown = sorted(set(policies) - set(found))
    if unknown:
        raise ValueError(f"no episodes by {unknown}; the data has {sorted(set(found))}")
    return cache.select(np.isin(np.array(found), list(policies)))


def select_best(cache: TrajectoryCache, top: float) -> TrajectoryCache:
    """Episodes of the `top` fraction of runs by return, within each (workload, budget, horizon, interval).

    Across those, returns differ for reasons that no decision changes: an easy workload or an ample budget would crowd
    out the rest.
    """
    if not 0 < top <= 1:
        raise ValueError(f"top={top} is not a fraction in (0, 1]")
    facts, returns = cache.attributes, run_returns(cache)
    keys = list(zip(*(facts[name] for name in ("workload", "budget_bytes", "horizon", "interval")), strict=True))
    groups: dict[tuple[object, ...], list[int]] = {}
    for episode, key in enumerate(keys):
        groups.setdefault(key, []).append(episode)
    runs = runs_of(cache)
    kept: list[int] = []
    for episodes in groups.values():
        one_per_run = {int(runs[e]): float(returns[e]) for e in episodes}
        count = max(1, round(top * len(one_per_run)))
        best = set(sorted(one_per_run, key=lambda run: (-one_per_run[run], run))[:count])
        kept += [e for e in episodes if int(runs[e]) in best]
    return cache.select(np.array(sorted(kept), np.int64))


def check_network(network: PolicyNetwork, cache: TrajectoryCache) -> None:
    """The data's rungs must mean what the network's mean, and a tree, whose questions do not train, must have some."""
    rungs = network.architecture["rungs"]
    if len(cache.header.ladder) != rungs:
        raise ValueError(f"the data's ladder has {len(cache.header.ladder)} rungs, the network scores {rungs}")
    if isinstance(network.trunk, TreeTrunk) and not network.trunk.asks:
        raise ValueError("a new tree asks nothing and learns no questions; start from a distilled one (--init universal_tree)")
