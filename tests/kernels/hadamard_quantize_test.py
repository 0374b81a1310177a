"""Rotated and rounded copies: the kernel, the reference, and float64."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from frugax import quant
from frugax.kernels import chips
from frugax.kernels.codes import FORMATS
from frugax.kernels.hadamard_quantize.api import hadamard_quantize
from frugax.kernels.hadamard_quantize.options import Copy
from frugax.quant import Scaling

P = PartitionSpec
KEYS = {'key': jax.random.key(1), 'signs': jax.random.key(2)}
each_kernel = pytest.mark.parametrize('kernel', ['mosaic', 'triton'])
QUEST = Scaling(statistic='rms', factor=2.51393, eps=1e-8)


def copies(x, *args, **kwargs):
  return jax.jit(
    functools.partial(hadamard_quantize, **KEYS, **kwargs),
    static_argnums=(1, 2),
  )(x, *args)


def integers(shape, seed=0):
  """Numbers whose rotations are exact, whatever the order of the sums."""
  x = np.random.default_rng(seed).integers(-60, 61, shape)
  return jnp.asarray(x, jnp.bfloat16)


def hadamard(x, axis, block, signs):
  """In float64, block by block."""
  x = np.moveaxis(np.array(x, np.float64), axis, -1)
  size, start = x.shape[-1], 0
  if signs:
    bits = quant.random_bits(KEYS['signs'], (size,))
    x = x * np.where(np.asarray(bits) >> 31, -1, 1)
  out = np.empty_like(x)
  while start < size:
    n = block
    while n > size - start:
      n //= 2
    h = np.ones((1, 1))
    while len(h) < n:
      h = np.kron([[1, 1], [1, -1]], h)
    out[..., start : start + n] = x[..., start : start + n] @ h / n**0.5
    start += n
  return np.moveaxis(out, -1, axis)


def rotated(x, copy):
  x = np.array(x.astype(jnp.float32), np.float64).reshape(-1, x.shape[-1])
  if copy.along == 'none':
    return x
  axis = 1 if copy.along == 'features' else 0
  return hadamard(x, axis, copy.block, copy.signs)


def check(x, copy, found, by_rows):
  """Against the definition, in float64."""
  y = rotated(x, copy)
  top, s = copy.element.top, copy.scaling
  group = y.shape[1] if by_rows else min(s.tile[1] or len(y), len(y))
  if by_rows:
    groups, axis = [y], 1
  else:
    groups, axis = [y[i : i + group] for i in range(0, len(y), group)], 0
  scales = np.concatenate(
    [
      {
        'absmax': lambda a: a.max(axis, keepdims=True),
        'rms': lambda a: np.sqrt((a * a).mean(axis, keepdims=True)),
        'mean': lambda a: a.mean(axis, keepdims=True),
      }[s.statistic](np.abs(g))
      for g in groups
    ]
  )
  scales = np.maximum(s.factor * scales + s.eps, s.floor) / top
  scales = np.maximum(scales, np.finfo(np.float32).tiny)
  got = np.asarray(found.scales).reshape(scales.shape)
  np.testing.assert_allclose(got, scales, rtol=2e-6)
  spread = got if by_rows else np.repeat(got, group, 0)[: len(y)]
  t = np.clip(y / spread, -top, top)
  numbers = np.asarray(found.numbers()).reshape(y.shape)
  np.testing.assert_allclose(
    found.dequantize().reshape(y.shape), numbers * spread, rtol=1e-6
  )
  error = np.abs(numbers - t)
  if copy.element.dtype == 'int8':
    half = 1.0 if copy.stochastic else 0.5
  else:
    # The spacing of 3 or 2 bits of mantissa, and of subnormal numbers.
    e = copy.element
    octave = np.maximum(np.floor(np.log2(np.abs(t) + 1e-30)), e.least)
    half = 2.0 ** (octave - e.mantissa) * (1.0 if copy.stochastic else 0.5)
  assert (error <= half * 1.0001 + 1e-4).all()
  if copy.mask != 'none':
    margin = 0.5 * copy.element.top_step if copy.mask == 'trust' else 0
    bound = top + margin
    size = np.abs(y / spread)
    clear = np.abs(size - bound) > 1e-4
    trusted = np.asarray(found.trusted()).reshape(y.shape)
    np.testing.assert_array_equal(trusted[clear], (size <= bound)[clear])
  if copy.sums:
    codes = np.asarray(found.codes.astype(jnp.int32)).reshape(y.shape)
    sums = [codes] if by_rows else np.split(codes, range(group, len(y), group))
    sums = np.concatenate([c.sum(axis, keepdims=True) for c in sums])
    np.testing.assert_array_equal(
      np.asarray(found.sums).reshape(sums.shape), sums
    )


def same(one, other, exact=True):
  """Of two implementations."""
  for a, b in zip(one, other, strict=True):
    assert (a is None) == (b is None)
    if a is None:
      continue
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
    np.testing.assert_allclose(a.scales, b.scales, rtol=0 if exact else 2e-6)
    codes = (np.asarray(z.codes.astype(jnp.float32)) for z in (a, b))
    if exact:
      np.testing.assert_array_equal(*codes)
      if a.mask is not None:
        np.testing.assert_array_equal(a.mask, b.mask)
      if a.sums is not None:
        np.testing.assert_array_equal(a.sums, b.sums)
    else:
      # A number at the middle of two may go to either.
      off = np.abs(np.subtract(*codes))
      assert (off > 0).mean() < 2e-3


CASES = {
  'int8 both': (Copy(), Copy()),
  'quest': (
    Copy('rise4', scaling=QUEST, mask='trust', sums=True),
    Copy('int8', along='tokens', signs=True, stochastic=True, sums=True),
  ),
  'groups': (
    Copy('int4', along='tokens', signs=True),
    Copy('int4', scaling=Scaling((1, 128)), mask='clip', sums=True),
  ),
  'fp8': (
    Copy('fp8_e4m3', block=32, signs=True, stochastic=True),
    Copy('fp8_e5m2', along='none', scaling=Scaling(statistic='mean', factor=3)),
  ),
}


# Where all blocks are alike XLA may take their factor out of a product, and
# integers lie half-way so often that it shows: hence no 64 tokens.
@each_kernel
@pytest.mark.parametrize(
  ('name', 'shape'),
  [
    ('int8 both', (70, 256)),
    ('int8 both', (300, 130)),
    ('quest', (300, 130)),
    ('groups', (300, 130)),
    ('groups', (128, 256)),
    ('fp8', (128, 256)),
  ],
)
def test_the_kernel_is_the_reference_and_the_definition(name, shape, kernel):
  x, (rows, columns) = integers(shape), CASES[name]
  exact = 'absmax' == rows.scaling.statistic == columns.scaling.statistic
  found = copies(x, rows, columns, implementation=kernel, interpret=True)
  same(found, copies(x, rows, columns), exact)
  for copy, result, by_rows in zip(
    (rows, columns), found, (True, False), strict=True
  ):
    check(x, copy, result, by_rows)


@each_kernel
@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
@hypothesis.given(
  tokens=st.integers(1, 200),
  features=st.sampled_from([1, 7, 128, 333, 5461]),
  format=st.sampled_from(FORMATS),
  along=st.sampled_from(['features', 'tokens', 'none']),
  by_rows=st.booleans(),
)
def test_any_shape(kernel, tokens, features, format, along, by_rows):
  x = np.random.default_rng(tokens).standard_cauchy((tokens, features))
  x = jnp.asarray(x, jnp.float32)
  copy = Copy(format, along, mask='trust')
  args = (copy, None) if by_rows else (None, copy)
  found = copies(x, *args)
  check(x, copy, found[0 if by_rows else 1], by_rows)
  interpreted = copies(x, *args, implementation=kernel, interpret=True)
  same(interpreted, found, exact=False)


def test_random_bits_depend_on_the_place_alone():
  copy = Copy('int4', along='none', stochastic=True, scaling=Scaling(floor=7.0))
  x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (96, 384)))
  whole, _ = copies(x, copy, None)
  bits = quant.random_bits(KEYS['key'], x.shape)
  expected = quant.element('int4').round(x, bits)
  np.testing.assert_array_equal(whole.codes.astype(jnp.float32), expected)
  for kernel in ('mosaic', 'triton'):
    how = {'implementation': kernel, 'interpret': True}
    part, _ = copies(
      x[32:, 128:], copy, None, start=(32, 128), width=384, **how
    )
    np.testing.assert_array_equal(part.codes, whole.codes[32:, 128:])

  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)

  def shard(x):
    place = jax.lax.axis_index('a') * 48, jax.lax.axis_index('b') * 96
    return hadamard_quantize(x, copy, start=place, width=384, **KEYS)[0].codes

  spec = P('a', 'b')
  sharded = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)
  np.testing.assert_array_equal(jax.jit(sharded)(x), whole.codes)


def test_signs_depend_on_the_place_alone():
  copy, x = Copy(signs=True), integers((8, 512))
  whole, _ = copies(x, copy, None)
  left, _ = copies(x[:, 256:], copy, None, start=(0, 256))
  y = left.dequantize() - whole.dequantize()[:, 256:]
  assert jnp.abs(y).max() < whole.scales.max() + left.scales.max()
  np.testing.assert_allclose(
    rotated(x, copy),
    quant.hadamard(x.astype(jnp.float32), key=KEYS['signs']),
    atol=1e-4,
  )


def test_stochastic_rounding_has_no_bias():
  copy = Copy('int8', along='none', stochastic=True, scaling=Scaling(floor=127))
  found, columns = copies(jnp.full((2048, 64), 0.3), copy, copy)
  for codes in (found.codes, columns.codes):
    mean = float(codes.astype(jnp.float32).mean())
    assert abs(mean - 0.3) < 4 * (0.3 * 0.7 / codes.size) ** 0.5
  # Copies have bits of their own.
  assert (found.codes != columns.codes).mean() > 0.3


@pytest.mark.parametrize('implementation', ['xla', 'mosaic', 'triton'])
def test_nothing_becomes_nan_that_was_none(implementation):
  interpret = implementation != 'xla'
  x = np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32)
  x[1], x[2, 5], x[2, 9], x[3, 7] = 0, np.inf, -np.inf, np.nan
  x[4], x[5], x[6, 3], x[7] = 1e-41, 3e38, -np.inf, -2.5
  for rows in (Copy(), Copy('rise4', scaling=QUEST), Copy('int4', 'none')):
    found, columns = copies(
      *(jnp.asarray(x), rows, Copy('int8')),
      implementation=implementation,
      interpret=interpret,
    )
    y = np.asarray(found.dequantize())
    assert np.isnan(y[3, 7]) and np.isfinite(np.delete(y, 3, 0)).all()
    assert np.isfinite(found.scales[2]).all()
    if rows.format != 'rise4':
      np.testing.assert_array_equal(y[1], 0)
    z = np.asarray(columns.dequantize())
    assert np.isnan(z[:, :128]).all() and np.isfinite(z[:, 128:]).all()
  if not interpret:
    constant, _ = copies(jnp.full((3, 130), -2.5), Copy(along='none'), None)
    np.testing.assert_allclose(constant.dequantize(), -2.5, rtol=1e-6)


def test_leading_axes_are_tokens():
  x = integers((2, 5, 3, 64))
  rows, columns = copies(x, Copy('rise4', mask='clip', sums=True), Copy())
  flat, flat_columns = copies(x.reshape(30, 64), rows.format, 'int8')
  np.testing.assert_array_equal(rows.codes.reshape(30, 64), flat.codes)
  assert rows.scales.shape == rows.sums.shape == (2, 5, 3, 1)
  assert rows.mask.shape == (2, 5, 3, 8)
  assert columns.scales.shape == (1, 64)
  np.testing.assert_array_equal(
    columns.codes.reshape(30, 64), flat_columns.codes
  )
  groups = Copy(scaling=Scaling((1, 7)))
  _, columns = copies(x, None, groups)
  check(x, groups, columns, False)


def test_codes_are_those_of_quantized_tiles():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 640)), jnp.float32)
  for copy in (Copy('int8'), Copy('fp8_e4m3'), Copy('rise4', scaling=QUEST)):
    rows, _ = copies(x, copy, None)
    q = quant.quantize_tiles(quant.hadamard(x), copy.format, copy.scaling)
    off = rows.numbers() != q.numbers()
    assert float(off.mean()) < 1e-3
    np.testing.assert_allclose(rows.scales, q.steps(), rtol=2e-6)


def test_errors_name_the_value_and_the_way_out():
  x = jnp.ones((4, 8))
  for match, call in [
    (r"'mosiac'.*did you mean 'mosaic'", {'implementation': 'mosiac'}),
    ('needs a TPU', {'implementation': 'mosaic'}),
    ('needs a GPU of the Hopper kind', {'implementation': 'triton'}),
    ('only a kernel', {'implementation': 'xla', 'interpret': True}),
    ('give a key', {'rows': Copy(stochastic=True)}),
    (r'signs=jax\.random\.key', {'rows': Copy(signs=True)}),
    ('ask for one', {'rows': None}),
    ('groups are for columns', {'rows': Copy(scaling=Scaling((1, 4)))}),
    (
      'groups of 100 tokens',
      {'columns': Copy(scaling=Scaling((1, 100))), 'interpret': True},
    ),
    (
      'groups of 40 tokens: kernels take multiples of 16',
      {
        'columns': Copy(scaling=Scaling((1, 40))),
        'implementation': 'triton',
        'interpret': True,
      },
    ),
  ]:
    big = jnp.ones((128, 8)) if 'groups of' in match else x
    with pytest.raises(ValueError, match=match):
      hadamard_quantize(big, **call)
  for array in (jnp.ones((4, 8), jnp.int32), jnp.ones((0, 8)), jnp.float32(1)):
    with pytest.raises(ValueError, match='not'):
      hadamard_quantize(array)
  for match, fields in [
    ("did you mean 'int8'", {'format': 'int88'}),
    ("did you mean 'tokens'", {'along': 'token'}),
    ("did you mean 'trust'", {'mask': 'truth'}),
    ('block=256', {'block': 256}),
    ('median', {'scaling': Scaling((None, None), 'median')}),
    ('float32 scales', {'scaling': Scaling(scale='power_up')}),
    ('one scale a row', {'scaling': Scaling((None, None))}),
    ('only integers', {'format': 'fp8_e4m3', 'sums': True}),
  ]:
    with pytest.raises(ValueError, match=match):
      Copy(**fields)


def test_hopper_has_a_kernel_of_its_own():
  """And XLA what it does not do, if nothing is asked for."""
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200', num_cores=1, platform='gpu'
  )
  abstract = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  x = jnp.ones((128, 8))
  for group, kernels in ((48, 2), (40, 0)):
    columns = Copy(scaling=Scaling((1, group)))
    with jax.sharding.use_abstract_mesh(abstract):
      traced = jax.jit(
        lambda x, c=columns: hadamard_quantize(x, None, c)
      ).trace(x)
    assert str(traced.jaxpr).count('pallas_call') == kernels


def test_xla_says_once_that_it_computes_the_copies(caplog):
  chips.say_so.cache_clear()
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200', num_cores=1, platform='gpu'
  )
  x, groups = jnp.ones((128, 8)), Copy(scaling=Scaling((1, 40)))
  for _ in range(2):
    hadamard_quantize(x, implementation='xla')
    hadamard_quantize(x, 'int8', 'int4')
    for n, columns in ((1, groups), (2, None)):
      mesh = jax.sharding.AbstractMesh((n,), ('x',), abstract_device=device)
      with jax.sharding.use_abstract_mesh(mesh):
        jax.jit(lambda x, c=columns: hadamard_quantize(x, 'int4', c)).trace(x)
  assert [r.getMessage().removeprefix('hadamard_') for r in caplog.records] == [
    'quantize: int8 and int4 copies are left to XLA on this platform',
    'quantize: int4 and int8 copies (groups of 40 tokens: kernels take '
    'multiples of 16) are left to XLA on hopper',
    'quantize: int4 copies are left to XLA on several devices outside of '
    'jax.shard_map',
  ]


def test_kernels_of_hopper_tell_what_they_compute():
  """Of float32 a rotation is three products."""
  for dtype, parts in (('bfloat16', 1), ('float32', 3)):
    x = jnp.ones((128, 256), dtype)
    jaxpr = jax.make_jaxpr(
      lambda x: hadamard_quantize(
        x, 'int8', 'int8', implementation='triton', interpret=True
      )
    )(x)
    flops = re.findall(r'CostEstimate\(flops=(\d+)', str(jaxpr))
    assert flops == [str(x.size * (2 * 128 * parts + 2 * 10))] * 2
