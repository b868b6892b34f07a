"""One shard: an HDF5 file of episodes, written so that a killed writer or a full disk loses no episode that was flushed.

Three measures make that so, and `tests/test_store_faults.py` cuts a recording after every single write to prove it:

- all groups of the root are made first, so that adding an episode never rewrites what leads to the earlier ones;
- every episode carries the hash of its content, so a half-written one is recognised;
- after the first write that fails, nothing more reaches the file (`StoppingFile`): what lies on the disk is always
  the beginning of what would have been written.

Ctrl-C waits until the file is whole (`interrupts_held`; `tests/test_interrupts.py`).
"""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5o, h5p, h5s, h5t

from mango_env.episode import RESERVED, Array, Episode
from mango_env.interrupts import interrupts_held
from mango_env.layout import Header, publish
from mango_env.stopping_file import StoppingFile, new_file

SUFFIX, PART = ".h5", ".part"            # a published shard; one on its way there
COMPRESSION = (None, "lzf", "gzip")         # of observations, after shuffling their bytes
ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")

_TEXT = h5py.string_dtype()
_TEXT_TYPE = h5t.py_create(_TEXT, logical=True)
_SCALAR = h5s.create(h5s.SCALAR)
_TYPES: dict[Any, Any] = {}


@dataclass(frozen=True, order=True, slots=True)
class Entry:
    """Where one episode lies. The order is that of the index: it depends on the content, not on who wrote when."""

    run_id: str
    layer_index: int
    digest: str
    shard: str                              # file name below data/shards
    name: str                               # group in that file
    steps: int


class ShardWriter:
    """Writes episodes to `path` (aside, as `path` + ".tmp"), at most `capacity` of them.

    Raises the OSError of the first write that fails, at once and at every later call.
    """

    def __init__(self, path: Path, header: Header, capacity: int, compression: str | None = None) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.capacity, self.count = capacity, 0
        self._create = _creation(compression)
        self._file = StoppingFile(self.temporary)
        try:
            with interrupts_held():
                self._h5 = h5py.File(self._file, "w")
                self._h5.attrs["mango"] = json.dumps(header.to_dict())
                for j in range(capacity):
                    h5g.create(self._h5.id, b"episode_%d" % j)
                self.flush()
        except BaseException:
            self.abandon()
            raise

    @property
    def nbytes(self) -> int:
        """Size of the file so far."""
        return int(self._h5.id.get_filesize())

    @interrupts_held()
    def add(self, episode: Episode) -> None:
        """Write a whole episode and hand it to the operating system: from here on it survives the end of the process."""
        if self.count >= self.capacity:
            raise ValueError(f"{self.path.name} is full with {self.capacity} episodes")
        group = h5g.open(self._h5.id, b"episode_%d" % self.count)
        for name in ARRAYS:
            self._put(group, name, getattr(episode, name))
        infos = h5g.create(group, b"infos")
        for name, array in episode.infos.items():
            self._put(infos, name, array)
        for name, value in episode.attributes.items():
            _set(group, name, value)
        _set(group, "total_steps", len(episode))
        _set(group, "digest", episode.digest())
        _set(group, "complete", 1)
        self.flush()
        self.count += 1

    @interrupts_held()
    def flush(self) -> None:
        self._h5.flush()
        if self._file.error is not None:
            raise self._file.error

    @interrupts_held()
    def publish(self, metadata: str | None = None) -> None:
        """Close the file and give it its name. Empty places are left out.

        `metadata` is put beside the header: JSON that makes the file a store by itself.
        """
        if metadata is not None:
            self._h5.attrs["metadata"] = metadata
        if self.count < self.capacity:
            self._publish_copy()                             # taking places out of this file would put the others at risk
            return
        self._close()
        if self._file.error is not None:
            raise self._file.error
        publish(self.temporary, self.path)

    def _publish_copy(self) -> None:
        part = self.path.with_name(self.path.name + PART)
        with new_file(part) as copy:
            for name, value in self._h5.attrs.items():
                copy.attrs[name] = value
            for j in range(self.count):
                h5o.copy(self._h5.id, b"episode_%d" % j, copy.id, b"episode_%d" % j)
        publish(part, self.path)
        self.abandon()
        self.temporary.unlink()

    @interrupts_held()
    def abandon(self) -> None:
        """Let go of the file as it is; `salvage` finds what was flushed."""
        if self._file.error is None:
            self._file.error = OSError(errno.ECANCELED, "the shard was abandoned")
        self._close()

    def _close(self) -> None:
        if hasattr(self, "_h5"):
            self._h5.close()
        self._file.close()

    def _put(self, group: Any, name: str, array: Array) -> None:
        kind = _type(array.dtype)
        dataset = h5d.create(group, name.encode(), kind, h5s.create_simple(array.shape), dcpl=self._create(name, array))
        dataset.write(h5s.ALL, h5s.ALL, array, mtype=kind)


