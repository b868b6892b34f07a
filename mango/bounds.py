"""How much each format can lose: declared bounds on |C(x) - x|^2 / |x|^2, for every x and not for a likely one.

A block is divided by its largest magnitude, so one of its k entries is 1 (up to the rounding of the scale) and the others lie
between levels. Of a fixed grid the worst block is found exactly: every other entry sits where error^2 - bound * value^2 is
largest, and the bound is the root of (k - 1) times that = bound. For a linear grid of step s that is QSGD's min(k s^2, sqrt(k) s)
(Alistarh et al. 2017, lemma 3.1) with its constant. A tensor loses no larger share than its worst block.

`rounding` says what is bounded: "nearest"; by chance the "mean" over what chance may give, which is what convergence proofs
ask of unbiased codes; and "any" thing that chance may give. Entries are float32 numbers whose scales are normal ones, that is
of blocks whose largest magnitude is in [2^-100, 2^127]: below, scales themselves round to zero.
"""

import math
from collections.abc import Iterable
from functools import cache
from itertools import chain, pairwise
from typing import Literal

from mango.blockwise import NF4_LEVELS, Log4, LogNormal6, NormalFloat4, Signed8, Ternary2, Unsigned8
from mango.codecs import BFloat16, Codec, Factored, Float32, Shape, matrix_shape
from mango.config import CompressionConfig
from mango.formats import Sparse, gradient_codec
from mango.lowrank import subspace
from mango.state import StorageOptions, feedback_slots, slots

Rounding = Literal["nearest", "mean", "any"]
Gap = tuple[float, float]                                # magnitudes of neighbouring levels, the lower first
BF16 = 2.0**-8                                           # relative error of a bfloat16 scale, at most
SLACK = 1 + 2.0**-10                                     # float32 arithmetic, and chance in multiples of 2^-16
# Of 6 bits, whose grid follows the block's own spread: what falls below the lowest level is limited by that spread, since
# sum_j ln(max / |x_j|)^2 <= k^2 sigma^2. `tests/test_theory.py` certifies these for every span, by Lagrange's duality.
LOG6_BOUNDS: dict[Rounding, float] = {"nearest": 0.42, "mean": 0.46, "any": 1.1}


def contraction_bound(codec: Codec, shape: Shape, rounding: Rounding = "nearest") -> float:
    """The largest |C(x) - x|^2 / |x|^2 over tensors of `shape`. Below 1 the codec is a contraction.

    >>> from mango.formats import SIGNED, gradient_codec
    >>> [round(contraction_bound(SIGNED[bits], (512, 512)), 4) for bits in (8, 4, 2)]
    [0.0004, 0.1164, 0.7813]
    >>> round(contraction_bound(gradient_codec(32, 0.99), (512, 512)), 2)
    0.99
    """
    n = math.prod(shape)
    match codec:
        case Float32():
            return 0.0
        case _ if n == 0:
            return 0.0
        case BFloat16():                                 # gaps of 2^-7 of the power of two below: half of it; p (1 - p) of it
            return SLACK * (4 if rounding == "any" else 1) * BF16 * BF16
        case Signed8(block=block):
            return grid_bound(_gaps((c / 127) ** 2 for c in range(128)), min(n, block), rounding, off=BF16)
        case Unsigned8(block=block):                     # what is not zero is raised to the first level
            return grid_bound(_gaps((c / 255) ** 2 for c in range(256)), min(n, block), rounding, raised=255.0**-2)
        case NormalFloat4(block=block):
            sides = (level for level in NF4_LEVELS if level >= 0), (-level for level in NF4_LEVELS if level <= 0)
            return grid_bound(tuple(chain(*map(_gaps, sides))), min(n, block), rounding, off=BF16)
        case LogNormal6():
            return LOG6_BOUNDS[rounding]
        case Log4(block=block):                          # neighbours differ by a ratio, so each entry has the same share
            ratio = math.pow(1e8 * (1 + 2 * BF16), 1 / 14)
            share = {"nearest": (ratio - 1) / (ratio + 1), "mean": (ratio - 1) / math.sqrt(4 * ratio), "any": ratio - 1}
            return SLACK * (share[rounding] ** 2 + block * 1e-16)
        case Ternary2(block=block):
            return SLACK * max(_ternary(min(n, block), 1 + sign * BF16, rounding) for sign in (-1, 1))
        case Factored():                                 # |r c^T / sum|^2 <= (largest row sum) (largest column sum)
            rows, columns = matrix_shape(shape)
            return 1 + math.sqrt(rows * columns) if min(rows, columns) > 1 else 1e-12
        case Sparse(inner=inner):                        # the largest k hold k / n of the energy at least (Stich et al. 2018)
            k = codec.kept(n)
            inside = contraction_bound(inner, (k,), rounding)
            return max(inside, 1 - k / n * (1 - inside))
    raise ValueError(f"no bound is declared for {codec!r}")


