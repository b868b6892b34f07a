"""Promises of the trajectory store: what is recorded is what is read, by us and by Minari, however it was written."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mango.config import KNOBS_VERSION, LADDER, NVEC, Ladder
from mango.features import FEATURES, SCHEMA_HASH
from mango_env.cache import build_cache
from mango_env.curate import compact, merge, split
from mango_env.dataset import TrajectoryDataset, info, recorded_layers
from mango_env.episode import ATTRIBUTES, INFOS, Episode
from mango_env.reward import Reward
from mango_env.salvage import salvage
from mango_env.store import finalize
from mango_env.validate import validate
from tests.made_episodes import (
    REWARD,
    finish,
    make_episode,
    record,
    record_run,
    same,
    start,
    writer,
)


def fields(episode: Episode) -> dict[str, Any]:
    return {name: getattr(episode, name) for name in Episode.__dataclass_fields__}


def test_an_episode_stores_the_standard_dtypes() -> None:
    made = make_episode()
    wide = replace(made, observations=made.observations.astype(np.float64), actions=made.actions.astype(np.int64))
    assert same(made, wide)
    assert [str(a.dtype) for a in (wide.observations, wide.actions, wide.rewards)] == ["float32", "int8", "float32"]
    assert {name: str(a.dtype) for name, a in wide.infos.items()} == {**dict.fromkeys(INFOS, "float32"), "rung": "int16"}


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"observations": np.zeros((6, 64), np.float32)}, ValueError, r"observations have shape \(6, 64\); \(7, 64\) is needed"),
        ({"observations": np.zeros((7, 63), np.float32)}, ValueError, "observations have shape"),
        ({"observations": np.full((7, 64), np.nan)}, ValueError, r"observations\[0, 0\] is nan; values must be finite"),
        ({"observations": np.full((7, 64), 1e300)}, ValueError, "must be finite"),
        ({"observations": np.zeros((7, 64), int)}, TypeError, "observations are int64; they must be floats"),
        ({"actions": np.zeros((6, 7), np.float32)}, TypeError, "actions are float32; they must be integers"),
        ({"actions": np.full((6, 7), 6)}, ValueError, r"actions\[0\] has index 6 for gradient_bits, outside 0..5"),
        ({"actions": np.full((6, 7), -1)}, ValueError, "has index -1"),
        ({"actions": np.zeros((6, 5), int)}, ValueError, r"actions have shape \(6, 5\)"),
        ({"actions": np.zeros((0, 7), int)}, ValueError, "T >= 1"),
        ({"rewards": np.zeros(5, np.float32)}, ValueError, "rewards have shape"),
        ({"rewards": np.array([0, 0, np.inf, 0, 0, 0])}, ValueError, r"rewards\[2\] is inf"),
        ({"terminations": np.zeros(6, bool)}, ValueError, "neither terminated nor truncated"),
        ({"terminations": np.ones(6, bool)}, ValueError, r"terminations\[0\] is set before the last"),
        ({"terminations": np.ones(6, int)}, TypeError, "they must be booleans"),
        ({"infos": {}}, ValueError, "infos lack"),
        ({"attributes": {}}, ValueError, "attributes lack"),
    ],
)
def test_what_is_no_episode_is_refused_in_one_line(change: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        Episode(**{**fields(make_episode()), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("run_id", 7, TypeError),
        ("layer_index", "7", TypeError),
        ("seed", True, TypeError),
        ("seed", 2**63, ValueError),
        ("lr", float("nan"), ValueError),
        ("run_id", "a\0b", ValueError),
        ("extra", [1, 2], TypeError),
        ("extra", None, TypeError),
        ("digest", "mine", ValueError),
    ],
)
def test_attributes_are_checked_scalars(name: str, value: Any, kind: type[Exception]) -> None:
    made = make_episode()
    with pytest.raises(kind, match=name):
        replace(made, attributes={**made.attributes, name: value})


def test_rewards_are_recomputed_from_the_logged_terms() -> None:
    made, other = make_episode(), Reward(alpha=2.0, beta=0.5, gamma=0.0)
    again = made.rescored(other)
    expected = -2.0 * made.infos["reward_loss"] + 0.5 * made.infos["reward_memory"]
    np.testing.assert_allclose(again.rewards, expected, rtol=1e-6)
    assert again.reward == other
    assert same(again.rescored(REWARD), made)


names = st.from_regex(r"x_[a-z]{1,8}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=15, deadline=None)
@given(
    steps=st.integers(1, 40),
    facts=st.dictionaries(names, texts | st.booleans() | st.integers(-(2**63), 2**63 - 1)),
    compression=st.sampled_from([None, "lzf", "gzip"]),
)
def test_what_is_recorded_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, steps: int, facts: dict[str, Any], compression: str | None
) -> None:
    root = tmp_path_factory.mktemp("store")
    made = make_episode(steps=steps)
    made = replace(made, attributes={**made.attributes, **facts}, infos={**made.infos, "x_own": np.arange(steps)})
    with writer(root, compression=compression) as w:
        w.add(made)
    (read,) = TrajectoryDataset(root).episodes(check=True)
    assert read.attributes == made.attributes
    assert {name: type(value) for name, value in read.attributes.items()} == {n: type(v) for n, v in made.attributes.items()}
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name), strict=True)
    for name, array in made.infos.items():
        np.testing.assert_array_equal(read.infos[name], array, strict=True)


def test_the_layout_is_the_standards(tmp_path: Path) -> None:
    made = record(tmp_path)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["main_data.hdf5", "metadata.json", "shards"]
    shards = [p.name for p in (tmp_path / "data" / "shards").iterdir() if not p.name.startswith(".")]
    assert len(shards) == 3 and all(re.fullmatch(r"[\w-]+-\d+-[0-9a-f]{6}-\d{4}\.h5", name) for name in shards)
    with h5py.File(tmp_path / "data" / "main_data.hdf5") as index:
        assert set(index) == {f"episode_{i}" for i in range(len(made))}
        link = index.get("episode_0", getlink=True)
        assert isinstance(link, h5py.ExternalLink) and link.filename.startswith("shards/")
        group = index["episode_0"]
        assert set(group) == {"observations", "actions", "rewards", "terminations", "truncations", "infos"}
        assert set(group["infos"]) == set(INFOS)
        assert set(group.attrs) == {*ATTRIBUTES, "total_steps", "digest", "complete"}
    for shard in shards:
        with h5py.File(tmp_path / "data" / "shards" / shard) as file:
            assert set(file) == {f"episode_{j}" for j in range(len(file))}, "unused places are left out"
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text())
    assert (metadata["total_episodes"], metadata["total_steps"], metadata["data_format"]) == (8, 48, "hdf5")
    assert metadata["dataset_id"] == "mango/digits_mlp/random-v0"
    ours = metadata["mango"]
    assert (ours["format"], ours["format_version"], ours["schema_hash"]) == ("mango-trajectories", 1, SCHEMA_HASH)
    assert ours["feature_names"] == [f.name for f in FEATURES]
    assert (ours["knobs_version"], [len(menu) for menu in ours["knobs"].values()]) == (KNOBS_VERSION, list(NVEC))
    assert Ladder.from_json(json.dumps(ours["ladder"])) == LADDER
    assert Reward.from_json(ours["reward"]) == REWARD


def test_order_and_digest_depend_on_what_was_recorded_not_on_who_wrote_when(tmp_path: Path) -> None:
    made = record(tmp_path / "a")
    with writer(tmp_path / "b") as w1, writer(tmp_path / "b", episodes_per_shard=1) as w2:
        for i, episode in enumerate(reversed(made)):
            (w1 if i % 3 else w2).add(episode)
    a, b = TrajectoryDataset(tmp_path / "a"), TrajectoryDataset(tmp_path / "b")
    assert a.digest == b.digest
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert [e.key for e in a] == [e.key for e in made]


def test_reading_by_position_and_by_folder(tmp_path: Path) -> None:
    made = record(tmp_path)
    for path in (tmp_path, tmp_path / "data"):
        dataset = TrajectoryDataset(path)
        assert (len(dataset), dataset.transitions) == (8, 48)
        assert same(dataset[-1], made[-1]) and same(dataset[2], made[2])
        assert [e.key for e in dataset.episodes([5, 0])] == [made[5].key, made[0].key]
        assert dataset.attributes[3]["digest"] == made[3].digest()
    with pytest.raises(IndexError):
        TrajectoryDataset(tmp_path)[8]
    assert recorded_layers(tmp_path) == {f"run-{run:04d}": ({0, 1}, 4) for run in range(4)}
    assert recorded_layers(tmp_path / "nothing") == {}


def test_many_processes_record_into_one_store(tmp_path: Path) -> None:
    workers = [start(record_run, tmp_path, run, 5) for run in range(4)]
    assert [finish(worker) for worker in workers] == [0] * 4
    dataset = TrajectoryDataset(tmp_path)
    assert [e.key for e in dataset] == [(f"run-{run:04d}", layer) for run in range(4) for layer in range(5)]
    assert validate(tmp_path).ok
    assert list((tmp_path / "data").rglob("*.tmp")) == []


def test_an_interrupted_recording_keeps_what_it_has(tmp_path: Path) -> None:
    made = make_episode()
    with pytest.raises(KeyboardInterrupt), writer(tmp_path) as w:  # noqa: PT012
        w.add(made)
        raise KeyboardInterrupt
    assert [same(e, made) for e in TrajectoryDataset(tmp_path)] == [True]
    with pytest.raises(ValueError, match="is closed"):
        w.add(made)
    assert w.close() == tmp_path


def test_a_full_shard_is_followed_by_the_next(tmp_path: Path) -> None:
    with writer(tmp_path, max_shard_bytes=1) as w:
        for layer in range(3):
            w.add(make_episode(layer=layer))
    assert len(list((tmp_path / "data" / "shards").glob("*.h5"))) == 3
    assert w.recorded == 3


def test_an_empty_store_can_be_read(tmp_path: Path) -> None:
    with writer(tmp_path):
        pass
    assert len(TrajectoryDataset(tmp_path)) == 0
    assert validate(tmp_path).ok
    assert info(tmp_path)["returns"] is None
    cache = build_cache(tmp_path)
    assert len(cache) == 0 and list(cache.episodes()) == []
    with pytest.raises(ValueError, match="holds no transitions"):
        cache.sample(1, np.random.default_rng(0))


def test_a_store_takes_episodes_of_one_kind_only(tmp_path: Path) -> None:
    record(tmp_path)
    with pytest.raises(ValueError, match=r"has reward .*keep them in different folders"):
        writer(tmp_path, reward=Reward(beta=3.0))
    with pytest.raises(ValueError, match="has ladder"):
        writer(tmp_path, ladder=Ladder(LADDER.rungs[:3]))
    with writer(tmp_path) as w, pytest.raises(ValueError, match=r"use Episode\.rescored"):
        w.add(make_episode(9, reward=Reward(beta=3.0)))
    short = Ladder(LADDER.rungs[:2])
    with writer(tmp_path / "short", ladder=short) as w, pytest.raises(ValueError, match=r"outside the ladder's 0\.\.1"):
        w.add(make_episode())
    with pytest.raises(ValueError, match="compression='zip' is not one of"), writer(tmp_path / "zip", compression="zip") as w:
        w.add(make_episode())
    with pytest.raises(ValueError, match="must be at least 1, and there can be 10000"):
        writer(tmp_path, episodes_per_shard=0)


def test_a_forked_child_cannot_write_with_its_parents_writer(tmp_path: Path) -> None:
    with writer(tmp_path) as w:
        w._pid += 1                                          # as it looks to a child
        with pytest.raises(ValueError, match="open one per process"):
            w.add(make_episode())
        w._pid -= 1


def test_validate_accepts_what_was_recorded(tmp_path: Path) -> None:
    record(tmp_path)
    report = validate(tmp_path)
    assert report.ok and report.warnings == () and report.digest == TrajectoryDataset(tmp_path).digest
    assert (report.episodes, report.transitions, report.runs) == (8, 48, 4)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "8 episodes of 4 runs, 48 decisions: valid" in str(report)


def _edit(root: Path, path: str, change: Any) -> None:
    """Change an array of the first episode behind the store's back."""
    with h5py.File(root / "data" / "main_data.hdf5") as index:
        link = index.get("episode_0", getlink=True)
    with h5py.File(root / "data" / link.filename, "r+") as shard:
        dataset = shard[link.path][path]
        dataset[...] = change(dataset[()])


