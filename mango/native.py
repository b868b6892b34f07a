"""CPU kernels: `native.c`, compiled once by the machine's C compiler, kept in a cache folder and called through ctypes.

Without a compiler (or with MANGO_NATIVE=0) everything runs on the PyTorch twins, with one warning.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
HEADERS = (SOURCE.with_name("native_formats.h"), SOURCE.with_name("native_adam.h"))
FLAGS = ("-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
# The first that the compiler knows: GCC's -O3 takes half as long again to compile, and what it gains is in these.
OPTIMISE = (("-O2", "-fvect-cost-model=dynamic", "-fpeel-loops"), ("-O3",))
# Number in native.c, and per part: so many entries of the tensor are so many of its own, and its dtype. Codes of less
# than a byte are counted in bytes.
_FORMATS: dict[str, tuple[int, dict[str, tuple[int, int, torch.dtype]]]] = {
    "float32": (0, {"values": (1, 1, torch.float32)}),
    "bfloat16": (1, {"values": (1, 1, torch.bfloat16)}),
    "signed8": (2, {"codes": (1, 1, torch.int8), "scale": (128, 1, torch.bfloat16)}),
    "nf4": (3, {"codes": (2, 1, torch.uint8), "scale": (64, 1, torch.bfloat16)}),
    "ternary2": (4, {"codes": (4, 1, torch.uint8), "scale": (64, 1, torch.bfloat16)}),
    "unsigned8": (5, {"codes": (1, 1, torch.uint8), "scale": (256, 1, torch.float32)}),
    "log4": (6, {"codes": (2, 1, torch.uint8), "scale_high": (128, 1, torch.float32), "scale_low": (128, 1, torch.bfloat16)}),
    "factored": (7, {}),
    "lognormal6": (8, {"codes": (4, 3, torch.uint8), "scale": (64, 1, torch.bfloat16), "scale_span": (64, 1, torch.uint8)}),
}
FORMAT_NONE = 9                                              # where a moment is not kept
RULES = {"adamw": 0, "adam": 1, "sgd": 2, "lion": 3}
PARAM_TYPES = {torch.float32: 0, torch.bfloat16: 1}
JOB = np.dtype(                                              # the struct Job of native.c
    [(name, "i8") for name in ("numel", "columns", "param", "grad", "correction", "m_codes", "m_scale", "m_low", "v_codes",
                               "v_scale", "v_low", "sample_mean", "sample_square", "sample_previous", "cosine", "sample_stride",
                               "sample_count")]
    + [(name, "f8") for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "correction1", "correction2", "scale",
                                 "window", "grad_sq", "moved_sq", "param_sq", "momentum_sq", "momentum_grad")]
    + [(name, "i4") for name in ("rule", "param_type", "grad_type", "m_format", "v_format", "correction_bits", "measure",
                                 "unused")]
    + [(name, "u4") for name in ("key", "m_chance", "v_chance", "finite")]
)  # fmt: skip


class CompileError(RuntimeError):
    """The CPU kernels could not be built."""


def format_number(codec: str) -> int:
    """The codec's number in native.c."""
    return _FORMATS[codec][0]


