"""What a recipe is: the three products of a linear layer and their operands."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from frugax import names
from frugax.quant import AFFINE, ELEMENTS, Scaling, simulated

SIMULATED = {
  'fp4_e1m2': simulated.fp4_e1m2,
  'int4_min_max': simulated.int4_min_max,
  'int4_absmax': simulated.int4_absmax,
}
# What remains of a bfloat16 when bits are cut off its mantissa or its exponent.
MASKED = {
  f'masked_e{e}m{m}': functools.partial(
    simulated.truncate, exponent=e, mantissa=m
  )
  for e, m in [(8, m) for m in range(7)] + [(e, 7) for e in range(4, 8)]
}
FORMATS = (*ELEMENTS, *SIMULATED, *MASKED)
KEEPS = ('all', '2:4')
MASKS = ('none', 'clip', 'trust')
SOURCES = ('array', 'forward')
SIGNS = ('none', 'fixed', 'fresh')
ALONG = ('contracted', 'rows')
RESIDUALS = ('codes', 'arrays')

_ROWS = Scaling()


@dataclasses.dataclass(frozen=True)
class Operand:
  """How an operand is rounded. It is a matrix whose columns are contracted.

  Args:
    format: a name in `FORMATS`; None leaves the operand as it is. Those of
      `frugax.quant.simulated` run in groups of `scaling.tile[1]` through all
      rows, and on from one row to the next.
    scaling: which elements share a scale, and how it follows from them.
    stochastic: round stochastically, else to nearest.
    mask: of an operand of the forward product, where its gradient passes:
      'none' everywhere, 'clip' within the range of the format, 'trust' where
      the error is at most half a step.
    source: of the right operand of a gradient: 'array' rounds the array that
      the layer was given, 'forward' what the forward product made of it.
    keep: 'all', or '2:4': of four neighbouring pairs along the contracted axis
      the two of the greatest norm stay, and the others become zero. With the
      mask 'trust' the gradient passes where these were small, too.

  Raises:
    ValueError: an unknown name, or a mask without a format that has a range, or
      zeros in a format without a zero.
  """

  format: str | None = None
  scaling: Scaling = _ROWS
  stochastic: bool = False
  mask: str = 'none'
  source: str = 'array'
  keep: str = 'all'

  def __post_init__(self):
    if self.format is not None and self.format not in FORMATS:
      raise names.unknown('format', self.format, FORMATS)
    if self.mask not in MASKS:
      raise names.unknown('mask', self.mask, MASKS)
    if self.source not in SOURCES:
      raise names.unknown('source', self.source, SOURCES)
    if self.keep not in KEEPS:
      raise names.unknown('keep', self.keep, KEEPS)
    element = ELEMENTS.get(self.format)
    if self.keep != 'all' and (element is None or element.rise):
      raise ValueError(
        f'keep={self.keep!r} of format={self.format!r}: give a format of '
        'frugax.quant.ELEMENTS that has a zero'
      )
    if self.mask != 'none' and element is None:
      raise ValueError(
        f'mask={self.mask!r} of format={self.format!r}: give a format of '
        'frugax.quant.ELEMENTS, which have a range'
      )
    if self.format in SIMULATED and not self.scaling.tile[1]:
      raise ValueError(
        f'{self.format} with tile={self.scaling.tile}: give the elements of a '
        'group, as in Scaling((1, 256))'
      )
    if self.simulated and self.stochastic:
      raise ValueError(f'{self.format} rounds to nearest alone')

  @property
  def simulated(self) -> Callable[[jax.Array], jax.Array] | None:
    """The function that rounds an array, if the format is no element's."""
    if self.format in SIMULATED:
      return functools.partial(
        SIMULATED[self.format], block=self.scaling.tile[1]
      )
    return MASKED.get(self.format)


