"""Cross entropy of the tokens of a batch, from logits and without."""

import functools
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
