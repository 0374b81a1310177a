"""Maps against a search in float64, codecs against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugax.quant import Codec, decode, encode
from frugax.quant.codecs import BLOCKS, MAPS

MAP_NAMES = [(name, order) for name in MAPS for order in (0, 1)]
PACKED = list(BLOCKS)
SHAPES = st.sampled_from(
  [(1,), (7,), (257,), (16, 32), (3, 5, 41), (2, 5461), (31, 1), (4, 8, 64)]
)


def table(bits, signed):
  """The dynamic map as bitsandbytes and torchao define it, in float64."""
  decades = bits - 1
  values = [0.0, 1.0]
  for i in range(decades):
    edges = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
    middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - decades + 1)
    values += [*middles, *(-middles if signed else ())]
  return np.sort(values)


TABLES = {
  ('dynamic8', 0): table(8, signed=True),
  ('dynamic8', 1): table(8, signed=False),
  ('linear8', 0): np.arange(-127, 128) / 127,
  ('linear8', 1): np.arange(256) / 255,
  ('dynamic4', 0): table(4, signed=True),
  ('dynamic4', 1): np.arange(1, 17) / 16,
  ('linear4', 0): np.arange(-7, 8) / 7,
  ('linear4', 1): np.arange(1, 17) / 16,
}


@pytest.mark.parametrize(('name', 'order'), MAP_NAMES)
def test_numbers_of_the_map(name, order):
  want = TABLES[name, order]
  got = MAPS[name][order].decode(jnp.arange(len(want), dtype=jnp.float32))
  # XLA multiplies by the reciprocal of a constant: one more rounding.
  np.testing.assert_allclose(got, want, rtol=2**-23)


def test_the_published_maps():
  signed, unsigned = TABLES['dynamic8', 0], TABLES['dynamic8', 1]
  assert len(signed) == len(unsigned) == 256
  assert signed[127] == 0 and unsigned[0] == 0
  np.testing.assert_allclose(signed[[0, 255]], [-0.992969, 1], rtol=1e-6)
  np.testing.assert_allclose(
    signed[128:132], [5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5]
  )
  np.testing.assert_allclose(unsigned[1:4], [3.25e-7, 7.75e-7, 2.125e-6])
  np.testing.assert_allclose(
    unsigned[-4:], [0.98242, 0.98945, 0.99648, 1.0], atol=1e-5
  )
  np.testing.assert_allclose(
    TABLES['dynamic4', 0],
    [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0]
    + [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1],
  )


def around(numbers, reach):
  """The float32 numbers at most `reach` steps from each, the nearest first."""
  start = np.asarray(numbers, np.float32)
  found, up, down = [start], start, start
  for _ in range(reach):
    up = np.nextafter(up, np.float32(2))
    down = np.nextafter(down, np.float32(-2))
    found += [up, down]
  return found


def nearest(x, numbers):
  """Codes by a search over all numbers in float64."""
  gap = np.abs(np.asarray(x, np.float64)[:, None] - numbers)
  return gap.argmin(1), np.sort(gap, axis=1)[:, :2]


@pytest.mark.parametrize(('name', 'order'), MAP_NAMES)
def test_nearest_at_every_boundary(name, order):
  """Exact two floats from the middle; there, one of the two equally near."""
  numbers = TABLES[name, order]
  encode_map = jax.jit(MAPS[name][order].encode)
  middles = (numbers[1:] + numbers[:-1]) / 2
  if numbers[0] == 0:
    middles = middles[1:]  # What is greater than zero never becomes zero.
  for distance, x in enumerate(around(middles, 4)):
    got = np.asarray(encode_map(jnp.asarray(x))).astype(int)
    want, (best, _) = nearest(x, numbers)[0], nearest(x, numbers)[1].T
    if distance > 2:
      np.testing.assert_array_equal(got, want)
    slack = 2 * np.spacing(np.abs(x))
    assert (np.abs(x - numbers[got]) <= best + slack).all()


@pytest.mark.parametrize(('name', 'order'), MAP_NAMES)
def test_nearest_everywhere_else(name, order):
  numbers = TABLES[name, order]
  rng = np.random.default_rng(0)
  x = np.concatenate([rng.uniform(-1, 1, 4096), 10 ** rng.uniform(-8, 0, 4096)])
  x = np.concatenate([x, -x, numbers, [0.0, 1e-30]]).astype(np.float32)
  x = x[x >= numbers[0]] if numbers[0] >= 0 else x
  want, gaps = nearest(x, numbers)
  got = np.asarray(MAPS[name][order].encode(jnp.asarray(x))).astype(int)
  clear = gaps[:, 1] - gaps[:, 0] > 4e-7 * np.abs(x)
  if numbers[0] == 0:
    clear &= (want > 0) | (x == 0)
  assert clear.mean() > 0.5
  np.testing.assert_array_equal(got[clear], want[clear])


@pytest.mark.parametrize('name', ['dynamic8', 'linear8'])
def test_second_moments_never_become_zero(name):
  x = jnp.asarray(np.float32([1, 1e-3, 1e-9, 1e-30, 0]))
  got = np.asarray(decode(encode(x, Codec(name, signed=False))))
  assert (got[:4] > 0).all() and got[4] == 0
  assert (np.asarray(decode(encode(x, Codec(name))))[2:] == 0).all()


@settings(max_examples=20, deadline=None)
@given(
  shape=SHAPES,
  name=st.sampled_from(PACKED),
  block=st.sampled_from([None, 1, 16, 4096]),
  signed=st.booleans(),
  batch=st.integers(0, 2),
  seed=st.integers(0, 99),
)
def test_shapes_bytes_and_errors(shape, name, block, signed, batch, seed):
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  x = x if signed else x * x
  batch = min(batch, len(shape) - 1)
  codec = Codec(name, block, signed)
  coded = encode(jnp.asarray(x), codec, batch)
  assert coded.shape == shape
  got = np.asarray(decode(coded))
  assert got.shape == shape and got.dtype == np.float32
  # Bytes by the formula: blocks along the axes that it takes to fill one.
  merged = 1
  while np.prod(shape[-merged:]) < codec.block and merged < len(shape) - batch:
    merged += 1
  rows, width = shape[: len(shape) - merged], int(np.prod(shape[-merged:]))
  blocks = int(np.prod(rows)) * -(-width // codec.block)
  if '4' in name[-1]:
    codes = int(np.prod(shape[:-1])) * -(-shape[-1] // 2)
  if name in ('dynamic4', 'linear4'):
    assert codec.bytes_of(shape, batch) == codes + 4 * blocks
  else:
    extra = 5 if 'fp8' in name else 4
    assert codec.bytes_of(shape, batch) == x.size + extra * blocks
  # Half of the widest cell of the map, of the largest number of the block.
  flat = np.abs(x).reshape(-1, width)
  pad = -width % codec.block
  top = np.pad(flat, [(0, 0), (0, pad)]).reshape(len(flat), -1, codec.block)
  top = np.repeat(top.max(-1), codec.block, axis=1)[:, :width].reshape(shape)
  if 'fp8' in name:
    # Half a float's step in the power of the group, normal or subnormal.
    digits, least, most = (3, -9, 448) if 'e4m3' in name else (2, -16, 57344)
    k = np.repeat(np.asarray(coded.powers, np.float64) / 16, codec.block, -1)
    k = k[..., :width].reshape(shape)
    safe = np.where(top > 0, top, 1).astype(np.float64)
    q = most * (np.abs(x, dtype=np.float64) / safe) ** k
    step = 2.0 ** np.maximum(
      np.floor(np.log2(np.maximum(q, 1e-300))) - digits, least
    )
    low, high = (
      top * (np.maximum(q + s * step, 0) / most) ** (1 / k)
      for s in (-0.501, 0.501)
    )
    assert (low * (1 - 1e-4) <= np.abs(got)).all()
    assert (np.abs(got) <= np.maximum(high, top) * (1 + 1e-4)).all()
    assert (np.sign(got) * np.sign(x) >= 0).all()
  else:
    numbers = TABLES[name, 0 if signed else 1]
    cell = np.diff(numbers).max() / 2
    if numbers[0] > -1:
      cell = max(cell, 1 + numbers[0] if signed else numbers[1] - numbers[0])
    assert (np.abs(got - x) <= top * cell * 1.001).all()


@pytest.mark.parametrize('name', PACKED)
def test_items_of_a_stack_are_stored_as_if_alone(name):
  x = jax.random.normal(jax.random.key(0), (3, 5, 40))
  codec = Codec(name, 64)
  stack = encode(x, codec, batch_axes=1)
  for i, item in enumerate(x):
    got = jax.tree.map(lambda a, i=i: a[i], stack)
    jax.tree.map(np.testing.assert_array_equal, got, encode(item, codec))
  along = jax.vmap(lambda a: encode(a, codec))(x)
  jax.tree.map(np.testing.assert_array_equal, along, stack)
  jax.tree.map(
    np.testing.assert_array_equal, jax.vmap(decode)(stack), decode(stack)
  )


@pytest.mark.parametrize('name', PACKED)
@pytest.mark.parametrize('value', [0.0, 1.0, -2.5, 3e38, -7e-35])
def test_zeros_and_constants(name, value):
  x = jnp.full(300, value, jnp.float32)
  got = decode(encode(x, Codec(name)))
  # -1 is no number of the dynamic maps.
  rtol = 0.12 if value < 0 and name == 'dynamic4' else 0.008
  np.testing.assert_allclose(got, x, rtol=rtol if value < 0 else 1e-6)


@pytest.mark.parametrize('name', PACKED)
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_shows(name, bad):
  """In its block, and nowhere else."""
  # XLA's maximum on CPUs loses a NaN in an array of some size.
  for rows in (4, 40):
    x = jax.random.normal(jax.random.key(0), (rows, 256)).at[1, 3].set(bad)
    got = decode(encode(x, Codec(name, 256)))
    assert not jnp.isfinite(got[1]).any()
    assert jnp.isfinite(jnp.delete(got, 1, axis=0)).all()


@pytest.mark.parametrize('name', MAPS)
@pytest.mark.parametrize('signed', [True, False])
def test_codes_are_stable(name, signed):
  """What was decoded is encoded to the same codes."""
  x = jax.random.normal(jax.random.key(0), (8, 512))
  # -1 is no number of the dynamic maps, so that the scale would shrink.
  x = x.at[:, ::64].set(5)
  once = encode(x if signed else x * x, Codec(name, signed=signed))
  again = encode(decode(once), once.codec)
  jax.tree.map(np.testing.assert_array_equal, once, again)


def test_roots():
  x = 10 ** jax.random.uniform(jax.random.key(0), (1024,), minval=-8, maxval=0)
  for name in ('linear8', 'dynamic8'):
    plain, root = (
      decode(encode(x, Codec(name, signed=False, sqrt=sqrt)))
      for sqrt in (False, True)
    )
    errors = [float(jnp.abs(jnp.log(y / x)).max()) for y in (plain, root)]
    assert errors[1] < errors[0]
  assert (decode(encode(x, Codec('bf16', sqrt=True)), sqrt=True) > 0).all()


def exponent(x, group=128):
  return np.asarray(encode(x, Codec('fp8_e4m3', group)).powers) / 16


def test_an_exact_zero_does_not_widen_a_group():
  """The released code adds 1e-30 to both ends, and its exponent is 0.125."""
  x = jax.random.normal(jax.random.key(0), (128,)).at[5].set(0)
  most, least = float(jnp.abs(x).max()), float(jnp.abs(x)[x != 0].min())
  wide = 448**2 / 2
  released = np.floor(16 * np.log2(wide) / np.log2(most / 1e-30)) / 16
  assert released == 0.125
  want = np.floor(16 * np.log2(wide) / np.log2(most / least)) / 16
  assert exponent(x) == want > 1
  assert decode(encode(x, Codec('fp8_e4m3')))[5] == 0


def test_range_expansion_is_worth_it():
  """Mean relative error of a Gaussian group: 0.95 to 1.7 %, 2.1 % without."""
  x = np.random.default_rng(0).normal(size=(512, 128)).astype(np.float32)
  got = np.asarray(decode(encode(jnp.asarray(x), Codec('fp8_e4m3'))))
  error = np.abs(got / x - 1).mean()
  scale = np.abs(x).max(-1, keepdims=True) / 448
  plain = np.asarray(jnp.asarray(x / scale).astype(jnp.float8_e4m3fn))
  without = np.abs(plain.astype(np.float32) * scale / x - 1).mean()
  assert 0.0095 < error < 0.017 and 0.021 < without < 0.024
  low, high = np.quantile(exponent(x), [0.05, 0.95])
  assert 1.25 < low < 1.6 and 2.2 < high < 3


@pytest.mark.parametrize('name', ['fp8_e4m3', 'fp8_e5m2'])
def test_a_wide_group_loses_nothing(name):
  x = jnp.logspace(-30, 3, 128, dtype=jnp.float32)
  got = decode(encode(x, Codec(name)))
  assert (got > 0).all()
  assert float(jnp.abs(jnp.log10(got / x)).max()) < 0.6


@pytest.mark.parametrize('signed', [True, False])
def test_closed_form(signed):
  """No search, no array of more than a few numbers an element, no gather.

  But CPUs, where reading is faster, look up what a code stands for.
  """
  codec = Codec('dynamic8', signed=signed)
  x = jnp.ones((8, 256))
  coded = jax.eval_shape(lambda x: encode(x, codec), x)
  for function, argument, cpu in (
    (lambda x: encode(x, codec), x, False),
    (decode, coded, True),
  ):
    for platform in ('cpu', 'tpu', 'cuda'):
      lowered = jax.jit(function).trace(argument)
      text = lowered.lower(lowering_platforms=(platform,)).as_text()
      assert ('gather' in text) == (cpu and platform == 'cpu'), platform
      assert 'stablehlo.sort' not in text and '256x256' not in text


@pytest.mark.parametrize(
  ('name', 'order'), [('dynamic8', 0), ('dynamic8', 1), ('dynamic4', 0)]
)
def test_the_table_of_cpus_is_what_others_compute(name, order):
  codes = MAPS[name][order]
  x = jnp.arange(2**codes.bits)
  np.testing.assert_allclose(
    codes._look_up(x), jax.jit(codes._compute)(x), rtol=2**-23
  )


def test_bad_input():
  with pytest.raises(ValueError, match="unknown codec 'dynamic6': did"):
    Codec('dynamic6')
  with pytest.raises(ValueError, match='block=0'):
    Codec('dynamic8', 0)
  with pytest.raises(ValueError, match='floating-point arrays, not int32'):
    encode(jnp.arange(3), Codec('dynamic8'))
  with pytest.raises(ValueError, match='the array has none'):
    encode(jnp.float32(1), Codec('dynamic8'))
