"""Kernels, each beside a reference in plain JAX that says what it computes."""

from frugax.kernels.hadamard_quantize.api import hadamard_quantize
from frugax.kernels.hadamard_quantize.options import Copy, Rounded
from frugax.kernels.quantize_matmul.api import Quantized, quantize_matmul
from frugax.kernels.quantized_matmul.api import quantized_matmul

__all__ = [
  'Copy',
  'Quantized',
  'Rounded',
  'hadamard_quantize',
  'quantize_matmul',
  'quantized_matmul',
]
