"""Promises about bad days: killed writers, full disks, damaged and foreign files. What was flushed is never lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest

from mango.config import KNOBS_VERSION
from mango_env import shards
from mango_env.cache import build_cache
from mango_env.curate import compact
from mango_env.dataset import TrajectoryDataset
from mango_env.layout import Header
from mango_env.salvage import salvage
from mango_env.shards import ShardWriter, open_shard, read_episode
from mango_env.stopping_file import StoppingFile
from mango_env.store import finalize
from mango_env.validate import validate
from tests.made_episodes import (
    PROCESSES,
    REWARD,
    edit_metadata,
    finish,
    make_episode,
    record,
    record_until_killed,
    same,
    start,
    writer,
)


class Recorder:
    """A process that records until it is killed."""

    def __init__(self, root: Path, run: int, per_shard: int = 1000) -> None:
        self.told, child = PROCESSES.Pipe(duplex=False)
        self.process = start(record_until_killed, child, root, run, per_shard)
        child.close()
        self.flushed = 0                                     # episodes that it told of

    def wait_for(self, episodes: int) -> None:
        while self.flushed < episodes:
            self.flushed = self.told.recv() + 1

    def kill(self) -> int:
        """SIGKILL it; returns how many episodes it told of."""
        self.process.kill()
        assert finish(self.process) == -signal.SIGKILL
        try:
            while True:
                self.flushed = self.told.recv() + 1
        except (EOFError, OSError):                          # the end, perhaps in the middle of a word
            self.told.close()
        return self.flushed


def test_kill_9_at_any_moment_loses_no_flushed_episode(tmp_path: Path) -> None:
    """Real processes, killed at random moments, between shards and within them."""
    rng = np.random.default_rng(0)
    reported: dict[int, int] = {}
    per_shard = [1000, 200, 4, 7, 50, 3, 1, 11]
    for first in range(0, len(per_shard), 2):                # two at a time
        running = {run: Recorder(tmp_path, run, per_shard[run]) for run in (first, first + 1)}
        for run, recorder in running.items():
            recorder.wait_for(int(rng.integers(1, 30)))
            time.sleep(float(rng.uniform(0, 0.03)))
            reported[run] = recorder.kill()
    done = salvage(tmp_path)
    assert done.alive == ()
    found: dict[int, list[int]] = {run: [] for run in reported}
    for episode in TrajectoryDataset(tmp_path).episodes(check=True):
        run, layer = episode.attributes["seed"], episode.key[1]
        assert same(episode, make_episode(run, layer, steps=1 + layer % 7))
        found[run].append(layer)
    for run, count in reported.items():
        assert found[run] == list(range(len(found[run]))), "in order, without gaps"
        assert len(found[run]) >= count, f"run {run} reported {count} episodes"
    assert validate(tmp_path).ok and list((tmp_path / "data" / "shards").glob("*.tmp")) == []
    assert list((tmp_path / "data" / "shards").glob("[!.]*.lock")) == []
    again = salvage(tmp_path)
    assert (again.episodes, again.recovered) == (0, ())
    with writer(tmp_path) as w:                              # and recording goes on
        w.add(make_episode(99))
    assert len(TrajectoryDataset(tmp_path)) == sum(len(layers) for layers in found.values()) + 1


Write = tuple[int, bytes] | int                              # where what was written, or to which size the file was cut


class _LoggingFile(StoppingFile):
    """Notes every write, so that a recording can be cut after each of them."""

    logs: ClassVar[dict[str, list[Write]]] = {}

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.log = self.logs.setdefault(path.name, [])

    def write(self, buffer: memoryview) -> int:
        self.log.append((self._at, bytes(buffer)))
        return super().write(buffer)

    def truncate(self, size: int | None = None) -> int:
        self.log.append(self._at if size is None else size)
        return super().truncate(size)


def apply(image: bytearray, step: Write) -> None:
    at, data = (step, b"") if isinstance(step, int) else step
    image.extend(bytes(max(0, at + len(data) - len(image))))
    image[at : at + len(data)] = data
    if isinstance(step, int):
        del image[step:]


@pytest.mark.parametrize(("capacity", "compression"), [(12, None), (14, "gzip")])
def test_a_recording_cut_after_any_single_write_keeps_every_flushed_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: int, compression: str | None
) -> None:
    """Exhaustive, where killing processes only samples: the file after each of its writes, closing included.

    12 episodes, because HDF5 splits the root's table of names after 8: written the plain way, with a flush per
    episode, a quarter of the cuts lost episodes that had been flushed.
    """
    monkeypatch.setattr(_LoggingFile, "logs", {})
    monkeypatch.setattr(shards, "StoppingFile", _LoggingFile)
    made = [make_episode(0, layer, steps=3) for layer in range(12)]
    shard = ShardWriter(tmp_path / "cut.h5", Header("t", "p", REWARD), capacity, compression)
    log, flushed = _LoggingFile.logs["cut.h5.tmp"], []
    for episode in made:
        shard.add(episode)
        flushed.append(len(log))
    shard.publish()
    image, cut = bytearray(), tmp_path / "cut-here.h5"
    for done, step in enumerate(log, start=1):
        apply(image, step)
        expected = sum(mark <= done for mark in flushed)
        if not expected or (done % 4 and done < flushed[-1] and done not in flushed and done - 1 not in flushed):
            continue                                         # every fourth, both sides of every flush, and all of closing
        cut.write_bytes(image)
        with open_shard(cut) as file:
            kept = [read_episode(file[f"episode_{j}"], "cut", check=True) for j in range(expected)]
        assert all(same(a, b) for a, b in zip(kept, made, strict=False)), f"cut after write {done} of {len(log)}"
    with open_shard(tmp_path / "cut.h5") as file:
        assert all(same(read_episode(file[f"episode_{j}"], "cut", check=True), made[j]) for j in range(12)) and len(file) == 12


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """A disk that is full: writes beyond this size fail, as they do when no block is free. Root cannot be kept out otherwise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100_000, 101_234, 150_001, 207_777])
def test_a_full_disk_is_one_clear_line_and_loses_nothing_that_was_flushed(tmp_path: Path, room: int) -> None:
    w = writer(tmp_path)
    kept = r"cannot write trajectories to .*episodes recorded so far are kept"
    with largest_file(room), pytest.raises(OSError, match=kept) as caught:  # noqa: PT012
        for layer in range(1000):
            w.add(make_episode(0, layer))
    assert "\n" not in str(caught.value) and caught.value.errno is not None
    assert w.recorded > 3
    with pytest.raises(ValueError, match="is closed"):
        w.add(make_episode())
    w.close()                                                # nothing left to do, and says nothing
    done = salvage(tmp_path)
    assert done.episodes == w.recorded
    assert [e.key[1] for e in TrajectoryDataset(tmp_path).episodes(check=True)] == list(range(w.recorded))


