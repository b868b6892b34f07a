"""Promises of `Mango/TrainingRun-v0`."""

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env, data_equivalence
from torch import Tensor, nn

import mango_env
from mango.config import LADDER, NVEC, CompressionConfig
from mango.features import FEATURES
from mango_env import twin as twins
from mango_env.env import MangoEnv
from mango_env.reward import Reward

ENV_ID = mango_env.ENV_ID
EIGHT = CompressionConfig(momentum_bits=8, variance_bits=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Twins go to a folder of the test's own, and memory forgets them."""
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))
    twins._remembered.cache_clear()
    yield tmp_path
    twins._remembered.cache_clear()


class Autoencoder:
    """Two layers to decide for. `fault` makes it fail from its `after`-th loss on."""

    steps = 40

    def __init__(self, seed: int, fault: str = "", after: int = 8) -> None:
        if fault == f"seed {seed}":
            raise OSError("this seed's data are missing")
        self.generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 32))
        self.fault, self.after, self.count = fault, after, 0

    def loss(self) -> Tensor:
        self.count += 1
        x = torch.randn(8, 32, generator=self.generator)
        loss = F.mse_loss(self.model(x), x)
        if self.count <= self.after:
            return loss
        if self.fault == "raise":
            raise RuntimeError("out of coffee")
        return loss * math.nan if self.fault == "nan" else loss

    def evaluate(self) -> dict[str, float]:
        if self.fault == "evaluate":
            raise RuntimeError("no held-out part")
        return {"val_loss": float(next(self.model.parameters()).detach().square().mean())}


def make(**options: Any) -> MangoEnv:
    return MangoEnv(**{"workload": Autoencoder, "horizon": 40, "interval": 4, "memory_budget": 0.6, "seeds": 3, **options})


def equal(a: Any, b: Any) -> bool:
    return bool(data_equivalence(a, b, exact=True))


@pytest.mark.parametrize("actions", ["knobs", "rung"])
@pytest.mark.parametrize("workload", ["digits_mlp", Autoencoder])
def test_c6_gymnasiums_check_env_passes_without_a_warning(workload: Any, actions: str) -> None:
    options: list[dict[str, Any]] = [
        {"horizon": 20, "interval": 5, "render_mode": "ansi"},
        {"horizon": 5, "interval": 5},                       # one decision per episode
        {"horizon": 20, "max_layers": 7, "render_mode": "rgb_array"},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for option in options:
            made = gym.make(ENV_ID, workload=workload, memory_budget=0.6, seeds=2, actions=actions, **option)
            check_env(made.unwrapped)


@pytest.mark.parametrize("actions", ["knobs", "rung"])
def test_c6_sb3s_check_env_passes(actions: str) -> None:
    check_sb3 = pytest.importorskip("stable_baselines3.common.env_checker").check_env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A matrix of features is what the design asks for; SB3 advises to flatten it, which a wrapper does.
        warnings.filterwarnings("ignore", message="Your observation layers has an unconventional shape")
        check_sb3(make(actions=actions))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sb3(gym.wrappers.FlattenObservation(make(actions=actions)))


def test_spaces_are_as_documented() -> None:
    env = gym.make(ENV_ID, workload="digits_mlp", horizon=200, interval=10, memory_budget=0.25)
    base = env.unwrapped
    assert isinstance(base, MangoEnv) and isinstance(env.observation_space, gym.spaces.Dict)
    count = len(base.layers)
    assert base.max_layers == count == 3
    spaces = env.observation_space.spaces
    assert (spaces["layers"].shape, spaces["global"].shape, spaces["mask"].shape) == ((count, 64), (15,), (count,))
    layers = spaces["layers"]
    assert isinstance(layers, gym.spaces.Box) and layers.dtype == np.float32
    assert layers.low[0].tolist() == [f.low for f in FEATURES] and layers.high[-1].tolist() == [f.high for f in FEATURES]
    assert isinstance(env.action_space, gym.spaces.MultiDiscrete)
    assert env.action_space.nvec.tolist() == list(NVEC) * count
    assert make(actions="rung").action_space == gym.spaces.MultiDiscrete([len(LADDER)] * 2)
    assert env.spec is not None
    assert "mango_env.env:MangoEnv" in env.spec.to_json()                       # Minari stores it
    base.close()                                             # type: ignore[no-untyped-call]


def test_an_episode_runs_to_its_horizon_and_terminates() -> None:
    env = make(workload="digits_mlp", horizon=50, interval=20, memory_budget=0.3)
    _, info = env.reset(seed=1)
    assert info["run_seed"] in range(3) and info["budget"] == int(0.3 * 8 * 26_122)
    action = np.tile(EIGHT.to_action(), 3)
    times, over = [], False
    while not over:
        observation, reward, over, truncated, info = env.step(action)
        assert observation in env.observation_space
        assert not truncated
        assert reward == pytest.approx(info["reward_layers"].mean())
        weights, parts = Reward(), info["reward_components"]
        recomputed = -weights.alpha * parts["loss"] + weights.beta * parts["memory"] - weights.gamma * parts["error"]
        assert reward == pytest.approx(recomputed, abs=1e-6)
        assert info["applied"].tolist() == [list(EIGHT.to_action())] * 3
        assert info["bytes"].sum() < info["state_bytes_peak"] <= info["budget"]
        times.append(info["t"])
    assert times == [20, 40, 50]
    assert info["val_loss"] == info["evaluation"]["val_loss"] > 0
    assert not info["diverged"] and "error" not in info
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)


