"""One policy through all stages: no logit changes where its weights cross into another library or into a file."""

import base64
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from mango.config import LADDER, NVEC
from mango.features import FEATURE_DIM, FEATURES
from mango.networks import PolicyNetwork
from mango.policy_file import freeze, load_policy
from train_policy import d3rlpy_backend
from train_policy.ppo import PpoArgs, build, policy_in
from train_policy.transfer import clone, convert, from_sb3, greedy, sb3_policy_kwargs

TOLERANCE = 1e-6


class Still(gym.Env[Any, Any]):
    """An environment of the right spaces in which nothing happens."""

    def __init__(self, head: str) -> None:
        low, high = np.array([f.low for f in FEATURES], np.float32), np.array([f.high for f in FEATURES], np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Discrete(len(LADDER)) if head == "rung" else spaces.MultiDiscrete(list(NVEC))

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(FEATURE_DIM, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(FEATURE_DIM, np.float32), 0.0, False, False, {}


def observations(n: int = 200) -> Tensor:
    low, high = torch.tensor([f.low for f in FEATURES]), torch.tensor([f.high for f in FEATURES])
    return low + (high - low) * torch.rand(n, FEATURE_DIM, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def network() -> PolicyNetwork:
    """Weights far from the uniform initial policy, a fitted normaliser."""
    found = PolicyNetwork("mlp", hidden=(48, 32), seed=3)
    found.fit_normaliser(observations(500) * 0.3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for head in (found.rung_head, found.knob_head, found.value_head):
            head.weight.normal_(generator=generator)
            head.bias.normal_(generator=generator)
    return found.eval()


def vec_env(head: str) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv

    return DummyVecEnv([lambda: Still(head)])


def sb3_of(network: PolicyNetwork, head: str) -> Any:
    return build(network, vec_env(head), PpoArgs(rollout=8, batch_size=8, head=head))


@pytest.mark.parametrize("head", ["rung", "knobs"])
def test_logits_agree_between_the_network_sb3_and_the_frozen_file(network: PolicyNetwork, head: str, tmp_path: Path) -> None:
    seen = observations()
    ppo = sb3_of(network, head)
    policy = policy_in(ppo)
    with torch.no_grad():
        ours = network(seen)
        expected = ours.rung_logits if head == "rung" else ours.knob_logits
        there = policy.action_net(policy.mlp_extractor.forward_actor(policy.pi_features_extractor(seen)))
        values = policy.predict_values(seen).squeeze(1)
    assert (there - expected).abs().max() <= TOLERANCE
    assert (values - ours.value).abs().max() <= TOLERANCE
    chosen, _ = ppo.predict(seen.numpy(), deterministic=True)
    assert np.array_equal(np.asarray(chosen).reshape(len(seen), -1), greedy(network, seen, head).numpy())

    back = from_sb3(policy)
    assert back.head == head and torch.equal(greedy(back.network, seen, head), greedy(network, seen, head))
    frozen = load_policy(freeze(back.network, tmp_path / "p", head=head, card={}))
    with torch.no_grad():
        again = frozen.network(seen)
    assert ((again.rung_logits if head == "rung" else again.knob_logits) - expected).abs().max() <= TOLERANCE
    first = greedy(network, seen, head)
    rungs = torch.tensor([rung.to_action() for rung in LADDER])
    assert torch.equal(frozen.act(seen), rungs[first[:, 0]] if head == "rung" else first)


def test_the_trunk_crosses_into_d3rlpy_and_back(network: PolicyNetwork) -> None:
    seen = observations()
    with torch.no_grad():
        expected = network.trunk(seen)
    for name in (*d3rlpy_backend.DISCRETE, *d3rlpy_backend.CONTINUOUS):
        algo = d3rlpy_backend.build(name, network, batch_size=32, learning_rate=1e-3, gamma=0.9)
        trunks = d3rlpy_backend.trunks_in(algo)
        assert len(trunks) >= 2                                                # the values and their targets
        for trunk in trunks:
            with torch.no_grad():
                assert (trunk(seen) - expected).abs().max() <= TOLERANCE
        target = clone(network)
        with torch.no_grad():
            for parameter in target.trunk.parameters():
                parameter.zero_()
        d3rlpy_backend.bring_back(algo, target, seen)
        with torch.no_grad():
            assert (target.trunk(seen) - expected).abs().max() <= TOLERANCE


def test_action_values_of_d3rlpy_become_rung_logits_exactly(network: PolicyNetwork, tmp_path: Path) -> None:
    seen = observations()
    algo = d3rlpy_backend.build("discrete-cql", network, batch_size=32, learning_rate=1e-3, gamma=0.9, seed=4)
    picked = algo.predict(seen.numpy())
    student = clone(network)
    d3rlpy_backend.bring_back(algo, student, seen)
    assert np.array_equal(greedy(student, seen).squeeze(1).numpy(), picked)
    algo.save(str(tmp_path / "cql.d3"))
    loaded = convert(tmp_path / "cql.d3", trust_pickle=True)
    assert loaded.head == "rung" and np.array_equal(greedy(loaded.network, seen).squeeze(1).numpy(), picked)
    with torch.no_grad():
        scaled, values = student(seen).rung_logits, loaded.network(seen).rung_logits
    ratio = values.std() / scaled.std()
    assert (values - ratio * scaled).abs().max() <= 1e-4 * values.abs().max()


def test_the_whole_chain_decides_as_its_first_link(network: PolicyNetwork, tmp_path: Path) -> None:
    """d3rlpy -> network -> SB3 -> zip -> network -> frozen file: the same rung everywhere."""
    seen = observations()
    algo = d3rlpy_backend.build("discrete-cql", network, batch_size=32, learning_rate=1e-3, gamma=0.9, seed=4)
    student = clone(network)
    d3rlpy_backend.bring_back(algo, student, seen)
    sb3_of(student, "rung").save(tmp_path / "ppo.zip")
    converted = convert(tmp_path / "ppo.zip", trust_pickle=True)
    frozen = load_policy(freeze(converted.network, tmp_path / "p", head=converted.head, card={}))
    assert np.array_equal(frozen.scores(seen).argmax(1).numpy(), algo.predict(seen.numpy()))


class _Payload:
    """Unpickling it makes a folder: harmless, and proof that code ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def malicious(kind: str, path: Path, target: Path) -> Path:
    payload = pickle.dumps(_Payload(target))
    if kind == ".d3":
        path.write_bytes(payload)
        return path
    field = {":type:": "<class 'function'>", ":serialized:": base64.b64encode(payload).decode()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({"policy_class": field, "clip_range": field}))
        archive.writestr("policy.pth", b"")
    return path


@pytest.mark.parametrize("kind", [".zip", ".d3"])
def test_a_malicious_checkpoint_is_refused_unless_it_is_trusted(kind: str, tmp_path: Path) -> None:
    planted = malicious(kind, tmp_path / f"evil{kind}", tmp_path / "executed")
    with pytest.raises(ValueError, match="trust_pickle=True") as refused:
        convert(planted)
    assert "\n" not in str(refused.value) and not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="runs code when loaded"):
        load_policy(planted)
    assert not (tmp_path / "executed").exists()
    # The payload is a real one: whoever vouches for the file does run it.
    with pytest.raises(Exception):  # noqa: B017 (each library fails in its own way after the code ran)
        convert(planted, trust_pickle=True)
    assert (tmp_path / "executed").is_dir()


def test_what_is_no_checkpoint_of_ours_is_named(network: PolicyNetwork, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    (tmp_path / "x.zip").write_bytes(b"no zip")
    for path, message in ((tmp_path / "no.zip", "no checkpoint"), (tmp_path / "x.pt", "not a training checkpoint")):
        with pytest.raises(ValueError, match=message):
            convert(path, trust_pickle=True)
    with pytest.raises(ValueError, match="not a zip file"):
        convert(tmp_path / "x.zip", trust_pickle=True)
    algo = d3rlpy_backend.build("td3+bc", network, batch_size=32, learning_rate=1e-3, gamma=0.9)
    algo.save(str(tmp_path / "td3.d3"))
    with pytest.raises(ValueError, match="TD3PlusBC"):
        convert(tmp_path / "td3.d3", trust_pickle=True)


def test_a_trunk_with_memory_is_refused_where_it_cannot_go() -> None:
    lstm = PolicyNetwork("lstm", hidden_dim=8, num_layers=1)
    with pytest.raises(ValueError, match="got 'lstm'"):
        sb3_policy_kwargs(lstm)
    with pytest.raises(ValueError, match="got 'lstm'"):
        d3rlpy_backend.build("iql", lstm, batch_size=8, learning_rate=1e-3, gamma=0.9)


def test_an_action_space_of_another_head_is_refused(network: PolicyNetwork) -> None:
    with pytest.raises(ValueError, match="MultiDiscrete over the knobs with head='knobs'"):
        build(network, vec_env("rung"), PpoArgs(rollout=8, batch_size=8, head="knobs"))
