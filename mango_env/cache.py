"""Flat arrays for training: what HDF5 groups hold, as memory-mapped `.npy` files that may be larger than memory.

    <root>/cache/<digest>/observations.npy     (R, 64) float32: the T + 1 rows of every episode, one after another
                          actions.npy ...      (R, ...): the same rows; an episode's last row is zero
                          attributes.json      facts of the episodes, column by column
                          cache.json           what is in it; written last

Row r + 1 of `observations` is the next observation of row r, so none is stored twice.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mango.config import KNOBS
from mango.features import FEATURE_DIM
from mango_env.dataset import TrajectoryDataset
from mango_env.episode import FLAGS, INFOS, Array, Episode, info_dtype
from mango_env.flat_file import ROWS, FlatFile, is_flat, open_flat, write_flat
from mango_env.layout import Header, Paths, explained, read_json, sync
from mango_env.locks import locked

COLUMNS: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {     # name -> dtype and shape of a row
    "observations": (np.dtype(np.float32), (FEATURE_DIM,)),
    "actions": (np.dtype(np.int8), (len(KNOBS),)),
    "rewards": (np.dtype(np.float32), ()),
    **{flag: (np.dtype(bool), ()) for flag in FLAGS},
    **{name: (info_dtype(name), ()) for name in INFOS},
}
CACHE_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B transitions drawn at random, or, with a leading axis more, B sequences of L steps."""

    observations: Array                     # (B, 64) float32
    actions: Array                          # (B, 7) int8
    rewards: Array                          # (B,) float32
    next_observations: Array                # (B, 64) float32
    terminated: Array                       # (B,) bool: nothing follows; a truncated step has a next observation
    rungs: Array                            # (B,) int16
    behavior_logp: Array                    # (B,) float32
    rows: Array                             # (B,) int64: of `TrajectoryCache.columns`


@dataclass(frozen=True, slots=True, eq=False)
class SequenceBatch(Batch):
    """B stretches of L steps, each within one episode: all arrays are (B, L, ...). What `mask` excludes repeats the last step."""

    mask: Array                             # (B, L) bool: the step exists
    starts: Array                           # (B,) int64: position of the stretch in its episode


