"""Stochastic rounding: without bias, the same on any mesh, NaN and inf kept."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax.quant.rounding import random_bits, round_stochastic

KEY = jax.random.key(0)


def neighbours(x):
  """The bfloat16 numbers at and above |x| from float64, x normal."""
  x = np.abs(np.asarray(x, np.float64))
  step = 2.0 ** (np.floor(np.log2(x)) - 7)
  low = np.floor(x / step) * step
  return low, low + step


def test_one_of_the_two_neighbours():
  rng = np.random.default_rng(0)
  x = rng.normal(size=4096) * 10.0 ** rng.uniform(-30, 30, 4096)
  x = x.astype(np.float32)
  got = np.asarray(round_stochastic(jnp.asarray(x), KEY), np.float64)
  low, high = neighbours(x)
  assert ((np.abs(got) == low) | (np.abs(got) == high)).all()
  assert (np.sign(got) == np.sign(x)).all()
  assert 0.4 < (np.abs(got) == high).mean() < 0.6


@pytest.mark.parametrize('fraction', [1 / 64, 0.25, 0.5, 0.9])
@pytest.mark.parametrize('base', [1.0, -3e-5, 1.99, 7e20])
def test_unbiased(base, fraction):
  """The share rounded up, within 4.5 standard errors (1 in 150,000)."""
  low, high = neighbours(jnp.bfloat16(base))
  x = math.copysign(float((low + fraction * (high - low)).item()), base)
  n = 2**20
  share = []
  for i in range(4):
    y = round_stochastic(jnp.full(n, x, jnp.float32), jax.random.key(i))
    share.append((np.abs(np.asarray(y, np.float64)) == high).mean())
  error = np.mean(share) - fraction
  assert abs(error) < 4.5 * math.sqrt(fraction * (1 - fraction) / (4 * n))


def test_what_is_representable_stays():
  x = jnp.array([0.0, -0.0, 1.0, -1.5, 3.3895314e38, 2.0**-133, -(2.0**-126)])
  for i in range(20):
    got = round_stochastic(x, jax.random.key(i)).astype(jnp.float32)
    np.testing.assert_array_equal(
      np.asarray(got).view(np.uint32), np.asarray(x).view(np.uint32)
    )


def test_nan_and_infinity_survive_and_finite_stays_finite():
  patterns = [0x7F800001, 0x7FC00000, 0xFF80FFFF, 0x7FFFFFFF, 0xFFFFFFFF]
  nan = jnp.asarray(np.array(patterns, np.uint32).view(np.float32))
  inf = jnp.array([jnp.inf, -jnp.inf])
  largest = jnp.array([1.0, -1.0]) * jnp.finfo(jnp.float32).max
  for bits in (0, 0x80000000, 0xFFFFFFFF):

    def of(x, bits=bits):
      return round_stochastic(x, jnp.full(x.shape, bits, jnp.uint32))

    assert jnp.isnan(of(nan)).all()
    np.testing.assert_array_equal(of(inf), inf.astype(jnp.bfloat16))
    assert jnp.isfinite(of(largest)).all()


def test_subnormals_are_unbiased_too():
  step = 2.0**-133  # of bfloat16 below its least normal number
  x = jnp.asarray(np.full(2**18, 2.25 * step, np.float32))
  got = np.asarray(round_stochastic(x, KEY)).view(np.uint16)
  assert set(got.tolist()) == {2, 3}
  error = (got == 3).mean() - 0.25
  assert abs(error) < 4.5 * math.sqrt(0.25 * 0.75 / 2**18)


def test_the_same_bits_on_any_mesh():
  x = jax.random.normal(jax.random.key(1), (16, 8, 24))
  want = round_stochastic(x, KEY)
  mesh = jax.make_mesh(
    (2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  for spec in (P('data', 'fsdp'), P(None, None, 'fsdp'), P(('data', 'fsdp'))):
    sharding = NamedSharding(mesh, spec)
    rounded = jax.jit(round_stochastic, out_shardings=sharding)
    sharded = jax.device_put(x, sharding)
    np.testing.assert_array_equal(rounded(sharded, KEY), want)
    hlo = rounded.lower(sharded, KEY).compile().as_text()
    assert 'all-gather' not in hlo and 'collective-permute' not in hlo


def test_items_of_a_stack_are_rounded_as_if_alone():
  x = jax.random.normal(jax.random.key(1), (3, 8, 24))
  want = jnp.stack([round_stochastic(item, KEY) for item in x])
  np.testing.assert_array_equal(round_stochastic(x, KEY, batch_axes=1), want)
  assert (round_stochastic(x, KEY)[1:] != want[1:]).any()


def test_bits_are_uniform_and_unrelated():
  """Each bit, each pair of neighbours and each pair of keys, 5 deviations."""
  n = 2**18

  def signs(seed):
    bits = np.asarray(random_bits(jax.random.key(seed), (n,)))
    return 1.0 - 2.0 * (bits[:, None] >> np.arange(32) & 1)

  some = signs(0)
  bound = 5 / math.sqrt(n)
  assert np.abs(some.mean(0)).max() < bound
  for lag in (1, 2, 256, 4096):
    assert np.abs((some * np.roll(some, lag, 0)).mean(0)).max() < bound
  for seed in (1, 2, 2**16):
    assert np.abs((some * signs(seed)).mean(0)).max() < bound
  steps = [jax.random.fold_in(KEY, i) for i in range(2)]
  a, b = (np.asarray(random_bits(key, (n,))) for key in steps)
  assert abs(np.corrcoef(a, b)[0, 1]) < bound


def test_an_index_beyond_32_bits():
  """More than 2^32 elements, of which only a slice is computed."""
  shape = (3, 2**16, 2**16)
  rows = jax.jit(lambda: random_bits(KEY, shape)[:, 3, :])()
  rows = 1.0 - 2.0 * (np.asarray(rows)[..., None] >> np.arange(32) & 1)
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert np.abs((rows[a] * rows[b]).mean(0)).max() < 5 / 2**8


def test_float32_is_returned():
  x = jnp.array([1.1, -2.3])
  np.testing.assert_array_equal(round_stochastic(x, KEY, jnp.float32), x)


def test_bad_input():
  x = jnp.ones(3)
  with pytest.raises(ValueError, match='to float16: give bfloat16'):
    round_stochastic(x, KEY, jnp.float16)
  with pytest.raises(ValueError, match='no bits for an array of shape'):
    round_stochastic(x, jnp.zeros(2, jnp.uint32))
  with pytest.raises(ValueError, match='one typed key'):
    random_bits(jnp.zeros(2, jnp.uint32), (3,))
  with pytest.raises(ValueError, match='batch_axes=2'):
    random_bits(KEY, (3,), batch_axes=2)
