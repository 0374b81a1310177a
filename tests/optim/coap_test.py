"""COAP: its golden trace, and what its step on the projector does and not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import correlation
from frugax.optim.coap import coap
from frugax.optim.projectors import correlation_aware


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wave(key, shape):
  """The traces' stand-in for the random start."""
  del key
  a, b = np.indices(shape) + 1.0
  return jnp.asarray(np.sin(1.3 * a + 2.1 * b * (a + 1)), jnp.float32)


@pytest.mark.parametrize('shape', ['6x4', '4x6'])
def test_coap_follows_the_reference(trace, golden, monkeypatch, shape):
  """Refreshes at steps 0, 3, 6, 9: sketch, step, sketch, step."""
  monkeypatch.setattr(jax.random, 'normal', wave)
  tx = coap(0.01, rank=2, update_interval=3, lambda_=2, moments='restore')
  got, want = trace(tx, shape), golden[f'coap {shape}']
  np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)


def problem(m=24, n=40, rank=6, scale=1.0):
  """A basis, a gradient that has turned away from it, and its moment."""
  g = normal((2, m, 4)) @ normal((2, 4, n), 1) + 0.3 * normal((2, m, n), 2)
  p = np.linalg.qr(normal((2, m, rank), 3))[0]
  moment = p.swapaxes(1, 2) @ (g + normal((2, m, n), 4))
  return tuple(jnp.asarray(x) for x in (p, scale * g, scale * moment))


def loss_in_float64(p, g, moment, axis):
  """Of one matrix, as the paper writes it."""
  error = p @ p.T @ g - g
  grown = p @ moment
  cosine = np.sum(grown * g, axis) / (
    np.linalg.norm(grown, axis=axis) * np.linalg.norm(g, axis=axis)
  )
  return np.mean(error**2) * (1 - cosine.mean())


@pytest.mark.parametrize('axis', [-2, -1])
def test_the_loss_and_its_gradient_equal_a_float64_twin(axis):
  p, g, moment = problem(7, 9, 3)
  got = correlation.correlation_loss(p, g, moment, axis)
  slope = jax.grad(
    lambda p: correlation.correlation_loss(p, g, moment, axis).sum()
  )(p)
  for i in range(2):
    one, *rest = (np.asarray(x[i], np.float64) for x in (p, g, moment))
    np.testing.assert_allclose(
      got[i], loss_in_float64(one, *rest, axis), rtol=1e-5
    )
    differences = np.zeros(one.shape)
    for at in np.ndindex(one.shape):
      step = np.zeros(one.shape)
      step[at] = 1e-6
      up, down = (
        loss_in_float64(x, *rest, axis) for x in (one + step, one - step)
      )
      differences[at] = (up - down) / 2e-6
    np.testing.assert_allclose(slope[i], differences, atol=1e-5)


@pytest.mark.parametrize('scale', [0.3, 30.0])
def test_the_released_step_is_clipped_gradient_descent(scale):
  p, g, moment = problem(7, 9, 3, scale)

  def loss(p):
    return correlation.correlation_loss(p, g, moment).sum()

  slope = jax.grad(loss)(p)
  norms = np.linalg.norm(np.asarray(slope), axis=(1, 2), keepdims=True)
  assert ((norms > 1) == (scale > 1)).all()
  want = p - 0.1 * slope / np.maximum(norms, 1)
  got = correlation.correlation_step(p, g, moment)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_released_step_is_none_at_the_scale_of_language_models():
  moved = {}
  for scale in (1.0, 1e-5):
    p, g, moment = problem(scale=scale)
    new = correlation.correlation_step(p, g, moment)
    moved[scale] = float(jnp.linalg.norm(new - p) / jnp.linalg.norm(p))
  assert moved[1.0] > 1e-4
  # Not one entry changes by more than float32's last bit.
  assert moved[1e-5] < 1e-8


