"""Arrays in groups along their last axis, the last group being shorter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def reduce(
  function: Callable[..., jax.Array], x: jax.Array, group: int
) -> jax.Array:
  """A statistic of each group.

  Args:
    function: of an array and an axis, such as jnp.max.
    x: (*rows, n).
    group: elements a group.

  Returns:
    (*rows, ceil(n / group)).

  Examples:
    >>> print(reduce(jnp.max, jnp.arange(7), 3))
    [2 5 6]
  """
  *rows, size = x.shape
  whole = size // group
  # The rest is reduced on its own: padding would be a copy of the array.
  parts = []
  if whole:
    parts.append(
      function(x[..., : whole * group].reshape(*rows, whole, group), axis=-1)
    )
  if size % group:
    parts.append(function(x[..., whole * group :], axis=-1)[..., None])
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def spread(x: jax.Array, group: int, shape: tuple[int, ...]) -> jax.Array:
  """What is known of each group, for each of its elements.

  Args:
    x: (*rows, groups), as from `reduce`.
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
