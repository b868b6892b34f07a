"""What a frozen policy is and what it does: its card, what it decides during a real run, and what it listens to.

The probe is a training run that the policy decides. Sensitivity: how much the scores of the rungs move when one feature
moves by its own spread in that run, everything else held. Phases: whether decisions differ between early, middle and late.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.config import LADDER
from mango.features import FEATURES
from mango.policies import phases
from mango.policy_file import FrozenPolicy
from mango_env.run import TrainingRun

PHASES = ("early", "middle", "converged")
PROBED = 8                                               # decisions at which every feature is moved
LEAST_STEP = 0.01                                        # of a feature's range, where it did not vary in the run


@dataclass(frozen=True, slots=True)
class Probe:
    """One run decided by the policy."""

    workload: str
    layers: list[str]                                    # (L,)
    observations: list[Tensor]                           # T of (L, 64)
    rungs: NDArray[np.int64]                             # (T, L) nearest rungs of what was applied
    phase: NDArray[np.int64]                             # (T, L) indices of PHASES
    losses: list[float]                                  # (T,) mean training loss after each decision
    memory: list[dict[str, Tensor]]                      # T states of the policy before deciding
    val_loss: float


def facts(policy: FrozenPolicy) -> dict[str, Any]:
    """What the file says: head, architecture, size, ladder, schema, and its card."""
    return {
        "name": policy.name,
        "head": policy.head,
        "architecture": policy.network.architecture,
        "parameters": sum(p.numel() for p in policy.network.parameters()),
        "ladder": list(policy.ladder.names),
        "schema_hash": policy.metadata.get("schema_hash"),
        "knobs_version": policy.metadata.get("knobs_version"),
        "weights_sha256": policy.metadata.get("weights_sha256"),
        "card": policy.card,
    }


def probe(
    policy: FrozenPolicy,
    workload: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    interval: int = 10,
    budget: float | str = 0.25,
) -> Probe:
    """Let the policy decide one training run and keep everything that it saw."""
    policy.reset()
    run = TrainingRun(workload, seed, horizon=steps, interval=interval, memory_budget=budget, policy="hold")
    observations, rungs, phase, losses, memory = [], [], [], [], []
    while not run.done:
        observation = torch.from_numpy(run.observe())
        memory.append(policy.state_dict())
        observations.append(observation)
        phase.append(phases(observation).numpy())
        applied = run.apply(answer(policy, observation))
        rungs.append([LADDER.nearest(config) for config in applied])
        losses.append(run.advance().loss)
    policy.reset()
    names = [layer.name for layer in run.layers]
    return Probe(workload, names, observations, np.array(rungs), np.array(phase), losses, memory, run.evaluate()["val_loss"])


def answer(policy: FrozenPolicy, observation: Tensor) -> Tensor:
    """What the policy gives the optimizer: scores (L, R), or knob indices (L, 7)."""
    return policy.scores(observation) if policy.head == "rung" else policy.act(observation)


def sensitivity(policy: FrozenPolicy, seen: Probe) -> dict[str, float]:
    """Per feature, the mean absolute change of the answer when it moves by its spread, largest first.

    For a rung head in log-probability per rung; for a knob head the fraction of knobs that change.
    """
    every = torch.cat(seen.observations)                                       # (T * L, 64)
    low = torch.tensor([f.low for f in FEATURES])
    high = torch.tensor([f.high for f in FEATURES])
    step = torch.maximum(every.std(0, correction=0), LEAST_STEP * (high - low))
    moments = np.unique(np.linspace(0, len(seen.observations) - 1, PROBED).round().astype(int))
    effect = torch.zeros(len(FEATURES))
    for t in moments:
        base = _answer_from(policy, seen, t, seen.observations[t])
        for i in range(len(FEATURES)):
            moved = seen.observations[t].clone()
            # Where the upper end of the range is near, the step goes down.
            up = moved[:, i] + step[i] <= high[i]
            moved[:, i] = torch.where(up, moved[:, i] + step[i], moved[:, i] - step[i])
            changed = _answer_from(policy, seen, t, moved)
            effect[i] += (changed - base).abs().mean() if base.is_floating_point() else (changed != base).float().mean()
    policy.reset()
    effect /= len(moments)
    order = effect.argsort(descending=True).tolist()
    return {FEATURES[i].name: float(effect[i]) for i in order}


def _answer_from(policy: FrozenPolicy, seen: Probe, t: int, observation: Tensor) -> Tensor:
    policy.reset()
    policy.load_state_dict(seen.memory[t])
    return answer(policy, observation)


def phase_separation(seen: Probe) -> dict[str, Any]:
    """Whether decisions tell phases apart: mean silhouette of the rungs (one position per layer) under the phase labels.

    A decision is a point of L rung positions in [0, 1]; its label is the phase of most layers. Above zero decisions of one
    phase lie nearer to each other than to another phase's (Rousseeuw 1987). Undefined with fewer than two phases.
    """
    labels = np.array([np.bincount(row, minlength=len(PHASES)).argmax() for row in seen.phase])
    positions = seen.rungs / (len(LADDER) - 1)                                 # (T, L)
    by_phase = {
        PHASES[k]: {LADDER.names[r]: float((seen.rungs[labels == k] == r).mean()) for r in np.unique(seen.rungs[labels == k])}
        for k in np.unique(labels)
    }
    kinds = len(np.unique(labels))
    if kinds < 2 or kinds >= len(labels):
        return {"silhouette": None, "verdict": "undefined: the run has one phase only", "by_phase": by_phase}
    score = silhouette(positions, labels)
    verdict = "phases are separable" if score > 0 else "phases are not separable in this policy's decisions"
    return {"silhouette": score, "verdict": verdict, "by_phase": by_phase}


def silhouette(points: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """Mean silhouette over all points; members of a cluster of one count as 0, and so does a point with no spread at all.

    >>> silhouette(np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([0, 0, 1, 1]))
    1.0
    """
    distance = np.abs(points[:, None] - points[None]).sum(-1)                  # (T, T) city block
    values = []
    for i, label in enumerate(labels):
        same = labels == label
        if same.sum() == 1:
            values.append(0.0)
            continue
        within = distance[i, same].sum() / (same.sum() - 1)
        between = min(distance[i, labels == other].mean() for other in np.unique(labels) if other != label)
        largest = max(within, between)
        values.append(0.0 if largest == 0 else (between - within) / largest)
    return float(np.mean(values))


def inspect_policy(
    policy: FrozenPolicy, workload: str, *, seed: int = 0, steps: int | None = None, budget: float | str = 0.25
) -> dict[str, Any]:
    """Everything that `mango inspect` tells, as JSON-able facts."""
    seen = probe(policy, workload, seed=seed, steps=steps, budget=budget)
    moved = {name: value for name, value in sensitivity(policy, seen).items() if math.isfinite(value)}
    return {
        **facts(policy),
        "probe": {
            "workload": workload,
            "seed": seed,
            "budget": budget,
            "layers": seen.layers,
            "rungs": [[LADDER.names[r] for r in row] for row in seen.rungs],
            "phases": [[PHASES[p] for p in row] for row in seen.phase],
            "losses": seen.losses,
            "val_loss": seen.val_loss,
        },
        "sensitivity": moved,
        "phase_separation": phase_separation(seen),
    }