def test_the_scale_free_step_is_the_same_at_any_scale():
  p, g, moment = problem()
  want = correlation.scale_free_step(p, g, moment)
  moved = jnp.linalg.norm(want - p) / jnp.linalg.norm(p)
  assert 0.05 < moved < 0.2
  np.testing.assert_allclose(want.mT @ want, [np.eye(6)] * 2, atol=1e-5)
  for scale in (1e-5, 1e-25, 1e20):
    got = correlation.scale_free_step(*problem(scale=scale))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_scale_free_step_descends():
  p, g, moment = problem()
  before = correlation.correlation_loss(p, g, moment)
  energy = jnp.sum((p.mT @ g) ** 2)
  for _ in range(5):
    p = correlation.scale_free_step(p, g, moment)
  assert (correlation.correlation_loss(p, g, moment) < before).all()
  assert jnp.sum((p.mT @ g) ** 2) > energy


@pytest.mark.parametrize(
  'step', [correlation.correlation_step, correlation.scale_free_step]
)
def test_zeros_are_no_nan(step):
  p, g, moment = problem()
  for zero_g, zero_m in ((0, 1), (1, 0), (0, 0)):
    new = step(p, zero_g * g, zero_m * moment)
    assert jnp.isfinite(new).all()
    if not zero_g:
      np.testing.assert_allclose(new, p, atol=1e-6)


def test_the_sketch_is_the_svd_of_what_it_sees():
  g = normal((20, 3)) @ normal((3, 30), 1)
  want = np.linalg.svd(g)[0][:, :3]
  got = correlation.svd_sketch(jnp.asarray(g), jnp.asarray(normal((20, 3), 2)))
  along = np.abs(want.T @ np.asarray(got))
  np.testing.assert_allclose(along, np.eye(3), atol=1e-4)


def bases(scale, scale_free, moments=True):
  """The bases of three refreshes in a run with gradients of this scale."""
  inner = optax.trace(0.9) if moments else optax.identity()
  tx = optim.low_rank(inner, 4, 1, projector=correlation_aware(3, scale_free))
  g = jnp.asarray(scale * normal((12, 20)))
  state, seen = tx.init(g), []
  for i in range(4):
    _, state = tx.update(g + scale * normal((12, 20), i + 1), state)
    seen.append(state.projectors)
  return seen


def test_only_the_scale_free_coap_turns_the_basis_of_small_gradients():
  large, small = (bases(scale, True) for scale in (1.0, 1e-5))
  for a, b in zip(large, small, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert jnp.linalg.norm(small[1] - small[0]) > 0.1
  faithful = bases(1e-5, False)
  np.testing.assert_allclose(faithful[1], faithful[0], atol=1e-7)
  np.testing.assert_allclose(faithful[2], faithful[0], atol=1e-7)
  assert jnp.linalg.norm(faithful[3] - faithful[0]) > 0.1  # the next sketch


def test_without_a_moment_every_refresh_is_a_sketch():
  seen = bases(1e-5, False, moments=False)
  assert all(jnp.linalg.norm(a - b) > 0.1 for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize('scale_free', [False, True])
def test_a_stack_is_its_layers(scale_free):
  tx = coap(
    0.1,
    rank=3,
    update_interval=2,
    lambda_=2,
    scale_free=scale_free,
    moments='restore',
    axes=lambda p: optim.MatrixAxes((-2,), (-1,)),
  )
  update = jax.jit(tx.update)

  def run(layers):
    state, total = tx.init(jnp.asarray(normal((2, 8, 6)))[layers]), 0
    for i in range(5):
      u, state = update(jnp.asarray(normal((2, 8, 6), i))[layers], state)
      total += u
    return total

  both = run(slice(None))
  for i in range(2):
    np.testing.assert_allclose(run(i), both[i], atol=1e-4)


def test_state_bytes_are_galores():
  params = {'w': jnp.zeros((64, 96), jnp.bfloat16)}
  want = optim.state_bytes(optim.galore(0.1, rank=8), params)
  assert optim.state_bytes(coap(0.1, rank=8), params) == want


def test_bad_lambda():
  with pytest.raises(ValueError, match='lambda_=0'):
    coap(0.1, lambda_=0)
