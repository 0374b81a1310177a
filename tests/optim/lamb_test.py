"""LAMB against optax's layer by layer, and its subset-norm form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim

AXES = {'w': optim.MatrixAxes((-2,), (-1,)), 'norm': ('layers', 'norm')}


def run(tx, params, steps=5):
  state, update = tx.init(params), jax.jit(tx.update)
  for k in range(steps):
    grads = jax.tree.map(lambda p, k=k: jnp.sin(3 * p + k), params)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def parameters():
  rng = np.random.default_rng(0)
  scale = np.array([0.1, 1.0, 7.0])
  return {
    'w': jnp.asarray(scale[:, None, None] * rng.normal(size=(3, 4, 6)), 'f4'),
    'norm': jnp.asarray(scale[:, None] * rng.normal(size=(3, 6)), 'f4'),
  }


@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_equals_optax_on_each_layer(decay):
  got = run(optim.lamb(0.02, weight_decay=decay, axes=AXES), parameters())
  for i in range(3):
    layer = jax.tree.map(lambda p, i=i: p[i], parameters())
    want = run(optax.lamb(0.02, weight_decay=decay), layer)
    for name in AXES:
      np.testing.assert_allclose(got[name][i], want[name], rtol=2e-5)
  # What this is for: optax has one ratio for the stack.
  stacked = run(optax.lamb(0.02, weight_decay=decay), parameters())
  assert not np.allclose(stacked['w'], got['w'], rtol=1e-2)


@pytest.mark.parametrize('subset', ['heuristic', 4])
def test_subset_norm_is_that_of_adam_sn(subset):
  params = parameters()
  tx = optim.lamb(0.02, subset=subset, weight_decay=0.1, axes=AXES)
  got, state = tx.update(params, tx.init(params), params)
  plain = optim.scale_by_adam_sn(subset=subset, axes=AXES)
  step, plain_state = plain.update(params, plain.init(params))
  assert jax.tree.map(jnp.shape, state[0]) == jax.tree.map(
    jnp.shape, plain_state
  )
  for name, over in (('w', (1, 2)), ('norm', (1,))):
    step[name] += 0.1 * params[name]
    ratio = np.linalg.norm(params[name], axis=over, keepdims=True)
    ratio /= np.linalg.norm(step[name], axis=over, keepdims=True)
    np.testing.assert_allclose(got[name], -0.02 * ratio * step[name], rtol=1e-5)


def test_the_step_is_as_long_as_the_weight_times_the_rate():
  params = parameters()
  tx = optim.lamb(0.02, subset='heuristic', axes=AXES)
  updates, _ = tx.update(params, tx.init(params), params)
  for name, over in (('w', (1, 2)), ('norm', (1,))):
    np.testing.assert_allclose(
      np.linalg.norm(updates[name], axis=over),
      0.02 * np.linalg.norm(params[name], axis=over),
      rtol=1e-5,
    )


def test_zero_weights_and_zero_updates_have_ratio_one():
  params = jnp.array([[0.0, 0.0], [3.0, 4.0]])
  updates = jnp.array([[1.0, 2.0], [0.0, 0.0]])
  tx = optim.scale_by_trust_ratio(axes=('layers', 'norm'))
  got, _ = tx.update(updates, tx.init(params), params)
  np.testing.assert_array_equal(got, updates)


def test_without_parameters_it_says_so():
  with pytest.raises(ValueError, match='parameters'):
    optim.scale_by_trust_ratio().update(jnp.ones(2), optax.EmptyState())
