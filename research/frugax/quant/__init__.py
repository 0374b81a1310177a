"""Number formats: arrays in few bits, as pytrees."""

from frugax.quant.api import FORMATS, GRANULARITIES, dequantize, quantize
from frugax.quant.blocks import AFFINE, Blocks
from frugax.quant.codecs import CODECS, Codec, Coded, decode, encode
from frugax.quant.elements import ELEMENTS, Element, element
from frugax.quant.hadamard import hadamard
from frugax.quant.qtensor import QTensor
from frugax.quant.rounding import random_bits, round_stochastic
from frugax.quant.tiles import Scaling, Tiled, dequantize_tiles, quantize_tiles

__all__ = [
  'AFFINE',
  'CODECS',
  'ELEMENTS',
  'FORMATS',
  'GRANULARITIES',
  'Blocks',
  'Codec',
  'Coded',
  'Element',
  'QTensor',
  'Scaling',
  'Tiled',
  'decode',
  'dequantize',
  'dequantize_tiles',
  'element',
  'encode',
  'hadamard',
  'quantize',
  'quantize_tiles',
  'random_bits',
  'round_stochastic',
]
