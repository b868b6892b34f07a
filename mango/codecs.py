"""Codecs: a tensor to packed parts and back. What is stored is what is counted.

Every codec represents zero exactly and scales freely: nothing is clamped at an absolute value, so an input of any
magnitude that float32 can hold decodes to the same relative error. Passing a key rounds stochastically (unbiased between
neighbouring levels, `mango.noise`); without one the nearest level is taken. Below 8 bits an exponential moving average
needs the former: its increments are smaller than half a bin and would be lost (Li et al. 2023, sec. 3; Xu & Sun 2025, sec. 3).

The classes here and in `mango.blockwise` are the specification, in PyTorch on any device. `encode` and `Encoded.decode` take
the CPU kernels of `mango.native` where these have the format, and give the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mango import native, noise

Shape = tuple[int, ...]


@dataclass(slots=True)
class Encoded:
    """A tensor in packed form: the codec's name, the dense shape and the parts that are really stored.

    Parts are named by what they hold: `codes` or `values`, `scale*`, `indices` or `mask`.
    """

    codec: str
    shape: Shape
    parts: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind all parts."""
        return sum(part.untyped_storage().nbytes() for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def to(self, device: torch.device) -> "Encoded":
        """A copy on the device, without waiting where the source is pinned."""
        parts = {name: part.to(device, non_blocking=True, copy=True) for name, part in self.parts.items()}
        return Encoded(self.codec, self.shape, parts)

    def decode(self) -> Tensor:
        """The dense float32 tensor. A `float32` encoding gives its own storage, anything else a new tensor."""
        if native.takes(self.codec, next(iter(self.parts.values()))):
            return native.decode(self.codec, self.shape, self.parts)
        return CODECS[self.codec].decode(self)


def head(enc: Encoded, n: int) -> Tensor:
    """The first `n` entries (all, where there are fewer), in flat order: float32 (n,), never the stored tensor itself."""
    n = min(n, math.prod(enc.shape))
    if enc.codec == "factored":
        row, column = enc.parts["values_row"], enc.parts["values_column"]
        rows = -(-n // max(1, column.numel()))
        return (row[:rows, None] / safe(row.mean()) * column[:n]).view(-1)[:n]
    dense = Encoded(enc.codec, (n,), native.first(enc.codec, enc.parts, n)).decode()
    return dense.clone() if enc.codec == "float32" else dense


class Codec(Protocol):
    """Encodes any floating tensor; `nbytes(shape)` is exactly what `encode` will store."""

    @property
    def name(self) -> str: ...

    def encode(self, x: Tensor, key: int | None = None) -> Encoded: ...

    def decode(self, enc: Encoded) -> Tensor: ...

    def nbytes(self, shape: Shape) -> int: ...


CODECS: dict[str, Codec] = {}
C = TypeVar("C", bound=Callable[[], Codec])


def register_codec(cls: C) -> C:
    """Put a codec's default instance on the table `CODECS` under its name."""
    codec = cls()
    if codec.name in CODECS:
        raise ValueError(f"codec {codec.name!r} is already registered by {CODECS[codec.name]!r}")
    CODECS[codec.name] = codec
    return cls


def to_blocks(x: Tensor, block: int) -> Tensor:
    """Flatten to float32 rows of `block` values, padded with zeros: (B, block)."""
    flat = x.detach().reshape(-1).float()
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def from_blocks(blocks: Tensor, shape: Shape) -> Tensor:
    """Undo `to_blocks`: drop the padding and restore the shape."""
    n = math.prod(shape)
    flat = blocks.reshape(-1)
    return (flat if flat.numel() == n else flat[:n].clone()).view(shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of 1, 2 or 4 bits (N,) uint8 into bytes, low bits first: (ceil(N * bits / 8),)."""
    per_byte = 8 // bits
    lanes = F.pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)
    packed = lanes[:, 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[:, lane] << (bits * lane)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack`: the first `n` codes, uint8 (n,)."""
    per_byte, mask = 8 // bits, (1 << bits) - 1
    lanes = [(packed >> (bits * lane)) & mask for lane in range(per_byte)]
    return torch.stack(lanes, 1).view(-1)[:n]


def encode(codec: Codec, x: Tensor, key: int | None = None) -> Encoded:
    """`codec.encode(x, key)`, by a CPU kernel where there is one."""
    if native.takes(codec.name, x):
        return Encoded(codec.name, tuple(x.shape), native.encode(codec.name, x, key))
    return codec.encode(x, key)


def safe(scale: Tensor) -> Tensor:
    """`scale` with every entry that is not positive replaced by one: a denominator."""
    return torch.where(scale > 0, scale, 1.0)


@register_codec
@dataclass(frozen=True)
class Float32:
    """Full precision: the tensor itself, 4 bytes per value. Decoding returns the stored tensor, so updates work in place."""

    name: str = "float32"

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        dense = x.detach().float().contiguous()
        owned = dense.untyped_storage().nbytes() == 4 * dense.numel() and dense.data_ptr() != x.data_ptr()
        return Encoded(self.name, tuple(x.shape), {"values": dense if owned else dense.clone()})

    def decode(self, enc: Encoded) -> Tensor:
        return enc.parts["values"]

    def nbytes(self, shape: Shape) -> int:
        return 4 * math.prod(shape)


@register_codec
@dataclass(frozen=True)
class BFloat16:
    """bfloat16, 2 bytes per value. Stochastic rounding adds 16 random bits below the mantissa and truncates."""

    name: str = "bfloat16"

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        dense = x.detach().float().contiguous()
        if key is not None:
            below = (noise.uniform(dense.numel(), key, dense.device) * 65536).int().view_as(dense)
            dense = ((dense.view(torch.int32) + below) & -65536).view(torch.float32)
        return Encoded(self.name, tuple(x.shape), {"values": dense.to(torch.bfloat16)})

    def decode(self, enc: Encoded) -> Tensor:
        return enc.parts["values"].float()

    def nbytes(self, shape: Shape) -> int:
        return 2 * math.prod(shape)


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """A tensor as a matrix: the first dimension by all others; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


@register_codec
@dataclass(frozen=True)
class Factored:
    """Row and column means of values >= 0 (Shazeer & Stern 2018, sec. 3): 4 bytes per row and per column of the matrix.

    The factors of a moving average are the moving averages of the factors, so nothing drifts. A vector is stored exactly.
    """

    name: str = "factored"

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        matrix = x.detach().reshape(matrix_shape(tuple(x.shape))).float()
        if matrix.numel() == 0:
            return Encoded(self.name, tuple(x.shape), {"values_row": matrix.new_zeros(matrix.shape[0]),
                                                       "values_column": matrix.new_zeros(matrix.shape[1])})  # fmt: skip
        return Encoded(self.name, tuple(x.shape), {"values_row": matrix.mean(1), "values_column": matrix.mean(0)})

    def decode(self, enc: Encoded) -> Tensor:
        row, column = enc.parts["values_row"], enc.parts["values_column"]
        share = row / safe(row.mean()) if row.numel() else row                    # divided first: a product of means underflows
        return (share[:, None] * column[None, :]).view(enc.shape)

    def nbytes(self, shape: Shape) -> int:
        rows, columns = matrix_shape(shape)
        return 4 * (rows + columns)


def component(part: str) -> str | None:
    """What a part counts as in a memory report: 'scales', 'indices', or None for the values themselves."""
    if part.startswith("scale"):
        return "scales"
    return "indices" if part in ("mask", "indices") else None


def flatten(enc: Encoded, prefix: str) -> dict[str, object]:
    """An encoding as plain tensors and scalars for a state dict, under keys `<prefix>.<what>`."""
    shape: Sequence[int] = list(enc.shape)
    return {f"{prefix}.codec": enc.codec, f"{prefix}.shape": shape} | {f"{prefix}:{k}": v for k, v in enc.parts.items()}


def unflatten(state: Mapping[str, object], prefix: str, device: torch.device) -> Encoded:
    """Undo `flatten`, copying the parts to `device` without a change of dtype."""
    codec, shape = state[f"{prefix}.codec"], state[f"{prefix}.shape"]
    if codec not in CODECS or not isinstance(codec, str) or not isinstance(shape, list | tuple):
        raise ValueError(f"unknown codec {codec!r} in a state dict; known: {', '.join(CODECS)}")
    parts = {key.split(":", 1)[1]: part.to(device, copy=True) for key, part in state.items()
             if key.startswith(f"{prefix}:") and isinstance(part, Tensor)}  # fmt: skip
    return Encoded(codec, tuple(shape), parts)
