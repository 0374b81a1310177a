"""Weight normalisation and GradNormLoRP against float64 twins."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim

LAST_TWO = optim.MatrixAxes((-2,), (-1,))


def problem(shape, steps=1):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=shape), jnp.float32)
  return w, jnp.asarray(rng.normal(size=(steps, *shape)), jnp.float32)


def recorder():
  """An optimizer that stands still and keeps the gradient that it saw."""
  return optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p),
    lambda u, state, p=None: (jax.tree.map(jnp.zeros_like, u), u),
  )


SHAPES = [(7, 5), (5, 7), (6, 6), (1, 5), (5, 1), (3, 4, 2), (2, 2, 3, 4)]


@pytest.mark.parametrize('shape', SHAPES)
def test_gradients_are_those_of_the_parametrisation(shape):
  w, (g,) = problem(shape)
  tx = optim.weight_normalized(recorder(), recorder(), lambda p: LAST_TWO)
  updates, state = tx.update(g, tx.init(w), w)
  np.testing.assert_array_equal(updates, 0 * w)

  def loss(v, norm):
    unit = v / jnp.linalg.norm(v, axis=-2, keepdims=True)
    return jnp.sum(g * unit * norm[..., None, :])

  norm = jnp.linalg.norm(w, axis=-2)
  want = jax.grad(loss, (0, 1))(w, norm)
  np.testing.assert_allclose(state.direction, want[0], atol=2e-6)
  np.testing.assert_allclose(state.magnitude, want[1], atol=2e-6)
  # Across the columns, and nothing lost.
  np.testing.assert_allclose(np.sum(state.direction * w, axis=-2), 0, atol=1e-5)
  whole = (
    state.direction + w / norm[..., None, :] * (state.magnitude[..., None, :])
  )
  np.testing.assert_allclose(whole, g, atol=2e-6)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_step_is_that_of_the_parametrisation(shape):
  w, (g,) = problem(shape)
  tx = optim.weight_normalized(
    optax.sgd(0.3), optax.sgd(0.2), lambda p: LAST_TWO
  )
  got, _ = jax.jit(tx.update)(g, tx.init(w), w)
  w, g = np.array(w, np.float64), np.array(g, np.float64)
  norm = np.linalg.norm(w, axis=-2, keepdims=True)
  along = np.sum(w / norm * g, axis=-2, keepdims=True)
  v = w - 0.3 * (g - w / norm * along)
  v /= np.linalg.norm(v, axis=-2, keepdims=True)
  np.testing.assert_allclose(got, (norm - 0.2 * along) * v - w, atol=2e-6)


def test_small_updates_keep_their_digits():
  """The difference of two weights has three of them here."""
  w, (g,) = problem((64, 32))
  tx = optim.weight_normalized(optax.sgd(1e-5), optax.sgd(1e-5))
  got, _ = tx.update(g, tx.init(w), w)
  # To first order in the rate, the two gradients are one.
  np.testing.assert_allclose(got, -1e-5 * g, rtol=1e-3, atol=1e-9)


def test_columns_of_zeros_leave_zero():
  params = jnp.array([[0.0, 1.0], [0.0, 1.0]])
  g = jnp.array([[1.0, 0.0], [2.0, 0.0]])
  tx = optim.weight_normalized(optax.sgd(0.1), optax.sgd(0.1))
  updates, _ = tx.update(g, tx.init(params), params)
  np.testing.assert_allclose(updates, [[-0.1, 0], [-0.2, 0]], rtol=1e-6)


def test_a_column_moved_to_zero_is_zero():
  params = jnp.array([[1.0], [2.0]])
  to_zero = optax.stateless(lambda g, p: -p)
  tx = optim.weight_normalized(to_zero, optax.sgd(0.1))
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(params + updates, 0 * params)


def twin_in_float64(w, grads, lr, rank, interval, scale, decay):
  """GradNormLoRP of a batch of (in, out) kernels, one by one, in numpy."""
  w = np.array(w, np.float64)

  def adam(x, state, t):
    mu, nu = 0.9 * state[0] + 0.1 * x, 0.999 * state[1] + 0.001 * x**2
    step = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    return step * mu / (np.sqrt(nu) + 1e-6), (mu, nu)

  for index in np.ndindex(w.shape[:-2]):
    inside = outside = (0.0, 0.0)
    for k, g in enumerate(grads):
      g, norm = np.array(g[index], np.float64), np.linalg.norm(w[index], axis=0)
      v = w[index] / norm
      along = np.sum(v * g, axis=0)
      g -= v * along
      turned = g.shape[0] > g.shape[1]
      g = g.T if turned else g
      if k % interval == 0:
        p = np.linalg.svd(g)[0][:, :rank]
        p = p * np.sign(p[np.abs(p).argmax(0), range(p.shape[1])])
      u, inside = adam(p.T @ g, inside, k + 1)
      u = scale * (p @ u)
      grow, outside = adam(along, outside, k + 1)
      new = w[index] - lr * (u.T if turned else u)
      new *= (norm - lr * grow) / np.linalg.norm(new, axis=0)
      w[index] = (1 - lr * decay) * new
  return w


@pytest.mark.parametrize('shape', [(3, 7, 5), (2, 2, 4, 9), (6, 6), (2, 5)])
def test_equals_a_float64_twin(shape):
  w, grads = problem(shape, steps=7)
  tx = optim.grad_norm_lorp(
    0.05,
    rank=2,
    update_interval=3,
    weight_decay=0.1,
    mask=lambda p: True,
    axes=lambda p: LAST_TWO,
  )
  params, state, update = w, tx.init(w), jax.jit(tx.update)
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  want = twin_in_float64(w, grads, 0.05, 2, 3, 0.25, 0.1)
  np.testing.assert_allclose(params, want, atol=2e-5)


def test_what_is_left_whole_has_plain_adam():
  params = {'w': jnp.eye(4), 'b': jnp.ones(3)}
  tx = optim.grad_norm_lorp(0.1, rank=2, axes={'w': None, 'b': None})
  adam = optax.chain(optim.scale_by_adam_hf(), optim.step_and_decay(0.1))
  got, _ = tx.update(params, tx.init(params), params)
  want, _ = adam.update(params, adam.init(params))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_state_is_galores_and_two_numbers_a_column():
  params = {'w': jnp.zeros((3, 64, 48))}
  axes = {'w': LAST_TWO}
  sizes = [
    optim.state_bytes(make(0.1, rank=8, axes=axes), params)
    for make in (optim.grad_norm_lorp, optim.galore)
  ]
  assert sizes[0]['projector'] == sizes[1]['projector']
  assert sizes[0]['moments'] == sizes[1]['moments'] + 4 * 2 * 3 * 48


def test_without_parameters_it_says_so():
  tx = optim.grad_norm_lorp(0.1, rank=1)
  params = jnp.ones((2, 2))
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(params, tx.init(params))
