"""Published ways to share out bits among layers, as policies: what a learned policy has to beat.

Both were made for other tensors (activations, gradients on a wire). Here they share out the bytes of the optimizer's state.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.config import LADDER, CompressionConfig, Ladder
from mango.features import FEATURE_INDEX, FEATURES, RULES
from mango.policies import WaterFillingPolicy, best_scored, feature, register_policy
from mango.state import StorageOptions, predicted_bytes

MEASURED_BITS = (8, 4, 2)                    # of a first moment, whose errors are features
BFLOAT16 = 4e-6                              # squared relative error of a moment at 16 bits
# Squared relative error of the update where no first moment is kept: |g - m|^2 / |m|^2 for independent gradients g and their
# running mean m of decay 0.9, whose square is (1 - 0.9) / (1 + 0.9) of theirs.
WITHOUT_MOMENTUM = (1 - 2 * 0.1 + 0.1 / 1.9) / (0.1 / 1.9)
CELLS = 4096                                 # of the grid on which errors are added up
MARGIN = 1e-5                                # of the budget is left alone: an observation has float32's precision
NO_GRADIENT = FEATURES[FEATURE_INDEX["grad_norm"]].low
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@register_policy("sensitivity")
class SensitivityPolicy:
    """Precision where gradients are large: a layer's error weighs as much as its squared gradient norm.

    The sensitivity of ALAM (Woo et al., ICLR 2024, "Averaged Low-Precision Activation for Memory-Efficient Training of
    Transformer Models"), which needs the l2 norm of a layer's parameter gradients alone. The error of a rung is the one that
    water-filling predicts, so that the two differ in the weight of a layer only: parameters there, gradient here. The
    knapsack divides by bytes, so of equal errors those are bought off first whose gradient per parameter is largest.
    """

    def __init__(self, ladder: Ladder = LADDER) -> None:
        self.ladder = ladder

    def scores(self, obs: Tensor) -> Tensor:
        error = torch.stack([WaterFillingPolicy.squared_error(obs, rung) for rung in self.ladder], 1).double()    # (L, R)
        return -_squared_norms(obs)[:, None] * error

    def act(self, obs: Tensor) -> Tensor:
        return best_scored(self.scores(obs), self.ladder)

    def reset(self) -> None:
        """Nothing is remembered."""


def _squared_norms(obs: Tensor) -> Tensor:
    """Squared gradient norm of each layer over the largest (L,) float64; before any gradient, numbers of parameters."""
    norm = feature(obs, "grad_norm").double()
    if not (norm > NO_GRADIENT).any():
        return 10 ** feature(obs, "numel").double()
    return torch.where(norm > NO_GRADIENT, 10 ** (2 * (norm - norm.max())), 0.0)


@register_policy("error-constrained")
class ErrorConstrainedPolicy:
    """The fewest bytes whose summed squared error stays within a bound, by dynamic programming over a grid of errors.

    L-GreCo (Alimohammadi et al., MLSys 2024, "L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate
    Deep Learning"): errors are plain l2, none weighs more than another, and the bound is never looser than what the best
    uniform choice does. Under a byte budget the bound is the smallest one that can be paid for. The budget and the
    layers' sizes are read from the observation; what it does not tell (held gradients) is cut by the optimizer.
    """

    def __init__(self, ladder: Ladder = LADDER, cells: int = CELLS) -> None:
        if cells < 1:
            raise ValueError(f"cells={cells} is no size of a grid, at least 1")
        self.ladder, self.cells = ladder, cells

    def act(self, obs: Tensor) -> list[CompressionConfig]:
        if not len(obs):
            return []
        numel = 10 ** feature(obs, "numel").double()
        errors = torch.stack([l2_error(obs, rung) for rung in self.ladder], 1) * numel[:, None]        # (L, R)
        picks = smallest_error(errors.numpy(), layer_bytes(obs, self.ladder), available_bytes(obs), self.cells)
        return [self.ladder[int(rung)] for rung in picks]

    def reset(self) -> None:
        """Nothing is remembered."""


def l2_error(obs: Tensor, config: CompressionConfig) -> Tensor:
    """Squared relative l2 error (L,) float64 of the update under a config: of its parts, in quadrature, all of one weight."""
    table = obs.double()

    def measured(name: str) -> Tensor:
        return 10 ** (2 * feature(table, name))

    def moment(bits: int) -> Tensor:
        if bits in (0, 16, 32):
            return torch.full((len(obs),), {0: WITHOUT_MOMENTUM, 16: BFLOAT16, 32: 0.0}[bits], dtype=torch.float64)
        known = min(MEASURED_BITS, key=lambda have: abs(have - bits))
        return measured(f"error_momentum_{known}") * 4.0 ** (known - bits)           # a bit halves the distance of codes

    if config.rank:
        outside = feature(table, "error_rank_1" if config.rank < 8 else "error_rank_8").square()
        error = outside + moment(config.factor_bits_q)
    else:
        error = moment(config.momentum_bits)
    if config.variance_bits == 32:
        return error
    bits = config.variance_bits
    variance = torch.full_like(error, BFLOAT16) if bits == 16 else measured(f"error_variance_{bits}")
    return error + torch.where(torch.tensor([rule == "adamw" for rule in _rules(obs)]), variance, 0.0)


def _rules(obs: Tensor) -> list[str]:
    """The rule of each layer; AdamW's where the observation tells none."""
    own = torch.stack([feature(obs, f"rule_{rule}") for rule in RULES], 1).argmax(1)
    return [RULES[int(index)] for index in own]


def layer_bytes(obs: Tensor, ladder: Ladder) -> Ints:
    """State bytes (L, R) of each layer under each rung, from its size and aspect as a matrix."""
    numel, aspect = (10 ** feature(obs, name).double() for name in ("numel", "aspect"))
    small = (numel / aspect).sqrt().round().clamp(min=1)
    shapes = zip(small.long().tolist(), (numel / small).round().clamp(min=1).long().tolist(), _rules(obs), strict=True)
    options = StorageOptions()
    return np.array([[predicted_bytes((m, n), rung, options, rule) for rung in ladder] for m, n, rule in shapes], np.int64)


def available_bytes(obs: Tensor) -> int:
    """Bytes of the budget that layers may take: all but what small tensors and statistics hold."""
    table = obs.double()
    numel, share = 10 ** feature(table, "numel"), feature(table, "share")
    largest = int(share.argmax())
    total = float(numel[largest] / share[largest]) if share[largest] > 0 else float(numel.sum())
    budget = 8 * total * 2.0 ** float(feature(table, "budget_per_param")[0])
    layers = float((8 * feature(table, "bytes_per_param") * numel).sum())
    fixed = max(0.0, float(feature(table, "budget_pressure")[0]) * budget - layers)
    return max(0, int((budget - fixed) * (1 - MARGIN)))


def smallest_error(errors: Floats, nbytes: Ints, available: int, cells: int = CELLS) -> Ints:
    """A choice per layer (L,) that fits: the cheapest within the smallest bound on the summed error that can be paid for.

    `errors` (L, R) >= 0; `nbytes` (L, R). Errors are rounded up to cells, of which `cells` are the error of the best uniform
    choice that fits, or of everything at its cheapest; and then of what was found, while that halves it: a choice that is
    far worse must not set the grid. Where nothing fits, everything at its cheapest.

    >>> smallest_error(np.array([[4.0, 0.0], [1.0, 0.0]]), np.array([[1, 8], [1, 8]]), available=9).tolist()
    [1, 0]
    """
    rows = np.arange(len(errors))
    picks: Ints = nbytes.argmin(1)
    if nbytes[rows, picks].sum() > available:
        return picks
    uniform = errors.sum(0)[nbytes.sum(0) <= available]
    bound, found = np.inf, float(min(errors[rows, picks].sum(), uniform.min(initial=np.inf)))
    while found < bound / 2:
        bound, limit = found, cells + len(errors)                                    # rounding up adds a cell per layer at most
        share = errors / bound if bound > 0 else np.where(errors > 0, np.inf, 0.0)
        cost = np.minimum(np.ceil(share * cells * (1 - 1e-12)), limit + 1).astype(np.int64)
        total, choices = least_bytes(cost, nbytes, limit)
        picks = _trace(cost, choices, int((total <= available).argmax()))            # they fall along the grid
        found = float(errors[rows, picks].sum())
    return picks


def least_bytes(cost: Ints, nbytes: Ints, limit: int) -> tuple[Floats, Ints]:
    """Least total bytes (limit + 1,) for every bound on the summed cost, and each layer's choice there (L, limit + 1).

    One pass over layers and choices, each over the whole grid: O(L R limit). Infinite where no combination is within a bound.
    """
    total = np.zeros(limit + 1)
    choices = np.zeros((len(cost), limit + 1), dtype=np.int64)
    for layer, (steps, sizes) in enumerate(zip(cost.tolist(), nbytes.tolist(), strict=True)):
        options = np.full((len(steps), limit + 1), np.inf)
        for choice, (step, size) in enumerate(zip(steps, sizes, strict=True)):
            if step <= limit:
                options[choice, step:] = total[: limit + 1 - step] + size
        choices[layer] = options.argmin(0)
        total = options.min(0)
    return total, choices


def _trace(cost: Ints, choices: Ints, at: int) -> Ints:
    """The choices (L,) that lead to a place of the grid, from the last layer to the first."""
    picks = np.zeros(len(cost), dtype=np.int64)
    for layer in range(len(cost) - 1, -1, -1):
        picks[layer] = choices[layer, at]
        at -= int(cost[layer, picks[layer]])
    return picks
