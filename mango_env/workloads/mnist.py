"""`mnist_mlp`: a perceptron on MNIST from `$MANGO_DATA`."""

from functools import lru_cache, partial
from pathlib import Path

import torch

from mango_env.workloads.base import register_workload
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
    return ImageData(
        torch.from_numpy(arrays["train_x"]).view(-1, 1, SIDE, SIDE),
        torch.from_numpy(arrays["train_y"]).long(),
        torch.from_numpy(arrays["test_x"][:val_size]).view(-1, 1, SIDE, SIDE),
        torch.from_numpy(arrays["test_y"][:val_size]).long(),
        torch.tensor(MEAN).view(1, 1, 1),
        torch.tensor(STD).view(1, 1, 1),
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
