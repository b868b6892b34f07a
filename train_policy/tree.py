"""A policy told as a small decision tree: what it learned from the policy's own decisions, how faithful it is, its rules.

Where the policy scores rungs, the tree predicts the scores, so that it is a policy itself: the budget's knapsack decides by
it as it does by the original. Where the policy names configs, the tree predicts how likely each rung is. A tree sees one
observation and remembers nothing, so what a policy with memory knows of earlier decisions is lost on it. Of features that go
together it names one, not always the one that the policy listens to: its sensitivity tells that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.config import LADDER, CompressionConfig, Ladder
from mango.features import FEATURES
from mango.networks import PolicyNetwork
from mango.policies import Choice, best_scored
from mango.trunks import OBSERVATION_CLIP, TreeTrunk
from train_policy.distil import distil_scores, score_spread

DEPTH = 4
LEAST_SHARE = 0.02                                       # of the decisions it learns from: no leaf has fewer
LEAST_GAIN = 1e-3                                        # of the answers' variance: a question that explains less is not asked
UNLIKELY = 0.01                                          # decisions added to each rung's count, so that no score is -inf
LEAF = -1


class DecidedRun(Protocol):
    """A real run, decided by the policy: T decisions about L layers."""

    @property
    def observations(self) -> Sequence[Tensor]: ...                            # T of (L, 64)

    @property
    def answers(self) -> Sequence[Tensor]: ...                                 # T of scores (L, R) or knob indices (L, K)

    @property
    def rungs(self) -> NDArray[np.int64]: ...                                  # (T, L) what was applied

    def resolve(self, answer: Choice, observation: Tensor) -> NDArray[np.int64]:
        """The rungs (L,) that the budget of this run makes of an answer."""
        ...


@dataclass(frozen=True, eq=False)
class TreePolicy:
    """A tree whose leaves score the rungs. Nodes are numbered; node 0 is the root.

    It is a policy of its own, `MANGO(..., policy=tree)`, and needs torch alone.
    """

    feature: Tensor                                      # (N,) int64: the feature asked for, or LEAF
    threshold: Tensor                                    # (N,) float64: at most that goes left
    left: Tensor                                         # (N,) int64
    right: Tensor                                        # (N,) int64
    value: Tensor                                        # (N, R) float64
    ladder: Ladder = LADDER

    def leaves(self, obs: Tensor) -> Tensor:
        """The leaf (L,) that each observation (L, 64) falls into."""
        at = torch.zeros(len(obs), dtype=torch.int64)
        while bool((self.feature[at] != LEAF).any()):
            inner = self.feature[at] != LEAF
            asked = obs.double().gather(1, self.feature[at].clamp(min=0)[:, None])[:, 0]
            below = torch.where(asked <= self.threshold[at], self.left[at], self.right[at])
            at = torch.where(inner, below, at)
        return at

    def scores(self, obs: Tensor) -> Tensor:
        return self.value[self.leaves(obs)]

    def act(self, obs: Tensor) -> Tensor:
        return best_scored(self.scores(obs), self.ladder)

    def reset(self) -> None:
        """Nothing is remembered."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, with the names of features and rungs."""
        names = [None if i == LEAF else FEATURES[i].name for i in self.feature.tolist()]
        lists = {name: getattr(self, name).tolist() for name in ("threshold", "left", "right", "value")}
        return {"feature": names, **lists, "rungs": list(self.ladder.names)}


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Shares of decisions about layers, in runs that the tree has not learned from, in which it decides as the policy does.

    `preferred`: the best-scored rung, before any budget; `applied`: what the budget makes of all layers' scores together.
    Beside them what needs no tree: always the rung that is most frequent in the runs learned from, or, under the budget,
    the same mean scores for every layer.
    """

    decisions: int
    preferred: float
    preferred_constant: float
    preferred_constant_rung: str
    applied: float
    applied_constant: float
    applied_constant_rung: str
    applied_mean_scores: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def network_of(tree: TreePolicy, observations: Tensor, seed: int = 0) -> PolicyNetwork:
    """The tree as a network that can be frozen: its questions are the trunk's, its leaves' scores the rung head's weights.

    The normaliser is fitted to `observations` (N, 64), and the knob and the value head learn from the scores there; scores are
    told about their last rung, which no knapsack and no softmax notices.
    """
    depth = max(_depth(tree), 1)
    network = PolicyNetwork("tree", depth=depth, rungs=len(tree.ladder))
    network.fit_normaliser(observations)
    trunk, leaves = network.trunk, 2**depth
    assert isinstance(trunk, TreeTrunk)
    mean, std = trunk.normaliser.mean, trunk.normaliser.std
    for asked, threshold in zip(tree.feature.tolist(), tree.threshold.tolist(), strict=True):
        if asked != LEAF:                                # no threshold beyond what the normaliser lets through
            std[asked] = max(float(std[asked]), abs(threshold - float(mean[asked])) / (OBSERVATION_CLIP / 2))
    scores = torch.zeros(leaves, len(tree.ladder), dtype=torch.float64)
    places = {0: 0}                                      # of the trunk's questions, leaves behind them: the tree's node
    for place in range(2 * leaves - 1):
        node = places[place]
        asked = int(tree.feature[node])
        if place >= leaves - 1:
            scores[place - leaves + 1] = tree.value[node] - tree.value[node, -1]
        elif asked == LEAF:                              # whatever is answered leads to its scores
            places |= {2 * place + 1: node, 2 * place + 2: node}
        else:
            trunk.feature[place], trunk.threshold[place] = asked, (tree.threshold[node].float() - mean[asked]) / std[asked]
            places |= {2 * place + 1: int(tree.left[node]), 2 * place + 2: int(tree.right[node])}
    with torch.no_grad():
        network.rung_head.weight.copy_(scores.T)
        network.rung_head.bias.zero_()
        wanted = network(observations).rung_logits
        spread = score_spread(wanted)
    distil_scores(network, observations, wanted, values=(wanted / spread).amax(1), spread=spread, ladder=tree.ladder, seed=seed)
    return network.eval()


def _depth(tree: TreePolicy, node: int = 0) -> int:
    if int(tree.feature[node]) == LEAF:
        return 0
    return 1 + max(_depth(tree, int(tree.left[node])), _depth(tree, int(tree.right[node])))


def distil_tree(runs: Sequence[DecidedRun], *, depth: int = DEPTH, ladder: Ladder = LADDER) -> TreePolicy:
    """A tree of at most `depth` questions that fits the policy's answers in these runs: grown greedily, by scikit-learn.

    Scores are fitted as the knapsack reads them: what one more rung gains, between the rungs that decisions ended on. A leaf
    has the median scores of its decisions. Fitted as they are, the worst rung's scores, the most spread and never taken, would
    ask all the questions.
    """
    if depth < 1 or not runs:
        raise ValueError(f"a tree needs a depth of at least 1 and a run to learn from; got depth={depth}, {len(runs)} runs")
    try:
        from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
    except ImportError as error:
        raise ImportError('a decision tree needs scikit-learn: pip install "mango-optim[train]"') from error
    observations = torch.cat([obs for run in runs for obs in run.observations]).numpy()                  # (N, 64)
    answers = [answer for run in runs for answer in run.answers]
    wanted = np.concatenate([preferred(answer, ladder) for answer in answers])                           # (N,)
    least = max(1, round(LEAST_SHARE * len(observations)))
    options = {"max_depth": depth, "min_samples_leaf": least, "min_impurity_decrease": LEAST_GAIN, "random_state": 0}
    if answers[0].is_floating_point():
        scores = _centred(torch.cat(answers)).numpy()                                                    # (N, R)
        decided = np.concatenate([wanted, *(run.rungs.reshape(-1) for run in runs)])
        fitted = DecisionTreeRegressor(**options).fit(observations, _steps(scores, decided))
        ends = fitted.apply(observations)
        value = np.zeros((fitted.tree_.node_count, len(ladder)))
        for end in np.unique(ends):
            value[end] = np.median(scores[ends == end], 0)
    else:
        fitted = DecisionTreeClassifier(**options).fit(observations, wanted)
        share = fitted.tree_.value.reshape(fitted.tree_.node_count, -1)
        value = np.zeros((fitted.tree_.node_count, len(ladder)))
        value[:, fitted.classes_] = share / share.sum(1, keepdims=True) * fitted.tree_.n_node_samples[:, None]
        value = np.log(value + UNLIKELY)
    nodes = fitted.tree_
    leaf = nodes.children_left < 0
    return TreePolicy(
        feature=torch.from_numpy(np.where(leaf, LEAF, nodes.feature).astype(np.int64)),
        threshold=torch.from_numpy(np.where(leaf, 0.0, nodes.threshold)),
        left=torch.from_numpy(nodes.children_left.astype(np.int64)),
        right=torch.from_numpy(nodes.children_right.astype(np.int64)),
        value=torch.from_numpy(value),
        ladder=ladder,
    )


def fidelity(tree: TreePolicy, learned: Sequence[DecidedRun], held_out: Sequence[DecidedRun]) -> Fidelity:
    """How often the tree decides as the policy did in the held-out runs; `learned`: the runs that the tree is from."""
    if not held_out:
        raise ValueError("fidelity needs at least one run that the tree has not learned from")
    before = np.concatenate([preferred(a, tree.ladder) for run in learned for a in run.answers])
    usual = int(np.bincount(before).argmax())
    usual_applied = int(np.bincount(np.concatenate([run.rungs.reshape(-1) for run in learned])).argmax())
    mean = torch.cat([tree.scores(obs) for run in learned for obs in run.observations]).mean(0)          # (R,)
    same: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in ("preferred", "constant", "applied", "usual", "mean")}
    for run in held_out:
        for obs, answer, applied in zip(run.observations, run.answers, run.rungs, strict=True):
            wanted, scores = preferred(answer, tree.ladder), tree.scores(obs)
            same["preferred"].append(preferred(scores, tree.ladder) == wanted)
            same["constant"].append(wanted == usual)
            same["applied"].append(run.resolve(scores, obs) == applied)
            same["usual"].append(applied == usual_applied)
            same["mean"].append(run.resolve(mean.expand(len(obs), -1), obs) == applied)
    share = {name: float(np.concatenate(found).mean()) for name, found in same.items()}
    return Fidelity(
        decisions=sum(run.rungs.size for run in held_out),
        preferred=share["preferred"],
        preferred_constant=share["constant"],
        preferred_constant_rung=tree.ladder.names[usual],
        applied=share["applied"],
        applied_constant=share["usual"],
        applied_constant_rung=tree.ladder.names[usual_applied],
        applied_mean_scores=share["mean"],
    )


def preferred(answer: Tensor, ladder: Ladder) -> NDArray[np.int64]:
    """The rung (L,) that an answer would have without a budget: the best-scored, or the nearest to the config named."""
    if answer.is_floating_point():
        best: NDArray[np.int64] = answer.argmax(1).numpy()
        return best
    return np.array([ladder.nearest(CompressionConfig.from_action(row)) for row in answer.tolist()], np.int64)


def rules(tree: TreePolicy, runs: Sequence[DecidedRun]) -> list[str]:
    """The tree as lines to read: its questions, and at each leaf the best-scored rungs and what the budget made of them.

    `runs` are those that shares at the leaves are counted in.
    """
    found = torch.cat([tree.leaves(obs) for run in runs for obs in run.observations]).numpy()
    applied = np.concatenate([run.rungs.reshape(-1) for run in runs])

    def walk(node: int, indent: str) -> Iterator[str]:
        i = int(tree.feature[node])
        if i == LEAF:
            yield f"{indent}{_leaf(tree, node, applied[found == node])}"
            return
        name, limit = FEATURES[i].name, float(tree.threshold[node])
        one_hot = FEATURES[i].unit == "one-hot"
        yield f"{indent}if not {name}:" if one_hot else f"{indent}if {name} <= {limit:.4g}:"
        yield from walk(int(tree.left[node]), f"{indent}    ")
        yield f"{indent}else:"
        yield from walk(int(tree.right[node]), f"{indent}    ")

    return list(walk(0, ""))


def _leaf(tree: TreePolicy, node: int, applied: NDArray[np.int64]) -> str:
    """The two best rungs of a leaf, and the three that were applied most."""
    names = tree.ladder.names
    first, second = tree.value[node].argsort(descending=True, stable=True)[:2].tolist()
    text = f"prefers {names[first]}, then {names[second]}"
    if not len(applied):
        return text
    count = np.bincount(applied, minlength=len(names))
    shares = ", ".join(f"{names[r]} {count[r] / len(applied):.0%}" for r in np.argsort(-count, kind="stable")[:3] if count[r])
    return f"{text}; applied in {len(applied)} decisions: {shares}"


def _steps(scores: NDArray[np.float64], decided: NDArray[np.int64]) -> NDArray[np.float64]:
    """What each step from a used rung to the next gains (N, steps), all steps of one spread, large gains compressed."""
    count = np.bincount(decided, minlength=scores.shape[1])
    used = np.flatnonzero(count >= LEAST_SHARE * len(decided))
    used = used if len(used) > 1 else np.arange(scores.shape[1])
    gains = np.diff(scores[:, used], axis=1)
    gains = np.arcsinh(gains / np.maximum(np.median(np.abs(gains), 0), np.finfo(np.float64).tiny))
    spread: NDArray[np.float64] = gains / np.maximum(gains.std(0), np.finfo(np.float32).eps)
    return spread


def _centred(scores: Tensor) -> Tensor:
    """Scores less their mean over the rungs, which no allocation depends on; what is forbidden scores as the worst allowed."""
    scores = scores.double()
    worst = torch.where(scores.isfinite(), scores, torch.inf).amin(1, keepdim=True)
    scores = torch.where(scores.isfinite(), scores, worst)
    return scores - scores.mean(1, keepdim=True)