def test_the_observation_is_the_runs_and_padding_is_masked() -> None:
    env = make(max_layers=5)
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(6):
        assert env.run is not None
        seen = env.run.observe()
        assert (observation["layers"][:2] == seen).all() and (observation["layers"][2:] == 0).all()
        assert (observation["global"] == seen[0, 49:]).all() and (observation["global"] == seen[1, 49:]).all()
        assert observation["mask"].tolist() == [1, 1, 0, 0, 0]
        observation = env.step(env.action_space.sample())[0]
    with pytest.raises(ValueError, match="has 2 layers"):
        make(max_layers=1)


def test_observations_are_in_their_space_for_many_steps_of_random_actions() -> None:
    env = make(horizon=60, interval=1, memory_budget=[0.3, 0.6, 2.0], reward=Reward(loss="raw"))
    env.action_space.seed(0)
    env.reset(seed=0)
    over = False
    for _ in range(500):
        if over:
            observation, _ = env.reset()
            assert observation in env.observation_space
        observation, reward, over, _, info = env.step(env.action_space.sample())
        assert observation in env.observation_space
        assert math.isfinite(float(reward))
        assert info["state_bytes_peak"] <= info["budget"]


def test_two_environments_of_one_seed_are_bit_equal_also_after_a_second_reset() -> None:
    one, two = make(memory_budget=[0.4, 0.8]), make(memory_budget=[0.4, 0.8])
    one.action_space.seed(5)
    actions, histories = [one.action_space.sample() for _ in range(30)], []
    for env in (one, two):
        history: list[Any] = [env.reset(seed=11)]
        for action in actions:
            history.append(env.step(action))
            if env.over:
                history.append(env.reset())
        histories.append(history)
    assert equal(*histories)
    assert not equal(one.reset(seed=11)[0], one.reset(seed=12)[0]) or one.reset(seed=11)[1] != one.reset(seed=12)[1]


