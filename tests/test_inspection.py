"""Promises about `mango inspect`: every number is of a real run; what a policy listens to and follows is found, or denied."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mango.config import LADDER
from mango.networks import PolicyNetwork
from mango.policies import AdaptivePolicy, feature, phases
from mango.policy_file import FrozenPolicy
from train_policy.evaluate import EvaluationArgs
from train_policy.inspection import decision_points, inspect_policy, phase_separation, probe, sensitivity, silhouette

THREE = [LADDER.index(rung) for rung in ("full", "m8v8", "m4v0")]


class Wired(FrozenPolicy):
    """A frozen policy whose scores are a given function of the observation."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__(PolicyNetwork(seed=1), name="wired")
        self.scores = answer


def run_of(steps: int, rule: str = "adamw") -> EvaluationArgs:
    return EvaluationArgs(horizon=steps, rule=rule)


def test_inspect_finds_the_one_feature_that_a_policy_listens_to() -> None:
    slope = torch.linspace(1, -1, len(LADDER))

    def late(obs: Tensor) -> Tensor:
        return (feature(obs, "progress")[:, None] - 0.3) * slope

    found = inspect_policy(Wired(late), "digits_mlp", run_of(40), budget=2.0)
    assert next(iter(found["sensitivity"])) == "progress"
    assert all(value == 0 for name, value in found["sensitivity"].items() if name != "progress")
    assert len(found["probe"]["rungs"]) == len(found["probe"]["losses"]) == 4
    tree = found["tree"]
    assert tree["rules"][0].startswith("if ") and tree["held_out_seed"] == 2
    assert 1 >= tree["fidelity"]["preferred"] > tree["fidelity"]["preferred_constant"]
    assert tree["val_loss"]["tree"] == pytest.approx(tree["val_loss"]["policy"], rel=0.5)
    assert set(found["phase_separation"]) == {"thirds", "phases"}
    assert json.loads(json.dumps(found))["name"] == "wired"


def test_c18_phases_that_decisions_follow_are_found_separable() -> None:
    by_phase = torch.eye(len(LADDER))[THREE]
    found = phase_separation(probe(Wired(lambda obs: by_phase[phases(obs)]), "digits_mlp", run_of(100), budget=2.0))["phases"]
    assert found["silhouette"] > 0 and found["separable"] and found["verdict"].startswith("separable")
    assert {"early", "middle"} <= set(found["by_label"])


def test_c18_thirds_of_a_run_that_decisions_follow_are_found_separable() -> None:
    by_third = torch.eye(len(LADDER))[THREE]

    def scores(obs: Tensor) -> Tensor:
        return by_third[(feature(obs, "progress") * 3 + 1e-4).long()]

    found = phase_separation(probe(Wired(scores), "digits_mlp", run_of(90), budget=2.0))["thirds"]
    assert found["silhouette"] == pytest.approx(1.0)
    assert [list(shares) for shares in found["by_label"].values()] == [["full"], ["m8v8"], ["m4v0"]]


def test_c18_phases_that_decisions_do_not_tell_apart_are_reported_as_such() -> None:
    constant = FrozenPolicy(PolicyNetwork(seed=0))
    with torch.no_grad():
        constant.network.rung_head.weight.zero_()
        constant.network.rung_head.bias.copy_(torch.eye(len(constant.ladder))[7])
    seen = probe(constant, "digits_mlp", run_of(60), budget=2.0)
    assert set(sensitivity(constant, seen).values()) == {0.0}
    for labels in phase_separation(seen).values():
        assert labels["silhouette"] == 0 and labels["verdict"].startswith("not separable")


def test_c18_one_phase_alone_is_neither() -> None:
    seen = probe(Wired(lambda obs: feature(obs, "depth")[:, None].expand(-1, len(LADDER))), "digits_mlp", run_of(10), budget=2.0)
    for labels in phase_separation(seen).values():
        assert labels["silhouette"] is None and labels["separable"] is None and labels["verdict"].startswith("undefined")


def test_a_decision_is_the_share_of_each_kind_on_each_rung() -> None:
    by_depth = torch.eye(len(LADDER))[THREE[:2]]
    seen = probe(Wired(lambda obs: by_depth[(feature(obs, "depth") > 0.1).long()]), "digits_mlp", run_of(20), budget=2.0)
    points = decision_points(seen).reshape(2, len(set(seen.kinds)), len(LADDER))
    assert (points.sum(2) == 1).all()
    linear = points[:, sorted(set(seen.kinds)).index("linear")]
    assert np.flatnonzero(linear[0]).tolist() == sorted(THREE[:2]) and linear[0].max() == 0.5     # of two layers, one each


def test_only_tensors_can_be_watched() -> None:
    with pytest.raises(TypeError, match="can be watched"):
        probe(AdaptivePolicy(), "digits_mlp", run_of(10))


def test_the_silhouette_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import silhouette_score

    rng = np.random.default_rng(0)
    cloud, labels = rng.normal(size=(40, 3)), rng.integers(3, size=40)
    assert silhouette(cloud, labels) == pytest.approx(silhouette_score(cloud, labels, metric="manhattan"))


def test_a_run_under_another_rule_is_watched_where_it_is_asked_for() -> None:
    indifferent = Wired(lambda obs: torch.zeros(len(obs), len(LADDER)))
    assert inspect_policy(indifferent, "digits_mlp", run_of(20, "muon"), budget=2.0)["probe"]["rule"] == "muon"
    seen = {rule: probe(indifferent, "digits_mlp", run_of(10, rule), budget=2.0).observations[0] for rule in ("adamw", "muon")}
    assert bool(feature(seen["muon"], "rule_muon").any()) and not bool(feature(seen["adamw"], "rule_muon").any())
    with pytest.raises(ValueError, match="muno"):
        probe(indifferent, "digits_mlp", run_of(20, "muno"))
