"""Promises of `LayerVecEnv`, the per-layer view that Stable-Baselines3 trains on."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

pytest.importorskip("stable_baselines3")

from mango.config import LADDER, NVEC
from mango_env import twin as twins
from mango_env.env import MangoEnv
from mango_env.layer_vec_env import LayerVecEnv
from mango_env.reward import Reward


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Twins go to a folder of the test's own, and memory forgets them."""
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))
    twins._remembered.cache_clear()
    yield
    twins._remembered.cache_clear()


class Chain:
    """`layers` square layers of 32 units. `after`: the first loss that is no number."""

    steps = 40

    def __init__(self, seed: int, layers: int = 2, after: int = 10**9) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))
        self.after, self.count = after, 0

    def loss(self) -> Tensor:
        self.count += 1
        x = torch.randn(8, 32, generator=self.generator)
        return F.mse_loss(self.model(x), x) * (math.nan if self.count > self.after else 1.0)

    def evaluate(self) -> dict[str, float]:
        return {"val_loss": float(next(self.model.parameters()).detach().square().mean())}


def deep(seed: int) -> Chain:
    return Chain(seed, layers=5)


def make(workload: Any = Chain, **options: Any) -> LayerVecEnv:
    return LayerVecEnv(workload, **{"horizon": 12, "interval": 4, "memory_budget": 0.8, "seeds": 2, "actions": "rung", **options})


def rungs(env: LayerVecEnv, generator: np.random.Generator) -> Any:
    return generator.integers(len(LADDER), size=env.num_envs)


def test_every_layer_of_every_run_is_exactly_one_slot() -> None:
    env = make([Chain, deep], n_runs=3)
    assert env.num_envs == 2 + 5 + 2
    assert env.observation_space.shape == (64,)
    assert env.action_space == spaces.Discrete(len(LADDER))
    assert make(actions="knobs").action_space == spaces.MultiDiscrete(list(NVEC))
    assert env.reset().shape == (9, 64)
    infos = env.step(np.zeros(9, np.int64))[3]
    assert [(i["run"], i["layer_index"]) for i in infos] == [(0, 0), (0, 1), *((1, k) for k in range(5)), (2, 0), (2, 1)]
    with pytest.raises(ValueError, match="cannot cover 2 workloads"):
        make([Chain, deep], n_runs=1)


def test_it_shows_the_same_run_as_the_single_environment() -> None:
    venv, env = make(deep), MangoEnv(deep, horizon=12, interval=4, memory_budget=0.8, seeds=2, actions="rung")
    venv.seed(7)
    rows = venv.reset()
    observation, info = env.reset(seed=7)
    assert venv.reset_infos[0]["run_seed"] == info["run_seed"]
    generator = np.random.default_rng(0)
    for _ in range(3):
        assert (rows == observation["layers"]).all()
        action = rungs(venv, generator)
        rows, rewards, dones, infos = venv.step(action)
        observation, reward, over, _, single = env.step(action)
        assert (rewards == single["reward_layers"]).all()
        assert rewards.mean() == pytest.approx(reward)
        assert [i["bytes"] for i in infos] == single["bytes"].tolist()
        assert [i["applied"].tolist() for i in infos] == single["applied"].tolist()
        assert dones.tolist() == [over] * 5
    assert (np.stack([i["terminal_observation"] for i in infos]) == observation["layers"]).all()
    assert [i["val_loss"] for i in infos] == [single["val_loss"]] * 5


def test_the_horizon_is_no_time_limit_and_the_next_run_starts_in_the_same_step() -> None:
    env = make([Chain, deep])
    env.seed(0)
    first = env.reset()
    for step in range(1, 7):
        rows, rewards, dones, infos = env.step(np.full(7, LADDER.index("m4v0")))
        assert [a.dtype.name for a in (rewards, dones, rows)] == ["float32", "bool", "float32"]
        assert not any(i["TimeLimit.truncated"] for i in infos)
        over = step % 3 == 0
        assert dones.tolist() == [over] * 7
        for row, info in zip(rows, infos, strict=True):
            assert row in env.observation_space
            assert ("terminal_observation" in info) == over
            if over:
                assert info["terminal_observation"] in env.observation_space and (info["terminal_observation"] != row).any()
        assert [e.run.t for e in env.envs if e.run] == [0 if over else 4 * (step % 3)] * 2
    assert first.shape == rows.shape


