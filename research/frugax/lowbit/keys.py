"""Keys of random bits that need no state."""

import jax
import jax.numpy as jnp
from jax import lax

_PRODUCTS = 6  # three, and the roundings of their results


def content_key(x: jax.Array) -> jax.Array:
  """A key from the bits of an array.

  Sums of integers, in any order alike: the same array has the same
  key on any mesh. One that differs in a last bit, as gradients that are summed
  in another order do, has another key.

  Args:
    x: an array; its bits in float32 count.

  Returns:
    A typed key.

  Examples:
    >>> a, b = content_key(jnp.ones(3)), content_key(jnp.array([1., 1., 2.]))
    >>> bool((a == b).all())
    False
  """
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  mixed = (bits ^ bits >> 15) * jnp.uint32(0x85EBCA6B)
  words = jnp.stack([bits.sum(), (mixed ^ mixed >> 13).sum()])
  return jax.random.wrap_key_data(words, impl='threefry2x32')


def weights_key(key: jax.Array | None, number: int) -> jax.Array | None:
  """The key of one of the weights that the same activations multiply.

  Args:
    key: of all of them, or None.
    number: which of them it is.

  Returns:
    A key unlike that of any operand of `key`; None for None.
  """
  if key is None:
    return None
  return jax.random.fold_in(key, 2 * _PRODUCTS + number)


def operand_keys(
  key: jax.Array | None, product: int, left: jax.Array, right: jax.Array
) -> list[jax.Array]:
  """One key for each operand of a product.

  Args:
    key: a typed key; None takes it from the operands' bits.
    product: which of the products of a layer it is, or of their results.
    left: an operand.
    right: the other one.

  Returns:
    Two keys.
  """
  out = []
  for i, x in enumerate((left, right)):
    k = content_key(x) if key is None else key
    out.append(jax.random.fold_in(k, 2 * product + i))
  return out
