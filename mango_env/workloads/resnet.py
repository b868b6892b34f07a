"""`cifar10_resnet` and `cifar100_resnet`: ResNet-18 and ResNet-50 on images of 32x32 pixels; the same network for ImageNet."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.cifar10 import cifar10_images, crop_and_flip
from mango_env.workloads.cifar100 import cifar100_images
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import ImageData, check_positive

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}                                  # residual blocks per stage
EVALUATION_BATCH = 100


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """One without a bias, which the norm after it would undo."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions around a skip, or with `bottleneck` a 3x3 one between two of 1x1 (He et al. 2016, sec. 4.1).

    The stride sits in the 3x3 convolution. A unit gives `width` channels, with a bottleneck four times as many.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        if not bottleneck:
            shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.convolutions = nn.ModuleList(convolution(*shape) for shape in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else convolution(inputs, outputs, 1, stride)
        self.norm_skip = nn.Identity() if same else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y, last = x, len(self.norms) - 1
        for i, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolve(y))
            y = F.relu(y) if i < last else y
        return F.relu(y + self.norm_skip(self.skip(x)))


class ResNet(nn.Module):
    """A stem, four stages of residual units of `width`, 2, 4 and 8 `width` channels, and a linear head (He et al. 2016).

    `depth` is 18 or 50. `small` images have a 3x3 stem and no pooling after it, others a 7x7 stem of stride 2 and pooling.
    `units`: at most so many per stage (None: the published number).
    """

    def __init__(self, depth: int, classes: int, *, small: bool, width: int = 64, units: int | None = None) -> None:
        super().__init__()
        check_positive(width=width, **({} if units is None else {"units": units}))
        if depth not in BLOCKS:
            raise ValueError(f"depth={depth!r} of a ResNet must be one of {', '.join(map(str, BLOCKS))}")
        self.stem = convolution(3, width, 3 if small else 7, 1 if small else 2)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        bottleneck, inputs, blocks = depth >= 50, width, []
        for stage, count in enumerate(BLOCKS[depth]):
            for block in range(count if units is None else min(count, units)):
                channels = width << stage
                blocks.append(ResidualUnit(inputs, channels, 2 if stage > 0 and block == 0 else 1, bottleneck))
                inputs = 4 * channels if bottleneck else channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:                                    # (B, 3, H, W)
        features = self.blocks(self.pool(F.relu(self.norm(self.stem(x)))))
        logits: Tensor = self.head(features.mean((2, 3)))                      # (B, classes)
        return logits


def _on_small_images(
    data: ImageData, seed: int, depth: int, width: int, units: int | None, steps: int, batch: int, lr: float
) -> Classification:
    factory = partial(ResNet, depth, data.classes, small=True, width=width, units=units)
    return Classification(
        factory, data, seed, steps=steps, batch=batch, lr=lr, augment=crop_and_flip, evaluation_batch=EVALUATION_BATCH
    )  # fmt: skip


@register_workload("cifar10_resnet")
def cifar10_resnet(
    seed: int,
    *,
    depth: int = 18,
    width: int = 64,
    units: int | None = None,
    steps: int = 1000,
    batch: int = 64,
    val_size: int = 2000,
    tiny: bool = False,
    lr: float = 1e-3,
) -> Classification:
    """ResNet-18 (11.17 M parameters) or ResNet-50 (23.52 M) in the variant for small images, crops and flips.

    `tiny=True` reads the 2,000 images of `cifar10_tiny.npz` instead of the whole set; `val_size=10000` holds out all
    test images.
    """
    data = cifar10_images("cifar10_resnet", val_size, tiny)
    return _on_small_images(data, seed, depth, width, units, steps, batch, lr)


@register_workload("cifar100_resnet")
def cifar100_resnet(
    seed: int,
    *,
    depth: int = 18,
    width: int = 64,
    units: int | None = None,
    steps: int = 1000,
    batch: int = 64,
    val_size: int = 2000,
    lr: float = 1e-3,
) -> Classification:
    """The same networks on the hundred classes of CIFAR-100, 11.22 M and 23.71 M parameters."""
    data = cifar100_images("cifar100_resnet", val_size)
    return _on_small_images(data, seed, depth, width, units, steps, batch, lr)
