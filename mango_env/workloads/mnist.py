"""`mnist_mlp` and `mnist_cnn`: a perceptron and a residual network on MNIST from `$MANGO_DATA`."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from mango_env.workloads.base import register_workload
from mango_env.workloads.cifar10 import ResidualNetwork
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import ImageData, check_positive, data_file, read_arrays
from mango_env.workloads.digits import multilayer_perceptron

FILE = "mnist.npz"
SOURCE = (
    "It holds the uint8 arrays train_x (60000, 28, 28), train_y, test_x (10000, 28, 28), test_y; "
    "make it with numpy.savez from the images in github.com/rasbt/mnist-pngs"
)
SIDE, CLASSES = 28, 10
MEAN, STD = 0.1307 * 255, 0.3081 * 255                                         # of the training set


@lru_cache(maxsize=2)
def load_mnist(path: Path, val_size: int) -> ImageData:
    """The whole training set; at most `val_size` images from the start of the test set are held out."""
    check_positive(val_size=val_size)
    arrays = read_arrays(path, ("train_x", "train_y", "test_x", "test_y"))
    val_x, val_y = (arrays[f"test_{part}"][:val_size] for part in ("x", "y"))
    return grey_images(arrays["train_x"], arrays["train_y"], val_x, val_y, MEAN, STD)


def grey_images(
    train_x: NDArray[Any], train_y: NDArray[Any], val_x: NDArray[Any], val_y: NDArray[Any], mean: float, std: float
) -> ImageData:
    """Images (N, 28, 28) uint8 with their labels in ten classes; `mean` and `std` are of pixel levels."""
    return ImageData(
        torch.from_numpy(train_x).view(-1, 1, SIDE, SIDE),
        torch.from_numpy(train_y).long(),
        torch.from_numpy(val_x).view(-1, 1, SIDE, SIDE),
        torch.from_numpy(val_y).long(),
        torch.tensor(mean).view(1, 1, 1),
        torch.tensor(std).view(1, 1, 1),
        CLASSES,
    )


@register_workload("mnist_mlp")
def mnist_mlp(
    seed: int, *, steps: int = 500, batch: int = 128, width: int = 128, depth: int = 2, val_size: int = 2000, lr: float = 1e-3
) -> Classification:
    """A perceptron of 784-128-128-10, about 118,000 parameters."""
    data = load_mnist(data_file(FILE, "mnist_mlp", SOURCE), val_size)
    factory = partial(multilayer_perceptron, SIDE * SIDE, width, depth, CLASSES)
    return Classification(factory, data, seed, steps=steps, batch=batch, lr=lr)


@register_workload("mnist_cnn")
def mnist_cnn(
    seed: int, *, steps: int = 300, batch: int = 16, width: int = 20, depth: int = 1, val_size: int = 1000, lr: float = 2e-3
) -> Classification:
    """The residual network of `cifar10_cnn`, a little wider, about 121,000 parameters."""
    data = load_mnist(data_file(FILE, "mnist_cnn", SOURCE), val_size)
    factory = partial(ResidualNetwork, width, depth, CLASSES, channels=1)
    return Classification(factory, data, seed, steps=steps, batch=batch, lr=lr)
