"""`fashion_cnn` and `fashion_vit`: Fashion-MNIST from `$MANGO_DATA`. Held out: for the final evaluation alone."""

from functools import lru_cache, partial
from pathlib import Path

from mango_env.workloads.base import register_workload
from mango_env.workloads.cifar10 import ResidualNetwork
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import ImageData, check_positive, data_file, read_arrays
from mango_env.workloads.mnist import CLASSES, SIDE, grey_images
from mango_env.workloads.vit import EMBEDDING_STD, VisionTransformer

SOURCE = (
    "It holds the uint8 arrays x (60000 or 10000, 28, 28) and y; "
    "make it with numpy.savez from the images of github.com/zalandoresearch/fashion-mnist"
)
MEAN, STD = 0.2860 * 255, 0.3530 * 255                                         # of the training set


@lru_cache(maxsize=2)
def load_fashion(train: Path, test: Path, val_size: int) -> ImageData:
    """The whole training set; the first `val_size` test images are held out (classes in balance)."""
    arrays = [read_arrays(path, ("x", "y")) for path in (train, test)]
    return grey_images(arrays[0]["x"], arrays[0]["y"], arrays[1]["x"][:val_size], arrays[1]["y"][:val_size], MEAN, STD)


def fashion_images(reader: str, val_size: int) -> ImageData:
    """The images from `$MANGO_DATA` for the workload `reader`."""
    check_positive(val_size=val_size)
    train, test = (data_file(f"fashion_mnist_{part}.npz", reader, SOURCE) for part in ("train", "test"))
    return load_fashion(train, test, val_size)


@register_workload("fashion_cnn")
def fashion_cnn(
    seed: int, *, steps: int = 300, batch: int = 16, width: int = 20, depth: int = 1, val_size: int = 1000, lr: float = 2e-3
) -> Classification:
    """The residual network of `cifar10_cnn`, a little wider, about 121,000 parameters.

    Held out: no policy is trained on it, it is for the final evaluation.
    """
    factory = partial(ResidualNetwork, width, depth, CLASSES, channels=1)
    return Classification(factory, fashion_images("fashion_cnn", val_size), seed, steps=steps, batch=batch, lr=lr)


@register_workload("fashion_vit")
def fashion_vit(
    seed: int,
    *,
    steps: int = 400,
    batch: int = 16,
    patch: int = 4,
    width: int = 96,
    depth: int = 3,
    heads: int = 4,
    val_size: int = 1000,
    lr: float = 5e-4,
) -> Classification:
    """The vision transformer of `cifar10_vit` on 7x7 patches, about 343,000 parameters.

    Held out: no policy is trained on it, it is for the final evaluation.
    """
    factory = partial(VisionTransformer, 1, SIDE, patch, width, depth, heads, CLASSES)
    data = fashion_images("fashion_vit", val_size)
    return Classification(factory, data, seed, steps=steps, batch=batch, lr=lr, embedding_std=EMBEDDING_STD)
