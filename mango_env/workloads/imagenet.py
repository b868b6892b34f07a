"""`imagenet`: a folder of JPEG files per class under `$MANGO_DATA/imagenet`, decoded batch by batch; three published models.

The training images lie in `train/CLASS/*.JPEG`, those held out in `val/CLASS/*.JPEG`. Where there is no folder `val`,
every twentieth training image is held out instead. Any other folder of this form is as good: `folder=` names it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import Shared, check_positive, data_folder
from mango_env.workloads.efficientnet import WIDTH_B4, EfficientNet
from mango_env.workloads.resnet import ResNet
from mango_env.workloads.vit import EMBEDDING_STD, VisionTransformer

SOURCE = (
    "It is ImageNet's ILSVRC 2012 as folders, train/CLASS/*.JPEG and maybe val/CLASS/*.JPEG: get the archives from "
    "image-net.org/download.php (an account is needed) and unpack each class into a folder of its name"
)
SUFFIXES = (".jpeg", ".jpg")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                       # of levels 0..1, by channel
HELD_OUT_EVERY = 20                                                            # training images, where there is no folder val
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)                                     # of random crops (Szegedy et al. 2015, sec. 6)
CENTRE = 0.875                                                                 # side of the held-out crop over the shorter side
EVALUATION_BATCH = 50


@dataclass(frozen=True, slots=True)
class Crop:
    """Where to cut an image, as shares of what there is to choose, and whether to mirror it."""

    area: float                                                                # share of the image's pixels
    aspect: float                                                              # width over height
    left: float                                                                # 0: at the left edge, 1: at the right one
    top: float
    mirrored: bool

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of this crop in an image of so many pixels; an aspect that does not fit is cut down."""
        wide = min((self.area * width * height * self.aspect) ** 0.5, width)
        high = min((self.area * width * height / self.aspect) ** 0.5, height)
        left, top = self.left * (width - wide), self.top * (height - high)
        return left, top, left + wide, top + high


