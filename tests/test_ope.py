"""Off-policy evaluation: on runs whose rewards depend on the rung alone the truth is known, and the estimates find it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from mango.config import LADDER
from mango.features import FEATURE_DIM, FEATURE_INDEX
from mango.networks import PolicyNetwork
from mango.policy_file import FrozenPolicy, freeze
from mango_env.cache import TrajectoryCache, build_cache
from mango_env.episode import INFOS, Episode, info_dtype
from mango_env.reward import Reward
from mango_env.store import TrajectoryWriter
from tests.mixed_data import facts
from train_policy.cli import app
from train_policy.ope import OpeArgs, decider, evaluate_offline, importance_sampling

STEPS, RUNS, LAYERS = 4, 60, 2
PAYS = np.linspace(0.2, 1.0, len(LADDER))                # reward of each rung, at every decision
ARGS = OpeArgs(updates=600, batch_size=128, target_updates=50, learning_rate=3e-3, hidden=(32,))


def write(root: Path, *, known: bool = True, rung: int | None = None) -> TrajectoryCache:
    """Runs of a uniform behaviour (or one rung), whose probabilities are recorded where `known`. Noise hides what a rung pays."""
    rng, reward = np.random.default_rng(0), Reward()
    with TrajectoryWriter(root, task="paid", policy="uniform", reward=reward) as writer:
        for run in range(RUNS):
            for layer in range(LAYERS):
                seen = np.zeros((STEPS + 1, FEATURE_DIM), np.float32)
                seen[:, FEATURE_INDEX["progress"]] = np.arange(STEPS + 1) / STEPS
                rungs = rng.integers(len(LADDER), size=STEPS) if rung is None else np.full(STEPS, rung)
                infos = {name: np.zeros(STEPS, info_dtype(name)) for name in INFOS}
                infos["rung"] = rungs.astype(np.int16)
                infos["behavior_logp"][:] = -np.log(len(LADDER)) if known else 0.0
                writer.add(
                    Episode(
                        observations=seen,
                        actions=np.array([LADDER[int(r)].to_action() for r in rungs], np.int8),
                        rewards=(PAYS[rungs] + rng.normal(0, 0.1, STEPS)).astype(np.float32),
                        terminations=np.arange(STEPS) == STEPS - 1,
                        truncations=np.zeros(STEPS, bool),
                        infos=infos,
                        attributes=facts(run, layer, LAYERS, reward) | {"budget_bytes": 5000},
                    )
                )
    return build_cache(root)


@pytest.fixture(scope="module")
def paid(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    return write(tmp_path_factory.mktemp("paid") / "store")


def leaning(logits: NDArray[np.float64]) -> PolicyNetwork:
    """A network with the same rung logits everywhere."""
    network = PolicyNetwork(hidden=(8,))
    with torch.no_grad():
        network.rung_head.weight.zero_()
        network.rung_head.bias.copy_(torch.from_numpy(logits))
    return network


def test_fitted_q_evaluation_orders_two_policies_and_is_within_a_tenth_of_the_truth(paid: TrajectoryCache) -> None:
    good, bad = 11, 3
    found = {rung: evaluate_offline(f"fixed:{rung}", paid, ARGS) for rung in (good, bad)}
    for rung, result in found.items():
        assert result.policy == f"fixed:{LADDER.names[rung]}" and result.decides == "greedy"
        assert result.fqe.value == pytest.approx(STEPS * PAYS[rung], rel=0.1)
        assert result.recorded.value == pytest.approx(STEPS * PAYS.mean(), rel=0.1)
        assert result.recorded.low < result.recorded.value < result.recorded.high  # type: ignore[operator]
    assert found[good].fqe.value > found[bad].fqe.value  # type: ignore[operator]
    assert [row["workload"] for row in found[good].settings] == ["easy", "hard"]
    json.dumps(found[good].to_dict(), allow_nan=False)


def test_a_policy_that_draws_is_valued_by_its_probabilities_both_ways(paid: TrajectoryCache) -> None:
    logits = 2 * PAYS
    probabilities = np.exp(logits) / np.exp(logits).sum()
    truth = STEPS * float(probabilities @ PAYS)
    result = evaluate_offline(FrozenPolicy(leaning(logits)), paid, OpeArgs(True, 1.0, 600, 128, 3e-3, 50, (32,)))
    assert result.decides == "softmax"
    assert result.fqe.value == pytest.approx(truth, rel=0.1)
    assert result.importance.value == pytest.approx(truth, rel=0.1)
    assert result.importance.low < truth < result.importance.high  # type: ignore[operator]
    assert result.importance.note == "" and 1 < result.importance.effective < RUNS * LAYERS  # type: ignore[operator]


def test_the_behaviour_itself_has_its_recorded_return_by_importance_sampling(paid: TrajectoryCache) -> None:
    """Uniform weights: the estimate is the mean, to float32's rounding of the recorded logarithms."""
    decide = decider(leaning(np.zeros(len(LADDER))), paid.header.ladder, softmax=True)
    for gamma in (1.0, 0.5):
        found = importance_sampling(decide, paid, gamma)
        assert found.value == pytest.approx(paid.returns(gamma).mean(), rel=1e-5)
        assert found.effective == pytest.approx(RUNS * LAYERS, rel=1e-5)


