"""The limiter of norm growth against hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from frugax import optim


def test_each_matrix_of_a_stack_has_its_own_norm():
  e = jnp.eye(2) / jnp.sqrt(2)  # of norm 1
  axes = optim.MatrixAxes((1,), (2,))
  tx = optim.limit_norm_growth(1.5, axes)
  state = tx.init(jnp.zeros((2, 2, 2)))
  seen = []
  for a, b in [(1, 4), (8, 4), (8, 1), (1, 10)]:
    updates, state = tx.update(jnp.stack([a * e, b * e]), state)
    seen.append(np.linalg.norm(updates, axis=(1, 2)))
    np.testing.assert_allclose(state.norms, seen[-1], rtol=1e-6)
  want = [[1, 4], [1.5, 4], [2.25, 1], [1, 1.5]]
  np.testing.assert_allclose(seen, want, rtol=1e-6)


def test_leaves_without_axes_have_one_norm():
  tx = optim.limit_norm_growth(2.0)
  params = {'v': jnp.zeros(3), 's': jnp.zeros(()), 'w': jnp.zeros((1, 1))}
  state = tx.init(params)
  update = jax.jit(tx.update)
  for size in (1.0, 10.0):
    grads = jax.tree.map(lambda p: jnp.full(p.shape, size), params)  # noqa: B023
    updates, state = update(grads, state)
  for x, p in zip(
    jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_allclose(x, np.full(p.shape, 2.0), rtol=1e-6)


def test_a_step_without_gradient_does_not_stop_training():
  tx = optim.limit_norm_growth()
  g = jnp.ones((2, 2))
  state = tx.init(g)
  for size in (1.0, 0.0, 1.0):
    updates, state = tx.update(size * g, state)
  np.testing.assert_array_equal(updates, g)


def test_bfloat16_updates_keep_their_dtype_and_float32_norms():
  g = jnp.ones((4, 4), jnp.bfloat16)
  tx = optim.limit_norm_growth()
  updates, state = tx.update(g, tx.init(g))
  assert updates.dtype == jnp.bfloat16
  assert state.norms.dtype == jnp.float32
