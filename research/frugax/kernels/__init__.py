"""Kernels, each beside a reference in plain JAX that says what it computes."""

from frugax.kernels.quantize_matmul.api import Quantized, quantize_matmul
from frugax.kernels.quantized_matmul.api import quantized_matmul

__all__ = ['Quantized', 'quantize_matmul', 'quantized_matmul']
