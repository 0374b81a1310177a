"""What transformations have counted, for the metrics of a training step."""

from typing import Any

import jax
import jax.numpy as jnp

_LARGEST = jnp.iinfo(jnp.int32).max


def counts(state: Any) -> dict[str, jax.Array]:
  """The counts in an optimizer's state, by the names of their fields.

  A count is an integer scalar in a field whose name ends in `_count`, such as
  `spike_count`, `clip_count`, `damp_count` and `reset_count` of this package
  and optax's `notfinite_count`. They only grow, so nothing is lost between two
  rows of a log. Counts of the same name, as of two groups of parameters, are
  added up.

  Args:
    state: the state of any optax transformation.

  Returns:
    int32 scalars by name; empty if nothing is counted.

  Examples:
    >>> from frugax.optim import spam
    >>> tx = spam(learning_rate=1e-3)
    >>> print(counts(tx.init({'w': jnp.zeros((4, 4))})))
    {'reset_count': Array(0, dtype=int32), 'spike_count': Array(0, dtype=int32)}
  """
  found: dict[str, jax.Array] = {}
  for path, x in jax.tree.leaves_with_path(state):
    name = getattr(path[-1], 'name', '') if path else ''
    is_scalar = jnp.ndim(x) == 0
    if (
      name.endswith('_count')
      and is_scalar
      and jnp.issubdtype(x.dtype, jnp.integer)
    ):
      found[name] = add_count(found[name], x) if name in found else x
  return dict(sorted(found.items()))


def add_count(count: jax.Array, new: jax.Array) -> jax.Array:
  """The sum of two counts; it stays at the largest int32 instead of wrapping.

  Examples:
    >>> print(add_count(jnp.int32(2**31 - 5), jnp.int32(9)))
    2147483647
  """
  room = _LARGEST - count
  return count + jnp.minimum(new.astype(jnp.int32), room)
