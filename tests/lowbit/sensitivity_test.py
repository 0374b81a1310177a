"""Sharpness against a search, rates of rounding against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import lowbit
from frugax.lowbit import Operand, sensitivity
from frugax.quant import Scaling


def loss(y, label):
  return np.log(np.exp(y).sum()) - y[label]


def test_sharpness_is_the_greatest_rise_in_the_box():
  draw = np.random.default_rng(0)
  y, labels, eps = draw.normal(size=(3, 5)) * 3, np.array([0, 4, 2]), 0.05
  got = sensitivity.sharpness(jnp.asarray(y), jnp.asarray(labels), eps)
  for row, label, phi in zip(y, labels, got, strict=True):
    width = eps * (np.abs(row) + 1)
    corners = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    inside = draw.uniform(-1, 1, size=(500, 5))
    rises = [
      loss(row + z * width, label) for z in np.concatenate([corners, inside])
    ]
    before = loss(row, label)
    want = 100 * (max(rises) - before) / (1 + before)
    np.testing.assert_allclose(phi, want, rtol=1e-4)
  assert not sensitivity.sharpness(jnp.asarray(y), labels, 0.0).any()
  with pytest.raises(ValueError, match=r'eps=-0\.1'):
    sensitivity.sharpness(jnp.asarray(y), labels, -0.1)


def test_rates():
  x = np.random.default_rng(0).standard_t(3, size=(8, 40))
  x[0, :4] = 0
  operand = Operand('int4', Scaling(factor=0.5))
  got = sensitivity.rounding_rates(operand, jnp.asarray(x, jnp.float32))
  step = 0.5 * np.abs(x).max(1, keepdims=True) / 7
  low = np.clip(np.round(x / step), -7, 7) * step
  want = [
    np.linalg.norm(low - x) / np.linalg.norm(x),
    (np.abs(x) > 7 * step).mean(),
    ((low == 0) & (x != 0)).mean(),
  ]
  assert min(want) > 0
  np.testing.assert_allclose(got, want, rtol=1e-5)
  zero = sensitivity.rounding_rates(operand, jnp.zeros((2, 3)))
  np.testing.assert_array_equal(zero, 0)


def test_rates_are_those_of_the_rotated_operands():
  x, w = jnp.eye(256)[:2] * 9, jnp.eye(256)[:, :3]
  dims = (((1,), (0,)), ((), ()))
  rotated, plain = (
    sensitivity.forward_rates(lowbit.recipe(name), x, w, dims)
    for name in ('quest4', 'quest4_plain')
  )
  assert set(rotated) == {'activations', 'weights'}
  # An outlier is beyond the range, unless it is spread over its block.
  assert plain['weights'][1] > 0 and rotated['weights'][1] == 0
  assert plain['weights'][0] > 3 * rotated['weights'][0]


def test_only_what_is_rounded_has_rates():
  g, dims = jnp.ones((4, 6)), (((1,), (0,)), ((), ()))
  x, w = jnp.ones((4, 8)), jnp.ones((8, 6))

  def found(name):
    recipe = lowbit.recipe(name)
    rates, gradient = jax.eval_shape(
      lambda: (
        sensitivity.forward_rates(recipe, x, w, dims),
        sensitivity.gradient_rates(recipe, g, 0, 1),
      )
    )
    return sorted(rates), gradient is not None

  assert found('trilm') == (['weights'], False)
  assert found('int8') == (['activations', 'weights'], True)
  # The law rounds activations where they meet the weights' gradient.
  assert found('e2m1') == (['activations', 'weights'], False)
  assert found('bf16') == ([], False)
  assert found('halo2') == (['activations', 'weights'], True)