def _creation(compression: str | None) -> Callable[[str, Array], Any]:
    """How a dataset is laid out: contiguous, or, for observations that are to be compressed, in one chunk."""
    if compression not in COMPRESSION:
        raise ValueError(f"compression={compression!r} is not one of {COMPRESSION}")
    plain = h5p.create(h5p.DATASET_CREATE)
    plain.set_obj_track_times(False)                         # equal content gives equal bytes
    plain.set_fill_time(h5d.FILL_TIME_NEVER)

    def create(name: str, array: Array) -> Any:
        if compression is None or name != "observations":
            return plain
        chunked = plain.copy()
        chunked.set_chunk((min(len(array), 1024), *array.shape[1:]))
        chunked.set_shuffle()
        if compression == "lzf":
            chunked.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
        else:
            chunked.set_deflate(4)
        return chunked

    return create


def _type(dtype: np.dtype[Any]) -> Any:
    if dtype not in _TYPES:
        _TYPES[dtype] = h5t.py_create(dtype, logical=True)
    return _TYPES[dtype]


def _set(group: Any, name: str, value: str | int | float | bool) -> None:
    """An attribute through the low-level interface: a third of the time of `group.attrs[name] = value`."""
    if isinstance(value, str):
        h5a.create(group, name.encode(), _TEXT_TYPE, _SCALAR).write(np.array(value, _TEXT))
    else:
        array = np.array(value)
        kind = _type(array.dtype)
        h5a.create(group, name.encode(), kind, _SCALAR).write(array, mtype=kind)


@contextmanager
def open_shard(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; ValueError saying what is wrong with it."""
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; rebuild the index with `mango data salvage`") from error
    except OSError as error:
        size = path.stat().st_size
        raise ValueError(f"{path}: expected an HDF5 file, found {size} bytes that HDF5 cannot open ({error})") from error
    with file:
        yield file


def read_header(file: h5py.File, where: Path) -> Header:
    text = file.attrs.get("mango")
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a shard of a trajectory store, found an HDF5 file without the attribute 'mango'")
    return Header.from_dict(json.loads(text), where)


def read_episode(group: h5py.Group, where: str, check: bool = False) -> Episode:
    """The episode in an HDF5 group. `where` is named in errors; `check` compares it with its hash.

    Raises ValueError where something is missing, damaged or not what it should be.
    """
    try:
        attributes = read_attributes(group)
        logged = h5g.open(group.id, b"infos")
        infos = {name.decode(): _read(logged, name) for name in logged}
        arrays = {name: _read(group.id, name.encode()) for name in ARRAYS}
        kept = {name: value for name, value in attributes.items() if name not in RESERVED}
        episode = Episode(infos=infos, attributes=kept, **arrays)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the episode cannot be read ({error})") from error
    if len(episode) != attributes.get("total_steps"):
        raise ValueError(f"{where}: expected total_steps {len(episode)}, found {attributes.get('total_steps')!r}")
    if check and episode.digest() != attributes.get("digest"):
        raise ValueError(f"{where}: expected content of hash {attributes.get('digest')}, found {episode.digest()}")
    return episode


def read_attributes(group: h5py.Group) -> dict[str, Any]:
    """All attributes as Python scalars. The low-level interface takes half the time here, too."""
    return dict(_attribute(h5a.open(group.id, index=i)) for i in range(h5a.get_num_attrs(group.id)))


def _attribute(attribute: Any) -> tuple[str, Any]:
    array = np.empty((), attribute.dtype)
    attribute.read(array)
    value = array.item()
    return attribute.name.decode(), value.decode() if isinstance(value, bytes) else value


def _read(group: Any, name: bytes) -> Array:
    dataset = h5d.open(group, name)
    array = np.empty(dataset.shape, dataset.dtype)
    dataset.read(h5s.ALL, h5s.ALL, array)
    return array


def read_entry(group: h5py.Group, shard: str, name: str, where: str) -> Entry:
    """What the index needs to know of an episode, without reading its arrays."""
    try:
        wanted = (b"run_id", b"layer_index", b"digest", b"total_steps", b"complete")
        found = dict(_attribute(h5a.open(group.id, key)) for key in wanted)
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"{where}: expected a complete episode, found one without its attributes ({error})") from error
    return Entry(found["run_id"], int(found["layer_index"]), found["digest"], shard, name, int(found["total_steps"]))


def read_entries(path: Path) -> tuple[Header, list[Entry]]:
    """The header of a published shard and where its episodes lie."""
    with open_shard(path) as file:
        header = read_header(file, path)
        return header, [read_entry(group, path.name, name, f"{path}:{name}") for name, group in file.items()]
