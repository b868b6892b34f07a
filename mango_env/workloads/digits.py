"""`digits_mlp` and `digits_cnn`: the 1,797 handwritten 8x8 digits that scikit-learn carries. No download."""

from functools import lru_cache, partial

import torch
from torch import nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import ImageData, check_positive

SIDE, CLASSES = 8, 10


@lru_cache(maxsize=1)
def load_digits() -> ImageData:
    """The images as uint8 levels 0..16; every fifth image is held out, so that all writers are on both sides."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError('the digits workloads need scikit-learn: pip install "mango-optim[train]"') from error
    bunch = load()
    pixels = torch.from_numpy(bunch.data.astype("uint8")).view(-1, 1, SIDE, SIDE)
    labels = torch.from_numpy(bunch.target.astype("int64"))
    held_out = torch.arange(len(labels)) % 5 == 4
    train_x, val_x = pixels[~held_out], pixels[held_out]
    mean, std = train_x.float().mean().view(1, 1, 1), train_x.float().std().view(1, 1, 1)
    return ImageData(train_x, labels[~held_out], val_x, labels[held_out], mean, std, CLASSES)


def multilayer_perceptron(inputs: int, width: int, depth: int, classes: int) -> nn.Module:
    """`depth` hidden ReLU layers of `width` units."""
    check_positive(width=width, depth=depth)
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i in range(depth):
        layers += [(f"hidden{i}", nn.Linear(inputs if i == 0 else width, width)), (f"relu{i}", nn.ReLU())]
    return _named([*layers, ("head", nn.Linear(width, classes))])


def digits_network(width: int) -> nn.Module:
    """Three 3x3 convolutions (8x8, 8x8, 4x4) and a linear layer."""
    check_positive(width=width)
    return _named([
        ("conv0", nn.Conv2d(1, width, 3, padding=1)), ("relu0", nn.ReLU()),
        ("conv1", nn.Conv2d(width, width, 3, padding=1)), ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)), ("relu2", nn.ReLU()),
        ("pool", nn.AvgPool2d(2)), ("flatten", nn.Flatten()),
        ("head", nn.Linear(8 * width, CLASSES)),
    ])  # fmt: skip


@register_workload("digits_mlp")
def digits_mlp(
    seed: int, *, steps: int = 200, batch: int = 64, width: int = 128, depth: int = 2, lr: float = 2e-3
) -> Classification:
    """A perceptron of 64-128-128-10: about 26,000 parameters, three layers with 1,024 weights or more."""
    factory = partial(multilayer_perceptron, SIDE * SIDE, width, depth, CLASSES)
    return Classification(factory, load_digits(), seed, steps=steps, batch=batch, lr=lr, batchable=True)


@register_workload("digits_cnn")
def digits_cnn(seed: int, *, steps: int = 200, batch: int = 64, width: int = 24, lr: float = 2e-3) -> Classification:
    """Three convolutions and a linear layer, about 18,000 parameters."""
    return Classification(partial(digits_network, width), load_digits(), seed, steps=steps, batch=batch, lr=lr)


def _named(layers: list[tuple[str, nn.Module]]) -> nn.Module:
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return model
