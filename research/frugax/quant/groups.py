"""Arrays in groups along their last axis, the last group being shorter."""

import jax
import jax.numpy as jnp


def largest(x: jax.Array, group: int) -> jax.Array:
  """The largest number of each group; NaN if there is one.

  Args:
    x: (*rows, n), floating-point.
    group: elements a group.

  Returns:
    (*rows, ceil(n / group)).

  Examples:
    >>> print(largest(jnp.arange(7.0), 3))
    [2. 5. 6.]
  """
  *rows, size = x.shape
  whole = size // group

  def reshaped(x):
    return jnp.max(x.reshape(*rows, whole, group), axis=-1)

  def windows(x):
    shape = *[1] * len(rows), group
    return jax.lax.reduce_window(
      x, jnp.array(-jnp.inf, x.dtype), jax.lax.max, shape, shape, 'VALID'
    )

  # The rest is reduced on its own: padding would be a copy of the array.
  parts = []
  if whole:
    # XLA compares the numbers of a row one by one on a CPU, those of windows
    # several at a time: ten times as fast.
    parts.append(
      jax.lax.platform_dependent(
        x[..., : whole * group], cpu=windows, default=reshaped
      )
    )
  if size % group:
    parts.append(jnp.max(x[..., whole * group :], axis=-1)[..., None])
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


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
