"""The simulated formats against loops in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugax.quant import simulated


def groups(x, block):
  flat = np.asarray(x, np.float64).ravel()
  return [flat[i : i + block] for i in range(0, flat.size, block)]


def keep_two(group, round_rest, floor=1e-6):
  """All but the two largest magnitudes are rounded, in a loop."""
  order = np.argsort(-np.abs(group), kind='stable')
  out, rest = group.copy(), order[2:]
  alpha = max(np.abs(group[rest]).max(initial=0), floor)
  out[rest] = round_rest(group[rest], alpha)
  return out


def nine_levels(x, alpha):
  levels = alpha * np.arange(-4, 5) / 4
  return levels[np.abs(x[:, None] - levels).argmin(1)]


def fifteen_levels(x, alpha):
  return np.clip(np.rint(7 * x / alpha), -8, 7) * alpha / 7


def min_max(group):
  step = max(group.max() - group.min(), 1e-5) / 15
  zero = np.clip(-np.rint(group.min() / step), 0, 15)
  return step * (np.clip(np.rint(group / step) + zero, 0, 15) - zero)


FORMATS = {
  'fp4_e1m2': lambda group: keep_two(group, nine_levels),
  'int4_absmax': lambda group: keep_two(group, fifteen_levels),
  'int4_min_max': min_max,
}


@settings(max_examples=40, deadline=None)
@given(
  name=st.sampled_from(sorted(FORMATS)),
  shape=st.sampled_from([(1,), (2,), (256,), (3, 5, 41), (2, 5461), (16, 64)]),
  block=st.sampled_from([3, 16, 256]),
  scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e4]),
  seed=st.integers(0, 99),
)
def test_formats_are_the_loops(name, shape, block, scale, seed):
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale
  x = x.astype(np.float32)
  got = getattr(simulated, name)(jnp.asarray(x), block)
  assert got.shape == shape and got.dtype == jnp.float32
  want = np.concatenate([FORMATS[name](g) for g in groups(x, block)])
  got = np.asarray(got, np.float64).ravel()
  # Where float32 and float64 divide to either side of a half, a level apart.
  reach = max(np.abs(x).max(), 1e-5)
  differ = np.abs(got - want) > 1e-6 * reach
  assert differ.sum() <= 0.002 * differ.size
  assert np.abs(got - want).max() <= 0.5 * reach


def test_the_e1m2_grid_has_nine_levels():
  """Of the card: multiples of a quarter of the third largest magnitude."""
  x = jax.random.normal(jax.random.key(0), (256,))
  third = jnp.sort(jnp.abs(x))[-3]
  got = np.asarray(simulated.fp4_e1m2(x))
  outliers = np.abs(x) > third
  assert outliers.sum() == 2
  np.testing.assert_array_equal(got[outliers], x[outliers])
  levels = np.unique(np.abs(got[~outliers] / third))
  np.testing.assert_allclose(levels, [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)


@pytest.mark.parametrize('name', ['fp4_e1m2', 'int4_absmax'])
@pytest.mark.parametrize(
  ('x', 'alpha'),
  [
    ([1.0, 8.0, -8.0, 8.0], 8.0),  # equal magnitudes are counted
    ([1.0, 8.0, -4.0, 4.0], 4.0),
    ([1.0, 9.0, -8.0, 4.0], 4.0),
    ([3.0, 0.0, 0.0, 0.0], 1e-6),
    ([0.0, 0.0, 0.0, 0.0], 1e-6),
  ],
)
def test_the_third_largest_magnitude_is_the_scale(name, x, alpha):
  steps = {'fp4_e1m2': 4, 'int4_absmax': 7}[name]
  got = getattr(simulated, name)(jnp.array(x))
  want = np.rint(np.array(x) * steps / alpha) * alpha / steps
  largest = np.abs(x) > alpha
  np.testing.assert_allclose(got, np.where(largest, x, want), rtol=1e-6)


def test_bfloat16_stays_bfloat16_and_keeps_its_outliers():
  x = jax.random.normal(jax.random.key(0), (1000,), jnp.bfloat16)
  got = simulated.fp4_e1m2(x)
  assert got.dtype == jnp.bfloat16
  top = jnp.argmax(jnp.abs(x[:256]))
  assert got[top] == x[top]


@pytest.mark.parametrize('name', FORMATS)
def test_nan_survives(name):
  got = getattr(simulated, name)(jnp.ones(600).at[300].set(jnp.nan))
  assert jnp.isnan(got[300])
  assert jnp.isfinite(got[:256]).all() and jnp.isfinite(got[512:]).all()


@pytest.mark.parametrize(
  ('exponent', 'mantissa'), [(8, 3), (8, 0), (5, 7), (4, 2)]
)
def test_bits_cut_off_a_bfloat16(exponent, mantissa):
  draw = np.random.default_rng(0)
  x = draw.normal(size=4000) * 2.0 ** draw.integers(-30, 30, size=4000)
  x = x.astype(ml_dtypes.bfloat16)
  got = simulated.truncate(jnp.asarray(x), exponent, mantissa)
  assert got.dtype == jnp.bfloat16
  fraction, power = np.frexp(x.astype(np.float64))  # of [1/2, 1)
  unit = 2.0 ** (mantissa + 1)
  want = np.ldexp(np.trunc(fraction * unit) / unit, power)
  middle = 2 ** (exponent - 1) - 1
  top = 2.0**middle * (2 - 2.0**-mantissa)
  want = np.where(np.abs(want) < 2.0 ** (1 - middle), 0, want)
  want = np.clip(want, -top, top)
  np.testing.assert_array_equal(np.asarray(got, np.float64), want)
  if exponent == 8:
    assert (np.abs(want) <= np.abs(x.astype(np.float64))).all()
  special = jnp.array([jnp.inf, -jnp.inf, 0.0, -0.0, jnp.nan], jnp.float32)
  got = simulated.truncate(special, exponent, mantissa)
  np.testing.assert_array_equal(got, [top, -top, 0, 0, np.nan])


def test_bits_that_a_bfloat16_has_not():
  with pytest.raises(ValueError, match='exponent=9, mantissa=7'):
    simulated.truncate(jnp.ones(3), 9)
