"""Promises about a policy told as a decision tree: it is scikit-learn's, it is a policy, and its fidelity is counted as said."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.tree import DecisionTreeRegressor
from torch import Generator, Tensor

from mango import MANGO
from mango.config import KNOBS, LADDER, NVEC
from mango.features import FEATURE_DIM, FEATURE_INDEX, FEATURES
from mango.networks import PolicyNetwork
from mango.policies import Choice, ScoringPolicy, WaterFillingPolicy, as_action
from mango.policy_file import freeze, load_policy
from train_policy.evaluate import EvaluationArgs
from train_policy.inspection import probe
from train_policy.tree import LEAF, TreePolicy, distil_tree, fidelity, network_of, preferred, rules

R = len(LADDER)
BEST, WORST = R - 1, 0


@dataclass
class Made:
    """A made-up run whose budget gives every layer its best-scored rung, but never the last one where `cut`."""

    observations: list[Tensor]
    answers: list[Tensor]
    cut: bool = False

    @property
    def rungs(self) -> NDArray[np.int64]:
        return np.array([self.resolve(answer, obs) for answer, obs in zip(self.answers, self.observations, strict=True)])

    def resolve(self, answer: Choice, observation: Tensor) -> NDArray[np.int64]:
        assert isinstance(answer, Tensor)
        best = preferred(answer, LADDER)
        return np.minimum(best, R - 2) if self.cut else best


def observed(seed: int, decisions: int = 20, layers: int = 5) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    return list(torch.rand(decisions, layers, FEATURE_DIM, generator=generator))


def rule_of(obs: Tensor) -> Tensor:
    """Scores of a policy of two questions: late heads are dear, everything else in the middle or cheap by depth."""
    late = (obs[:, FEATURE_INDEX["progress"]] > 0.5).long()
    deep = (obs[:, FEATURE_INDEX["depth"]] > 0.25).long()
    return torch.eye(R)[torch.where(late == 1, BEST, torch.where(deep == 1, R // 2, WORST))]


def made(seed: int, cut: bool = False, knobs: bool = False) -> Made:
    observations = observed(seed)
    answers = [rule_of(obs) for obs in observations]
    if knobs:
        answers = [as_action([LADDER[int(rung)] for rung in answer.argmax(1)]) for answer in answers]
    return Made(observations, answers, cut)


@pytest.mark.parametrize("knobs", [False, True])
def test_g11_a_policy_of_two_questions_is_told_exactly(knobs: bool) -> None:
    learned = [made(seed, knobs=knobs) for seed in (0, 1)]
    tree = distil_tree(learned)
    asked = {FEATURES[i].name for i in tree.feature.tolist() if i != LEAF}
    assert asked == {"progress", "depth"} and (tree.feature == LEAF).sum() == 3
    found = fidelity(tree, learned, [made(2, knobs=knobs)])
    assert found.preferred >= 0.97 and found.applied == found.preferred and found.decisions == 100
    assert found.preferred_constant < 0.7 and found.preferred_constant_rung == LADDER.names[BEST]
    text = rules(tree, learned)
    assert text[0].startswith("if progress <= ") and float(text[0].split()[-1].rstrip(":")) == pytest.approx(0.5, abs=0.02)
    assert any(f"prefers {LADDER.names[R // 2]}" in line and f"{LADDER.names[R // 2]} 100%" in line for line in text)


def test_fidelity_is_counted_under_the_budget_too() -> None:
    learned, held_out = [made(0, cut=True)], made(1, cut=True)
    found = fidelity(distil_tree(learned), learned, [held_out])
    assert found.applied_constant_rung == LADDER.names[R - 2]                 # what the budget makes of the best one
    assert found.applied_constant == float((held_out.rungs == R - 2).mean())
    assert found.applied >= found.preferred > found.applied_constant


def test_a_constant_policy_is_one_leaf_and_no_better_than_its_constant() -> None:
    observations = observed(0)
    run = Made(observations, [torch.eye(R)[3].expand(len(obs), -1) for obs in observations])
    tree = distil_tree([run])
    found = fidelity(tree, [run], [run])
    assert tree.feature.tolist() == [LEAF] and rules(tree, [run])[0].startswith(f"prefers {LADDER.names[3]}")
    assert found.preferred == found.preferred_constant == found.applied_mean_scores == 1.0


def test_the_tree_falls_into_the_leaves_that_scikit_learn_does() -> None:
    x = torch.randn(500, FEATURE_DIM, generator=Generator().manual_seed(0))
    fitted = DecisionTreeRegressor(max_depth=6, random_state=0).fit(x.numpy(), x[:, :3].prod(1).numpy())
    nodes = fitted.tree_
    tree = TreePolicy(
        torch.from_numpy(np.where(nodes.children_left < 0, LEAF, nodes.feature).astype(np.int64)),
        torch.from_numpy(nodes.threshold), torch.from_numpy(nodes.children_left.astype(np.int64)),
        torch.from_numpy(nodes.children_right.astype(np.int64)), torch.zeros(nodes.node_count, R, dtype=torch.float64),
    )  # fmt: skip
    other = torch.randn(500, FEATURE_DIM, generator=Generator().manual_seed(1))
    assert tree.leaves(other).tolist() == fitted.apply(other.numpy()).tolist()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_tree_is_no_deeper_than_asked(depth: int) -> None:
    observations = observed(0)
    run = Made(observations, [obs[:, :R] * obs[:, -R:] for obs in observations])
    tree = distil_tree([run], depth=depth)
    assert 1 < (tree.feature == LEAF).sum() <= 2**depth
    assert max(len(line) - len(line.lstrip()) for line in rules(tree, [run])) <= 4 * depth


def test_forbidden_rungs_do_not_spoil_a_tree() -> None:
    observations = observed(0)
    answers = [rule_of(obs) for obs in observations]
    for answer in answers:
        answer[:, 1] = -torch.inf
    assert distil_tree([Made(observations, answers)]).value.isfinite().all()


def test_a_tree_is_a_policy_for_the_optimizer_under_its_budget() -> None:
    tree = distil_tree([made(0)])
    assert isinstance(tree, ScoringPolicy)
    assert tree.act(observed(3)[0]).shape == (5, len(KNOBS)) and bool((tree.act(observed(3)[0]) < torch.tensor(NVEC)).all())
    model = torch.nn.Linear(64, 64)
    optimizer = MANGO(model.parameters(), policy=tree, memory_budget=0.3, policy_update_freq=2, strict=True)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().mean().backward()
        optimizer.step()
        assert optimizer.state_bytes() <= optimizer.memory_budget


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_tree_is_a_network_that_is_frozen_and_decides_as_it_does(depth: int, tmp_path: Path) -> None:
    tree = distil_tree([made(0)], depth=depth)
    seen, unseen = torch.cat(made(0).observations), torch.cat(observed(7, decisions=60))
    network = network_of(tree, seen)
    assert network.architecture["architecture"] == "tree" and network.architecture["depth"] <= depth
    policy = load_policy(freeze(network, tmp_path / "tree", card={}))
    wanted, found = tree.scores(unseen), policy.scores(unseen).double()
    assert torch.allclose(found - found[:, -1:], wanted - wanted[:, -1:], atol=1e-5)
    assert torch.equal(policy.act(unseen), tree.act(unseen)) and policy.state_dict() == {}
    rare = torch.full((1, FEATURE_DIM), 1e3)                  # no matter how few observations lie beyond a threshold
    far = network_of(tree, torch.cat([torch.zeros(10_000, FEATURE_DIM), seen])).eval()
    for obs in (unseen, rare):
        logits = far(obs).rung_logits.double()
        assert torch.allclose(logits, tree.scores(obs) - tree.scores(obs)[:, -1:], atol=1e-5)
    odd = torch.full((1, FEATURE_DIM), torch.nan)
    assert bool(policy.scores(odd).isfinite().all())


def test_a_trees_questions_stay_and_its_leaves_learn() -> None:
    network = network_of(distil_tree([made(0)], depth=2), torch.cat(made(0).observations))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(torch.cat(observed(1))).rung_logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert "rung_head.weight" in moved and not any(name.startswith("trunk.") for name in moved)
    with pytest.raises(ValueError, match=r"depth=11 is not an integer in 1\.\.10"):
        PolicyNetwork("tree", depth=11)


def test_what_cannot_be_told_as_a_tree_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="depth of at least 1"):
        distil_tree([made(0)], depth=0)
    with pytest.raises(ValueError, match="0 runs"):
        distil_tree([])
    with pytest.raises(ValueError, match="at least one run that the tree has not"):
        fidelity(distil_tree([made(0)]), [made(0)], [])


def test_a_real_run_answers_again_what_it_decided() -> None:
    options: dict[str, Any] = {"settings": EvaluationArgs(horizon=60), "budget": 0.15}
    seen = probe(WaterFillingPolicy(), "digits_mlp", seed=0, **options)
    for answer, obs, rungs in zip(seen.answers, seen.observations, seen.rungs, strict=True):
        assert seen.resolve(answer, obs).tolist() == rungs.tolist()
    tree = distil_tree([seen])
    alone = probe(tree, "digits_mlp", seed=0, **options)
    for obs, rungs in zip(alone.observations, alone.rungs, strict=True):
        assert seen.resolve(tree.scores(obs), obs).tolist() == rungs.tolist()
    assert fidelity(tree, [seen], [seen]).applied >= 0.5
