"""Where data comes from and how it is held: files of `$MANGO_DATA`, the cache folder, batches in a random order."""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor, nn


class Shared:
    """Data that belongs to the process: copying a workload (`copy.deepcopy`) does not copy it."""

    __slots__ = ()

    def __copy__(self) -> "Shared":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


@dataclass(frozen=True, slots=True, eq=False)
class ImageData(Shared):
    """Labelled images, as loaded: uint8 pixels; `mean` and `std` bring them to zero mean and unit variance."""

    train_x: Tensor                                                            # (N, C, H, W) uint8
    train_y: Tensor                                                            # (N,) int64
    val_x: Tensor                                                              # (M, C, H, W) uint8
    val_y: Tensor                                                              # (M,) int64
    mean: Tensor                                                               # (C, 1, 1) float32, in pixel levels
    std: Tensor                                                                # (C, 1, 1) float32, in pixel levels
    classes: int

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, C, H, W) to float32 of about zero mean and unit variance."""
        return (pixels.float() - self.mean) / self.std

    def inputs(self, pixels: Tensor, weight: Tensor) -> Tensor:
        """What a model takes in whose parameters are of the device and dtype of `weight`."""
        return self.normalise(pixels).to(weight.device, weight.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class TextData(Shared):
    """A text as symbol numbers: of `text.CHARACTERS` (uint8), or of a vocabulary of words (int16)."""

    train: Tensor                                                              # (N,)
    val: Tensor                                                                # (M,)


class Batches:
    """Indices of training examples: every epoch in a new order drawn from `generator`; an incomplete last batch is dropped."""

    def __init__(self, size: int, batch: int, generator: torch.Generator) -> None:
        if not 1 <= batch <= size:
            raise ValueError(f"batch={batch} is outside 1..{size}, the number of training examples")
        self.size, self.batch, self.generator = size, batch, generator
        self._order = torch.empty(0, dtype=torch.int32)                        # (size,) once the first epoch has begun
        self._position = 0

    def next(self) -> Tensor:
        """The next indices (batch,) int64."""
        if self._position + self.batch > len(self._order):
            self._order = torch.randperm(self.size, generator=self.generator).int()
            self._position = 0
        self._position += self.batch
        return self._order[self._position - self.batch : self._position].long()

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order.clone(), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        order, position = state["order"], state["position"]
        if len(order) not in (0, self.size) or not 0 <= position <= len(order):
            raise ValueError(
                f"this data position is of {len(order)} examples at {position}, the workload has {self.size}; "
                "resume with the options that the run was started with"
            )
        self._order, self._position = order.clone(), int(position)


def save_state(generator: torch.Generator, batches: Batches | None = None) -> dict[str, Any]:
    """Where a workload stands in its data: plain tensors and numbers."""
    return {"generator": generator.get_state(), **({} if batches is None else batches.state_dict())}


def load_state(state: dict[str, Any], generator: torch.Generator, batches: Batches | None = None) -> None:
    """Put a generator and, where there is one, a data order back to `state`; `ValueError` for a foreign state."""
    expected = {"generator"} | (set() if batches is None else {"order", "position"})
    if set(state) != expected:
        raise ValueError(f"the state of this workload has the keys {sorted(expected)}, got {sorted(state)}")
    if batches is not None:
        batches.load_state_dict(state)
    generator.set_state(state["generator"].cpu())


def check_positive(**options: int) -> None:
    """`ValueError` for the first option that is not a positive int."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive int")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def drawing(model: nn.Module, generator: torch.Generator, enabled: bool = True) -> Iterator[None]:
    """What a model draws from torch's global generators inside the block (dropout) follows from `generator` alone.

    Afterwards they are as they were. Not `enabled`, nothing is drawn and nothing changes.
    """
    if not enabled:
        yield
        return
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        seed = int(torch.randint(2**62, (), generator=generator))
        torch.default_generator.manual_seed(seed)                              # torch.manual_seed would touch other devices too
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def data_file(name: str, workload: str, source: str) -> Path:
    """The path of a data file in `$MANGO_DATA`; `FileNotFoundError` says what is missing and, from `source`, how to get it."""
    return _existing(name, workload, source, Path.is_file)


def data_folder(name: str, inside: str, workload: str, source: str) -> Path:
    """The same of a folder in `$MANGO_DATA` that has a folder `inside`."""
    return _existing(f"{name}/{inside}", workload, source, Path.is_dir).parent


def _existing(name: str, workload: str, source: str, exists: Callable[[Path], bool]) -> Path:
    how = f"{source}. Workloads that need no file: digits_mlp, digits_cnn, source_lm, source_lstm"
    folder = os.environ.get("MANGO_DATA")
    if not folder:
        raise FileNotFoundError(
            f"workload {workload!r} reads {name} from the folder that MANGO_DATA names, and MANGO_DATA is not set. {how}"
        )
    path = Path(folder).expanduser() / name
    if not exists(path):
        raise FileNotFoundError(f"workload {workload!r} reads {path}, which does not exist (the folder is MANGO_DATA). {how}")
    return path


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Named arrays of an `.npz`, without pickle; `ValueError` for a damaged or foreign file."""
    try:
        # Opened here: numpy leaves the file open where it is no zip archive.
        with path.open("rb") as stream, NpzFile(stream, allow_pickle=False) as file:
            missing = sorted(set(names) - set(file.files))
            if not missing:
                return {name: file[name] for name in names}
    except (BadZipFile, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is no .npz file of plain arrays ({error}); get it anew") from error
    raise ValueError(f"{path} has no arrays {', '.join(missing)}; expected {', '.join(names)}")


def read_text(path: Path, size: int = -1) -> str:
    """The first `size` characters (all by default) of a text compressed by gzip; `ValueError` for a damaged or foreign file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            return file.read(size)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); get it anew") from error


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The rows of a gzipped table of two columns with a tab between them; `ValueError` for any other row."""
    pairs = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        first, tab, second = line.partition("\t")
        if not tab or "\t" in second:
            raise ValueError(f"line {number} of {path} has {line.count(chr(9)) + 1} columns instead of 2; get it anew")
        pairs.append((first, second))
    return pairs


def cache_folder() -> Path:
    """`$MANGO_CACHE`, or `~/.cache/mango`; made where missing."""
    folder = Path(os.environ.get("MANGO_CACHE") or "~/.cache/mango").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the cache folder {folder} cannot be made ({error}); set MANGO_CACHE to a writable folder") from error
    return folder


def cached_array(name: str, make: Callable[[], NDArray[Any]]) -> Path:
    """The path of the `.npy` file `name` in the cache folder; written by `make` where it is missing."""
    target = cache_folder() / name
    if target.is_file():
        return target
    array = make()
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")               # processes that make it at once do not meet
    try:
        with aside.open("wb") as file:
            np.save(file, array)
        os.replace(aside, target)
    except OSError as error:
        raise OSError(f"what was decoded cannot be written to {target} ({error}); set MANGO_CACHE to another folder") from error
    finally:
        aside.unlink(missing_ok=True)
    return target
