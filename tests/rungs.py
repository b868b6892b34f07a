"""Configs that tests name: the ladder's own may change with every measurement."""

from mango import CompressionConfig

M16V8 = CompressionConfig(momentum_bits=16, variance_bits=8)
M8V8 = CompressionConfig(momentum_bits=8, variance_bits=8)
M8V4 = CompressionConfig(momentum_bits=8, variance_bits=4)
M4V4 = CompressionConfig(momentum_bits=4, variance_bits=4)
M4V0 = CompressionConfig(momentum_bits=4, variance_bits=0)
M2V0 = CompressionConfig(momentum_bits=2, variance_bits=0)
R8 = CompressionConfig(rank=8, factor_bits_p=4, factor_bits_q=4, variance_bits=0)
SPARSE = CompressionConfig(gradient_bits=4, sparsity=0.9, momentum_bits=8, variance_bits=8)
