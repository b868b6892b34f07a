# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""CUDA kernels in Triton: the update of all tensors that share a combination of formats, in one launch.

The specification is the PyTorch twins (codecs.py, blockwise.py, rules.py, noise.py), and `native.c` is the same on a CPU.
Loaded only for CUDA tensors, or with TRITON_INTERPRET=1 for tests. `mango.fused_cuda` fills the
tables and launches, in this order:

    square_sums, matrix_sums    what the gradients add up to, before anything is changed (matrix_sums: by row and column too)
    prepare                     per tensor: is its gradient finite, its step, and the numbers of its update
    update                      decode, rule, parameter, encode: one pass over every entry
    finish, finish_factors      per tensor: statistics; row and column factors
"""

import triton
import triton.language as tl

from mango.kernel_formats import (
    BFLOAT16,
    FACTORED,
    FLOAT32,
    GOLDEN,
    HUGE,
    LIFT,
    LOG4,
    LOG6,
    NF4,
    NONE,
    TERNARY2,
    UNSIGNED8,
    address,
    decode,
    encode,
    hashes,
    inside,
    largest,
    mix,
    places,
    quotient,
    read_param,
    root,
    write_param,
)

ADAMW, ADAM, SGD, LION = (tl.constexpr(n) for n in range(4))
LIMIT = tl.constexpr(10.0)                                   # rules.UPDATE_LIMIT
# columns of the table of tensors (int64)
COLUMNS = ("numel", "wide", "param", "grad", "correction", "m_codes", "m_scale", "m_low", "v_codes", "v_scale", "v_low",
           "key", "hyper", "place", "first_chunk", "chunks", "first_sum", "sums", "row_sums", "column_sums", "bands", "tiles",
           "layer", "sample_start", "sample_stride", "sample_count", "grad_type")  # fmt: skip
(NUMEL, WIDE, PARAM, GRAD, CORRECTION, M_CODES, M_SCALE, M_LOW, V_CODES, V_SCALE, V_LOW, KEY, HYPER,
 PLACE, FIRST_CHUNK, CHUNKS, FIRST_SUM, SUMS, ROW_SUMS, COLUMN_SUMS, BANDS, TILES,
 LAYER, SAMPLE_START, SAMPLE_STRIDE, SAMPLE_COUNT, GRAD_TYPE) = (tl.constexpr(n) for n in range(27))  # fmt: skip
T = tl.constexpr(27)
# columns of the table of a parameter group's numbers (float64)
HYPERS = ("lr", "beta1", "beta2", "eps", "decoupled", "coupled")
H_LR, H_BETA1, H_BETA2, H_EPS, H_DECOUPLED, H_COUPLED = (tl.constexpr(n) for n in range(6))
H = tl.constexpr(6)
# columns of a tensor's numbers at a step (float32), made by `prepare`
(FINITE, GRAD_SQ, LR, DECAY, COUPLED, BETA1, FRESH1, BETA2, FRESH2, EPS, ROOT2, STRIDE,
 UNDER_ROOT, UNDER_EPS, SHARE) = (tl.constexpr(n) for n in range(15))  # fmt: skip
N = tl.constexpr(15)


# ---- the rules (rules.py) ----
@triton.jit
def apply_rule(
    g, p, m, v, beta1, fresh1, beta2, fresh2, lr, eps, root2, stride, RULE: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """(parameter, first moment, second moment) after the step, by the numbers that `rule_numbers` gives. m comes times beta1 and
    v times beta2, but not with EXACT, nor m with LION."""
    if EXACT:                                                              # the operations of torch.optim.AdamW, in its order
        m = tl.fma(fresh1, g - m, m)
        v = tl.fma(fresh2 * g, g, v * beta2)
        p += tl.div_rn(stride * m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
    elif RULE == SGD:
        m += g
        p -= lr * m
    elif RULE == LION:
        c = beta1 * m + fresh1 * g
        p -= lr * tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
        m = beta2 * m + fresh2 * g
    else:
        m = tl.fma(fresh1, g, m)
        v = tl.fma(fresh2 * g, g, v)
        move = quotient(m, tl.fma(root(v), root2, eps))
        p += tl.where(v > 0, tl.minimum(tl.maximum(move, -stride), stride), 0.0)
    return p, m, v


@triton.jit
def rule_numbers(h, lifted, EXACT: tl.constexpr):
    """beta1, 1 - beta1, beta2, 1 - beta2, lr, and for Adam's quotient eps, sqrt(1 - beta2^t) and the stride -lr / (1 - beta1^t),
    or what takes their place where the stride was divided out: two numbers of the denominator, and the largest move."""
    beta1, fresh1 = tl.load(h + BETA1), tl.load(h + FRESH1)
    beta2, fresh2, lr = tl.load(h + BETA2), tl.load(h + FRESH2), tl.load(h + LR)
    if EXACT:
        return beta1, fresh1, beta2, fresh2, lr, tl.load(h + EPS), tl.load(h + ROOT2), tl.load(h + STRIDE)
    else:
        under = tl.load(h + UNDER_ROOT) * tl.rsqrt(lifted)
        # not LIMIT * lr: Triton's interpreter makes that a constant which holds a tensor, and 3.7 takes none for a bound
        return beta1, fresh1, beta2, fresh2 * lifted, lr, tl.load(h + UNDER_EPS), under, lr * LIMIT


@triton.jit
def factored(
    rows, columns, first, column, wide, left, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, WITHIN: tl.constexpr
):  # fmt: skip
    """Row and column factors of the entries: (ROWS, 1) or (ROWS, 128), and (ROWS, 128). The tile starts at `column` (it may be
    past the end) of row `first` of a matrix `wide` columns wide. WITHIN: no half of 128 entries goes over a matrix row's end."""
    where = places(ROWS, HALF, 1)
    start = places(ROWS, HALF, 128) * 128 if WITHIN else where
    r = ((start + column).to(tl.uint32) // wide.to(tl.uint32)).to(tl.int32)
    c = where + (column - r * wide)
    if WITHIN and VECTOR:
        c = tl.multiple_of(c, [1, 8])
    row = tl.load(rows.to(tl.pointer_type(tl.float32)) + first + r, start < left, 0.0)
    return row, tl.load(address(columns, 0, tl.float32, 1, VECTOR) + c, inside(where, left, 1, VECTOR), 0.0)


# ---- the kernels ----
@triton.jit
def load_half(
    at, left, first, column, wide, param, grad, correction, m_codes, m_scale, m_low, v_codes, v_scale, v_low,
    levels, by1, by2, share,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr,
    MAXIMIZE: tl.constexpr, WITHIN: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient, parameter, m times `by1` and v times `by2` (by factors: times `share`): (ROWS, 128) float32 each."""
    g = decode(grad, 0, 0, levels, -1.0 if MAXIMIZE else 1.0, at, left, G, HALF, ROWS, VECTOR)
    p = read_param(param, correction, at, left, P, BITS, HALF, ROWS, VECTOR)
    if M == NONE:
        m = tl.zeros([ROWS, 128], tl.float32)
    else:
        m = decode(m_codes, m_scale, m_low, levels, by1, at, left, M, HALF, ROWS, VECTOR)
    if V == FACTORED:
        row, col = factored(v_codes, v_scale, first, column, wide, left, HALF, ROWS, VECTOR, WITHIN)
        v = row * share * col
    elif V == NONE:
        v = m
    else:
        v = decode(v_codes, v_scale, v_low, levels, by2, at, left, V, HALF, ROWS, VECTOR)
    return g, p, m, v


@triton.jit
def update(
    table, numbers, chunks, clock, levels, partials,
    RULE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr,
    MAXIMIZE: tl.constexpr, WITHIN: tl.constexpr, VECTOR: tl.constexpr,
    MEASURE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Advance the moments and move the parameters of one chunk of one tensor, unless its gradient is not finite.

    `chunks` (C, 2) int64: row of the table, first entry. `partials` (C, 4) float32: sums of moved^2, p^2, m^2 and m g.
    """
    row, start = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    t, h = table + row * T, numbers + row * N
    param, grad, correction = tl.load(t + PARAM), tl.load(t + GRAD), tl.load(t + CORRECTION)
    m_codes, m_scale, m_low = tl.load(t + M_CODES), tl.load(t + M_SCALE), tl.load(t + M_LOW)
    v_codes, v_scale, v_low = tl.load(t + V_CODES), tl.load(t + V_SCALE), tl.load(t + V_LOW)
    key = tl.load(t + KEY).to(tl.uint32) + tl.load(clock).to(tl.uint32) * GOLDEN
    EXACT: tl.constexpr = M == FLOAT32 and V == FLOAT32
    LIFTED: tl.constexpr = LIFT if V == UNSIGNED8 or V == LOG4 else 1.0  # noqa: SIM109 Triton has no `in`
    beta1, fresh1, beta2, fresh2, lr, eps, root2, stride = rule_numbers(h, LIFTED, EXACT)
    by1 = 1.0 if EXACT or RULE == LION else beta1
    by2 = 1.0 if EXACT else beta2
    share, decay, coupled, wide = tl.load(h + SHARE) * beta2, tl.load(h + DECAY), tl.load(h + COUPLED), tl.load(t + WIDE)
    first, column = start // wide, start % wide - start
    moved, size = tl.zeros([ROWS, 128], tl.float32), tl.zeros([ROWS, 128], tl.float32)
    squares, dots = tl.zeros([ROWS, 128], tl.float32), tl.zeros([ROWS, 128], tl.float32)
    stop = tl.where(tl.load(h + FINITE) > 0, tl.minimum(start + CHUNK, tl.load(t + NUMEL)), start)
    for at in range(start, stop, ROWS * 256):
        left = tl.minimum(stop - at, ROWS * 256).to(tl.int32)
        g0, q0, m0, v0 = load_half(
            at, left, first, (column + at).to(tl.int32), wide.to(tl.int32), param, grad, correction, m_codes, m_scale, m_low,
            v_codes, v_scale, v_low, levels, by1, by2, share, P, G, M, V, BITS, MAXIMIZE, WITHIN, 0, ROWS, VECTOR,
        )  # fmt: skip
        g1, q1, m1, v1 = load_half(
            at, left, first, (column + at).to(tl.int32), wide.to(tl.int32), param, grad, correction, m_codes, m_scale, m_low,
            v_codes, v_scale, v_low, levels, by1, by2, share, P, G, M, V, BITS, MAXIMIZE, WITHIN, 1, ROWS, VECTOR,
        )  # fmt: skip
        if RULE == ADAM or RULE == SGD:  # noqa: SIM109
            g0, g1, p0, p1 = g0 + coupled * q0, g1 + coupled * q1, q0, q1
        else:
            p0, p1 = q0 * decay, q1 * decay
        p0, m0, v0 = apply_rule(g0, p0, m0, v0, beta1, fresh1, beta2, fresh2, lr, eps, root2, stride, RULE, EXACT)
        p1, m1, v1 = apply_rule(g1, p1, m1, v1, beta1, fresh1, beta2, fresh2, lr, eps, root2, stride, RULE, EXACT)
        if MEASURE:
            moved += (p0 - q0) * (p0 - q0) + (p1 - q1) * (p1 - q1)
            size += p0 * p0 + p1 * p1
            squares += m0 * m0 + m1 * m1
            dots += m0 * g0 + m1 * g1
        bits = hashes(mix(key + 3), at, ROWS) if P == BFLOAT16 and BITS == 0 else 0
        write_param(p0, param, correction, bits, at, left, P, BITS, 0, ROWS, VECTOR)
        write_param(p1, param, correction, bits, at, left, P, BITS, 1, ROWS, VECTOR)
        if M != NONE:
            bits = hashes(mix(key + 1), at, ROWS) if M == LOG6 or (M == NF4 or M == TERNARY2) else 0  # noqa: SIM109
            encode(m0, m_codes, m_scale, m_low, levels, 0, bits, at, left, M, False, 0, ROWS, VECTOR)
            encode(m1, m_codes, m_scale, m_low, levels, 0, bits, at, left, M, False, 1, ROWS, VECTOR)
        if V != NONE and V != FACTORED:
            bits = hashes(mix(key + 2), at, ROWS) if V != FLOAT32 else 0
            peak = tl.minimum(tl.maximum(largest(v0, 1), largest(v1, 1)), HUGE)
            encode(v0, v_codes, v_scale, v_low, levels, peak, bits, at, left, V, True, 0, ROWS, VECTOR)
            encode(v1, v_codes, v_scale, v_low, levels, peak, bits, at, left, V, True, 1, ROWS, VECTOR)
    if MEASURE:
        into = partials + 4 * (tl.load(t + FIRST_CHUNK) + start // CHUNK)
        tl.store(into, tl.sum(moved))
        tl.store(into + 1, tl.sum(size))
        tl.store(into + 2, tl.sum(squares))
        tl.store(into + 3, tl.sum(dots))


@triton.jit
def square_sums(table, chunks, sums, G: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of squares of one chunk of a gradient, into its place in `sums` (S,) float32."""
    row, start = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    t = table + row * T
    stop = tl.minimum(start + CHUNK, tl.load(t + NUMEL))
    grad, lane = tl.load(t + GRAD), tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for at in range(start, stop, WIDTH):
        mask = lane < tl.minimum(stop - at, WIDTH).to(tl.int32)
        if VECTOR:
            mask = tl.max_constancy(mask, [8])
        x = tl.load(address(grad, at, tl.float32 if G == FLOAT32 else tl.bfloat16, 1, VECTOR) + lane, mask, 0).to(tl.float32)
        total += x * x
    tl.store(sums + tl.load(t + FIRST_SUM) + start // CHUNK, tl.sum(total))


@triton.jit
def matrix_sums(table, tiles, sums, scratch, G: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of squares of one tile of a gradient as a matrix: of all its entries, and by row and by column.

    `tiles` (S, 3) int64: row of the table, band of rows, tile of columns. `scratch` float32: (tiles, rows) sums from the
    table's `row_sums` on, (bands, columns) from its `column_sums` on.
    """
    at = tiles + 3 * tl.program_id(0)
    row, band, tile = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    t = table + row * T
    grad, wide = tl.load(t + GRAD), tl.load(t + WIDE)
    high, bands = tl.load(t + NUMEL) // wide, tl.load(t + BANDS)
    taken = tl.cdiv(tl.cdiv(high, bands), ROWS) * ROWS                     # rows of a band
    lane, rows = tile * WIDTH + tl.arange(0, WIDTH), tl.arange(0, ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    row_sums = scratch + tl.load(t + ROW_SUMS) + tile * high
    for first in range(band * taken, tl.minimum((band + 1) * taken, high), ROWS):
        pointer = address(grad, first * wide + tile * WIDTH, tl.float32 if G == FLOAT32 else tl.bfloat16, 1, VECTOR)
        step = rows * wide.to(tl.int32)
        mask = lane < wide
        if VECTOR:
            step, mask = tl.multiple_of(step, [8]), tl.max_constancy(mask, [8])
        mask = (first + rows < high)[:, None] & mask[None, :]
        x = tl.load(pointer + step[:, None] + tl.arange(0, WIDTH)[None, :], mask, 0).to(tl.float32)
        total += x * x
        tl.store(row_sums + first + rows, tl.sum(x * x, 1), first + rows < high)
    tl.store(scratch + tl.load(t + COLUMN_SUMS) + band * wide + lane, tl.sum(total, 0), lane < wide)
    tl.store(sums + tl.load(t + FIRST_SUM) + band * tl.load(t + TILES) + tile, tl.sum(total))


@triton.jit
def summed(pointer, count, stride, WIDTH: tl.constexpr):
    """Sum in float64 of `count` numbers that are `stride` apart."""
    total, lane = tl.zeros([WIDTH], tl.float64), tl.arange(0, WIDTH)
    for at in range(0, count, WIDTH):
        total += tl.load(pointer + (at + lane) * stride, at + lane < count, 0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def prepare(table, hypers, sums, counts, numbers, WIDTH: tl.constexpr):
    """Fill a tensor's `numbers` (N,). Its step in `counts` (n, 2) int64 advances, or its skipped gradients, by one."""
    row = tl.program_id(0).to(tl.int64)
    t, into = table + row * T, numbers + row * N
    h, count = hypers + tl.load(t + HYPER) * H, counts + 2 * tl.load(t + PLACE)
    grad_sq = summed(sums + tl.load(t + FIRST_SUM), tl.load(t + SUMS), 1, WIDTH)
    finite = (grad_sq < float("inf")).to(tl.int64)                         # not true of what is not a number
    step = tl.load(count) + finite
    tl.store(count, step)
    tl.store(count + 1, tl.load(count + 1) + 1 - finite)
    lr, beta1, beta2, eps = tl.load(h + H_LR), tl.load(h + H_BETA1), tl.load(h + H_BETA2), tl.load(h + H_EPS)
    age = tl.maximum(step, 1).to(tl.float64)
    correction1, correction2 = 1 - tl.exp(age * tl.log(beta1)), 1 - tl.exp(age * tl.log(beta2))
    over = -correction1 / tl.maximum(lr, 1e-30)                            # 1 / stride
    tl.store(into + FINITE, finite.to(tl.float32))
    tl.store(into + GRAD_SQ, grad_sq.to(tl.float32))
    tl.store(into + LR, lr.to(tl.float32))
    tl.store(into + DECAY, (1 - lr * tl.load(h + H_DECOUPLED)).to(tl.float32))
    tl.store(into + COUPLED, tl.load(h + H_COUPLED).to(tl.float32))
    tl.store(into + BETA1, beta1.to(tl.float32))
    tl.store(into + FRESH1, (1 - beta1).to(tl.float32))
    tl.store(into + BETA2, beta2.to(tl.float32))
    tl.store(into + FRESH2, (1 - beta2).to(tl.float32))
    tl.store(into + EPS, eps.to(tl.float32))
    tl.store(into + ROOT2, tl.sqrt(correction2).to(tl.float32))
    tl.store(into + STRIDE, (-lr / correction1).to(tl.float32))
    tl.store(into + UNDER_ROOT, (over / tl.sqrt(correction2)).to(tl.float32))
    tl.store(into + UNDER_EPS, (over * eps).to(tl.float32))
    if tl.load(t + BANDS) > 0:
        high = tl.load(t + NUMEL) // tl.load(t + WIDE)
        mean = summed(tl.load(t + V_CODES).to(tl.pointer_type(tl.float32)), high, 1, WIDTH) / high
        tl.store(into + SHARE, tl.minimum(1 / tl.where(mean > 0, mean, 1.0), HUGE).to(tl.float32))


@triton.jit
def finish(
    table, numbers, partials, results, mean, square, previous, cosine, norm, running, count, moved,
    DECAY: tl.constexpr, MEASURE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tensor's statistics: norms, and of its sampled entries the streaming mean and variance (Welford 1962) and the cosine with
    the gradient before. The sums of its chunks' `partials` (zeros without MEASURE), into `results` (n, 4) float32."""
    row = tl.program_id(0).to(tl.int64)
    t, h = table + row * T, numbers + row * N
    finite, layer, samples = tl.load(h + FINITE) > 0, tl.load(t + LAYER), tl.load(t + SAMPLE_COUNT)
    chunks, first = tl.load(t + CHUNKS), partials + 4 * tl.load(t + FIRST_CHUNK)
    for k in tl.static_range(4):
        tl.store(results + 4 * row + k, summed(first + k, chunks, 4, WIDTH).to(tl.float32) if MEASURE else 0.0)
    if MEASURE and finite & (layer >= 0):
        tl.store(moved + layer, tl.sqrt(tl.load(results + 4 * row)))
    if finite & (samples > 0):
        here = tl.arange(0, WIDTH)
        mask, at = here < samples, tl.load(t + SAMPLE_START) + here
        where = here * tl.load(t + SAMPLE_STRIDE)
        if tl.load(t + GRAD_TYPE) == FLOAT32:
            x = tl.load(tl.load(t + GRAD).to(tl.pointer_type(tl.float32)) + where, mask, 0)
        else:
            x = tl.load(tl.load(t + GRAD).to(tl.pointer_type(tl.bfloat16)) + where, mask, 0).to(tl.float32)
        before, now, taken = tl.load(previous + at, mask, 0), tl.load(mean + at, mask, 0), tl.load(count + layer) + 1
        after = now + (x - now) / taken
        tl.store(mean + at, after, mask)
        tl.store(square + at, tl.load(square + at, mask, 0) + (x - now) * (x - after), mask)
        tl.store(previous + at, x, mask)
        tl.store(count + layer, taken)
        x, before = x.to(tl.float64), before.to(tl.float64)
        size = tl.sqrt(tl.sum(x * x)) * tl.sqrt(tl.sum(before * before))
        angle = tl.where(size > 0, tl.sum(x * before) / tl.where(size > 0, size, 1.0), 0.0)
        tl.store(cosine + layer, tl.load(cosine + layer) + angle.to(tl.float32))
        length = tl.sqrt(tl.load(h + GRAD_SQ))
        tl.store(norm + layer, length)
        tl.store(running + layer, DECAY * tl.load(running + layer) + (1 - DECAY) * length)


@triton.jit
def finish_factors(table, numbers, segments, scratch, WIDTH: tl.constexpr):
    """Advance WIDTH row factors (kind 0) or column factors (kind 1) of a tensor.

    `segments` (S, 3) int64: row of the table, kind, start.
    """
    at = segments + 3 * tl.program_id(0)
    row, kind, start = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    t, h = table + row * T, numbers + row * N
    if tl.load(h + FINITE) > 0:
        wide = tl.load(t + WIDE)
        high = tl.load(t + NUMEL) // wide
        count, others = tl.where(kind == 0, high, wide), tl.where(kind == 0, wide, high)
        parts = tl.where(kind == 0, tl.load(t + TILES), tl.load(t + BANDS))
        pointer = scratch + tl.load(t + tl.where(kind == 0, ROW_SUMS, COLUMN_SUMS))
        here = start + tl.arange(0, WIDTH)
        total = tl.zeros([WIDTH], tl.float32)
        for k in range(parts):
            total += tl.load(pointer + k * count + here, here < count, 0)
        factor = tl.load(t + tl.where(kind == 0, V_CODES, V_SCALE)).to(tl.pointer_type(tl.float32)) + here
        fresh = total * (tl.load(h + FRESH2) / others.to(tl.float32))
        tl.store(factor, tl.load(h + BETA2) * tl.load(factor, here < count, 0) + fresh, here < count)