@dataclass(frozen=True, eq=False)
class TrajectoryCache:
    """The transitions of a store, or of some of its episodes (`select`), for random access.

    `columns` are the memory-mapped arrays (R, ...), `begins` (E,) and `lengths` (E,) say which rows belong to an episode:
    its transitions are rows begin .. begin + length - 1, and row begin + length holds the last observation.
    """

    path: Path
    header: Header
    digest: str
    columns: Mapping[str, Array]
    begins: NDArray[np.int64]               # (E,) first row
    lengths: NDArray[np.int64]              # (E,) transitions
    indices: NDArray[np.int64]              # (E,) position of the episode in the store

    def __len__(self) -> int:
        """Number of transitions."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """(E,) running number of transitions."""
        return np.cumsum(self.lengths)

    @cached_property
    def attributes(self) -> dict[str, list[Any]]:
        """Facts of the episodes, one list (E,) per name; None where an episode has no such fact."""
        table: dict[str, list[Any]] = json.loads((self.path / "attributes.json").read_text(encoding="utf-8"))
        return {name: [values[i] for i in self.indices] for name, values in table.items()}

    def rows_of(self, transitions: Array) -> NDArray[np.int64]:
        """Rows of the given transitions, which are numbered 0 .. len - 1 over the selected episodes."""
        episode = np.searchsorted(self._ends, transitions, side="right")
        return np.asarray(transitions + self._shifts.take(episode))

    @cached_property
    def _shifts(self) -> NDArray[np.int64]:
        """(E,) what to add to a transition's number to get its row."""
        return self.begins - (self._ends - self.lengths)

    def sample(self, batch: int, rng: np.random.Generator) -> Batch:
        """`batch` transitions drawn with replacement, each with equal probability."""
        return Batch(**self._gather(self.rows_of(rng.integers(0, self._populated(), batch))))

    def batches(self, batch: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Every transition once, in random order; the last batch may be smaller."""
        order = rng.permutation(self._populated())
        for at in range(0, len(order), batch):
            yield Batch(**self._gather(self.rows_of(order[at : at + batch])))

    def sequences(self, length: int, rng: np.random.Generator, batch: int = 32) -> SequenceBatch:
        """`batch` stretches of `length` consecutive steps; shorter episodes are padded at the end (`mask`).

        An episode is drawn in proportion to its steps, then the start of the stretch, uniformly.
        """
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        episode = np.searchsorted(self._ends, rng.integers(0, self._populated(), batch), side="right")
        lengths = self.lengths[episode]
        starts = rng.integers(0, np.maximum(lengths - length, 0) + 1)                        # (B,)
        steps = starts[:, None] + np.arange(length)                                          # (B, L)
        rows = self.begins[episode][:, None] + np.minimum(steps, lengths[:, None] - 1)
        return SequenceBatch(**self._gather(rows), mask=steps < lengths[:, None], starts=starts)

    def _populated(self) -> int:
        if not len(self):
            raise ValueError(f"{self.path} holds no transitions for this selection; record or select some episodes")
        return len(self)

    def _gather(self, rows: Array) -> dict[str, Array]:
        c = self.columns
        return {
            "observations": c["observations"].take(rows, 0),
            "actions": c["actions"].take(rows, 0),
            "rewards": c["rewards"].take(rows),
            "next_observations": c["observations"].take(rows + 1, 0),
            "terminated": c["terminations"].take(rows),
            "rungs": c["rung"].take(rows),
            "behavior_logp": c["behavior_logp"].take(rows),
            "rows": rows,
        }

    def episodes(self) -> Iterator[dict[str, Array]]:
        """Views of every episode, nothing copied: `observations` (T + 1, 64), all other columns (T, ...)."""
        for begin, length in zip(self.begins.tolist(), self.lengths.tolist(), strict=True):
            end = begin + length
            yield {name: column[begin : end + (name == "observations")] for name, column in self.columns.items()}

    def returns(self, discount: float = 1.0) -> NDArray[np.float64]:
        """(E,) the sum of every episode's rewards, discounted from its first step."""
        rewards = self.columns["rewards"]
        spans = zip(self.begins.tolist(), self.lengths.tolist(), strict=True)
        return np.array([discount ** np.arange(n) @ rewards[at : at + n].astype(np.float64) for at, n in spans], np.float64)

    def select(self, episodes: Array) -> "TrajectoryCache":
        """The same arrays seen through some episodes: positions (n,) among the present ones, or a mask (E,)."""
        chosen = np.asarray(episodes)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        begins, lengths, indices = self.begins[chosen], self.lengths[chosen], self.indices[chosen]
        return TrajectoryCache(self.path, self.header, self.digest, self.columns, begins, lengths, indices)

    def __reduce__(self) -> Any:
        """Another process opens the files itself instead of getting their content."""
        return _reopen, (self.path, self.indices)


def build_cache(root: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> TrajectoryCache:
    """The cache of a store (a folder or a file made by `compact`) or of a flat file (`flatten`), built if it is not there yet.

    It lies in the store's own `cache`, beside a file as `<file>.cache`, or in `folder`: a faster disk, or somewhere else
    because the store cannot be written. Episodes are streamed, so memory holds one at a time. It is written aside and
    renamed; a second process that wants it meanwhile waits and then uses it. Caches of earlier contents stay until they
    are deleted.

    Raises ValueError for a damaged store, OSError where the cache cannot be written.
    """
    path = Path(root)
    beside = path.with_name(f"{path.name}.cache") if path.is_file() else Paths.of(root).cache
    folder = beside if folder is None else Path(folder)
    if is_flat(path):
        with open_flat(path) as flat:
            return _cached(folder, f"{flat.digest}-{flat.bits}", lambda target: _unpack(flat, target))
    dataset = TrajectoryDataset(path)
    return _cached(folder, dataset.digest, lambda target: _build(dataset, target))


def flatten(cache: TrajectoryCache, path: str | os.PathLike[str], bits: int = 10) -> Path:
    """A cache, or a selection of it, as one small file that `build_cache` reads; floats keep `bits` bits of their mantissas.

    Raises ValueError where `bits` is not 1 to 23 or `path` does not end in .h5, OSError where it cannot be written.
    """
    spans = zip(cache.begins.tolist(), cache.lengths.tolist(), strict=True)
    rows = np.concatenate([np.arange(begin, begin + length + 1) for begin, length in spans] or [np.zeros(0, np.int64)])

    def blocks(column: Array) -> Iterator[Array]:
        yield from (column.take(rows[at : at + ROWS], 0) for at in range(0, len(rows), ROWS))

    columns = {name: blocks(column) for name, column in cache.columns.items()}
    return write_flat(
        Path(path), columns, header=cache.header, digest=cache.digest, bits=bits, lengths=cache.lengths,
        attributes=cache.attributes,
    )  # fmt: skip


def _cached(folder: Path, name: str, build: Callable[[Path], None]) -> TrajectoryCache:
    """The cache of that name in a folder; what builds it is called, by one process at a time, where there is none."""
    target = folder / name
    if not (target / "cache.json").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".lock"):
                if not (target / "cache.json").exists():
                    build(target)
        except OSError as error:
            raise explained(error, f"cannot write the cache {target}", "make room or make the folder writable") from error
    return load_cache(target)


def _build(dataset: TrajectoryDataset, target: Path) -> None:
    lengths: list[int] = []
    facts: list[Mapping[str, Any]] = []
    rows = dataset.transitions + len(dataset)
    with _published(target, rows, dataset.digest, dataset.header) as (folder, files):
        for episode in dataset:
            _append(files, episode)
            lengths.append(len(episode))
            facts.append(episode.attributes)
        if sum(lengths) != dataset.transitions:
            found = f"expected {dataset.transitions} transitions, found {sum(lengths)}"
            raise ValueError(f"{dataset.path}: {found}; rebuild the index with `mango data salvage {dataset.path}`")
        _describe(folder, lengths, _table(facts))


def _unpack(flat: FlatFile, target: Path) -> None:
    with _published(target, flat.rows, flat.digest, flat.header) as (folder, files):
        for name, (dtype, shape) in COLUMNS.items():
            column = flat.columns.get(name)
            if column is None or (column.shape, column.dtype) != ((flat.rows, *shape), dtype):
                raise ValueError(f"{target.parent}: the flat file is damaged: no {name} of {flat.rows} rows; write it anew")
            for block in flat.blocks(name):
                files[name].write(block.tobytes())
        _describe(folder, flat.lengths, flat.attributes)


@contextmanager
def _published(target: Path, rows: int, digest: str, header: Header) -> Iterator[tuple[Path, Mapping[str, IO[bytes]]]]:
    """A folder and files in it for the columns of a cache, by name; it becomes `target` when all is written."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)             # left by a builder that was killed: we hold the lock
    shutil.rmtree(target, ignore_errors=True)                # a cache without cache.json is none
    temporary.mkdir()
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context((temporary / f"{name}.npy").open("wb")) for name in COLUMNS}
            for name, file in files.items():
                _npy_header(file, name, rows)
            yield temporary, files
        summary = {"cache_version": CACHE_VERSION, "digest": digest, "rows": rows, "mango": header.to_dict()}
        _write(temporary / "cache.json", summary)
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _describe(folder: Path, lengths: Sequence[int] | Array, attributes: Mapping[str, list[Any]]) -> None:
    np.save(folder / "lengths.npy", np.asarray(lengths, np.int64))
    _write(folder / "attributes.json", attributes)


def _npy_header(file: IO[bytes], name: str, rows: int) -> None:
    """Start a .npy file of known length, to be filled by plain writes: a full disk kills who writes to a memory map."""
    dtype, shape = COLUMNS[name]
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _append(files: Mapping[str, IO[bytes]], episode: Episode) -> None:
    for name, file in files.items():
        if name == "observations":
            file.write(episode.observations.tobytes())
        else:
            column: Array = episode.infos[name] if name in INFOS else getattr(episode, name)
            file.write(column.tobytes() + bytes(column[:1].nbytes))


def _table(attributes: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = sorted({name for facts in attributes for name in facts})
    return {name: [facts.get(name) for facts in attributes] for name in names}


def _write(path: Path, payload: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(payload), encoding="utf-8")


def load_cache(path: str | os.PathLike[str]) -> TrajectoryCache:
    """Open a cache folder. Raises ValueError where it is incomplete or of another schema: delete it, it can be rebuilt."""
    folder = Path(path)
    found = read_json(folder / "cache.json")
    header = Header.from_dict(found.get("mango", {}), folder)
    try:
        lengths: NDArray[np.int64] = np.load(folder / "lengths.npy")
        # plain views, which numpy indexes faster than memmap objects; an empty file cannot be mapped
        mode: Any = "r" if found["rows"] else None
        columns = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode=mode)) for name in COLUMNS}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: the cache is damaged ({error}); delete the folder, it is rebuilt when needed") from error
    rows = {name: len(column) for name, column in columns.items()}
    if set(rows.values()) != {found["rows"]} or int(lengths.sum()) + len(lengths) != found["rows"]:
        raise ValueError(f"{folder}: expected {found['rows']} rows everywhere, found {rows}; delete the folder")
    begins = np.cumsum(lengths + 1) - (lengths + 1)
    return TrajectoryCache(folder, header, str(found["digest"]), columns, begins, lengths, np.arange(len(lengths)))


def _reopen(path: Path, indices: Array) -> TrajectoryCache:
    return load_cache(path).select(indices)
