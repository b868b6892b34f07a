"""Blockwise codecs: packed codes and a scale per block. Each is the PyTorch specification of a CPU and a CUDA kernel."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor

from mango import noise
from mango.codecs import Encoded, Shape, from_blocks, pack, register_codec, safe, to_blocks, unpack


def _shares(n: int, block: int, key: int | None, device: torch.device) -> Tensor:
    """The share of the way to the next level from which a value is rounded up: one half, or by chance (B, block)."""
    if key is None:
        return torch.full((), 0.5, device=device)
    return to_blocks(noise.uniform(n, key, device), block)


def _packed_bytes(shape: Shape, bits: int, block: int, scale_bytes: int) -> int:
    n = math.prod(shape)
    return math.ceil(n * bits / 8) + math.ceil(n / block) * scale_bytes


def _root_codes(x: Tensor, share: Tensor, levels: int) -> Tensor:
    """Codes c in 0..levels of x in [0, 1] on the grid (c / levels)^2: c^2 + u (2c + 1) < a is c < sqrt(a - u + u^2) - u."""
    a = (x * levels**2 + (share.square() - share)).clamp_(min=1e-12)
    return (a.sqrt_() - share).clamp_(max=levels).ceil_()


@register_codec
@dataclass(frozen=True)
class Signed8:
    """8 bits, signed, square-root companded: x = sign(c) (c/127)^2 absmax; 1 byte per value + 2 per block.

    The relative l2 error on a normal sample equals that of linear codes (0.7 %), while the smallest non-zero level is
    127 times nearer to zero: Adam divides by sqrt(v), so small entries count as much as large ones.
    """

    name: str = "signed8"
    block: int = 128                                                               # values sharing one bfloat16 scale

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)                                          # (B, block)
        scale = blocks.abs().amax(1).bfloat16()                                    # (B,)
        share = _shares(x.numel(), self.block, key, x.device)
        codes = _root_codes(blocks.abs() / safe(scale.float())[:, None], share, 127) * blocks.sign()
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
def _nf4_levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, device=device)


def _level_codes(levels: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """Index of the level at or below y, or of the next where y is past a share of the way. `levels`: (K,) or (B, K), rising."""
    y = y.contiguous()
    low = (torch.searchsorted(levels, y, right=True) - 1).clamp_(0, levels.shape[-1] - 1)
    high = (low + 1).clamp_(max=levels.shape[-1] - 1)
    table = levels.expand(*y.shape[:-1], -1) if levels.dim() == 1 else levels
    floor, ceiling = table.gather(-1, low), table.gather(-1, high)
    return torch.where(y - floor > share * (ceiling - floor), high, low)


@register_codec
@dataclass(frozen=True)
class NormalFloat4:
    """NF4: 16 normal quantiles with an exact zero (Dettmers et al. 2023, sec. 3), 0.5 bytes per value + 2 per block."""

    name: str = "nf4"
    block: int = 64

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        scale = blocks.abs().amax(1).bfloat16()
        y = blocks / safe(scale.float())[:, None]
        codes = _level_codes(_nf4_levels(x.device), y, _shares(x.numel(), self.block, key, x.device))
        packed = pack(from_blocks(codes, (x.numel(),)).to(torch.uint8), 4)
        return Encoded(self.name, tuple(x.shape), {"codes": packed, "scale": scale})

    def decode(self, enc: Encoded) -> Tensor:
        levels = _nf4_levels(enc.parts["codes"].device)
        values = levels.index_select(0, unpack(enc.parts["codes"], 4, math.prod(enc.shape)).int())
        return from_blocks(to_blocks(values, self.block) * enc.parts["scale"].float()[:, None], enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 4, self.block, 2)


LOG6_STEP = 0.9993335555061811                               # exp(-1 / 1500): a fiftieth of a nat over thirty gaps
LOG6_SQUARE = 2.9324524775280846e-05                         # (ln 2 / 128)^2


@cache
def _log6_steps(device: torch.device) -> Tensor:
    """The ratio of neighbouring levels by the code of the span (256,); by multiplication, which is the same everywhere."""
    products = accumulate([LOG6_STEP] * 255, mul, initial=1.0)
    return torch.tensor(list(products), dtype=torch.float64, device=device).float()


def pack6(codes: Tensor) -> Tensor:
    """Pack codes below 64 (N,) uint8, four into three bytes, low bits first: (ceil(3 N / 4),)."""
    four = F.pad(codes, (0, -codes.numel() % 4)).view(-1, 4).int()
    words = four[:, 0] | four[:, 1] << 6 | four[:, 2] << 12 | four[:, 3] << 18
    packed = torch.stack([words & 255, words >> 8 & 255, words >> 16], 1).to(torch.uint8).view(-1)
    size = math.ceil(codes.numel() * 3 / 4)
    return packed if packed.numel() == size else packed[:size].clone()


def unpack6(packed: Tensor, n: int) -> Tensor:
    """Undo `pack6`: the first `n` codes, uint8 (n,)."""
    three = F.pad(packed, (0, -packed.numel() % 3)).view(-1, 3).int()
    words = three[:, 0] | three[:, 1] << 8 | three[:, 2] << 16
    return torch.stack([words >> shift & 63 for shift in (0, 6, 12, 18)], 1).to(torch.uint8).view(-1)[:n]


@register_codec
@dataclass(frozen=True)
class LogNormal6:
    """6 bits for values whose magnitudes are near log-normal, as gradients' are (Chmiel et al. 2021): sign and 31 levels.

    The levels are geometric, from the block's largest value down by a span in closed form: 4.8 sigma / sqrt(sigma^2 + 0.6)
    nats, with sigma the deviation of log|x| over the block's non-zero values. Less clips more of the small values' energy
    than the finer levels win, and more the other way round; on log-normal samples of sigma 0.5 to 3 the relative error is
    below 4 %. Code 0 is exactly zero. Rounding is between decoded values, hence unbiased in x. 0.75 bytes per value + 3
    per block.
    """

    name: str = "lognormal6"
    block: int = 64                                                                # values sharing a bfloat16 scale, a uint8 span

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)                                          # (B, block)
        magnitudes = blocks.abs()
        span, scale = self._span(magnitudes), magnitudes.amax(1).bfloat16()        # (B,)
        divisor = safe(scale.float())
        lift = torch.where(divisor < 2.0**-100, 2.0**100, 1.0)                     # or the quotient would overflow
        y = (magnitudes * lift[:, None]) * (1 / (divisor * lift))[:, None]
        codes = _level_codes(self._levels(span), y, _shares(x.numel(), self.block, key, x.device))
        signed = codes + 32 * ((codes > 0) & (blocks < 0))
        packed = pack6(from_blocks(signed, (x.numel(),)).to(torch.uint8))
        return Encoded(self.name, tuple(x.shape), {"codes": packed, "scale": scale, "scale_span": span})

    @staticmethod
    def _span(magnitudes: Tensor) -> Tensor:
        """In fiftieths of a nat: (B,) uint8, at least 1. Logarithms are read off the floats' bits, in 1/128 octave."""
        bits, some = magnitudes.contiguous().view(torch.int32), magnitudes > 0
        below = (((bits.amax(1, keepdim=True) - bits) >> 16).clamp(max=4095) * some).long()
        count = some.sum(1)                                                        # whole numbers: sums are exact in any order
        spread = (count * below.square().sum(1) - below.sum(1).square()).double()
        variance = spread / count.square().clamp(min=1).double() * LOG6_SQUARE     # (B,) nats^2
        return (240 * (variance / (variance + 0.6)).sqrt()).round().clamp(min=1).to(torch.uint8)

    @staticmethod
    def _levels(span: Tensor) -> Tensor:
        """0, then r^30, r^29 .. r, 1, powers by doubling: (B, 32)."""
        ratio = _log6_steps(span.device)[span.long()][:, None]
        powers = torch.ones_like(ratio)
        for _ in range(5):
            powers, ratio = torch.cat([powers, powers * ratio], 1), ratio.square()
        return torch.cat([torch.zeros_like(ratio), powers[:, :31].flip(1)], 1)

    def decode(self, enc: Encoded) -> Tensor:
        codes = to_blocks(unpack6(enc.parts["codes"], math.prod(enc.shape)), self.block).long()
        values = self._levels(enc.parts["scale_span"]).gather(1, codes & 31) * enc.parts["scale"].float()[:, None]
        return from_blocks(torch.where(codes > 31, -values, values), enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 6, self.block, 3)


