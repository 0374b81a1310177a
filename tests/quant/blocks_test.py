"""Block formats against float64 arithmetic, on shapes drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import quant

LEVELS = {'int4': 15, 'int8': 255}
SHAPES = st.sampled_from([(), (1,), (2, 3), (257,), (16, 32), (3, 5, 41)])
quantize = jax.jit(
  quant.quantize, static_argnames=('format', 'block', 'batch_axes')
)
dequantize = jax.jit(quant.dequantize)


def steps(q):
  """The step of each element, in float64 and in the array's shape."""
  scales = np.asarray(q.scales, np.float64)
  per_element = np.repeat(scales, q.block, axis=-1)
  size = int(np.prod(q.item_shape))
  return per_element[..., :size].reshape(q.shape)


def assert_within_half_a_step(x, q):
  x = np.asarray(x, np.float64)
  error = np.abs(np.asarray(dequantize(q), np.float64) - x)
  # Beside half a step, two float32 roundings of values up to 2^15 steps.
  assert (error <= steps(q) * (0.5 + 2**-8)).all()


@settings(max_examples=30, deadline=None)
@given(
  shape=SHAPES,
  format=st.sampled_from(sorted(LEVELS)),
  block=st.sampled_from([1, 3, 16, 256]),
  offset=st.sampled_from([0.0, 3.0, -3.0, 100.0, -1e4]),
  scale=st.sampled_from([1e-30, 1e-5, 1.0, 1e30]),
  seed=st.integers(0, 99),
)
def test_half_a_step_in_every_block(shape, format, block, offset, scale, seed):
  """One-signed blocks (an offset of many deviations) like all others."""
  x = np.random.default_rng(seed).normal(offset, size=shape) * scale
  x = x.astype(np.float32)
  q = quantize(jnp.asarray(x), format=format, block=block)
  assert q.shape == shape
  assert_within_half_a_step(x, q)
  # The step is the range over the levels, up to bfloat16; a narrow range far
  # from zero is bounded by the magnitude instead.
  flat = x.astype(np.float64).ravel()
  for i, step in enumerate(np.asarray(q.scales, np.float64)):
    part = flat[i * block : (i + 1) * block]
    exact = max(
      (part.max() - part.min()) / LEVELS[format], np.abs(part).max() / 32256
    )
    assert exact * (1 - 1e-6) <= step <= max(exact, 1.2e-38) * (1 + 2**-7)


@pytest.mark.parametrize('format', LEVELS)
def test_zero_is_exact_beside_both_signs(format):
  x = np.random.default_rng(0).normal(size=512).astype(np.float32)
  x[::7] = 0
  got = np.asarray(quant.dequantize(quant.quantize(jnp.asarray(x), format)))
  assert (got[::7] == 0).all()


@pytest.mark.parametrize('format', LEVELS)
@pytest.mark.parametrize('value', [0.0, 1.0, -2.5, 3e38, -7e-5])
def test_constants(format, value):
  x = jnp.full(300, value, jnp.float32)
  got = quant.dequantize(quant.quantize(x, format))
  np.testing.assert_allclose(got, x, rtol=2**-15, atol=0)
  assert (got == got[0]).all()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_block_nan(bad):
  for size in (600, 10_000):
    x = np.ones(size, np.float32)
    x[300] = bad
    got = np.asarray(quant.dequantize(quant.quantize(jnp.asarray(x), 'int8')))
    assert np.isnan(got[256:512]).all()
    assert np.isfinite(got[:256]).all() and np.isfinite(got[512:]).all()


def test_values_below_float32_become_zero():
  got = quant.dequantize(quant.quantize(jnp.full(4, 1e-42), 'int4'))
  assert (got == 0).all()


def test_codes_by_hand():
  """Steps of 1 and of 2; the fifth code pads the third byte."""
  x = jnp.array([0.0, 15, 4.4, 4.6, 7, 130, 100, 115])
  q = quant.quantize(x[:5], 'int4')
  assert q.data.tolist() == [0xF0, 0x54, 0x07]
  q = quant.quantize(x, 'int4', block=5)
  assert q.scales.tolist() == [1, 2] and q.zeros.tolist() == [0, -50]
  assert q.data.tolist() == [0xF0, 0x54, 0xF7, 0x80]  # 57.5 rounds to 58
  assert quant.dequantize(q).tolist() == [0, 15, 4, 5, 7, 130, 100, 116]


