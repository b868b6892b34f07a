"""Record episodes into a trajectory store, and keep its index: what Minari reads, what everybody else reads too.

>>> with TrajectoryWriter("runs/first", task="digits_mlp", policy="random", reward=Reward()) as writer:  # doctest: +SKIP
...     writer.add(episode)
"""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py

from mango.config import LADDER, NVEC, Ladder
from mango.features import FEATURES
from mango_env.episode import Episode
from mango_env.interrupts import interrupts_held
from mango_env.layout import (
    MINARI_VERSION,
    SHARDS,
    Header,
    Paths,
    as_json,
    aside,
    explained,
    publish,
    read_json,
    slug,
    write_text,
)
from mango_env.locks import WriterLock, locked
from mango_env.reward import Reward
from mango_env.shards import SUFFIX, Entry, ShardWriter, read_entries
from mango_env.stopping_file import new_file

MOST_PER_SHARD = 10_000                 # their places are made when the shard is opened


class TrajectoryWriter:
    """Appends episodes to the store at `root`; as many processes as you like may do so at once, each with its own writer.

    Episodes are handed to the operating system one by one as they are added, so a killed process loses at most the one it
    was writing: `salvage` brings the others into the store. Ctrl-C waits for the end of `add` and of `close`. Shards of
    `episodes_per_shard` episodes or `max_shard_bytes` bytes are closed, forced to the disk and renamed; then they never
    change. `compression` ("lzf", "gzip") makes observations a third smaller and recording several times slower.

    With `index=False` closing the writer leaves the index alone: call `finalize(root)` once when many writers are done.

    Raises ValueError for a store of another schema, ladder or reward, and OSError in one line where writing fails.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        task: str,
        policy: str,
        reward: Reward,
        ladder: Ladder = LADDER,
        episodes_per_shard: int = 50,
        max_shard_bytes: int = 64 << 20,
        compression: str | None = None,
        index: bool = True,
    ) -> None:
        if not 1 <= episodes_per_shard <= MOST_PER_SHARD or max_shard_bytes < 1:
            limits = f"episodes_per_shard={episodes_per_shard} and max_shard_bytes={max_shard_bytes}"
            raise ValueError(f"{limits} must be at least 1, and there can be {MOST_PER_SHARD} episodes per shard")
        self.header = Header(task, policy, reward, ladder)
        self.paths = Paths.of(root)
        self.recorded = 0                                    # episodes added so far
        self._limits, self._compression, self._index = (episodes_per_shard, max_shard_bytes), compression, index
        self._shard: ShardWriter | None = None
        self._shards = 0
        self._pid = os.getpid()
        self.paths.must_be_recordable()
        self.paths.create()
        _claim(self.paths, self.header)
        self.name = f"{slug(socket.gethostname())}-{self._pid}-{secrets.token_hex(3)}"       # its files begin with it
        self._lock: WriterLock | None = WriterLock(self.paths.shards / f"{self.name}.lock")

    @interrupts_held()
    def add(self, episode: Episode) -> None:
        """Record one finished episode."""
        if self._lock is None:
            raise ValueError(f"the writer of {self.paths.root} is closed; open another one")
        if os.getpid() != self._pid:
            raise ValueError(f"this writer belongs to process {self._pid}, not {os.getpid()}; open one per process")
        if episode.infos["rung"].max() >= len(self.header.ladder):
            raise ValueError(f"rung {episode.infos['rung'].max()} is outside the ladder's 0..{len(self.header.ladder) - 1}")
        if episode.reward != self.header.reward:
            raise ValueError(f"the episode has {episode.reward!r}, the store {self.header.reward!r}: use Episode.rescored")
        try:
            if self._shard is None:
                self._shard = self._open_shard()
            self._shard.add(episode)
            self.recorded += 1
            if self._shard.count >= self._limits[0] or self._shard.nbytes >= self._limits[1]:
                self._publish_shard()
        except OSError as error:
            self._abandon()
            raise self._failed(error) from error

    @interrupts_held()
    def close(self) -> Path:
        """Publish what was recorded and rebuild the index. Returns the root of the store."""
        if self._lock is None:
            return self.paths.root
        try:
            self._publish_shard()
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._abandon()
        if self._index:
            finalize(self.paths.root)
        return self.paths.root

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()                                         # an interrupted recording keeps what it has

    def _open_shard(self) -> ShardWriter:
        path = self.paths.shards / f"{self.name}-{self._shards:04d}{SUFFIX}"
        self._shards += 1
        return ShardWriter(path, self.header, self._limits[0], self._compression)

    def _publish_shard(self) -> None:
        if self._shard is not None:
            if self._shard.count:
                self._shard.publish()
            else:
                self._shard.abandon()
                self._shard.temporary.unlink()
            self._shard = None

    def _abandon(self) -> None:
        """Let go of everything; whatever was flushed stays for `salvage`."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _failed(self, error: OSError) -> OSError:
        root = self.paths.root
        advice = f"the {self.recorded} episodes recorded so far are kept: make room, then run `mango data salvage {root}`"
        return explained(error, f"cannot write trajectories to {root}", advice)


