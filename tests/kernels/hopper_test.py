"""The kernels on a Hopper GPU that is there.

    JAX_PLATFORMS=cuda pytest --noconftest tests/kernels/hopper_test.py

Elsewhere the same kernels run interpreted, in the tests beside this one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels, lowbit
from frugax.quant import Scaling, element, quantize_tiles

pytestmark = pytest.mark.skipif(
  getattr(jax.devices()[0], 'compute_capability', None) != '9.0',
  reason='no GPU of the Hopper kind (H100, H200)',
)

KINDS = {
  'int8': ('int8', 'int8'),
  'int8 x int4': ('int8', 'int4'),
  'e4m3': ('float8_e4m3fn', 'float8_e4m3fn'),
  'e5m2 x e4m3': ('float8_e5m2', 'float8_e4m3fn'),
}
# Less than a block, odd, several blocks with a rest along each axis; then more
# blocks than processors, of one step, and of more than are in memory at once.
SHAPES = [
  ((1, 1, 1), 'bfloat16'),
  ((4, 64, 32), 'bfloat16'),
  ((129, 333, 1000), 'float32'),
  ((520, 1376, 513), 'bfloat16'),
  ((4096, 4096, 100), 'float32'),
  ((4096, 4096, 640), 'bfloat16'),
  ((4096, 4096, 1100), 'float32'),
]


def numbers(dtype, shape, seed):
  rng = np.random.default_rng(seed)
  if dtype.startswith('int'):
    top = 2 ** (int(dtype[3:]) - 1)
    return rng.integers(-top, top, shape).astype(dtype)
  return rng.standard_t(5, size=shape).astype('f').astype(jnp.dtype(dtype))


@pytest.mark.parametrize(('shape', 'out'), SHAPES, ids=str)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('implementation', ['mosaic_gpu', 'triton'])
def test_products(implementation, kind, shape, out):
  if implementation == 'triton' and 'int' not in kind:
    pytest.skip('of 8-bit floats Triton would make float16')
  m, n, k = shape
  a, b = numbers(KINDS[kind][0], (m, k), 0), numbers(KINDS[kind][1], (n, k), 1)
  s, t = np.linspace(0.5, 2, m, dtype='f'), np.linspace(1, 3, n, dtype='f')
  shifts = (0.5, 0.5) if 'int' in kind else (0.0, 0.0)
  got = jax.jit(
    kernels.quantized_matmul,
    static_argnames=('layout', 'shifts', 'dtype', 'implementation'),
  )(
    *map(jnp.asarray, (a, b, s, t)),
    layout='NT',
    shifts=shifts,
    dtype=out,
    implementation=implementation,
  )
  a, b = (np.asarray(v, 'f').astype('d') + shifts[0] for v in (a, b))
  outer = s.astype('d')[:, None] * t
  want, size = a @ b.T * outer, np.abs(a) @ np.abs(b).T * outer
  # Of a sum of 8-bit floats the matrix unit keeps some 14 bits of the largest.
  unit = 2.0**-21 if 'int' in kind else 2.0**-12
  unit += 2.0**-8 if out == 'bfloat16' else 0
  got = np.asarray(got, 'd')
  assert (np.abs(got - want) <= unit * np.maximum(size, np.abs(want))).all()


def test_a_stack():
  a, b = (numbers('int8', (3, 200, 333), i) for i in (0, 1))
  product = jax.vmap(lambda a, b: kernels.quantized_matmul(a, b, layout='NT'))
  got = jax.jit(product)(jnp.asarray(a), jnp.asarray(b))
  want = np.einsum('bmk,bnk->bmn', a.astype('i4'), b.astype('i4'))
  np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize('stochastic', [False, True])
@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize(
  'format', ['int8', 'int4', 'rise4', 'fp8_e4m3', 'fp8_e5m2']
)
def test_codes(format, turned, stochastic):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_t(3, size=(301, 514)), 'bfloat16')
  key = jax.random.key(3) if stochastic else None
  q = quantize_tiles(x.T if turned else x, format, key=key, packed=False)
  got = jax.jit(
    lambda x, s: kernels.encode(
      x, s, format, turned=turned, key=key, implementation='triton'
    )
  )(x, q.steps())
  e = element(format)
  got, want = (np.asarray(e.decode(c)) for c in (got, q.data))
  assert (got != want).mean() < 1e-3
  assert (np.abs(got - want) <= e.top_step).all()


def test_rotated_copies():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_t(3, size=(301, 514)), 'bfloat16')
  rows = kernels.Copy(
    'rise4',
    scaling=Scaling(statistic='rms', factor=2.5),
    mask='trust',
    sums=True,
  )
  columns = kernels.Copy('int8', 'tokens', signs=True, stochastic=True)
  keys = {'key': jax.random.key(0), 'signs': jax.random.key(1)}
  got, want = (
    jax.jit(
      lambda x, i=i: kernels.hadamard_quantize(
        x, rows=rows, columns=columns, implementation=i, **keys
      )
    )(x)
    for i in ('triton', 'xla')
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a.scales, b.scales, rtol=1e-5)
    assert (a.mask is None, a.sums is None) == (b.mask is None, b.sums is None)
    assert (np.asarray(a.trusted()) != np.asarray(b.trusted())).mean() < 1e-3
    a, b = (np.asarray(v.numbers()) for v in (a, b))
    assert (a != b).mean() < 1e-3 and (np.abs(a - b) <= 1).all()
  copy = got[0]
  assert not np.asarray(copy.trusted()).all()
  codes = np.asarray(copy.codes, 'i4')
  np.testing.assert_array_equal(copy.sums, codes.sum(1, keepdims=True))


@pytest.mark.parametrize('shape', [(200, 5003, 333), (512, 1024, 512)], ids=str)
def test_the_loss(shape):
  n, vocabulary, d = shape
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(n, d)), 'bfloat16')
  w = jnp.asarray(rng.normal(size=(d, vocabulary)) / d**0.5, 'bfloat16')
  labels = jnp.asarray(rng.integers(0, vocabulary, n))

  def total(x, w, implementation):
    return kernels.linear_cross_entropy(
      x, w, labels, implementation=implementation
    ).mean()

  value = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
  (got, gradients), (want, others) = (value(x, w, i) for i in ('triton', 'xla'))
  np.testing.assert_allclose(got, want, rtol=1e-4)
  for a, b in zip(gradients, others, strict=True):
    a, b = np.asarray(a, 'd'), np.asarray(b, 'd')
    assert np.abs(a - b).max() <= 2.0**-7 * np.abs(b).max()


@pytest.mark.parametrize('recipe', ['int8', 'int4', 'fp8', 'b1.58', 'quest4'])
def test_layers(recipe):
  """Their kernels against XLA's products and rounding."""
  rng = np.random.default_rng(0)
  x, w, g = (
    jnp.asarray(rng.normal(size=s), 'bfloat16')
    for s in ((4, 50, 192), (192, 320), (4, 50, 320))
  )
  dims = (((2,), (0,)), ((), ()))

  def run(x, w, g, native, implementation):
    dot = lowbit.dot_general(
      lowbit.recipe(recipe), jax.random.key(0), native, None, implementation
    )
    y, pull = jax.vjp(lambda x, w: dot(x, w, dims), x, w)
    return y, *pull(g)

  got = jax.jit(run, static_argnums=(3, 4))(x, w, g, None, None)
  want = jax.jit(run, static_argnums=(3, 4))(x, w, g, False, 'xla')
  for a, b in zip(got, want, strict=True):
    a, b = np.asarray(a, 'd'), np.asarray(b, 'd')
    assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)
