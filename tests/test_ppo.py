"""PPO from given weights: it learns, keeps what it should keep, repeats with its seed, and survives Ctrl-C."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import ppo_stability
from experiments.ppo_stability import Args
from mango.networks import PolicyNetwork
from mango.policies import RandomPolicy
from mango.policy_file import freeze, load_policy
from mango_env.cache import build_cache
from mango_env.recorder import record_run
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from tests.tiny_workload import tiny
from train_policy import bc
from train_policy.bc import BcArgs
from train_policy.collect import CollectArgs, collect
from train_policy.fitting import TrainingInterrupted
from train_policy.gate import gate
from train_policy.ppo import PpoArgs, rollout_shape, train

REWARD = Reward(alpha=1.0, beta=1.0, gamma=0.2, loss="raw")
SETTING: dict[str, Any] = {"horizon": 8, "interval": 2, "memory_budget": 1.2}


def layer_env(**changes: Any) -> Any:
    from mango_env.layer_vec_env import LayerVecEnv

    return LayerVecEnv(tiny, **{"n_runs": 2, "reward": REWARD, "actions": "rung", "seeds": 4, **SETTING, **changes})


def network() -> PolicyNetwork:
    return PolicyNetwork("mlp", hidden=(32,))


def quick(**changes: Any) -> PpoArgs:
    given = {"total_timesteps": 64, "rollout": 32, "batch_size": 16, "n_epochs": 2, "critic_warmup": 0, **changes}
    return PpoArgs(**given)


def returns_of(policy: Any, seed: int) -> float:
    run = TrainingRun(tiny, seed, **SETTING)
    return record_run(run, policy, None, REWARD).returns


def test_c8_ppo_beats_random_by_three_standard_errors_over_five_seeds(tmp_path: Path) -> None:
    """Five trainings from scratch, each judged on runs that it never saw, greedy and inside the budget."""
    gains = []
    for seed in range(5):
        args = PpoArgs(
            total_timesteps=384, rollout=128, batch_size=64, n_epochs=8, learning_rate=4e-3, critic_warmup=0, target_kl=None,
            gamma=0.5, gae_lambda=0.5, seed=seed,
        )  # fmt: skip
        result = train(network(), layer_env(), args)
        policy = load_policy(freeze(result.network, tmp_path / f"{seed}", head=result.head, card={}))
        fresh = [100 + 10 * seed + i for i in range(6)]
        gains.append(np.mean([returns_of(policy, s) - returns_of(RandomPolicy(seed=s, persistence=0.0), s) for s in fresh]))
    error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    assert np.mean(gains) > 3 * error, gains


def test_c22_the_spread_of_final_returns_over_seeds_is_published_and_none_is_nan(tmp_path: Path) -> None:
    args = Args(workload="tests.tiny_workload:tiny", steps=8, interval=2, budget=1.2, seeds=2, judged=1, timesteps=32,
                out=tmp_path / "ppo.json")  # fmt: skip
    found = json.loads(ppo_stability.train(args).read_text())
    finals = [run["final_return"] for run in found["runs"]]
    assert found["summary"]["final_return_sd"] == pytest.approx(np.std(finals, ddof=1)) and found["summary"]["not_finite"] == 0
    assert found["summary"]["final_return_mean"] == pytest.approx(np.mean(finals)) and len(set(finals)) == 2
    shipped = json.loads((Path(__file__).parent.parent / "benchmarks/results/ppo_stability.json").read_text())["summary"]
    assert shipped["seeds"] >= 5 and shipped["not_finite"] == 0 and shipped["final_return_sd"] > 0


def test_c11_what_passes_the_gate_after_fine_tuning_earns_at_least_what_the_clone_earns(tmp_path: Path) -> None:
    """Clone mediocre behaviour, fine-tune, let paired runs decide, and judge the outcome on runs that nobody saw."""
    collecting = CollectArgs(horizon=SETTING["horizon"], interval=SETTING["interval"], reward=REWARD)
    collect(tiny, ["random", "fixed:m8v8"], 12, SETTING["memory_budget"], tmp_path / "store", collecting)
    clone = bc.train(network(), build_cache(tmp_path / "store"), BcArgs(top=1.0, epochs=10)).network
    args = quick(total_timesteps=384, rollout=128, batch_size=64, n_epochs=8, learning_rate=2e-3, target_kl=0.1, gamma=0.5)
    tuned = train(clone, layer_env(), args).network

    def frozen(found: PolicyNetwork) -> Any:
        return load_policy(freeze(found, tmp_path / "judged", card={}))

    def returns(found: PolicyNetwork) -> dict[int, float]:
        policy = frozen(found)
        return {seed: returns_of(policy, seed) for seed in range(200, 208)}

    chosen, decision = gate(tuned, clone, returns)
    assert decision.pairs == 8 and (chosen is tuned) == decision.accepted
    earned = [returns_of(frozen(chosen), seed) - returns_of(frozen(clone), seed) for seed in range(300, 306)]
    assert np.mean(earned) >= 0, decision


def test_c9_every_head_that_ppo_trains_changes() -> None:
    for head, actions in (("rung", "rung"), ("knobs", "knobs")):
        before = network()
        after = train(before, layer_env(actions=actions), quick(head=head, target_kl=None)).network
        trained = after.rung_head if head == "rung" else after.knob_head
        start = before.rung_head if head == "rung" else before.knob_head
        assert (trained.weight - start.weight).abs().amax(1).min() > 0        # every logit of every knob
        assert any((a != b).any() for a, b in zip(after.trunk.parameters(), before.trunk.parameters(), strict=True))


def test_the_same_seed_gives_the_same_weights_and_leaves_global_random_numbers_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 (it is their state that must stay)
    start = network()
    first, second = (train(start, layer_env(), quick(seed=3)).network for _ in range(2))
    other = train(start, layer_env(), quick(seed=4)).network
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not torch.equal(first.rung_head.weight, other.rung_head.weight)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert str(numpy_state) == str(np.random.get_state())  # noqa: NPY002
    fresh = network()
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_nothing_is_left_among_the_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train(network(), layer_env(), quick())
    assert list(tmp_path.iterdir()) == []


def test_the_critic_is_fitted_before_the_actor_may_move() -> None:
    start = network()
    warm = train(start, layer_env(), quick(critic_warmup=64)).network
    assert torch.equal(warm.rung_head.weight, start.rung_head.weight)
    assert all(torch.equal(a, b) for a, b in zip(warm.trunk.parameters(), start.trunk.parameters(), strict=True))
    moved = train(start, layer_env(), quick(critic_warmup=32)).network
    assert not torch.equal(moved.rung_head.weight, start.rung_head.weight)


def test_the_kl_anchor_holds_the_policy_near_its_start() -> None:
    start = network()
    seen = torch.from_numpy(TrainingRun(tiny, 0, **SETTING).observe())

    def moved(weight: float) -> float:
        args = quick(total_timesteps=96, n_epochs=8, learning_rate=3e-3, target_kl=None, kl_anchor=weight)
        after = train(start, layer_env(), args).network
        with torch.no_grad():
            return float(after.distribution(after(seen), "rung").kl(start.distribution(start(seen), "rung")).mean())

    assert moved(10.0) < 0.5 * moved(0.0)


def test_ctrl_c_keeps_the_weights_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env, steps = layer_env(), 0
    original = env.step_wait

    def interrupted() -> Any:
        nonlocal steps
        steps += 1
        if steps > 12:                                       # 4 slots, 32 timesteps per rollout: in the second rollout
            raise KeyboardInterrupt
        return original()

    monkeypatch.setattr(env, "step_wait", interrupted)
    with pytest.raises(TrainingInterrupted, match="interrupted after") as stopped:
        train(network(), env, quick(), checkpoint=tmp_path / "ppo.safetensors")
    assert stopped.value.checkpoint == tmp_path / "ppo.safetensors"
    kept = load_policy(tmp_path / "ppo.safetensors")
    assert kept.head == "rung" and kept.card["stage"] == "ppo"
    assert not torch.equal(kept.network.rung_head.weight, network().rung_head.weight)


def test_c17_a_checkpoint_of_ppo_decides_as_the_trained_network(tmp_path: Path) -> None:
    result = train(network(), layer_env(), quick(), checkpoint=tmp_path / "ppo.safetensors")
    loaded = load_policy(tmp_path / "ppo.safetensors")
    assert {"reward", "approx_kl", "value_loss"} <= set(result.metrics)
    run = TrainingRun(tiny, 1, **SETTING)
    seen = torch.from_numpy(run.observe())
    with torch.no_grad():
        expected = result.network(seen).rung_logits.log_softmax(1)
    assert torch.equal(loaded.scores(seen), expected)
    assert torch.equal(loaded.act(seen), copy.deepcopy(loaded).act(seen))


@pytest.mark.parametrize(("rollout", "batch", "slots"), [(4096, 512, 1), (4096, 512, 29), (64, 64, 3), (2, 2, 5), (100, 2, 7)])
def test_rollouts_split_into_equal_batches(rollout: int, batch: int, slots: int) -> None:
    n_steps, size = rollout_shape(rollout, batch, slots)
    assert (n_steps * slots) % size == 0 and 2 <= size <= max(batch, 2) and n_steps * slots >= rollout


def test_bad_arguments_are_named() -> None:
    wrong = (({"head": "both"}, "known: rung, knobs"), ({"batch_size": 1}, "at least 2"), ({"n_epochs": 0}, "n_epochs=0"))
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            quick(**bad)
