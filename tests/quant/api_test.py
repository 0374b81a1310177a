"""One function for all formats, and its arrays through all that takes them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import quant
from frugax.quant import Scaling

X = np.random.default_rng(0).standard_t(3, size=(3, 32, 72)).astype(np.float32)
KEY = jax.random.key(3)


def put(x, spec):
  mesh = jax.make_mesh(
    (4, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  return jax.device_put(x, NamedSharding(mesh, spec))


def everything(x):
  """Every format once; a few in every granularity, to nearest or not."""
  out = {name: quant.quantize(x, name, batch_axes=1) for name in quant.FORMATS}
  for name, granularity in itertools.product(
    ('int8', 'int2', 'fp4_e2m1'), quant.GRANULARITIES
  ):
    if granularity == 'flat' and name != 'int8':
      continue
    block = 16 if granularity in ('flat', 'group', 'block') else None
    out[f'{name} {granularity}'] = quant.quantize(
      x, name, block, 1, KEY, granularity=granularity
    )
  return out


ALL = jax.jit(everything)(X)


@pytest.mark.parametrize(
  ('granularity', 'tile'),
  [
    ('tensor', (None, None)),
    ('row', (1, None)),
    ('channel', (None, 1)),
    ('group', (1, 16)),
    ('block', (16, 16)),
  ],
)
def test_the_scales_of_each_granularity(granularity, tile):
  for name in ('int8', 'int2', 'fp4_e2m1'):
    q = ALL[f'{name} {granularity}']
    assert q.scaling == Scaling(tile) and q.shape == X.shape
    rows, columns = (
      size if n is None else n for n, size in zip(tile, (32, 72), strict=True)
    )
    padded = np.pad(np.abs(X), [(0, 0), (0, 0), (0, -72 % columns)])
    tiles = padded.reshape(3, 32 // rows, rows, -1, columns).max((2, 4))
    want = tiles / quant.element(name).top
    np.testing.assert_allclose(q.steps().reshape(want.shape), want, rtol=1e-6)


def test_errors_are_at_most_half_a_step():
  for name in ('int16', 'mxfp8', 'mxfp6_e2m3', 'mxint8', 'e4m3'):
    q = ALL[name]
    error = np.abs(quant.dequantize(q) - X)
    # Below the top a float's step is at most a power of two of its size.
    e = quant.element(q.format)
    step = q.scaling.stretch * np.asarray(quant.tiles.spread_steps(q))
    floats = np.abs(X) * 2.0 ** -(e.mantissa + 1)
    floor = step * 2.0 ** (e.least - e.mantissa) / 2
    saturated = np.maximum(np.abs(X) - step * e.top, 0)
    octaves = e.top >= 2.0 ** (e.least + 1)
    bound = np.maximum(floats if octaves else 0, floor) + saturated
    # And what float32 loses.
    assert (error <= bound + np.abs(X) * 2.0**-22).all(), name
    assert error.max() > 0


def test_defaults():
  assert isinstance(ALL['int4'], quant.Blocks)
  assert ALL['int8'].block == 256
  assert ALL['int3'].scaling == Scaling((1, None))
  assert ALL['mxfp4'].scaling == Scaling((1, 32), scale='ocp')
  assert ALL['nvfp4'].scaling == Scaling((1, 16), scale='nv')
  grouped = jax.eval_shape(lambda: quant.quantize(X, 'int3', 8))
  assert grouped.scaling == Scaling((1, 8))
  own = Scaling((1, 8), 'rms', 2.0)
  q = jax.eval_shape(lambda: quant.quantize(X, 'int8', scaling=own))
  assert isinstance(q, quant.Tiled) and q.scaling == own


def test_is_a_pytree_for_scan_slices_and_shardings():
  @jax.jit
  def both(qs):
    whole = {k: quant.dequantize(q) for k, q in qs.items()}

    def body(_, items):
      return None, {k: quant.dequantize(q) for k, q in items.items()}

    return whole, jax.lax.scan(body, None, qs)[1]

  names = ('int4', 'mxfp6_e3m2', 'nvfp4', 'ternary', 'int2 block')
  whole, scanned = both({name: ALL[name] for name in names})
  jax.tree.map(np.testing.assert_array_equal, whole, scanned)
  for name in names:
    q = ALL[name]
    assert q.batch_axes == 1 and whole[name].shape == q.shape == X.shape
    assert q.nbytes == sum(a.nbytes for a in jax.tree.leaves(q))
    assert jax.tree.map(lambda a: a[0], q).shape == (32, 72)


def test_orbax_restores_every_format_bit_for_bit(tmp_path):
  # Two of each kind would not fit a test's time: all formats, in one tree.
  saved = {name.replace(' ', '_'): q for name, q in ALL.items()}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'all', saved)
    checkpointer.wait_until_finished()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
    restored = checkpointer.restore(tmp_path / 'all', target)
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  for a, b in zip(
    jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True
  ):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_random_bits_do_not_depend_on_blocks_or_shards():
  """Wherever an element lies, and whatever it shares its scale with."""
  # All scales are alike: each 8 x 8 block has the same greatest magnitude.
  x = np.random.default_rng(0).uniform(-1, 1, size=(32, 64)).astype(np.float32)
  x[::8, ::8] = 1.0

  def numbers(x):
    return {
      f'{name} {g} {block}': quant.quantize(
        x, name, block, key=KEY, granularity=g
      ).numbers()
      for name in ('int4', 'fp8_e4m3')
      for g, block in (('tensor', None), ('block', 8), ('block', 32))
    }

  numbers = jax.jit(numbers)
  want = numbers(x)
  sharded = numbers(put(x, P('data', 'tensor')))
  for name in want:
    np.testing.assert_array_equal(sharded[name], want[name], err_msg=name)
  for name in ('int4', 'fp8_e4m3'):
    first, *others = (v for k, v in want.items() if k.startswith(name))
    for v in others:
      np.testing.assert_array_equal(v, first)
    nearest = quant.element(name).round(x * quant.element(name).top)
    assert (first != nearest).any()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'format': 'nvpf4'}, "'nvpf4': did you mean 'nvfp4'"),
    ({'format': 'int4', 'granularity': 'rows'}, "did you mean 'row'"),
    ({'format': 'e2m1', 'granularity': 'flat'}, "give 'group'"),
    ({'format': 'int8', 'block': 8, 'granularity': 'row'}, 'has none'),
    ({'format': 'mxfp8', 'block': 8}, 'say so already'),
    ({'format': 'nvfp4', 'scaling': Scaling()}, "element format, 'fp4_e2m1'"),
    ({'format': 'int8', 'block': 8, 'scaling': Scaling()}, 'give neither'),
    ({'format': 'int3', 'block': 0}, 'block=0'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    quant.quantize(jnp.ones((2, 16)), **arguments)
