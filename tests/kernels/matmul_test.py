"""Every implementation of the products against float64."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from frugax import kernels
from frugax.kernels import blocks, chips, products
from frugax.kernels.quantized_matmul import mosaic_gpu
from frugax.quant import Scaling, element, hadamard

IMPLEMENTATIONS = {
  'xla': {'implementation': 'xla'},
  'mosaic': {'implementation': 'mosaic', 'interpret': True},
  'triton': {'implementation': 'triton', 'interpret': True},
}
# Simulated thread by thread, which takes a second for each block.
MOSAIC_GPU = {'implementation': 'mosaic_gpu', 'interpret': True}
# Mosaic GPU multiplies two kinds of 8-bit floats since then.
MIXED = jax.__version_info__ >= (0, 11)
LAYOUTS = ('NN', 'NT', 'TN')
KINDS = {
  'int8': ('int8', 'int8'),
  'int4': ('int4', 'int4'),
  'int8 x int4': ('int8', 'int4'),
  'e4m3': ('float8_e4m3fn', 'float8_e4m3fn'),
  'e5m2': ('float8_e5m2', 'float8_e5m2'),
  'e5m2 x e4m3': ('float8_e5m2', 'float8_e4m3fn'),
  'e2m1': ('float4_e2m1fn', 'float4_e2m1fn'),
  'bf16 x int8': ('bfloat16', 'int8'),
  'bf16 x int4': ('bfloat16', 'int4'),
  'int4 x f32': ('int4', 'float32'),
}
each_implementation = pytest.mark.parametrize('name', IMPLEMENTATIONS)


def has(name, kind):
  """Whether it is asked to: of 8-bit floats Triton would make float16."""
  return name != 'triton' or kind not in ('float8', 'float4')


few = hypothesis.settings(deadline=None, max_examples=6, derandomize=True)
sizes = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 400))


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """So that small matrices have several blocks along each axis."""
  patch = pytest.MonkeyPatch()
  small = blocks.Blocks(128, 128, 128)
  patch.setattr(blocks, 'matmul', lambda *_: small)
  patch.setattr(blocks, 'fused', lambda *_: small)
  for_gpus = blocks.GpuBlocks(128, 128, 128, 8, 2, 2)
  patch.setattr(blocks, 'gpu_matmul', lambda *_: for_gpus)
  yield
  patch.undo()


def numbers(dtype, *shape, seed=0):
  """All codes of an integer dtype, or floats that it can hold."""
  rng = np.random.default_rng(seed)
  if dtype.startswith('int'):
    top = 2 ** (int(dtype[3:]) - 1)
    return jnp.asarray(rng.integers(-top, top, shape), dtype)
  return jnp.asarray(rng.standard_t(5, size=shape), jnp.float32).astype(dtype)


def exact(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def laid_out(layout, m, n, k):
  return {
    'NN': ((m, k), (k, n)),
    'NT': ((m, k), (n, k)),
    'TN': ((k, m), (k, n)),
  }[layout]


def as_rows(layout, a, b):
  """Both with the contracted axis last."""
  return a.T if layout == 'TN' else a, b if layout == 'NT' else b.T


def within_rounding(got, want, magnitudes, k, whole):
  """Sums of integers are exact; others are off by a few units of each term."""
  unit = 2.0**-23
  bound = magnitudes * unit * (4 if whole else 4 + k)
  assert np.isfinite(got).all()
  assert (np.abs(exact(got) - want) <= bound + 1e-30).all()


# ---------------------------------------------------------- quantized_matmul


def check_matmul(name, kind, layout, m, n, k, shifts=(0.0, 0.0), known=False):
  options = MOSAIC_GPU if name == 'mosaic_gpu' else IMPLEMENTATIONS[name]
  shapes = laid_out(layout, m, n, k)
  a, b = (
    numbers(d, *s, seed=i)
    for i, (d, s) in enumerate(zip(KINDS[kind], shapes, strict=True))
  )
  rng = np.random.default_rng(2)
  s, t = rng.uniform(0.1, 3, m), rng.uniform(0.1, 3, n)
  rows = as_rows(layout, exact(a), exact(b))
  sums = tuple(jnp.asarray(x.sum(1)) for x in rows) if known else (None, None)
  product = functools.partial(
    kernels.quantized_matmul,
    layout=layout,
    shifts=shifts,
    **options,
  )
  got = jax.jit(product)(a, b, s.astype('f'), t[None].astype('f'), sums=sums)
  assert got.shape == (m, n) and got.dtype == jnp.float32
  left, right = (x + shift for x, shift in zip(rows, shifts, strict=True))
  outer = s.astype('f').astype('d')[:, None] * t.astype('f')
  magnitudes = (np.abs(left) + 1) @ (np.abs(right) + 1).T * outer
  within_rounding(got, left @ right.T * outer, magnitudes, k, 'f' not in kind)


@each_implementation
@few
@hypothesis.given(sizes, st.sampled_from(list(KINDS)), st.sampled_from(LAYOUTS))
def test_any_shape(name, size, kind, layout):
  hypothesis.assume(has(name, products.kind(*KINDS[kind])))
  check_matmul(name, kind, layout, *size)


@each_implementation
@pytest.mark.parametrize('kind', KINDS)
def test_every_kind(name, kind):
  if not has(name, products.kind(*KINDS[kind])):
    pytest.skip('no such products')
  layout = LAYOUTS[list(KINDS).index(kind) % 3]
  check_matmul(name, kind, layout, 130, 40, 257)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', ['int4', 'e4m3', 'bf16 x int8'])
def test_kernels_in_every_layout(kind, layout):
  check_matmul('mosaic', kind, layout, 130, 40, 257)


@pytest.mark.parametrize(
  ('kind', 'layout', 'm', 'n', 'k'),
  [
    ('e4m3', 'NT', 130, 40, 150),
    ('e5m2', 'NN', 5, 130, 300),
    ('int8', 'TN', 129, 3, 41),
    ('int8 x int4', 'NT', 40, 30, 130),
    pytest.param(
      'e5m2 x e4m3',
      'NT',
      40,
      30,
      130,
      marks=pytest.mark.skipif(not MIXED, reason='jax 0.11 has them first'),
    ),
  ],
)
def test_mosaic_gpu(kind, layout, m, n, k):
  shifts = (0.5, 0.5) if kind == 'int8' else (0.0, 0.0)
  check_matmul('mosaic_gpu', kind, layout, m, n, k, shifts)


@pytest.mark.parametrize('kind', ['int8', 'e4m3'])
@pytest.mark.parametrize('steps', [1, 2, 3])
def test_mosaic_gpu_goes_over_many_blocks(kind, steps, monkeypatch):
  """One program, six blocks; operands of two steps fit into its memory."""
  monkeypatch.setattr(mosaic_gpu, '_PROCESSORS', 1)
  check_matmul('mosaic_gpu', kind, 'NT', 300, 200, 128 * steps)


def test_operands_are_not_released_while_the_matrix_unit_reads_them():
  """On a GPU it does so until it is waited for, interpreted no longer."""
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200', num_cores=132, platform='gpu'
  )
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  a = numbers('int8', 300, 400)
  with jax.sharding.use_abstract_mesh(mesh):
    product = jax.jit(lambda a: kernels.quantized_matmul(a, a, layout='NT'))
    text = str(product.trace(a).jaxpr)
  ((count, after),) = re.findall(
    r'\bwgmma_ref .*\n\s*wgmma_wait\D*(\d+).*\n\s*(\w+)', text
  )
  assert (int(count), after) == (0, 'barrier_arrive')


@each_implementation
@pytest.mark.parametrize(
  ('kind', 'layout', 'shifts', 'known'),
  [
    ('int4', 'NN', (0.5, 0.5), True),
    ('int8', 'TN', (0.5, 0.5), False),
    ('int4', 'NT', (0.5, 0.0), False),
    ('int8', 'NN', (0.0, 0.5), True),
  ],
)
def test_mid_rise(name, kind, layout, shifts, known):
  check_matmul(name, kind, layout, 33, 65, 200, shifts, known)


@each_implementation
def test_odd_sizes_of_a_model(name):
  check_matmul(name, 'int8', 'NT', 7, 5461, 129)
  check_matmul(name, 'int4', 'NN', 5, 3, 5461)


@each_implementation
def test_integers_are_summed_exactly(name):
  """Where float32 would not be: 2^24 + 1 is none."""
  a = jnp.full((1, 1041), 127, jnp.int8).at[0, -1].set(1)
  sums = kernels.quantized_matmul(a, a, layout='NT', **IMPLEMENTATIONS[name])
  less = kernels.quantized_matmul(
    a, a.at[0, -1].set(0), layout='NT', **IMPLEMENTATIONS[name]
  )
  assert 1040 * 127**2 < 2**24 < 1041 * 127**2
  assert sums[0, 0] - less[0, 0] == 1


@each_implementation
def test_one_scale_and_dtypes(name):
  a, b = numbers('int8', 6, 9), numbers('int8', 9, 4, seed=1)
  got = kernels.quantized_matmul(
    a, b, jnp.float32(0.5), dtype=jnp.bfloat16, **IMPLEMENTATIONS[name]
  )
  assert got.dtype == jnp.bfloat16
  want = exact(a) @ exact(b) / 2
  np.testing.assert_array_equal(exact(got), want.astype(ml_dtypes.bfloat16))


@each_implementation
def test_stacks_and_loops(name):
  a, b = numbers('int8', 3, 20, 140), numbers('int8', 3, 140, 30, seed=1)

  def product(a, b):
    return kernels.quantized_matmul(a, b, **IMPLEMENTATIONS[name])

  want = exact(a) @ exact(b)
  np.testing.assert_array_equal(jax.vmap(product)(a, b), want)
  loop = jax.jit(lambda a, b: jax.lax.map(lambda x: product(*x), (a, b)))
  np.testing.assert_array_equal(loop(a, b), want)


# ----------------------------------------------------------- quantize_matmul

FORMATS = {
  'int8': Scaling(),
  'int4': Scaling(),
  'ternary': Scaling(statistic='mean', floor=1e-5),
  'rise4': Scaling(statistic='rms', factor=2.51393, eps=1e-8),
  'rise8': Scaling(statistic='rms', factor=3.88494, eps=1e-8),
  'rise1': Scaling(statistic='rms', factor=0.79788, eps=1e-8),
  'fp8_e4m3': Scaling(),
  'fp8_e5m2': Scaling(factor=0.5),
}


def kind_of(format):
  return 'float8' if format.startswith('fp8') else 'int8'


def statistic(v, scaling):
  return {
    'absmax': np.abs(v).max(1, keepdims=True),
    'rms': np.sqrt(np.square(v).mean(1, keepdims=True)),
    'mean': np.abs(v).mean(1, keepdims=True),
  }[scaling.statistic]


def check_fused(
  name, format, layout, m, n, k, rotate, fold, dtype=jnp.bfloat16
):
  e, scaling = element(format), FORMATS[format]
  w_dtype = 'float8_e4m3fn'
  if e.dtype == 'int8':
    w_dtype = 'int4' if e.bits <= 4 else 'int8'
  w_shift = 0.5 if e.rise else 0.0
  shapes = laid_out(layout, m, n, k)
  x_shape, w_shape = shapes[::-1] if layout == 'TN' else shapes
  x, w = numbers('float32', *x_shape).astype(dtype), numbers(w_dtype, *w_shape)
  x_axis = 0 if layout == 'TN' else 1
  other = m if layout == 'TN' else n
  t = np.random.default_rng(2).uniform(0.1, 3, other).astype('f')
  f = np.random.default_rng(3).uniform(0.1, 3, k).astype('f') if fold else None
  fused = functools.partial(
    kernels.quantize_matmul,
    format=format,
    scaling=scaling,
    rotate=rotate,
    layout=layout,
    w_shift=w_shift,
    dtype=jnp.float32,
    **IMPLEMENTATIONS[name],
  )
  got = jax.jit(fused)(x, w, t, fold=f)
  v = exact(x).T if x_axis == 0 else exact(x)  # contracted axis last
  if fold:
    v = v * f.astype('d')
  if rotate:
    v = v @ exact(hadamard(jnp.eye(k))).T
  codes = exact(got.codes).T if x_axis == 0 else exact(got.codes)
  scales = exact(got.scales).reshape(-1, 1)
  alpha = scaling.factor * statistic(v, scaling) + scaling.eps
  alpha = np.maximum(alpha, scaling.floor)
  np.testing.assert_allclose(scales, alpha / e.top, rtol=2e-6)
  # No number of the format is nearer than the one that was taken.
  own = np.array(e.numbers())
  own = np.unique(np.concatenate([-own, own]))
  u = np.clip(v / scales, -e.top, e.top)
  at = np.clip(np.searchsorted(own, u), 1, len(own) - 1)
  best = np.minimum(np.abs(u - own[at - 1]), np.abs(u - own[at]))
  taken = codes + w_shift
  assert np.isin(taken, own).all()
  assert (np.abs(u - taken) <= best + 4e-6 * e.top).all()
  if e.dtype == 'int8':
    sums = exact(got.sums).reshape(-1)
    np.testing.assert_array_equal(sums, codes.sum(1))
  # The product is that of these codes.
  right = {'NN': exact(w).T, 'NT': exact(w), 'TN': exact(w).T}[layout] + w_shift
  outer = scales * t.astype('d')
  want = taken @ right.T * outer
  magnitudes = (np.abs(taken) + 1) @ (np.abs(right) + 1).T * outer
  product = got.product.T if layout == 'TN' else got.product
  within_rounding(product, want, magnitudes, k, e.dtype == 'int8')


@each_implementation
@few
@hypothesis.given(
  sizes,
  st.sampled_from(list(FORMATS)),
  st.sampled_from(LAYOUTS),
  st.sampled_from(['plain', 'rotate', 'fold']),
)
def test_fused_any_shape(name, size, format, layout, how):
  hypothesis.assume(has(name, kind_of(format)))
  check_fused(name, format, layout, *size, how == 'rotate', how == 'fold')


@each_implementation
@pytest.mark.parametrize('format', FORMATS)
def test_every_format(name, format):
  if not has(name, kind_of(format)):
    pytest.skip('no such products')
  layout = LAYOUTS[list(FORMATS).index(format) % 3]
  check_fused(name, format, layout, 140, 150, 261, True, False)


@pytest.mark.parametrize('halves', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_fused_kernels_in_every_layout(monkeypatch, layout, halves):
  monkeypatch.setattr(chips, 'halves', lambda: halves)
  check_fused('mosaic', 'rise4', layout, 140, 150, 261, True, False)
  check_fused('mosaic', 'int8', layout, 140, 150, 261, False, True)


@each_implementation
def test_fused_of_float32(name):
  check_fused(name, 'rise8', 'NN', 20, 30, 300, True, False, jnp.float32)


@each_implementation
@pytest.mark.parametrize(
  ('format', 'rotate'),
  [('int8', False), ('rise4', True), ('fp8_e4m3', True), ('fp8_e4m3', False)],
)
def test_nothing_becomes_nan_and_nan_stays(name, format, rotate):
  if not has(name, kind_of(format)):
    pytest.skip('no such products')
  x = numbers('bfloat16', 6, 200).at[0].set(0).at[1].set(1e-40)
  x = x.at[2, 3].set(jnp.inf).at[2, 4].set(-jnp.inf).at[3].set(0.3)
  w = numbers('float8_e4m3fn' if format[0] == 'f' else 'int8', 200, 40)

  def product(x):
    return kernels.quantize_matmul(
      x,
      w,
      format=format,
      scaling=FORMATS[format],
      rotate=rotate,
      dtype=jnp.float32,
      **IMPLEMENTATIONS[name],
    ).product

  product = jax.jit(product)
  assert not np.isnan(product(x)).any()
  y = product(x.at[4, 0].set(jnp.nan))
  assert np.isnan(y).all(1).tolist() == [False] * 4 + [True, False]
  assert not np.isnan(y[:4]).any()


@each_implementation
def test_without_residuals_the_product_is_the_same(name):
  x, w = numbers('bfloat16', 30, 300), numbers('int4', 300, 200)
  fused = functools.partial(
    kernels.quantize_matmul, format='int4', **IMPLEMENTATIONS[name]
  )
  kept = jax.jit(fused)(x, w)
  alone = jax.jit(functools.partial(fused, residuals=False))(x, w)
  assert kept.codes.dtype == jnp.int4 and kept.product.dtype == jnp.bfloat16
  assert alone[1:] == (None, None, None)
  np.testing.assert_array_equal(exact(kept.product), exact(alone.product))
