"""Subspace momentum against a float64 twin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim


def momentum_in_float64(w, grads, lr, rank, interval, moments):
  """A batch of (in, out) kernels, one by one, in numpy."""
  w = np.array(w, np.float64)
  for index in np.ndindex(w.shape[:-2]):
    mu, p = 0.0, None
    for k, g in enumerate(grads):
      g = np.array(g[index], np.float64)
      turned = g.shape[0] > g.shape[1]
      g = g.T if turned else g
      if k % interval == 0:
        old, p = p, np.linalg.svd(g)[0][:, :rank]
        p = p * np.sign(p[np.abs(p).argmax(0), range(p.shape[1])])
        if k:
          mu = p.T @ old @ mu if moments == 'rotate' else 0.0
      r = p.T @ g
      mu = 0.9 * mu + 0.1 * r
      u = p @ mu + g - p @ r
      w[index] -= lr * (u.T if turned else u)
  return w


@pytest.mark.parametrize('moments', ['zero', 'rotate'])
@pytest.mark.parametrize('shape', [(3, 7, 5), (2, 2, 4, 9), (6, 6), (2, 5)])
def test_equals_a_float64_twin(shape, moments):
  rng = np.random.default_rng(0)
  w = rng.normal(size=shape).astype(np.float32)
  grads = rng.normal(size=(7, *shape)).astype(np.float32)
  tx = optim.subspace_momentum(
    0.05,
    rank=2,
    update_interval=3,
    moments=moments,
    axes=lambda p: optim.MatrixAxes((-2,), (-1,)),
  )
  params, update = jnp.asarray(w), jax.jit(tx.update)
  state = tx.init(params)
  for g in grads:
    updates, state = update(jnp.asarray(g), state, params)
    params = optax.apply_updates(params, updates)
  want = momentum_in_float64(w, grads, 0.05, 2, 3, moments)
  np.testing.assert_allclose(params, want, atol=1e-5, rtol=1e-5)


def test_vectors_have_momentum_and_a_refresh_leaves_it_alone():
  g = {'w': jnp.ones((4, 6)), 'b': jnp.ones(3)}
  tx = optim.subspace_momentum(1.0, rank=2, update_interval=2)
  state = tx.init(g)
  for k in range(4):
    updates, state = tx.update(g, state)
    np.testing.assert_allclose(updates['b'], -(1 - 0.9 ** (k + 1)), rtol=1e-5)


def test_state_keeps_its_dtype():
  g = jnp.ones((4, 6), jnp.bfloat16)
  tx = optim.subspace_momentum(1.0, rank=2, state_dtype=jnp.float32)
  updates, state = tx.update(g, tx.init(g))
  assert updates.dtype == jnp.bfloat16
  assert state[0].inner.mu.dtype == jnp.float32
