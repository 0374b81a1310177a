"""How a row is rounded: what `quantize_matmul` takes of `frugax.quant`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from frugax.quant import Scaling, elements

# As in `frugax.quant.quantize_tiles`.
_LARGEST = 2.0**126
# From 2^23 to 2^24 the float32 are the integers. In its last 8 bits it is zero.
_MIDDLE = np.float32(1.5 * 2**23)
_TINY = float(jnp.finfo(jnp.float32).tiny)
_STATISTICS = ('absmax', 'rms', 'mean')


@dataclasses.dataclass(frozen=True)
class Rounding:
  """A format, a scale for each row, and whether a rotation comes before.

  Args:
    format: a name in `frugax.quant.ELEMENTS` whose codes can be multiplied:
      'int2' to 'int8', 'ternary', 'rise1' to 'rise8', 'fp8_e4m3', 'fp8_e5m2'.
    scaling: with a scale a row, in float32.
    rotate: by a Hadamard matrix of 128 before, as `frugax.quant.hadamard`.

  Raises:
    ValueError: a format or scaling that the kernel does not have.
  """

  format: str
  scaling: Scaling
  rotate: bool = False

  def __post_init__(self):
    if self.element.dtype == 'uint8':
      raise ValueError(
        f'format={self.format!r} has codes that cannot be multiplied: give one '
        'of int2 to int8, ternary, rise1 to rise8, fp8_e4m3 and fp8_e5m2'
      )
    s = self.scaling
    if (s.tile, s.scale, s.stretch) != ((1, None), 'float32', 1.0):
      raise ValueError(
        f'{s}: a product with codes takes one float32 scale a row; give '
        "tile=(1, None), scale='float32' and stretch=1"
      )
    if s.statistic not in _STATISTICS:
      raise ValueError(
        f'statistic={s.statistic!r}: give one of {", ".join(_STATISTICS)}'
      )

  @property
  def element(self) -> elements.Element:
    return elements.element(self.format)

  @property
  def dtype(self) -> jnp.dtype:
    """Of the codes: int4 for at most 4 bits, int8 or a float of 8 bits."""
    e = self.element
    four = e.dtype == 'int8' and e.bits <= 4
    return jnp.dtype(jnp.int4 if four else e.dtype)

  @property
  def shift(self) -> float:
    """Of the numbers against the codes."""
    return 0.5 if self.element.rise else 0.0

  @property
  def sums(self) -> bool:
    """Whether sums of codes are known: those of integers."""
    return self.element.dtype == 'int8'

  def gather(self, old: jax.Array, x: jax.Array) -> jax.Array:
    """The statistic, element by element, of what was seen and of x."""
    if self.scaling.statistic == 'absmax':
      return jnp.maximum(old, jnp.abs(x))
    return old + (x * x if self.scaling.statistic == 'rms' else jnp.abs(x))

  def finish(self, gathered: jax.Array, axis: int, size: int) -> jax.Array:
    """The scale of each row, from what was gathered along an axis of it."""
    s = self.scaling
    if s.statistic == 'absmax':
      nan = jnp.isnan(gathered).astype(jnp.float32).max(axis, keepdims=True) > 0
      statistic = gathered.max(axis, keepdims=True)
    else:
      statistic = gathered.sum(axis, keepdims=True) * np.float32(1 / size)
      nan = jnp.isnan(statistic)
      if s.statistic == 'rms':
        statistic = jnp.sqrt(statistic)
    alpha = jnp.maximum(s.factor * statistic + s.eps, s.floor)
    alpha = jnp.minimum(alpha, _LARGEST)
    step = jnp.maximum(alpha * np.float32(1 / self.element.top), _TINY)
    return jnp.where(nan, jnp.nan, step)

  @property
  def invariant(self) -> bool:
    """Whether a rotation leaves the statistic as it is."""
    return self.scaling.statistic == 'rms'

  @property
  def clips(self) -> bool:
    """Whether infinities, which a rotation turns into NaN, must go before.

    Not where the scale does not see them and the codes cannot be NaN.
    """
    return not (self.invariant and self.sums)

  @property
  def offset(self) -> int:
    """Of `codes` against the codes of integers: a multiple of 2^8."""
    return -int(_MIDDLE.view(np.int32)) if self.shift else 2**22

  def codes(self, x: jax.Array, halves: bool = False) -> jax.Array:
    """Of numbers over their scale: 8-bit floats, or int32 plus `offset`.

    Args:
      x: float32.
      halves: integers in int16 instead, without an offset, of which a register
        holds twice as many.
    """
    top, half = self.element.top, self.shift
    # Between two limits that differ in sign alone, which is one operation.
    x = jnp.clip(x, -top, top)
    if not self.sums:
      return x.astype(self.dtype)
    # A sum that lies among the integers is rounded to the nearest of them, or
    # the even one. Its last bits are the code's: a conversion to integers takes
    # a TPU five operations. Mid-rise, what is half-way goes to the even
    # multiple before a half is taken off: 0 to -1/2, whose code is -1. All bits
    # of -n turned are n - 1. `_MIDDLE` less a half is no float32.
    x = _MIDDLE - (x + half) if half else _MIDDLE + x
    bits = lax.bitcast_convert_type(x, jnp.int32)
    if halves:
      bits = bits.astype(jnp.int16)
    elif not half:
      bits &= 2**23 - 1
    return ~bits if half else bits
