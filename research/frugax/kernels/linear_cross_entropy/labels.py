"""Labels of any integer dtype, and of a vocabulary in two parts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

IGNORED, UNKNOWN = -1, -2
# Losses and log-partitions of labels.
Losses = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def as_int32(labels: jax.Array | np.ndarray, ignore_index: int) -> jax.Array:
  """Labels in int32: -1 where they are ignored, -2 if negative otherwise.

  None changes its meaning: 255 in uint8 is not -1, and 2^32 is not 0.

  Args:
    labels: integers.
    ignore_index: the label of tokens that do not count.

  Examples:
    >>> as_int32(np.array([255, 3], np.uint8), -1).tolist()
    [255, 3]
    >>> as_int32(np.array([-1, 7, 2**32]), 7).tolist()
    [-2, -1, 2147483647]
  """
  # JAX would cut the upper bits of NumPy's 64 off.
  wide = isinstance(labels, np.ndarray) and labels.dtype.itemsize == 8
  xp = np if wide else jnp
  labels = xp.asarray(labels)
  of_labels, of_int32 = jnp.iinfo(labels.dtype), jnp.iinfo(jnp.int32)
  low, high = max(of_labels.min, UNKNOWN), min(of_labels.max, of_int32.max)
  found = xp.clip(labels, low, high).astype(np.int32)
  found = xp.where(found < 0, UNKNOWN, found)
  if of_labels.min <= ignore_index <= of_labels.max:
    ignored = labels == xp.asarray(ignore_index, labels.dtype)
    found = xp.where(ignored, IGNORED, found)
  return jnp.asarray(found, jnp.int32)


def in_two(
  first: Losses,
  second: Losses,
  labels: jax.Array,
  at: int,
  vocabulary: int,
  z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy against a vocabulary whose two parts are computed apart.

  With log-partitions a and b of the parts, that of all is log(e^a + e^b), and a
  label in the first one adds log(1 + e^(b - a)) to its loss there.

  Args:
    first: of the first part, without a z-loss.
    second: of the second part, whose tokens are counted from 0 there.
    labels: as of `as_int32`.
    at: where the second part begins.
    vocabulary: tokens of both.
    z_loss: see `linear_cross_entropy`.

  Returns:
    The losses and log-partitions, 0 where labels are ignored.

  Examples:
    >>> from frugax.kernels import linear_cross_entropy as loss
    >>> x, w, labels = jnp.eye(4), jnp.eye(4, 5), jnp.array([0, 4, 3, -1])
    >>> def of(w):
    ...   return lambda labels: loss(x, w, labels, return_lse=True)
    >>> found = in_two(of(w[:, :4]), of(w[:, 4:]), labels, at=4, vocabulary=5)
    >>> bool(jnp.allclose(jnp.array(found), jnp.array(of(w)(labels))))
    True
  """
  counts, in_first = labels != IGNORED, labels < at
  # A label that is not in a part gives way to one that is.
  loss_a, a = first(jnp.where(in_first & (labels != UNKNOWN), labels, 0))
  rest = jnp.where(in_first, 0, labels - at)
  loss_b, b = second(jnp.where(counts, rest, IGNORED))
  losses = jnp.where(
    in_first, loss_a + jax.nn.softplus(b - a), loss_b + jax.nn.softplus(a - b)
  )
  known = (labels >= 0) & (labels < vocabulary)
  lse = jnp.where(counts, jnp.logaddexp(a, b), 0)
  losses = jnp.where(counts, jnp.where(known, losses, jnp.nan), 0)
  return losses + z_loss * jnp.square(lse), lse
