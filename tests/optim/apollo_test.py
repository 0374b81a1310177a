"""APOLLO against the authors' code, with a projector that is a formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import optim
from frugax.optim import projection, projectors


def formula(torch_rows):
  """sin(1.3 (a+1) + 2.1 (b+1) (a+2)) (1 + c/2) / sqrt(r).

  a and b count the projector's rows and columns in torch's layout, where it is
  (out, r) for a wide matrix and (r, in) for a tall one; c counts refreshes.
  """

  def find(g, old, rank, context):
    side, r = jnp.arange(old.shape[-2])[:, None], jnp.arange(rank)[None, :]
    a, b = (side, r) if torch_rows else (r, side)
    s = jnp.sin(1.3 * (a + 1) + 2.1 * (b + 1) * (a + 2))
    return s * (1 + 0.5 * context.count) / jnp.sqrt(rank)

  return projection.from_context(find)


@pytest.mark.parametrize('front', [True, False])
@pytest.mark.parametrize('shape', ['6x4', '4x6'])
def test_apollo_follows_the_reference(shape, front, trace, golden):
  tx = optim.apollo(
    0.01,
    rank=2,
    update_interval=5,
    scale=4.0,
    projector=formula(torch_rows=shape == '4x6'),
  )
  got = trace(tx, shape)
  want = golden[f'apollo front={front} {shape}']
  np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)


def test_tensor_scaling_is_one_factor_for_each_matrix():
  rng = np.random.default_rng(0)
  g = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
  axes = optim.MatrixAxes((1,), (2,))
  tx = optim.apollo_mini(1.0, axes=axes, scale=9.0)
  updates, state = tx.update(g, tx.init(g))
  ratio = np.asarray(updates / g)
  # At the first step N is R's sign at 3.16, and 0.316 of it is left.
  random = projectors.random(g.shape, 1, 'short', jnp.float32)
  p = np.asarray(random.basis(state[0].projectors))
  r = np.swapaxes(p, -1, -2) @ np.asarray(g)
  want = -3 * np.sqrt(6) / np.linalg.norm(r, axis=(-2, -1))
  np.testing.assert_allclose(
    ratio, np.broadcast_to(want[:, None, None], g.shape), rtol=1e-3
  )


def test_only_channel_and_tensor():
  with pytest.raises(ValueError, match="'chanel': did you mean 'channel'"):
    optim.apollo(0.1, residual='chanel')


def test_the_growth_of_the_norm_is_limited():
  """Momentum cancels at the second step and comes back at the third."""
  g = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
  tx = optim.apollo(1.0, rank=2)
  state, norms = tx.init(g), []
  update = jax.jit(tx.update)
  for sign in (1.0, -1.0, 1.0, 1.0):
    _, state = update(sign * g, state)
    norms.append(float(state[0].residuals))
  assert norms[1] < 0.1 * norms[0]
  growth = np.array(norms[2:]) / norms[1:-1]
  np.testing.assert_allclose(growth, 1.01, rtol=1e-5)