def _folder() -> Path:
    """Where compiled kernels are kept: $MANGO_CACHE, or the user's cache folder."""
    own = os.environ.get("MANGO_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mango"


def _cpu() -> str:
    """What distinguishes this processor: a library built for another must not be loaded."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.processor() + platform.machine()


def build(folder: Path) -> Path:
    """Compile native.c for this machine into `folder`, unless it is there already. CompileError where that fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompileError("no C compiler found (cc, gcc, clang or $CC)")
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    # torch has loaded GNU's OpenMP already; one more in the process would compete with its threads
    flags.append("-fopenmp" if hasattr(ctypes.CDLL(None), "GOMP_parallel") else "-fopenmp-simd")
    written = [file.read_text() for file in (SOURCE, *HEADERS)]
    digest = hashlib.sha256("\n".join([*written, compiler, *flags, _cpu()]).encode()).hexdigest()[:16]
    library = folder / f"native-{digest}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = str(Path(scratch) / "native.o"), str(Path(scratch) / "native.so")
        problem: str | None = None
        for level in OPTIMISE:
            problem = _failure([*shlex.split(compiler), *flags, *level, "-c", str(SOURCE), "-o", compiled])
            if problem is None:
                break
        problem = problem or _failure([*shlex.split(compiler), "-shared", compiled, "-o", linked, "-lm"])
        if problem:
            raise CompileError(problem)
        os.replace(linked, library)
    return library


def _failure(command: list[str]) -> str | None:
    """What a compiler's command says where it fails; None where it works."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{' '.join(command)} failed: {result.stderr.strip()[:500]}" if result.returncode else None


def load(strict: bool = False) -> ctypes.CDLL | None:
    """The library; None where it cannot be built, with one warning, or CompileError with `strict`."""
    found = _load()
    if isinstance(found, ctypes.CDLL):
        return found
    if strict:
        raise CompileError(found)
    return None


@cache
def _load() -> ctypes.CDLL | str:
    if os.environ.get("MANGO_NATIVE") == "0":
        return "MANGO_NATIVE=0"
    try:
        try:
            library = ctypes.CDLL(str(build(_folder())))
        except OSError:                                      # a folder that cannot be written, or a broken file in it
            library = ctypes.CDLL(str(build(Path(tempfile.mkdtemp(prefix="mango-")))))
    except (CompileError, OSError) as error:
        warnings.warn(f"MANGO's CPU kernels are not available, steps will be 10 to 40 times slower: {error}", stacklevel=2)
        return str(error)
    library.job_bytes.restype = ctypes.c_int64
    if library.job_bytes() != JOB.itemsize:
        raise AssertionError(f"a Job has {library.job_bytes()} bytes in C, {JOB.itemsize} in Python")
    pointer, wide, narrow, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32
    library.update.argtypes = [pointer, wide, narrow]
    library.decode_tensor.argtypes = [narrow, pointer, pointer, pointer, wide, pointer, narrow]
    library.encode_tensor.argtypes = [narrow, pointer, pointer, pointer, wide, pointer, word, word, narrow]
    for function in (library.update, library.decode_tensor, library.encode_tensor):
        function.restype = None
    return library


def takes(codec: str, x: Tensor) -> bool:
    """Whether a kernel encodes or decodes this: a blockwise format on the CPU."""
    if x.device.type != "cpu" or codec in ("float32", "factored") or codec not in _FORMATS or type(x) is not Tensor:
        return False
    return load() is not None


def empty_parts(codec: str, n: int) -> dict[str, Tensor]:
    """Uninitialised parts of an encoding of `n` entries."""
    parts = _FORMATS[codec][1].items()
    return {name: torch.empty(_length(n, each, own), dtype=dtype) for name, (each, own, dtype) in parts}


def first(codec: str, parts: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Views of the parts of the first `n` entries."""
    sizes = _FORMATS[codec][1]
    return {name: part.view(-1)[: _length(n, *sizes[name][:2])] for name, part in parts.items()}


def _length(n: int, each: int, own: int) -> int:
    """Entries of a part that has `own` for every `each` of the tensor's `n`, rounded up."""
    return -(-n * own // each)


def part_pointers(parts: dict[str, Tensor]) -> list[int]:
    """Addresses of codes, scale and low scale: (3,), 0 where there is none."""
    found = [part.data_ptr() for part in parts.values()]
    return found + [0] * (3 - len(found))


def encode(codec: str, x: Tensor, key: int | None) -> dict[str, Tensor]:
    """The parts of `x` in a format that `takes` says there is a kernel for."""
    library: Any = load()
    flat = x.detach().float().contiguous()
    parts = empty_parts(codec, flat.numel())
    if codec == "bfloat16":
        parts = {"values": parts["values"].view(x.shape)}
    chance = key is not None
    library.encode_tensor(
        _FORMATS[codec][0], *part_pointers(parts), flat.numel(), flat.data_ptr(), key or 0, chance, torch.get_num_threads()
    )
    return parts


def decode(codec: str, shape: tuple[int, ...], parts: dict[str, Tensor]) -> Tensor:
    """The dense float32 tensor of parts made by `encode` or by the codec's twin."""
    library: Any = load()
    out = torch.empty(shape)
    library.decode_tensor(_FORMATS[codec][0], *part_pointers(parts), out.numel(), out.data_ptr(), torch.get_num_threads())
    return out


def update(jobs: NDArray[Any]) -> None:
    """Run one update of every job (an array of `JOB`), in place."""
    library: Any = load()
    library.update(jobs.ctypes.data, len(jobs), torch.get_num_threads())
