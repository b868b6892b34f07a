"""The flat arrays of a training cache as one small HDF5 file: what learning needs of a store, to share or to keep.

A store spends most of its bytes on having a group per episode. Here every column lies in one piece, feature by feature, and
floats keep only some bits of their mantissa (rounded to nearest: bit grooming, Zender 2016; Kloewer et al. 2021), so that
gzip finds something to do: 10 of 23 bits are a relative error of 2^-11, far below what statistics of gradients vary by.
Episodes cannot be told from it bit by bit, so they have no hashes any more; the file carries the digest of the store.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mango_env.episode import Array
from mango_env.interrupts import interrupts_held
from mango_env.layout import Header, aside, explained, publish
from mango_env.shards import open_shard

FLAT_VERSION = 1
MANTISSA = 23                                            # bits of a float32
ROWS = 1 << 14                                           # of a column that are compressed together


@dataclass(frozen=True, slots=True)
class FlatFile:
    """An open flat file. `columns` are HDF5 data sets (R, ...), to be read in blocks."""

    header: Header
    digest: str                              # of the store
    bits: int                                # of the mantissas
    columns: Mapping[str, Any]
    lengths: NDArray[np.int64]               # (E,) transitions of the episodes; each has a row more
    attributes: dict[str, list[Any]]         # facts of the episodes, a list (E,) each

    @property
    def rows(self) -> int:
        return int(self.lengths.sum()) + len(self.lengths)

    def blocks(self, name: str) -> Iterator[Array]:
        """A column in its order, `ROWS` rows at a time."""
        for at in range(0, self.rows, ROWS):
            yield self.columns[name][at : at + ROWS]


def rounded(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Finite floats with all but `bits` bits of their mantissas rounded away, ties to even.

    >>> rounded(np.array([1.0, 1.2, -1.2], np.float32), 2).tolist()
    [1.0, 1.25, -1.25]
    """
    if bits == MANTISSA:
        return values
    raw, drop = np.ascontiguousarray(values).view(np.uint32), np.uint32(MANTISSA - bits)
    odd = (raw >> drop) & np.uint32(1)
    kept = (raw + (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1) + odd) >> drop << drop
    return np.asarray(kept.view(np.float32))


def write_flat(
    path: Path, blocks: Mapping[str, Iterator[Array]], *, header: Header, digest: str, bits: int, lengths: NDArray[np.int64],
    attributes: Mapping[str, list[Any]],
) -> Path:  # fmt: skip
    """Write columns that come block by block, aside and renamed.

    Raises ValueError where `bits` is not 1 to 23 or `path` does not end in .h5, OSError where it cannot be written.
    """
    if not 1 <= bits <= MANTISSA:
        raise ValueError(f"bits={bits} of a float's mantissa; give 1 to {MANTISSA}")
    if path.suffix not in (".h5", ".hdf5"):
        raise ValueError(f"{path}: a flat file ends in .h5 or .hdf5")
    facts = {"version": FLAT_VERSION, "digest": digest, "bits": bits, "mango": header.to_dict()}
    table = json.dumps({name: values for name, values in attributes.items() if name != "digest"})
    temporary = aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w") as file:
            file.attrs["mango_flat"] = json.dumps(facts)
            file.create_dataset("lengths", data=lengths, compression="gzip")
            file.create_dataset("attributes", data=np.frombuffer(table.encode(), np.uint8), compression="gzip")
            for name, parts in blocks.items():
                _write_column(file, name, parts, int(lengths.sum()) + len(lengths), bits)
        with interrupts_held():
            publish(temporary, path)
    except OSError as error:
        raise explained(error, f"cannot write {path}", "make room or choose another folder") from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


def _write_column(file: h5py.File, name: str, parts: Iterator[Array], rows: int, bits: int) -> None:
    at = 0
    for part in parts:
        if name not in file:
            shape = (rows, *part.shape[1:])
            chunks = (min(rows, ROWS), *[1] * (part.ndim - 1))                           # a feature lies by itself
            file.create_dataset(name, shape, part.dtype, chunks=chunks, compression="gzip", compression_opts=9, shuffle=True)
        file[name][at : at + len(part)] = rounded(part, bits) if part.dtype == np.float32 else part
        at += len(part)


def is_flat(path: Path) -> bool:
    """Whether a path is a flat file, and not a store, one packed into a file, or something else."""
    if not path.is_file():
        return False
    with open_shard(path) as file:
        return "mango_flat" in file.attrs


@contextmanager
def open_flat(path: Path) -> Iterator[FlatFile]:
    """Open a flat file. Raises ValueError where it is damaged, or of another version or feature schema."""
    with open_shard(path) as file:
        try:
            facts = json.loads(str(file.attrs["mango_flat"]))
            if facts["version"] != FLAT_VERSION:
                found = f"expected version {FLAT_VERSION} of flat files, found {facts['version']!r}"
                raise ValueError(f"{path}: {found}; write it anew with `mango data flatten`")
            header = Header.from_dict(facts["mango"], path)
            lengths, table = file["lengths"][:], json.loads(file["attributes"][:].tobytes())
            columns = {name: file[name] for name in file if name not in ("lengths", "attributes")}
        except (KeyError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: the flat file is damaged ({error!r}); write it anew with `mango data flatten`") from error
        yield FlatFile(header, str(facts["digest"]), int(facts["bits"]), columns, lengths, table)
