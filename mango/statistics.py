"""What the policies see: statistics of each layer's gradients and state, and the observation made of them.

Memory is bounded: per layer 12 bytes for each of numel / 256 sampled entries (16 to 256), and 24 scalars. Sampled
statistics are taken on every step over fixed, evenly spread entries; what needs the dense moments is taken on the last
step of an interval (a probe), while the update pass has them at hand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mango.codecs import SIGNED, UNSIGNED, matrix_shape, safe
from mango.config import CompressionConfig
from mango.features import FEATURE_INDEX, FEATURES, GLOBAL_FEATURES, KINDS, LAYER_FEATURES, RULES
from mango.layers import Layer
from mango.state import direction, subspace

NORM_DECAY = 0.99
WINDOW = 1024                                # entries of each layer's moments on which format errors are tried
SKETCH = 128                                 # rows and columns of each layer's matrix on which ranks are estimated
# What storing costs before anything was measured: relative errors on normal samples, and no low-rank structure.
PRIOR = {
    "error_momentum_8": 0.007, "error_momentum_4": 0.1, "error_momentum_2": 0.6, "error_variance_8": 0.005,
    "error_variance_4": 0.05, "error_variance_0": 0.2, "error_rank_1": 0.95, "error_rank_8": 0.8,
}  # fmt: skip
_PROBED = ("log_abs_mean", "log_abs_std", "grad_crest", "momentum_alignment", "stable_rank", "update_ratio", "weight_rms",
           "curvature", *PRIOR, "compression_error", "residual_ratio")  # fmt: skip


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
    rule: str = "adamw"


@dataclass(slots=True)
class _Probe:
    """What one layer leaves behind on a probe step, until `finish_probe`."""

    config: CompressionConfig                # in force
    scalars: dict[str, Tensor]
    exp_avg: Tensor                          # (WINDOW,)
    exp_avg_sq: Tensor                       # (WINDOW,)
    factored: Tensor                         # (WINDOW,) the second moment as factors give it back
    gradient: Tensor                         # (SKETCH, SKETCH) evenly spread rows and columns
    direction: Tensor                        # (SKETCH, SKETCH) the same of m / sqrt(v)


def sample_stride(numel: int, columns: int) -> tuple[int, int]:
    """(stride, count) of evenly spread sample entries; the stride shares no factor with the row length."""
    count = min(numel, max(16, min(256, numel // 256)))
    stride = max(1, numel // count)
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride -= 1
    return stride, count


def _window(x: Tensor, size: int) -> Tensor:
    flat = x.reshape(-1)[:size]
    return torch.nn.functional.pad(flat, (0, size - flat.numel())) if flat.numel() < size else flat.clone()


def _corner(x: Tensor, side: int) -> Tensor:
    """Evenly spread rows and columns of the tensor as a matrix, padded with zeros: (side, side)."""
    matrix = x.reshape(matrix_shape(tuple(x.shape)))
    rows, columns = max(1, matrix.shape[0] // side), max(1, matrix.shape[1] // side)
    spread = matrix[::rows, ::columns][:side, :side]
    return torch.nn.functional.pad(spread, (0, side - spread.shape[1], 0, side - spread.shape[0]))


class GradientStatistics:
    """Streaming statistics of L layers. `observe` on every step, `probe` per layer and `finish_probe` at an interval's end."""

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        self.layers = list(layers)
        self._samples = [sample_stride(layer.numel, matrix_shape(layer.shape)[1]) for layer in self.layers]
        self._counts = [count for _, count in self._samples]
        total = sum(self._counts)
        self.mean, self.square, self.previous = (torch.zeros(total, device=device) for _ in range(3))
        self.norm = torch.zeros(len(layers), device=device)                        # of the last gradient
        self.running_norm = torch.zeros(len(layers), device=device)                # decay 0.99, from zero
        self.cosine = torch.zeros(len(layers), device=device)                      # summed over the window
        self.moved = torch.zeros(len(layers), device=device)                       # norm of the last measured update
        self.probed = torch.zeros(len(layers), len(_PROBED), device=device)
        for name, error in (PRIOR | {"compression_error": 1e-10, "residual_ratio": 1e-10}).items():
            in_log = FEATURES[FEATURE_INDEX[name]].unit == "log10"
            self.probed[:, _PROBED.index(name)] = math.log10(error) if in_log else error
        self.steps = 0
        self.window = 0
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}
        self._pending: dict[int, _Probe] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "square": self.square, "previous": self.previous, "norm": self.norm,
                "running_norm": self.running_norm, "cosine": self.cosine, "moved": self.moved, "probed": self.probed}  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    @staticmethod
    def predicted_bytes(layers: Sequence[Layer]) -> int:
        counts = [sample_stride(layer.numel, matrix_shape(layer.shape)[1])[1] for layer in layers]
        return 12 * sum(counts) + 4 * len(layers) * (4 + len(_PROBED))

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps, "window": self.window} | {k: v.clone() for k, v in self.tensors.items()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        for name, tensor in self.tensors.items():
            saved = state[name]
            if not isinstance(saved, Tensor) or saved.shape != tensor.shape:
                raise ValueError(f"statistics {name!r} have shape {getattr(saved, 'shape', None)}, not {tuple(tensor.shape)}")
            tensor.copy_(saved)
        self.steps, self.window = int(str(state["steps"])), int(str(state["window"]))

    def start_window(self) -> None:
        """Forget the interval's variance and cosines; running norms and probes stay."""
        self.mean.zero_()
        self.square.zero_()
        self.cosine.zero_()
        self.window = 0

    def take(self, index: int, grad: Tensor, norm: Tensor) -> None:
        """One layer's gradient of this step and its norm. A layer that gives none, or a non-finite one, is left out."""
        stride, count = self._samples[index]
        self._taken[index] = (grad.reshape(-1)[:: stride][:count].to(self.mean), norm.to(self.norm))

    def observe(self) -> None:
        """Take in what the layers gave since the last call: one step."""
        taken, self._taken = self._taken, {}
        if not self.layers:
            return
        parts = torch.split(self.mean, self._counts)
        sample = torch.cat([taken[i][0] if i in taken else part for i, part in enumerate(parts)])
        self.steps += 1
        self.window += 1
        delta = sample - self.mean                                                  # Welford 1962
        self.mean += delta / self.window
        self.square += delta * (sample - self.mean)
        if self.steps > 1:
            dot, one, other = (self._sum(x) for x in (sample * self.previous, sample.square(), self.previous.square()))
            self.cosine += dot / safe(one.sqrt() * other.sqrt())
        self.previous.copy_(sample)
        for index, (_, norm) in taken.items():
            self.norm[index] = norm
        here = list(taken)
        self.running_norm[here] = NORM_DECAY * self.running_norm[here] + (1 - NORM_DECAY) * self.norm[here]

    def _sum(self, x: Tensor) -> Tensor:
        """Sums over each layer's samples: (L,)."""
        return torch.stack([part.sum() for part in torch.split(x, self._counts)])

    def probe(
        self,
        index: int,
        config: CompressionConfig,
        *,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        param: Tensor,
        moved: Tensor,
        error: Tensor,
        residual_norm: Tensor,
        loss_change: float,
    ) -> None:
        """Take what needs a layer's dense tensors. `moved`: norm of this update.

        `loss_change` is the loss at this step's parameters minus that one step earlier; the update between the two was
        measured by `self.moved`.
        """
        magnitude = grad.reshape(-1)[:: max(1, grad.numel() // 4096)].abs()
        logs = magnitude[magnitude > 0].log()
        spread = logs.std(correction=0) if logs.numel() else magnitude.new_zeros(())
        distance = self.moved[index].double().square()
        scalars = {
            "log_abs_mean": logs.mean() if logs.numel() else magnitude.new_full((), -50.0),
            "log_abs_std": spread,
            "grad_crest": (magnitude.max() / safe(magnitude.square().mean().sqrt())).clamp(min=1).log10(),
            "momentum_alignment": (exp_avg * grad).sum() / safe(exp_avg.norm() * grad.norm()),
            "update_ratio": (moved / safe(param.norm())).log10(),
            "weight_rms": (param.norm() / math.sqrt(param.numel())).log10(),
            "curvature": _signed_log(loss_change / distance if distance > 0 else distance),
            "compression_error": error.log10(),
            "residual_ratio": (residual_norm / safe(grad.norm())).log10(),
        }
        square = exp_avg_sq.reshape(matrix_shape(tuple(exp_avg_sq.shape)))
        row, column = square.mean(1), square.mean(0)
        place = torch.arange(min(WINDOW, exp_avg_sq.numel()), device=row.device)
        factored = row[place // column.numel()] / safe(row.mean()) * column[place % column.numel()]
        self._pending[index] = _Probe(
            config,
            scalars,
            _window(exp_avg, WINDOW),
            _window(exp_avg_sq, WINDOW),
            _window(factored, WINDOW),
            _corner(grad, SKETCH),
            direction(_corner(exp_avg, SKETCH), _corner(exp_avg_sq, SKETCH)),
        )

    def finish_probe(self, generator: Generator) -> None:
        """Try the formats on all probed layers at once and store what was found."""
        if not self._pending:
            return
        places = list(self._pending)
        probes = [self._pending[i] for i in places]
        self._pending = {}
        columns = {name: torch.stack([p.scalars[name].float() for p in probes]) for name in probes[0].scalars}
        columns |= self._format_errors(probes, generator)
        columns |= self._ranks(probes, generator)
        for name, values in columns.items():
            feature, column = FEATURES[FEATURE_INDEX[name]], _PROBED.index(name)
            found = torch.nan_to_num(values, nan=feature.low, posinf=feature.high, neginf=feature.low)
            known = torch.tensor([_measurable(name, probe.config) for probe in probes], device=found.device)
            self.probed[places, column] = torch.where(known, found.clamp(feature.low, feature.high), self.probed[places, column])

    @staticmethod
    def _format_errors(probes: Sequence[_Probe], generator: Generator) -> dict[str, Tensor]:
        """log10 of the error of the direction m / sqrt(v) when one of the two is stored in a format: (P,) each."""
        exp_avg = torch.stack([p.exp_avg for p in probes])                          # (P, WINDOW)
        exp_avg_sq = torch.stack([p.exp_avg_sq for p in probes])
        ideal = direction(exp_avg, exp_avg_sq)

        def error(avg: Tensor, square: Tensor) -> Tensor:
            found: Tensor = (direction(avg, square) - ideal).norm(dim=1) / safe(ideal.norm(dim=1))
            return found.clamp(1e-10, 100).log10()

        errors = {"error_variance_0": error(exp_avg, torch.stack([p.factored for p in probes]))}
        for bits in (8, 4, 2):
            stored = SIGNED[bits].encode(exp_avg, generator if bits < 8 else None).decode()
            errors[f"error_momentum_{bits}"] = error(stored, exp_avg_sq)
        for bits in (8, 4):
            errors[f"error_variance_{bits}"] = error(exp_avg, UNSIGNED[bits].encode(exp_avg_sq, generator).decode())
        return errors

    @staticmethod
    def _ranks(probes: Sequence[_Probe], generator: Generator) -> dict[str, Tensor]:
        """Stable rank of the gradient and what of m / sqrt(v) is outside subspaces, by a rank-8 sketch (Halko et al. 2011)."""
        matrices = torch.stack([p.gradient for p in probes] + [p.direction for p in probes])  # (2P, S, S)
        matrices = matrices / safe(matrices.abs().amax((1, 2)))[:, None, None]
        start = torch.randn(SKETCH, 8, device=matrices.device, generator=generator)
        basis = torch.linalg.qr(matrices @ (matrices.mT @ (matrices @ start))).Q    # (2P, S, 8)
        inside = basis.mT @ matrices
        energy = torch.linalg.eigvalsh(inside @ inside.mT).clamp(min=0).flip(1)     # (2P, 8) largest first
        total = safe(matrices.square().sum((1, 2)))
        filled = torch.minimum(matrices.any(1).sum(1), matrices.any(2).sum(1)).clamp(min=1)  # not padding
        outside = (1 - energy.cumsum(1) / total[:, None]).clamp(0, 1).sqrt()
        return {
            "stable_rank": (total / safe(energy[:, 0]) / filled)[: len(probes)],
            "error_rank_1": outside[len(probes) :, 0],
            "error_rank_8": outside[len(probes) :, 7],
        }

    def features(self, context: Context) -> Tensor:
        """The observation (L, 64) float32 on the CPU, every value within its range in the table."""
        if not self.layers:
            return torch.zeros(0, len(FEATURES))
        local = self._local(context)
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
        } | {f"rule_{rule}": float(rule == context.rule) for rule in RULES}
        table = torch.empty(len(self.layers), len(FEATURES))
        for i, feature in enumerate(LAYER_FEATURES):
            table[:, i] = local[feature.name]
        for i, feature in enumerate(GLOBAL_FEATURES, start=len(LAYER_FEATURES)):
            table[:, i] = shared[feature.name]
        low = torch.tensor([f.low for f in FEATURES])
        high = torch.tensor([f.high for f in FEATURES])
        return torch.maximum(torch.minimum(torch.nan_to_num(table, nan=0.0, posinf=1e30, neginf=-1e30), high), low)

    def _local(self, context: Context) -> dict[str, Tensor]:
        numel = torch.tensor([float(layer.numel) for layer in self.layers])
        norm, running = self.norm.cpu(), self.running_norm.cpu() / max(1 - NORM_DECAY**self.steps, 1e-12)
        counts = torch.tensor([float(count) for count in self._counts])
        variance, mean_square = self.variance(), self._sum(self.mean.square()).cpu() / counts
        signal = (mean_square - variance / max(1, self.window)).clamp(min=0)        # unbiased |G|^2 per entry
        found = dict(zip(_PROBED, self.probed.cpu().unbind(1), strict=True))
        cosines = self.cosine.cpu() / max(1, self.window - (self.window == self.steps))
        shapes = [matrix_shape(layer.shape) for layer in self.layers]
        local = found | {
            "grad_norm": norm.log10(),
            "grad_rms": (norm / numel.sqrt()).log10(),
            "grad_trend": (safe(norm) / safe(running)).log(),
            "grad_variance": variance.log10(),
            "noise_scale": torch.where(signal > 0, (variance / safe(signal)).log10(), torch.where(variance > 0, 10.0, 0.0)),
            "grad_cosine": cosines,
            "depth": torch.tensor([layer.depth for layer in self.layers]),
            "numel": numel.log10(),
            "aspect": torch.tensor([math.log10(max(1, max(s)) / max(1, min(s))) for s in shapes]),
            "share": numel / max(1, context.total_numel),
            "importance": self.importance(),
            "bytes_per_param": torch.tensor([float(b) for b in context.layer_bytes]) / numel / 8,
        }
        local |= {f"kind_{kind}": torch.tensor([float(layer.kind == kind) for layer in self.layers]) for kind in KINDS}
        return local | self._in_force(context.configs)

    def _in_force(self, configs: Sequence[CompressionConfig]) -> dict[str, Tensor]:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor([float(v) for v in values])

        sides = [subspace(layer.shape, config.rank or 1 << 30) for layer, config in zip(self.layers, configs, strict=True)]
        return {
            "gradient_bits": column([math.log2(c.gradient_bits) / 5 for c in configs]),
            "momentum_bits": column([math.log2(c.factor_bits_q if c.rank else c.momentum_bits) / 5 for c in configs]),
            "variance_bits": column([math.log2(1 + c.variance_bits) / 5.05 for c in configs]),
            "sparsity": column([c.sparsity for c in configs]),
            "rank": column([rank / max(1, small) for small, _, rank in sides]),
        }

    def variance(self) -> Tensor:
        """Mean variance of an entry over the gradients since the window began (unbiased), per layer: (L,)."""
        counts = torch.tensor([float(c) for c in self._counts])
        return self._sum(self.square).cpu() / counts / max(1, self.window - 1)

    def compression_errors(self) -> Tensor:
        """Relative error that storing added to each layer's update at the last probe: (L,)."""
        logs = self.probed[:, _PROBED.index("compression_error")].float().cpu()
        return torch.where(logs == FEATURES[FEATURE_INDEX["compression_error"]].low, 0.0, 10**logs)

    def importance(self) -> Tensor:
        """Gradient norm over the largest of all layers: (L,) in [0, 1]."""
        norm = self.norm.cpu()
        return norm / safe(norm.max())


def _measurable(name: str, config: CompressionConfig) -> bool:
    """Whether a format's error can be told under `config`: moments that are stored as factors or in a subspace would
    seem to lose nothing by it. The last estimate from a richer format stays, or the prior."""
    if name.startswith("error_variance"):
        return config.variance_bits > 0 and not config.rank
    return not (name.startswith("error_") and config.rank)


def _signed_log(x: Tensor) -> Tensor:
    return (x.sign() * x.abs().log1p() / math.log(10)).float()
