"""Updates added without bias, in float64 arithmetic and on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim, quant

KEYS = 2000
# An unbiased mean lies further than this many of its standard deviations from
# the truth with a probability of 6e-7 (normal approximation); the greatest of
# the 600 tested here with less than 4e-4.
Z = 5.0


def normal(*shape, seed=0, scale=1.0):
  x = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(x, jnp.float32)


def z_scores(draws, want, spacing):
  """Of the mean of each column; rounding to a neighbour has a known variance.

  Args:
    draws: (keys, elements), rounded values.
    want: float64 (elements,), what they are rounded from.
    spacing: float64 (elements,), from each one's lower neighbour to the upper.
  """
  draws = np.asarray(draws, np.float64)
  up = want / spacing - np.floor(want / spacing)
  assert np.ptp(draws, axis=0).max() <= spacing.max() * (1 + 1e-6)
  deviation = spacing * np.sqrt(up * (1 - up) / len(draws))
  # 2^-16 of the spacing is the resolution of the probability.
  slack = 2**-16 * spacing
  error = np.abs(draws.mean(0) - want) - slack
  return np.maximum(error, 0) / np.maximum(deviation, 1e-3 * slack)


def many(params, updates, decode=lambda p: p):
  """The updated weight for each of many keys."""

  def one(key):
    return decode(optim.apply_updates({'w': params}, {'w': updates}, key)['w'])

  return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), KEYS))


def test_bfloat16_is_unbiased():
  p = normal(600, scale=0.02).astype(jnp.bfloat16)
  u = normal(600, seed=1, scale=1e-5)
  want = np.asarray(p, np.float64) + np.asarray(u, np.float64)
  spacing = 2.0 ** (np.floor(np.log2(np.abs(want))) - 7)
  z = z_scores(many(p, u), want, spacing)
  assert z.max() < Z
  # The same statistic tells rounding to nearest.
  nearest = optax.apply_updates(p, u)
  z = z_scores(np.broadcast_to(nearest, (KEYS, 600)), want, spacing)
  assert (z > Z).mean() > 0.8


@pytest.mark.parametrize('offset', [0.0, 5.0])
def test_int8_is_unbiased_at_the_ends_of_a_block_too(offset):
  """Clipping to the codes would draw the least and greatest value inwards."""
  p = quant.quantize(normal(600, scale=0.02) + offset, 'int8')
  u = normal(600, seed=1, scale=1e-4)
  sums = quant.dequantize(p) + u
  want = np.asarray(sums, np.float64)
  step = np.asarray(
    quant.quantize(sums, 'int8', key=jax.random.key(0)).scales, np.float64
  )
  spacing = np.repeat(step, 256)[:600]
  z = z_scores(many(p, u, quant.dequantize), want, spacing)
  # Far from zero the division by the step is inexact in float32: by 2^-8 of a
  # step at most, which this many draws do not resolve.
  assert z.max() < Z
  nearest = optim.apply_updates({'w': p}, {'w': u}, rounding='nearest')['w']
  z = z_scores(
    np.broadcast_to(quant.dequantize(nearest), (KEYS, 600)), want, spacing
  )
  assert (z > Z).mean() > 0.8


@pytest.mark.parametrize('kind', ['bfloat16', 'int8'])
def test_small_updates_add_up(kind):
  """300 steps of a twelfth of the spacing; to nearest, all are lost."""
  w = normal(4096, scale=0.02)
  p = w.astype(jnp.bfloat16) if kind == 'bfloat16' else quant.quantize(w, kind)
  step = 1e-5 if kind == 'bfloat16' else float(p.scales.mean()) / 12

  @jax.jit
  def move(p, key):
    return optim.apply_updates({'w': p}, {'w': jnp.full(4096, step)}, key)['w']

  def value(p):
    x = quant.dequantize(p) if kind == 'int8' else p
    return np.asarray(x, np.float64)

  before = value(p)
  key = jax.random.key(0)
  for i in range(300):
    p = move(p, jax.random.fold_in(key, i))
  moved = (value(p) - before).mean()
  # At each step an element is off by less than a spacing, independently.
  spacing = 2**-12 if kind == 'bfloat16' else float(p.scales.max())
  assert abs(moved - 300 * step) < Z * spacing * np.sqrt(300 / 4096) / 2
  assert Z * spacing * np.sqrt(300 / 4096) / 2 < 0.3 * 300 * step


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_nearest_is_optax(dtype):
  params = {'w': normal(300).astype(dtype), 'b': None, 'n': jnp.arange(3)}
  updates = {'w': normal(300, seed=1), 'b': None, 'n': jnp.ones(3, int)}
  got = optim.apply_updates(params, updates, 0, rounding='nearest')
  want = optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert got['w'].dtype == dtype and got['b'] is None


def test_float32_is_not_rounded():
  params, updates = {'w': normal(300)}, {'w': normal(300, seed=1)}
  got = optim.apply_updates(params, updates, 0)
  np.testing.assert_array_equal(
    got['w'], optax.apply_updates(params, updates)['w']
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_survives(bad):
  p = jnp.array([1.0, bad, -2.0], jnp.bfloat16)
  u = jnp.full(3, 1e-3)
  for a, b in ((p, u), (jnp.ones(3, jnp.bfloat16), u.at[1].set(bad))):
    got = np.asarray(optim.apply_updates(a, b, 0), np.float32)
    np.testing.assert_array_equal(got[1], np.float32(bad))
    assert np.isfinite(got[[0, 2]]).all()
  w = quant.quantize(normal(600), 'int8')
  got = optim.apply_updates(w, jnp.zeros(600).at[300].set(bad), 0)
  got = np.asarray(quant.dequantize(got))
  assert np.isnan(got[256:512]).all()
  assert np.isfinite(got[:256]).all() and np.isfinite(got[512:]).all()


def test_the_largest_finite_number_stays_finite():
  top = jnp.finfo(jnp.bfloat16).max
  p = jnp.full(1000, top, jnp.bfloat16)
  got = optim.apply_updates(p, jnp.full(1000, float(top) * 2**-11), 0)
  assert (got == top).all()


@pytest.mark.parametrize('shape', [(16, 24), (13, 7), (3, 5461), (5,), (1, 1)])
def test_same_bits_on_one_and_on_eight_devices(shape):
  p = {
    'bf16': normal(*shape, scale=0.02).astype(jnp.bfloat16),
    'int8': quant.quantize(normal(*shape), 'int8', block=16),
  }
  u = {k: normal(*shape, seed=1, scale=1e-4) for k in p}
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))

  def sharded(x):
    # Along its last axis, whether or not eight divide it.
    spec = P(*[None] * (x.ndim - 1), 'x')
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  @jax.jit
  def one(p, u):
    return optim.apply_updates(p, u, 3)

  @jax.jit
  def eight(p, u):
    return one(*jax.tree.map(sharded, (p, u)))

  got = eight(p, u)
  devices = {len(x.sharding.device_set) for x in jax.tree.leaves(got)}
  assert devices == {8}
  jax.tree.map(np.testing.assert_array_equal, got, one(p, u))


def test_a_stack_of_quantised_layers_is_updated_like_each_layer():
  w, u = normal(3, 5, 41), normal(3, 5, 41, seed=1, scale=1e-3)
  stack = quant.quantize(w, 'int8', 16, batch_axes=1)
  got = optim.apply_updates({'w': stack}, {'w': u}, 0)['w']
  assert got.nbytes == stack.nbytes
  for i in range(3):
    layer = quant.quantize(w[i], 'int8', 16)
    layer = optim.apply_updates({'w': layer}, {'w': u[i]}, 0)['w']
    jax.tree.map(
      np.testing.assert_array_equal,
      layer,
      jax.tree.map(lambda a: a[i], got),  # noqa: B023
    )


def test_leaves_and_steps_get_bits_of_their_own():
  p = jnp.ones(1000, jnp.bfloat16)
  u = jnp.full(1000, 2.0**-9)  # a quarter of the spacing
  got = optim.apply_updates({'a': p, 'b': p}, {'a': u, 'b': u}, 0)
  again = optim.apply_updates({'a': p, 'b': p}, {'a': u, 'b': u}, 0)
  other = optim.apply_updates({'a': p, 'b': p}, {'a': u, 'b': u}, 1)
  np.testing.assert_array_equal(got['a'], again['a'])
  for x, y in ((got['a'], got['b']), (got['a'], other['a'])):
    # Independent draws of probability 1/4 differ with probability 3/8.
    assert abs((x != y).mean() - 0.375) < Z * np.sqrt(0.375 * 0.625 / 1000)


@pytest.mark.parametrize(
  'key',
  [7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7)],
)
def test_any_key_will_do_and_may_be_traced(key):
  p, u = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 2.0**-8)
  got = optim.apply_updates(p, u, key)
  assert 400 < (got > 1).sum() < 600
  traced = jax.jit(optim.apply_updates)(p, u, key)
  np.testing.assert_array_equal(got, traced)


def test_a_stack_is_not_whole_in_float32():
  """Donated, 8 stacked int8 matrices need less than 3 of them in float32."""
  shape = (8, 256, 512)
  p = jax.eval_shape(
    lambda: quant.quantize(jnp.zeros(shape), 'int8', batch_axes=1)
  )
  u = jax.ShapeDtypeStruct(shape, jnp.float32)
  apply = jax.jit(optim.apply_updates, donate_argnums=0)
  compiled = apply.lower({'w': p}, {'w': u}, 0).compile()
  matrix = 4 * 256 * 512
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * matrix


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'key': 0, 'rounding': 'up'}, "unknown rounding 'up'"),
    ({}, 'needs a key'),
    ({'key': 0, 'dtype': jnp.float16}, 'w is float16'),
  ],
)
def test_bad_arguments(arguments, message):
  p = jnp.ones(3, arguments.pop('dtype', jnp.bfloat16))
  with pytest.raises(ValueError, match=message):
    optim.apply_updates({'w': p}, {'w': jnp.ones(3)}, **arguments)