def test_seeds_and_budgets_are_drawn_from_their_pools_or_given() -> None:
    env = make(seeds=[5, 9], memory_budget=[0.4, "20KiB", 15_000])
    infos = [env.reset(seed=s)[1] for s in range(20)]
    assert {i["run_seed"] for i in infos} == {5, 9}
    assert {i["budget"] for i in infos} == {int(0.4 * 8 * 2_632), 20 * 1024, 15_000}
    _, info = env.reset(options={"run_seed": 77, "memory_budget": 0.9})
    assert (info["run_seed"], info["budget"]) == (77, int(0.9 * 8 * 2_632))
    with pytest.raises(ValueError, match="run_seed, memory_budget"):
        env.reset(options={"horizon": 3})


def test_rungs_and_knobs_name_the_same_configs() -> None:
    by_rung, by_knobs = make(actions="rung", memory_budget=2.0), make(memory_budget=2.0)
    for env in (by_rung, by_knobs):
        env.reset(seed=0)
    rungs = np.array([LADDER.index("m8v8"), LADDER.index("full")])
    first = by_rung.step(rungs)
    second = by_knobs.step(np.concatenate([LADDER[int(r)].to_action() for r in rungs]))
    assert equal(first, second)
    assert first[4]["applied"].tolist() == [list(LADDER[int(r)].to_action()) for r in rungs]


def test_an_action_outside_the_space_is_the_callers_error() -> None:
    env = make()
    env.reset(seed=0)
    for action in (np.zeros(3, np.int64), np.full(14, 99)):
        with pytest.raises(ValueError, match="7 knob indices for each of 2 layers"):
            env.step(action)


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_step_never_raises_for_a_workload_that_fails(fault: str) -> None:
    env = make(workload_kwargs={"fault": fault})
    env.reset(seed=0)
    reward, over, steps = 0.0, False, 0
    while not over:
        observation, reward, over, truncated, info = env.step(env.action_space.sample())  # type: ignore[assignment]
        assert observation in env.observation_space and not truncated
        steps += 1
    assert steps == 3 and info["diverged"]
    assert info.get("error") == ("RuntimeError: out of coffee" if fault == "raise" else None)
    assert reward <= -2.0 * 8 + 0.2                                             # 8 of 10 decisions were lost
    assert env.reset()[0] in env.observation_space


def test_reset_never_raises_for_a_seed_that_fails() -> None:
    env = make(workload_kwargs={"fault": "seed 1"}, seeds=[0, 1])
    failed = 0
    for seed in range(8):
        observation, info = env.reset(seed=seed)
        assert observation in env.observation_space
        after, reward, over, truncated, stepped = env.step(env.action_space.sample())
        assert after in env.observation_space and not truncated
        if info["run_seed"] == 1:
            failed += 1
            assert over and stepped["diverged"] and float(reward) < -1
            assert info["error"] == stepped["error"] == "OSError: this seed's data are missing"
        else:
            assert not over
    assert 0 < failed < 8
    assert env.reset(options={"run_seed": 1})[1]["error"]
    with pytest.raises(ValueError, match="least feasible is"):
        env.reset(options={"run_seed": 0, "memory_budget": 64})


def test_a_failing_evaluation_leaves_the_episode_standing() -> None:
    env = make(workload_kwargs={"fault": "evaluate"}, horizon=4)
    env.reset(seed=0)
    _, _, over, _, info = env.step(env.action_space.sample())
    assert over and not info["diverged"]
    assert info["error"] == "RuntimeError: no held-out part" and info["val_loss"] == math.inf


