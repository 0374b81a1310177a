"""Fira against the authors' code and a float64 twin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import projection


# The trace is free of LAPACK's choice of signs up to the refresh at step 5.
def test_fira_follows_the_reference(trace, golden):
  got = trace(optim.fira(0.01, rank=2, update_interval=5), '6x4')
  want = np.array(golden['fira 6x4'])
  np.testing.assert_allclose(got[:5], want[:5], atol=2e-5, rtol=0)
  # Our convention agrees with theirs once more, at the first refresh.
  np.testing.assert_allclose(got[:10], want[:10], atol=2e-5, rtol=0)


def test_fira_follows_the_reference_to_the_end_with_its_signs(
  trace, golden, with_signs
):
  projector = with_signs([[1, 1], [1, 1], [-1, 1]])
  tx = optim.fira(0.01, rank=2, update_interval=5, projector=projector)
  got = trace(tx, '6x4')
  np.testing.assert_allclose(got, golden['fira 6x4'], atol=2e-5, rtol=0)


def fira_in_float64(w, grads, lr, rank, interval, scale, inside):
  """Textbook Fira of a batch of (in, out) kernels, one by one, in numpy."""
  w = np.array(w, np.float64)
  for index in np.ndindex(w.shape[:-2]):
    mu = nu = 0.0
    last = None
    for k, g in enumerate(grads):
      g = np.array(g[index], np.float64)
      turned = g.shape[0] > g.shape[1]
      g = g.T if turned else g
      if k % interval == 0:
        p = np.linalg.svd(g)[0][:, :rank]
        p = p * np.sign(p[np.abs(p).argmax(0), range(p.shape[1])])
      r = p.T @ g
      mu = 0.9 * mu + 0.1 * r
      nu = 0.999 * nu + 0.001 * r**2
      n = mu / (np.sqrt(nu) + 1e-6)
      phi = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
      s = (g - inside * p @ r) * phi
      norm = np.linalg.norm(s)
      if last is not None:
        limit = max(norm / (last + 1e-8), 1.01) / 1.01
        s, norm = s / limit, norm / limit
      last = norm
      step = np.sqrt(1 - 0.999 ** (k + 1)) / (1 - 0.9 ** (k + 1))
      u = step * (scale * p @ n + s)
      w[index] -= lr * (u.T if turned else u)
  return w


@pytest.mark.parametrize('uses_alpha', [True, False])
@pytest.mark.parametrize('shape', [(3, 7, 5), (2, 2, 4, 9), (6, 6), (2, 5)])
def test_fira_equals_a_float64_twin(shape, uses_alpha):
  rng = np.random.default_rng(0)
  w = rng.normal(size=shape).astype(np.float32)
  # Sizes that jump, so that the limiter acts at some of the steps.
  sizes = np.array([1, 5, 1, 1, 20, 1, 3]).reshape(-1, *[1] * len(shape))
  grads = (sizes * rng.normal(size=(7, *shape))).astype(np.float32)
  tx = optim.fira(
    0.05,
    rank=2,
    update_interval=3,
    residual_uses_alpha=uses_alpha,
    axes=lambda p: optim.MatrixAxes((-2,), (-1,)),
  )
  params, update = jnp.asarray(w), jax.jit(tx.update)
  state = tx.init(params)
  for g in grads:
    updates, state = update(jnp.asarray(g), state, params)
    params = optax.apply_updates(params, updates)
  inside = 0.25 if uses_alpha else 1.0
  want = fira_in_float64(w, grads, 0.05, 2, 3, 0.25, inside)
  np.testing.assert_allclose(params, want, atol=1e-5, rtol=1e-5)


def test_vectors_get_plain_adam():
  params = {'w': jnp.ones((4, 6)), 'b': jnp.ones(3)}
  grads = {'w': jnp.ones((4, 6)), 'b': jnp.array([1.0, -2.0, 3.0])}
  tx = optim.fira(0.1, rank=2)
  adam = optax.chain(optim.scale_by_adam_hf(), optim.step_and_decay(0.1))
  state, twin = tx.init(params), adam.init(params)
  for _ in range(3):
    got, state = tx.update(grads, state)
    want, twin = adam.update(grads, twin)
    np.testing.assert_allclose(got['b'], want['b'], rtol=1e-6)


def test_reset_starts_the_bias_correction_anew():
  """With the same gradient in every interval the steps repeat."""
  params = {'w': jnp.ones((4, 6)), 'b': jnp.ones(3)}
  rng = np.random.default_rng(0)
  grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  tx = optim.fira(0.1, rank=2, update_interval=2, moments='reset')
  state, seen = tx.init(params), []
  for _ in range(4):
    updates, state = tx.update(grads, state)
    seen.append(updates['b'])
  np.testing.assert_allclose(seen[2], seen[0], rtol=1e-5)
  np.testing.assert_allclose(seen[3], seen[1], rtol=1e-5)


@pytest.mark.parametrize('uses_alpha', [True, False])
def test_norms_without_a_matmul_are_those_with_one(uses_alpha):
  """Of an orthonormal basis they follow from G and R; of others they do not."""

  def svd(g, old, rank, key):
    return jnp.linalg.svd(g, full_matrices=False)[0][:, :rank]

  def twice(g, old, rank, key):
    return 2 * svd(g, old, rank, key)

  rng = np.random.default_rng(0)
  grads = [
    jnp.asarray(size * rng.normal(size=(5, 9)), jnp.float32)
    for size in (1, 3, 1, 9)
  ]

  def run(projector):
    tx = optim.fira(
      0.1,
      rank=2,
      update_interval=2,
      projector=projector,
      residual_uses_alpha=uses_alpha,
    )
    state, seen = tx.init(grads[0]), []
    for g in grads:
      updates, state = tx.update(g, state)
      seen.append(state[0].residuals)
    return np.array(seen), updates

  fast, slow = (
    run(projection.from_basis(svd, orthonormal))
    for orthonormal in (True, False)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    fast,
    slow,
  )
  wrong, right = (
    run(projection.from_basis(twice, orthonormal))
    for orthonormal in (True, False)
  )
  assert np.abs(wrong[0] / right[0] - 1).max() > 0.05