@pytest.mark.parametrize(("per_shard", "says"), [(50, "cannot write trajectories"), (1, "cannot write the index")])
def test_a_disk_that_is_full_while_closing_loses_nothing(tmp_path: Path, per_shard: int, says: str) -> None:
    w = writer(tmp_path, episodes_per_shard=per_shard)
    w.add(make_episode(0, 0))
    with largest_file(1000), pytest.raises(OSError, match=says):
        w.close()
    assert len(TrajectoryDataset(tmp_path)) == 0, "the index is as it was"
    assert salvage(tmp_path).episodes == (1 if per_shard > 1 else 0)
    assert len(TrajectoryDataset(tmp_path)) == 1


def test_salvage_on_a_full_disk_says_so_and_can_be_run_again(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.wait_for(5)
    reported = recorder.kill()
    with largest_file(5000), pytest.raises(OSError, match=r"cannot write .*nothing was lost"):
        salvage(tmp_path)
    assert salvage(tmp_path).episodes >= reported


def test_a_full_disk_stops_cache_and_compact_in_one_line(tmp_path: Path) -> None:
    record(tmp_path / "store", runs=8, steps=20)
    with largest_file(20_000):
        with pytest.raises(OSError, match=r"cannot write the cache"):
            build_cache(tmp_path / "store")
        with pytest.raises(OSError, match=r"cannot write .*all\.h5"):
            compact(tmp_path / "store", tmp_path / "all.h5")
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert [p.name for p in (tmp_path / "store" / "cache").iterdir()] == [".lock"]
    assert len(build_cache(tmp_path / "store")) == 320


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    says = r"cannot make a trajectory store at .*Not a directory; choose a folder that can be written"
    with pytest.raises(OSError, match=says):
        writer(tmp_path / "file" / "below")
    with pytest.raises(OSError, match="cannot"):
        writer(Path("/proc/nothing/here"))


def test_salvage_leaves_living_writers_alone(tmp_path: Path) -> None:
    with writer(tmp_path) as here:                           # one in this process, one in another
        here.add(make_episode(1))
        recorder = Recorder(tmp_path, 0)
        recorder.wait_for(3)
        done = salvage(tmp_path)
        assert len(done.alive) == 2 and (done.episodes, done.recovered, done.quarantined) == (0, (), ())
        here.add(make_episode(2))
        reported = recorder.kill()
        done = salvage(tmp_path)
        assert len(done.alive) == 1 and done.episodes >= reported
    assert {e.attributes["seed"] for e in TrajectoryDataset(tmp_path)} == {0, 1, 2}


def gone_elsewhere(root: Path, i: int) -> str:
    """A writer of one episode that ended on another machine, by its name; its lock looks so where locks are local."""
    w = writer(root)
    w.add(make_episode(i))
    assert w._shard is not None and w._lock is not None
    lock = w._lock.path
    w._shard.abandon()
    w._lock._file.close()
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "locked": True}))
    return w.name


