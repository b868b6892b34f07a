"""What is told about memory and compression: reports, running averages, peaks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mango.config import CompressionConfig
from mango.layers import Layer
from mango.state import TensorState

COMPONENTS = ("momentum", "variance", "residual", "gradients", "projector", "correction", "scales", "indices")


@dataclass(slots=True)
class Usage:
    """Sums over all steps of what was in force, layers weighted by size."""

    steps: int = 0
    changes: int = 0                         # layers that got another config
    gradient_bits: float = 0.0
    momentum_bits: float = 0.0
    sparsity: float = 0.0
    ratio: float = 0.0                       # AdamW's bytes over ours

    def count(self, bits: "MeanBits", ratio: float) -> None:
        """Add one step."""
        self.steps += 1
        self.ratio += ratio
        self.gradient_bits += bits.gradient
        self.momentum_bits += bits.momentum
        self.sparsity += bits.sparsity

    def averages(self) -> dict[str, float]:
        steps = max(1, self.steps)
        return {
            "avg_compression_ratio": self.ratio / steps if self.steps else 1.0,
            "avg_gradient_bits": self.gradient_bits / steps,
            "avg_momentum_bits": self.momentum_bits / steps,
            "avg_sparsity": self.sparsity / steps,
            "changes": float(self.changes),
        }


class MeanBits(NamedTuple):
    """What configs ask for, layers weighted by size."""

    gradient: float
    momentum: float
    sparsity: float

    @classmethod
    def of(cls, layers: Sequence[Layer], configs: Sequence[CompressionConfig]) -> "MeanBits":
        numel = max(1, sum(layer.numel for layer in layers))
        pairs = [(layer.numel / numel, config) for layer, config in zip(layers, configs, strict=True)]
        return cls(
            sum(weight * config.gradient_bits for weight, config in pairs),
            sum(weight * config.momentum_bits for weight, config in pairs),
            sum(weight * config.sparsity for weight, config in pairs),
        )


def memory_report(
    names: Sequence[tuple[str, int | None]],
    states: Sequence[TensorState | None],
    layers: Sequence[Layer],
    configs: Sequence[CompressionConfig],
    statistics: int,
) -> dict[str, Any]:
    """Bytes by component, measured on the storages, their `total`, and the same per layer.

    `names`: every tensor's name and which layer it is (None: none); `states`: what is kept for it (None: nothing yet);
    `configs`: one per layer; `statistics`: bytes of the statistics.
    """
    report: dict[str, Any] = dict.fromkeys(COMPONENTS, 0) | {"statistics": statistics}
    rows = []
    for (name, index), state in zip(names, states, strict=True):
        parts: dict[str, int] = state.components() if state is not None else {}
        for what, count in parts.items():
            report[what] += count
        if index is not None:
            row = {"name": name, "kind": layers[index].kind, "numel": layers[index].numel, "config": configs[index].name}
            rows.append(row | {"bytes": sum(parts.values())} | parts)
    report["total"] = sum(report.values())
    return report | {"layers": rows}


@dataclass(slots=True)
class PeakMemory:
    """Peak bytes allocated on a CUDA device, of an interval and ever; elsewhere the process's, and there are no intervals."""

    device: torch.device
    before: int = 0                          # of the intervals that are over

    def ever(self) -> float:
        """Bytes since this was made, or since the start of the process."""
        if self.device.type == "cuda":
            return float(max(self.before, torch.cuda.max_memory_allocated(self.device)))
        import resource

        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def share(self) -> float:
        """Peak of this interval as a share of the device's memory; 0 without one."""
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_allocated(self.device) / torch.cuda.get_device_properties(self.device).total_memory

    def start_interval(self) -> None:
        """Count from here on. torch's counter is reset, so its reading until now is kept here."""
        if self.device.type == "cuda":
            self.before = max(self.before, torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)


def prevailing(layers: Sequence[Layer], configs: Sequence[CompressionConfig]) -> dict[str, Any]:
    """The config in force on most parameters, as the three knobs of the earlier public interface; each layer's in `layers`."""
    weight: dict[CompressionConfig, int] = {CompressionConfig(): 0}
    for layer, config in zip(layers, configs, strict=True):
        weight[config] = weight.get(config, 0) + layer.numel
    most = max(weight, key=lambda config: weight[config])
    return _published(most) | {"layers": [_published(config) for config in configs]}


def _published(config: CompressionConfig) -> dict[str, Any]:
    return {"gradient_bits": config.gradient_bits, "momentum_bits": config.momentum_bits, "sparsity_ratio": config.sparsity}
