"""Promises of the ways out: d3rlpy, Minari and NumPy get every transition and every reward, aligned."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mango.config import LADDER, NVEC
from mango_env.adapters import from_continuous, from_minari, import_d3rlpy, to_continuous, to_d3rlpy, to_minari, to_npz
from mango_env.cache import build_cache
from mango_env.curate import compact
from mango_env.dataset import TrajectoryDataset
from mango_env.episode import INFOS, Episode
from mango_env.layout import minari_root
from mango_env.reward import Reward
from mango_env.validate import validate
from tests.made_episodes import REWARD, make_episode, record, same, tag, writer

CHECKOUT = Path(__file__).resolve().parent.parent
TRAIN = 'needs pip install "mango-optim[train]"'


@pytest.fixture(scope="module")
def d3rlpy() -> Any:
    try:
        return import_d3rlpy()
    except ImportError:
        pytest.skip(TRAIN)


@pytest.fixture
def minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return pytest.importorskip("minari", reason=TRAIN)


def tagged_store(root: Path) -> list[Episode]:
    """Episodes of 1 to 5 steps; those of run 1 were stopped from outside."""
    made = [make_episode(run, layer, steps=1 + run + layer, truncated=run == 1) for run in range(4) for layer in range(2)]
    with writer(root, episodes_per_shard=3) as w:
        for episode in made:
            w.add(episode)
    return made


def transitions(buffer: Any) -> list[Any]:
    """Every transition that d3rlpy can ever sample, as its sampler picks it."""
    inner = buffer.buffer
    return [buffer.transition_picker(*inner[i]) for i in range(inner.transition_count)]


@pytest.mark.parametrize("through", [Path, build_cache, TrajectoryDataset])
def test_d3rlpy_gets_every_transition_aligned_and_every_reward(d3rlpy: Any, tmp_path: Path, through: Any) -> None:
    made = tagged_store(tmp_path)
    buffer = to_d3rlpy(through(tmp_path))
    found = transitions(buffer)
    assert len(found) == sum(len(e) for e in made) == buffer.transition_count
    at = iter(found)
    for episode in made:
        run, layer = episode.attributes["seed"], episode.key[1]
        for t in range(len(episode)):
            transition, last = next(at), t == len(episode) - 1
            assert transition.observation[0] == tag(run, layer, t)
            np.testing.assert_array_equal(transition.observation, episode.observations[t])
            assert transition.action.tolist() == [episode.infos["rung"][t]]
            assert transition.reward.tolist() == [episode.rewards[t]]
            assert transition.terminal == float(last and run != 1)
            if not transition.terminal:
                np.testing.assert_array_equal(transition.next_observation, episode.observations[t + 1])
    assert [e.compute_return() for e in buffer.episodes] == pytest.approx([e.returns for e in made], rel=1e-6)
    assert max(float(t.reward[0]) for t in found) > 99, "the large last rewards are there"


def test_d3rlpys_own_readers_would_have_lost_and_shifted_them(d3rlpy: Any, tmp_path: Path) -> None:
    """Why the adapter is our own: these are the traps. If one of them is mended upstream, this test says so."""
    truncated = make_episode(0, 0, steps=5, truncated=True)
    dataset = d3rlpy.dataset.MDPDataset(
        observations=truncated.observations[:-1],
        actions=truncated.infos["rung"].astype(np.int32),
        rewards=truncated.rewards,
        terminals=np.zeros(5, np.float32),
        timeouts=truncated.truncations.astype(np.float32),
        action_size=len(LADDER),
    )
    assert dataset.transition_count == 4 and max(float(t.reward[0]) for t in transitions(dataset)) < 99


def test_the_action_size_is_the_ladders_whatever_was_tried(d3rlpy: Any, tmp_path: Path) -> None:
    episode = make_episode(steps=1)
    with writer(tmp_path) as w:
        w.add(episode)
    discrete, continuous = to_d3rlpy(tmp_path).dataset_info, to_d3rlpy(tmp_path, actions="continuous").dataset_info
    assert (discrete.action_size, discrete.action_space) == (len(LADDER), d3rlpy.ActionSpace.DISCRETE)
    assert (continuous.action_size, continuous.action_space) == (len(NVEC), d3rlpy.ActionSpace.CONTINUOUS)
    with pytest.raises(ValueError, match=r"actions='joint' is not one of \('rung', 'continuous'\)"):
        to_d3rlpy(tmp_path, actions="joint")


def test_the_continuous_view_keeps_the_knobs(d3rlpy: Any, tmp_path: Path) -> None:
    made = tagged_store(tmp_path)
    found = transitions(to_d3rlpy(tmp_path, actions="continuous"))
    values = np.stack([t.action for t in found])
    assert values.dtype == np.float32 and np.abs(values).max() <= 1
    np.testing.assert_array_equal(from_continuous(values), np.concatenate([e.actions for e in made]))


def test_every_action_survives_the_way_through_the_continuous_box() -> None:
    every = np.stack(np.meshgrid(*(np.arange(n) for n in NVEC), indexing="ij"), -1).reshape(-1, len(NVEC)).astype(np.int8)
    values = to_continuous(every)
    np.testing.assert_array_equal(from_continuous(values), every)
    assert values.min() == -1 and values.max() == 1
    np.testing.assert_array_equal(from_continuous(np.full(7, 9.0)), np.array(NVEC) - 1)
    np.testing.assert_array_equal(from_continuous(np.full(7, -9.0)), 0)


@pytest.mark.parametrize(
    ("algorithm", "actions"), [("DiscreteCQLConfig", "rung"), ("IQLConfig", "continuous"), ("BCConfig", "continuous")]
)
def test_c12_pre_collected_trajectories_train_d3rlpy(d3rlpy: Any, tmp_path: Path, algorithm: str, actions: str) -> None:
    """HDF5 to d3rlpy: the algorithms really take gradient steps on the recorded episodes and then act on any observation."""
    record(tmp_path / "store", runs=4, steps=20)
    buffer = to_d3rlpy(tmp_path / "store", actions=actions)
    algo = getattr(d3rlpy.algos, algorithm)(batch_size=32).create(device="cpu:0")
    algo.build_with_dataset(buffer)
    losses = [algo.update(buffer.sample_transition_batch(32)) for _ in range(30)]
    assert all(np.isfinite(list(loss.values())).all() for loss in losses)
    acted = algo.predict(build_cache(tmp_path / "store").columns["observations"][:5])
    assert acted.shape == ((5,) if actions == "rung" else (5, 7))
    assert (from_continuous(acted) < NVEC).all() if actions == "continuous" else set(acted.tolist()) <= set(range(len(LADDER)))


def test_minari_loads_a_store_where_it_lies(minari: Any) -> None:
    root = minari_root("digits_mlp", "random")
    made = record(root)
    assert root.parts[-3:] == ("mango", "digits_mlp", "random-v0")
    dataset = minari.load_dataset("mango/digits_mlp/random-v0")
    assert (dataset.total_episodes, dataset.total_steps, dataset.id) == (8, 48, "mango/digits_mlp/random-v0")
    assert dataset.action_space.nvec.tolist() == list(NVEC) and dataset.observation_space.shape == (64,)
    assert list(minari.list_local_datasets()) == ["mango/digits_mlp/random-v0"]
    for data, episode in zip(dataset, made, strict=True):
        run, layer = episode.attributes["seed"], episode.key[1]
        np.testing.assert_array_equal(data.observations[:, 0], [tag(run, layer, t) for t in range(7)])
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(data, name), getattr(episode, name), strict=True)
        assert set(data.infos) == set(INFOS)
        assert all(dataset.observation_space.contains(row) for row in data.observations)
        assert all(dataset.action_space.contains(row) for row in data.actions)
    facts = next(iter(dataset.storage.get_episode_metadata([3])))
    assert (facts["run_id"], facts["total_steps"], facts["seed"]) == (made[3].key[0], 6, made[3].attributes["seed"])
    assert len(dataset.filter_episodes(lambda data: data.observations[0, 0] >= 2)) == 4
    assert len(list(dataset.sample_episodes(3))) == 3
    assert to_minari(root).id == dataset.id, "it is there already"


@pytest.mark.parametrize("packed", [False, True])
def test_to_minari_registers_a_store_from_anywhere(minari: Any, tmp_path: Path, packed: bool) -> None:
    made = record(tmp_path / "store")
    source = compact(tmp_path / "store", tmp_path / "all.h5") if packed else tmp_path / "store"
    dataset = to_minari(source, "mango/digits_mlp/mine-v3")
    assert dataset.id == "mango/digits_mlp/mine-v3" and list(minari.list_local_datasets()) == [dataset.id]
    for data, episode in zip(dataset, made, strict=True):
        np.testing.assert_array_equal(data.observations, episode.observations, strict=True)
        np.testing.assert_array_equal(data.rewards, episode.rewards, strict=True)
    registered = tmp_path / "minari" / "mango" / "digits_mlp" / "mine-v3"
    assert validate(registered).ok and TrajectoryDataset(registered).digest == TrajectoryDataset(source).digest
    assert to_minari(source, dataset.id).total_episodes == 8
    record(tmp_path / "other", runs=1)
    with pytest.raises(ValueError, match="holds other data"):
        to_minari(tmp_path / "other", dataset.id)
    with pytest.raises(ValueError, match="must read mango/"):
        to_minari(source, "nonsense")


def test_from_minari_is_the_way_back(minari: Any, tmp_path: Path) -> None:
    made = record(tmp_path / "store")
    dataset = to_minari(tmp_path / "store")
    back = from_minari(dataset.id, tmp_path / "back")
    assert all(same(a, b) for a, b in zip(TrajectoryDataset(back), made, strict=True)) and validate(back).ok
    best = dataset.filter_episodes(lambda data: data.observations[0, 0] >= 2)
    some = from_minari(best, tmp_path / "some")
    assert [e.key for e in TrajectoryDataset(some)] == [e.key for e in made[4:]]


@pytest.mark.filterwarnings("ignore::UserWarning:minari.utils")
def test_from_minari_refuses_what_is_not_ours_in_one_line(minari: Any, tmp_path: Path) -> None:
    from gymnasium.spaces import Box, Discrete
    from minari.data_collector import EpisodeBuffer

    arrays = {"rewards": [0.0] * 4, "terminations": [False] * 3 + [True], "truncations": [False] * 4}
    episode = EpisodeBuffer(observations=np.zeros((5, 3), np.float32), actions=np.zeros(4, np.int64), **arrays, infos={})
    spaces = {"observation_space": Box(-1, 1, (3,)), "action_space": Discrete(2)}
    facts = dict.fromkeys(("algorithm_name", "code_permalink", "author", "author_email", "description"), "x")
    foreign = minari.create_dataset_from_buffers("other/thing-v0", [episode], **facts, **spaces)
    with pytest.raises(ValueError, match="has no 'mango' in its metadata"):
        from_minari(foreign, tmp_path / "out")
    with pytest.raises(ValueError, match=r"actions have shape \(4,\)"):
        from_minari(foreign, tmp_path / "out", reward=Reward())


def test_npz_holds_everything_and_needs_no_pickle(tmp_path: Path) -> None:
    made = tagged_store(tmp_path / "store")
    for source in (tmp_path / "store", TrajectoryDataset(tmp_path / "store")):
        with np.load(to_npz(source, tmp_path / "all.npz"), allow_pickle=False) as found:
            np.testing.assert_array_equal(found["lengths"], [len(e) for e in made])
            np.testing.assert_array_equal(found["observations"], np.concatenate([e.observations for e in made]), strict=True)
            for name in ("actions", "rewards", "terminations", "truncations"):
                np.testing.assert_array_equal(found[name], np.concatenate([getattr(e, name) for e in made]), strict=True)
            np.testing.assert_array_equal(found["reward_loss"], np.concatenate([e.infos["reward_loss"] for e in made]))
            assert LADDER.from_json(str(found["ladder"])) == LADDER
            assert REWARD.to_json() in str(found["attributes"]).replace('\\"', '"')
    with pytest.raises(OSError, match="cannot write"):
        to_npz(tmp_path / "store", tmp_path / "nowhere" / "all.npz")


def test_importing_the_store_loads_neither_d3rlpy_nor_sb3_nor_minari() -> None:
    names = ("store", "salvage", "dataset", "cache", "validate", "curate", "adapters")
    code = f"import sys; {'; '.join(f'import mango_env.{name}' for name in names)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) & {"gym", "gym_notices", "d3rlpy", "stable_baselines3", "minari"} == set() and run.stderr == ""


def test_d3rlpy_is_imported_without_the_dead_gyms_notice(d3rlpy: Any) -> None:
    code = "from mango_env.adapters import import_d3rlpy; import_d3rlpy()"
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert "Gym has been unmaintained" not in run.stderr


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "d3rlpy", None)
    with pytest.raises(ImportError, match=r'd3rlpy cannot be imported .*pip install "mango-optim\[train\]"'):
        import_d3rlpy()
