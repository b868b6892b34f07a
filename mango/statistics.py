"""What the policies see: statistics of each layer's gradients and state, and the observation made of them.

Memory is bounded: per layer 12 bytes for each of numel / 256 sampled entries (16 to 256), and 25 scalars. Sampled
statistics are taken on every step over fixed, evenly spread entries; what needs the dense moments is taken on the last
step of an interval (a probe), while the update pass has them at hand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango import noise
from mango.codecs import Shape, encode, matrix_shape, safe
from mango.config import CompressionConfig
from mango.features import FEATURE_INDEX, FEATURES, GLOBAL_FEATURES, KINDS, LAYER_FEATURES, RULES
from mango.formats import SIGNED, UNSIGNED
from mango.layers import Layer
from mango.lowrank import subspace
from mango.rules import RULES as BASE_RULES
from mango.state import direction

NORM_DECAY = 0.99
NORMS = 2                                    # columns of a summary that are norms; the others are means
WINDOW = 1024                                # entries of each layer's moments on which format errors are tried
SKETCH = 128                                 # rows and columns of each layer's matrix on which ranks are estimated
# What storing costs before anything was measured: relative errors on normal samples, and no low-rank structure.
PRIOR = {
    "error_momentum_8": 0.007, "error_momentum_4": 0.1, "error_momentum_2": 0.6, "error_variance_8": 0.005,
    "error_variance_4": 0.05, "error_variance_0": 0.2, "error_rank_1": 0.95, "error_rank_8": 0.8,
}  # fmt: skip
_PROBED = ("log_abs_mean", "log_abs_std", "grad_crest", "momentum_alignment", "stable_rank", "update_ratio", "weight_rms",
           "curvature", *PRIOR, "compression_error", "residual_ratio")  # fmt: skip
_IN_FORCE = ("gradient_bits", "momentum_bits", "variance_bits", "sparsity", "rank")
_PROBED_FEATURES = [FEATURE_INDEX[name] for name in _PROBED]
_LOWS, _HIGHS = torch.tensor([f.low for f in FEATURES]), torch.tensor([f.high for f in FEATURES])


@dataclass(slots=True)
class Context:
    """What the whole run adds to every layer's observation."""

    configs: Sequence[CompressionConfig]
    layer_bytes: Sequence[int]
    total_numel: int
    state_bytes: int
    budget: int
    price: float = 0.0
    progress: float = 0.0
    loss: float | None = None
    loss_slope: float = 0.0
    lr: float = 0.0
    lr_ratio: float = 1.0
    peak_memory: float = 0.0


@dataclass(slots=True)
class _Probe:
    """What one layer leaves behind on a probe step, until `finish_probe`."""

    config: CompressionConfig                # in force
    scalars: Tensor                          # (7,) what `finish_probe` makes features of
    magnitude: Tensor                        # (n,) of evenly spread entries of the gradient
    loss_change: float
    exp_avg: Tensor                          # (WINDOW,)
    exp_avg_sq: Tensor                       # (WINDOW,) ones where the rule has no second moment
    factored: Tensor                         # (WINDOW,) the second moment as factors give it back
    gradient: Tensor                         # (SKETCH, SKETCH) at most: evenly spread rows and columns
    direction: Tensor                        # the same of m / sqrt(v)