def test_a_writer_on_another_machine_is_left_alone_until_told_or_a_day_old(tmp_path: Path) -> None:
    for i in range(2):
        gone_elsewhere(tmp_path, i)
    assert len(salvage(tmp_path).alive) == 2
    old = sorted((tmp_path / "data" / "shards").glob("*.tmp"))[0]
    os.utime(old, (0, 0))
    assert (lambda done: (done.episodes, len(done.alive)))(salvage(tmp_path)) == (1, 1)
    assert salvage(tmp_path, elsewhere=True).episodes == 1
    assert len(TrajectoryDataset(tmp_path)) == 2


def test_a_writer_known_to_be_gone_is_salvaged_alone_wherever_it_was(tmp_path: Path) -> None:
    gone = [gone_elsewhere(tmp_path, i) for i in range(2)]
    done = salvage(tmp_path, writer=gone[1])
    assert (done.episodes, done.alive) == (1, ()) and TrajectoryDataset(tmp_path)[0].attributes["seed"] == 1
    assert len(list((tmp_path / "data" / "shards").glob(f"{gone[0]}*"))) == 2        # shard and lock
    assert not list((tmp_path / "data" / "shards").glob(f"{gone[1]}*.lock"))
    assert salvage(tmp_path, writer=gone[1]).episodes == 0 and salvage(tmp_path, elsewhere=True).episodes == 1


def test_where_locks_do_not_work_the_process_id_decides(tmp_path: Path) -> None:
    w = writer(tmp_path)
    w.add(make_episode())
    assert w._shard is not None and w._lock is not None
    lock, w._lock = w._lock, None
    lock._file.close()
    lock.path.write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "locked": False}))
    assert len(salvage(tmp_path).alive) == 1
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock.path.write_text(json.dumps({"host": os.uname().nodename, "pid": ended.pid, "locked": False}))
    w._shard.abandon()
    assert salvage(tmp_path).episodes == 1


def test_salvage_killed_halfway_recovers_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.wait_for(4)
    recorder.kill()
    tmp = next((tmp_path / "data" / "shards").glob("*.h5.tmp"))
    kept = tmp.read_bytes()
    first = salvage(tmp_path)
    assert first.episodes >= 4
    tmp.write_bytes(kept)                                    # killed after publishing, before removing
    (tmp.parent / f"{tmp.name.removesuffix('.h5.tmp')}x-salvaged.h5.tmp").write_bytes(b"killed while copying")
    again = salvage(tmp_path)
    assert (again.episodes, again.quarantined) == (0, tuple(f"{name}.1" for name in first.quarantined))      # set aside again
    assert len(TrajectoryDataset(tmp_path)) == first.episodes and validate(tmp_path).ok


