"""Promises of the earlier public compressor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mango.compression import GradientCompressor

compressor = GradientCompressor()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 10, 16, 24])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_a10_adaptive_quantize_is_symmetric_absmax_bit_for_bit(bits: int, scale: float) -> None:
    g = gaussian(57, 33) * scale
    s = g.abs().max() / (2 ** (bits - 1) - 1)
    assert torch.equal(compressor.adaptive_quantize(g, bits), torch.round(g / s) * s)


def test_a10_numpy_agrees_bit_for_bit() -> None:
    g = gaussian(1000)
    s = np.abs(g.numpy()).max() / np.float32(127)
    assert np.array_equal(compressor.adaptive_quantize(g, 8).numpy(), np.rint(g.numpy() / s) * s)


def test_a10_zeros_stay_zeros_and_32_bits_change_nothing() -> None:
    for bits in (2, 4, 8, 16, 32):
        assert torch.equal(compressor.adaptive_quantize(torch.zeros(5), bits), torch.zeros(5))
        assert compressor.adaptive_quantize(torch.empty(0, 3), bits).shape == (0, 3)
    assert torch.equal(compressor.adaptive_quantize(gaussian(9), 32), gaussian(9))
    smallest = torch.full((4,), 1e-45)                   # its scale underflows to zero
    assert compressor.adaptive_quantize(smallest, 8).isfinite().all()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300), st.sampled_from([8, 16]))
@settings(max_examples=60, deadline=None)
def test_a10_error_is_at_most_half_a_bin(values: list[float], bits: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    half_bin = 0.5 * x.abs().max() / (2 ** (bits - 1) - 1)
    error = (compressor.adaptive_quantize(x, bits) - x).abs().max()
    # the codes are exact to one rounding each of x / s and of the product: 2^(bits-1) bins times 2^-23
    assert error <= half_bin * (1 + 2.0 ** (bits - 21)) + torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("n", [1, 7, 64, 1000, 4097])
def test_a11_extreme_mode_keeps_exactly_n_bits_over_32_entries(bits: int, n: int) -> None:
    g = gaussian(n)
    compressed, _ = compressor.compress(g, bits, 0.0)
    assert int((compressed != 0).sum()) == int(n * bits / 32)
    assert torch.equal(compressed, compressor.adaptive_quantize(g, bits))


def test_a11_the_survivors_are_the_largest_and_unchanged() -> None:
    g = gaussian(64, 5)
    compressed, error = compressor.compress(g, 4, 0.0)
    kept = compressed != 0
    assert torch.equal(compressed[kept], g[kept])
    assert g[kept].abs().min() >= g[~kept].abs().max()
    assert torch.equal(error, torch.where(kept, 0.0, g))


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a12_importance_changes_which_entries_survive(bits: int) -> None:
    g = gaussian(1000).abs() + 0.5
    importance = torch.linspace(10, 0.1, 1000)
    plain, _ = compressor.compress(g, bits, 0.9)
    weighted, _ = compressor.compress(g, bits, 0.9, importance)
    assert int((plain != 0).sum()) == int((weighted != 0).sum()) == 100
    survivors = (weighted != 0).nonzero().squeeze(1)
    assert torch.equal(survivors, (g * importance).topk(100).indices.sort().values)
    assert not torch.equal(plain != 0, weighted != 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [1, 10, 999, 5000])
def test_a8_sparsity_is_the_exact_fraction_of_zeros_even_among_equals(sparsity: float, n: int) -> None:
    for g in (gaussian(n), torch.ones(n), torch.ones(n) * torch.tensor([1.0, -1.0]).repeat(n)[:n]):
        compressed, _ = compressor.compress(g, 32, sparsity)
        assert int((compressed == 0).sum()) == int(n * sparsity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("bits", "sparsity"), [(32, 0.0), (16, 0.5), (8, 0.0), (8, 0.9), (4, 0.0), (2, 0.99)])
def test_shape_dtype_and_input_stay_and_error_adds_up(dtype: torch.dtype, bits: int, sparsity: float) -> None:
    for shape in ((), (0,), (3, 0, 2), (1,), (4, 3, 2)):
        g = gaussian(*shape).to(dtype)
        before = g.clone()
        compressed, error = compressor.compress(g, bits, sparsity)
        assert (compressed.shape, compressed.dtype) == (error.shape, error.dtype) == (g.shape, dtype)
        assert torch.equal(g, before)
        assert compressed.data_ptr() != g.data_ptr() or g.numel() == 0
        assert torch.equal(error, g - compressed)


def test_non_contiguous_tensors_and_parameters_are_read_in_place() -> None:
    g = torch.nn.Parameter(gaussian(8, 6))
    compressed, _ = compressor.compress(g.T, 8, 0.5)
    assert torch.equal(compressed, compressor.compress(g.T.contiguous(), 8, 0.5)[0])
    assert not compressed.requires_grad


@pytest.mark.parametrize("bits", [0, 1, 33, 7.5, math.nan, -8])
def test_bits_outside_2_to_32_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"2\.\.32"):
        compressor.compress(torch.ones(3), bits, 0.0)


def test_bad_sparsity_importance_and_tensors_are_refused() -> None:
    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="sparsity_ratio"):
            compressor.compress(torch.ones(3), 8, sparsity)
    with pytest.raises(ValueError, match=r"importance_scores have the shape \(2,\)"):
        compressor.compress(torch.ones(3), 8, 0.5, torch.ones(2))
    with pytest.raises(TypeError, match="floating-point"):
        compressor.compress(torch.ones(3, dtype=torch.int64), 8, 0.5)


def test_a25_a_subclass_needs_only_compress() -> None:
    class MyCustomCompressor(GradientCompressor):
        def compress(
            self, tensor: Tensor, bits: int, sparsity_ratio: float, importance_scores: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            compressed_tensor = tensor.sign() * tensor.abs().mean()
            compression_error = tensor - compressed_tensor
            return compressed_tensor, compression_error

    compressed, error = MyCustomCompressor().compress(gaussian(10), 1, 0.0)
    assert torch.allclose(compressed + error, gaussian(10))