def sample_stride(numel: int, columns: int) -> tuple[int, int]:
    """(stride, count) of evenly spread sample entries; the stride shares no factor with the row length."""
    count = min(numel, max(16, min(256, numel // 256)))
    stride = max(1, numel // max(1, count))
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride -= 1
    return stride, count


def _window(x: Tensor, size: int) -> Tensor:
    flat = x.reshape(-1)[:size]
    if flat.numel() == size:
        return flat.clone() if x.numel() > size else flat    # a view would keep all of the tensor alive
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _spread(x: Tensor, side: int) -> Tensor:
    """Evenly spread rows and columns of the tensor as a matrix, `side` of each at most: a view."""
    matrix = x.reshape(matrix_shape(tuple(x.shape)))
    rows, columns = max(1, matrix.shape[0] // side), max(1, matrix.shape[1] // side)
    return matrix[: rows * side : rows, : columns * side : columns]


def _stacked(matrices: Sequence[Tensor], least: int = 1) -> Tensor:
    """Matrices of different shapes as one tensor (n, rows, columns), padded with zeros; `least` rows at least."""
    rows, columns = (max(sizes) for sizes in zip(*(m.shape for m in matrices), strict=True))
    table = matrices[0].new_zeros(len(matrices), max(least, rows), columns)
    for place, matrix in zip(table, matrices, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    return table


class GradientStatistics:
    """Streaming statistics of L layers. `observe` on every step, `probe` per layer and `finish_probe` at an interval's end."""

    def __init__(self, layers: Sequence[Layer], device: torch.device, shapes: Sequence[Shape] | None = None) -> None:
        """`shapes`: of what is here of each layer, where that is not all of it."""
        self.layers = list(layers)
        here = [layer.shape for layer in self.layers] if shapes is None else shapes
        self._numel = [math.prod(shape) for shape in here]
        self._samples = [sample_stride(math.prod(shape), matrix_shape(shape)[1]) for shape in here]
        self._counts = [count for _, count in self._samples]
        self._offsets = [sum(self._counts[:i]) for i in range(len(self._counts))]
        total = sum(self._counts)
        self.mean, self.square, self.previous = (torch.zeros(total, device=device) for _ in range(3))
        self.norm = torch.zeros(len(layers), device=device)                        # of the last gradient
        self.running_norm = torch.zeros(len(layers), device=device)                # decay 0.99, from zero
        self.cosine = torch.zeros(len(layers), device=device)                      # summed over the window
        self.count = torch.zeros(len(layers), device=device)                       # gradients taken in since the window began
        self.moved = torch.zeros(len(layers), device=device)                       # norm of the last measured update
        self.probed = torch.zeros(len(layers), len(_PROBED), device=device)
        for name, error in (PRIOR | {"compression_error": 1e-10, "residual_ratio": 1e-10}).items():
            in_log = FEATURES[FEATURE_INDEX[name]].unit == "log10"
            self.probed[:, _PROBED.index(name)] = math.log10(error) if in_log else error
        self.nbytes = sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())  # none is ever replaced
        self.steps = 0
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}
        self._pending: dict[int, _Probe] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("mean", "square", "previous", "norm", "running_norm", "cosine", "count", "moved", "probed")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def predicted_bytes(layers: Sequence[Layer]) -> int:
        counts = [sample_stride(layer.numel, matrix_shape(layer.shape)[1])[1] for layer in layers]
        return 12 * sum(counts) + 4 * len(layers) * (5 + len(_PROBED))

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps} | {k: v.clone() for k, v in self.tensors.items()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        for name, tensor in self.tensors.items():
            saved = state[name]
            if not isinstance(saved, Tensor) or saved.shape != tensor.shape:
                raise ValueError(f"statistics {name!r} have shape {getattr(saved, 'shape', None)}, not {tuple(tensor.shape)}")
            tensor.copy_(saved)
        self.steps = int(str(state["steps"]))

    def start_window(self) -> None:
        """Forget the interval's variance and cosines; running norms and probes stay."""
        for tensor in (self.mean, self.square, self.cosine, self.count):
            tensor.zero_()

    def sample(self, index: int) -> tuple[int, int, int]:
        """(offset, count, stride) of a layer's entries in `mean`, `square` and `previous`."""
        stride, count = self._samples[index]
        return self._offsets[index], count, stride

    def take(self, index: int, grad: Tensor, norm: Tensor) -> None:
        """One layer's gradient of this step and its norm. A layer that gives none, or a non-finite one, is left out."""
        stride, count = self._samples[index]
        self._taken[index] = (grad.reshape(-1)[:: stride][:count].to(self.mean), norm.to(self.norm))

    def took(self, layers: NDArray[np.int64], norms: NDArray[np.float64]) -> None:
        """What a kernel took in itself, samples and all: different layers (n,) and the norms of their gradients (n,)."""
        norm, running, count = (tensor.numpy() for tensor in (self.norm, self.running_norm, self.count))
        norm[layers] = norms
        running[layers] = NORM_DECAY * running[layers] + (1 - NORM_DECAY) * norm[layers]
        count[layers] += 1

    def _norms(self, where: Tensor, norms: Tensor) -> None:
        self.norm[where] = norms
        self.running_norm[where] = NORM_DECAY * self.running_norm[where] + (1 - NORM_DECAY) * norms

    def observe(self) -> None:
        """Take in what the layers gave since the last call: one step."""
        taken, self._taken = self._taken, {}
        self.steps += 1
        if not taken:
            return
        where = torch.tensor(list(taken), device=self.norm.device)
        self.count[where] += 1
        for index, (sample, _) in taken.items():
            part = slice(self._offsets[index], self._offsets[index] + self._counts[index])
            delta = sample - self.mean[part]                                        # Welford 1962
            self.mean[part] += delta / self.count[index]
            self.square[part] += delta * (sample - self.mean[part])
        samples = [sample for sample, _ in taken.values()]
        before = [self.previous[self._offsets[i] : self._offsets[i] + self._counts[i]] for i in taken]
        dots = torch.stack([torch.stack([x @ y, x @ x, y @ y]) for x, y in zip(samples, before, strict=True)])  # (n, 3)
        self.cosine[where] += dots[:, 0] / safe(dots[:, 1].sqrt() * dots[:, 2].sqrt())  # the first has zeros before it
        for sample, place in zip(samples, before, strict=True):
            place.copy_(sample)
        self._norms(where, torch.stack([norm for _, norm in taken.values()]))

    def _sum(self, x: Tensor) -> Tensor:
        """Sums over each layer's samples: (L,)."""
        return torch.stack([part.sum() for part in torch.split(x, self._counts)])

    def probe(
        self,
        index: int,
        config: CompressionConfig,
        *,
        grad: Tensor,
        moments: tuple[Tensor, Tensor | None],
        window: tuple[Tensor, Tensor | None],
        param_norm: Tensor,
        moved: Tensor,
        error: Tensor,
        alignment: Tensor,
        residual_norm: Tensor,
        loss_change: float,
    ) -> None:
        """Take what needs a layer's dense tensors.

        `moments`: first and second, of the layer's shape, as stored or before; `window`: their first entries before storing;
        `moved`: norm of this update; `alignment`: cosine of first moment and gradient. `loss_change` is the loss at this
        step's parameters minus that one step earlier; the update between the two was measured by `self.moved`.
        """
        exp_avg, exp_avg_sq = moments
        if exp_avg_sq is None or window[1] is None:
            square = factored = exp_avg.new_ones(WINDOW)
            towards = _spread(exp_avg, SKETCH).clone()
        else:
            matrix = exp_avg_sq.reshape(matrix_shape(tuple(exp_avg_sq.shape)))
            row, column = matrix.mean(1), matrix.mean(0)
            share = row[: -(-WINDOW // column.numel())] / safe(row.mean())
            square, factored = _window(window[1], WINDOW), _window(share[:, None] * column[:WINDOW], WINDOW)
            towards = direction(_spread(exp_avg, SKETCH), _spread(exp_avg_sq, SKETCH))
        self._pending[index] = _Probe(
            config,
            torch.stack([alignment, moved, param_norm, error, residual_norm, self.norm[index], self.moved[index]]).float(),
            grad.reshape(-1)[:: max(1, grad.numel() // 4096)].abs().float(),
            loss_change,
            _window(window[0], WINDOW), square, factored,
            _spread(grad, SKETCH).to(torch.float32, copy=True), towards,
        )  # fmt: skip

    def finish_probe(self, key: int) -> None:
        """Try the formats on all probed layers at once and store what was found."""
        if not self._pending:
            return
        places = list(self._pending)
        probes = [self._pending[i] for i in places]
        self._pending = {}
        alignment, moved, param_norm, error, residual, norm, before = torch.stack([p.scalars for p in probes]).unbind(1)
        changes = torch.tensor([p.loss_change for p in probes], dtype=torch.float64, device=norm.device)
        root = torch.tensor([math.sqrt(self._numel[i]) for i in places], device=norm.device)
        columns = {
            "momentum_alignment": alignment,
            "update_ratio": (moved / safe(param_norm)).log10(),
            "weight_rms": (param_norm / root).log10(),
            "curvature": _signed_log(changes, before.double()).float(),
            "compression_error": error.log10(),
            "residual_ratio": (residual / safe(norm)).log10(),
        }
        columns |= self._magnitudes(probes) | self._format_errors(probes, key) | self._ranks(probes, key)
        values = torch.stack([columns[name] for name in _PROBED], 1)                # (P, C)
        low, high = (bounds[_PROBED_FEATURES].to(values.device) for bounds in (_LOWS, _HIGHS))
        found = torch.where(values.isnan(), low, values).clamp(low, high)
        known = torch.tensor([_measurable(self.layers[i].rule, p.config) for i, p in zip(places, probes, strict=True)])
        self.probed[places] = torch.where(known.to(found.device), found, self.probed[places])

    @staticmethod
    def _magnitudes(probes: Sequence[_Probe]) -> dict[str, Tensor]:
        """Mean and deviation of log |g| over the entries that are not 0, and the largest |g| over their root mean square."""
        table = _stacked([p.magnitude[None] for p in probes])[:, 0]                 # (P, n)
        present = table > 0
        count = present.sum(1)
        logs = torch.where(present, table, 1.0).log()
        mean = torch.where(count > 0, logs.sum(1) / count, -50.0)
        square = torch.where(present, logs - mean[:, None], 0.0).square().sum(1)
        sizes = torch.tensor([p.magnitude.numel() for p in probes], device=table.device)
        mean_square = table.square().sum(1) / sizes
        return {
            "log_abs_mean": mean,
            "log_abs_std": (square / count.clamp(min=1)).sqrt(),
            "grad_crest": (table.amax(1) / safe(mean_square.sqrt())).clamp(min=1).log10(),
        }

    @staticmethod
    def _format_errors(probes: Sequence[_Probe], key: int) -> dict[str, Tensor]:
        """log10 of the error of the direction m / sqrt(v) when one of the two is stored in a format: (P,) each."""
        exp_avg = torch.stack([p.exp_avg for p in probes])                          # (P, WINDOW)
        exp_avg_sq = torch.stack([p.exp_avg_sq for p in probes])
        ideal = direction(exp_avg, exp_avg_sq)
        tried = {"error_variance_0": (exp_avg, torch.stack([p.factored for p in probes]))}
        for bits in (8, 4, 2):
            stored = encode(SIGNED[bits], exp_avg, key + bits if bits < 8 else None).decode()
            tried[f"error_momentum_{bits}"] = (stored, exp_avg_sq)
        for bits in (8, 4):
            tried[f"error_variance_{bits}"] = (exp_avg, encode(UNSIGNED[bits], exp_avg_sq, key + 16 + bits).decode())
        averages, squares = (torch.stack(parts) for parts in zip(*tried.values(), strict=True))  # (6, P, WINDOW)
        errors = (direction(averages, squares) - ideal).norm(dim=2) / safe(ideal.norm(dim=1))
        return dict(zip(tried, errors.clamp(1e-10, 100).log10().unbind(), strict=True))

    @staticmethod
    def _ranks(probes: Sequence[_Probe], key: int) -> dict[str, Tensor]:
        """Stable rank of the gradient and what of m / sqrt(v) is outside subspaces, by a rank-8 sketch (Halko et al. 2011)."""
        matrices = _stacked([p.gradient for p in probes] + [p.direction for p in probes], 8)  # (2P, m, n)
        size = matrices.abs()
        rows, columns = size.amax(2), size.amax(1)
        matrices = matrices / safe(rows.amax(1))[:, None, None]
        start = torch.randn(SKETCH, 8, device=matrices.device, generator=noise.generator(key, matrices.device))
        sketch = start[: matrices.shape[2]].T @ matrices.mT                         # transposed: products of few rows are fast
        basis = torch.linalg.qr((sketch @ matrices @ matrices.mT).mT).Q             # (2P, m, 8)
        inside = basis.mT @ matrices
        energy = torch.linalg.eigvalsh(inside @ inside.mT).clamp(min=0).flip(1)     # (2P, 8) largest first
        total = safe(torch.linalg.vector_norm(matrices, dim=(1, 2)).square())
        filled = torch.minimum((rows > 0).sum(1), (columns > 0).sum(1))[: len(probes)].clamp(min=1)  # not padding
        outside = (1 - energy.cumsum(1) / total[:, None]).clamp(0, 1).sqrt()
        return {
            "stable_rank": (total / safe(energy[:, 0]))[: len(probes)] / filled,
            "error_rank_1": outside[len(probes) :, 0],
            "error_rank_8": outside[len(probes) :, 7],
        }

    def summary(self) -> Tensor:
        """(L, C) float64: each layer's norm and running norm; means (variance, square of means, cosine, count); probes."""
        counts = torch.tensor([float(count) for count in self._counts]).clamp(min=1)
        square = self._sum(self.mean.square()).cpu() / counts if self.layers else torch.zeros(0)
        means = [self.norm.cpu(), self.running_norm.cpu(), self.variance(), square, self.cosine.cpu(), self.count.cpu()]
        return torch.cat([torch.stack(means, 1), self.probed.cpu()], 1).double()

    def take_over(self, layers: Sequence[int], summary: Tensor) -> None:
        """Put in what another rank tells of these layers; their samples stay with it."""
        norm, running, _, _, cosine, count = summary[layers, :6].to(self.norm).unbind(1)
        self.norm[layers], self.running_norm[layers], self.cosine[layers], self.count[layers] = norm, running, cosine, count
        self.probed[layers] = summary[layers, 6:].to(self.probed)

    def features(self, context: Context, summary: Tensor | None = None) -> Tensor:
        """The observation (L, 64) float32 on the CPU, every value within its range in the table.

        `summary`: in place of one's own, that of several ranks together.
        """
        if not self.layers:
            return torch.zeros(0, len(FEATURES))
        local = self._local(context, self.summary() if summary is None else summary)
        rms, noise = local["grad_rms"], local["noise_scale"]
        several = len(self.layers) > 1
        ratio = context.budget / max(1, 8 * context.total_numel)
        shared: dict[str, float] = {
            "progress": context.progress,
            "loss": math.log(context.loss) if context.loss and context.loss > 0 else 0.0,
            "loss_slope": context.loss_slope,
            "lr": math.log10(context.lr) if context.lr > 0 else -10.0,
            "lr_ratio": context.lr_ratio,
            "budget_per_param": math.log2(ratio) if ratio > 0 else -10.0,
            "budget_pressure": context.state_bytes / max(1, context.budget),
            "price": math.log10(context.price) if context.price > 0 else -20.0,
            "peak_memory": context.peak_memory,
            "mean_grad_rms": float(rms.mean()),
            "std_grad_rms": float(rms.std()) if several else 0.0,
            "mean_noise_scale": float(noise.mean()),
            "mean_momentum_alignment": float(local["momentum_alignment"].mean()),
            "mean_error_momentum_4": float(local["error_momentum_4"].mean()),
            "layers": math.log10(len(self.layers)),
        }
        own = torch.stack([local[feature.name] for feature in LAYER_FEATURES], 1)
        common = torch.tensor([shared[feature.name] for feature in GLOBAL_FEATURES]).expand(len(self.layers), -1)
        table = torch.nan_to_num(torch.cat([own, common], 1), nan=0.0, posinf=1e30, neginf=-1e30)
        return torch.maximum(torch.minimum(table, _HIGHS), _LOWS)

    def _unchanging(self) -> dict[str, Tensor]:
        """What of the observation the layers are, whatever training does: (L,) each. Kept they would be bytes to count."""
        shapes = [matrix_shape(layer.shape) for layer in self.layers]
        rules = [{"adam": "adamw", "muon_qkv": "muon"}.get(layer.rule, layer.rule) for layer in self.layers]
        return {
            "depth": torch.tensor([layer.depth for layer in self.layers]),
            "numel": torch.tensor([float(layer.numel) for layer in self.layers]).log10(),
            "aspect": torch.tensor([math.log10(max(1, max(s)) / max(1, min(s))) for s in shapes]),
        } | {f"kind_{kind}": torch.tensor([float(layer.kind == kind) for layer in self.layers]) for kind in KINDS} | {
            f"rule_{rule}": torch.tensor([float(own == rule) for own in rules]) for rule in RULES
        }  # fmt: skip

    def _local(self, context: Context, summary: Tensor) -> dict[str, Tensor]:
        numel = torch.tensor([float(layer.numel) for layer in self.layers])
        here = torch.tensor([max(1.0, entries) for entries in self._numel])
        norm, running, variance, mean_square, cosine, taken = summary[:, :6].float().unbind(1)
        running, taken = running / max(1 - NORM_DECAY**self.steps, 1e-12), taken.clamp(min=1)
        signal = (mean_square - variance / taken).clamp(min=0)                      # unbiased |G|^2 per entry
        found = dict(zip(_PROBED, summary[:, 6:].float().unbind(1), strict=True))
        pairs = taken - (taken == self.steps).float()                               # the very first gradient has none before it
        in_force = [_in_force(layer.shape, config) for layer, config in zip(self.layers, context.configs, strict=True)]
        return self._unchanging() | found | dict(zip(_IN_FORCE, torch.tensor(in_force).unbind(1), strict=True)) | {
            "grad_norm": norm.log10(),
            "grad_rms": (norm / numel.sqrt()).log10(),
            "grad_trend": (safe(norm) / safe(running)).log(),
            "grad_variance": variance.log10(),
            "noise_scale": torch.where(signal > 0, (variance / safe(signal)).log10(), torch.where(variance > 0, 10.0, 0.0)),
            "grad_cosine": cosine / pairs.clamp(min=1),
            "share": here / max(1, context.total_numel),
            "importance": norm / safe(norm.max()),
            "bytes_per_param": torch.tensor([float(b) for b in context.layer_bytes]) / here / 8,
        }  # fmt: skip

    def variance(self) -> Tensor:
        """Mean variance of an entry over the gradients since the window began (unbiased), per layer: (L,)."""
        counts = torch.tensor([float(c) for c in self._counts]).clamp(min=1)
        return self._sum(self.square).cpu() / counts / (self.count.cpu() - 1).clamp(min=1)

    def compression_errors(self) -> Tensor:
        """Relative error that storing added to each layer's update at the last probe: (L,)."""
        logs = self.probed[:, _PROBED.index("compression_error")].float().cpu()
        return torch.where(logs == FEATURES[FEATURE_INDEX["compression_error"]].low, 0.0, 10**logs)


@lru_cache(maxsize=1 << 12)
def _measurable(rule: str, config: CompressionConfig) -> tuple[bool, ...]:
    """Which of `_PROBED` can be told under `config`: moments that are stored as factors or in a subspace would seem to
    lose nothing by it. The last estimate from a richer format stays, or the prior."""

    def told(name: str) -> bool:
        if name.startswith("error_variance"):
            return BASE_RULES[rule].variance and config.variance_bits > 0 and not config.rank
        if name.startswith("error_momentum") and not config.has_momentum:
            return False
        return not (name.startswith("error_") and config.rank)

    return tuple(told(name) for name in _PROBED)


@lru_cache(maxsize=1 << 14)
def _in_force(shape: Shape, config: CompressionConfig) -> tuple[float, ...]:
    """The features `_IN_FORCE` of a layer under a config."""
    small, _, rank = subspace(shape, config.rank or 1 << 30)
    momentum = config.factor_bits_q if config.rank else config.momentum_bits
    bits = math.log2(config.gradient_bits) / 5, math.log2(1 + momentum) / 5.05, math.log2(1 + config.variance_bits) / 5.05
    return *bits, float(config.sparsity), rank / max(1, small)


def _signed_log(loss_change: Tensor, distance: Tensor) -> Tensor:
    """Loss change over squared distance as sign(x) log10(1 + |x|); 0 where nothing moved."""
    square = distance.square()
    curvature = torch.where(square > 0, loss_change / square, 0.0)
    return curvature.sign() * curvature.abs().log1p() / math.log(10)