def _claim(paths: Paths, header: Header) -> None:
    """Give a new store its header, so that the next writer can compare; refuse a store of another kind."""
    with locked(paths.index_lock):
        if paths.metadata.exists():
            Header.from_dict(read_json(paths.metadata).get("mango"), paths.metadata).must_match(header, paths.root)
        else:
            write_index(paths, header, [])


def finalize(root: str | os.PathLike[str]) -> dict[str, Any]:
    """Rebuild index and metadata from the published shards; both are replaced at once. Returns the metadata.

    Episodes are ordered by run and layer, so the order, like the digest, depends on what was recorded and not on which
    process wrote it when. Safe to call at any time and from several processes.

    Raises ValueError naming a shard that cannot be read or belongs to another kind of store, or where the store is packed.
    """
    paths = Paths.of(root)
    paths.must_be_recordable()
    with locked(paths.index_lock):
        header = Header.from_dict(read_json(paths.metadata).get("mango"), paths.metadata)
        entries: list[Entry] = []
        for shard in sorted(paths.shards.glob(f"*{SUFFIX}")):
            found, episodes = read_entries(shard)
            header.must_match(found, shard)
            entries += episodes
        return write_index(paths, header, sorted(entries))


@interrupts_held()
def write_index(paths: Paths, header: Header, entries: Sequence[Entry]) -> dict[str, Any]:
    """Replace index and metadata; the caller holds the index lock."""
    index, described = aside(paths.index), aside(paths.metadata)
    payload = metadata(header, entries, paths.dataset_id(header), _megabytes(paths.shards))
    try:
        index.unlink(missing_ok=True)                        # of an earlier process of this number that was killed
        with new_file(index) as file:
            for i, entry in enumerate(entries):
                file[f"episode_{i}"] = h5py.ExternalLink(f"{SHARDS}/{entry.shard}", f"/{entry.name}")
        write_text(described, as_json(payload))
        publish(index, paths.index)                          # both are written by now: a full disk leaves both as they were
        publish(described, paths.metadata)
    except OSError as error:
        advice = f"all episodes are kept: make room, then run `mango data salvage {paths.root}`"
        raise explained(error, f"cannot write the index of {paths.root}", advice) from error
    return payload


def metadata(header: Header, entries: Sequence[Entry], name: str, megabytes: float) -> dict[str, Any]:
    """What `metadata.json` holds: Minari's keys, then ours."""
    return {
        "dataset_id": name,
        "total_episodes": len(entries),
        "total_steps": sum(entry.steps for entry in entries),
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(
            {
                "type": "Box",
                "dtype": "float32",
                "shape": [len(FEATURES)],
                "low": [float(f.low) for f in FEATURES],
                "high": [float(f.high) for f in FEATURES],
            }
        ),
        "action_space": json.dumps({"type": "MultiDiscrete", "dtype": "int8", "nvec": list(NVEC), "start": [0] * len(NVEC)}),
        "minari_version": MINARI_VERSION,
        "dataset_size": megabytes,
        "algorithm_name": header.policy,
        "description": f"Compression of optimizer state while training {header.task}, one episode per run and layer.",
        "mango": {
            **header.to_dict(),
            "runs": len({entry.run_id for entry in entries}),
            "digest": digest_of(entry.digest for entry in entries),
        },
    }


def digest_of(digests: Iterable[str]) -> str:
    """Hash of a set of episodes, from theirs: the same however they are ordered and split into files."""
    return hashlib.blake2b("".join(sorted(digests)).encode(), digest_size=16).hexdigest()


def _megabytes(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.glob(f"*{SUFFIX}")) / 1e6, 3)


def read_metadata(root: str | os.PathLike[str]) -> dict[str, Any]:
    """The store's metadata; ValueError where there is no store or one of another kind."""
    paths = Paths.of(root)
    found = read_json(paths.metadata)
    Header.from_dict(found.get("mango"), paths.metadata)
    return found

