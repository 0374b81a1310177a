"""The recipes of the field, by name."""

import dataclasses
import re

from frugax import names
from frugax.lowbit.operands import (
  MASKED,
  Operand,
  Product,
  Recipe,
  Rotation,
)
from frugax.quant import ELEMENTS, Scaling

# The multiple of the root mean square at which clipping a normal distribution
# to this many bits, and rounding what is left, loses the least.
_QUEST = {
  1: 0.79788,
  1.58: 1.22401,  # three numbers: log2(3) bits
  2: 1.49353,
  3: 2.05107,
  4: 2.51393,
  5: 2.91609,
  6: 3.27660,
  7: 3.60105,
  8: 3.88494,
}
_QUEST_FP4 = 2.92247856
# What rounding MXFP4 to nearest takes from the product with what was rounded.
_QUARTET_GAIN = 1.009276

_MATRIX = (None, None)
_BLOCKS_OF_128 = Rotation(128)
_FORWARD = Operand(source='forward')


def recipe(name: str) -> Recipe:
  """The recipe of a name.

  X are the activations, W the weights, E the gradient of the result. "A scale a
  row" is along the axis that the product contracts. Unless told otherwise
  scales come from the largest magnitude and rounding is to nearest.

  - 'bf16', 'none': nothing is rounded; the products are those of the dtype.
  - 'int8': int8 in all three products with a scale a row; E stochastically.
  - 'int4': int4 in the forward product, int8 as above in the gradients.
  - 'fp8': X and W in E4M3, E in E5M2, one scale for all.
  - 'coat': the same, and norms and activation functions keep E4M3 in groups of
    16, their gradients E5M2 (`frugax.lowbit.flow`).
  - 'jetfire': int8 in blocks of 32 x 32; so are Y and, stochastically, X's
    gradient rounded, and what norms and activation functions keep.
  - 'fp8_block': E4M3 in groups of 128 (X, E) and blocks of 128 x 128 (W), the
    scales powers of two.
  - 'mxfp8': E4M3 in groups of 32 with the scales of MX, rounded up.
  - 'mxfp4' (Quartet): forward E2M1 in groups of 32 after a Hadamard rotation,
    clipped at 2.92 root mean squares; the gradients of those, after another
    rotation with fresh signs, stochastically and a third wider.
    'mxfp4_nearest' is its correction: to nearest, and 1.009276 times larger.
  - 'int16': the whole numbers of 16 bits with one power of two for each matrix;
    for their numerics, as no chip multiplies them.
  - 'nvfp4': E2M1 in groups of 16 (X, E) and blocks of 16 x 16 (W) with E4M3
    scales; E stochastically; X and E of W's gradient rotated in blocks of 16.
  - 'quest1' to 'quest8': X and W rotated in blocks of 128 and rounded to that
    many bits in the forward product, clipped where a normal distribution loses
    the least; gradients of the rounded operands where they can be trusted.
    'quest' is 'quest4', 'quest1.58' has three numbers, 'quest_fp4' E2M1 and
    'quest_fp4_sparse' two of four pairs of W besides; 'quest4_weights' rounds W
    alone, 'quest4_plain' does not rotate.
  - 'halo0', 'halo1', 'halo2': int8 with one scale for all in all three
    products; 1 rotates the forward product, 2 also the tokens of E for X's
    gradient. 'halo1_fp8' and 'halo1_fp6' are E4M3 and E3M2. For fine-tuning:
    int8 from scratch diverges.
  - 'b1.58': W ternary by its mean magnitude, X int8 with a scale a token, the
    gradients straight through; 'b1.58_median' by the median. 'trilm': W alone.
  - 'stable_spam_int4', 'stable_spam_fp4' ('int4_sim', 'fp4_sim'): simulated
    4-bit W and X in groups of 256, the two largest of X (fp4: of both) exact.
  - 'e{E}m{M}', as 'e2m1': W in the forward product and X's gradient, and X in
    W's, with a scale a row: the subset of the floating-point scaling law,
    which leaves X alone in the forward product, and E everywhere.
  - 'masked_e{E}m{M}', as 'masked_e8m3' or 'masked_e7m7': X, W and E as bfloat16
    with bits cut off, without a scale.
  - 'w8': the weights themselves are stored in int8 and trained without a copy
    in more bits (see `frugax.lowbit.store_weights`); the products are plain.

  Args:
    name: one of these.

  Returns:
    The recipe.

  Raises:
    ValueError: an unknown name, with the nearest valid one.

  Examples:
    >>> recipe('trilm').forward.right.format
    'ternary'
    >>> recipe('quest5').forward == recipe('quest4').forward
    False

  References:
    Panferov et al., `QuEST: Stable Training of LLMs with 1-Bit Weights and
    Activations <https://arxiv.org/abs/2502.05003>`_, 2025

    Ashkboos et al., `HALO: Hadamard-Assisted Lower-Precision Optimization for
    LLMs <https://arxiv.org/abs/2501.02625>`_, 2025

    Castro et al., `Quartet: Native FP4 Training Can Be Optimal for Large
    Language Models <https://arxiv.org/abs/2505.14669>`_, 2025

    NVIDIA, `Pretraining Large Language Models with NVFP4
    <https://arxiv.org/abs/2509.25149>`_, 2025

    DeepSeek-AI, `DeepSeek-V3 Technical Report
    <https://arxiv.org/abs/2412.19437>`_, 2024

    Micikevicius et al., `FP8 Formats for Deep Learning
    <https://arxiv.org/abs/2209.05433>`_, 2022

    Ma et al., `The Era of 1-bit LLMs: All Large Language Models are in 1.58
    Bits <https://arxiv.org/abs/2402.17764>`_, 2024

    Nielsen and Schneider-Kamp, `BitNet b1.58 Reloaded
    <https://arxiv.org/abs/2407.09527>`_, 2024

    Kaushal et al., `Spectra: Surprising Effectiveness of Pretraining Ternary
    Language Models at Scale <https://arxiv.org/abs/2407.12327>`_, 2024

    Xi et al., `COAT: Compressing Optimizer States and Activation for
    Memory-Efficient FP8 Training <https://arxiv.org/abs/2410.19313>`_, 2024

    Xi et al., `Jetfire: Efficient and Accurate Transformer Pretraining with
    INT8 Data Flow and Per-Block Quantization
    <https://arxiv.org/abs/2403.12422>`_, 2024

    Das et al., `Mixed Precision Training of Convolutional Neural Networks using
    Integer Operations <https://arxiv.org/abs/1802.00930>`_, 2018 (int16)

    Lee et al., `To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability <https://arxiv.org/abs/2405.18710>`_,
    2024

    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and
    Layer-Adaptive Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024

    Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
    Adam <https://arxiv.org/abs/2502.17055>`_, 2025

    Sun et al., `Scaling Laws for Floating Point Quantization Training
    <https://arxiv.org/abs/2501.02423>`_, 2025
  """
  if name not in RECIPES:
    raise names.unknown('low-bit recipe', name, RECIPES)
  return RECIPES[name]


