"""Linears of the same activations: the numbers of each alone, one copy kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import lowbit
from frugax.kernels import chips

DIMS = (((2,), (0,)), ((), ()))
X, WEIGHTS = (2, 5, 37), ((37, 4, 6), (37, 2, 6), (37, 11))


def normal(*shape, seed=0, dtype=jnp.float32):
  x = np.random.default_rng(seed).standard_t(5, size=shape)
  return jnp.asarray(x, dtype)


def operands(x_shape=X, shapes=WEIGHTS, dtype=jnp.float32):
  x = normal(*x_shape, dtype=dtype)
  ws = [normal(*s, seed=1 + i, dtype=dtype) for i, s in enumerate(shapes)]
  gs = [
    normal(*x_shape[:-1], *s[1:], seed=9 + i, dtype=dtype)
    for i, s in enumerate(shapes)
  ]
  return x, ws, gs


def vjp(dots, dims=DIMS):
  def value(x, ws, gs):
    ys, back = jax.vjp(lambda x, ws: tuple(dots(x, ws, dims)), x, ws)
    return ys, *back(tuple(gs))

  return value


def alone(name, **arguments):
  recipe = dataclasses.replace(lowbit.recipe(name), fuse=False)
  return lowbit.dot_generals(recipe, **arguments)


def fused(name, **arguments):
  return lowbit.dot_generals(lowbit.recipe(name), **arguments)


def assert_close(got, want, tolerance=2e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(chips, 'uncut', lambda: True)


# Scales of rows, of matrices, of groups, of blocks, with a scale of their own;
# masks, rotations with signs of each product, results that are rounded, formats
# of groups that run on through rows, and activations that are left alone.
@pytest.mark.parametrize(
  'name',
  [
    'int8',
    'fp8',
    'fp8_block',
    'mxfp8',
    'nvfp4',
    'mxfp4',
    'quest4',
    'halo2',
    'jetfire',
    'b1.58',
    'stable_spam_int4',
    'e2m1',
  ],
)
def test_numbers_are_those_of_each_alone(name, one_device):
  arrays = operands()
  want = jax.jit(vjp(alone(name)))(*arrays)
  assert_close(jax.jit(vjp(fused(name)))(*arrays), want)


@pytest.mark.parametrize('name', ['int8', 'quest4', 'halo0'])
def test_codes_are_the_same_codes(name, one_device):
  """Of integers, whose sums have no error."""
  x, ws, _ = operands()

  @jax.jit
  def both(x, ws):
    return [f(name, native=True)(x, ws, DIMS) for f in (fused, alone)]

  got, want = both(x, ws)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_weights_with_a_key_draw_bits_of_their_own():
  x, ws, gs = operands(shapes=(WEIGHTS[2], WEIGHTS[2]))
  arrays = x, ws[:1] * 2, gs[:1] * 2
  key = jax.random.key(0)
  got, want = (
    jax.jit(vjp(f('int8', key=key)))(*arrays) for f in (fused, alone)
  )
  assert_close(got, want)
  first, second = got[2]
  assert not np.allclose(first, second, rtol=1e-4)


def test_stacked_weights(one_device):
  """Experts: a batch axis before the units."""
  dims = (((2,), (1,)), ((0,), (0,)))
  x, _, _ = operands((3, 4, 16))
  ws = [normal(3, 16, n, seed=n) for n in (8, 5)]
  gs = [normal(3, 4, n, seed=2 * n) for n in (8, 5)]
  want = jax.jit(vjp(alone('int8'), dims))(x, ws, gs)
  assert_close(jax.jit(vjp(fused('int8'), dims))(x, ws, gs), want)


def products(name, **arguments):
  x, ws, _ = operands()
  dots = fused(name, **arguments)
  traced = jax.jit(lambda x, ws: dots(x, ws, DIMS)).trace(x, ws)
  # Of one platform: others multiply 8-bit floats otherwise.
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  return text.count('stablehlo.dot_general')


def test_one_wide_product_where_nothing_is_cut(monkeypatch):
  for uncut in (True, False):
    monkeypatch.setattr(chips, 'uncut', lambda uncut=uncut: uncut)
    # Of fp8_block with blocks of 128 rows, which would begin elsewhere: it
    # multiplies numbers that have their scales.
    for name in ('int8', 'fp8', 'mxfp8', 'quest4_plain', 'trilm', 'fp8_block'):
      assert products(name, native=True) == (1 if uncut else 3), name


def test_jit_scan_remat_and_vmap_give_the_same():
  dots = fused('quest4_plain')
  remat = jax.checkpoint(dots, static_argnums=2)
  x, ws, gs = operands()
  several = jax.tree.map(lambda a: jnp.stack([a, a[::-1], -0.5 * a]), (x, gs))

  @jax.jit
  def all_ways(several, ws):
    def one(dots, item):
      return vjp(dots)(item[0], ws, item[1])

    return (
      lax.scan(lambda _, item: (None, one(dots, item)), None, several)[1],
      jax.vmap(lambda item: one(dots, item))(several),
      lax.map(lambda item: one(remat, item), several),
    )

  one = jax.jit(vjp(dots))
  items = [jax.tree.map(lambda a: a[i], several) for i in range(3)]  # noqa: B023
  want = [one(x, ws, gs) for x, gs in items]
  want = jax.tree.map(lambda *a: jnp.stack(a), *want)
  for got in all_ways(several, ws):
    assert_close(got, want)


@pytest.mark.parametrize('name', ['int8', 'halo1'])
def test_sharded_equals_one_device(name):
  """Rows and units cut over eight devices."""
  x, ws, gs = operands((16, 12, 64), ((64, 4, 8), (64, 2, 8), (64, 2, 8)))
  value = jax.jit(vjp(fused(name)))
  mesh = jax.make_mesh(
    (4, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  def put(tree, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.tree.map(lambda a: jax.device_put(a, sharding), tree)

  with jax.set_mesh(mesh):
    cut = (
      put(x, 'data'),
      put(ws, 'data', 'tensor'),
      put(gs, 'data', None, 'tensor'),
    )
    got = value(*cut)
    text = value.lower(*cut).compile().as_text()
  assert_close(jax.device_get(got), value(x, ws, gs), 1e-5)
  # Weights keep their places: side by side they would have to change them.
  assert 'collective-permute' not in text and 'all-to-all' not in text


def kept(dots):
  """Bytes of codes and masks that stay, over the number of activations."""
  x, ws, _ = operands(
    (2, 64, 256), ((256, 32), (256, 16), (256, 16)), 'bfloat16'
  )
  back = jax.eval_shape(
    lambda x, ws: jax.vjp(lambda x: tuple(dots(x, ws, DIMS)), x)[1], x, ws
  )
  leaves = jax.tree.leaves(back)
  assert not [a for a in leaves if a.shape == x.shape and a.dtype == x.dtype]
  codes = [a.size * a.dtype.itemsize for a in leaves if a.dtype.itemsize == 1]
  return sum(codes) / x.size


@pytest.mark.parametrize(
  ('name', 'each'), [('int8', 1), ('coat', 1), ('quest4', 4 / 8 + 1 / 8)]
)
def test_one_copy_of_the_codes_stays(name, each):
  assert kept(alone(name)) == 3 * each
  assert kept(fused(name)) == each


def test_weights_of_one_dtype_each_keep_theirs():
  x, ws, gs = operands()
  ws[1] = ws[1].astype(jnp.bfloat16)
  ys, dx, dws = jax.eval_shape(vjp(fused('int8')), x, ws, gs)
  assert [w.dtype for w in dws] == [w.dtype for w in ws]
  assert dx.dtype == ys[1].dtype == jnp.float32


def test_bad_operands_are_refused():
  x, ws, _ = operands()
  with pytest.raises(ValueError, match='take floating-point arrays, not int8'):
    fused('int8')(x, [ws[0], ws[1].astype('int8')], DIMS)
  with pytest.raises(ValueError, match='take no out_sharding'):
    fused('int8')(x, ws, DIMS, out_sharding=P())
