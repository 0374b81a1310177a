"""SGD-SaI against the authors' code and a float64 twin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim


@pytest.mark.parametrize('shape', ['6x4', '4x6'])
def test_follows_the_reference(shape, trace, golden):
  got = trace(optim.sgd_sai(0.01), shape)
  np.testing.assert_allclose(got, golden[f'sgd_sai {shape}'], atol=2e-5, rtol=0)


def sgd_sai_in_float64(w, grads, lr, decay):
  """One layer."""
  w, grads = np.array(w, np.float64), np.array(grads, np.float64)
  ratio = np.linalg.norm(grads[0]) / (grads[0].std(ddof=1) + 1e-8)
  mu = grads[0]
  for k, g in enumerate(grads):
    mu = 0.9 * mu + 0.1 * g if k else mu
    w = (1 - lr * decay) * w - lr * ratio * mu
  return w


def run(tx, params, grads):
  state, update = tx.init(params), jax.jit(tx.update)
  for k in range(len(jax.tree.leaves(grads)[0])):
    g = jax.tree.map(lambda g, k=k: g[k], grads)
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_every_layer_has_its_own_ratio():
  """Stacks of matrices, of experts and of vectors, and one vector."""
  shapes = {'w': (3, 5, 7), 'e': (2, 3, 4, 2), 'norm': (3, 6), 'b': (5,)}
  batch = {'w': 1, 'e': 2, 'norm': 1, 'b': 0}
  axes = {
    'w': optim.MatrixAxes((-2,), (-1,)),
    'e': ('layers', 'experts', 'embed', 'mlp'),
    'norm': ('layers', 'norm'),
    'b': None,
  }
  rng = np.random.default_rng(0)
  params = {
    k: jnp.asarray(rng.normal(size=s), 'float32') for k, s in shapes.items()
  }
  # Layers of different sizes and means, so that ratios differ.
  grads = {
    k: jnp.asarray(rng.normal(size=(4, *s)) + rng.normal(size=s), 'float32')
    for k, s in shapes.items()
  }
  got, state = run(
    optim.sgd_sai(0.05, weight_decay=0.1, axes=axes), params, grads
  )
  for name, depth in batch.items():
    assert state[0].gsnr[name].shape == shapes[name][:depth]
    for index in np.ndindex(shapes[name][:depth]):
      g = grads[name][(slice(None), *index)]
      want = sgd_sai_in_float64(params[name][index], g, 0.05, 0.1)
      np.testing.assert_allclose(got[name][index], want, atol=1e-5, rtol=1e-5)


def test_ratios_are_fixed_at_the_first_step():
  tx = optim.scale_by_sai()
  g = jnp.array([1.0, 2.0, -1.0])
  _, state = tx.update(g, tx.init(g))
  first = state.gsnr
  _, state = tx.update(g**3, state)
  np.testing.assert_array_equal(state.gsnr, first)


def test_a_layer_without_a_first_gradient_takes_the_next():
  """And leaves the ratios of the others alone."""
  tx = optim.scale_by_sai(axes=('layers', 'norm'))
  g = jnp.array([[0.0, 0.0], [3.0, -1.0]])
  updates, state = tx.update(g, tx.init(g))
  np.testing.assert_array_equal(updates[0], [0.0, 0.0])
  _, later = tx.update(g[::-1] ** 2, state)
  assert state.gsnr[0] == 0 and later.gsnr[0] > 0
  assert later.gsnr[1] == state.gsnr[1]


def test_one_entry_has_ratio_one():
  tx = optim.scale_by_sai()
  g = jnp.array([-0.25])
  updates, _ = tx.update(g, tx.init(g))
  np.testing.assert_array_equal(updates, g)


def test_state_is_one_momentum():
  params = {'w': jnp.zeros((3, 16, 8), jnp.bfloat16), 'b': jnp.zeros(8)}
  axes = {'w': optim.MatrixAxes((1,), (2,)), 'b': None}
  sizes = optim.state_bytes(optim.sgd_sai(0.1, axes=axes), params)
  momentum, ratios = 2 * 3 * 16 * 8 + 4 * 8, 4 * (3 + 1)
  assert sizes['moments'] == momentum + ratios
  assert sizes['total'] == sizes['moments'] + 4


def test_names_that_do_not_fit_say_so():
  with pytest.raises(ValueError, match='one name an axis'):
    optim.sgd_sai(0.1, axes=('layers', 'norm')).init(jnp.zeros(3))
