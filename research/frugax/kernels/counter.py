"""Random bits from where an element is, computed on any part of an array."""

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def words(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The two words by which a typed key enters `bits`."""
  a, b = (jax.random.key_data(key).ravel()[i].astype('uint32') for i in (0, 1))
  a = _mix(a + jnp.uint32(_GOLDEN))
  b = _mix(b ^ a)
  return _mix(a + 5 * b), b


def bits(first: jax.Array, second: jax.Array, index: jax.Array) -> jax.Array:
  """32 random bits of the element with an index, a uint32.

  Those of `frugax.quant.random_bits`, without its array: a kernel, or a shard,
  computes them from where its part begins. They repeat after 2^32 elements.

  Args:
    first: from `words`.
    second: likewise.
    index: uint32.

  Returns:
    uint32 of the index's shape.

  Examples:
    >>> from frugax.quant import random_bits
    >>> key, index = jax.random.key(3), jnp.arange(6, dtype=jnp.uint32)
    >>> bool((bits(*words(key), index) == random_bits(key, (6,))).all())
    True
  """
  return end(begin(first, index), second)


def begin(first: jax.Array, index: jax.Array) -> jax.Array:
  """What `end` takes. Of a sum of indices it is the sum, with 0 for `first`."""
  return index * jnp.uint32(_GOLDEN) + first


def end(begun: jax.Array, second: jax.Array) -> jax.Array:
  """The bits; see `bits`."""
  x = (begun ^ begun >> 16) * jnp.uint32(0x85EBCA6B) ^ second
  x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
  return x ^ x >> 16


def part(
  key: jax.Array,
  shape: tuple[int, ...],
  whole: tuple[int, ...],
  start: tuple[jax.typing.ArrayLike, ...],
) -> jax.Array:
  """The bits of a part of an array.

  Args:
    key: typed.
    shape: of the part.
    whole: shape of the array.
    start: the index of the part's first element; may be traced.

  Returns:
    uint32 of the part's shape.

  Examples:
    >>> key = jax.random.key(0)
    >>> all_ = part(key, (4, 6), (4, 6), (0, 0))
    >>> bool((part(key, (2, 3), (4, 6), (1, 3)) == all_[1:3, 3:]).all())
    True
  """
  index, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    place = place + jnp.asarray(start[axis]).astype(jnp.uint32)
    index = index + place * jnp.uint32(stride % 2**32)
    stride *= whole[axis]
  return bits(*words(key), index)


def _mix(x):
  x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
  x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
  return x ^ x >> 16
