"""From what a user or a policy says to what the optimizer needs: a policy object, rung scores, a config per layer."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.config import KNOBS, CompressionConfig, Ladder
from mango.networks import PolicyNetwork
from mango.policies import POLICIES, CallablePolicy, Choice, FixedPolicy, Policy, ScoringPolicy, WaterFillingPolicy
from mango.policy_file import FrozenPolicy, load_policy


def as_policy(policy: Any, ladder: Ladder) -> Policy | ScoringPolicy:
    """A policy object from None (water-filling), a name, a path, a config, a dict of knobs, somebody's own object, or a
    network (its rung head, copied as it is now)."""
    if policy is None:
        return WaterFillingPolicy(ladder=ladder)
    if isinstance(policy, CompressionConfig | Mapping):
        return FixedPolicy(policy)
    if isinstance(policy, str | Path):
        if str(policy) not in POLICIES:
            return load_policy(policy, ladder=ladder)
        builder = POLICIES[str(policy)]
        return builder(ladder=ladder) if "ladder" in signature(builder).parameters else builder()
    if isinstance(policy, PolicyNetwork):
        return FrozenPolicy(policy, ladder=ladder, name=policy.name)
    if isinstance(policy, Policy | ScoringPolicy):
        return policy
    if callable(policy):
        return CallablePolicy(policy)
    raise TypeError(
        f"policy is a {type(policy).__name__}; give a shipped name, a path, one of {', '.join(POLICIES)}, a CompressionConfig,"
        " a dict of knobs, or an object with act(obs), scores(obs) or __call__(features)"
    )


def rung_scores(choice: Choice, layers: int, rungs: int) -> NDArray[np.float64] | None:
    """The choice as scores (L, R), or None where it is no floating tensor."""
    table = torch.as_tensor(choice) if isinstance(choice, Tensor | np.ndarray) else None
    if table is None or not table.is_floating_point():
        return None
    if table.shape != (layers, rungs):
        raise ValueError(f"rung scores have shape {tuple(table.shape)}; expected (layers, rungs) = ({layers}, {rungs})")
    scores: NDArray[np.float64] = table.detach().double().cpu().numpy()
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError("rung scores contain nan or inf; a score is a finite number, or -inf to forbid a rung")
    closed = np.isneginf(scores).all(1)
    if closed.any():
        raise ValueError(f"every rung of layer {int(closed.argmax())} is forbidden (-inf); allow one at least")
    return scores


def proposals(choice: Choice, layers: int) -> list[CompressionConfig]:
    """The choice as one config per layer."""
    if isinstance(choice, CompressionConfig):
        return [choice] * layers
    if isinstance(choice, Mapping):
        return [CompressionConfig.from_dict(choice)] * layers
    if isinstance(choice, Tensor | np.ndarray):
        rows = torch.as_tensor(choice).tolist()
        if np.shape(rows) != (layers, len(KNOBS)):
            raise ValueError(f"actions have shape {np.shape(rows)}; expected (layers, knobs) = ({layers}, {len(KNOBS)})")
        return [CompressionConfig.from_action(row) for row in rows]
    if isinstance(choice, Sequence) and all(isinstance(c, CompressionConfig) for c in choice) and len(choice) == layers:
        return list(choice)
    raise TypeError(f"a decision is rung scores, knob indices, {layers} configs, one config or a dict of knobs; got {choice!r}")
