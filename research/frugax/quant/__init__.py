"""Number formats: arrays in few bits, as pytrees."""

from frugax.quant.blocks import FORMATS, QTensor, dequantize, quantize

__all__ = ['FORMATS', 'QTensor', 'dequantize', 'quantize']
