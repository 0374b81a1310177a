"""`encode` in plain JAX: what XLA computes, and what the kernel must."""

import jax

from frugax.quant import Element, random_bits


def encode(
  x: jax.Array,
  steps: jax.Array,
  element: Element,
  turned: bool,
  key: jax.Array | None,
) -> jax.Array:
  """See `frugax.kernels.encode`."""
  x = x.T if turned else x
  random = None if key is None else random_bits(key, x.shape)
  return element.encode(element.round(x.astype('float32') / steps, random))