class ImageFiles:
    """Paths of images, chosen like rows of a tensor."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = np.array(paths, dtype=str)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> list[str]:
        chosen: list[str] = self._paths[np.asarray(index) if isinstance(index, Tensor) else index].tolist()
        return chosen


@dataclass(frozen=True, slots=True, eq=False)
class ImageFolder(Shared):
    """Labelled image files; pixels are read when they are needed."""

    train_x: ImageFiles
    train_y: Tensor                                                            # (N,) int64
    val_x: ImageFiles
    val_y: Tensor                                                              # (M,) int64
    classes: tuple[str, ...]
    size: int                                                                  # pixels on a side of what a model sees
    threads: int                                                               # that decode

    def random_crops(self, paths: list[str], generator: torch.Generator) -> Tensor:
        """A random part of each image, resized to (B, 3, size, size) uint8, mirrored with probability 1/2."""
        draws = torch.rand(len(paths), 5, generator=generator, dtype=torch.float64)
        low, high = (torch.tensor(ASPECT, dtype=torch.float64).log()).tolist()
        area = AREA[0] + (AREA[1] - AREA[0]) * draws[:, 0]
        aspect = (low + (high - low) * draws[:, 1]).exp()
        columns = (area, aspect, draws[:, 2], draws[:, 3], draws[:, 4] < 0.5)
        return self._decode(paths, [Crop(*drawn) for drawn in zip(*(column.tolist() for column in columns), strict=True)])

    def inputs(self, examples: Tensor | list[str], weight: Tensor) -> Tensor:
        """What a model takes in: of pixels, or of the middles of files; on the device and of the dtype of `weight`."""
        pixels = examples if isinstance(examples, Tensor) else self._decode(examples, [None] * len(examples))
        pixels = pixels.to(weight.device)                                      # as bytes: a quarter of what floats would be
        mean, std = (torch.tensor(values, device=weight.device).view(3, 1, 1) * 255 for values in (MEAN, STD))
        return ((pixels.float() - mean) / std).to(weight.dtype)

    def _decode(self, paths: Sequence[str], crops: Sequence[Crop | None]) -> Tensor:
        with ThreadPoolExecutor(self.threads) as pool:
            images = list(pool.map(partial(decode, size=self.size), paths, crops))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)          # (B, 3, size, size)


def decode(path: str, crop: Crop | None, size: int) -> NDArray[np.uint8]:
    """A crop of an image file, or with None its middle, as (size, size, 3)."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('decoding images needs Pillow: pip install "mango-optim[train]"') from error
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (2 * size, 2 * size))                          # a JPEG decoder halves sides at no cost
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image that can be decoded ({error}); get it anew") from error
    width, height = image.size
    if crop is None:
        side = CENTRE * min(width, height)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:
        box = crop.box(width, height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return pixels[:, ::-1] if crop is not None and crop.mirrored else pixels


@lru_cache(maxsize=2)
def load_folder(folder: Path, size: int, threads: int, val_size: int) -> ImageFolder:
    """The files under `folder`, listed once; at most `val_size` are held out, evenly spread over the classes."""
    classes = tuple(sorted(path.name for path in (folder / "train").iterdir() if path.is_dir()))
    train = _files(folder / "train", classes)
    if len(classes) < 2 or not train:
        raise ValueError(f"{folder / 'train'} has {len(train)} images in {len(classes)} folders of classes. {SOURCE}")
    if (folder / "val").is_dir():
        val = _files(folder / "val", classes)
    else:
        val, train = train[::HELD_OUT_EVERY], [file for i, file in enumerate(train) if i % HELD_OUT_EVERY]
    if not val or not train:
        raise ValueError(f"{folder} has {len(train)} images to train on and {len(val)} held out. {SOURCE}")
    val = [val[i * len(val) // min(val_size, len(val))] for i in range(min(val_size, len(val)))]
    parts = [(ImageFiles([path for path, _ in part]), torch.tensor([label for _, label in part])) for part in (train, val)]
    return ImageFolder(*parts[0], *parts[1], classes, size, threads)


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    return [
        (str(path), label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]


def _resnet50(classes: int, size: int, width: int | None, depth: int | None) -> nn.Module:
    return ResNet(50, classes, small=False, width=width or 64, units=depth)


def _vit_b16(classes: int, size: int, width: int | None, depth: int | None) -> nn.Module:
    width = width or 768
    return VisionTransformer(3, size, 16, width, depth or 12, max(1, width // 64), classes, class_token=True)


def _efficientnet_b4(classes: int, size: int, width: int | None, depth: int | None) -> nn.Module:
    return EfficientNet(classes, width=WIDTH_B4 if width is None else width / 32, blocks=depth)


# By the name of option `model`: f(classes, image size, width or None, depth or None).
MODELS: dict[str, Callable[[int, int, int | None, int | None], nn.Module]] = {
    "resnet50": _resnet50,
    "vit_b16": _vit_b16,
    "efficientnet_b4": _efficientnet_b4,
}


@register_workload("imagenet")
def imagenet(
    seed: int,
    *,
    model: str = "resnet50",
    image_size: int = 224,
    width: int | None = None,
    depth: int | None = None,
    steps: int = 1000,
    batch: int = 64,
    val_size: int = 5000,
    threads: int = 4,
    folder: str = "imagenet",
    lr: float = 1e-3,
) -> Classification:
    """ResNet-50 (25.56 M parameters), ViT-B/16 (86.57 M, `vit_b16`) or EfficientNet-B4 (19.34 M, `efficientnet_b4`).

    Random resized crops, mirrored half of the time. `width` (channels of the stem, or of the transformer) and `depth` (at
    most so many blocks per stage, or blocks of the transformer) make smaller models; None: as published.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r} of workload 'imagenet'; known: {', '.join(MODELS)}")
    sizes = {name: value for name, value in (("width", width), ("depth", depth)) if value is not None}
    check_positive(image_size=image_size, val_size=val_size, threads=threads, **sizes)
    data = load_folder(data_folder(folder, "train", "imagenet", SOURCE), image_size, threads, val_size)
    factory = partial(MODELS[model], len(data.classes), image_size, width, depth)
    std, embedding_std = (0.02, 0.02) if model == "vit_b16" else (None, EMBEDDING_STD)
    return Classification(
        factory, data, seed, steps=steps, batch=batch, lr=lr, augment=data.random_crops, std=std, embedding_std=embedding_std,
        evaluation_batch=EVALUATION_BATCH, stochastic=model == "efficientnet_b4",
    )  # fmt: skip
