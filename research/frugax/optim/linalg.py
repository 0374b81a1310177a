"""Factorisations of stacks of matrices, made unique by fixing signs."""

import jax
import jax.numpy as jnp


def left_vectors(g: jax.Array) -> jax.Array:
  """The left singular vectors, with the largest entry of each positive.

  Their signs are arbitrary and differ between back ends, yet moments that are
  kept across a refresh depend on them.
  """
  basis = _factorize(lambda x: jnp.linalg.svd(x, full_matrices=False)[0], g)
  at = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
  return basis * jnp.sign(jnp.take_along_axis(basis, at, axis=-2))


def unit(g: jax.Array) -> jax.Array:
  """g over its largest magnitude: squares of 1e-20 would vanish in float32."""
  tiny = jnp.finfo(g.dtype).tiny
  return g / jnp.maximum(jnp.abs(g).max(axis=(-1, -2), keepdims=True), tiny)


def orthonormal(x: jax.Array) -> jax.Array:
  """The Q of QR factorisations with a positive diagonal, which are unique."""
  q, r = _factorize(jnp.linalg.qr, x)
  signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
  return q * jnp.where(signs == 0, 1, signs)[..., None, :]


def orthogonal_iteration(g: jax.Array, p: jax.Array, steps: int) -> jax.Array:
  """Steps from the columns of p towards g's leading left singular vectors."""
  g = unit(g)
  for _ in range(steps):
    with jax.default_matmul_precision('highest'):
      p = orthonormal(g @ (g.mT @ p))
  return p


def _factorize(f, x):
  """`f(x)` for a stack of matrices; on CPUs for one of them after the other.

  jaxlib hands the matrices of a stack to the thread pool that its caller runs
  on, and waits: several virtual devices at once wait for each other for ever.
  """
  *batch, m, n = x.shape
  if not batch:
    return f(x)

  def one_by_one(x):
    factors = jax.lax.map(f, x.reshape(-1, m, n))
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), factors)

  return jax.lax.platform_dependent(x, cpu=one_by_one, default=f)
