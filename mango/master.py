"""bfloat16 parameters: rounded by chance, or with a correction beside them that makes 24- or 32-bit master weights.

float32 bits are the bfloat16's bits shifted up by 16, plus a signed rest of 16 bits: kept whole, training is that of
float32 exactly; kept as its upper 8 bits, with a mantissa of 15 (FlashOptim, Databricks 2026, sec. 3). Without a
correction the parameter is rounded stochastically, so that updates below half a unit are not lost (Zamirai et al. 2020).
"""

import math

import torch
from torch import Tensor

from mango import noise
from mango.codecs import BFloat16, Shape

MASTER_BITS = {16: None, 24: torch.int8, 32: torch.int16}   # dtype of the correction


def correction_bytes(param: Tensor, shape: Shape, master_bits: int) -> int:
    """Bytes of the correction of the parameter, or of a part of it of this shape: none but for bfloat16 ones."""
    return math.prod(shape) * (master_bits - 16) // 8 if param.dtype == torch.bfloat16 else 0


def new_correction(param: Tensor, master_bits: int) -> Tensor | None:
    """A zero correction, or None where there is to be none."""
    dtype = MASTER_BITS[master_bits]
    if dtype is None or param.dtype != torch.bfloat16:
        return None
    return torch.zeros(param.shape, dtype=dtype, device=param.device)


def refit(correction: Tensor | None, param: Tensor, master_bits: int) -> Tensor | None:
    """A loaded correction, made by a parameter of another dtype or with other `master_bits`, as this parameter needs it."""
    wanted = new_correction(param, master_bits)
    if wanted is None or correction is None or correction.dtype == wanted.dtype:
        return None if wanted is None else wanted if correction is None else correction
    narrowed = ((correction.int() + 128) >> 8).clamp_(max=127)
    return wanted.copy_(narrowed if wanted.dtype == torch.int8 else correction.int() * 256)


def join(param: Tensor, correction: Tensor | None) -> Tensor:
    """The parameter in float32 (float64 stays). float32 and float64 parameters are given themselves, to be updated in place."""
    if param.dtype in (torch.float32, torch.float64):
        return param.detach()
    dense = param.detach().float()
    if correction is None:
        return dense
    unit = 1 if correction.dtype == torch.int16 else 256
    return (dense.view(torch.int32) + correction.int() * unit).view(torch.float32)


def store(dense: Tensor, param: Tensor, correction: Tensor | None, key: int) -> None:
    """Undo `join`: round into the parameter and its correction, in place."""
    if dense.dtype == param.dtype:
        return
    if param.dtype != torch.bfloat16:
        param.detach().copy_(dense)
    elif correction is None:
        param.detach().copy_(BFloat16().encode(dense, noise.split(key, noise.PARAM)).parts["values"])
    else:
        whole = dense.view(torch.int32)
        upper = (whole + 0x8000) & -65536                    # halves away from zero: every rest fits into 16 bits
        rest = whole - upper
        correction.copy_(((rest + 128) >> 8).clamp_(max=127) if correction.dtype == torch.int8 else rest)
        param.detach().copy_(upper.view(torch.float32))
