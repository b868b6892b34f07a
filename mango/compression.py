"""The earlier public compressor: a dense tensor in, a dense tensor and its error out. Subclass it to bring your own.

It changes values, not storage; what the optimizer stores packed is in `mango.codecs`.
"""

import torch
from torch import Tensor


class GradientCompressor:
    """Sparsify, then quantise. A subclass overrides `compress` and is given to the optimizer as `compressor=`.

    >>> GradientCompressor().compress(torch.tensor([1.0, -127.0, 0.2]), bits=8, sparsity_ratio=0.0)[0].tolist()
    [1.0, -127.0, 0.0]
    """

    def compress(
        self, tensor: Tensor, bits: int, sparsity_ratio: float, importance_scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The compressed tensor and the compression error `tensor - compressed`; shape, dtype and device stay.

        `sparsity_ratio` s in [0, 1): exactly int(n s) entries become zero. From 8 bits on the rest is quantised
        (`adaptive_quantize`); below, int(n bits / 32) entries survive as they are, as many as would fit into the bytes.
        What survives has the largest |x|, or the largest |x| * importance where `importance_scores` (same shape, >= 0) are given.
        """
        _check(tensor, bits)
        if not 0 <= sparsity_ratio < 1:
            raise ValueError(f"sparsity_ratio={sparsity_ratio!r} is not a fraction in [0, 1)")
        n = tensor.numel()
        kept = n - int(n * sparsity_ratio)
        if bits < 8:
            kept = min(kept, int(n * bits / 32))
        compressed = self.keep_largest(tensor, kept, importance_scores)
        if bits >= 8:
            compressed = self.adaptive_quantize(compressed, bits)
        return compressed, tensor - compressed

    def adaptive_quantize(self, tensor: Tensor, bits: int) -> Tensor:
        """Symmetric absmax quantisation: round(x / s) * s, s = max|x| / (2^(bits-1) - 1); 32 bits change nothing.

        Below 8 bits a grid over the whole range loses the signal, so there int(n bits / 32) entries survive unquantised instead.
        A tensor of zeros stays one. Half precision is computed in float32 and rounded once.
        """
        _check(tensor, bits)
        if bits == 32 or tensor.numel() == 0:
            return tensor.detach().clone()
        if bits < 8:
            return self.keep_largest(tensor, int(tensor.numel() * bits / 32))
        x = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
        scale = x.abs().max() / (2 ** (bits - 1) - 1)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)          # zeros, or too small for a scale: all to zero
        quantised: Tensor = (x / safe).round() * scale
        return quantised.to(tensor.dtype)

    def keep_largest(self, tensor: Tensor, count: int, importance_scores: Tensor | None = None) -> Tensor:
        """A copy with all but `count` entries zeroed; of equal entries exactly as many stay as there is room for."""
        flat = tensor.detach().reshape(-1)
        score = flat.abs()
        if importance_scores is not None:
            if importance_scores.shape != tensor.shape:
                found, expected = tuple(importance_scores.shape), tuple(tensor.shape)
                raise ValueError(f"importance_scores have the shape {found}; the tensor has {expected}")
            score = score.float() * importance_scores.detach().reshape(-1).float()
        if count >= flat.numel():
            return tensor.detach().clone()
        kept = score.topk(max(count, 0), sorted=False).indices
        return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(tensor.shape)


def _check(tensor: Tensor, bits: int) -> None:
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise TypeError(f"only dense floating-point tensors are compressed; got {tensor.dtype}, layout {tensor.layout}")
    if not 2 <= bits <= 32 or int(bits) != bits:
        raise ValueError(f"bits={bits!r} is not an integer in 2..32")