def test_validate_finds_a_changed_value(tmp_path: Path) -> None:
    record(tmp_path)
    _edit(tmp_path, "observations", lambda x: x + np.float32(1e-3))
    report = validate(tmp_path)
    assert [p.check for p in report.problems] == ["readable"]
    assert "expected content of hash" in report.problems[0].message


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        ("rewards", lambda x: x + np.float32(np.nan), "must be finite"),
        ("actions", lambda x: x + np.int8(9), "outside 0..5"),
        ("terminations", lambda x: ~x, "is set before the last"),
    ],
)
def test_validate_says_what_is_wrong_inside_an_episode(tmp_path: Path, path: str, change: Any, says: str) -> None:
    record(tmp_path)
    _edit(tmp_path, path, change)
    (problem,) = validate(tmp_path).problems
    assert says in problem.message and "episode_0" in problem.where


def test_validate_recomputes_rewards_rungs_and_ranges(tmp_path: Path) -> None:
    made = make_episode()
    with writer(tmp_path) as w:
        w.add(replace(made, rewards=made.rewards + np.float32(0.01)))
        infos = make_episode(1).infos
        w.add(replace(make_episode(1), infos={**infos, "rung": (infos["rung"] + 1) % len(LADDER)}))
        w.add(replace(make_episode(2), observations=make_episode(2).observations * 100))
    report = validate(tmp_path)
    assert [p.check for p in report.problems] == ["reward", "rung"]
    assert "6 of 6 steps differ" in report.problems[0].message
    assert [p.check for p in report.warnings] == ["range"] and "outside [" in report.warnings[0].message


