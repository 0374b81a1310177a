"""Stochastic rounding whose random bits do not depend on the mesh."""

import math

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def random_bits(
  key: jax.Array,
  shape: tuple[int, ...],
  batch_axes: int = 0,
  rows: tuple[jax.typing.ArrayLike, int] | None = None,
) -> jax.Array:
  """32 random bits an element, from a hash of the key and the element's index.

  The index is that in the whole array, so that under jit every device computes
  the bits of its own shard and they are the same on any mesh, which those of
  the chip's generator are not. (Inside of shard_map an array is its shard, and
  so is its index.) Made for rounding, not for cryptography.

  Args:
    key: a typed jax PRNG key.
    shape: of the array.
    batch_axes: number of leading axes that the index leaves out: all items of
      a stack get the same bits, as if each were on its own.
    rows: (start, size): only the bits of `x[start:start + size]`, for an array
      that is rounded in parts. The start may be traced.

  Returns:
    A uint32 array.

  Raises:
    ValueError: what should be a key is none, or more batch axes than axes.

  Examples:
    >>> bits = random_bits(jax.random.key(0), (2, 3))
    >>> bits.dtype, len(set(bits.ravel().tolist()))
    (dtype('uint32'), 6)

  References:
    Appleby, `MurmurHash3 <https://github.com/aappleby/smhasher>`_, 2011 (the
    finaliser)
  """
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
    raise ValueError(
      f'random bits come from one typed key, not from {key.dtype}{key.shape}: '
      'jax.random.key(seed), or jax.random.wrap_key_data of its data'
    )
  if not 0 <= batch_axes <= len(shape):
    raise ValueError(f'batch_axes={batch_axes} for an array of shape {shape}')
  first, second = (
    jax.random.key_data(key).ravel()[i].astype(jnp.uint32) for i in range(2)
  )
  # An index is two words if the array has more than 2^32 elements: the axes
  # before `split` give the second, which changes the key.
  split = len(shape)
  while split > batch_axes and math.prod(shape[split - 1 :]) <= 2**32:
    split -= 1
  # Both words must depend on all of the key: where the first is shared, two
  # multiplications leave bits that are related from key to key.
  first = _mix(
    first + _index(shape, batch_axes, split, rows) + jnp.uint32(_GOLDEN)
  )
  second = _mix(second ^ first)
  first = _mix(first + 5 * second)
  x = _index(shape, split, len(shape), rows) * jnp.uint32(_GOLDEN) + first
  x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B) ^ second
  x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
  x = x ^ x >> 16
  return jnp.broadcast_to(x, shape if rows is None else (rows[1], *shape[1:]))


def round_stochastic(
  x: jax.Array,
  bits_or_key: jax.Array,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  batch_axes: int = 0,
) -> jax.Array:
  r"""Round float32 to one of the two nearest bfloat16 numbers, without bias.

  With :math:`a \le x < b` the neighbours

  .. math:: P(\hat x = b) = \frac{x - a}{b - a}, \qquad E[\hat x] = x

  in steps of :math:`2^{-16}`, by adding 16 random bits below the last one that
  is kept and cutting them off. What is representable, infinities and NaN stay
  as they are. What is finite stays finite: beyond the largest number there is
  nothing to round up to, and the result is that number.

  Args:
    x: an array; computed in float32.
    bits_or_key: a typed jax PRNG key, or random bits of x's shape in uint32, of
      which the upper 16 are used.
    dtype: bfloat16; float32 returns x, so that callers need no case for it.
    batch_axes: see `random_bits`.

  Returns:
    An array of x's shape in `dtype`.

  Raises:
    ValueError: another dtype, or bits of another shape.

  Examples:
    >>> x = jnp.full(4096, 1 + 2**-9)  # a quarter of the way to the next number
    >>> y = round_stochastic(x, jax.random.key(0))
    >>> sorted(set(y.tolist())), round(float(y.astype(jnp.float32).mean()), 3)
    ([1.0, 1.0078125], 1.002)

  References:
    Gupta et al., `Deep Learning with Limited Numerical Precision
    <https://arxiv.org/abs/1502.02551>`_, 2015

    Zamirai et al., `Revisiting BFloat16 Training
    <https://arxiv.org/abs/2010.06192>`_, 2020
  """
  dtype = jnp.dtype(dtype)
  x = x.astype(jnp.float32)
  if dtype == jnp.float32:
    return x
  if dtype != jnp.bfloat16:
    raise ValueError(
      f'no stochastic rounding to {dtype}: give bfloat16, or float32 for none'
    )
  random = bits_or_key
  if jnp.issubdtype(random.dtype, jax.dtypes.prng_key):
    random = random_bits(random, x.shape, batch_axes)
  if random.shape != x.shape or random.dtype != jnp.uint32:
    raise ValueError(
      f'{random.dtype}{random.shape} are no bits for an array of shape '
      f'{x.shape}: give uint32 of that shape, or a typed key (jax.random.key)'
    )
  pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
  up = pattern + (random >> 16)
  # A carry into the exponent of infinity, from a finite number; and infinity
  # itself, which no bits may turn into NaN.
  special = (up & 0x7F800000) == 0x7F800000
  pattern = jnp.where(special, pattern, up) >> 16
  rounded = jax.lax.bitcast_convert_type(
    pattern.astype(jnp.uint16), jnp.bfloat16
  )
  # A NaN whose payload lies in the bits cut off would become infinity.
  return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), rounded)


def _mix(x):
  x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
  x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
  return x ^ x >> 16


def _index(shape, begin, end, rows):
  """The index of each element in the axes from begin to end, as uint32."""
  index, stride = jnp.uint32(0), 1
  for axis in reversed(range(begin, end)):
    start, size = rows if axis == 0 and rows else (0, shape[axis])
    ones = [1] * len(shape)
    ones[axis] = size
    place = jax.lax.broadcasted_iota(jnp.uint32, tuple(ones), axis)
    place = place + jnp.asarray(start).astype(jnp.uint32)
    index = index + place * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return index
