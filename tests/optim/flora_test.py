"""Flora and Adafactor's parts against a float64 twin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import factored, projectors


def rms(x):
  return np.sqrt(np.mean(x**2))


def flora_in_float64(w, grads, bases, lr, decay):
  """One (in, out) kernel; bases[k] is the basis at step k."""
  w, m = np.array(w, np.float64), 0.0
  rows = cols = 0.0
  turned = w.shape[0] > w.shape[1]
  for k, g in enumerate(grads):
    g = np.array(g, np.float64)
    p = bases[k].astype(np.float64)
    beta = 1 - (k + 1) ** -0.8
    rows = beta * rows + (1 - beta) * (g**2).mean(1)
    cols = beta * cols + (1 - beta) * (g**2).mean(0)
    u = g / np.sqrt(np.outer(rows, cols) / rows.mean())
    u = u.T if turned else u
    if k and bases[k] is not bases[k - 1]:
      m = p.T @ (bases[k - 1] @ m)
    x = 0.9 * p @ m + 0.1 * u if k else 0.1 * u
    m = 0.9 * m + 0.1 * p.T @ u
    x = x / max(1, rms(x))
    x = x.T if turned else x
    w = w - lr * (max(rms(w), 1e-3) * x + decay * w)
  return w


@pytest.mark.parametrize('shape', [(3, 5, 8), (3, 8, 5), (1, 6, 6)])
def test_flora_equals_a_float64_twin(shape):
  rng = np.random.default_rng(0)
  w = rng.normal(size=shape).astype(np.float32)
  # The third layer starts at zero, where the smallest step is taken.
  w[2:] = 0.0
  grads = rng.normal(size=(7, *shape)).astype(np.float32)
  tx = optim.flora(
    0.05,
    rank=2,
    update_interval=3,
    weight_decay=0.1,
    axes=lambda p: optim.MatrixAxes((-2,), (-1,)),
  )
  params, update = jnp.asarray(w), jax.jit(tx.update)
  state, bases = tx.init(params), []
  basis = projectors.random(shape, 2, 'short', jnp.float32).basis
  for k, g in enumerate(grads):
    updates, state = update(jnp.asarray(g), state, params)
    params = optax.apply_updates(params, updates)
    new = k % 3 == 0
    bases.append(
      np.asarray(basis(state[1].projectors))[0] if new else bases[-1]
    )
  for i, layer in enumerate(w):
    want = flora_in_float64(layer, grads[:, i], bases, 0.05, 0.1)
    np.testing.assert_allclose(params[i], want, atol=1e-5, rtol=1e-5)


def test_vectors_have_a_full_second_moment():
  tx = factored.scale_by_factored_rms()
  g = jnp.array([1e-20, -3.0, 1e10])
  updates, _ = tx.update(g, tx.init(g))
  np.testing.assert_allclose(updates, [1e-5, -1, 1], rtol=1e-4)


def test_the_factored_moment_equals_optax_on_one_matrix():
  rng = np.random.default_rng(0)
  ours = factored.scale_by_factored_rms()
  theirs = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
  g = jnp.zeros((5, 7))
  state, twin = ours.init(g), theirs.init(g)
  for _ in range(4):
    g = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    got, state = ours.update(g, state)
    want, twin = theirs.update(g, twin, g)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_each_matrix_of_a_stack_is_clipped_and_scaled_by_itself():
  axes = optim.MatrixAxes((1,), (2,))
  x = jnp.stack([jnp.full((2, 2), 0.5), jnp.full((2, 2), 4.0)])
  clip = factored.clip_rms(1.0, axes)
  got, _ = clip.update(x, clip.init(x))
  np.testing.assert_allclose(got[:, 0, 0], [0.5, 1.0])
  scale = factored.scale_by_parameter_rms(1.0, axes)
  got, _ = scale.update(jnp.ones_like(x), scale.init(x), x)
  np.testing.assert_allclose(got[:, 0, 0], [1.0, 4.0])


def test_parameters_are_needed():
  tx = optim.flora(0.1, rank=1)
  g = jnp.ones((4, 6))
  with pytest.raises(ValueError, match='need them'):
    tx.update(g, tx.init(g))