def _same(x, w, e, rotation=None, **fields):
  """The same operands in each product that they take part in."""
  return Recipe(
    forward=Product(x, w, rotation),
    input_grad=Product(e, w),
    weight_grad=Product(e, x),
    **fields,
  )


def _straight_through(x, w, rotation=None):
  """Gradients of the rounded operands, E as it is."""
  return Recipe(
    forward=Product(x, w, rotation),
    input_grad=Product(right=_FORWARD),
    weight_grad=Product(right=_FORWARD),
  )


def _int8():
  row = Operand('int8')
  return _same(row, row, Operand('int8', stochastic=True))


def _int4():
  row, gradient = Operand('int8'), Operand('int8', stochastic=True)
  return Recipe(
    forward=Product(Operand('int4'), Operand('int4')),
    input_grad=Product(gradient, row),
    weight_grad=Product(gradient, row),
  )


def _fp8(**fields):
  matrix = Scaling(_MATRIX)
  x = Operand('fp8_e4m3', matrix)
  return _same(x, x, Operand('fp8_e5m2', matrix), **fields)


def _jetfire():
  x = Operand('int8', Scaling((32, 32)))
  gradient = dataclasses.replace(x, stochastic=True)
  return Recipe(
    forward=Product(x, x, result=x),
    input_grad=Product(x, x, result=gradient),
    weight_grad=Product(x, x),
    flow='jetfire',
  )


def _int16():
  x = Operand('int16', Scaling(_MATRIX, scale='ocp'))
  return _same(x, x, x)


def _fp8_block():
  groups = Operand('fp8_e4m3', Scaling((1, 128), scale='power_up'))
  blocks = Operand('fp8_e4m3', Scaling((128, 128), scale='power_up'))
  return _same(groups, blocks, groups)


def _mxfp8():
  groups = Operand('fp8_e4m3', Scaling((1, 32), scale='power_up'))
  return _same(groups, groups, groups)


