"""`gpt2`: GPT-2 of 124, 355 or 774 million parameters (Radford et al. 2019) on texts of `$MANGO_DATA` as its own tokens."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mango_env.workloads.base import register_workload
from mango_env.workloads.bpe import ALL_MERGES, load_tokens
from mango_env.workloads.data import check_positive
from mango_env.workloads.text import TokenModel
from mango_env.workloads.transformer import Block

EMBEDDING_STD = 0.02
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Size:
    """A published size and a good AdamW learning rate for it."""

    width: int
    depth: int
    heads: int
    lr: float
    merges: int = ALL_MERGES


SIZES = {
    "tiny": Size(48, 2, 2, 3e-3, merges=1000),                                 # for tests: 0.1 M parameters
    "124M": Size(768, 12, 12, 6e-4),
    "355M": Size(1024, 24, 16, 3e-4),
    "774M": Size(1280, 36, 20, 2.5e-4),
}


class GPT2(nn.Module):
    """A decoder with learned positions; the head is the embedding itself, one tensor under one name.

    `recompute`: keep only each block's input and compute the rest again in the backward pass.
    """

    def __init__(
        self, width: int, depth: int, heads: int, context: int, vocabulary: int, dropout: float = 0.0, recompute: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.embed_position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, None, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:                               # (B, T) int64
        x = self.dropout(self.embed(tokens) + self.embed_position.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = run_block(block, x, self.recompute and self.training)
        return F.linear(self.norm(x), self.embed.weight)                       # (B, T, V)


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """`block(x)`, of which with `recompute` only `x` is kept for the backward pass."""
    y: Tensor = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return y


def size_of(sizes: dict[str, Size], size: str, reader: str) -> Size:
    """The size of that name."""
    if size not in sizes:
        raise ValueError(f"unknown size {size!r} of workload {reader!r}; known: {', '.join(sizes)}")
    return sizes[size]


def dtype_of(name: str, reader: str) -> torch.dtype:
    """The dtype of the parameters by its name."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r} of workload {reader!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


@torch.no_grad()
def scale_residuals(model: nn.Module, depth: int) -> None:
    """What blocks add begins smaller by the root of how often something is added (Radford et al. 2019, sec. 2.3)."""
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down.weight")):
            parameter.mul_((2 * depth) ** -0.5)


@register_workload("gpt2")
def gpt2(
    seed: int,
    *,
    size: str = "124M",
    data: str = "books",
    steps: int = 1000,
    batch: int = 4,
    context: int = 1024,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    merges: int | None = None,
    dropout: float = 0.0,
    recompute: bool = False,
    dtype: str = "float32",
    val_windows: int = 64,
    lr: float | None = None,
) -> TokenModel:
    """GPT-2 by `size`: 124M, 355M, 774M, or tiny; `width`, `depth` and `heads` replace those of the size.

    `data`: books, or wikitext2, which trains on the validation part and holds out the test part, so that it is no
    WikiText-2 result. `merges` below 50,000 gives a smaller vocabulary, `dtype="bfloat16"` bfloat16 parameters.
    """
    chosen = size_of(SIZES, size, "gpt2")
    width, depth, heads = width or chosen.width, depth or chosen.depth, heads or chosen.heads
    merges = chosen.merges if merges is None else merges
    check_positive(merges=merges)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} must be in [0, 1)")
    network = partial(GPT2, vocabulary=merges + 257, dropout=dropout, recompute=recompute)
    sizes = {"batch": batch, "context": context, "width": width, "depth": depth, "heads": heads}
    workload = TokenModel(
        load_tokens(data, "gpt2", merges), seed, network, dtype_of(dtype, "gpt2"), dropout > 0, steps=steps,
        lr=chosen.lr if lr is None else lr, val_windows=val_windows, embedding_std=EMBEDDING_STD, **sizes,
    )  # fmt: skip
    scale_residuals(workload.model, depth)
    return workload