def test_salvage_sets_aside_what_it_cannot_read_and_saves_the_rest(tmp_path: Path) -> None:
    made = record(tmp_path, runs=6)
    published = sorted((tmp_path / "data" / "shards").glob("*.h5"))
    published[0].write_bytes(published[0].read_bytes()[:3000])                   # truncated
    published[1].write_bytes(b"not HDF5 at all")
    with h5py.File(published[2], "r+") as file:
        del file["episode_1"]["rewards"], file["episode_1"].attrs["digest"]
    torn = tmp_path / "data" / "shards" / "other-1-aaaaaa-0000.h5.tmp"
    torn.write_bytes(b"")
    with pytest.raises(ValueError, match="found 3000 bytes that HDF5 cannot open"):
        finalize(tmp_path)
    done = salvage(tmp_path)
    assert len(done.quarantined) == 4 and done.episodes == 2
    assert {e.key for e in TrajectoryDataset(tmp_path)} == {e.key for e in [*made[9:], made[6], made[8]]}
    assert {p.name for p in (tmp_path / "quarantine").iterdir()} == {*(p.name for p in published[:3]), torn.name}
    assert [w.check for w in validate(tmp_path).warnings] == ["quarantine"] * 4 and validate(tmp_path).ok
    assert salvage(tmp_path).quarantined == ()


def test_an_episode_whose_values_rotted_is_set_aside_by_its_hash(tmp_path: Path) -> None:
    w = writer(tmp_path)
    for layer in range(3):
        w.add(make_episode(0, layer))
    w._abandon()
    (tmp,) = (tmp_path / "data" / "shards").glob("*.tmp")
    content = bytearray(tmp.read_bytes())
    at = content.index(make_episode(0, 1).rewards.tobytes())
    content[at] ^= 1
    tmp.write_bytes(content)
    done = salvage(tmp_path)
    assert done.episodes == 2 and len(done.quarantined) == 1


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"mango": {}}'])
def test_lost_or_damaged_metadata_are_rebuilt_from_the_shards(tmp_path: Path, content: str | None) -> None:
    made = record(tmp_path)
    path = tmp_path / "data" / "metadata.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.json"):
        TrajectoryDataset(tmp_path)
    salvage(tmp_path)
    assert all(same(a, b) for a, b in zip(TrajectoryDataset(tmp_path), made, strict=True))


def test_a_lost_or_stale_index_is_noticed_and_rebuilt(tmp_path: Path) -> None:
    made = record(tmp_path)
    index = tmp_path / "data" / "main_data.hdf5"
    with h5py.File(index, "r+") as file:
        del file["episode_7"]
    with pytest.raises(ValueError, match=r"expected 8 episodes as metadata\.json says, found 7"):
        TrajectoryDataset(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        TrajectoryDataset(tmp_path)
    (tmp_path / "data" / "main_data.hdf5.123.tmp").write_bytes(b"half an index")
    salvage(tmp_path)
    assert len(TrajectoryDataset(tmp_path)) == len(made)
    assert list((tmp_path / "data").glob("*.tmp")) == []


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "data" / "shards" / sorted(p.name for p in (tmp_path / "data" / "shards").glob("*.h5"))[1]).unlink()
    dataset = TrajectoryDataset(tmp_path)
    with pytest.raises(ValueError, match=r"-0001\.h5 does not exist; rebuild the index"):
        list(dataset)
    with pytest.raises(ValueError, match="does not exist"):
        build_cache(tmp_path)
    assert {p.check for p in validate(tmp_path).problems} == {"readable"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_hash": "0123456789abcdef"}, r"expected schema_hash '\w+', found '0123456789abcdef'; .*record again"),
        ({"knobs_version": KNOBS_VERSION + 1}, rf"expected knobs_version {KNOBS_VERSION}, found {KNOBS_VERSION + 1}"),
        ({"format": "minari"}, "expected format 'mango-trajectories', found 'minari'"),
        ({"format_version": 99}, "expected format_version 1, found 99"),
        ({"ladder": "nonsense"}, "malformed"),
    ],
)
def test_foreign_stores_are_refused_saying_what_was_expected(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    record(tmp_path)
    edit_metadata(tmp_path, **change)
    for open_it in (TrajectoryDataset, validate, build_cache, lambda root: writer(root)):
        with pytest.raises(ValueError, match=says) as caught:
            open_it(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x89HDF\r\n\x1a\n and no more"])
def test_files_that_are_no_store_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.h5").write_bytes(content)
    with pytest.raises(ValueError, match=rf"some\.h5: expected an HDF5 file, found {len(content)} bytes"):
        TrajectoryDataset(tmp_path / "some.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="found an HDF5 file without the attribute 'mango'"):
        TrajectoryDataset(tmp_path / "other.h5")
    for nothing in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"holds no metadata\.json; a trajectory store has data/metadata\.json"):
            TrajectoryDataset(nothing)
    with pytest.raises(ValueError, match=r"holds no metadata\.json"):
        salvage(tmp_path)
