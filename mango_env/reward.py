"""What a decision was worth: loss kept, memory saved, error made. Every term is measured, none is estimated.

For layer l of one interval (the optimizer steps between two decisions):

    r_l = -alpha * loss_term + beta * (1 - bytes_l / adamw_bytes_l) - gamma * error_l

`bytes_l` are the bytes that the layer's state occupies, `adamw_bytes_l` the 8 bytes per parameter of AdamW,
`error_l` the relative l2 error that storing the state added. Bytes and error are the layer's own, the loss is shared.

On demand also what a step costs, shared by all layers, relative to the twin's: `- time_weight * (s / s_twin - 1)` of seconds
and `- energy_weight * (J / J_twin - 1)` of Joules. Both depend on the machine, so they are for environments alone: rewards of
recorded runs must follow from what is stored.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOSS_TERMS = ("twin", "raw")
LOSS_FLOOR = 0.1            # the loss term is relative to at least this fraction of the run's first loss
LOSS_CLIP = 2.0             # largest |loss term| of an interval that did not diverge
ERROR_CLIP = 10.0           # largest error that is charged; the relative error of forgetting everything is 1

COSTS = {"time": "time_weight", "energy": "energy_weight"}
COST_CLIP = 2.0             # largest |cost above the twin's| that is charged

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class RewardTerms:
    """The unweighted terms of one interval and the rewards made of them; `rewards` can be recomputed from the rest."""

    loss: float                                              # shared by all layers; with the penalty where the run diverged
    memory: Floats                                           # (L,) 1 - bytes / AdamW's bytes
    error: Floats                                            # (L,) relative error
    rewards: Floats                                          # (L,)
    costs: Mapping[str, float] = field(default_factory=dict)  # "time" and "energy" above the twin's, where they have a weight

    @property
    def reward(self) -> float:
        """The run's reward: the mean over layers."""
        return float(self.rewards.mean())

    def components(self) -> dict[str, float]:
        """The unweighted terms, means over layers: what `info` and progress lines show."""
        return {"loss": self.loss, "memory": float(self.memory.mean()), "error": float(self.error.mean()), **self.costs}