def _mxfp4(nearest=False):
  clipped = Scaling(
    (1, 32), 'rms', factor=_QUEST_FP4, eps=1e-8, scale='power_down'
  )
  x = Operand('fp4_e2m1', clipped, mask='clip')
  # A third wider, so that the rule of MX lets nothing saturate.
  gain = _QUARTET_GAIN if nearest else 1.0
  wide = Scaling((1, 32), scale='ocp', stretch=4 / 3, gain=gain)
  left = Operand('fp4_e2m1', wide, stochastic=not nearest)
  right = dataclasses.replace(left, source='forward')
  gradient = Product(left, right, Rotation(32, 'fresh'))
  return Recipe(Product(x, x, Rotation(32)), gradient, gradient)


def _nvfp4():
  groups, blocks = Scaling((1, 16), scale='nv'), Scaling((16, 16), scale='nv')
  x, w = Operand('fp4_e2m1', groups), Operand('fp4_e2m1', blocks)
  e = Operand('fp4_e2m1', groups, stochastic=True)
  rotation = Rotation(16, 'fixed')
  return Recipe(Product(x, w), Product(e, w), Product(e, x, rotation))


def _quest(bits, weights_only=False, rotation=_BLOCKS_OF_128):
  scaling = Scaling(statistic='rms', factor=_QUEST[bits], eps=1e-8)
  mask = 'clip' if bits == 1 else 'trust'
  format = 'ternary' if bits == 1.58 else f'rise{bits}'
  x = Operand(format, scaling, mask=mask)
  return _straight_through(Operand() if weights_only else x, x, rotation)


def _quest_fp4(keep='all'):
  scaling = Scaling(statistic='rms', factor=_QUEST_FP4, eps=1e-8)
  x = Operand('fp4_e2m1', scaling, mask='trust')
  w = dataclasses.replace(x, keep=keep)
  return _straight_through(x, w, _BLOCKS_OF_128)


def _halo(level, format='int8'):
  x = Operand(format, Scaling(_MATRIX))
  rotation = Rotation(None) if level else None
  tokens = Rotation(None, along='rows') if level == 2 else None
  return Recipe(Product(x, x, rotation), Product(x, x, tokens), Product(x, x))


def _ternary(statistic, activations=True, **scaling):
  w = Operand('ternary', Scaling(_MATRIX, statistic, **scaling))
  x = Operand('int8', Scaling(floor=1e-5)) if activations else Operand()
  return _straight_through(x, w)


def _stable_spam(activations, weights):
  groups = Scaling((1, 256))
  return _straight_through(
    Operand(activations, groups), Operand(weights, groups)
  )


def _scaling_law(format):
  rounded = Operand(format)
  return Recipe(
    Product(right=rounded), Product(right=rounded), Product(right=rounded)
  )


def _all():
  yield from ((name, Recipe()) for name in ('none', 'bf16'))
  yield 'w8', Recipe(weights='int8')
  yield 'int8', _int8()
  yield 'int4', _int4()
  yield 'fp8', _fp8()
  yield 'coat', _fp8(flow='coat')
  yield 'fp8_block', _fp8_block()
  yield 'jetfire', _jetfire()
  yield 'int16', _int16()
  yield 'mxfp8', _mxfp8()
  yield 'mxfp4', _mxfp4()
  yield 'mxfp4_nearest', _mxfp4(nearest=True)
  yield 'nvfp4', _nvfp4()
  for bits in _QUEST:
    yield f'quest{bits}', _quest(bits)
    yield f'quest{bits}_weights', _quest(bits, weights_only=True)
    yield f'quest{bits}_plain', _quest(bits, rotation=None)
  yield 'quest', _quest(4)
  yield 'quest_fp4', _quest_fp4()
  yield 'quest_fp4_sparse', _quest_fp4('2:4')
  for level in range(3):
    yield f'halo{level}', _halo(level)
    yield f'halo{level}_fp8', _halo(level, 'fp8_e4m3')
    yield f'halo{level}_fp6', _halo(level, 'fp6_e3m2')
  yield 'b1.58', _ternary('mean', floor=1e-5)
  yield 'b1.58_median', _ternary('median', floor=1e-5)
  yield 'trilm', _ternary('mean', activations=False, eps=1e-5)
  for name in ('stable_spam_int4', 'int4_sim'):
    yield name, _stable_spam('int4_absmax', 'int4_min_max')
  for name in ('stable_spam_fp4', 'fp4_sim'):
    yield name, _stable_spam('fp4_e1m2', 'fp4_e1m2')
  for format in ELEMENTS:
    if re.fullmatch(r'e\dm\d', format):
      yield format, _scaling_law(format)
  for format in MASKED:
    yield format, _same(*[Operand(format)] * 3)


RECIPES: dict[str, Recipe] = dict(_all())