def test_importance_sampling_says_why_it_cannot_be_done(paid: TrajectoryCache, tmp_path: Path) -> None:
    silent = importance_sampling(decider("fixed:0", LADDER), write(tmp_path / "silent", known=False))
    assert silent.value is None and "no log-probabilities" in silent.note
    elsewhere = importance_sampling(decider("fixed:0", LADDER), write(tmp_path / "one", rung=5))
    assert elsewhere.value is None and "up to decision 0" in elsewhere.note


def test_refits_to_resampled_runs_give_the_fit_an_interval(paid: TrajectoryCache) -> None:
    few = OpeArgs(updates=20, hidden=(8,))
    bare, found = (evaluate_offline("fixed:2", paid, replace(few, refits=n)).fqe for n in (0, 2))
    assert (bare.low, bare.high) == (None, None) and "refits" in bare.note
    assert found.value == bare.value and found.low < found.value < found.high  # type: ignore[operator]
    with pytest.raises(ValueError, match="refits=1"):
        OpeArgs(refits=1)


def test_equal_arguments_give_equal_estimates_and_leave_the_callers_random_numbers(paid: TrajectoryCache) -> None:
    before, few = torch.get_rng_state(), OpeArgs(updates=20, hidden=(8,))
    assert evaluate_offline("fixed:2", paid, few).fqe == evaluate_offline("fixed:2", paid, few).fqe
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (PolicyNetwork("lstm", hidden_dim=8, num_layers=1), "a policy with memory"),
        (FrozenPolicy(PolicyNetwork(hidden=(8,)), head="knobs"), "decides by its knobs head"),
        (PolicyNetwork(hidden=(8,), rungs=3), "the network scores 3"),
        ("water-filling", "has no rung probabilities"),
        ("nobody", "unknown policy 'nobody'"),
    ],
)
def test_a_policy_that_cannot_be_valued_is_named(policy: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decider(policy, LADDER)


def test_the_command_prints_a_table_and_json(paid: TrajectoryCache, tmp_path: Path) -> None:
    path = freeze(leaning(PAYS), tmp_path / "mine.safetensors", card={})
    words = ["ope", "--data", str(paid.path.parent.parent), "--policy", str(path), "--policy", "fixed:1", "--updates", "10"]
    shown = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "found.json")])
    assert shown.exit_code == 0, shown.output
    assert all(text in shown.stdout for text in ("(recorded)", "mine", "fitted Q evaluation", "importance sampling"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["policy"] for one in found] == ["mine", f"fixed:{LADDER.names[1]}"]
    assert found[0]["recorded"]["runs"] == RUNS
