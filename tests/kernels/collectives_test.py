"""Collectives in few bits, against float64 and against the whole array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from frugax import quant
from frugax.kernels import collectives

P = PartitionSpec
SHARDS = 8


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh((SHARDS,), ('fsdp',), axis_types=(AxisType.Auto,))


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def spec(axis):
  return P(*[None] * axis, 'fsdp')


def gather(mesh, x, *args, axis=0, codes=False, **kwargs):
  """The result of every device, one after the other."""
  fn = collectives.gather_codes if codes else collectives.all_gather

  @jax.jit
  def run(x):
    return jax.shard_map(
      lambda x: jax.tree.map(
        lambda y: y[None], fn(x, 'fsdp', *args, axis=axis, **kwargs)
      ),
      mesh=mesh,
      in_specs=spec(axis),
      out_specs=P('fsdp'),
    )(x)

  return run(x)


def scatter(mesh, x, *args, axis=0, **kwargs):
  """Of (devices, ...) terms; the shards as one array."""

  def run(x):
    return collectives.reduce_scatter(x[0], 'fsdp', *args, axis=axis, **kwargs)

  return jax.jit(
    jax.shard_map(run, mesh=mesh, in_specs=P('fsdp'), out_specs=spec(axis))
  )(x)


def twin(x, top, axes):
  """Rounded to integers in float64, and the step."""
  step = np.abs(x.astype(np.float64)).max(axes, keepdims=True) / top
  return np.round(x / step) * step, step


@pytest.mark.parametrize(('format', 'top'), [('int8', 127), ('int4', 7)])
@pytest.mark.parametrize(
  ('axis', 'scale_axes'), [(0, None), (1, None), (0, (0, 1)), (1, (0,))]
)
def test_every_device_gathers_what_rounding_the_whole_gives(
  mesh, format, top, axis, scale_axes
):
  # A shard of 5 or 3 columns ends within a byte of 4-bit codes.
  x = normal((16, 40) if axis else (16, 5))
  y = np.asarray(gather(mesh, x, format, axis=axis, scale_axes=scale_axes))
  expected, step = twin(x, top, scale_axes or (axis,))
  assert y.shape == (SHARDS, *x.shape)
  np.testing.assert_array_equal(y, np.broadcast_to(y[0], y.shape))
  # Where the quotient lies half-way, float32 may go the other way.
  off = np.abs(y[0] - expected) > 1e-6 * np.abs(x).max()
  assert off.mean() < 0.01
  assert (np.abs(y[0] - x) <= step * 0.5001).all()


@pytest.mark.parametrize('axis', [0, 1])
def test_stochastic_codes_are_those_of_the_whole_array(mesh, axis):
  x, key = normal((16, 24), 1), jax.random.key(3)
  scaling = quant.Scaling((1, None))
  columns = x.T if axis == 0 else x
  steps = quant.quantize_tiles(jnp.asarray(columns), 'int8', scaling).steps()
  steps = steps.T if axis == 0 else steps
  whole = quant.element('int8').round(
    x / steps, quant.random_bits(key, x.shape)
  )
  codes, scales = gather(mesh, x, axis=axis, codes=True, key=key)
  np.testing.assert_array_equal(scales[0], steps)
  np.testing.assert_array_equal(codes[5], whole)
  nearest, _ = gather(mesh, x, axis=axis, codes=True)
  assert (codes != nearest).any()


@pytest.mark.parametrize('format', ['int8', 'int4', 'fp8_e4m3'])
def test_codes_have_the_dtype_of_a_product(mesh, format):
  x = normal((8, 3))
  codes, scales = gather(mesh, x, format, codes=True)
  assert scales.shape == (SHARDS, 1, 3)
  dtypes = {'int8': 'int8', 'int4': 'int4', 'fp8_e4m3': 'float8_e4m3fn'}
  assert codes.dtype == dtypes[format]
  y = gather(mesh, x, format)
  np.testing.assert_array_equal(codes.astype(jnp.float32) * scales, y)


@pytest.mark.parametrize(('format', 'top'), [('int8', 127), ('int4', 7)])
@pytest.mark.parametrize(
  ('axis', 'scale_axes'), [(0, None), (1, None), (0, (1,)), (1, (0, 1))]
)
def test_the_sum_is_that_of_rounded_terms(mesh, format, top, axis, scale_axes):
  x = normal((SHARDS, 16, 24), 2)
  y = scatter(mesh, x, format, axis=axis, scale_axes=scale_axes)
  axes = tuple(a + 1 for a in scale_axes or (axis,))
  rounded, step = twin(x, top, (0, *axes))
  expected = rounded.sum(0)
  off = np.abs(y - expected) > 1e-5 * np.abs(expected).max()
  assert off.mean() < 0.01
  assert (np.abs(y - x.astype(np.float64).sum(0)) <= 4.001 * step[0]).all()


def test_stochastic_sums_have_no_bias_and_independent_errors(mesh):
  x = np.full((SHARDS, 2048, 8), 0.3, np.float32)
  x[:, 0] = 7.0  # the scale: what is left is 0.3 of a step
  y = scatter(mesh, x, 'int4', key=jax.random.key(0))[1:]
  expected = SHARDS * 0.3
  variance = SHARDS * 0.3 * 0.7
  error = float(y.mean()) - expected
  assert abs(error) < 4 * np.sqrt(variance / y.size)
  # With the same bits on all devices it would be eight times as much.
  assert 0.8 * variance < float(y.var()) < 1.25 * variance
  np.testing.assert_array_equal(scatter(mesh, x, 'int4')[1:], 0)


def test_the_gradient_of_a_gather_is_a_reduce_scatter(mesh):
  w, t = normal((16, 24)), normal((SHARDS, 16, 24), 5)

  def gradient(**kwargs):
    def loss(w, t):
      whole = collectives.all_gather(w, 'fsdp', **kwargs)
      return (whole * t[0]).sum()[None]

    def total(w):
      parts = jax.shard_map(
        loss, mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp')
      )(w, t)
      return parts.sum()

    return jax.jit(jax.grad(total))(w)

  np.testing.assert_allclose(gradient(gradient=None), t.sum(0), rtol=1e-5)
  np.testing.assert_allclose(gradient(), scatter(mesh, t), rtol=1e-6)
  key = jax.random.key(1)
  np.testing.assert_allclose(
    gradient(gradient_key=key), scatter(mesh, t, key=key), rtol=1e-6
  )


def test_several_mesh_axes_at_once():
  mesh = jax.make_mesh(
    (2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2
  )
  axes, x, key = ('data', 'fsdp'), normal((16, 6)), jax.random.key(2)

  def run(x):
    whole = collectives.all_gather(x, axes, key=key)
    return whole[None], collectives.reduce_scatter(whole, axes)

  whole, shards = jax.jit(
    jax.shard_map(run, mesh=mesh, in_specs=P(axes), out_specs=P(axes))
  )(x)
  one = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
  np.testing.assert_array_equal(whole, gather(one, x, key=key))
  np.testing.assert_allclose(shards, 8 * whole[0], rtol=1e-6)


@pytest.mark.parametrize('axis', [0, 1])
def test_a_nan_is_not_lost(mesh, axis):
  x = normal((64, 64))
  x[3, 7] = np.nan
  lost = ~np.isnan(gather(mesh, x, axis=axis)[0])
  assert lost.sum() == 63 * 64
  assert not np.moveaxis(lost, axis, 0)[:, 7 if axis == 0 else 3].any()


def test_what_is_not_finite_stays_in_its_column(mesh):
  x = normal((16, 6))
  x[3, 1], x[9, 2], x[:, 3], x[:, 4] = np.nan, np.inf, 0, 1e-44
  x[4, 5], x[5, 5] = 3e38, -1e-40
  y = gather(mesh, x)[0]
  assert np.isnan(y[:, 1]).all()
  assert np.isfinite(np.delete(y, 1, 1)).all()
  np.testing.assert_array_equal(y[:, 3], 0)
  terms = np.zeros((SHARDS, *x.shape), np.float32)
  terms[6] = x
  total = scatter(mesh, terms, key=jax.random.key(0))
  assert np.isnan(total[:, 1]).all()
  assert np.isfinite(np.delete(np.asarray(total), 1, 1)).all()


def test_errors_name_the_value_and_the_way_out(mesh):
  x = normal((16, 6))
  with pytest.raises(ValueError, match=r"'int7'.*did you mean 'int"):
    gather(mesh, x, 'int7')
  with pytest.raises(ValueError, match='not int32'):
    gather(mesh, x.astype(np.int32))
  with pytest.raises(ValueError, match='axis=2'):
    gather(mesh, x, scale_axes=(2,))
  with pytest.raises(ValueError, match='a multiple of 8'):
    scatter(mesh, np.zeros((SHARDS, 12, 3), np.float32))


def collective_bytes(text, op):
  """Dtype and bytes of what each device gives to collectives of a program."""
  bits = {'s8': 8, 'u8': 8, 's4': 4, 'bf16': 16, 'f32': 32, 's32': 32}
  found = []
  for result in re.findall(rf'= (.*?) {op}(?:-start)?\(', text):
    for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', result):
      size = np.prod([int(n) for n in dims.split(',') if n])
      found.append((dtype, int(size) * bits[dtype] // 8))
  return found


@pytest.mark.parametrize(('format', 'fewer'), [('int8', 2), ('int4', 4)])
def test_the_compiled_program_carries_few_bits(mesh, format, fewer):
  rows, columns = 64, 256
  w = jax.ShapeDtypeStruct(
    (rows, columns), jnp.bfloat16, sharding=NamedSharding(mesh, P('fsdp'))
  )

  def loss(w):
    whole = collectives.all_gather(w, 'fsdp', format, gradient=format)
    return (whole.astype(jnp.float32) ** 2).sum()[None]

  def total(w):
    return jax.shard_map(
      loss, mesh=mesh, in_specs=P('fsdp'), out_specs=P('fsdp')
    )(w).sum()

  text = jax.jit(jax.grad(total)).lower(w).compile().as_text()
  whole = rows * columns * 2 // fewer
  ((dtype, size),) = collective_bytes(text, 'all-gather')
  assert (dtype, size) == ('s8' if format == 'int8' else 'u8', whole)
  sent = collective_bytes(text, 'all-to-all')
  assert {d for d, _ in sent} == {dtype}
  assert sum(size for _, size in sent) == whole
  # Besides, one number a column for the scales of each, and nothing else.
  exchanged = collective_bytes(text, 'all-reduce')
  assert sum(size for _, size in exchanged) <= 2 * 4 * columns + 4
  assert not collective_bytes(text, 'reduce-scatter')
