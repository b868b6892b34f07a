"""What is told about memory and compression: reports, running averages, peaks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mango.config import CompressionConfig
from mango.layers import Layer

if TYPE_CHECKING:
    from mango.optimizer import MANGO

COMPONENTS = ("momentum", "variance", "residual", "gradients", "projector", "scales", "indices")


@dataclass(slots=True)
class Usage:
    """Sums over all steps of what was in force, layers weighted by size."""

    steps: int = 0
    changes: int = 0                         # layers that got another config
    gradient_bits: float = 0.0
    momentum_bits: float = 0.0
    sparsity: float = 0.0
    ratio: float = 0.0                       # AdamW's bytes over ours

    def count(self, layers: Sequence[Layer], configs: Sequence[CompressionConfig], ratio: float) -> None:
        """Add one step."""
        numel = max(1, sum(layer.numel for layer in layers))
        self.steps += 1
        self.ratio += ratio
        for layer, config in zip(layers, configs, strict=True):
            weight = layer.numel / numel
            self.gradient_bits += config.gradient_bits * weight
            self.momentum_bits += config.momentum_bits * weight
            self.sparsity += config.sparsity * weight

    def averages(self) -> dict[str, float]:
        steps = max(1, self.steps)
        return {
            "avg_compression_ratio": self.ratio / steps if self.steps else 1.0,
            "avg_gradient_bits": self.gradient_bits / steps,
            "avg_momentum_bits": self.momentum_bits / steps,
            "avg_sparsity": self.sparsity / steps,
            "changes": float(self.changes),
        }


def memory_report(optimizer: "MANGO") -> dict[str, Any]:
    """Bytes by component, measured on the storages; their `total`, the `budget`, AdamW's bytes, and the same per layer."""
    report: dict[str, Any] = dict.fromkeys(COMPONENTS, 0) | {"statistics": optimizer.statistics.nbytes}
    layers = []
    for target in optimizer.targets:
        slot = optimizer.state.get(target.param)
        parts: dict[str, int] = slot["tensor"].components() if slot else {}
        for what, count in parts.items():
            report[what] += count
        if target.layer is not None:
            layer, config = optimizer.layers[target.layer], optimizer.applied[target.layer]
            row = {"name": layer.name, "kind": layer.kind, "numel": layer.numel, "config": config.name}
            layers.append(row | {"bytes": sum(parts.values())} | parts)
    report["total"] = sum(report.values())
    return report | {"budget": optimizer.memory_budget, "adamw": optimizer.adamw_bytes, "layers": layers}


def peak_memory(device: torch.device) -> float:
    """Peak bytes allocated on a CUDA device; elsewhere the peak resident bytes of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def prevailing(layers: Sequence[Layer], configs: Sequence[CompressionConfig]) -> dict[str, Any]:
    """The config in force on most parameters, as the three knobs of the earlier public interface; each layer's in `layers`."""
    weight: dict[CompressionConfig, int] = {CompressionConfig(): 0}
    for layer, config in zip(layers, configs, strict=True):
        weight[config] = weight.get(config, 0) + layer.numel
    most = max(weight, key=lambda config: weight[config])
    return _published(most) | {"layers": [_published(config) for config in configs]}


def _published(config: CompressionConfig) -> dict[str, Any]:
    return {"gradient_bits": config.gradient_bits, "momentum_bits": config.momentum_bits, "sparsity_ratio": config.sparsity}
