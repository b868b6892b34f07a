"""Codecs: a tensor to packed parts and back. What is stored is what is counted.

Every codec is blockwise, represents zero exactly and scales freely: nothing is clamped at an absolute value, so an input
of any magnitude that float32 can hold decodes to the same relative error. Passing a generator rounds stochastically
(unbiased between neighbouring levels); without one the nearest level is taken. Below 8 bits an exponential moving average
needs the former: its increments are smaller than half a bin and would be lost (Li et al. 2023, sec. 3; Xu & Sun 2025, sec. 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

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

    def decode(self) -> Tensor:
        """The dense float32 tensor. A `float32` encoding gives its own storage, anything else a new tensor."""
        return CODECS[self.codec].decode(self)


class Codec(Protocol):
    """Encodes any floating tensor; `nbytes(shape)` is exactly what `encode` will store."""

    @property
    def name(self) -> str: ...

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded: ...

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


def _uniform(like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(like.shape, device=like.device, generator=generator)


def _step_up(fraction: Tensor, generator: Generator | None) -> Tensor:
    """Whether to take the upper of two levels, given the position between them in [0, 1]."""
    return fraction > (0.5 if generator is None else _uniform(fraction, generator))


def safe(scale: Tensor) -> Tensor:
    """`scale` with every entry that is not positive replaced by one: a denominator."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _packed_bytes(shape: Shape, bits: int, block: int, scale_bytes: int) -> int:
    n = math.prod(shape)
    return math.ceil(n * bits / 8) + math.ceil(n / block) * scale_bytes


@register_codec
@dataclass(frozen=True)
class Float32:
    """Full precision: the tensor itself, 4 bytes per value. Decoding returns the stored tensor, so updates work in place."""

    name: str = "float32"

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
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

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
        dense = x.detach().float().contiguous()
        if generator is not None:
            noise = torch.randint(0, 1 << 16, dense.shape, dtype=torch.int32, device=dense.device, generator=generator)
            dense = ((dense.view(torch.int32) + noise) & -65536).view(torch.float32)
        return Encoded(self.name, tuple(x.shape), {"values": dense.to(torch.bfloat16)})

    def decode(self, enc: Encoded) -> Tensor:
        return enc.parts["values"].float()

    def nbytes(self, shape: Shape) -> int:
        return 2 * math.prod(shape)


@register_codec
@dataclass(frozen=True)
class Signed8:
    """8 bits, signed, square-root companded: x = sign(c) (c/127)^2 absmax; 1 byte per value + 2 per block.

    The relative l2 error on a normal sample equals that of linear codes (0.7 %), while the smallest non-zero level is
    127 times nearer to zero: Adam divides by sqrt(v), so small entries count as much as large ones.
    """

    name: str = "signed8"
    block: int = 128                                                               # values sharing one bfloat16 scale

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)                                          # (B, block)
        scale = blocks.abs().amax(1).bfloat16()                                    # (B,)
        y = (blocks.abs() / safe(scale.float())[:, None]).clamp_(max=1.0)
        low = (y.sqrt() * 127).floor_().clamp_(max=126)
        fraction = (y * 16129 - low.square()) / (2 * low + 1)                      # between low^2 and (low + 1)^2
        codes = (low + _step_up(fraction, generator)) * blocks.sign()
        return Encoded(self.name, tuple(x.shape), {"codes": from_blocks(codes, (x.numel(),)).to(torch.int8), "scale": scale})

    def decode(self, enc: Encoded) -> Tensor:
        codes = to_blocks(enc.parts["codes"], self.block)
        return from_blocks(codes * codes.abs() * (enc.parts["scale"].float() / 16129)[:, None], enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 8, self.block, 2)