def test_validate_finds_duplicates_and_files_that_the_index_does_not_know(tmp_path: Path) -> None:
    record(tmp_path, runs=1)
    other = make_episode(0, 0, steps=9)
    with writer(tmp_path) as w:
        w.add(other)
    assert [p.check for p in validate(tmp_path).problems] == ["duplicates"]
    with writer(tmp_path, index=False) as w:
        w.add(make_episode(5))
    open_writer = writer(tmp_path)
    open_writer.add(make_episode(6))
    assert [w.check for w in validate(tmp_path).warnings] == ["unfinished", "unindexed"]
    open_writer.close()
    assert validate(tmp_path).episodes == 5


def test_validate_finds_metadata_that_disagree(tmp_path: Path) -> None:
    record(tmp_path)
    path = tmp_path / "data" / "metadata.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "total_steps": 47, "mango": {**content["mango"], "digest": "0" * 32}}))
    assert [p.check for p in validate(tmp_path).problems] == ["totals", "digest"]
    finalize(tmp_path)
    assert validate(tmp_path).ok


def test_info_counts_what_is_there(tmp_path: Path) -> None:
    made = record(tmp_path, runs=3)
    found = info(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert (found["episodes"], found["transitions"], found["runs"], found["terminated"], found["truncated"]) == (6, 36, 3, 6, 0)
    assert (found["workloads"], found["policies"], found["layer_kinds"]) == ({"digits_mlp": 6}, {"random": 6}, {"mlp_up": 6})
    assert sum(found["rungs"].values()) == 36 and set(found["rungs"]) <= set(LADDER.names)
    assert found["returns"]["mean"] == pytest.approx(np.mean([e.returns for e in made]))
    assert found["bytes"] > 6 * made[0].observations.nbytes


def test_merge_keeps_each_episode_once(tmp_path: Path) -> None:
    a, b = record(tmp_path / "a", runs=3), record(tmp_path / "b", runs=4)
    out = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert [e.key for e in TrajectoryDataset(out)] == [e.key for e in b] and len(a) < len(b)
    assert TrajectoryDataset(out).digest == TrajectoryDataset(tmp_path / "b").digest
    assert validate(out).ok


def test_merge_refuses_what_does_not_fit_and_leaves_nothing_behind(tmp_path: Path) -> None:
    record(tmp_path / "a", runs=1)
    record(tmp_path / "b", runs=1, steps=9)
    record(tmp_path / "c", runs=1, reward=Reward(beta=2.0))
    with pytest.raises(ValueError, match="run 'run-0000', layer 0 differs between"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(ValueError, match="has reward"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge([tmp_path / "a"], tmp_path / "b")
    with pytest.raises(ValueError, match="no trajectory store was given"):
        merge([], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_merge_recomputes_rewards_where_they_differ(tmp_path: Path) -> None:
    record(tmp_path / "a", runs=1)
    with writer(tmp_path / "b", reward=Reward(beta=2.0)) as w:
        w.add(make_episode(7, reward=Reward(beta=2.0)))
    common = Reward(alpha=3.0)
    out = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", reward=common)
    assert validate(out).ok and [e.reward for e in TrajectoryDataset(out)] == [common] * 3


def test_split_is_by_whole_runs_and_repeatable(tmp_path: Path) -> None:
    made = record(tmp_path / "all", runs=10)
    roots = split(tmp_path / "all", tmp_path / "parts", by="run", fractions={"train": 0.7, "val": 0.1, "test": 0.2}, seed=3)
    runs = {name: {e.key[0] for e in TrajectoryDataset(root)} for name, root in roots.items()}
    assert {name: len(found) for name, found in runs.items()} == {"train": 7, "val": 1, "test": 2}
    assert runs["train"] | runs["val"] | runs["test"] == {e.key[0] for e in made}
    assert sum(len(TrajectoryDataset(root)) for root in roots.values()) == len(made)
    again = split(tmp_path / "all", tmp_path / "again", by="run", fractions={"train": 0.7, "val": 0.1, "test": 0.2}, seed=3)
    assert all(TrajectoryDataset(again[name]).digest == TrajectoryDataset(root).digest for name, root in roots.items())
    other = split(tmp_path / "all", tmp_path / "other", by="run", fractions={"train": 0.7, "val": 0.1, "test": 0.2}, seed=4)
    assert {e.key[0] for e in TrajectoryDataset(other["train"])} != runs["train"]
    assert all(validate(root).ok for root in roots.values())


def test_split_by_workload_parts_whole_workloads(tmp_path: Path) -> None:
    with writer(tmp_path / "all") as w:
        for run, workload in enumerate(["digits_mlp", "digits_mlp", "source_lm", "digits_cnn"]):
            w.add(make_episode(run, workload=workload))
    roots = split(tmp_path / "all", tmp_path / "parts", by="workload", fractions={"train": 0.5, "test": 0.5})
    found = [{e.attributes["workload"] for e in TrajectoryDataset(root)} for root in roots.values()]
    assert found[0] & found[1] == set() and len(found[0] | found[1]) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"by": "step"}, "would leak"),
        ({"fractions": {"a": 0.5, "b": 0.4}}, "sum to 1"),
        ({"fractions": {"a": 1.5, "b": -0.5}}, "must be positive"),
        ({"by": "workload"}, "1 workloads cannot be parted into train, test"),
    ],
)
def test_split_refuses_what_would_leak_or_cannot_be(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    record(tmp_path / "all")
    with pytest.raises(ValueError, match=says):
        split(tmp_path / "all", tmp_path / "parts", **options)
    assert not (tmp_path / "parts").exists()


def test_compact_makes_one_file_that_is_the_same_store(tmp_path: Path) -> None:
    made = record(tmp_path / "store")
    file = compact(tmp_path / "store", tmp_path / "shared" / "all.h5")
    (tmp_path / "store").rename(tmp_path / "elsewhere")      # it stands alone
    dataset = TrajectoryDataset(file)
    assert all(same(x, y) for x, y in zip(dataset, made, strict=True))
    assert dataset.digest == TrajectoryDataset(tmp_path / "elsewhere").digest
    assert validate(file).ok and info(file)["episodes"] == 8
    assert len(build_cache(file)) == 48
    assert [p.name for p in file.parent.iterdir() if p.is_file()] == ["all.h5"]
    with h5py.File(file) as opened:
        assert set(opened) == {f"episode_{i}" for i in range(8)}
    with pytest.raises(ValueError, match="exists; remove it"):
        compact(tmp_path / "elsewhere", file)
    packed = compact(tmp_path / "elsewhere", tmp_path / "mango" / "digits_mlp" / "packed-v2")
    assert TrajectoryDataset(packed).digest == dataset.digest and validate(packed).ok
    assert TrajectoryDataset(packed).id == "mango/digits_mlp/packed-v2"
    assert [p.name for p in (packed / "data").iterdir()] == ["main_data.hdf5", "metadata.json"]


def test_a_packed_store_is_read_and_never_recorded_over(tmp_path: Path) -> None:
    record(tmp_path / "store")
    packed = compact(tmp_path / "store", tmp_path / "packed")
    before = (packed / "data" / "main_data.hdf5").read_bytes()
    for change in (writer, finalize, salvage):
        with pytest.raises(ValueError, match="is packed and cannot be added to; record into another folder and merge"):
            change(packed)
    assert (packed / "data" / "main_data.hdf5").read_bytes() == before
    record(tmp_path / "more", runs=6)
    assert len(TrajectoryDataset(merge([packed, tmp_path / "more"], tmp_path / "all"))) == 12


def test_a_single_shard_is_read_as_a_store(tmp_path: Path) -> None:
    made = record(tmp_path)
    shard = sorted((tmp_path / "data" / "shards").glob("*.h5"))[0]
    assert all(same(x, y) for x, y in zip(TrajectoryDataset(shard), made[:3], strict=True))


def test_salvage_of_a_sound_store_changes_nothing(tmp_path: Path) -> None:
    record(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.h5")}
    done = salvage(tmp_path)
    assert (done.episodes, done.recovered, done.quarantined, done.alive) == (0, (), (), ())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.h5")} == before


def test_the_committed_fixture_is_small_real_and_of_todays_standard(root: Path) -> None:
    """Where it fails after a change of features, menus or format: python -m trajectories.make_fixture."""
    fixture = root / "trajectories" / "fixture"
    report, found = validate(fixture), info(fixture)
    assert report.ok and report.warnings == (), str(report)
    assert sum(file.stat().st_size for file in fixture.rglob("*") if file.is_file()) < 1_000_000
    assert set(found["workloads"]) == {"digits_mlp", "digits_cnn"} and len(found["policies"]) >= 3
    assert found["transitions"] >= 400 and found["returns"]["std"] > 0
