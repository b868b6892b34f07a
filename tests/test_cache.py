"""Promises of the training cache: every transition, aligned, at random, from files that may exceed memory."""

import pickle
import signal
from pathlib import Path

import numpy as np
import pytest

from mango_env.cache import COLUMNS, build_cache, load_cache
from mango_env.dataset import TrajectoryDataset
from tests.made_episodes import build_cache_killed_after, finish, make_episode, record, start, tag, writer


def test_the_cache_has_every_transition_with_its_next_observation(tmp_path: Path) -> None:
    made = [make_episode(run, steps=3 + run, truncated=run == 1) for run in range(4)]
    with writer(tmp_path, episodes_per_shard=2) as w:
        for episode in made:
            w.add(episode)
    cache = build_cache(tmp_path)
    assert len(cache) == sum(len(e) for e in made)
    batch = next(cache.batches(len(cache), np.random.default_rng(0)))
    order = np.argsort(batch.rows)
    for name, arrays in {
        "observations": [e.observations[:-1] for e in made],
        "next_observations": [e.observations[1:] for e in made],
        "actions": [e.actions for e in made],
        "rewards": [e.rewards for e in made],
        "terminated": [e.terminations for e in made],
        "rungs": [e.infos["rung"] for e in made],
        "behavior_logp": [e.infos["behavior_logp"] for e in made],
    }.items():
        np.testing.assert_array_equal(getattr(batch, name)[order], np.concatenate(arrays), strict=True)
    for view, episode in zip(cache.episodes(), made, strict=True):
        assert set(view) == set(COLUMNS)
        np.testing.assert_array_equal(view["observations"], episode.observations)
        np.testing.assert_array_equal(view["reward_loss"], episode.infos["reward_loss"])
        assert not view["observations"].flags.owndata, "views, not copies"
    np.testing.assert_allclose(cache.returns(), [e.returns for e in made])
    np.testing.assert_allclose(cache.returns(0.5)[0], made[0].rewards @ np.array([1, 0.5, 0.25]), rtol=1e-6)
    assert cache.attributes["seed"] == [0, 1, 2, 3] and cache.digest == TrajectoryDataset(tmp_path).digest


def test_sampling_is_uniform_over_transitions_and_seeded(tmp_path: Path) -> None:
    with writer(tmp_path) as w:
        for run, steps in enumerate((1, 2, 40)):
            w.add(make_episode(run, steps=steps))
    cache = build_cache(tmp_path)
    rows = cache.sample(43_000, np.random.default_rng(0)).rows
    counts = np.unique(rows, return_counts=True)[1]
    assert len(counts) == 43 and counts.min() > 800 and counts.max() < 1200                  # 1000 +- 6 standard deviations
    again = cache.sample(43_000, np.random.default_rng(0)).rows
    np.testing.assert_array_equal(rows, again)


def test_sequences_stay_within_their_episode(tmp_path: Path) -> None:
    made = {run: make_episode(run, steps=steps) for run, steps in enumerate((3, 5, 9))}
    with writer(tmp_path) as w:
        for episode in made.values():
            w.add(episode)
    cache = build_cache(tmp_path)
    batch = cache.sequences(4, np.random.default_rng(0), batch=500)
    assert batch.observations.shape == (500, 4, 64) and batch.mask.shape == (500, 4)
    for b in range(500):
        run = int(batch.observations[b, 0, 0])
        episode, start, real = made[run], int(batch.starts[b]), batch.mask[b]
        assert real.sum() == min(4, len(episode)) and real[: real.sum()].all()
        stretch = slice(start, start + real.sum())
        np.testing.assert_array_equal(batch.observations[b][real], episode.observations[:-1][stretch])
        np.testing.assert_array_equal(batch.next_observations[b][real], episode.observations[1:][stretch])
        np.testing.assert_array_equal(batch.rewards[b][real], episode.rewards[stretch])
    assert {int(s) for s in batch.starts} == set(range(6))
    with pytest.raises(ValueError, match="length=0"):
        cache.sequences(0, np.random.default_rng(0))


def test_a_selection_sees_its_episodes_only_and_crosses_processes(tmp_path: Path) -> None:
    made = record(tmp_path)
    cache = build_cache(tmp_path)
    best = cache.select(cache.returns() >= np.quantile(cache.returns(), 0.5))
    assert len(best.lengths) == 4 and len(best) == 24
    seen = np.unique(best.sample(2000, np.random.default_rng(0)).observations[:, 0])
    wanted = {float(tag(made[i].attributes["seed"], made[i].key[1], t)) for i in best.indices for t in range(6)}
    assert {float(x) for x in seen} == wanted
    assert best.select(np.array([1])).attributes["run_id"] == [best.attributes["run_id"][1]]
    frozen = pickle.dumps(best)
    assert len(frozen) < 2000, "the files are opened again, their content is not sent"
    np.testing.assert_array_equal(pickle.loads(frozen).begins, best.begins)


def test_the_cache_is_built_once_per_content_and_follows_it(tmp_path: Path) -> None:
    record(tmp_path)
    first = build_cache(tmp_path)
    stamp = (first.path / "cache.json").stat().st_mtime_ns
    assert build_cache(tmp_path).path == first.path and (first.path / "cache.json").stat().st_mtime_ns == stamp
    with writer(tmp_path) as w:
        w.add(make_episode(99))
    second = build_cache(tmp_path)
    assert second.path != first.path and len(second) == len(first) + 6
    assert len(load_cache(first.path)) == len(first), "the earlier one still stands"
    elsewhere = build_cache(tmp_path, tmp_path / "fast disk")
    assert elsewhere.path.parent == tmp_path / "fast disk" and len(elsewhere) == len(second)


def test_a_damaged_cache_is_refused_and_a_half_built_one_is_rebuilt(tmp_path: Path) -> None:
    record(tmp_path)
    cache = build_cache(tmp_path)
    with (cache.path / "observations.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"the cache is damaged .*delete the folder"):
        build_cache(tmp_path)
    (cache.path / "cache.json").unlink()
    assert len(build_cache(tmp_path)) == 48


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    record(tmp_path)
    assert finish(start(build_cache_killed_after, tmp_path, 3)) == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.suffix == ".tmp"]
    assert finish(start(build_cache_killed_after, tmp_path, 0)) == 0
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")] == [TrajectoryDataset(tmp_path).digest]
