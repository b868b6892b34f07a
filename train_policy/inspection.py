"""What a frozen policy is and what it does: its card, what it decides during a real run, and what it listens to.

The probe is a training run that the policy decides. Sensitivity: how much the scores of the rungs move when one feature
moves by its own spread in that run, everything else held. Phases: whether decisions differ between early, middle and late.
The tree: the policy in a few rules, learned from runs beside the probe, and how often it decides as the policy does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.config import LADDER, CompressionConfig
from mango.features import FEATURES
from mango.policies import Choice, Policy, ScoringPolicy, phases
from mango.policy_file import FrozenPolicy
from train_policy.evaluate import EvaluationArgs, start_run
from train_policy.tree import DEPTH, distil_tree, fidelity, rules

PHASES = ("early", "middle", "converged")
THIRDS = ("first third", "second third", "last third")
PROBED = 8                                               # decisions at which every feature is moved
LEAST_STEP = 0.01                                        # of a feature's range, where it did not vary in the run
LEARNED_RUNS = 2                                         # that the tree learns from, the probe among them; one more judges it
TREE_STEPS = 100                                         # at most, of the runs beside the probe


@dataclass(frozen=True, slots=True)
class Probe:
    """One run decided by the policy."""

    workload: str
    steps: int                                           # optimizer steps that it took
    layers: list[str]                                    # (L,)
    kinds: list[str]                                     # (L,) kinds of the layers
    observations: list[Tensor]                           # T of (L, 64)
    answers: list[Tensor]                                # T of scores (L, R) or knob indices (L, K)
    rungs: NDArray[np.int64]                             # (T, L) nearest rungs of what was applied
    phase: NDArray[np.int64]                             # (T, L) indices of PHASES
    losses: list[float]                                  # (T,) mean training loss after each decision
    memory: list[dict[str, Tensor]]                      # T states of the policy before deciding
    val_loss: float
    allocate: Callable[[Choice, Tensor], list[CompressionConfig]]  # what the run's budget makes of an answer

    def resolve(self, answer: Choice, observation: Tensor) -> NDArray[np.int64]:
        """The nearest rungs (L,) of what the budget of this run makes of an answer."""
        return nearest_rungs(self.allocate(answer, observation))


def nearest_rungs(configs: Sequence[CompressionConfig]) -> NDArray[np.int64]:
    return np.array([LADDER.nearest(config) for config in configs], np.int64)


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
    policy: Policy | ScoringPolicy,
    workload: str,
    settings: EvaluationArgs | None = None,
    *,
    seed: int = 0,
    budget: float | str = 0.25,
) -> Probe:
    """Let the policy decide one training run and keep everything that it saw."""
    policy.reset()
    run = start_run(workload, seed, budget, "hold", settings or EvaluationArgs())
    observations, answers, rungs, phase, losses, memory = [], [], [], [], [], []
    while not run.done:
        observation = torch.from_numpy(run.observe())
        memory.append(policy.state_dict() if isinstance(policy, FrozenPolicy) else {})
        observations.append(observation)
        phase.append(phases(observation).numpy())
        answers.append(answer(policy, observation))
        rungs.append(nearest_rungs(run.apply(answers[-1])))
        losses.append(run.advance().loss)
    policy.reset()
    names, kinds = [layer.name for layer in run.layers], [layer.kind for layer in run.layers]
    val_loss, allocator = run.evaluate()["val_loss"], run.optimizer.allocator

    def allocate(choice: Choice, observation: Tensor) -> list[CompressionConfig]:
        return allocator.resolve(choice, run.optimizer.applied, lambda: observation)

    decided, seen = np.array(rungs), np.array(phase)
    return Probe(workload, run.t, names, kinds, observations, answers, decided, seen, losses, memory, val_loss, allocate)


def answer(policy: Policy | ScoringPolicy, observation: Tensor) -> Tensor:
    """What the policy gives the optimizer: scores (L, R), or knob indices (L, 7)."""
    found = policy.scores(observation) if isinstance(policy, ScoringPolicy) else policy.act(observation)
    if not isinstance(found, Tensor):
        raise TypeError(f"only policies that score rungs or name knob indices can be watched; this one answers {found!r}")
    return found


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
    """Whether decisions tell phases of training apart: mean silhouettes (Rousseeuw 1987) of decisions under labels of time.

    A decision is a point: per layer kind and rung, the share of the kind's layers on that rung. `thirds` labels it by the
    third of the run that it falls in, `phases` by the phase (`mango.policies.phases`) of most layers. Above zero decisions
    of one label lie nearer to each other than to another label's. Undefined with fewer than two labels.
    """
    decisions = len(seen.rungs)
    by_majority = np.array([np.bincount(row, minlength=len(PHASES)).argmax() for row in seen.phase])
    by_third = np.arange(decisions) * len(THIRDS) // decisions
    return {"thirds": _separation(seen, by_third, THIRDS), "phases": _separation(seen, by_majority, PHASES)}


def _separation(seen: Probe, labels: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    by_label = {
        names[k]: {LADDER.names[r]: float((seen.rungs[labels == k] == r).mean()) for r in np.unique(seen.rungs[labels == k])}
        for k in np.unique(labels)
    }
    if not 1 < len(by_label) < len(labels):
        verdict = "undefined: all decisions have one label" if len(by_label) == 1 else "undefined: too few decisions"
        return {"silhouette": None, "separable": None, "verdict": verdict, "by_label": by_label}
    score = silhouette(decision_points(seen), labels)
    verdict = "separable: decisions follow them" if score > 0 else "not separable: decisions do not tell them apart"
    return {"silhouette": score, "separable": score > 0, "verdict": verdict, "by_label": by_label}


def decision_points(seen: Probe) -> NDArray[np.float64]:
    """Per decision, the share of the layers of each kind that are on each rung (T, kinds * R)."""
    kinds = sorted(set(seen.kinds))
    one_hot = np.eye(len(LADDER))[seen.rungs]                                  # (T, L, R)
    shares = [one_hot[:, [kind == own for own in seen.kinds]].mean(1) for kind in kinds]
    return np.concatenate(shares, 1)


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


def tree_of(
    policy: Policy | ScoringPolicy,
    learned: Sequence[Probe],
    settings: EvaluationArgs,
    *,
    seed: int,
    budget: float | str,
    depth: int = DEPTH,
) -> dict[str, Any]:
    """The policy as a decision tree, judged on a further run of the same workload with the given settings, seed and budget.

    `learned` are runs of the policy with other seeds. The tree also decides that run alone: its held-out loss stands beside
    the policy's.
    """
    tree = distil_tree(learned, depth=depth)
    held_out = probe(policy, learned[0].workload, settings, seed=seed, budget=budget)
    alone = probe(tree, learned[0].workload, settings, seed=seed, budget=budget)
    return {
        "depth": depth,
        "learned_runs": len(learned),
        "learned_decisions": int(sum(run.rungs.size for run in learned)),
        "held_out_seed": seed,
        "fidelity": fidelity(tree, learned, [held_out]).to_dict(),
        "val_loss": {"policy": held_out.val_loss, "tree": alone.val_loss},
        "rules": rules(tree, learned),
        "nodes": tree.to_dict(),
    }


def inspect_policy(
    policy: FrozenPolicy,
    workload: str,
    settings: EvaluationArgs | None = None,
    *,
    seed: int = 0,
    budget: float | str = 0.25,
    depth: int = DEPTH,
) -> dict[str, Any]:
    """Everything that `mango inspect` tells, as JSON-able facts. Runs have the seeds from `seed` on."""
    settings = settings or EvaluationArgs()
    seen = probe(policy, workload, settings, seed=seed, budget=budget)
    short = replace(settings, horizon=min(seen.steps, TREE_STEPS))
    others = [probe(policy, workload, short, seed=seed + i, budget=budget) for i in range(1, LEARNED_RUNS)]
    moved = {name: value for name, value in sensitivity(policy, seen).items() if math.isfinite(value)}
    return {
        **facts(policy),
        "probe": {
            "workload": workload,
            "rule": settings.rule,
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
        "tree": tree_of(policy, [seen, *others], short, seed=seed + LEARNED_RUNS, budget=budget, depth=depth),
    }
