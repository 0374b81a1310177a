"""The codes of numbers over their scale, as kernels compute them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from frugax.quant import ELEMENTS, Element

# Those whose codes are numbers that a chip multiplies.
FORMATS = tuple(
  name
  for name, e in ELEMENTS.items()
  if e.dtype in ('int8', 'float8_e4m3fn', 'float8_e5m2')
)
# From 2^23 to 2^24 the float32 are the integers.
_MIDDLE = np.float32(1.5 * 2**23)


def nearest(t: jax.Array) -> jax.Array:
  """The nearest integer, of two as near the even one, below 2^22.

  By an addition, where a chip has no function for it, or a slow one: the last
  bits of the sum are the integer. Where t is a product, compilers may round it
  and the sum at once.

  Args:
    t: float32.

  Returns:
    int32.

  Examples:
    >>> print(nearest(jnp.array([0.5, 1.5, -2.5, 126.7])))
    [  0   2  -2 127]
  """
  bits = jax.lax.bitcast_convert_type(t + _MIDDLE, jnp.int32)
  return bits - _MIDDLE.view(np.int32)


def coded(
  e: Element,
  t: jax.Array,
  random: jax.Array | None = None,
  nearest: Callable[[jax.Array], jax.Array] = jnp.round,
  clip: bool = True,
) -> jax.Array:
  """Codes of integers in float32 or int32, and of 8-bit floats in their dtype.

  Args:
    e: the format.
    t: float32.
    random: uint32 of t's shape rounds stochastically.
    nearest: rounds to the nearest integer, and what is half-way to an even one.
      The one above needs the clip of mid-rise numbers.
    clip: False for what can only round to the format's numbers.

  Returns:
    Integers in what `nearest` gives, stochastic ones in float32; or an array in
    the format's dtype.

  Examples:
    >>> from frugax.quant import element
    >>> print(coded(element('rise2'), jnp.array([-9., -.1, 0., .1, 9.])))
    [-2. -1. -1.  0.  1.]
  """
  shift = 0.5 if e.rise else 0.0
  if e.rise:
    t = t + shift
  # Between the sums, or compilers would make one of them and lose the half.
  if clip:
    t = jnp.clip(t, shift - e.top, shift + e.top)
  if e.dtype != 'int8':
    t = t if random is None else e.round(t, random)
    return t.astype(e.dtype)
  if random is None:
    t = nearest(t)
  else:
    below = jnp.floor(t)
    # The 24 bits fit into an int32, which all chips convert.
    uniform = (random >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24
    t = below + jnp.where(uniform < t - below, 1.0, 0.0)
  return t - 1 if e.rise else t
