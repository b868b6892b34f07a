# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What the CUDA kernels are made of, in Triton: noise, reading and writing, and the formats. Nothing to launch by itself.

Entries are worked on in rows of 256, as two halves of 128: halves share their hashes (noise.py), and every block of 64,
128 or 256 entries lies within a row. A tile is ROWS such rows; each thread holds 4 or 8 neighbours of each half, so that
all accesses are vectors, and 4- and 2-bit codes are packed within a thread. Positions are 64-bit: an address plus the first
entry `at` of a tile; within a tile they are 32-bit, and entries from `left` on are past the end of the tensor. VECTOR says
that addresses are multiples of 16 bytes and `left` of 8 entries. Second moments in 8 and 4 bits are worked on 2^32 times as
large, which keeps them normal numbers. Decoding and encoding agree with the PyTorch twins (blockwise.py) but for roots,
quotients, logarithms and powers, which are good to a relative 1e-6.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

FLOAT32, BFLOAT16, SIGNED8, NF4, TERNARY2 = (tl.constexpr(n) for n in range(5))     # native.c
UNSIGNED8, LOG4, FACTORED, LOG6, NONE = (tl.constexpr(n) for n in range(5, 10))
GOLDEN = tl.constexpr(0x9E3779B9)
MAGIC = tl.constexpr(12582912.0)                             # 1.5 * 2^23: added to a float, its low bits are the integer
LIFT = tl.constexpr(4294967296.0)                            # 2^32
HUGE = tl.constexpr(3.3e38)
LOG6_OCTAVES = tl.constexpr(1.4426950408889634 / 1500)       # of a fiftieth of a nat over thirty gaps
LOG6_SQUARE = tl.constexpr(2.9324524775280846e-05)           # (ln 2 / 128)^2
CELLS = tl.constexpr(16)                                     # numbers of `nf4_table` before its cells


def nf4_table(levels: tuple[float, ...]) -> list[float]:
    """The 16 levels, then 33 cells of width 1/16 around -1, -15/16 .. 1, which tell where a value is among the levels.

    A cell holds one level at most. It keeps that level (or the one below the cell), the inverse distances to the levels
    before and after, and the level's number.
    """
    table = list(levels)
    for cell in range(33):
        number = max(k for k in range(16) if k == 0 or levels[k] < (cell - 15.5) / 16)
        before = 1 / (levels[number] - levels[number - 1]) if number > 0 else 0.0
        after = 1 / (levels[number + 1] - levels[number]) if number < 15 else 0.0
        table += [levels[number], before, after, float(number)]
    return table


# ---- noise (noise.py): a counter in, two times 16 bits out ----
@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def hashes(key, at, ROWS: tl.constexpr):
    """uint32 (ROWS, 128) of the rows from entry `at`: the low 16 bits are for a row's first half, the others for its second."""
    start = at + tl.arange(0, ROWS).to(tl.int64) * 256
    high = (start >> 32).to(tl.uint32)
    base = tl.where(high > 0, mix(key + high), key) + start.to(tl.uint32) * GOLDEN
    return mix(base[:, None] + tl.arange(0, 128).to(tl.uint32)[None, :] * GOLDEN)


@triton.jit
def half_of(bits, HALF: tl.constexpr):
    if HALF == 0:
        return bits & 0xFFFF
    else:
        return bits >> 16


@triton.jit
def share_of(bits, HALF: tl.constexpr):
    """(k + 1/2) / 2^16, made without a conversion: k as the mantissa of 2^23 + k."""
    return (half_of(bits, HALF) | 0x4B000000).to(tl.float32, bitcast=True) * 0.0000152587890625 - 127.99999237060547


