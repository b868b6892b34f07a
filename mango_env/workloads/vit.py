"""`cifar10_vit` and `mnist_vit`: a small vision transformer on the images of `cifar10_cnn` and of `mnist_mlp`."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.cifar10 import CLASSES, SIDE, cifar10_images, crop_and_flip
from mango_env.workloads.classification import Classification
from mango_env.workloads.data import check_positive, data_file
from mango_env.workloads.mnist import FILE, SOURCE, load_mnist
from mango_env.workloads.mnist import SIDE as MNIST_SIDE
from mango_env.workloads.transformer import Block

EMBEDDING_STD = 0.2                                                            # of positions, beside Kaiming normal linear layers


class VisionTransformer(nn.Module):
    """Square patches, learned positions, `depth` blocks that look both ways, and a head on the mean over patches.

    A plain ViT (Dosovitskiy et al. 2021, sec. 3.1), by default without a class token (Beyer et al. 2022, sec. 2): with one,
    the head reads that token.
    """

    def __init__(
        self, channels: int, side: int, patch: int, width: int, depth: int, heads: int, classes: int, class_token: bool = False
    ) -> None:
        super().__init__()
        check_positive(patch=patch, width=width, depth=depth, heads=heads)
        if side % patch:
            raise ValueError(f"patch={patch} must divide the side of the images, {side}")
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, width)
        self.embed_class = nn.Embedding(1, width) if class_token else None
        self.embed_position = nn.Embedding((side // patch) ** 2 + class_token, width)
        self.blocks = nn.ModuleList(Block(width, heads, context=None, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:                                    # (B, C, side, side)
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)  # (B, N, C patch²)
        x = self.embed(patches)                                                # (B, N, W)
        if self.embed_class is not None:
            x = torch.cat([self.embed_class.weight.expand(len(x), 1, -1), x], 1)  # (B, 1 + N, W)
        x = x + self.embed_position.weight
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x.mean(1) if self.embed_class is None else x[:, 0])  # (B, classes)
        return logits


@register_workload("cifar10_vit")
def cifar10_vit(
    seed: int,
    *,
    steps: int = 500,
    batch: int = 16,
    patch: int = 4,
    width: int = 96,
    depth: int = 3,
    heads: int = 4,
    val_size: int = 1000,
    tiny: bool = False,
    lr: float = 5e-4,
) -> Classification:
    """Three blocks on patches of 4x4 pixels, about 348,000 parameters.

    `tiny=True` reads the 2,000 images of `cifar10_tiny.npz` instead of the whole set.
    """
    factory = partial(VisionTransformer, 3, SIDE, patch, width, depth, heads, CLASSES)
    data = cifar10_images("cifar10_vit", val_size, tiny)
    return Classification(
        factory, data, seed, steps=steps, batch=batch, lr=lr, augment=crop_and_flip, embedding_std=EMBEDDING_STD
    )  # fmt: skip


@register_workload("mnist_vit")
def mnist_vit(
    seed: int,
    *,
    steps: int = 300,
    batch: int = 16,
    patch: int = 4,
    width: int = 48,
    depth: int = 2,
    heads: int = 4,
    val_size: int = 2000,
    lr: float = 5e-4,
) -> Classification:
    """Two blocks on 7x7 patches, about 61,000 parameters."""
    data = load_mnist(data_file(FILE, "mnist_vit", SOURCE), val_size)
    factory = partial(VisionTransformer, 1, MNIST_SIDE, patch, width, depth, heads, CLASSES)
    return Classification(factory, data, seed, steps=steps, batch=batch, lr=lr, embedding_std=EMBEDDING_STD)
