"""The arithmetic that all implementations share, on any part of the matrix."""

import jax
import jax.numpy as jnp
import numpy as np

from frugax.kernels import counter
from frugax.kernels.hadamard_quantize.options import TILE, Copy
from frugax.quant import Scaling

# Sums of 128 of these are finite. Infinities of both signs would make a NaN.
LARGEST = 2.0**100
_SATURATED = 2.0**126  # as `frugax.quant.quantize_tiles` has it
_TINY = float(jnp.finfo(jnp.float32).tiny)


def rotation(size: int, block: int) -> tuple[np.ndarray, np.ndarray]:
  """Matrices of tiles of 128 elements of an axis, and what follows them.

  A tile holds blocks on its diagonal. The last one differs from the others if
  the axis is no multiple of 128: it holds what is left, and zeros.

  Args:
    size: of the axis.
    block: a power of two up to 128.

  Returns:
    (2, 128, 128), of -1, 0 and 1: of all tiles, and of the last one; and
    (2, 128), with which to multiply the elements after that and the root of
    1 / block: 1 but for smaller blocks. Products with the first are exact in
    bfloat16, which those with a normalised matrix would not be.

  Examples:
    >>> matrices, gains = rotation(129, 2)
    >>> print(matrices[1][:3, :3], gains[1][:2])
    [[1. 0. 0.]
     [0. 0. 0.]
     [0. 0. 0.]] [1.4142135 0.       ]
  """
  matrices = np.zeros((2, TILE, TILE), np.float32)
  gains = np.zeros((2, TILE), np.float32)
  for i, tail in enumerate((TILE, size % TILE or TILE)):
    start = 0
    while start < tail:
      n = block
      while n > tail - start:
        n //= 2
      part = slice(start, start + n)
      matrices[i, part, part] = _signs(n)
      gains[i, part] = np.float32((block / n) ** 0.5)
      start += n
  return matrices, gains


def _signs(n):
  h = np.ones((1, 1), np.float32)
  while len(h) < n:
    h = np.block([[h, h], [h, -h]])
  return h


def statistic(scaling: Scaling, y: jax.Array) -> jax.Array:
  """What is summed for a statistic, or for 'absmax' compared."""
  return y * y if scaling.statistic == 'rms' else jnp.abs(y)


def largest(total: jax.Array, axis: int) -> jax.Array:
  """The largest magnitude along an axis, or NaN.

  XLA's maximum of floats along an axis may leave a NaN out on CPUs. Among the
  bits of magnitudes those of NaN are the largest.
  """
  bits = jax.lax.bitcast_convert_type(total, jnp.int32)
  bits = bits.max(axis, keepdims=True)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def step(
  copy: Copy, total: jax.Array, count: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """The scale that follows from a sum, or a maximum, of `statistic`.

  Args:
    copy: how it is rounded.
    total: of what is rotated but for `copy.gain`.
    count: of elements.

  Returns:
    The scale, and what to multiply that with to have it over the scale: a
    division for each scale, as kernels have no time for one an element.

  Examples:
    >>> print(step(Copy('int4', along='none'), jnp.array([14., 0.]), 8)[0])
    [2.0000000e+00 1.1754944e-38]
  """
  s = copy.scaling
  if s.statistic != 'absmax':
    total = total / count
  if s.statistic == 'rms':
    total = jnp.sqrt(total)
  gain = np.float32(copy.gain)
  alpha = jnp.maximum(s.factor * (total * gain) + s.eps, s.floor)
  alpha = jnp.minimum(alpha, _SATURATED)
  scale = jnp.maximum(alpha * np.float32(1 / copy.element.top), _TINY)
  return scale, 1 / scale * gain


def dot(a: jax.Array, b: jax.Array, interpret: bool = False) -> jax.Array:
  """The product within a kernel, in float32 and with its sums alone rounded."""
  if interpret:  # CPUs do not have all products of bfloat16.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (0,)), ((), ())),
    precision=exact,
    preferred_element_type=jnp.float32,
  )


def bits(
  words: jax.Array,
  word: int,
  shape: tuple[int, int],
  start: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0, 0),
) -> jax.Array:
  """Random bits of a part of x.

  Args:
    words: uint32, (7,): two for each copy, then the first row and column of x
      and the number of columns in the array of which x is a part.
    word: the first of the copy's two.
    shape: of the part.
    start: its first row and column in x.

  Returns:
    uint32 of this shape.
  """
  row, column = (
    jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    + jnp.asarray(start[axis]).astype(jnp.uint32)
    for axis in (0, 1)
  )
  index = (row + words[4]) * words[6] + column + words[5]
  return counter.bits(words[word], words[word + 1], index)
