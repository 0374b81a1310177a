"""LDAdam against the authors' code, with error feedback."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import residuals


@pytest.mark.parametrize('shape', ['6x4', '4x6'])
def test_ldadam_follows_the_reference(shape, trace, golden):
  got = trace(optim.ldadam(0.01, rank=2), shape)
  np.testing.assert_allclose(got, golden[f'ldadam {shape}'], atol=2e-5, rtol=0)


def test_full_rank_is_adam():
  """A square basis loses nothing: no error, and Adam in turned coordinates."""
  rng = np.random.default_rng(0)
  params = {'w': jnp.zeros((3, 5))}
  tx = optim.ldadam(0.1, rank=3)
  state = tx.init(params)
  for _ in range(4):
    grads = {'w': jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)}
    _, state = tx.update(grads, state)
    np.testing.assert_allclose(state[0].residuals['w'], 0.0, atol=1e-5)


@pytest.mark.parametrize('shape', [(12, 20), (20, 12), (3, 12, 20)])
def test_the_first_subspace_may_be_sketched(shape):
  """Where one is the best by far, the sketch finds that of the SVD."""
  rng = np.random.default_rng(0)
  *batch, m, n = shape
  g = rng.normal(size=(*batch, m, 2)) @ rng.normal(size=(*batch, 2, n))
  g = jnp.asarray(g + 1e-3 * rng.normal(size=shape), jnp.float32)
  spans = {'svd': [], 'sketch': []}
  for name, found in spans.items():
    tx = optim.ldadam(
      0.1, 2, first_projector=name, axes=optim.MatrixAxes(-2, -1)
    )
    state = tx.init(g)
    program = str(jax.make_jaxpr(tx.update)(g, state))
    assert ('svd' in program) == (name == 'svd')
    for _ in range(2):  # The first subspace, and one that follows it.
      _, state = jax.jit(tx.update)(g, state)
      p = state[0].projectors  # Right of a tall matrix it lies on its side.
      p = p if m < n else p.mT
      assert p.shape == (*batch, 12, 2)
      found.append(p @ p.mT)
  np.testing.assert_allclose(spans['sketch'], spans['svd'], atol=1e-4)


def test_an_unknown_first_projector_is_named():
  with pytest.raises(ValueError, match="first_projector 'sktech'"):
    optim.ldadam(0.1, first_projector='sktech')


def test_error_feedback_is_optional_and_has_a_dtype():
  params = {'w': jnp.zeros((8, 16), jnp.bfloat16)}
  sizes = {}
  for name, arguments in {
    'without': {'error_feedback': False},
    'own': {},
    'float32': {'error_dtype': jnp.float32},
  }.items():
    tx = optim.ldadam(0.1, rank=2, **arguments)
    sizes[name] = optim.state_bytes(tx, params)['total']
  assert sizes['own'] - sizes['without'] == 2 * 8 * 16
  assert sizes['float32'] - sizes['without'] == 4 * 8 * 16


def test_nothing_is_lost_in_the_long_run():
  """A constant gradient of full rank: the mean update points along it."""
  g = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)

  def overlap(error_feedback):
    tx = optim.low_rank(
      optim.scale_by_momentum(b1=0.0),
      1,
      1,
      residual=residuals.feedback(0.0) if error_feedback else 'drop',
    )
    state, total, update = tx.init(g), 0.0, jax.jit(tx.update)
    for _ in range(60):
      u, state = update(g, state)
      total += u
    return float(
      jnp.vdot(total, g) / jnp.linalg.norm(total) / jnp.linalg.norm(g)
    )

  assert overlap(False) < 0.8 < 0.95 < overlap(True)


def test_weight_decay_acts_on_the_old_weight():
  params = {'w': jnp.full((4, 6), 2.0)}
  grads = {'w': jnp.ones((4, 6))}
  plain, decayed = (
    tx.update(grads, tx.init(params), params)[0]['w']
    for tx in (
      optim.ldadam(0.1, rank=2),
      optim.ldadam(0.1, 2, weight_decay=0.5),
    )
  )
  np.testing.assert_allclose(decayed - plain, -0.1 * 0.5 * 2.0, rtol=1e-5)


def test_feedback_needs_a_first_moment():
  g = jnp.ones((4, 6))
  tx = optim.low_rank(optax.identity(), 2, residual=residuals.feedback(0.9))
  with pytest.raises(ValueError, match='first moment of the parameter'):
    tx.update(g, tx.init(g))