@dataclass(frozen=True, slots=True)
class Reward:
    """Weights of the three terms, and of time and energy, which have none by default.

    `loss="twin"`: the relative gap of the interval's mean loss to that of the uncompressed twin of the same workload
    and seed over the same steps, `(loss - twin) / max(|twin|, 0.1 * |first loss|)`. `loss="raw"`: the relative change
    since the interval before, on the same scale; it needs no twin. Both are clipped to [-2, 2]; the floor keeps a
    training loss near zero from making noise look like damage.

    The defaults make the terms comparable. Over the rungs of the ladder the memory term goes from 0 to 0.98 and the
    error from 0 over 0.02 (8 bits), 0.2 (4) and 0.45 (2) to 0.9 (rank 1), while the loss gap stays within 0.03 down to 4
    bits, is 0.0 to 0.1 at 2 bits and 0.3 to 1.9 at rank 1 (means over runs of `digits_mlp` and `source_lm`). With
    `beta = gamma = 0.1` all of a layer's memory is worth a loss gap of 10 %, and the step from 8 to 4 bits, 0.012 for
    memory, is paid for by its error unless the loss says otherwise.

    A run that diverges is charged `divergence_penalty` through the loss term for this decision and every one that the
    episode still had, as if the worst loss had stayed: giving up early never pays.

    >>> Reward(beta=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: beta=-1.0 must be a finite weight >= 0
    """

    alpha: float = 1.0
    beta: float = 0.1
    gamma: float = 0.1
    loss: str = "twin"
    divergence_penalty: float = 2.0                          # loss term per decision lost
    time_weight: float = 0.0                                 # of seconds per step above the twin's, over the twin's
    energy_weight: float = 0.0                               # of Joules per step above the twin's, over the twin's

    def __post_init__(self) -> None:
        for weight in ("alpha", "beta", "gamma", "divergence_penalty", *COSTS.values()):
            value = getattr(self, weight)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{weight}={value!r} must be a finite weight >= 0")
        if self.loss not in LOSS_TERMS:
            raise ValueError(f"loss={self.loss!r} is not one of {LOSS_TERMS}")

    @property
    def costly(self) -> dict[str, float]:
        """The weights of time and energy that are not zero."""
        return {cost: getattr(self, weight) for cost, weight in COSTS.items() if getattr(self, weight)}

    def check_recordable(self) -> None:
        """Raise where rewards would not follow from what a store keeps."""
        if self.costly:
            named = ", ".join(COSTS[cost] for cost in self.costly)
            raise ValueError(f"{named}: time and energy are not stored, so such a reward cannot be recorded or recomputed; set 0")

    def loss_term(self, loss: float, reference: float | None, first: float) -> float:
        """The relative gap of `loss` to `reference` (None: nothing to compare with, 0)."""
        if reference is None or not math.isfinite(reference):
            return 0.0
        scale = max(abs(reference), LOSS_FLOOR * abs(first), 1e-8)
        gap = (loss - reference) / scale
        return LOSS_CLIP if math.isnan(gap) else min(max(gap, -LOSS_CLIP), LOSS_CLIP)

    def terms(
        self,
        *,
        loss: float,
        reference: float | None,
        first: float,
        layer_bytes: NDArray[Any],
        adamw_bytes: NDArray[Any],
        errors: NDArray[Any],
        lost_decisions: int = 0,
        costs: Mapping[str, float] | None = None,
    ) -> RewardTerms:
        """Score one interval.

        `loss`: its mean loss; `reference`: what to compare it with; `first`: the run's first loss;
        `layer_bytes`, `adamw_bytes`, `errors`: (L,); `lost_decisions`: 0, or where the run diverged, this decision and
        those that the episode still had; `costs`: "time" and "energy" relative to the twin's, those that have a weight.
        """
        lost = self.divergence_penalty * lost_decisions
        # In the precision that is stored, so that rewards recomputed from the logs are equal, not merely close.
        loss_term = float(np.float32(lost if lost_decisions else self.loss_term(loss, reference, first)))
        memory = (1 - np.asarray(layer_bytes, np.float64) / np.asarray(adamw_bytes, np.float64)).astype(np.float32)
        error = np.nan_to_num(np.asarray(errors, np.float32), nan=ERROR_CLIP, posinf=ERROR_CLIP).clip(0, ERROR_CLIP)
        above = {cost: min(max(float((costs or {})[cost]), -COST_CLIP), COST_CLIP) for cost in self.costly if not lost_decisions}
        usual = replace(self, time_weight=0.0, energy_weight=0.0) if self.costly else self
        kept = usual.combine(loss_term, memory, error)
        paid = np.float32(sum(self.costly[cost] * value for cost, value in above.items()))
        return RewardTerms(loss_term, memory, error, kept - paid if above else kept, above)

    def combine(self, loss: float | NDArray[Any], memory: NDArray[Any], error: NDArray[Any]) -> Floats:
        """Rewards from logged terms: to score recorded trajectories again under other weights."""
        self.check_recordable()
        rewards = -self.alpha * np.asarray(loss, np.float64) + self.beta * memory.astype(np.float64)
        return np.asarray(rewards - self.gamma * error.astype(np.float64), np.float32)

    def to_json(self) -> str:
        """Weights of time and energy are named only where they are not 0: what was recorded before keeps its digest."""
        return json.dumps({name: value for name, value in asdict(self).items() if value or name not in COSTS.values()})

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Reward":
        """From what `to_json` wrote, or from its dict."""
        choice = json.loads(text) if isinstance(text, str) else dict(text)
        unknown = sorted(set(choice) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown reward weights {unknown}; known: {[f.name for f in fields(cls)]}")
        return cls(**choice)
