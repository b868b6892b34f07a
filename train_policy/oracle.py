"""The oracle: a teacher that tries every rung of every layer on a fork of the run before it decides.

It sees the future that a policy has to guess, so it is slow and cannot be deployed; its trajectories are what behaviour
cloning learns from.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango_env.reward import Reward
from mango_env.run import Snapshot, TrainingRun
from mango_env.twin import Twin, score, twin_of

UNBOUNDED = 2**62                                        # bytes: trials measure a rung's worth, the budget divides afterwards


class OraclePolicy:
    """Scores (L, R): the reward that the run earned on a fork where one layer had one rung and the others kept theirs.

    `window`: decisions that a trial lasts. The scores add up to first order, so the optimizer's knapsack over them picks
    the allocation of greatest measured reward under the budget. Costs at most L * (R - 1) + 1 trials per decision.
    Used through `decide(run)`, as `mango_env.record_run` does.
    """

    name = "oracle"

    def __init__(self, reward: Reward | None = None, window: int = 1) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least one decision")
        self.reward, self.window = reward or Reward(), window
        self._fork: TrainingRun | None = None
        self._of: TrainingRun | None = None

    def reset(self) -> None:
        """Forget the run that was being forked."""
        self._fork = self._of = None

    def decide(self, run: TrainingRun) -> Tensor:
        """Measured scores (L, R) float64 of every rung for every layer of `run`, which is left as it was."""
        if self._fork is None or self._of is not run:
            self._fork, self._of = run.fork(), run
            self._fork.optimizer.budget.total = UNBOUNDED
        twin = twin_of(run) if self.reward.loss == "twin" else None
        return torch.from_numpy(self._measure(self._fork, run.snapshot(), twin, affordable(run)))

    def _measure(
        self, fork: TrainingRun, start: Snapshot, twin: Twin | None, allowed: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        ladder = fork.optimizer.ladder
        fork.restore(start)
        held = list(fork.optimizer.applied)
        unchanged = self._trial(fork, twin)
        scores = np.where(allowed, unchanged, -np.inf)
        for layer, config in enumerate(held):
            for rung, other in enumerate(ladder):
                if other != config and allowed[layer, rung]:
                    fork.restore(start)
                    fork.apply([*held[:layer], other, *held[layer + 1 :]])
                    scores[layer, rung] = self._trial(fork, twin)
        return scores

    def _trial(self, fork: TrainingRun, twin: Twin | None) -> float:
        """Summed reward of the next `window` decisions with everything held."""
        total = 0.0
        for _ in range(self.window):
            if fork.done:
                break
            total += score(self.reward, fork.advance(), twin).reward
        return total


def affordable(run: TrainingRun) -> NDArray[np.bool_]:
    """(L, R): whether a layer could have a rung at all, with every other layer at its cheapest."""
    nbytes = run.optimizer.allocator.rung_bytes.numpy()
    least = nbytes.min(1)
    allowed: NDArray[np.bool_] = nbytes + (least.sum() - least)[:, None] <= run.optimizer.budget.available
    return allowed
