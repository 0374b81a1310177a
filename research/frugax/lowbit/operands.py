"""What a recipe is: the three products of a linear layer and their operands."""

import dataclasses

from frugax import names
from frugax.quant import ELEMENTS, Scaling, simulated

SIMULATED = {
  'fp4_e1m2': simulated.fp4_e1m2,
  'int4_min_max': simulated.int4_min_max,
  'int4_absmax': simulated.int4_absmax,
}
FORMATS = (*ELEMENTS, *SIMULATED)
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

  Raises:
    ValueError: an unknown name, or a mask without a format that has a range.
  """

  format: str | None = None
  scaling: Scaling = _ROWS
  stochastic: bool = False
  mask: str = 'none'
  source: str = 'array'

  def __post_init__(self):
    if self.format is not None and self.format not in FORMATS:
      raise names.unknown('format', self.format, FORMATS)
    if self.mask not in MASKS:
      raise names.unknown('mask', self.mask, MASKS)
    if self.source not in SOURCES:
      raise names.unknown('source', self.source, SOURCES)
    if self.mask != 'none' and self.format not in ELEMENTS:
      raise ValueError(
        f'mask={self.mask!r} of format={self.format!r}: give a format of '
        'frugax.quant.ELEMENTS, which have a range'
      )
    if self.format in SIMULATED and not self.scaling.tile[1]:
      raise ValueError(
        f'{self.format} with tile={self.scaling.tile}: give the elements of a '
        'group, as in Scaling((1, 256))'
      )
    if self.format in SIMULATED and self.stochastic:
      raise ValueError(f'{self.format} rounds to nearest alone')


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
  """

  left: Operand = Operand()
  right: Operand = Operand()
  rotation: Rotation | None = None


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

  Raises:
    ValueError: an unknown name, or a field that has no meaning where it stands.
  """

  forward: Product = Product()
  input_grad: Product = Product()
  weight_grad: Product = Product()
  residuals: str = 'codes'

  def __post_init__(self):
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