@pytest.mark.parametrize(
  ('shape', 'batch_axes', 'format', 'want'),
  [
    ((512, 2048), 0, 'int4', 512 * 2048 // 2 + 4 * 4096),
    ((3, 5461), 0, 'int4', 8192 + 4 * 64),
    ((3, 5461), 1, 'int4', 3 * (2731 + 4 * 22)),
    ((3, 5461), 0, 'int8', 3 * 5461 + 4 * 64),
    ((), 0, 'int4', 1 + 4),
    ((2, 0), 0, 'int4', 0),
  ],
)
def test_bytes(shape, batch_axes, format, want):
  q = quant.quantize(jnp.ones(shape), format, batch_axes=batch_axes)
  assert q.nbytes == want == sum(x.nbytes for x in jax.tree.leaves(q))
  assert quant.dequantize(q).shape == shape
  abstract = jax.eval_shape(
    lambda x: quant.quantize(x, format, batch_axes=batch_axes), jnp.ones(shape)
  )
  assert abstract.nbytes == want and abstract.shape == shape


@settings(max_examples=10, deadline=None)
@given(
  item=SHAPES,
  batch=st.sampled_from([(1,), (3,), (2, 2)]),
  format=st.sampled_from(sorted(LEVELS)),
)
def test_quantising_a_stack_is_stacking(item, batch, format):
  shape = (*batch, *item)
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  q = quantize(x, format=format, block=16, batch_axes=len(batch))
  stacked = dequantize(q)
  for index in np.ndindex(*batch):
    one = quantize(x[index], format=format, block=16)
    sliced = jax.tree.map(lambda a: a[index], q)  # noqa: B023
    assert jax.tree.structure(one) == jax.tree.structure(sliced)
    jax.tree.map(np.testing.assert_array_equal, one, sliced)
    np.testing.assert_array_equal(dequantize(sliced), stacked[index])


def test_is_a_pytree_for_jit_scan_vmap_and_device_put():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7, 37)), jnp.float32)
  q = quant.quantize(x, 'int4', batch_axes=1)
  want = quant.dequantize(q)
  jitted = jax.jit(lambda x: quant.quantize(x, 'int4', batch_axes=1))(x)
  jax.tree.map(np.testing.assert_array_equal, jitted, q)
  np.testing.assert_array_equal(jax.jit(quant.dequantize)(q), want)
  np.testing.assert_array_equal(jax.vmap(quant.dequantize)(q), want)
  _, scanned = jax.lax.scan(
    lambda carry, item: (carry, quant.dequantize(item)), None, q
  )
  np.testing.assert_array_equal(scanned, want)
  mesh = jax.make_mesh((4,), ('layers',))
  put = jax.device_put(q, NamedSharding(mesh, P('layers')))
  np.testing.assert_array_equal(jax.jit(quant.dequantize)(put), want)


def test_dtypes():
  x = jnp.arange(8, dtype=jnp.bfloat16)
  q = quant.quantize(x, 'int8')
  assert [a.dtype for a in jax.tree.leaves(q)] == [
    jnp.uint8,
    jnp.bfloat16,
    jnp.int16,
  ]
  assert quant.dequantize(q).dtype == jnp.float32
  assert quant.dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('x', 'arguments', 'message'),
  [
    (jnp.ones(3), {'format': 'int9'}, "'int9': did you mean"),
    (jnp.ones(3), {'format': 'int4', 'block': 0}, 'block=0'),
    (jnp.ones(3), {'format': 'int4', 'batch_axes': 2}, 'batch_axes=2'),
    (jnp.ones(3, int), {'format': 'int4'}, 'not int32'),
  ],
)
def test_bad_arguments(x, arguments, message):
  with pytest.raises(ValueError, match=message):
    quant.quantize(x, **arguments)


@settings(max_examples=15, deadline=None)
@given(
  shape=SHAPES,
  format=st.sampled_from(sorted(LEVELS)),
  block=st.sampled_from([3, 16, 256]),
  offset=st.sampled_from([0.0, 3.0, -100.0]),
  seed=st.integers(0, 99),
)
def test_stochastic_rounding_goes_to_a_neighbour(
  shape, format, block, offset, seed
):
  x = np.random.default_rng(seed).normal(offset, size=shape).astype(np.float32)
  q = quantize(
    jnp.asarray(x), format=format, block=block, key=jax.random.key(seed)
  )
  error = np.asarray(dequantize(q), np.float64) - x
  assert (np.abs(error) <= steps(q) * (1 + 2**-8)).all()


@pytest.mark.parametrize('format', LEVELS)
def test_stochastic_rounding_by_hand(format):
  """Steps of 1: whole numbers stay, 2.25 is 3 in a quarter of the cases."""
  levels = LEVELS[format] - 1
  x = jnp.full(40_002, 2.25).at[0].set(-0.5).at[1].set(levels - 0.5)
  x = x.at[2:5].set(jnp.array([0.0, 3.0, 7.0]))
  q = quant.quantize(x, format, block=x.size, key=jax.random.key(0))
  assert q.scales.tolist() == [1] and q.zeros.tolist() == [1]
  got = np.asarray(quant.dequantize(q))
  assert got[0] in (-1, 0) and got[1] in (levels - 1, levels)
  assert got[2:5].tolist() == [0, 3, 7]
  up = got[5:] == 3
  assert (up | (got[5:] == 2)).all()
  # Five standard deviations: a probability of 6e-7.
  assert abs(up.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / up.size)


def test_stochastic_rounding_of_a_stack_is_that_of_its_items():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 41)), jnp.float32)
  key = jax.random.key(0)
  stack = quant.quantize(x, 'int8', 16, batch_axes=1, key=key)
  for i in range(3):
    one = quant.quantize(x[i], 'int8', 16, key=key)
    item = jax.tree.map(lambda a: a[i], stack)  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, item, one)
