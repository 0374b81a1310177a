"""What is asked of a rounded copy of a matrix, and what it is."""

import dataclasses

import jax
import jax.numpy as jnp

from frugax import names
from frugax.kernels.codes import FORMATS
from frugax.quant import Element, Scaling, element
from frugax.quant import elements as quant_elements

ALONG = ('features', 'tokens', 'none')
MASKS = ('none', 'clip', 'trust')
STATISTICS = ('absmax', 'rms', 'mean')
TILE = 128  # lanes of a register, and so the largest block of a rotation


@dataclasses.dataclass(frozen=True)
class Copy:
  """How a copy is rotated and rounded.

  The copy is an operand of a product, and `scaling.tile` is as that product
  sees it: its columns are what is contracted. Of a copy by rows these are the
  features, of one by columns the tokens.

  Args:
    format: a name in `frugax.kernels.codes.FORMATS`: 'int2' to 'int8',
      'ternary', 'rise1' to 'rise8', 'fp8_e4m3' or 'fp8_e5m2'.
    along: which axis is rotated: 'features' (the last), 'tokens' (all others,
      as one) or 'none'.
    block: elements of a block of the rotation, a power of two up to 128. What
      is left of the axis is cut as `frugax.quant.hadamard` does.
    signs: whether the rotation has random signs.
    scaling: the statistic ('absmax', 'rms' or 'mean') and what follows from it,
      with float32 scales. A tile of (1, None) is one scale for all that is
      contracted; by columns (1, n) one for each n tokens.
    stochastic: round stochastically, else to nearest.
    mask: 'none', or a bit an element: 'clip' where it lies within the range of
      the format, 'trust' where its error is at most half a step.
    sums: whether to sum the codes that share a scale, as products with mid-rise
      numbers need it; of integers alone.

  Raises:
    ValueError: an unknown name, a block that is no such power, or a scaling
      that is not of this kind.
  """

  format: str = 'int8'
  along: str = 'features'
  block: int = TILE
  signs: bool = False
  scaling: Scaling = Scaling()  # noqa: RUF009 (it is frozen)
  stochastic: bool = False
  mask: str = 'none'
  sums: bool = False

  def __post_init__(self):
    if self.format not in FORMATS:
      raise names.unknown('format', self.format, FORMATS)
    if self.along not in ALONG:
      raise names.unknown('axis to rotate along', self.along, ALONG)
    if self.mask not in MASKS:
      raise names.unknown('mask', self.mask, MASKS)
    n = self.block
    if not 1 <= n <= TILE or n & (n - 1):
      raise ValueError(
        f'block={n}: give a power of two up to {TILE}, or rotate with '
        'frugax.quant.hadamard before'
      )
    s = self.scaling
    if s.statistic not in STATISTICS:
      raise names.unknown('statistic of a kernel', s.statistic, STATISTICS)
    if s.scale != 'float32' or s.stretch != 1:
      raise ValueError(
        f'scale={s.scale!r}, stretch={s.stretch}: kernels have float32 scales; '
        'see frugax.quant.quantize_tiles for others'
      )
    if s.tile[0] != 1:
      raise ValueError(
        f'tile={s.tile}: give (1, None), one scale a row of the operand'
      )
    if self.sums and self.element.dtype != 'int8':
      raise ValueError(f'sums of {self.format}: only integers have them')

  @property
  def element(self) -> Element:
    return element(self.format)

  @property
  def dtype(self) -> jnp.dtype:
    """Of codes: int4 where they fit into it."""
    e = self.element
    four = e.dtype == 'int8' and e.bits <= 4
    return jnp.dtype(jnp.int4 if four else e.dtype)

  @property
  def bound(self) -> float:
    """The largest magnitude, in scales, at which the mask is true."""
    e = self.element
    margin = 0.5 * _top_step(e) if self.mask == 'trust' else 0.0
    # Half a unit in the last place or so, as the division is rounded.
    return (e.top + margin) * (1 + 2.0**-22)

  @property
  def gain(self) -> float:
    """By which a rotated block is multiplied after the signs of its matrix."""
    return 1.0 if self.along == 'none' else self.block**-0.5

  @property
  def bounded(self) -> bool:
    """Whether numbers over their scale can only round to the format's.

    Of what is rotated, which is finite.
    """
    s = self.scaling
    wide = s.statistic == 'absmax' and s.factor >= 1 and s.eps >= 0
    return wide and self.along != 'none' and not self.stochastic

  @property
  def rotation(self) -> tuple:
    """Equal for copies that are rotated alike."""
    if self.along == 'none':
      return ('none', 1, False)
    return (self.along, self.block, self.signs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
  """A rounded copy of an array of shape (..., features), as a pytree.

  Attributes:
    codes: in the shape of the array; int8, int4, float8_e4m3fn or float8_e5m2.
      Of mid-rise numbers they are what is left when a half is taken off.
    scales: float32, by rows (..., 1) and by columns (groups of tokens,
      features): codes times scales are the rotated numbers.
    mask: uint8, (..., ceil(features / 8)), a bit an element, the earlier ones
      lower; None without a mask.
    sums: int32, of the codes that share a scale, in the shape of the scales;
      None if they were not asked for.
    format: static.
    group: tokens that share the scales of columns; None by rows. Static.
  """

  codes: jax.Array
  scales: jax.Array
  mask: jax.Array | None
  sums: jax.Array | None
  format: str = dataclasses.field(metadata={'static': True})
  group: int | None = dataclasses.field(metadata={'static': True})

  def numbers(self) -> jax.Array:
    """The numbers of the codes without their scales, in float32."""
    return element(self.format).decode(self.codes)

  def dequantize(self) -> jax.Array:
    """What the copy stands for, in float32, still rotated."""
    x, s = self.numbers(), self.scales
    if self.group is not None:
      tokens = x.size // x.shape[-1]
      s = jnp.repeat(s, self.group, axis=0)[:tokens].reshape(x.shape)
    return x * s

  def trusted(self) -> jax.Array:
    """The mask as booleans in the shape of the codes; true without one."""
    if self.mask is None:
      return jnp.ones(self.codes.shape, bool)
    size = self.codes.shape[-1]
    return quant_elements.unpack(self.mask, 1, size).astype(bool)


def _top_step(e: Element) -> float:
  """How far apart the two largest numbers lie."""
  if e.rise:
    return 1.0
  numbers = e.numbers()
  return numbers[-1] - numbers[-2]
