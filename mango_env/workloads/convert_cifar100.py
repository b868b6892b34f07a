"""Turn CIFAR-100 as its authors publish it into the files that `cifar100_resnet` reads.

    python -m mango_env.workloads.convert_cifar100 cifar-100-python FOLDER

The published files are pickles. Here only the few names that an array is made of are looked up, so a planted file can run
nothing. Images are kept as PNG, without loss, in a random order that is the same everywhere.
"""

import argparse
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What a pickled array refers to, in the spelling of old and new numpy.
ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
SIDE, CLASSES = 32, 100


class ArraysOnly(pickle.Unpickler):
    """An unpickler of arrays, lists, numbers and bytes that refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise ValueError(f"it refers to {module}.{name}, which is no part of an array: refused")
        return ARRAYS[module, name]


def read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (N, 32, 32, 3) and fine labels (N,) of one published file."""
    try:
        with path.open("rb") as file:
            content = ArraysOnly(file, encoding="bytes").load()
        pixels = np.asarray(content[b"data"])
        labels = np.asarray(content[b"fine_labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no file of cifar-100-python: {error}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * SIDE**2) or not np.isin(labels, range(CLASSES)).all():
        raise ValueError(f"{path} holds {pixels.dtype} {pixels.shape} and {len(labels)} labels, not CIFAR-100's images")
    return pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels.astype(np.uint8)


def convert(source: Path, target: Path) -> list[Path]:
    """Write both parts into the folder `target`; returns their paths."""
    from PIL import Image

    target.mkdir(parents=True, exist_ok=True)
    written = []
    for part in ("train", "test"):
        pixels, labels = read(source / part)
        order = np.random.default_rng(0).permutation(len(labels))
        files = []
        for image in pixels[order]:
            stream = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(stream, "PNG")
            files.append(np.frombuffer(stream.getvalue(), np.uint8))
        offsets = np.cumsum([0, *map(len, files)]).astype(np.int32)
        written.append(target / f"cifar100_{part}_jpeg.npz")
        np.savez(written[-1], jpeg=np.concatenate(files), offsets=offsets, y=labels[order])
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the unpacked folder, cifar-100-python")
    parser.add_argument("target", type=Path, help="the folder that MANGO_DATA names")
    given = parser.parse_args()
    try:
        written = convert(given.source, given.target)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"convert_cifar100: {error}")
    print("\n".join(f"wrote {path}" for path in written))


if __name__ == "__main__":
    main()
