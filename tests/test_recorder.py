"""Promises of recording: runs, somebody's own training loop, and gradient statistics as CSV."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango import MANGO
from mango.config import LADDER, CompressionConfig
from mango.features import FEATURES
from mango.policies import AdaptivePolicy, FixedPolicy, HoldPolicy, RandomPolicy, WaterFillingPolicy
from mango_env import twin as twins
from mango_env.recorder import GradientProfiler, TrajectoryRecorder, record_run
from mango_env.reward import Reward
from mango_env.run import TrainingRun
from mango_env.store import TrajectoryWriter

RAW = Reward(loss="raw")
LOW, HIGH = (np.array([getattr(f, side) for f in FEATURES], np.float32) for side in ("low", "high"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Twins go to a folder of the test's own, and memory forgets them."""
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)
    twins._remembered.cache_clear()
    yield
    twins._remembered.cache_clear()


class Stored:
    """An episode as it lies in the store."""

    def __init__(self, group: h5py.Group) -> None:
        self.attributes = dict(group.attrs)
        self.infos = {name: group["infos"][name][()] for name in group["infos"]}
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            setattr(self, name, group[name][()])

    observations: Any
    actions: Any
    rewards: Any
    terminations: Any
    truncations: Any


def stored(root: Path) -> list[Stored]:
    with h5py.File(root / "data" / "main_data.hdf5") as file:
        return [Stored(file[f"episode_{i}"]) for i in range(len(file))]


def writer(root: Path, reward: Reward = RAW) -> TrajectoryWriter:
    return TrajectoryWriter(root, task="test", policy="test", reward=reward)


def model_and_loss() -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.2, 0.2, generator=generator)

    def loss() -> Tensor:
        x = torch.randn(8, 32, generator=generator)
        return F.mse_loss(model(x), x)

    return model, loss


def train(optimizer: MANGO, loss_of: Any, steps: int, observe: bool = True) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        losses.append(loss.item())
        if observe:
            optimizer.observe_loss(loss)
        optimizer.step()
    return losses


def recompute(episode: Stored) -> Any:
    reward = Reward.from_json(episode.attributes["reward"])
    return reward.combine(*(episode.infos[f"reward_{term}"] for term in ("loss", "memory", "error")))


