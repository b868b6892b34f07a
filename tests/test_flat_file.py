"""Promises of flat files: what training reads in a fraction of a store's bytes, numbers rounded as far as is said."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from mango.policy_file import load_policy
from mango_env import flat_file
from mango_env.cache import COLUMNS, TrajectoryCache, build_cache, flatten
from mango_env.dataset import TrajectoryDataset
from mango_env.flat_file import rounded
from tests.made_episodes import make_episode, writer
from train_policy.additive import outcomes_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cache(tmp_path: Path) -> TrajectoryCache:
    rng = np.random.default_rng(0)
    with writer(tmp_path / "store") as w:
        for run in range(4):
            episode = make_episode(run, steps=3 + run)
            episode.observations[:] = rng.normal(size=episode.observations.shape)
            w.add(episode)
    return build_cache(tmp_path / "store")


def test_what_is_read_back_is_what_was_written_but_for_the_last_bits(cache: TrajectoryCache, tmp_path: Path) -> None:
    found = build_cache(flatten(cache, tmp_path / "flat.h5"))
    assert found.path.parent == tmp_path / "flat.h5.cache" and found.digest == cache.digest and found.header == cache.header
    np.testing.assert_array_equal(found.lengths, cache.lengths)
    for name, (dtype, _) in COLUMNS.items():
        near = 2.0**-11 if dtype == np.float32 else 0.0
        np.testing.assert_allclose(found.columns[name], cache.columns[name], rtol=near, atol=0, strict=True)
    moved = np.mean(found.columns["observations"] != cache.columns["observations"])
    assert moved > 0.9, "numbers were rounded"
    assert found.attributes == {name: values for name, values in cache.attributes.items() if name != "digest"}
    assert build_cache(tmp_path / "flat.h5").path == found.path


def test_with_all_bits_nothing_is_lost(cache: TrajectoryCache, tmp_path: Path) -> None:
    found = build_cache(flatten(cache, tmp_path / "flat.h5", bits=23), tmp_path / "elsewhere")
    assert found.path.parent == tmp_path / "elsewhere"
    for name in COLUMNS:
        np.testing.assert_array_equal(found.columns[name], cache.columns[name], strict=True)


def test_a_selection_is_all_that_its_file_has(cache: TrajectoryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_file, "ROWS", 4)                                        # several blocks
    monkeypatch.setattr("mango_env.cache.ROWS", 4)
    chosen = cache.select(np.array([3, 1]))
    found = build_cache(flatten(chosen, tmp_path / "flat.h5", bits=23))
    assert found.attributes["seed"] == [3, 1] and found.lengths.tolist() == [6, 4]
    for mine, theirs in zip(found.episodes(), chosen.episodes(), strict=True):
        for name in COLUMNS:
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_rounding_is_to_the_nearest_and_ties_to_even() -> None:
    assert rounded(np.array([1.0, 1.125, 1.375, -1.2, 0.0, 3e38], np.float32), 2).tolist()[:5] == [1.0, 1.0, 1.5, -1.25, 0.0]
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    for bits in (1, 7, 10, 22):
        found = rounded(values, bits)
        assert np.all(np.abs(found - values) <= np.abs(values) * 2.0 ** -(bits + 1))
        np.testing.assert_array_equal(rounded(found, bits), found)
        assert not np.any(found.view(np.uint32) & np.uint32((1 << (23 - bits)) - 1))


def test_a_recorded_store_takes_a_fraction_of_its_bytes(tmp_path: Path) -> None:
    fixture = ROOT / "trajectories" / "fixture"
    path = flatten(build_cache(fixture, tmp_path), tmp_path / "flat.h5")
    assert path.stat().st_size < 0.3 * TrajectoryDataset(fixture).nbytes


def test_the_shipped_data_is_what_the_shipped_policy_learned_from(tmp_path: Path) -> None:
    shipped = build_cache(ROOT / "trajectories" / "universal.h5", tmp_path)
    card = load_policy("universal").card
    assert shipped.digest == card["training_data_digest"] and len(set(shipped.attributes["run_id"])) == card["runs"]
    found = outcomes_of(shipped.select(np.arange(0, len(shipped.lengths), 50)))
    assert np.isfinite(found.loss).all() and set(found.family) == set(card["trained_on"])


def test_bad_input_is_refused_and_leaves_nothing(cache: TrajectoryCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bits=0 .*give 1 to 23"):
        flatten(cache, tmp_path / "flat.h5", bits=0)
    with pytest.raises(ValueError, match=r"ends in \.h5"):
        flatten(cache, tmp_path / "flat.npz")
    with pytest.raises(OSError, match="cannot write"):
        flatten(cache, tmp_path / "store" / "data" / "metadata.json" / "flat.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_another_schema_another_version_and_damage_are_told(cache: TrajectoryCache, tmp_path: Path) -> None:
    path = flatten(cache, tmp_path / "flat.h5")
    with pytest.raises(ValueError, match="flat arrays for training, no episodes"):
        TrajectoryDataset(path)
    with h5py.File(path, "r+") as file:
        said = str(file.attrs["mango_flat"])
        file.attrs["mango_flat"] = said.replace('"version": 1', '"version": 9')
    with pytest.raises(ValueError, match=r"expected version 1 of flat files, found 9"):
        build_cache(path)
    with h5py.File(path, "r+") as file:
        file.attrs["mango_flat"] = said.replace(cache.header.schema_hash, "another")
    with pytest.raises(ValueError, match=r"expected schema_hash .*found 'another'"):
        build_cache(path)
    with h5py.File(path, "r+") as file:
        file.attrs["mango_flat"] = said
        del file["rewards"]
    with pytest.raises(ValueError, match="damaged: no rewards"):
        build_cache(path)
    assert not list((tmp_path / "flat.h5.cache").glob("*/")), "no half cache"