@register_codec
@dataclass(frozen=True)
class Ternary2:
    """2 bits: -a, 0 or a with a tuned to the block's spread, 0.25 bytes per value + 2 per block.

    With nearest rounding a = 1.224 rms, the Lloyd-Max level for a normal sample (relative error 0.44); with stochastic
    rounding a = 1.5 rms: wider is less biased in the tails, narrower less noisy.
    """

    name: str = "ternary2"
    block: int = 64

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        largest = blocks.abs().amax(1)                                             # divide first: squares would underflow
        starts = torch.arange(0, x.numel(), self.block, device=x.device)
        filled = (x.numel() - starts).clamp(max=self.block)                        # (B,) the padding of the last block is no data
        rms = largest * ((blocks / safe(largest)[:, None]).square().sum(1) / filled).sqrt()
        scale = (rms * (1.224 if key is None else 1.5)).bfloat16()
        up = blocks.abs() / safe(scale.float())[:, None] > _shares(x.numel(), self.block, key, x.device)
        codes = (up * blocks.sign() + 1).to(torch.uint8)
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

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        scale = blocks.amax(1)
        codes = _root_codes(blocks / safe(scale)[:, None], _shares(x.numel(), self.block, key, x.device), 255)
        codes = torch.maximum(codes, (blocks > 0).float())
        return Encoded(self.name, tuple(x.shape), {"codes": from_blocks(codes, (x.numel(),)).to(torch.uint8), "scale": scale})

    def decode(self, enc: Encoded) -> Tensor:
        codes = to_blocks(enc.parts["codes"], self.block)
        return from_blocks(codes.square() * (enc.parts["scale"] / 65025)[:, None], enc.shape)

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

    def encode(self, x: Tensor, key: int | None = None) -> Encoded:
        blocks = to_blocks(x, self.block)
        high = blocks.amax(1)                                                      # exact: rounded down it could never grow
        some = blocks > 0
        least = torch.where(some, blocks, high[:, None]).amin(1)
        low = torch.maximum(least, high * 1e-8).clamp(min=2.0**-126)               # a bfloat16 below that may be zero
        low = torch.minimum(low.bfloat16(), high.bfloat16())
        levels = self._levels(low, high)                                           # (B, 16)
        y = torch.where(some, torch.maximum(blocks, levels[:, 1:2]), 0.0)
        codes = _level_codes(levels, y, _shares(x.numel(), self.block, key, x.device)).to(torch.uint8)
        packed = pack(from_blocks(codes, (x.numel(),)), 4)
        return Encoded(self.name, tuple(x.shape), {"codes": packed, "scale_high": high, "scale_low": low})

    @staticmethod
    def _levels(low: Tensor, high: Tensor) -> Tensor:
        """0, then low r^k for k = 0..14 with r^14 = high / low, powers by doubling: (B, 16)."""
        top = safe(high)[:, None]
        start = torch.where(low[:, None] > 0, low.float()[:, None], top)
        ratio = ((top / start).log().clamp_(min=0) / 14).exp()
        powers = torch.ones_like(start)
        for _ in range(4):
            powers, ratio = torch.cat([powers, powers * ratio], 1), ratio.square()
        return torch.cat([torch.zeros_like(start), start * powers[:, :14], torch.maximum(high[:, None], start)], 1)

    def decode(self, enc: Encoded) -> Tensor:
        codes = to_blocks(unpack(enc.parts["codes"], 4, math.prod(enc.shape)), self.block).long()
        return from_blocks(self._levels(enc.parts["scale_low"], enc.parts["scale_high"]).gather(1, codes), enc.shape)

    def nbytes(self, shape: Shape) -> int:
        return _packed_bytes(shape, 4, self.block, 6)