# ---- reading and writing half a tile: (ROWS, 128) entries of the rows from entry `at` ----
@triton.jit
def places(ROWS: tl.constexpr, HALF: tl.constexpr, PER: tl.constexpr):
    """Where the half's bytes or numbers are, counted from the tile's first, with PER entries in each: (ROWS, 128 / PER)."""
    return tl.arange(0, ROWS)[:, None] * (256 // PER) + HALF * (128 // PER) + tl.arange(0, 128 // PER)[None, :]


@triton.jit
def address(base, at, TYPE: tl.constexpr, PER: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to entry `at` (int64) of what lies at `base` (int64)."""
    pointer = base.to(tl.pointer_type(TYPE)) + at // PER
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def inside(where, left, PER: tl.constexpr, VECTOR: tl.constexpr):
    mask = where * PER < left
    if VECTOR:
        mask = tl.max_constancy(mask, [1, 8 // PER])
    return mask


@triton.jit
def read(
    base, at, left, TYPE: tl.constexpr, PER: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
    OTHER: tl.constexpr = 0,
):  # fmt: skip
    """Numbers of a type, or bytes of PER entries each; OTHER past the end."""
    where = places(ROWS, HALF, PER)
    return tl.load(address(base, at, TYPE, PER, VECTOR) + where, inside(where, left, PER, VECTOR), OTHER)


@triton.jit
def write(x, base, at, left, TYPE: tl.constexpr, PER: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    where = places(ROWS, HALF, PER)
    tl.store(address(base, at, TYPE, PER, VECTOR) + where, x, inside(where, left, PER, VECTOR))


@triton.jit
def blocks(ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of the half's blocks, counted from the tile's first: (ROWS, blocks of a half)."""
    if BLOCK == 256:
        return tl.arange(0, ROWS)[:, None]
    else:
        PER: tl.constexpr = 128 // BLOCK
        return tl.arange(0, ROWS)[:, None] * (2 * PER) + HALF * PER + tl.arange(0, PER)[None, :]


@triton.jit
def read_scale(base, at, left, TYPE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    where = blocks(ROWS, HALF, BLOCK)
    return tl.load(base.to(tl.pointer_type(TYPE)) + at // BLOCK + where, where * BLOCK < left, 0).to(tl.float32)


@triton.jit
def write_scale(x, base, at, left, TYPE: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    where = blocks(ROWS, HALF, BLOCK)
    tl.store(base.to(tl.pointer_type(TYPE)) + at // BLOCK + where, x, where * BLOCK < left)


@triton.jit
def spread(x, by):
    """Each block of x (ROWS, 128) times its number in `by` (ROWS, blocks)."""
    ROWS: tl.constexpr = x.shape[0]
    PER: tl.constexpr = by.shape[1]
    return tl.reshape(tl.reshape(x, [ROWS, PER, 128 // PER]) * by[:, :, None], [ROWS, 128])


@triton.jit
def largest(x, PER: tl.constexpr):
    """Largest entry of each block: (ROWS, PER)."""
    return tl.max(tl.reshape(x, [x.shape[0], PER, 128 // PER]), 2)


@triton.jit
def unpack(bytes, BITS: tl.constexpr):
    """(ROWS, n) bytes to (ROWS, n * 8 / BITS) int32 codes, low bits first."""
    wide = bytes.to(tl.int32)
    if BITS == 4:
        return tl.reshape(tl.join(wide & 15, wide >> 4), [wide.shape[0], 128])
    else:
        return four(wide & 3, wide >> 2 & 3, wide >> 4 & 3, wide >> 6)


@triton.jit
def four(first, second, third, fourth):
    """Neighbours in turn: four times (ROWS, 32) to (ROWS, 128)."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [first.shape[0], 128])


@triton.jit
def quarters(codes):
    """Undo `four`."""
    even, odd = tl.split(tl.reshape(codes, [codes.shape[0], 32, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def pack(codes, BITS: tl.constexpr):
    """Undo `unpack`."""
    if BITS == 4:
        low, high = tl.split(tl.reshape(codes, [codes.shape[0], 64, 2]))
        return (low | high << 4).to(tl.uint8)
    else:
        first, second, third, fourth = quarters(codes)
        return (first | second << 2 | third << 4 | fourth << 6).to(tl.uint8)


@triton.jit
def root(x):
    """Square root to a relative 3e-7; not a number at zero."""
    return x * tl.rsqrt(x)


@triton.jit
def quotient(x, y):
    if INTERPRETED:
        return x / y
    else:
        return libdevice.fast_dividef(x, y)


@triton.jit
def log2(x):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def bfloat16(x):
    """To nearest, ties to even; the interpreter's own conversion truncates."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def inverse(x, above):
    """above / x, 0 where x is, and finite."""
    return tl.where(x > 0, tl.minimum(above / tl.where(x > 0, x, 1.0), HUGE), 0.0)


# ---- decoding: (ROWS, 128) float32, times `by` ----
@triton.jit
def decode(
    codes, scale, low, levels, by, at, left, FORMAT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    if FORMAT == FLOAT32:
        return read(codes, at, left, tl.float32, 1, HALF, ROWS, VECTOR) * by
    elif FORMAT == BFLOAT16:
        return read(codes, at, left, tl.bfloat16, 1, HALF, ROWS, VECTOR).to(tl.float32) * by
    elif FORMAT == SIGNED8:
        x = read(codes, at, left, tl.int8, 1, HALF, ROWS, VECTOR).to(tl.float32)
        return spread(x * tl.abs(x), read_scale(scale, at, left, tl.bfloat16, 128, HALF, ROWS) * (by / 16129))
    elif FORMAT == NF4:
        x = tl.load(levels + unpack(read(codes, at, left, tl.uint8, 2, HALF, ROWS, VECTOR, 0x77), 4))
        return spread(only(x, left, HALF, ROWS, VECTOR), read_scale(scale, at, left, tl.bfloat16, 64, HALF, ROWS) * by)
    elif FORMAT == TERNARY2:
        x = (unpack(read(codes, at, left, tl.uint8, 4, HALF, ROWS, VECTOR, 0x55), 2) - 1).to(tl.float32)
        return spread(only(x, left, HALF, ROWS, VECTOR), read_scale(scale, at, left, tl.bfloat16, 64, HALF, ROWS) * by)
    elif FORMAT == LOG6:
        code = read6(codes, at, left, HALF, ROWS, VECTOR)
        octaves = read_scale(low, at, left, tl.uint8, 64, HALF, ROWS) * LOG6_OCTAVES
        size = tl.where((code & 31) == 0, 0.0, tl.exp2(spread(((code & 31) - 31).to(tl.float32), octaves)))
        signed = (size.to(tl.int32, bitcast=True) | (code >> 5 << 31)).to(tl.float32, bitcast=True)
        return spread(signed, read_scale(scale, at, left, tl.bfloat16, 64, HALF, ROWS) * by)
    elif FORMAT == UNSIGNED8:
        x = read(codes, at, left, tl.uint8, 1, HALF, ROWS, VECTOR).to(tl.float32)
        return spread(x * x, tl.minimum(read_scale(scale, at, left, tl.float32, 256, HALF, ROWS) * (by * (LIFT / 65025)), HUGE))
    else:
        tl.static_assert(FORMAT == LOG4)
        code = unpack(read(codes, at, left, tl.uint8, 2, HALF, ROWS, VECTOR), 4)
        high = read_scale(scale, at, left, tl.float32, 128, HALF, ROWS)
        start, ratio, _ = log4_levels(read_scale(low, at, left, tl.bfloat16, 128, HALF, ROWS), high)
        x = tl.exp2((code - 1).to(tl.float32) * ratio) * (start * (by * LIFT))
        x = tl.where(code == 15, tl.maximum(high, start) * (by * LIFT), x)
        return tl.where(code == 0, 0.0, x)


@triton.jit
def log4_levels(low, high):
    """The least level, the logarithm (to base 2) of the ratio of neighbours, and what turns logarithms into numbers of levels."""
    start = tl.where(low > 0, low, tl.where(high > 0, high, 1.0))
    ratio = tl.maximum(log2(tl.where(high > 0, high, 1.0) / start), 0.0) * (1.0 / 14)
    return start, ratio, inverse(ratio, 1.0)


# ---- encoding ----
@triton.jit
def encode(
    x, codes, scale, low, levels, peak, bits, at, left,
    FORMAT: tl.constexpr, CHANCE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Store half a tile. `peak`: (ROWS, 1) the largest entries of both halves, for UNSIGNED8. `CHANCE` is BFLOAT16's; SIGNED8
    rounds to nearest, the others by chance."""
    if FORMAT == FLOAT32:
        write(x, codes, at, left, tl.float32, 1, HALF, ROWS, VECTOR)
    elif FORMAT == BFLOAT16:
        if CHANCE:
            upper = (x.to(tl.uint32, bitcast=True) + half_of(bits, HALF)) >> 16
            write(upper.to(tl.uint16), codes, at, left, tl.uint16, 1, HALF, ROWS, VECTOR)
        else:
            write(bfloat16(x), codes, at, left, tl.bfloat16, 1, HALF, ROWS, VECTOR)
    elif FORMAT == SIGNED8:
        absmax = bfloat16(largest(tl.abs(x), 1))
        write_scale(absmax, scale, at, left, tl.bfloat16, 128, HALF, ROWS)
        write(signed8_codes(x, absmax.to(tl.float32)), codes, at, left, tl.int8, 1, HALF, ROWS, VECTOR)
    elif FORMAT == NF4:
        absmax = bfloat16(largest(tl.abs(x), 2))
        write_scale(absmax, scale, at, left, tl.bfloat16, 64, HALF, ROWS)
        code = nf4_codes(spread(x, inverse(absmax.to(tl.float32), 1.0)), share_of(bits, HALF), levels)
        write(pack(only(code, left, HALF, ROWS, VECTOR), 4), codes, at, left, tl.uint8, 2, HALF, ROWS, VECTOR)
    elif FORMAT == TERNARY2:
        absmax = largest(tl.abs(x), 2)
        where = blocks(ROWS, HALF, 64)
        filled = tl.minimum(tl.maximum(left - where * 64, 1), 64).to(tl.float32)
        y = tl.reshape(spread(x, inverse(absmax, 1.0)), [ROWS, 2, 64])
        spreads = bfloat16(absmax * tl.sqrt(tl.sum(y * y, 2) / filled) * 1.5)
        write_scale(spreads, scale, at, left, tl.bfloat16, 64, HALF, ROWS)
        up = tl.abs(spread(x, inverse(spreads.to(tl.float32), 1.0))) > share_of(bits, HALF)
        code = tl.where(up, tl.where(x > 0, 2, 0), 1)
        write(pack(only(code, left, HALF, ROWS, VECTOR), 2), codes, at, left, tl.uint8, 4, HALF, ROWS, VECTOR)
    elif FORMAT == LOG6:
        high, span = log6_span(x)
        absmax = bfloat16(high)
        write_scale(absmax, scale, at, left, tl.bfloat16, 64, HALF, ROWS)
        write_scale(span.to(tl.uint8), low, at, left, tl.uint8, 64, HALF, ROWS)
        y = tl.abs(spread(x, inverse(absmax.to(tl.float32), 1.0)))
        code = log6_codes(y, span.to(tl.float32) * LOG6_OCTAVES, share_of(bits, HALF))
        write6(code | tl.where((x < 0) & (code > 0), 32, 0), codes, at, left, HALF, ROWS, VECTOR)
    elif FORMAT == UNSIGNED8:
        if HALF == 0:
            write_scale(peak * (1.0 / LIFT), scale, at, left, tl.float32, 256, 0, ROWS)
        write(unsigned8_codes(x, peak, share_of(bits, HALF)), codes, at, left, tl.uint8, 1, HALF, ROWS, VECTOR)
    else:
        tl.static_assert(FORMAT == LOG4)
        high = largest(x, 1)
        least = tl.min(tl.where(x > 0, x, high), 1)[:, None]
        least = tl.maximum(tl.maximum(least, high * 1e-8), LIFT * 2.0**-126)
        least = tl.minimum(bfloat16(least).to(tl.float32), bfloat16(high).to(tl.float32))
        write_scale(high * (1.0 / LIFT), scale, at, left, tl.float32, 128, HALF, ROWS)
        write_scale(bfloat16(least * (1.0 / LIFT)), low, at, left, tl.bfloat16, 128, HALF, ROWS)
        code = log4_codes(x, least, high, share_of(bits, HALF))
        write(pack(code, 4), codes, at, left, tl.uint8, 2, HALF, ROWS, VECTOR)


@triton.jit
def only(x, left, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Zeros past the end, where a byte may be shared with an entry that is not there. Code 0 of NF4 and TERNARY2 is no zero."""
    if VECTOR:
        return x
    else:
        return tl.where(places(ROWS, HALF, 1) < left, x, 0)


@triton.jit
def signed8_codes(x, absmax):
    """round(sqrt(16129 |x| / absmax - 1/4)), signed. Worked on 64 times as small, which keeps the factor within float32. Below
    zero the root is of what is missing, less than a half, and rounds to zero."""
    a = tl.abs(spread(tl.abs(x), inverse(absmax, 3.937744140625)) - 0.00006103271484375)       # (1/4 - 1e-5) / 4096
    signed = root(a).to(tl.uint32, bitcast=True) ^ (x.to(tl.uint32, bitcast=True) & 0x80000000)
    return (signed.to(tl.float32, bitcast=True) * 64.0 + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def unsigned8_codes(x, peak, u):
    """ceil(sqrt(65025 x / peak - u + u^2) - u), at least 1 where x is not zero. The factor is 1e-6 less: no code becomes 256."""
    a = tl.abs(spread(x, inverse(peak, 65024.93798828125)) + (u * u - u))
    code = tl.where(x > 0, tl.maximum(root(a) - u + 0.49999997, 1.0), 0.0)
    return (code + MAGIC).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def nf4_codes(y, u, levels):
    """ceil(f - u), where f is the place of y among the levels: whole numbers at the levels, linear in between."""
    cell = levels + CELLS + 4 * ((y * 16.0 + (MAGIC + 16.0)).to(tl.int32, bitcast=True) & 63)
    level, before, after, number = tl.load(cell), tl.load(cell + 1), tl.load(cell + 2), tl.load(cell + 3)
    f = (y - level) * tl.where(y >= level, after, before) + number
    return (f + (0.49999997 - u) + MAGIC).to(tl.int32, bitcast=True) & 15


@triton.jit
def log4_codes(x, low, high, u):
    """The same, for levels low r^k: with k levels below x (counted from 0), x / (low r^k) is between 1 and r."""
    start, ratio, per = log4_levels(low, high)
    logs = log2(tl.maximum(spread(x, 1.0 / start), 1.0))                   # of x in least levels
    number = spread(logs, per) - 0.5 + MAGIC - MAGIC
    above = inverse(tl.exp2(ratio) - 1.0, 1.0)
    f = spread(tl.exp2(logs - spread(number, ratio)), above) + (1.0 - above) + number
    code = tl.where(x > 0, tl.minimum(f + (0.49999997 - u), 15.0), 0.0)
    return (code + MAGIC).to(tl.int32, bitcast=True) & 15


@triton.jit
def log6_span(x):
    """The largest magnitudes, float32 (ROWS, 2), and the spans in fiftieths of a nat, int32 (ROWS, 2). Logarithms are read off
    the floats' bits; sums of whole numbers are exact."""
    bits = tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, [x.shape[0], 2, 64])
    high = tl.max(bits, 2)
    below = tl.where(bits > 0, tl.minimum((high[:, :, None] - bits) >> 16, 4095), 0)
    squares, both = tl.sum(below * below, 2).to(tl.int64), tl.sum(below + tl.where(bits > 0, 1 << 20, 0), 2)
    total, count = (both & 0xFFFFF).to(tl.int64), (both >> 20).to(tl.int64)
    spread_out = (count * squares - total * total).to(tl.float32) * LOG6_SQUARE
    variance = quotient(spread_out, tl.maximum(count * count, 1).to(tl.float32))
    span = 240.0 * tl.sqrt(quotient(variance, variance + 0.6))
    return high.to(tl.float32, bitcast=True), tl.maximum((span + MAGIC).to(tl.int32, bitcast=True) & 255, 1)


@triton.jit
def log6_codes(y, octaves, u):
    """As `log4_codes`, for levels 0 and 2^((k - 31) octaves), k = 1 .. 31, and y between 0 and 1. The sign is the caller's."""
    logs = log2(tl.maximum(y, 1e-30))
    number = tl.minimum(spread(logs, quotient(1.0, octaves)) - 0.5 + MAGIC - MAGIC, 0.0)   # -31 .. 0
    above = quotient(1.0, tl.exp2(octaves) - 1.0)
    f = spread(tl.exp2(logs - spread(number, octaves)) - 1.0, above) + (number + 31.0)
    f = tl.where(number < -30.5, spread(y, tl.exp2(30.0 * octaves)), f)                    # below the least level
    return (tl.minimum(f + (0.49999997 - u), 31.0) + MAGIC).to(tl.int32, bitcast=True) & 31


@triton.jit
def words6(base, at, HALF: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Pointers to the three bytes, or the three pairs of them, of each 4 or 8 codes of 6 bits; and the codes' places."""
    where = places(ROWS, HALF, 4 * BYTES)
    pointer = base.to(tl.pointer_type(tl.uint16 if BYTES == 2 else tl.uint8)) + at // (4 * BYTES) * 3 + where * 3
    return pointer, where * (4 * BYTES)


@triton.jit
def read6(base, at, left, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Codes of 6 bits, four in three bytes: int32 (ROWS, 128)."""
    if VECTOR:                                                             # eight in three pairs of bytes
        pointer, where = words6(base, at, HALF, ROWS, 2)
        first, second = tl.load(pointer, where < left, 0).to(tl.int32), tl.load(pointer + 1, where < left, 0).to(tl.int32)
        third = tl.load(pointer + 2, where < left, 0).to(tl.int32)
        word = tl.reshape(tl.join(first | (second & 255) << 16, second >> 8 | third << 8), [ROWS, 32])
    else:
        pointer, where = words6(base, at, HALF, ROWS, 1)
        first, second = tl.load(pointer, where < left, 0).to(tl.int32), tl.load(pointer + 1, where + 1 < left, 0).to(tl.int32)
        word = first | second << 8 | tl.load(pointer + 2, where + 2 < left, 0).to(tl.int32) << 16
    return four(word & 63, word >> 6 & 63, word >> 12 & 63, word >> 18)


@triton.jit
def write6(codes, base, at, left, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Undo `read6`."""
    first, second, third, fourth = quarters(codes)
    word = first | second << 6 | third << 12 | fourth << 18
    if VECTOR:
        pointer, where = words6(base, at, HALF, ROWS, 2)
        one, other = tl.split(tl.reshape(word, [ROWS, 16, 2]))
        tl.store(pointer, one.to(tl.uint16), where < left)
        tl.store(pointer + 1, (one >> 16 | other << 8).to(tl.uint16), where < left)
        tl.store(pointer + 2, (other >> 8).to(tl.uint16), where < left)
    else:
        pointer, where = words6(base, at, HALF, ROWS, 1)
        tl.store(pointer, word.to(tl.uint8), where < left)
        tl.store(pointer + 1, (word >> 8).to(tl.uint8), where + 1 < left)
        tl.store(pointer + 2, (word >> 16).to(tl.uint8), where + 2 < left)


# ---- parameters (master.py) ----
@triton.jit
def read_param(
    param, correction, at, left,
    TYPE: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """float32 (ROWS, 128), from a parameter of TYPE and a correction of BITS (0: none)."""
    if TYPE == FLOAT32:
        return read(param, at, left, tl.float32, 1, HALF, ROWS, VECTOR)
    elif BITS == 0:
        return read(param, at, left, tl.bfloat16, 1, HALF, ROWS, VECTOR).to(tl.float32)
    else:
        upper = read(param, at, left, tl.uint16, 1, HALF, ROWS, VECTOR).to(tl.int32) << 16
        if BITS == 16:
            rest = read(correction, at, left, tl.int16, 1, HALF, ROWS, VECTOR).to(tl.int32)
        else:
            rest = read(correction, at, left, tl.int8, 1, HALF, ROWS, VECTOR).to(tl.int32) * 256
        return (upper + rest).to(tl.float32, bitcast=True)


@triton.jit
def write_param(
    p, param, correction, bits, at, left,
    TYPE: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    if TYPE == FLOAT32:
        write(p, param, at, left, tl.float32, 1, HALF, ROWS, VECTOR)
    elif BITS == 0:
        encode(p, param, param, param, param, 0, bits, at, left, BFLOAT16, True, HALF, ROWS, VECTOR)
    else:
        whole = p.to(tl.int32, bitcast=True)
        upper = (whole + 0x8000) >> 16                                     # halves away from zero: every rest fits into 16 bits
        write(upper.to(tl.int16), param, at, left, tl.int16, 1, HALF, ROWS, VECTOR)
        rest = whole - (upper << 16)
        if BITS == 16:
            write(rest.to(tl.int16), correction, at, left, tl.int16, 1, HALF, ROWS, VECTOR)
        else:
            write(tl.minimum((rest + 128) >> 8, 127).to(tl.int8), correction, at, left, tl.int8, 1, HALF, ROWS, VECTOR)
