"""What the small transformers are made of: attention within a sequence and to another one, feed-forward, and their blocks.

Every part sits behind a norm and around a skip. Layers carry the names by which `mango.layers` tells their kind.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention, causal or in both directions, of sequences of at most `context`.

    Positions enter by rotating queries and keys (Su et al. 2021, sec. 3.4.2); with `context=None` they do not enter.
    While training, a share `dropout` of what is read is dropped.
    """

    rotation: Tensor | None

    def __init__(self, width: int, heads: int, context: int | None, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width={width} must be a multiple of 2 heads, {2 * heads}: queries are rotated in pairs")
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("rotation", None if context is None else angles(context, width // heads // 2), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:        # (B, T, W); (B, 1, 1, T) bool: what may be read
        batch, context, width = x.shape
        q, k, v = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, W/H)
        if self.rotation is not None:
            cos, sin = self.rotation[:, :context]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=self.causal)
        y: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, context, width))
        return y


def angles(context: int, pairs: int) -> Tensor:
    """Cosines and sines by which each pair of a query or key is rotated at each position, float32."""
    angle = torch.arange(context)[:, None] * 10_000.0 ** (-torch.arange(pairs, dtype=torch.float32) / pairs)  # (T, W/H/2) radians
    return torch.stack([angle.cos(), angle.sin()])                             # (2, T, W/H/2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of entries of `x`, one from each half, turned by its angle."""
    a, b = x.chunk(2, -1)                                                      # (B, H, T, W/H/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class CrossAttention(nn.Module):
    """Attention of one sequence to another, `memory` (Vaswani et al. 2017, sec. 3.2.3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:      # (B, T, W), (B, S, W), (B, 1, 1, S) bool
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)                   # (B, H, T or S, W/H)
            for y in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Block(nn.Module):
    """Attention and feed-forward; while training, a share `dropout` of what each adds is dropped."""

    def __init__(self, width: int, heads: int, context: int | None, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(width)
        self.attn = Attention(width, heads, context, causal, dropout)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_attn(x), mask))
        y: Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return y


class DecoderBlock(nn.Module):
    """Causal attention, attention to `memory`, and feed-forward."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(width)
        self.attn = Attention(width, heads, context)
        self.norm_cross = nn.LayerNorm(width)
        self.cross = CrossAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm_attn(x))
        x = x + self.cross(self.norm_cross(x), memory, mask)
        y: Tensor = x + self.mlp(self.norm_mlp(x))
        return y