def test_a_diverged_run_ends_its_own_slots_only() -> None:
    env = make([Chain, deep], workload_kwargs=None, horizon=40)
    env.envs[0]._arguments["workload_kwargs"] = {"after": 6}
    env.seed(0)
    env.reset()
    env.step(np.zeros(7, np.int64))
    _, rewards, dones, infos = env.step(np.zeros(7, np.int64))
    assert dones.tolist() == [True] * 2 + [False] * 5
    assert [i["diverged"] for i in infos] == dones.tolist()
    assert (rewards[:2] < -10).all() and (rewards[2:] > -3).all()


def test_two_of_one_seed_are_bit_equal_and_seeds_differ() -> None:
    def history(seed: int) -> list[Any]:
        env, generator = make([Chain, deep], memory_budget=[0.4, 0.6, 0.9], slots_per_run=3), np.random.default_rng(1)
        env.seed(seed)
        rows: list[Any] = [env.reset().tobytes()]
        for _ in range(7):
            found, rewards, dones, infos = env.step(rungs(env, generator))
            rows += [found.tobytes(), rewards.tobytes(), dones.tolist(), [i["layer_index"] for i in infos], infos[0]["budget"]]
        return rows

    assert history(3) == history(3) != history(4)


def test_budgets_are_drawn_for_every_episode() -> None:
    env = make(memory_budget=[0.4, 0.6, 0.9], horizon=4)
    env.seed(0)
    env.reset()
    budgets = {env.step(np.zeros(2, np.int64))[3][0]["budget"] for _ in range(20)}
    assert budgets == {int(b * 8 * (2 * 32 * 33)) for b in (0.4, 0.6, 0.9)}


def test_layers_without_a_slot_follow_the_driver_or_their_nearest_neighbour() -> None:
    asked: list[Any] = []

    def driver(observations: Any) -> Any:
        asked.append(observations.shape)
        return np.full(len(observations), LADDER.index("m8v8"))

    plain, driven = make(deep, slots_per_run=2, memory_budget=2.0), make(deep, slots_per_run=2, memory_budget=2.0, driver=driver)
    chosen = set()
    for env in (plain, driven):
        env.seed(0)
        env.reset()
    for _ in range(9):
        action = np.array([LADDER.index("m4v0"), LADDER.index("m4v0")])
        for env, others in ((plain, "m4v0"), (driven, "m8v8")):
            infos = env.step(action)[3]
            run = env.envs[0].run
            assert run is not None
            learning = [i["layer_index"] for i in infos]
            chosen.add(tuple(learning))
            if run.t:                                        # else the next run has started
                expected = ["m4v0" if i in learning else others for i in range(5)]
                assert [c.name for c in run.optimizer.applied] == expected
    assert asked == [(3, 64)] * 9
    assert len(chosen) > 1


def test_attributes_and_methods_reach_the_run_of_a_slot() -> None:
    env = make([Chain, deep])
    env.seed(0)
    env.reset()
    assert env.get_attr("max_layers") == [2, 2, 5, 5, 5, 5, 5]
    assert env.get_attr("max_layers", indices=[0, 6]) == [2, 5] and env.get_attr("max_layers", indices=2) == [5]
    env.set_attr("timings", True, indices=[3])
    assert env.get_attr("timings") == [False] * 2 + [True] * 5
    forks = env.env_method("fork", indices=[2, 3, 0])
    assert forks[0] is forks[1] is not forks[2] and len(forks[0].layers) == 5       # once per run
    with pytest.raises(AttributeError):
        env.get_attr("no_such_thing")
    from stable_baselines3.common.monitor import Monitor

    assert env.env_is_wrapped(Monitor) == [False] * 7
    state = str(np.random.get_state(legacy=False))           # noqa: NPY002
    assert len(env.seed()) == 7 and env.seed(5) == list(range(5, 12))
    assert str(np.random.get_state(legacy=False)) == state   # noqa: NPY002
    env.close()


@pytest.mark.parametrize("actions", ["knobs", "rung"])
def test_stock_ppo_trains_on_it(actions: str) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecMonitor

    env = VecMonitor(make([Chain, deep], actions=actions, reward=Reward(loss="raw")))
    model = PPO("MlpPolicy", env, n_steps=6, batch_size=21, n_epochs=2, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(84)
    assert model.num_timesteps == 84
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert len(model.ep_info_buffer or ()) == 28 and all(i["l"] == 3 for i in model.ep_info_buffer or ())
    mean, _ = evaluate_policy(model, env, n_eval_episodes=7)
    assert math.isfinite(float(mean))  # type: ignore[arg-type]


def test_importing_it_says_nothing() -> None:
    code = "from mango_env import LayerVecEnv"                # SB3 imports the dead gym, whose notice goes to stderr
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
