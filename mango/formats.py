"""Which codec stores what at how many bits, and gradients of which only the largest entries are kept."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mango.blockwise import Log4, LogNormal6, NormalFloat4, Signed8, Ternary2, Unsigned8
from mango.codecs import CODECS, BFloat16, Codec, Encoded, Factored, Float32, Shape, encode, pack, unpack


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

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        flat = x.detach().reshape(-1)
        n, k = flat.numel(), self.kept(flat.numel())
        chosen = self._largest(flat, k)                                            # (n,)
        places = chosen.nonzero()[:, 0]                                            # (k,) rising
        parts = dict(encode(self.inner, flat[places], key).parts)
        if self._mask_is_smaller(n, k):
            parts["mask"] = pack(chosen.to(torch.uint8), 1)
        else:
            parts["indices"] = self._pack_indices(places, index_bits(n))
        return Encoded(self.name, tuple(x.shape), parts)

    @staticmethod
    def _largest(flat: Tensor, k: int) -> Tensor:
        """Which entries are the `k` largest in absolute value: (n,) bool. A selection, not a sort; nan counts as infinite."""
        if k == flat.numel():
            return torch.ones_like(flat, dtype=torch.bool)
        size = flat.abs().nan_to_num(nan=math.inf, posinf=math.inf)
        least = size.kthvalue(size.numel() - k + 1).values                         # of those that are kept
        more, equal = size > least, size == least
        return more | (equal & (equal.cumsum(0) <= k - more.sum()))

    def decode(self, enc: Encoded) -> Tensor:
        n = math.prod(enc.shape)
        if "mask" in enc.parts:
            places = unpack(enc.parts["mask"], 1, n).nonzero()[:, 0]
        else:
            places = self._unpack_indices(enc.parts["indices"], index_bits(n), self._count(enc))
        inner = {key: part for key, part in enc.parts.items() if key not in ("mask", "indices")}
        dense = places.new_zeros(n, dtype=torch.float32)
        dense[places] = Encoded(self.inner.name, (places.numel(),), inner).decode()
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
SIGNED: dict[int, Codec] = {32: Float32(), 16: BFloat16(), 8: Signed8(), 6: LogNormal6(), 4: NormalFloat4(), 2: Ternary2()}
UNSIGNED: dict[int, Codec] = {32: Float32(), 16: BFloat16(), 8: Unsigned8(), 4: Log4(), 0: Factored()}
for _codec in SIGNED.values():
    CODECS[f"sparse-{_codec.name}"] = Sparse(_codec)


def gradient_codec(bits: int, sparsity: float) -> Codec:
    """The codec of a gradient at `bits` bits with a fraction `sparsity` of its entries dropped."""
    return replace(Sparse(SIGNED[bits]), sparsity=sparsity) if sparsity else SIGNED[bits]
