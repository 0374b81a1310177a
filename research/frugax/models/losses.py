"""Cross entropy of the tokens of a batch, from logits and without."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def of_batch(
  model,
  params: Any,
  batch: dict[str, jax.Array],
  key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What `token_losses` returns, of a model and what it is given.

  Args:
    model: has `apply(params, tokens, segment_ids=, positions=, key=)`: logits.
      One that has `head_losses`, as `Llama` does, also takes `labels=` and
      gives losses and log-partitions then, without logits in memory.
    params: its parameters.
    batch: 'tokens', 'labels', 'segment_ids' and 'positions', each (B, T).
    key: of random bits of low-bit products, or None.
  """
  tokens, labels = batch['tokens'], batch['labels']
  packed = {name: batch[name] for name in ('segment_ids', 'positions')}
  apply = functools.partial(model.apply, params, tokens, key=key, **packed)
  if not hasattr(model, 'head_losses'):
    return token_losses(apply(), labels)
  return *apply(labels=labels), labels >= 0


def token_losses(
  logits_BxTxV: jax.Array, labels_BxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cross entropy of each token that counts.

  Args:
    logits_BxTxV: float32 logits.
    labels_BxT: token ids, -1 where the token does not count.

  Returns:
    The losses in nats and the log-partitions, 0 where the label is -1, and
    the mask of the tokens that count, each of shape (B, T).
  """
  counts = labels_BxT >= 0
  lse = jax.nn.logsumexp(logits_BxTxV, axis=-1)
  label = jnp.maximum(labels_BxT, 0)[..., None]
  at_label = jnp.take_along_axis(logits_BxTxV, label, axis=-1)[..., 0]
  return jnp.where(counts, lse - at_label, 0), jnp.where(counts, lse, 0), counts


def in_two(
  of_part: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
  w: jax.Array,
  labels_BxT: jax.Array,
  at: int,
  axis: int,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy against a vocabulary whose two parts are computed apart.

  With log-partitions a and b of the parts, that of all is log(e^a + e^b), and a
  label in the first one adds log(1 + e^(b - a)) to its loss there.

  Args:
    of_part: a part of w and its labels, -1 where a token does not count, ->
      losses and log-partitions, (B, T), as `kernels.linear_cross_entropy`.
    w: the weights of the head.
    labels_BxT: token ids, -1 where the token does not count.
    at: where the second part begins.
    axis: of w, that is the vocabulary.

  Returns:
    The losses and log-partitions, 0 where the label is -1.

  Examples:
    >>> from frugax import kernels
    >>> x, w = jnp.eye(4)[None], jnp.eye(4, 5)
    >>> labels = jnp.array([[0, 4, 3, -1]])
    >>> loss = functools.partial(kernels.linear_cross_entropy, return_lse=True)
    >>> found = in_two(functools.partial(loss, x), w, labels, at=4, axis=1)
    >>> bool(jnp.allclose(jnp.array(found), jnp.array(loss(x, w, labels))))
    True
  """
  counts, first = labels_BxT >= 0, labels_BxT < at
  parts = jnp.split(w, [at], axis)
  # A label of the other part gives way to one that is here.
  loss_a, a = of_part(parts[0], jnp.where(first, labels_BxT, 0))
  rest = jnp.where(counts & first, 0, jnp.maximum(labels_BxT - at, -1))
  loss_b, b = of_part(parts[1], rest)
  losses = jnp.where(
    first, loss_a + jax.nn.softplus(b - a), loss_b + jax.nn.softplus(a - b)
  )
  return jnp.where(counts, losses, 0), jnp.where(counts, jnp.logaddexp(a, b), 0)