@dataclasses.dataclass(frozen=True)
class Rotation:
  """A Hadamard rotation of the operands of a product.

  Args:
    block: elements of a block, a power of two; None for the largest that fit.
    signs: 'none', or random ones that are 'fixed' once and for all or 'fresh'
      in every product.
    along: 'contracted' rotates both operands along the contracted axis, which
      leaves the product what it was; 'rows' the left operand along its rows,
      and the result back.

  Raises:
    ValueError: an unknown name, or a block that is no power of two.
  """

  block: int | None = 128
  signs: str = 'none'
  along: str = 'contracted'

  def __post_init__(self):
    if self.signs not in SIGNS:
      raise names.unknown('signs', self.signs, SIGNS)
    if self.along not in ALONG:
      raise names.unknown('axis to rotate along', self.along, ALONG)
    n = self.block
    if n is not None and (n < 1 or n & (n - 1)):
      raise ValueError(f'block={n}: Hadamard blocks are powers of two')


@dataclasses.dataclass(frozen=True)
class Product:
  """How one of the three products is computed.

  Args:
    left: of the forward product the activations, of both gradients the gradient
      of the result.
    right: of the forward product and the input's gradient the weights, of the
      weights' gradient the activations.
    rotation: None for none.
    result: how the result is rounded in its turn, its last axis being the
      columns; gradients pass straight through.

  Raises:
    ValueError: a result with a mask, a source or zeros put in.
  """

  left: Operand = Operand()
  right: Operand = Operand()
  rotation: Rotation | None = None
  result: Operand = Operand()

  def __post_init__(self):
    r = self.result
    if (r.mask, r.source, r.keep) != ('none', 'array', 'all'):
      raise ValueError(
        f'{r} as the result of a product: it has a format, a scaling and a '
        'rounding alone'
      )


@dataclasses.dataclass(frozen=True)
class Recipe:
  r"""How the three products of a linear layer are rounded.

  .. math::
    y = \langle x \rangle \langle w \rangle, \qquad
    \bar x = \langle \bar y \rangle \langle w^T \rangle, \qquad
    \bar w = \langle x^T \rangle \langle \bar y \rangle

  with each :math:`\langle\cdot\rangle` an `Operand` of its own, its scales
  along or across the axis that this product contracts.

  Args:
    forward: :math:`y`.
    input_grad: :math:`\bar x`.
    weight_grad: :math:`\bar w`.
    residuals: what is kept of the activations for the backward pass: 'codes'
      keeps the rounded operand of the weights' gradient, in its bits; 'arrays'
      keeps the activations, and rounds them in the backward pass. The numbers
      are the same.
    weights: in which format of `frugax.quant.AFFINE` the weights are stored
      and trained, see `frugax.lowbit.store_weights`; 'none' for arrays.
    flow: what norms and activation functions between such layers do to their
      inputs, a name in `frugax.lowbit.FLOWS`.
    fuse: linears of the same activations round and keep them once, and are one
      wide product where they can be, see `frugax.lowbit.dot_generals`. The
      numbers are the same.

  Raises:
    ValueError: an unknown name, or a field that has no meaning where it stands.
  """

  forward: Product = Product()
  input_grad: Product = Product()
  weight_grad: Product = Product()
  residuals: str = 'codes'
  weights: str = 'none'
  flow: str = 'none'
  fuse: bool = True

  def __post_init__(self):
    if self.weights not in ('none', *AFFINE):
      raise names.unknown('format of weights', self.weights, ('none', *AFFINE))
    if self.residuals not in RESIDUALS:
      raise names.unknown('residuals', self.residuals, RESIDUALS)
    first = (self.forward.left, self.forward.right)
    lefts = (self.input_grad.left, self.weight_grad.left)
    rights = (self.input_grad.right, self.weight_grad.right)
    if any(o.source != 'array' for o in (*first, *lefts)):
      raise ValueError(
        "source='forward' is for the right operand of a gradient, which the "
        'forward product has rounded'
      )
    if any(o.mask != 'none' for o in (*lefts, *rights)):
      raise ValueError(
        'a mask belongs to an operand of the forward product: it says where '
        'the gradient of that operand passes'
      )
    rotation = self.forward.rotation
    if rotation and (rotation.along, rotation.signs) not in (
      ('contracted', 'none'),
      ('contracted', 'fixed'),
    ):
      raise ValueError(
        f'{rotation} in the forward product: rotate along the contracted axis, '
        'with fixed signs or none, so that the backward pass can undo it'
      )
    rotation = self.weight_grad.rotation
    if rotation and rotation.along != 'contracted':
      raise ValueError(
        f'{rotation} in the gradient of the weights: its contracted axis holds '
        "the tokens; give along='contracted'"
      )
