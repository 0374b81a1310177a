"""Residual policies against numpy, in both orientations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import residuals

ALPHA = 0.25


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def column_norms(x):
  return np.linalg.norm(x, axis=0)


# From G, P, R and N with the rows projected to the first update.
TWINS = {
  'drop': lambda g, p, r, n: ALPHA * p @ n,
  'sgd': lambda g, p, r, n: ALPHA * p @ n + g - p @ r,
  'sign': lambda g, p, r, n: ALPHA * p @ n + np.sign(g - p @ r),
  'fira': lambda g, p, r, n: (
    ALPHA * p @ n
    + (g - ALPHA * p @ r) * column_norms(n) / (column_norms(r) + 1e-8)
  ),
  'channel': lambda g, p, r, n: (
    np.sqrt(ALPHA) * g * column_norms(n) / (column_norms(r) + 1e-8)
  ),
  'tensor': lambda g, p, r, n: (
    np.sqrt(ALPHA) * g * np.linalg.norm(n) / (np.linalg.norm(r) + 1e-8)
  ),
}


@pytest.mark.parametrize('shape', [(5, 7), (7, 5), (5, 5)])
@pytest.mark.parametrize('name', TWINS)
def test_first_update(name, shape):
  g = normal(shape)
  inner = optim.scale_by_adam_hf(correction='none')
  tx = optim.low_rank(inner, 3, scale=ALPHA, residual=name)
  got, state = tx.update({'w': jnp.asarray(g)}, tx.init({'w': g}))
  turned = shape[0] > shape[1]
  p = np.asarray(state.projectors['w'], np.float64)
  g, p = (g.T, p.T) if turned else (g, p)
  r = p.T @ g
  n = 0.1 * r / (np.sqrt(0.001) * np.abs(r) + 1e-6)
  want = TWINS[name](g, p, r, n)
  np.testing.assert_allclose(
    got['w'], want.T if turned else want, atol=2e-5, rtol=1e-4
  )


@pytest.mark.parametrize('name', ['fira', 'channel', 'tensor'])
def test_norms_are_kept_for_each_layer_in_float32(name):
  params = {'w': jnp.zeros((3, 2, 4, 6), jnp.bfloat16), 'b': jnp.zeros(3)}
  axes = {'w': optim.MatrixAxes((2,), (3,)), 'b': None}
  tx = optim.low_rank(optax.scale_by_adam(), 2, residual=name, axes=axes)
  state = tx.init(params)
  (norms,) = jax.tree.leaves(state.residuals)
  assert norms.shape == (3, 2) and norms.dtype == jnp.float32


def test_signs_of_rounding_errors_are_no_signs():
  """A gradient inside the subspace has nothing outside."""
  g = jnp.asarray(normal((6, 1)) @ normal((1, 8), 1))
  tx = optim.low_rank(optax.identity(), 1, scale=0.0, residual='sign')
  updates, _ = tx.update(g, tx.init(g))
  np.testing.assert_array_equal(updates, np.zeros((6, 8)))


def test_a_function_is_a_policy():
  def gentle(parts):
    outside = parts.grad - parts.back(parts.small)
    return parts.scale * parts.back(parts.update) + 0.1 * outside

  g = jnp.asarray(normal((5, 7)))
  tx = optim.low_rank(optax.scale(2.0), 2, scale=0.5, residual=gentle)
  updates, state = tx.update(g, tx.init(g))
  p = np.asarray(state.projectors)
  onto = p @ p.T @ g
  np.testing.assert_allclose(updates, onto + 0.1 * (g - onto), atol=1e-5)


def test_a_policy_may_remember_anything():
  """Every other gradient outside of the subspace is dropped."""
  every_other = residuals.Residual(
    init=lambda shape, dtype: jnp.zeros(shape[:-2], jnp.int32),
    update=lambda parts, count: (
      jnp.where(count % 2, parts.grad, residuals.drop(parts)),
      count + 1,
    ),
  )
  g = jnp.asarray(normal((5, 7)))
  tx = optim.low_rank(optax.identity(), 2, residual=every_other)
  first, state = tx.update(g, tx.init(g))
  second, state = tx.update(g, state)
  assert np.abs(first - g).max() > 1e-2
  np.testing.assert_array_equal(second, g)
  assert state.residuals == 2


@pytest.mark.parametrize(
  ('shape', 'dtype'), [((3, 2, 4, 6), jnp.bfloat16), ((3, 6, 4), jnp.float32)]
)
@pytest.mark.parametrize('name', [*residuals.RESIDUALS, 'feedback'])
def test_accelerators_take_one_layer_after_the_other(
  name, shape, dtype, monkeypatch
):
  policy = (
    residuals.feedback(0.9) if name == 'feedback' else residuals.by_name(name)
  )
  seen = []

  def update(parts, memory):
    seen.append(parts.grad.shape)
    return policy.update(parts, memory)

  tx = optim.low_rank(
    optim.scale_by_adam_hf(),
    rank=2,
    update_interval=2,
    scale=ALPHA,
    residual=policy._replace(update=update),
    axes={'w': optim.MatrixAxes((-2,), (-1,))},
  )

  def run():
    state = tx.init({'w': jnp.zeros(shape, dtype)})
    for seed in range(3):
      grads = {'w': jnp.asarray(normal(shape, seed), dtype)}
      updates, state = tx.update(grads, state)
    return updates, state.residuals

  together = run()
  assert set(seen) == {shape}
  seen.clear()
  monkeypatch.setattr(
    jax.lax,
    'platform_dependent',
    lambda *args, cpu, default: default(*args),
  )
  apart = run()
  assert set(seen) == {shape[1:]}
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for a, b in zip(*map(jax.tree.leaves, (together, apart)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      *(np.asarray(x, np.float32) for x in (a, b)),
      atol=tolerance,
      rtol=tolerance,
    )


def test_unknown_names():
  with pytest.raises(ValueError, match="'firra': did you mean 'fira'"):
    optim.low_rank(optax.identity(), residual='firra')
