"""Promises of the online PPO trainer."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mango.config import KNOBS, CompressionConfig
from mango.features import FEATURE_DIM, FEATURES
from mango.networks import CompressionPolicyNet
from mango.optimizer import MANGO
from mango.ppo_trainer import STATISTICS, PPOTrainer


def observations(layers: int, seed: int = 0) -> Tensor:
    low, high = (torch.tensor([getattr(f, side) for f in FEATURES]) for side in ("low", "high"))
    return low + (high - low) * torch.rand((layers, FEATURE_DIM), generator=torch.Generator().manual_seed(seed))


def small_net(**arguments: Any) -> CompressionPolicyNet:
    return CompressionPolicyNet(hidden_dim=16, num_layers=1, **arguments)


def collect(trainer: PPOTrainer, steps: int, layers: int = 3) -> None:
    """Decisions of the policy itself on random observations, rewarded for low bits."""
    for step in range(steps):
        features = {"layers": observations(layers, step)}
        decision = trainer.policy_net(features)
        trainer.collect_experience(features, decision, -decision["gradient_bits"] / 32 - decision["sparsity_ratio"])


def parameters(net: CompressionPolicyNet) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("knobs", [None, KNOBS])
def test_c9_every_head_moves_in_one_update(knobs: Any) -> None:
    net = small_net(knobs=knobs)
    trainer = PPOTrainer(net)
    before = parameters(net)
    collect(trainer, 16)
    trainer.update_policy()
    moved = {name for name, p in parameters(net).items() if not torch.equal(p, before[name])}
    heads = {f"heads.{knob}.{part}" for knob in net.knobs for part in ("weight", "bias")}
    expected = heads | {"value_head.weight", "value_head.bias"} | ({"sparsity_log_std"} if knobs is None else set())
    assert expected <= moved
    assert any(name.startswith("trunk") for name in moved)


def play(net: CompressionPolicyNet, trainer: PPOTrainer, kind: float) -> float:
    """A contextual bandit: of two kinds of layers, one wants 8/8 bits and half its entries, the other full precision."""
    features = torch.zeros(1, FEATURE_DIM)
    features[0, :2] = torch.tensor([20.0, -20.0]) * kind
    config = net(features)["config"]
    bits, sparsity = (8, 0.5) if kind > 0 else (32, 0.0)
    reward = (config["gradient_bits"] == bits) + (config["momentum_bits"] == bits) - abs(config["sparsity_ratio"] - sparsity)
    trainer.collect_experience(features, config, reward)
    return float(reward)


def test_it_learns_a_contextual_bandit() -> None:
    net = small_net(seed=1)
    trainer = PPOTrainer(net, lr=1e-2, gamma=0.0)
    kinds = torch.Generator().manual_seed(0)
    returns = []
    for _ in range(24):
        rewards = [play(net, trainer, 1.0 if torch.rand((), generator=kinds) < 0.5 else -1.0) for _ in range(64)]
        returns.append(sum(rewards) / 64)
        trainer.update_policy()
    first, last = sum(returns[:3]) / 3, sum(returns[-3:]) / 3
    assert first < 0.6 and last > 1.3                    # of at most 2; a policy blind to the context gets at most 0.75
    assert trainer.get_training_summary()["recent_entropy"] < net.entropy(small_net().evaluate(observations(1))).item()


def test_stored_log_probs_are_those_of_the_decisions_and_the_first_pass_has_ratio_one() -> None:
    net = small_net(seed=2)
    trainer = PPOTrainer(net, lr=1e-12, epochs=1, sequence_length=4)
    said = []
    for step in range(11):                               # over three segments
        decision = net(observations(3, step))
        said.append(decision["log_prob"].detach())
        trainer.collect_experience(observations(3, step), decision, float(step))
    kept = torch.cat([x for segment in trainer._segments for x in segment.log_probs])
    assert torch.allclose(kept, torch.stack(said), atol=1e-4)                  # sparsity passes through a float
    stats = trainer.update_policy()
    assert abs(stats["approx_kl"]) < 1e-6 and stats["clip_fraction"] == 0
    assert abs(stats["policy_loss"]) < 1e-5              # ratio one and advantages of mean zero


def test_advantages_are_those_of_the_textbook() -> None:
    trainer = PPOTrainer(small_net(), gamma=0.9, gae_lambda=0.8, sequence_length=3)
    collect(trainer, 7)
    rewards = torch.cat([x for s in trainer._segments for x in s.rewards])
    values = torch.cat([x for s in trainer._segments for x in s.values])
    scaled = (rewards - rewards.mean()) / rewards.std(correction=0)
    ends = torch.cat([values, values[-1:]])
    expected = []
    for t in range(7):                                   # the sum, term by term
        deltas = [scaled[k] + 0.9 * ends[k + 1] - ends[k] for k in range(t, 7)]
        expected.append(sum((0.9 * 0.8) ** k * float(delta) for k, delta in enumerate(deltas)))
    advantages = torch.tensor(expected)
    batches = trainer._batches()
    found = torch.cat([batch.returns.flatten() for batch in batches])
    assert torch.allclose(found, advantages + values, atol=1e-5)
    normalised = (advantages - advantages.mean()) / advantages.std()
    assert torch.allclose(torch.cat([batch.advantages.flatten() for batch in batches]), normalised, atol=1e-4)


def test_a_held_decision_is_one_observation_with_many_rewards() -> None:
    trainer = PPOTrainer(small_net())
    features = {"layers": observations(3)}
    decision = trainer.policy_net(features)
    for step in range(100):
        trainer.collect_experience(features, decision, step / 100)
    (segment,) = trainer._segments
    assert len(trainer) == 100 and len(segment.observations) == 1
    assert torch.allclose(torch.cat(segment.log_probs), decision["log_prob"].detach(), atol=1e-4)
    trainer.update_policy()
    trainer.collect_experience(features, decision, 0.0)  # seen anew by the changed policy, not one step later
    heads = trainer.policy_net.evaluate(features["layers"].mean(0, keepdim=True))
    assert torch.allclose(trainer._segments[0].values[0], heads.value.detach(), atol=1e-6)


def test_decisions_per_layer_train_one_agent_per_layer() -> None:
    net = small_net(knobs=KNOBS)
    trainer = PPOTrainer(net)
    for step in range(6):
        obs = observations(4, step)
        action = net.act(obs)
        configs = [CompressionConfig.from_action(row) for row in action.tolist()]
        choice: Any = [configs, action, {"layers": [c.to_dict() for c in configs]}][step % 3]
        trainer.collect_experience({"layers": obs}, choice, torch.arange(4.0))
    assert trainer.update_policy()["samples"] == 24
    with pytest.raises(ValueError, match="2 configs for 4 layers"):
        trainer.collect_experience({"layers": observations(4)}, [CompressionConfig()] * 2, 0.0)


def test_c10_the_loop_updates_online_and_returns_losses() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    data = torch.randn(40, 16, 32, generator=torch.Generator().manual_seed(0))
    policy_net = CompressionPolicyNet(feature_dim=64, hidden_dim=128, num_layers=2)
    ppo_trainer = PPOTrainer(policy_net)
    optimizer = MANGO(model.parameters(), lr=1e-3, policy_net=policy_net, policy_update_freq=5)
    stats = []
    for step, batch in enumerate(data):
        optimizer.zero_grad()
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        features = optimizer.collect_gradient_features()
        compression_config = optimizer.get_compression_config()
        reward = -loss.item()
        ppo_trainer.collect_experience(features, compression_config, reward)
        optimizer.step()
        if step % 20 == 0:
            stats.append(ppo_trainer.update_policy())
    assert set(stats[0]) == set(stats[1]) == set(STATISTICS)
    assert set(stats[0].values()) == {0.0}               # one experience is too few
    assert stats[1]["entropy"] > 0 and all(math.isfinite(value) for value in stats[1].values())
    summary = ppo_trainer.get_training_summary()
    assert summary["updates"] == 1 and summary["experiences"] == 40


def test_c16_monitoring_works_before_and_after_the_first_update(capsys: pytest.CaptureFixture[str]) -> None:
    ppo_trainer = PPOTrainer(small_net())
    for _ in range(2):
        policy_stats = ppo_trainer.get_training_summary()
        print(f"Policy loss: {policy_stats['recent_policy_loss']:.4f}")
        print(f"Entropy: {policy_stats['recent_entropy']:.4f}")
        collect(ppo_trainer, 8)
        ppo_trainer.update_policy()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Policy loss: 0.0000", "Entropy: 0.0000"] and lines[3] != lines[1]
    assert all(isinstance(value, float) for value in policy_stats.values())
    json.dumps(policy_stats, allow_nan=False)


def test_too_few_experiences_wait_for_more() -> None:
    trainer = PPOTrainer(small_net(), min_samples=8)
    assert trainer.update_policy() == dict.fromkeys(STATISTICS, 0.0)
    collect(trainer, 5)
    trainer.update_policy()
    assert len(trainer) == 5 and trainer.updates == 0
    collect(trainer, 5)
    done = trainer.update_policy()
    assert len(trainer) == 0 and trainer.updates == 1 and trainer.update_policy() == done


def test_equal_rewards_and_broken_rewards_do_no_harm() -> None:
    trainer = PPOTrainer(small_net())
    for step in range(10):
        trainer.collect_experience(observations(2, step), CompressionConfig(), 1.0)
    for reward in (math.nan, math.inf, torch.tensor(-math.inf)):
        trainer.collect_experience(observations(2), CompressionConfig(), reward)
    trainer.collect_experience(torch.full((2, FEATURE_DIM), math.nan), CompressionConfig(), 0.0)
    assert trainer.dropped == 4 and len(trainer) == 10
    assert all(math.isfinite(value) for value in trainer.update_policy().values())
    assert all(bool(p.isfinite().all()) for p in trainer.policy_net.parameters())


def test_what_waits_is_bounded_and_the_oldest_goes_first() -> None:
    trainer = PPOTrainer(small_net(), buffer_size=64, sequence_length=16)
    for step in range(500):
        trainer.collect_experience(observations(2, step % 50), CompressionConfig(), float(step))
    assert 64 <= len(trainer) < 64 + 16
    assert float(trainer._segments[-1].rewards[-1][0]) == 499
    held = PPOTrainer(small_net(), buffer_size=300)
    for _ in range(2000):
        held.collect_experience(observations(2), CompressionConfig(), 0.0)
    assert len(held) < 300 + 256


def test_another_model_needs_a_reset() -> None:
    trainer = PPOTrainer(small_net())
    trainer.collect_experience(observations(3), [CompressionConfig()] * 3, 0.0)
    with pytest.raises(ValueError, match="5 agents after 3; call reset"):
        trainer.collect_experience(observations(5), [CompressionConfig()] * 5, 0.0)
    trainer.reset()
    for step in range(2):
        trainer.collect_experience(observations(5, step), [CompressionConfig()] * 5, 0.0)
    trainer.update_policy()
    trainer.collect_experience(observations(4), [CompressionConfig()] * 4, 0.0)        # nothing was waiting


def test_training_is_deterministic_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        trainer = PPOTrainer(small_net(seed=4), sequence_length=4, seed=1)
        collect(trainer, 12)
        trainer.update_policy()
        runs.append(parameters(trainer.policy_net))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert torch.equal(before, torch.get_rng_state())


def test_c17_a_loaded_checkpoint_acts_and_learns_identically(tmp_path: Path) -> None:
    trainer = PPOTrainer(small_net(seed=4), sequence_length=4)
    collect(trainer, 12)
    trainer.update_policy()
    path = trainer.save(tmp_path / "policy.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["policy.pt"]
    trainer.reset()
    other = PPOTrainer(small_net(seed=7), sequence_length=4)
    other.load(path)
    assert other.get_training_summary() == trainer.get_training_summary()
    for seed in range(5):
        assert torch.equal(trainer.policy_net.act(observations(4, seed)), other.policy_net.act(observations(4, seed)))
    for t in (trainer, other):
        collect(t, 12)
        t.update_policy()
    ours, theirs = parameters(trainer.policy_net), parameters(other.policy_net)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_foreign_damaged_and_malicious_checkpoints_are_refused(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    trainer = PPOTrainer(small_net())
    path = trainer.save(tmp_path / "policy.pt")
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"format": Planted()}, protocol=2))
    torch.save({"format": Planted()}, tmp_path / "planted.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    for name in ("half", "text", "pickle", "planted", "foreign"):
        with pytest.raises(ValueError, match="checkpoint of PPOTrainer"):
            trainer.load(tmp_path / f"{name}.pt")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="holds a policy of the architecture"):
        PPOTrainer(CompressionPolicyNet(hidden_dim=32)).load(path)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="CompressionPolicyNet; got Linear"):
        PPOTrainer(nn.Linear(2, 2))  # type: ignore[arg-type]
    for arguments in ({"lr": 0.0}, {"clip": 1.5}, {"gamma": -0.1}, {"epochs": 0}, {"min_samples": 1}, {"lr": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
            PPOTrainer(small_net(), **arguments)
