"""Number formats: arrays in few bits, as pytrees."""

from frugax.quant.blocks import FORMATS, QTensor, dequantize, quantize
from frugax.quant.codecs import CODECS, Codec, Coded, decode, encode
from frugax.quant.rounding import random_bits, round_stochastic

__all__ = [
  'CODECS',
  'FORMATS',
  'Codec',
  'Coded',
  'QTensor',
  'decode',
  'dequantize',
  'encode',
  'quantize',
  'random_bits',
  'round_stochastic',
]
