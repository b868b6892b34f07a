"""EfficientNet (Tan and Le 2019): inverted residual blocks with squeeze-and-excitation, scaled in width and depth together."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads.data import check_positive
from mango_env.workloads.resnet import convolution

# Table 1 of the paper: expansion, kernel, stride, channels, blocks of each stage at scale 1.
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip
STEM = 32                                                                      # channels at scale 1
WIDTH_B4, DEPTH_B4, DROPOUT_B4 = 1.4, 1.8, 0.4
STOCHASTIC_DEPTH = 0.2                                                         # of the last block; of earlier ones less


def scaled(channels: int, scale: float) -> int:
    """`scale` times `channels` as a multiple of 8, not more than a tenth below it.

    >>> scaled(32, 1.4), scaled(320, 1.4), scaled(16, 1.4)
    (48, 448, 24)
    """
    wanted = channels * scale
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class SqueezeExcitation(nn.Module):
    """Each channel times a gate that all channels' means decide (Hu et al. 2018, sec. 3)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:                                    # (B, C, H, W)
        gates = self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True))))  # (B, C, 1, 1)
        return x * torch.sigmoid(gates)


class InvertedResidual(nn.Module):
    """MBConv: widen by 1x1, convolve each channel by itself, gate, narrow by 1x1 (Sandler et al. 2018, sec. 3).

    While training, the block is left out with probability `dropped` for each image by itself (Huang et al. 2016).
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, dropped: float) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = convolution(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.norm_expand = nn.BatchNorm2d(wide) if expansion > 1 else nn.Identity()
        self.depthwise = convolution(wide, wide, kernel, stride, groups=wide)
        self.norm_depthwise = nn.BatchNorm2d(wide)
        self.squeeze_excitation = SqueezeExcitation(wide, max(1, inputs // 4))
        self.project = convolution(wide, outputs, 1)
        self.norm_project = nn.BatchNorm2d(outputs)
        self.widens = expansion > 1
        self.skips = stride == 1 and inputs == outputs
        self.dropped = dropped

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.silu(self.norm_expand(self.expand(x))) if self.widens else x
        y = self.squeeze_excitation(F.silu(self.norm_depthwise(self.depthwise(y))))
        y = self.norm_project(self.project(y))                                 # (B, outputs, H', W')
        if not self.skips:
            return y
        if self.training and self.dropped > 0:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.dropped  # (B, 1, 1, 1) bool
            y = y * kept / (1 - self.dropped)
        return x + y


class EfficientNet(nn.Module):
    """Stem, the blocks of `STAGES`, a 1x1 convolution and a linear head; B4 by default (19.34 M parameters at 1,000 classes).

    `width` and `depth` scale channels and blocks per stage. `blocks`: at most so many per stage (None: as scaled).
    """

    def __init__(
        self,
        classes: int,
        *,
        width: float = WIDTH_B4,
        depth: float = DEPTH_B4,
        dropout: float = DROPOUT_B4,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(classes=classes, **({} if blocks is None else {"blocks": blocks}))
        if not (0 < width < math.inf and 0 < depth < math.inf and 0 <= dropout < 1):
            raise ValueError(f"width={width!r} and depth={depth!r} must be positive, dropout={dropout!r} in [0, 1)")
        counts = [math.ceil(stage[4] * depth) for stage in STAGES]
        counts = counts if blocks is None else [min(count, blocks) for count in counts]
        inputs = scaled(STEM, width)
        made: list[InvertedResidual] = []
        self.stem = convolution(3, inputs, 3, 2)
        self.norm_stem = nn.BatchNorm2d(inputs)
        for (expansion, kernel, stride, channels, _), count in zip(STAGES, counts, strict=True):
            for block in range(count):
                outputs, dropped = scaled(channels, width), STOCHASTIC_DEPTH * len(made) / sum(counts)
                made.append(InvertedResidual(inputs, outputs, expansion, kernel, stride if block == 0 else 1, dropped))
                inputs = outputs
        self.blocks = nn.Sequential(*made)
        self.top = convolution(inputs, 4 * inputs, 1)
        self.norm = nn.BatchNorm2d(4 * inputs)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * inputs, classes)

    def forward(self, x: Tensor) -> Tensor:                                    # (B, 3, H, W)
        x = self.blocks(F.silu(self.norm_stem(self.stem(x))))
        features = F.silu(self.norm(self.top(x))).mean((2, 3))                 # (B, C)
        logits: Tensor = self.head(self.dropout(features))                     # (B, classes)
        return logits