NF4_LEVELS: tuple[float, ...] = (                            # quantiles of the normal distribution (Dettmers et al. 2023, sec. 3)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def _nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels, float32, and for each of 512 even bins of [-1, 1] the level at or below its lower edge, int32."""
    levels = torch.tensor(NF4_LEVELS)
    edges = torch.arange(512) / 255.5 - 1
    base = (torch.bucketize(edges, levels, right=True) - 1).clamp(0, 14)
    return levels.to(device), base.int().to(device)


@register_codec
@dataclass(frozen=True)
class NormalFloat4:
    """NF4: 16 normal quantiles with an exact zero (Dettmers et al. 2023, sec. 3), 0.5 bytes per value + 2 per block."""

    name: str = "nf4"
    block: int = 64

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        scale = blocks.abs().amax(1).bfloat16()
        y = (blocks / safe(scale.float())[:, None]).clamp_(-1.0, 1.0)
        y = from_blocks(y, (x.numel(),))
        levels, base = _nf4_tables(x.device)
        low = base.index_select(0, ((y + 1) * 255.5).int())                        # a bin of 1/256 holds one level at most
        low += y >= levels.index_select(0, low + 1)
        low.clamp_(max=14)
        floor = levels.index_select(0, low)
        fraction = (y - floor) / (levels.index_select(0, low + 1) - floor)
        packed = pack((low + _step_up(fraction, generator)).to(torch.uint8), 4)
        return Encoded(self.name, tuple(x.shape), {"codes": packed, "scale": scale})

    def decode(self, enc: Encoded) -> Tensor:
        levels, _ = _nf4_tables(enc.parts["codes"].device)
        values = levels.index_select(0, unpack(enc.parts["codes"], 4, math.prod(enc.shape)).int())
        return from_blocks(to_blocks(values, self.block) * enc.parts["scale"].float()[:, None], enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 4, self.block, 2)


@register_codec
@dataclass(frozen=True)
class Ternary2:
    """2 bits: -a, 0 or a with a tuned to the block's spread, 0.25 bytes per value + 2 per block.

    With nearest rounding a = 1.22 rms, the Lloyd-Max level for a normal sample (relative error 0.44); with stochastic
    rounding a = `spread` rms: wider is less biased in the tails, narrower less noisy.
    """

    name: str = "ternary2"
    block: int = 64
    spread: float = 1.5

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        largest = safe(blocks.abs().amax(1))                                      # divide first: squares would underflow
        starts = torch.arange(0, x.numel(), self.block, device=x.device)
        filled = (x.numel() - starts).clamp(max=self.block)                        # (B,) the padding of the last block is no data
        rms = largest * ((blocks / largest[:, None]).square().sum(1) / filled).sqrt()
        scale = (rms * (1.224 if generator is None else self.spread)).bfloat16()
        fraction = (blocks.abs() / safe(scale.float())[:, None]).clamp_(max=1.0)
        codes = (_step_up(fraction, generator) * blocks.sign() + 1).to(torch.uint8)
        packed = pack(from_blocks(codes, (x.numel(),)), 2)
        return Encoded(self.name, tuple(x.shape), {"codes": packed, "scale": scale})

    def decode(self, enc: Encoded) -> Tensor:
        codes = unpack(enc.parts["codes"], 2, math.prod(enc.shape)).float() - 1
        return from_blocks(to_blocks(codes, self.block) * enc.parts["scale"].float()[:, None], enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 2, self.block, 2)


@register_codec
@dataclass(frozen=True)
class Unsigned8:
    """8 bits for values >= 0 in the square-root domain: x = (c/255)^2 max; code 0 is exactly zero and nothing else is."""

    name: str = "unsigned8"
    block: int = 256                                                               # values sharing one float32 scale

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        scale = blocks.amax(1)
        y = blocks / safe(scale)[:, None]
        low = (y.sqrt() * 255).floor_().clamp_(max=254)
        fraction = (y * 65025 - low.square()) / (2 * low + 1)
        codes = torch.maximum(low + _step_up(fraction, generator), (blocks > 0).float())
        return Encoded(self.name, tuple(x.shape), {"codes": from_blocks(codes, (x.numel(),)).to(torch.uint8), "scale": scale})

    def decode(self, enc: Encoded) -> Tensor:
        codes = to_blocks(enc.parts["codes"], self.block)
        return from_blocks((codes / 255).square_() * enc.parts["scale"][:, None], enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 8, self.block, 4)


@register_codec
@dataclass(frozen=True)
class Log4:
    """4 bits for values >= 0: 15 levels evenly spaced in log x from the block's least to its largest non-zero value.

    Code 0 is exactly zero. The least level is at least 1e-8 of the largest (a ratio of 1e-4 between gradients): smaller
    values are raised to it, which shortens their steps. Rounding is between decoded values, hence unbiased in x.
    """

    name: str = "log4"
    block: int = 128                                                               # values sharing a float32 and a bfloat16 scale

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        high = blocks.amax(1)                                                      # exact: rounded down it could never grow
        some = blocks > 0
        least = torch.where(some, blocks, high[:, None]).amin(1)
        low = torch.minimum(torch.maximum(least, high * 1e-8).bfloat16(), high.bfloat16())
        start, step = self._grid(low, high)                                        # levels are start * exp(k * step), k = 0..14
        y = torch.minimum(torch.maximum(blocks, start), safe(high)[:, None])
        below = ((y / start).log() / safe(step)).floor_().clamp_(0, 13)
        floor = start * (below * step).exp()
        fraction = ((y - floor) / safe(floor * step.expm1())).clamp_(0, 1)
        codes = ((below + _step_up(fraction, generator) + 1) * some).to(torch.uint8)
        packed = pack(from_blocks(codes, (x.numel(),)), 4)
        return Encoded(self.name, tuple(x.shape), {"codes": packed, "scale_low": low, "scale_high": high})

    @staticmethod
    def _grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest level and the step in log x between levels: (B, 1) each."""
        start = safe(low.float())[:, None]
        return start, (safe(high)[:, None] / start).log().clamp_(min=0) / 14

    def decode(self, enc: Encoded) -> Tensor:
        codes = to_blocks(unpack(enc.parts["codes"], 4, math.prod(enc.shape)), self.block)
        start, step = self._grid(enc.parts["scale_low"], enc.parts["scale_high"])
        return from_blocks(start * ((codes - 1) * step).exp() * (codes > 0), enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 4, self.block, 6)


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

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
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


def index_bits(n: int) -> int:
    """Bits of one index into `n` entries."""
    return max(1, (n - 1).bit_length())


@dataclass(frozen=True)
class Sparse:
    """The largest entries in absolute value, coded by `inner`; their places as a bit mask or packed indices, the smaller.

    Keeps n - round(n * sparsity) of n entries, one at least; ties go to the lower index.
    """

    inner: Codec
    sparsity: float = 0.9

    @property
    def name(self) -> str:
        return f"sparse-{self.inner.name}"

    def kept(self, n: int) -> int:
        return max(1, n - round(n * self.sparsity)) if n else 0

    def encode(self, x: Tensor, generator: Generator | None = None) -> Encoded:
        flat = x.detach().reshape(-1)
        n, k = flat.numel(), self.kept(flat.numel())
        order = flat.abs().argsort(descending=True, stable=True)[:k].sort().values  # (k,)
        inner = self.inner.encode(flat[order], generator)
        parts = {f"{key}": part for key, part in inner.parts.items()}
        if self._mask_is_smaller(n, k):
            mask = torch.zeros(n, dtype=torch.uint8, device=x.device)
            mask[order] = 1
            parts["mask"] = pack(mask, 1)
        else:
            parts["indices"] = self._pack_indices(order, index_bits(n))
        return Encoded(self.name, tuple(x.shape), parts)

    def decode(self, enc: Encoded) -> Tensor:
        n = math.prod(enc.shape)
        if "mask" in enc.parts:
            places = unpack(enc.parts["mask"], 1, n).nonzero()[:, 0]
        else:
            places = self._unpack_indices(enc.parts["indices"], index_bits(n), self._count(enc))
        inner = {key: part for key, part in enc.parts.items() if key not in ("mask", "indices")}
        dense = places.new_zeros(n, dtype=torch.float32)
        dense[places] = self.inner.decode(Encoded(self.inner.name, (places.numel(),), inner))
        return dense.view(enc.shape)

    @staticmethod
    def _count(enc: Encoded) -> int:
        return int(enc.parts["indices"][:8].view(torch.int64).item())

    @staticmethod
    def _pack_indices(places: Tensor, bits: int) -> Tensor:
        """The count as 8 bytes, then `bits` bits per index."""
        spread = (places[:, None] >> torch.arange(bits, device=places.device)) & 1  # (k, bits)
        count = torch.tensor([places.numel()], dtype=torch.int64, device=places.device).view(torch.uint8)
        return torch.cat([count, pack(spread.reshape(-1).to(torch.uint8), 1)])

    @staticmethod
    def _unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
        spread = unpack(packed[8:], 1, count * bits).view(count, bits).long()
        return (spread << torch.arange(bits, device=packed.device)).sum(1)

    @staticmethod
    def _mask_is_smaller(n: int, k: int) -> bool:
        return math.ceil(n / 8) <= 8 + math.ceil(k * index_bits(n) / 8)

    def nbytes(self, shape: Shape) -> int:
        n = math.prod(shape)
        k = self.kept(n)
        places = math.ceil(n / 8) if self._mask_is_smaller(n, k) else 8 + math.ceil(k * index_bits(n) / 8)
        return self.inner.nbytes((k,)) + places


# Which codec stores what at how many bits. A menu entry of `KNOBS` is one row here.
SIGNED: dict[int, Codec] = {32: Float32(), 16: BFloat16(), 8: Signed8(), 4: NormalFloat4(), 2: Ternary2()}
UNSIGNED: dict[int, Codec] = {32: Float32(), 16: BFloat16(), 8: Unsigned8(), 4: Log4(), 0: Factored()}
for _codec in SIGNED.values():
    CODECS[f"sparse-{_codec.name}"] = Sparse(_codec)


def gradient_codec(bits: int, sparsity: float) -> Codec:
    """The codec of a gradient at `bits` bits with a fraction `sparsity` of its entries dropped."""
    return replace(Sparse(SIGNED[bits]), sparsity=sparsity) if sparsity else SIGNED[bits]


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