POLICIES = [RandomPolicy(seed=1), WaterFillingPolicy(), AdaptivePolicy(), FixedPolicy(momentum_bits=8), HoldPolicy()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_run_is_recorded_as_one_episode_per_layer(tmp_path: Path, policy: Any) -> None:
    run = TrainingRun("digits_mlp", 4, horizon=35, interval=10, memory_budget=0.4)
    with writer(tmp_path, Reward()) as out:
        summary = record_run(run, policy, out)
    episodes = stored(tmp_path)
    assert len(episodes) == summary.episodes == len(run.layers) == 3
    for i, episode in enumerate(episodes):
        assert episode.observations.shape == (5, 64) and episode.actions.shape == (4, 7)
        assert ((episode.observations >= LOW) & (episode.observations <= HIGH)).all()
        assert episode.terminations.tolist() == [False, False, False, True] and not episode.truncations.any()
        assert (recompute(episode) == episode.rewards).all()
        assert (episode.infos["behavior_logp"] == 0).all()
        facts = episode.attributes
        assert (facts["run_id"], facts["layer_index"], facts["layer_name"]) == (summary.run_id, i, run.layers[i].name)
        assert (facts["horizon"], facts["interval"], facts["seed"], facts["lr"], facts["rule"]) == (35, 10, 4, 2e-3, "adamw")
        assert facts["budget_bytes"] == summary.budget_bytes == run.budget
        configs = [CompressionConfig.from_action(action) for action in episode.actions]
        assert episode.infos["rung"].tolist() == [LADDER.nearest(config) for config in configs]
    assert summary.state_bytes_peak <= summary.budget_bytes
    assert summary.returns == pytest.approx(np.mean([e.rewards.sum() for e in episodes]), rel=1e-5)
    assert summary.evaluation["val_loss"] > 0 and not summary.diverged and summary.error is None
    assert summary.decisions == 4 and summary.workload == "digits_mlp"


def test_what_is_recorded_is_what_was_seen_and_applied(tmp_path: Path) -> None:
    class Watched:
        """Proposes full precision, which the budget cannot pay, and keeps what it saw."""

        name, logp = "watched", None

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def act(self, obs: Tensor) -> CompressionConfig:
            self.seen.append(obs.clone())
            self.logp = torch.full((len(obs),), -0.5 * len(self.seen))
            return CompressionConfig()

        def reset(self) -> None:
            self.seen.clear()

    policy, applied = Watched(), []

    class Noted(TrainingRun):
        def apply(self, choice: Any) -> list[CompressionConfig]:
            applied.append(super().apply(choice))
            return applied[-1]

    run = Noted("digits_mlp", 0, horizon=40, interval=10, memory_budget=0.3)
    with writer(tmp_path) as out:
        record_run(run, policy, out)
    for i, episode in enumerate(stored(tmp_path)):
        assert (episode.observations[:-1] == torch.stack(policy.seen)[:, i].numpy()).all()
        assert (episode.observations[-1] == run.observe()[i]).all()
        assert episode.actions.tolist() == [list(configs[i].to_action()) for configs in applied]
        assert episode.infos["behavior_logp"].tolist() == [-0.5, -1.0, -1.5, -2.0]
        assert episode.attributes["policy"] == "watched"
    assert any(config != CompressionConfig() for configs in applied for config in configs)


def test_a_teacher_may_see_the_whole_run(tmp_path: Path) -> None:
    class Teacher:
        """Tries two rungs on forks and takes the one with the lower loss."""

        name = "teacher"

        def decide(self, run: TrainingRun) -> CompressionConfig:
            def loss(config: CompressionConfig) -> float:
                fork = run.fork()
                fork.apply(config)
                return fork.advance().loss

            return min((LADDER[2], LADDER[7]), key=loss)

        def reset(self) -> None:
            """Nothing is remembered."""

    run = TrainingRun("digits_mlp", 0, horizon=30, interval=10, memory_budget=0.4)
    with writer(tmp_path) as out:
        summary = record_run(run, Teacher(), out)
    assert {int(r) for e in stored(tmp_path) for r in e.infos["rung"]} <= {2, 7}
    assert summary.decisions == 3


def test_recording_twice_gives_the_same_and_stopping_early_truncates(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        run = TrainingRun("digits_mlp", 0, horizon=60, interval=10, memory_budget=0.4)
        with writer(tmp_path / name) as out:
            record_run(run, RandomPolicy(seed=3), out, run_id="same", max_decisions=2)
        digests.append(json.loads((tmp_path / name / "data" / "metadata.json").read_text())["mango"]["digest"])
        for episode in stored(tmp_path / name):
            assert episode.truncations.tolist() == [False, True] and not episode.terminations.any()
    assert digests[0] == digests[1]


def test_a_run_that_fails_is_recorded_up_to_its_end(tmp_path: Path) -> None:
    model, loss_of = model_and_loss()

    class Failing:
        steps, count = 40, 0

        def __init__(self, seed: int) -> None:
            self.model = model

        def loss(self) -> Tensor:
            self.count += 1
            loss: Tensor = loss_of()
            return loss * (math.nan if self.count > 12 else 1.0)

        def evaluate(self) -> dict[str, float]:
            raise RuntimeError("broken")

    run = TrainingRun(Failing, 0, interval=5, memory_budget=0.7)
    with writer(tmp_path) as out:
        summary = record_run(run, RandomPolicy(), out)
    assert summary.diverged and summary.decisions == 3 and summary.error == "RuntimeError: broken" and summary.evaluation == {}
    for episode in stored(tmp_path):
        assert episode.terminations[-1] and np.isfinite(episode.rewards).all()
        assert episode.rewards[-1] < -2.0 * 6 + 0.2
        assert (recompute(episode) == episode.rewards).all()


def test_an_ordinary_training_loop_is_recorded(tmp_path: Path) -> None:
    model, loss_of = model_and_loss()
    optimizer = MANGO(model.named_parameters(), policy=RandomPolicy(0), memory_budget=0.6, policy_update_freq=5, total_steps=20)
    decisions: list[Any] = []
    optimizer.register_decision_hook(decisions.append)
    initial = list(optimizer.applied)
    with TrajectoryRecorder(optimizer, tmp_path, workload="mine", run_id="run") as recorder:
        losses = train(optimizer, loss_of, 20)
    assert recorder.recorded == 2
    applied = [initial, *(d.applied for d in decisions)]
    for i, episode in enumerate(stored(tmp_path)):
        assert episode.actions.tolist() == [list(configs[i].to_action()) for configs in applied[:4]]
        assert episode.infos["loss"] == pytest.approx(np.mean(np.reshape(losses, (4, 5)), 1), rel=1e-5)
        assert (episode.observations[1:] == torch.stack([d.observation for d in decisions])[:, i].numpy()).all()
        assert episode.infos["error"] == pytest.approx([float(d.errors[i]) for d in decisions])
        assert episode.infos["bytes"][1:].tolist() == [float(d.bytes[i]) for d in decisions[:3]]
        assert episode.terminations[-1] and not episode.truncations.any()
        assert (recompute(episode) == episode.rewards).all()
        facts = episode.attributes
        assert (facts["workload"], facts["run_id"], facts["policy"], facts["horizon"]) == ("mine", "run", "random", 20)


def test_recording_does_not_change_the_training(tmp_path: Path) -> None:
    results = []
    for record in (False, True):
        model, loss_of = model_and_loss()
        optimizer = MANGO(model.named_parameters(), policy=RandomPolicy(0), memory_budget=0.6, policy_update_freq=5)
        if record:
            with TrajectoryRecorder(optimizer, tmp_path), GradientProfiler(optimizer, tmp_path / "profile.csv"):
                results.append(train(optimizer, loss_of, 23))
        else:
            results.append(train(optimizer, loss_of, 23))
    assert results[0] == results[1]
    for episode in stored(tmp_path):                         # 23 steps: four whole intervals, stopped from outside
        assert len(episode.actions) == 4 and episode.truncations[-1] and not episode.terminations.any()


def test_a_closure_tells_the_loss_and_silence_is_an_error(tmp_path: Path) -> None:
    model, loss_of = model_and_loss()
    optimizer = MANGO(model.named_parameters(), memory_budget=0.6, policy_update_freq=2)

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = loss_of()
        loss.backward()                                      # type: ignore[no-untyped-call]
        return loss.item()

    with TrajectoryRecorder(optimizer, tmp_path / "closure"):
        for _ in range(6):
            optimizer.step(closure)
    assert all(np.isfinite(e.infos["loss"]).all() and len(e.actions) == 3 for e in stored(tmp_path / "closure"))
    silent = MANGO(model.named_parameters(), memory_budget=0.6, policy_update_freq=2)
    with TrajectoryRecorder(silent, tmp_path / "silent"), pytest.raises(ValueError, match="observe_loss"):
        train(silent, loss_of, 2, observe=False)
    assert stored(tmp_path / "silent") == []
    with pytest.raises(ValueError, match="raw"):
        TrajectoryRecorder(silent, tmp_path / "twin", reward=Reward(loss="twin"))


def test_a_loss_that_stops_being_finite_ends_the_episode(tmp_path: Path) -> None:
    model, loss_of = model_and_loss()
    optimizer = MANGO(model.named_parameters(), memory_budget=0.6, policy_update_freq=5, total_steps=50)
    with TrajectoryRecorder(optimizer, tmp_path):
        train(optimizer, loss_of, 10)
        train(optimizer, lambda: loss_of() * math.nan, 10)
    for episode in stored(tmp_path):
        assert len(episode.actions) == 3 and episode.terminations[-1]
        assert episode.rewards[-1] < -2.0 * 8 + 0.2 and np.isfinite(episode.rewards).all()


def test_long_runs_are_cut_into_episodes_that_are_written_as_they_come(tmp_path: Path) -> None:
    model, loss_of = model_and_loss()
    optimizer = MANGO(model.named_parameters(), policy=RandomPolicy(0), memory_budget=0.6, policy_update_freq=2)
    recorder = TrajectoryRecorder(optimizer, tmp_path, run_id="long", episode_decisions=3)
    train(optimizer, loss_of, 12)
    assert recorder.recorded == 2 * 2
    train(optimizer, loss_of, 4)
    assert recorder.close() == recorder.close() == tmp_path
    episodes = stored(tmp_path)
    assert [(e.attributes["run_id"], len(e.actions)) for e in episodes if e.attributes["layer_index"] == 0] == [
        ("long.0", 3), ("long.1", 3), ("long.2", 2),
    ]  # fmt: skip
    first, second = (e for e in episodes[:4] if e.attributes["layer_index"] == 0)
    assert (first.observations[-1] == second.observations[0]).all()            # nothing is lost between two


def test_every_process_of_a_distributed_job_records_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        model, loss_of = model_and_loss()
        optimizer = MANGO(model.named_parameters(), memory_budget=0.6, policy_update_freq=2)
        with TrajectoryRecorder(optimizer, tmp_path, run_id="job"):
            train(optimizer, loss_of, 4)
    assert len(list((tmp_path / "data" / "shards").glob("*.h5"))) == 2
    assert {e.attributes["run_id"] for e in stored(tmp_path)} == {"job-rank0", "job-rank1"}


def test_b12_the_profile_of_a_run_has_a_row_per_decision_and_layer_and_all_features_are_finite(tmp_path: Path) -> None:
    run = TrainingRun("digits_cnn", 0, horizon=50, interval=5, memory_budget=0.4)
    with GradientProfiler(run.optimizer, tmp_path / "deep" / "profile.csv") as profiler:
        record_run(run, RandomPolicy(0), None, RAW)
        assert not profiler.path.exists()
    with profiler.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), int(r["layer_index"])) for r in rows] == [
        (step, layer.index) for step in range(5, 51, 5) for layer in run.layers
    ]
    values = np.array([[float(row[f.name]) for f in FEATURES] for row in rows], np.float32)
    assert values.shape == (10 * len(run.layers), 64) and np.isfinite(values).all()
    assert ((values >= LOW) & (values <= HIGH)).all()
    assert all(float(r["bytes"]) > 0 and math.isfinite(float(r["error"])) and r["layer_name"] and r["config"] for r in rows)
    assert profiler.close() == profiler.path and list(profiler.path.parent.iterdir()) == [profiler.path]