@cache
def grid_bound(gaps: tuple[Gap, ...], entries: int, rounding: Rounding, off: float = 0.0, raised: float = 0.0) -> float:
    """The worst of a block of `entries` values whose largest is 1, up to `off`, on a grid that has the levels 0 and 1.

    `raised`: the level to which the smallest values are raised, however small.
    """
    top = max(high - low for low, high in gaps if high == 1.0)
    mine = {"nearest": off**2, "mean": off * top if off else 0.0, "any": top**2 if off else 0.0}[rounding]

    def excess(bound: float) -> float:
        """How far the worst block is above the bound; it falls with the bound."""
        others = max(max(_excess(gap, bound, rounding) for gap in gaps), raised**2, off**2 - bound)
        return (entries - 1) * others + max(mine, off**2) - bound * (1 - off) ** 2

    low, high = 0.0, 4.0 * entries
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return SLACK * high


def _excess(gap: Gap, bound: float, rounding: Rounding) -> float:
    """The largest error^2 - bound * value^2 of a value in the gap."""
    low, high = gap
    if rounding == "nearest":                            # convex on either side of the middle, and the ends lose nothing
        return ((high - low) / 2) ** 2 - bound * ((low + high) / 2) ** 2
    if rounding == "any":
        return (high - low) ** 2 - bound * low**2
    x = min(max((low + high) / (2 * (1 + bound)), low), high)
    return (x - low) * (high - x) - bound * x**2         # the variance of one of two levels, right on average


def _gaps(levels: Iterable[float]) -> tuple[Gap, ...]:
    return tuple(pairwise(sorted(set(levels))))


def _ternary(entries: int, off: float, rounding: Rounding) -> float:
    """Levels -a, 0, a with a in units of the block's root mean square, so that the squares add up to `entries`.

    Nearest: an entry above a / 2 saves 2 a |x| - a^2, which is least where all but one have exactly a / 2. By chance: the
    variance v (a - v) of entries below a is largest where they are equal, the clipping of those above where it is one.
    """
    root = math.sqrt(entries)
    if rounding == "nearest":
        a = 1.224 * off
        largest = math.sqrt(entries - (entries - 1) * a * a / 4)
        return 1 - (2 * a * largest - a * a) / entries
    a = 1.5 * off
    if rounding == "any":
        return a * a + max(0.0, 1 - a / root) ** 2
    values = [i / 1000 for i in range(1001)]
    alone = [math.sqrt(entries - (entries - 1) * v * v) for v in values]
    lost = [(x - a) ** 2 if x > a else x * (a - x) for x in alone]
    return 1e-3 + max(one + (entries - 1) * v * (a - v) for v, one in zip(values, lost, strict=True)) / entries


def low_rank_bound(shape: Shape, rank: int, projector: Codec, inside: Codec) -> float:
    """The largest |G - C(P) C(P^T G)|^2 / |G|^2 where P spans the best subspace of that rank, both rounded to nearest.

    What is outside is at most 1 - r / m, of singular values that are all equal. Rounding adds, in the norm, the error of the
    inside and of a projector whose norm is the root of r. `lowrank.find` starts from a random subspace of the rows' space, which
    holds r / m on average, and loses none of it: what Q^T G has lies in the rows that the next half-step takes. So its
    outside is at most 1 - r / m on average.
    """
    small, large, rank = subspace(shape, rank)
    p = math.sqrt(contraction_bound(projector, (small, rank)) * rank)
    q = math.sqrt(contraction_bound(inside, (rank, large)))
    return SLACK * (math.sqrt(max(0.0, 1 - rank / small)) + p + q * (1 + p)) ** 2


def action_bounds(shape: Shape, config: CompressionConfig, options: StorageOptions, rule: str = "adamw") -> dict[str, float]:
    """What a layer's config declares: the bound of coding its "gradient" and of every slot stored, whatever chance does.

    >>> bounds = action_bounds((64, 64), CompressionConfig(gradient_bits=4, momentum_bits=8), StorageOptions())
    >>> {slot: round(bound, 4) for slot, bound in bounds.items()}
    {'gradient': 0.1164, 'exp_avg': 0.0016, 'exp_avg_sq': 0.0, 'residual': 0.0016}
    """
    fed_back = feedback_slots(config, options)
    to_nearest = bool(fed_back) and "reference" not in fed_back
    coded = gradient_codec(config.gradient_bits, config.sparsity)
    found = {"gradient": contraction_bound(coded, shape, "nearest" if to_nearest else "any")}
    for slot, (codec, stored) in slots(shape, config, options, rule).items():
        found[slot] = contraction_bound(codec, stored, "nearest" if slot == "held" and to_nearest else "any")
    return found


def feedback_bound(contraction: float) -> float:
    """The residual's largest norm over the largest gradient's, where C loses `contraction` = 1 - d < 1 of the squared norm.

    |e'| <= sqrt(1 - d) (|e| + |g|) has the fixed point sqrt(1 - d) / (1 - sqrt(1 - d)), never above the 2 sqrt(1 - d) / d of
    Karimireddy et al. (2019, lemma 3), which is given here.

    >>> feedback_bound(0.75)
    6.928203230275509
    """
    if not 0 <= contraction < 1:
        raise ValueError(f"contraction={contraction!r} is no share in [0, 1): what loses all may never give anything back")
    return 2 * math.sqrt(contraction) / (1 - contraction)

