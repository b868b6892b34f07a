"""Noise for stochastic rounding: a key and a position in, a number out. Nothing is kept, so resuming needs no state.

Positions are hashed by the finaliser of MurmurHash3 (Appleby 2011). `mango/native.c` and the Triton kernels draw the same
numbers, so that a kernel and its PyTorch twin round alike, on any device and with any number of threads.
"""

import torch
from torch import Generator, Tensor

_MASK, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9
BLOCK = 256                                                  # positions that share a base; their halves share a hash
MOMENTUM, VARIANCE, PARAM, RESIDUAL, GRADIENT, PROJECTOR, SKETCH, REFERENCE = range(1, 9)  # what a key is split for


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & _MASK
    x ^= x >> 13
    x = x * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def split(key: int, number: int) -> int:
    """Another key, for a different purpose: 32 bits.

    >>> split(1, MOMENTUM) != split(1, VARIANCE)
    True
    """
    return _mix((key + number) & _MASK)


def step_key(seed: int, tensor: int, step: int) -> int:
    """The key of one tensor's update at one step."""
    return (_mix((_mix(seed & _MASK) + tensor * _GOLDEN) & _MASK) + step * _GOLDEN) & _MASK


def uniform(n: int, key: int, device: torch.device | None = None) -> Tensor:
    """`n` numbers in (0, 1), multiples of 2^-16 plus 2^-17, float32 (n,).

    >>> bool((uniform(1000, key=1) == uniform(2000, key=1)[:1000]).all())
    True
    """
    base = _bases(torch.arange(-(-n // BLOCK), device=device) * BLOCK, key)        # (B,)
    lanes = torch.arange(BLOCK // 2, device=device) * _GOLDEN                      # (128,)
    bits = _mix_tensor((base[:, None] + lanes) & _MASK)                            # (B, 128)
    shares = torch.cat([bits & 0xFFFF, bits >> 16], 1)                             # (B, 256)
    return (shares.float() * 2.0**-16 + 2.0**-17).view(-1)[:n]


def _bases(start: Tensor, key: int) -> Tensor:
    """What the blocks that start at these positions count from: (B,) int64; beyond 2^32 positions the key is another."""
    high = start >> 32
    return torch.where(high > 0, _mix_tensor((key + high) & _MASK), key) + (start & _MASK) * _GOLDEN


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix` on int64 holding 32 bits; products wrap, and their low 32 bits are exact."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def generator(key: int, device: torch.device) -> Generator:
    """A torch generator that starts from a key, for normal samples."""
    return Generator(device).manual_seed(key)
