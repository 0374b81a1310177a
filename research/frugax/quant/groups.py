"""Arrays in groups along their last axis, the last group being shorter."""

import functools

import jax
import jax.numpy as jnp


def maximum(
  x: jax.Array, axes: int | tuple[int, ...], keepdims: bool = False
) -> jax.Array:
  """`jnp.max` of float32 that keeps a positive NaN, as XLA's on CPUs does not.

  Examples:
    >>> print(maximum(jnp.array([1.0, jnp.nan, 2.0]), 0))
    nan
  """
  return _number(jnp.max(_ordered(x), axes, keepdims=keepdims))


def _ordered(x):
  """Integers in the order of the numbers: zeros, infinity, NaN go up."""
  return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def _number(x):
  return jax.lax.bitcast_convert_type(_flip(x), jnp.float32)


def _flip(bits):
  """Of negative numbers the more negative have the greater bits."""
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def largest(x: jax.Array, group: int) -> jax.Array:
  """The largest number of each group; NaN if there is a positive one.

  Args:
    x: (*rows, n), float32.
    group: elements a group.

  Returns:
    (*rows, ceil(n / group)).

  Examples:
    >>> print(largest(jnp.arange(7.0), 3))
    [2. 5. 6.]
  """
  *rows, size = x.shape
  whole = size // group
  bits = _ordered(x)
  # The rest is reduced on its own: padding would be a copy of the array.
  parts = []
  if whole:
    parts.append(_most(bits[..., : whole * group].reshape(*rows, whole, group)))
  if size % group:
    parts.append(_most(bits[..., whole * group :])[..., None])
  most = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
  return _number(most)


def _most(x):
  """The greatest integers along the last axis."""
  return jax.lax.platform_dependent(
    x, cpu=_most_by_lanes, default=lambda x: jnp.max(x, -1)
  )


def _most_by_lanes(x):
  """CPUs compare several elements of a row at a time, without a copy of it.

  XLA does neither for reductions along the last axis of more than 32 elements.
  """
  size = x.shape[-1]
  if size > 16:
    # Of slices that may overlap, one element of each is compared.
    width = -(-size // 8)
    starts = [min(i * width, size - width) for i in range(8)]
    x = functools.reduce(jnp.maximum, [x[..., i : i + width] for i in starts])
  # In two steps, both of few elements.
  size = x.shape[-1]
  if size > 16 and size % 16 == 0:
    x = jnp.max(x.reshape(*x.shape[:-1], size // 16, 16), -1)
  return jnp.max(x, -1)


def spread(x: jax.Array, group: int, shape: tuple[int, ...]) -> jax.Array:
  """What is known of each group, for each of its elements.

  Args:
    x: (*rows, groups), as from `largest`.
    group: elements a group.
    shape: (*rows, n).

  Returns:
    An array of that shape.

  Examples:
    >>> print(spread(jnp.array([2, 5, 6]), 3, (7,)))
    [2 2 2 5 5 5 6]
  """
  *rows, groups = x.shape
  x = jnp.broadcast_to(x[..., None], (*rows, groups, group))
  return x.reshape(*rows, groups * group)[..., : shape[-1]]


def pack(codes: jax.Array) -> jax.Array:
  """Two codes of 4 bits a byte along the last axis, the earlier one low."""
  *rows, size = codes.shape
  if size % 2:
    codes = jnp.pad(codes, [(0, 0)] * len(rows) + [(0, 1)])
  pairs = codes.reshape(*rows, -1, 2)
  return pairs[..., 0] | pairs[..., 1] << 4


def unpack(codes: jax.Array, size: int) -> jax.Array:
  """The inverse of `pack`, for a last axis of this size."""
  # A shift by an array of constants would not be sharded as the codes are.
  pairs = jnp.stack([codes & 0xF, codes >> 4], axis=-1)
  return pairs.reshape(*codes.shape[:-1], -1)[..., :size]
