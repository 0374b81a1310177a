"""Scales for tiles against loops in float64, and what must never be NaN."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax.quant import Scaling, dequantize_tiles, quantize_tiles
from frugax.quant.elements import element
from frugax.quant.tiles import within

STATISTIC = {
  'absmax': lambda x: np.abs(x).max(),
  'rms': lambda x: np.sqrt(np.mean(x * x)),
  'mean': lambda x: np.abs(x).mean(),
  'median': lambda x: np.median(np.abs(x)),
}


def near(numbers, x):
  return numbers[np.abs(x[..., None] - numbers).argmin(-1)]


@functools.cache
def numbers_of(name):
  x = np.array(element(name).numbers())
  return np.unique(np.concatenate([-x, x]))


def tiles(shape, tile):
  """Slices of each tile of a matrix."""
  sizes = [n or size for n, size in zip(tile, shape, strict=True)]
  starts = [range(0, max(n, 1), s) for n, s in zip(shape, sizes, strict=True)]
  for i, j in itertools.product(*starts):
    yield slice(i, i + sizes[0]), slice(j, j + sizes[1])


def twin(x, name, scaling):
  """One matrix, tile by tile."""
  x = np.asarray(x, np.float64)
  rows = x.reshape(-1, x.shape[-1])
  out, top = np.empty_like(rows), element(name).top
  alphas = {}
  for at in tiles(rows.shape, scaling.tile):
    statistic = STATISTIC[scaling.statistic](rows[at])
    alpha = scaling.factor * statistic + scaling.eps
    alphas[at[0].start, at[1].start] = max(alpha, scaling.floor)
  tensor = max(alphas.values()) / (top * 448)
  for at in tiles(rows.shape, scaling.tile):
    alpha = alphas[at[0].start, at[1].start]
    step = alpha / top
    if scaling.scale == 'power_up':
      step = 2.0 ** np.ceil(np.log2(np.float32(step)))
    elif scaling.scale == 'power_down':
      step = 2.0 ** np.floor(np.log2(np.float32(step)))
    elif scaling.scale == 'ocp':
      step = 2.0 ** (np.floor(np.log2(alpha)) - math.floor(math.log2(top)))
    elif scaling.scale == 'nv':
      step = float(near(numbers_of('fp8_e4m3'), np.array(step / tensor)))
      step *= tensor
    step *= scaling.stretch
    if step:
      clipped = np.clip(rows[at] / step, -top, top)
      out[at] = step * near(numbers_of(name), clipped)
    else:
      out[at] = 0
  return out.reshape(x.shape)


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).standard_t(3, size=shape)
  return jnp.asarray(x, jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def rounded(x, name, scaling, key=None):
  q = quantize_tiles(x, name, scaling, key=key)
  assert q.shape == x.shape
  return dequantize_tiles(q)


SCALINGS = {
  'tensor': Scaling((None, None)),
  'row': Scaling(),
  'column': Scaling((None, 1)),
  'group': Scaling((1, 5)),
  'block': Scaling((3, 4)),
  'rms': Scaling(statistic='rms', factor=2.5, eps=1e-8),
  'rms_block': Scaling((3, 5), statistic='rms', factor=2.5),
  'mean': Scaling((None, None), statistic='mean', floor=1e-5),
  'median': Scaling((None, None), statistic='median'),
  'power_up': Scaling((1, 32), scale='power_up'),
  'power_down': Scaling((1, 32), scale='power_down'),
  'ocp': Scaling((1, 32), scale='ocp'),
  'stretched': Scaling((1, 32), scale='ocp', stretch=4 / 3),
  'nv': Scaling((1, 16), scale='nv'),
  'nv_block': Scaling((16, 16), scale='nv'),
}


@settings(max_examples=30, deadline=None)
@given(
  name=st.sampled_from(
    ['int8', 'ternary', 'rise4', 'fp8_e4m3', 'fp4_e2m1', 'e2m0']
  ),
  scaling=st.sampled_from(sorted(SCALINGS)),
  shape=st.sampled_from([(1, 1), (17,), (2, 3, 37), (5, 64)]),
  scale=st.sampled_from([1e-12, 1.0, 1e15]),
)
def test_is_the_loop_over_tiles(name, scaling, shape, scale):
  x = normal(*shape) * scale
  got = np.asarray(rounded(x, name, SCALINGS[scaling]), np.float64)
  want = twin(x, name, SCALINGS[scaling])
  assert got.shape == shape
  # Where float32 divides to another side of the middle, a neighbour.
  differ = np.abs(got - want) > 1e-5 * np.abs(want).max()
  assert differ.sum() <= 0.02 * differ.size + 1, (got, want)
  error = np.abs(got[differ] - np.asarray(x, np.float64)[differ])
  other = np.abs(want[differ] - np.asarray(x, np.float64)[differ])
  np.testing.assert_allclose(error, other, rtol=1e-3, atol=1e-5 * scale)


HARD = {
  'zeros': np.zeros((4, 40)),
  'constant': np.full((4, 40), 0.3),
  'one sign': -np.abs(np.random.default_rng(0).normal(size=(4, 40))) - 10,
  'subnormal': np.full((4, 40), 1e-41),
  'mixed': np.where(np.eye(4, 40), 3e38, 1e-40),
  'largest': np.full((4, 40), np.finfo(np.float32).max),
  'infinite': np.where(np.eye(4, 40), np.inf, 1.0),
  'both infinities': np.where(np.eye(4, 40), np.inf, -np.inf),
}


ALL_KINDS = [
  'tensor',
  'block',
  'rms',
  'mean',
  'power_up',
  'power_down',
  'ocp',
  'nv',
]


@pytest.mark.parametrize('scaling', ALL_KINDS)
@pytest.mark.parametrize('name', ['int8', 'rise4', 'fp8_e5m2', 'e1m0'])
def test_nothing_becomes_nan(scaling, name):
  x = jnp.asarray(np.stack(list(HARD.values())), jnp.float32)

  @jax.jit
  @jax.vmap
  def both(x):
    nearest = rounded(x, name, SCALINGS[scaling])
    return nearest, rounded(x, name, SCALINGS[scaling], jax.random.key(0))

  for got in both(x):
    assert np.isfinite(got).all()
    if name != 'rise4':
      assert not got[list(HARD).index('zeros')].any()


@pytest.mark.parametrize('scaling', ALL_KINDS)
def test_nan_comes_back_in_its_tile(scaling):
  x = normal(40, 256).at[3, 5].set(jnp.nan)
  nan = np.isnan(np.asarray(rounded(x, 'e3m2', SCALINGS[scaling])))
  if SCALINGS[scaling].scale == 'nv':
    assert nan.all()
    return
  for at in tiles(x.shape, SCALINGS[scaling].tile):
    assert (nan[at] == np.isnan(np.asarray(x)[at]).any()).all()


@pytest.mark.parametrize('scaling', ['group', 'nv_block'])
def test_a_stack_is_the_items_under_vmap_scan_and_slices(scaling):
  scaling, key = SCALINGS[scaling], jax.random.key(0)
  x = normal(3, 4, 5, 37)
  quantize = functools.partial(
    quantize_tiles, format='int4', scaling=scaling, key=key
  )
  one_by_one = jax.jit(lambda x: dequantize_tiles(quantize(x)))
  want = np.stack([one_by_one(item) for item in x])

  @jax.jit
  def three_ways(x):
    stack = quantize(x, batch_axes=1)

    def body(_, q):
      return None, dequantize_tiles(q)

    mapped = jax.vmap(dequantize_tiles)(jax.vmap(quantize)(x))
    return dequantize_tiles(stack), mapped, jax.lax.scan(body, None, stack)[1]

  for got in three_ways(x):
    np.testing.assert_array_equal(got, want)


def shapes(x, name, scaling):
  return jax.eval_shape(lambda x: quantize_tiles(x, name, scaling), x)


@pytest.mark.parametrize('format', ['int8', 'int4', 'rise1', 'fp4_e2m1'])
@pytest.mark.parametrize('size', [1, 37])
def test_codes_that_are_not_packed_are_the_same(format, size):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, size)))
  want, got = (quantize_tiles(x, format, packed=p) for p in (True, False))
  assert got.data.shape == x.shape
  np.testing.assert_array_equal(got.codes(), want.codes())
  np.testing.assert_array_equal(got.packed().data, want.data)
  np.testing.assert_array_equal(want.packed().data, want.data)


def test_bytes():
  x = normal(64, 256)
  for name, scaling, each in (
    ('fp8_e4m3', Scaling((1, 32), scale='power_up'), 1 + 1 / 32),
    ('fp4_e2m1', Scaling((1, 32), scale='ocp'), 1 / 2 + 1 / 32),
    ('ternary', Scaling((None, None)), 1 / 4),
    ('rise1', Scaling((None, None)), 1 / 8),
  ):
    q = shapes(x, name, scaling)
    scalar = 4 if scaling.tile == (None, None) else 0
    assert q.nbytes == x.size * each + scalar
  nvfp4 = Scaling((1, 16), scale='nv')
  q = shapes(x, 'fp4_e2m1', nvfp4)
  assert q.nbytes == x.size * (1 / 2 + 1 / 16) + 4


@pytest.mark.parametrize('scaling', ['row', 'tensor', 'block', 'nv'])
def test_sharded_equals_one_device(scaling):
  x, key = normal(16, 24, 96), jax.random.key(1)
  mesh = jax.make_mesh(
    (4, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  @jax.jit
  def codes(x):
    return quantize_tiles(x, 'int4', SCALINGS[scaling], key=key)

  sharded = jax.device_put(x, NamedSharding(mesh, P('data', None, 'tensor')))
  for got, want in zip(
    jax.tree.leaves(codes(sharded)), jax.tree.leaves(codes(x)), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_stochastic_rounding_has_no_bias():
  x = jnp.broadcast_to(normal(1, 32), (4096, 32))
  key = jax.random.key(0)
  got = rounded(x, 'fp4_e2m1', SCALINGS['power_up'], key)
  got = np.asarray(got, np.float64)
  spread = got.std(0).max()
  np.testing.assert_allclose(got.mean(0), x[0], atol=6 * spread / 64)


@pytest.mark.parametrize(
  ('name', 'margin', 'inside', 'outside'),
  [
    ('int4', 0.0, 7.0, 7.01),
    ('int4', 0.5, 7.5, 7.51),
    ('rise4', 0.5, 8.0, 8.01),
    ('fp4_e2m1', 0.0, 6.0, 6.01),
    ('fp4_e2m1', 0.5, 7.0, 7.01),
    ('fp8_e4m3', 0.5, 464.0, 465.0),
  ],
)
def test_masks(name, margin, inside, outside):
  x = jnp.array([0.0, inside, -inside, outside, -outside, jnp.nan])
  top = element(name).top
  step_of_one = Scaling(factor=top)
  q = quantize_tiles(jnp.ones(6), name, step_of_one)
  got = within(x, q, margin)
  np.testing.assert_array_equal(got, [True, True, True, False, False, False])


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Scaling(statistic='absmx'), "'absmx': did you mean 'absmax'"),
    (lambda: Scaling(scale='mx'), "unknown scale 'mx'"),
    (lambda: Scaling((0, None)), r'tile=\(0, None\)'),
    (lambda: Scaling((1, None), statistic='median'), 'median'),
    (lambda: quantize_tiles(jnp.ones(()), 'int8'), 'batch_axes=0'),
    (lambda: quantize_tiles(jnp.ones(3, jnp.int32), 'int8'), 'int32'),
    (
      lambda: quantize_tiles(jnp.ones(3), 'int9'),
      "unknown element format 'int9",
    ),
  ],
)
def test_bad_arguments(make, message):
  with pytest.raises(ValueError, match=message):
    make()