def test_bad_arguments_say_what_is_allowed() -> None:
    for options, message in (
        ({"workload": "digits_mpl"}, "digits_mlp"),
        ({"memory_budget": 64}, "least feasible is"),
        ({"memory_budget": [0.5, 64]}, "least feasible is"),
        ({"memory_budget": []}, "at least one"),
        ({"actions": "bits"}, "knobs"),
        ({"rule": "sgdm"}, "adamw"),
        ({"reward": {"delta": 1.0}}, "alpha"),
        ({"render_mode": "human"}, "ansi"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_a_fork_continues_bit_equally_and_independently() -> None:
    env = make()
    env.reset(seed=3)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(20)]
    for action in actions[:4]:
        env.step(action)
    fork, stray = env.fork(), env.fork()
    stray.step(actions[19])
    for action in actions[4:]:
        assert equal(env.step(action), fork.step(action))
        if env.over:
            assert equal(env.reset(), fork.reset())                             # the generator was forked as well


def test_timings_are_reported_on_request_only() -> None:
    env = make(timings=True)
    env.reset(seed=0)
    info = env.step(env.action_space.sample())[4]
    assert info["seconds"] > 0 and info["overhead_frac"] == env.overhead_frac > 0
    plain = make()
    plain.reset(seed=0)
    assert "seconds" not in plain.step(plain.action_space.sample())[4]


def test_rendering_is_one_line_of_text() -> None:
    env = gym.make(ENV_ID, workload="digits_mlp", horizon=20, interval=10, actions="rung", render_mode="ansi")
    env.reset(seed=0)
    assert str(env.render()) == "t=0/20"
    env.step(np.array([LADDER.index("m4v0")] * 3))
    text = str(env.render())
    assert text.startswith("t=10/20 loss=") and text.endswith("[m4v0 x3]") and "\n" not in text
    env.close()                                              # type: ignore[no-untyped-call]


def test_the_image_of_an_episode_has_a_cell_per_layer_and_decision() -> None:
    env = make(render_mode="rgb_array", actions="rung", memory_budget=2.0)
    env.reset(seed=0)
    env.step(np.array([LADDER.index("full"), LADDER.index("m4v0")]))
    image = env.render()
    assert isinstance(image, np.ndarray) and image.shape == (2 * 8, 10 * 8, 3) and image.dtype == np.uint8
    first, second, coming = image[0, 0], image[8, 0], image[0, 8]
    assert (first == 0).all() and (second > 200).all() and coming.tolist() == [24, 32, 72]


def test_sb3_and_gymnasium_make_vectors_of_it_without_a_warning() -> None:
    env_util = pytest.importorskip("stable_baselines3.common.env_util")
    options: dict[str, Any] = {"workload": "digits_mlp", "horizon": 20, "actions": "rung", "reward": {"loss": "raw"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        venv = env_util.make_vec_env(ENV_ID, n_envs=2, env_kwargs=options, seed=0)  # asks for render_mode="rgb_array"
        venv.reset()
        _, rewards, _, infos = venv.step(np.zeros((2, 3), np.int64))
        assert rewards.shape == (2,) and venv.render(mode="rgb_array").ndim == 3 and infos[0]["t"] == 10
        venv.close()
        both = gym.make_vec(ENV_ID, num_envs=2, vectorization_mode="sync", **options)
        both.reset(seed=0)
        for _ in range(3):
            both.step(both.action_space.sample())
        both.close()


def test_ppo_of_sb3_trains_on_the_dict_observation() -> None:
    ppo = pytest.importorskip("stable_baselines3").PPO
    model = ppo("MultiInputPolicy", make(actions="rung"), n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    model.learn(32)
    assert model.num_timesteps == 32


def test_import_mango_env_loads_no_trainer_and_registers_the_environment() -> None:
    code = (
        "import json, sys, mango_env, gymnasium; "
        "heavy = {'d3rlpy', 'stable_baselines3', 'gym', 'minari', 'sklearn'} & set(sys.modules); "
        "print(json.dumps([sorted(heavy), 'Mango/TrainingRun-v0' in gymnasium.registry, dir(mango_env)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, registered, names = json.loads(run.stdout)
    assert (heavy, registered, run.stderr) == ([], True, "")
    assert {"LayerVecEnv", "TrajectoryRecorder", "TrainingRun", "make_workload"} <= set(names)


def test_every_exported_name_can_be_imported() -> None:
    for name in mango_env.__all__:
        assert getattr(mango_env, name) is not None
    with pytest.raises(AttributeError, match="TrainingRun"):
        mango_env.NoSuchThing                                # noqa: B018
