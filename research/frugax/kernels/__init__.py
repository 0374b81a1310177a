"""Kernels, each beside a reference in plain JAX that says what it computes."""

from frugax.kernels.encode.api import encode
from frugax.kernels.hadamard_quantize.api import hadamard_quantize
from frugax.kernels.hadamard_quantize.options import Copy, Rounded
from frugax.kernels.linear_cross_entropy.api import linear_cross_entropy
from frugax.kernels.quantize_matmul.api import Quantized, quantize_matmul
from frugax.kernels.quantized_matmul.api import quantized_matmul

__all__ = [
  'Copy',
  'Quantized',
  'Rounded',
  'encode',
  'hadamard_quantize',
  'linear_cross_entropy',
  'quantize_matmul',
  'quantized_matmul',
]
