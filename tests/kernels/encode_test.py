"""Codes by the kernel against those of `quantize_tiles`."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels
from frugax.kernels import blocks, chips
from frugax.quant import Scaling, element, quantize_tiles

FORMATS = ('int8', 'int4', 'ternary', 'rise4', 'fp8_e4m3', 'fp8_e5m2')
few = hypothesis.settings(deadline=None, max_examples=12, derandomize=True)
sizes = st.tuples(st.integers(1, 150), st.integers(1, 300))


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """So that small matrices have several blocks along each axis."""
  patch = pytest.MonkeyPatch()
  small = blocks.EncodeBlocks(32, 64, 4)
  patch.setattr(blocks, 'gpu_encode', lambda *_: small)
  yield
  patch.undo()


def matrix(shape, dtype='bfloat16', seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_t(3, size=shape), dtype)


def check(x, format, turned, stochastic, scaling=None):
  key = jax.random.key(7) if stochastic else None
  view = x.T if turned else x
  q = quantize_tiles(view, format, scaling, key=key, packed=False)
  got = kernels.encode(
    x, q.steps(), format, turned=turned, key=key, interpret=True
  )
  assert got.dtype == q.data.dtype and got.shape == view.shape
  assert np.isfinite(np.asarray(got, 'f')).all()
  e = element(format)
  numbers, want = (np.asarray(e.decode(c), 'd') for c in (got, q.data))
  t = np.asarray(view, 'd') / np.asarray(q.steps(), 'd')
  t = np.clip(t, -e.top, e.top)
  # Where they differ, both are as near: to within last bits of the quotient.
  unit = 2.0**-22 * e.top
  off = np.abs(numbers - t) - np.abs(want - t)
  if stochastic:
    off = np.where(numbers == want, 0, np.abs(numbers - want) - e.top_step)
    assert (numbers != want).mean() < 1e-3
  assert (np.abs(off) <= unit).all()


@few
@hypothesis.given(sizes, st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_any_shape(size, format, turned, stochastic):
  check(matrix(size), format, turned, stochastic)


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('format', FORMATS)
def test_every_format_with_one_step_for_all(format, turned):
  check(
    matrix((40, 130), 'float32'), format, turned, False, Scaling((None, None))
  )


def test_most_codes_are_the_same():
  x = matrix((128, 256))
  for turned in (False, True):
    q = quantize_tiles(x.T if turned else x, 'int8', packed=False)
    got = kernels.encode(x, q.steps(), turned=turned, interpret=True)
    assert (got != q.data).mean() < 1e-4


@pytest.mark.parametrize('turned', [False, True])
def test_random_bits_are_those_of_the_codes_own_places(turned):
  x = jnp.full((70, 90), 0.5)
  key, one = jax.random.key(1), jnp.ones((1, 1))
  got = kernels.encode(x, one, turned=turned, key=key, interpret=True)
  want = kernels.encode(x, one, turned=turned, key=key, implementation='xla')
  assert (got == want).all() and 0.4 < got.mean() < 0.6


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('format', FORMATS)
def test_nothing_becomes_nan(format, turned):
  """Zeros, infinities, subnormal and constant rows."""
  rows = [0.0, np.inf, -np.inf, 1e-40, 3e38, -2.0]
  x = jnp.asarray(np.repeat(np.array(rows, 'f')[:, None], 40, 1))
  x = x.at[:, 0].set(1.0)
  x = x.T if turned else x
  check(x, format, turned, False)


@pytest.mark.parametrize(
  ('message', 'arguments', 'options'),
  [
    ("unknown format 'int9'", (jnp.ones((2, 3)), jnp.ones((2, 1)), 'int9'), {}),
    ('give a matrix', (jnp.ones(3), jnp.ones((1, 1))), {}),
    ('give a matrix', (jnp.ones((2, 3), int), jnp.ones((2, 1))), {}),
    ('for 2 rows of codes', (jnp.ones((2, 3)), jnp.ones((3, 1))), {}),
    (
      'for 3 rows of codes',
      (jnp.ones((2, 3)), jnp.ones((2, 1))),
      {'turned': True},
    ),
    (
      "did you mean 'triton'",
      (jnp.ones((2, 3)), jnp.ones((2, 1))),
      {'implementation': 'trition'},
    ),
    (
      'needs a GPU of the Hopper kind',
      (jnp.ones((2, 3)), jnp.ones((2, 1))),
      {'implementation': 'triton'},
    ),
    (
      'only a kernel can be interpreted',
      (jnp.ones((2, 3)), jnp.ones((2, 1))),
      {'implementation': 'xla', 'interpret': True},
    ),
  ],
)
def test_bad_input(message, arguments, options):
  with pytest.raises(ValueError, match=message):
    kernels.encode(*arguments, **options)


@pytest.mark.parametrize(
  ('device', 'native'),
  [('NVIDIA H200', True), ('NVIDIA A100-SXM4-80GB', False)],
)
def test_the_chip_decides(device, native):
  device = jax.sharding.AbstractDevice(
    device_kind=device, num_cores=1, platform='gpu'
  )
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  arrays = jnp.ones((8, 8)), jnp.ones((8, 1))
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(kernels.encode).trace(*arrays)
  assert ('pallas_call' in str(traced.jaxpr)) == native


def test_xla_says_once_that_it_computes_the_codes(caplog):
  chips.say_so.cache_clear()
  x, steps = jnp.ones((8, 8)), jnp.ones((8, 1))
  for _ in range(2):
    kernels.encode(x, steps, 'fp8_e4m3', implementation='xla')
    kernels.encode(x, steps, 'int4')
  assert [r.getMessage() for r in caplog.records] == [
    'encode: int4 codes are left to XLA on this platform'
  ]


def test_the_kernel_tells_what_it_reads_and_writes():
  x, steps = jnp.ones((96, 640), jnp.bfloat16), jnp.ones((1, 1))
  jaxpr = jax.make_jaxpr(lambda x: kernels.encode(x, steps, interpret=True))(x)
  (cost,) = re.findall(r'bytes_accessed=(\d+)', str(jaxpr))
  assert int(cost) == x.size * (2 + 1) + 4
