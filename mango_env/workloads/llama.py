"""`llama`: LLaMA (Touvron et al. 2023) in the sizes of GaLore's pre-training table (Zhao et al. 2024, table 5), 60M to 7B."""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mango_env.workloads.base import register_workload
from mango_env.workloads.bpe import load_tokens
from mango_env.workloads.data import check_positive
from mango_env.workloads.gpt2 import EMBEDDING_STD, Size, dtype_of, run_block, scale_residuals, size_of
from mango_env.workloads.text import TokenModel
from mango_env.workloads.transformer import angles, rotate

MERGES = 31_743                                                                # 32,000 tokens, as many as LLaMA's own vocabulary
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LlamaSize(Size):
    """With the width inside the feed-forward part."""

    merges: int = MERGES
    inner: int = 0


SIZES: dict[str, Size] = {
    "tiny": LlamaSize(48, 2, 2, 3e-3, merges=1000, inner=128),                 # for tests: 0.2 M parameters
    "60M": LlamaSize(512, 8, 8, 1e-3, inner=1376),
    "130M": LlamaSize(768, 12, 12, 1e-3, inner=2048),
    "350M": LlamaSize(1024, 24, 16, 5e-4, inner=2736),
    "1B": LlamaSize(2048, 24, 32, 5e-4, inner=5461),
    "7B": LlamaSize(4096, 32, 32, 3e-4, inner=11008),
}


class RotaryAttention(nn.Module):
    """Causal self-attention without biases; queries and keys are rotated by their position (Su et al. 2021, sec. 3.4.2)."""

    rotation: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width={width} must be a multiple of 2 heads, {2 * heads}: queries are rotated in pairs")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.register_buffer("rotation", angles(context, width // heads // 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:                                    # (B, T, W)
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)          # (B, H, T, W/H)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.rotation[:, : x.shape[1]].to(x.dtype)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        y: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return y


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, sec. 2): one projection gates another."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, context: int) -> None:
        super().__init__()
        self.norm_attn = nn.RMSNorm(width, EPS)
        self.attn = RotaryAttention(width, heads, context)
        self.norm_mlp = nn.RMSNorm(width, EPS)
        self.mlp = GatedFeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_attn(x))
        y: Tensor = x + self.mlp(self.norm_mlp(x))
        return y


class Llama(nn.Module):
    """A decoder of RMS norms, rotated attention and gated feed-forward parts, without biases; the head is a matrix of its own."""

    def __init__(
        self, width: int, depth: int, heads: int, context: int, inner: int, vocabulary: int, recompute: bool = False
    ) -> None:
        super().__init__()
        check_positive(inner=inner, vocabulary=vocabulary)
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, inner, context) for _ in range(depth))
        self.norm = nn.RMSNorm(width, EPS)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:                               # (B, T) int64
        x = self.embed(tokens)
        for block in self.blocks:
            x = run_block(block, x, self.recompute and self.training)
        logits: Tensor = self.head(self.norm(x))                               # (B, T, V)
        return logits


@register_workload("llama")
def llama(
    seed: int,
    *,
    size: str = "60M",
    data: str = "books",
    steps: int = 1000,
    batch: int = 8,
    context: int = 256,
    depth: int | None = None,
    merges: int | None = None,
    recompute: bool = False,
    dtype: str = "float32",
    val_windows: int = 64,
    lr: float | None = None,
) -> TokenModel:
    """LLaMA by `size`: 60M, 130M, 350M, 1B, 7B, or tiny; `depth` blocks instead of the size's own.

    Tokens are GPT-2's, the first 32,000 of them (`merges` changes that); `data` is that of `gpt2`. `dtype="bfloat16"` gives
    bfloat16 parameters, `recompute=True` keeps few activations.
    """
    chosen = size_of(SIZES, size, "llama")
    assert isinstance(chosen, LlamaSize)
    depth, merges = depth or chosen.depth, chosen.merges if merges is None else merges
    check_positive(merges=merges)
    network = partial(Llama, inner=chosen.inner, vocabulary=merges + 257, recompute=recompute)
    sizes = {"batch": batch, "context": context, "width": chosen.width, "depth": depth, "heads": chosen.heads}
    workload = TokenModel(
        load_tokens(data, "llama", merges), seed, network, dtype_of(dtype, "llama"), steps=steps,
        lr=chosen.lr if lr is None else lr, val_windows=val_windows, embedding_std=EMBEDDING_STD, **sizes,
    )  # fmt: skip
    scale_residuals(workload.model, depth)
    return workload
