"""Offline RL: every algorithm of the table improves on what it was given, and says what it cannot learn from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mango.config import LADDER
from mango.networks import PolicyNetwork
from mango.policy_file import load_policy
from mango_env.cache import TrajectoryCache, build_cache
from tests.mixed_data import answer, fresh_return, write_puzzle
from train_policy import bc, offline
from train_policy.batches import run_returns
from train_policy.bc import BcArgs
from train_policy.distil import knob_marginals, nearest_targets, positions, rung_knobs
from train_policy.fitting import TrainingInterrupted
from train_policy.offline import ALGOS, OfflineArgs, train
from train_policy.transfer import greedy

NATIVE = ["iql", "awr", "cql"]


def solved_share(network: PolicyNetwork, cache: TrajectoryCache, head: str = "rung") -> float:
    """How often the greedy decision is the one that pays; 1 in 10 by chance."""
    seen = np.concatenate([episode["observations"][:-1] for episode in cache.episodes()])
    chosen = greedy(network, torch.from_numpy(seen), head)
    if head == "rung":
        return float((chosen[:, 0].numpy() == answer(seen)).mean())
    actions = torch.tensor([rung.to_action() for rung in cache.header.ladder])[torch.from_numpy(answer(seen))]
    return float((chosen == actions).all(1).float().mean())


@pytest.mark.parametrize("algo", NATIVE)
def test_a_native_algorithm_finds_what_pays_in_random_data(algo: str, riddle: TrajectoryCache) -> None:
    """No recorded run is good: imitation of the best would stay near chance."""
    args = OfflineArgs(algo=algo, updates=400, batch_size=128, learning_rate=3e-3, gamma=0.0, temperature=0.2)
    result = train(PolicyNetwork(hidden=(32,)), riddle, args)
    assert solved_share(result.network, riddle) > 0.7
    assert result.head == "rung" and result.digest == riddle.digest
    assert result.metrics["reward_scale"] > 0 and result.metrics["runs"] == 30
    assert solved_share(result.network, riddle, "knobs") > 0.5


@pytest.mark.parametrize("algo", [name for name in ALGOS if name != "additive"])    # which looks at the final loss alone
def test_c12_pre_collected_trajectories_train_every_algorithm_above_the_behaviour_mean(
    algo: str, recorded: TrajectoryCache, tmp_path: Path
) -> None:
    """Real runs of mixed quality, recorded as HDF5; the frozen result decides fresh runs."""
    args = OfflineArgs(algo=algo, updates=300, batch_size=128, learning_rate=2e-3)
    result = train(PolicyNetwork(hidden=(32,)), recorded, args)
    assert fresh_return(result.network, tmp_path, result.head) > float(run_returns(recorded).mean())


def test_c12_cloning_the_best_runs_is_above_the_behaviour_mean(recorded: TrajectoryCache, tmp_path: Path) -> None:
    result = bc.train(PolicyNetwork(hidden=(64, 64)), recorded, BcArgs())
    assert fresh_return(result.network, tmp_path) > float(run_returns(recorded).mean())


@pytest.mark.parametrize("algo", ["iql", "awr"])
def test_a_policy_with_memory_learns_from_sequences(algo: str, riddle: TrajectoryCache) -> None:
    network = PolicyNetwork("lstm", hidden_dim=32, num_layers=1)
    result = train(network, riddle, OfflineArgs(algo=algo, updates=30))
    assert result.network.architecture == network.architecture
    assert np.isfinite(list(result.metrics.values())).all()


def test_cql_refuses_a_policy_with_memory(riddle: TrajectoryCache) -> None:
    for algo in ("cql", "d3rlpy-discrete-cql"):
        with pytest.raises(ValueError, match="got 'lstm'"):
            train(PolicyNetwork("lstm", hidden_dim=8, num_layers=1), riddle, OfflineArgs(algo=algo, updates=2))


@pytest.mark.parametrize("algo", NATIVE)
def test_equal_arguments_give_equal_weights(algo: str, riddle: TrajectoryCache) -> None:
    start = PolicyNetwork(hidden=(16,))
    before = torch.get_rng_state()
    first, second = (train(start, riddle, OfflineArgs(algo=algo, updates=20)).network.state_dict() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    assert torch.equal(start.rung_head.weight, PolicyNetwork(hidden=(16,)).rung_head.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_ctrl_c_keeps_the_last_checkpoint(riddle: TrajectoryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = offline._descend, 0

    def interrupted(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        original(*given)

    monkeypatch.setattr(offline, "_descend", interrupted)
    args = OfflineArgs(updates=100, report_every=10)
    with pytest.raises(TrainingInterrupted, match="iql interrupted after 20 updates") as stopped:
        train(PolicyNetwork(hidden=(8,)), riddle, args, checkpoint=tmp_path / "o.safetensors")
    assert stopped.value.checkpoint == tmp_path / "o.safetensors"
    assert load_policy(tmp_path / "o.safetensors").card["stage"] == "offline:iql"


def test_data_that_teach_nothing_are_named(tmp_path: Path) -> None:
    write_puzzle(tmp_path / "same", 4, rung=LADDER.index("m8v8"))
    write_puzzle(tmp_path / "one", 1)
    with pytest.raises(ValueError, match=r"all 48 decisions of the data are the same \(m8v8\)"):
        train(PolicyNetwork(hidden=(8,)), build_cache(tmp_path / "same"))
    with pytest.raises(ValueError, match="at least 2 runs"):
        train(PolicyNetwork(hidden=(8,)), build_cache(tmp_path / "one"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"algo": "sac"}, "known: iql, awr, cql, additive, d3rlpy-discrete-cql"),
        ({"gamma": 1.5}, "gamma must be"),
        ({"updates": 0}, "updates=0"),
        ({"head": "value"}, "known: rung, knobs"),
    ],
)
def test_bad_arguments_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OfflineArgs(**bad)


def test_targets_of_distillation_point_to_the_nearest_choice(riddle: TrajectoryCache) -> None:
    ladder = riddle.header.ladder
    actions = torch.tensor([rung.to_action() for rung in ladder])
    rungs, knobs = nearest_targets(positions(actions))
    assert torch.equal(rungs.argmax(1), torch.arange(len(ladder)))
    assert torch.equal((knobs * rung_knobs()).sum(1) > 0, torch.ones(len(ladder), dtype=torch.bool))
    assert torch.allclose(rungs.sum(1), torch.ones(len(ladder)))
    marginals = knob_marginals(torch.eye(len(ladder)))
    assert torch.equal(marginals, rung_knobs()) and torch.equal(marginals.sum(1), torch.full((len(ladder),), 7.0))
