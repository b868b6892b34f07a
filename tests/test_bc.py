"""Behaviour cloning: it imitates its teacher on runs it never saw, picks what is worth imitating, and survives Ctrl-C."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mango.config import KNOBS, LADDER
from mango.networks import PolicyNetwork
from mango.policy_file import load_policy
from mango_env.cache import TrajectoryCache, build_cache
from tests.mixed_data import answer, write_puzzle
from train_policy import bc
from train_policy.batches import Loader, returns_to_go, run_returns, runs_of, select_best, select_policies, split_runs
from train_policy.bc import BcArgs, train
from train_policy.fitting import TrainingInterrupted


def solved(cache: TrajectoryCache) -> TrajectoryCache:
    """The puzzle as a perfect teacher would have recorded it: rung and actions replaced by the answer."""
    rungs = answer(cache.columns["observations"]).astype(np.int16)
    actions = np.array([rung.to_action() for rung in LADDER], np.int8)[rungs]
    columns = {**cache.columns, "rung": rungs, "actions": actions}
    return TrajectoryCache(cache.path, cache.header, cache.digest, columns, cache.begins, cache.lengths, cache.indices)


def test_c11_cloning_agrees_with_its_teacher_on_more_than_90_percent_of_held_out_decisions(teacher: TrajectoryCache) -> None:
    """Water-filling on real runs; three splits by run, both heads."""
    found = [train(PolicyNetwork(), teacher, BcArgs(policies=("water-filling",), seed=seed)).accuracy for seed in range(3)]
    assert np.mean([accuracy["rung"] for accuracy in found]) > 0.9
    assert np.mean([accuracy["knobs"] for accuracy in found]) > 0.9
    assert set(found[0]) == {"rung", "knobs", *KNOBS}


def test_c11_an_lstm_clones_from_sequences(teacher: TrajectoryCache) -> None:
    network = PolicyNetwork("lstm", hidden_dim=48, num_layers=1)
    result = train(network, teacher, BcArgs(policies=("water-filling",), learning_rate=3e-3))
    assert result.accuracy["rung"] > 0.85
    assert result.network.architecture == network.architecture


def test_a_known_rule_is_learned_by_both_heads(riddle: TrajectoryCache) -> None:
    result = train(PolicyNetwork(hidden=(64, 64)), solved(riddle), BcArgs(top=1.0, learning_rate=3e-3))
    assert result.accuracy["rung"] > 0.9 and result.accuracy["knobs"] > 0.9
    assert result.runs == 30 and result.decisions == 480 and result.digest == riddle.digest


def test_equal_arguments_give_equal_weights_and_the_given_network_stays(riddle: TrajectoryCache) -> None:
    start, args = PolicyNetwork(hidden=(16,)), BcArgs(top=1.0, epochs=3)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    first, second = train(start, riddle, args), train(start, riddle, args)
    for a, b in zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())
    assert not torch.equal(first.network.rung_head.weight, start.rung_head.weight)
    other = train(start, riddle, BcArgs(top=1.0, epochs=3, seed=1))
    assert not torch.equal(first.network.rung_head.weight, other.network.rung_head.weight)


def test_the_best_runs_are_chosen_within_each_setting(riddle: TrajectoryCache) -> None:
    best = select_best(riddle, 0.2)
    workloads, returns = np.array(riddle.attributes["workload"]), run_returns(riddle)
    chosen = set(best.attributes["run_id"])
    assert len(chosen) == 6 and len(best.lengths) == 12                        # 3 of 15 runs each, whole runs
    for workload in ("easy", "hard"):
        mine = workloads == workload
        kept = np.isin(np.array(riddle.attributes["run_id"])[mine], list(chosen))
        assert returns[mine][kept].min() >= returns[mine][~kept].max()


def test_runs_are_never_split(riddle: TrajectoryCache) -> None:
    training, validation = split_runs(riddle, 0.2, seed=0)
    ours, held = set(training.attributes["run_id"]), set(validation.attributes["run_id"])
    assert not ours & held and len(held) == 6 and len(ours) == 24
    assert len(training) + len(validation) == len(riddle)
    assert runs_of(riddle).max() == 29


def test_returns_to_go_are_discounted_sums_of_what_follows(riddle: TrajectoryCache) -> None:
    to_go = returns_to_go(riddle, 0.9)
    episode = next(iter(riddle.episodes()))["rewards"]
    expected = [sum(0.9**k * r for k, r in enumerate(episode[t:])) for t in range(len(episode))]
    assert np.allclose(to_go[: len(episode)], expected, atol=1e-6)


def test_padding_of_sequences_is_masked_and_every_step_comes_once(riddle: TrajectoryCache) -> None:
    short = TrajectoryCache(
        riddle.path, riddle.header, riddle.digest, riddle.columns, riddle.begins,
        np.where(np.arange(len(riddle.lengths)) % 3 == 0, 5, riddle.lengths), riddle.indices,
    )  # fmt: skip
    for sequences in (True, False):
        loader = Loader(short, 32, 0, sequences=sequences)
        steps = list(loader.epoch())
        assert sum(float(s.mask.sum()) for s in steps) == len(short) and len(steps) == len(loader)
        seen = torch.cat([s.rewards[s.mask > 0] for s in steps])
        assert float(seen.sum()) == sum(float(e["rewards"].sum()) for e in short.episodes())


def test_the_normaliser_of_a_trained_network_is_kept(riddle: TrajectoryCache) -> None:
    first = train(PolicyNetwork(hidden=(8,)), riddle, BcArgs(top=1.0, epochs=1)).network
    kept = train(first, solved(riddle).select(np.arange(10)), BcArgs(top=1.0, epochs=1)).network
    again = train(first, solved(riddle).select(np.arange(10)), BcArgs(top=1.0, epochs=1, fit_normaliser=True)).network
    assert float(first.trunk.normaliser.std[0]) == pytest.approx(30 / 12**0.5, rel=0.1)       # uniform over 30
    assert torch.equal(kept.trunk.normaliser.mean, first.trunk.normaliser.mean)
    assert not torch.equal(again.trunk.normaliser.mean, first.trunk.normaliser.mean)


def test_ctrl_c_keeps_the_best_checkpoint(riddle: TrajectoryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs, original = 0, bc._fit_epoch

    def interrupted(*given: Any) -> float:
        nonlocal epochs
        epochs += 1
        if epochs == 4:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(bc, "_fit_epoch", interrupted)
    path = tmp_path / "checkpoints" / "bc.safetensors"
    with pytest.raises(TrainingInterrupted, match=r"after 3 epochs; the best weights so far are in") as stopped:
        train(PolicyNetwork(hidden=(16,)), solved(riddle), BcArgs(top=1.0, learning_rate=3e-3), checkpoint=path)
    assert isinstance(stopped.value, KeyboardInterrupt)
    kept = load_policy(path)
    assert kept.card["stage"] == "bc" and 1 <= kept.card["epoch"] <= 3
    assert not list(path.parent.glob("*.tmp"))


def test_c17_the_checkpoint_decides_as_the_clone(riddle: TrajectoryCache, tmp_path: Path) -> None:
    result = train(PolicyNetwork(hidden=(16,)), riddle, BcArgs(top=1.0, epochs=2), checkpoint=tmp_path / "bc.safetensors")
    seen = torch.from_numpy(np.array(riddle.columns["observations"][:50]))
    with torch.no_grad():
        assert torch.equal(load_policy(tmp_path / "bc.safetensors").scores(seen), result.network(seen).rung_logits.log_softmax(1))


def test_what_cannot_be_cloned_is_named(riddle: TrajectoryCache, tmp_path: Path) -> None:
    write_puzzle(tmp_path / "one", 1)
    for cache, args, message in (
        (riddle, BcArgs(policies=("oracle",)), r"no episodes by \['oracle'\]; the data has \['random'\]"),
        (build_cache(tmp_path / "one"), BcArgs(), "at least 2 runs; the selection has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(PolicyNetwork(hidden=(8,)), cache, args)
    with pytest.raises(ValueError, match=f"{len(LADDER)} rungs, the network scores 5"):
        train(PolicyNetwork(hidden=(8,), rungs=5), riddle)
    with pytest.raises(ValueError, match="a new tree asks nothing"):
        train(PolicyNetwork("tree"), riddle)
    with pytest.raises(ValueError, match="top=0"):
        select_best(riddle, 0)
    with pytest.raises(ValueError, match="holds no transitions"):
        Loader(select_policies(riddle, ["random"]).select(np.array([], np.int64)), 8, 0, sequences=False)


def test_the_leaves_of_a_shipped_tree_are_cloned(riddle: TrajectoryCache) -> None:
    tree = load_policy("universal_tree").network
    before, after = tree.state_dict(), train(tree, riddle, BcArgs(top=1.0, epochs=2)).network.state_dict()
    assert torch.equal(after["trunk.feature"], before["trunk.feature"])
    assert not torch.equal(after["rung_head.weight"], before["rung_head.weight"])
