"""Linear layers whose activations a kernel rounds as it multiplies them.

Interpreted; tests/train/tpu_lowbit_test.py compiles a step for TPUs.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from frugax import kernels, lowbit
from frugax.kernels import blocks, chips
from frugax.lowbit import multiply
from frugax.quant import Scaling, element, quantize_tiles
from frugax.train import mesh

DIMS = (((2,), (0,)), ((), ()))


@pytest.fixture
def fused(monkeypatch):
  """The shapes that kernels are given; they run on a device's own parts."""
  seen = []

  def rounding(x, w, *args, **kwargs):
    seen.append((x.shape, w.shape, w.dtype.name))
    return kernels.quantize_matmul(x, w, *args, interpret=True, **kwargs)

  monkeypatch.setattr(blocks, 'fuses', lambda *_: True)
  monkeypatch.setattr(multiply, 'quantize_matmul', rounding)
  return seen


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(chips, 'uncut', lambda: True)


def arrays(rows, columns, units, dtype='bfloat16'):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_t(3, shape), dtype)

  x = draw(*rows, columns)
  ws = [draw(columns, n) for n in units]
  return x, ws, [draw(*rows, n) for n in units]


def layer(recipe, **arguments):
  """x, ws, gs -> the products and all gradients."""
  if isinstance(recipe, str):
    recipe = lowbit.recipe(recipe)
  dots = lowbit.dot_generals(
    recipe, jax.random.key(0), native=True, **arguments
  )

  def value(x, ws, gs):
    ys, back = jax.vjp(lambda x, ws: tuple(dots(x, ws, DIMS)), x, ws)
    return ys, *back(tuple(gs))

  return value


def assert_same(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.astype('float32'), b.astype('float32'))


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [('int8', 'bfloat16'), ('int4', 'bfloat16'), ('int8', 'float32')],
)
def test_numbers_are_those_of_xla(name, dtype, fused, one_device):
  operands = arrays((2, 5), 37, (24, 9), dtype)
  got = jax.jit(layer(name))(*operands)
  # One wide product.
  assert fused == [((10, 37), (33, 37), name)]
  assert_same(got, jax.jit(layer(name, implementation='xla'))(*operands))
  assert len(fused) == 1


@pytest.mark.parametrize('format', ['int8', 'int4', 'ternary'])
def test_codes_are_those_of_quantize_tiles(format):
  """To the last: of numbers, too, that are half-way between two codes."""
  top, rng = element(format).top, np.random.default_rng(0)
  x = rng.integers(-top, top, (130, 261)) + 0.5
  x[:, 0] = top
  x = jnp.asarray(x * rng.uniform(0.1, 9, (130, 1)), jnp.float32)
  w = jnp.ones((3, 261), 'int8' if format == 'int8' else 'int4')
  got = kernels.quantize_matmul(
    x, w, format=format, layout='NT', interpret=True
  )
  want = quantize_tiles(x, format)
  np.testing.assert_array_equal(got.codes.astype('int8'), want.codes())
  np.testing.assert_array_equal(got.scales, want.steps())


def test_odd_rows_stay_what_they_are(fused, one_device):
  """Of zeros, infinities, numbers below all normal ones, and one large one."""
  x, ws, gs = arrays((1, 6), 130, (5,), 'float32')
  x = x.at[0, 1].set(0).at[0, 2, 3].set(jnp.inf).at[0, 3].set(1e-40)
  x = x.at[0, 4, 7].set(3e38)
  got = jax.jit(layer('int8'))(x, ws, gs)
  want = jax.jit(layer('int8', implementation='xla'))(x, ws, gs)
  assert fused
  assert_same(got, want)
  # A NaN spoils its own row.
  y = jax.jit(layer('int8'))(x.at[0, 5, 9].set(jnp.nan), ws, gs)[0][0]
  assert jnp.isnan(y).all(-1).tolist() == [[False] * 5 + [True]]


def test_scan_remat_and_vmap_give_the_same(fused, one_device):
  name = 'int8'
  dots = lowbit.dot_generals(
    lowbit.recipe(name), jax.random.key(0), native=True
  )
  remat = jax.checkpoint(dots, static_argnums=2)
  x, ws, gs = arrays((2, 3), 20, (6, 4))

  def one(dots, x):
    ys, back = jax.vjp(lambda x, ws: tuple(dots(x, ws, DIMS)), x, ws)
    return ys, *back(tuple(gs))

  several = jnp.stack([x, -x, x[::-1]])
  got = (
    jax.jit(lambda s: lax.scan(lambda _, x: (None, one(dots, x)), None, s)[1])(
      several
    ),
    jax.jit(lambda s: lax.map(lambda x: one(remat, x), s))(several),
    jax.jit(jax.vmap(lambda x: one(dots, x)))(several),
  )
  assert fused
  value = jax.jit(layer(name, implementation='xla'))
  want = [value(x, ws, gs) for x in several]
  want = jax.tree.map(lambda *a: jnp.stack(a), *want)
  for found in got:
    assert_same(found, want)


def test_stacked_weights(fused, one_device):
  """Experts: a batch axis before the units."""
  dims = (((2,), (1,)), ((0,), (0,)))
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s)) for s in ((3, 4, 35), (3, 35, 8)))

  def value(implementation):
    dot = lowbit.dot_general(
      lowbit.recipe('int8'), native=True, implementation=implementation
    )
    return jax.jit(jax.grad(lambda x: jnp.cos(dot(x, w, dims)).sum()))(x)

  got = value(None)
  assert fused == [((4, 35), (8, 35), 'int8')]
  assert_same(got, value('xla'))


@pytest.mark.parametrize(('name', 'axes'), [('int4', 'qkv'), ('int8', 'o')])
def test_eight_devices(name, axes, fused):
  """Where rows are whole, on each device's own; else XLA rounds."""
  layout = mesh.make_layout('data=2,fsdp=2,tensor=2')
  x, ws, gs = arrays((8, 6), 32, (24, 8) if axes == 'qkv' else (24,))
  names = {'qkv': ('embed', 'mlp'), 'o': ('mlp', 'embed')}[axes]
  cuts = [lowbit.Cut(layout, ('batch', 'sequence'), names)] * len(ws)
  with jax.set_mesh(layout.mesh):
    got = jax.jit(layer(name, cuts=cuts))(x, ws, gs)
    assert fused == [((12, 32), (16, 32), name)] * (axes == 'qkv')
    want = jax.jit(layer(name, cuts=cuts, implementation='xla'))(x, ws, gs)
  assert_same(got, want)


def test_what_kernels_do_not_round_is_left_to_xla(fused, one_device):
  operands = arrays((2, 5), 37, (24,))
  row = lowbit.Operand('int8')
  for left in (
    dataclasses.replace(row, stochastic=True),
    dataclasses.replace(row, mask='clip'),
    lowbit.Operand('int8', Scaling((1, None), 'rms')),
    lowbit.Operand('int8', Scaling((None, None))),
    lowbit.Operand('e2m1'),
    lowbit.Operand(),
  ):
    product = lowbit.Product(left, row)
    jax.eval_shape(layer(lowbit.Recipe(product)), *operands)
    assert not fused, left
  rotated = lowbit.Product(row, row, lowbit.Rotation())
  jax.eval_shape(layer(lowbit.Recipe(rotated)), *operands)
  # Its backward pass takes the codes.
  jax.eval_shape(layer('b1.58'), *operands)
  assert not fused


@pytest.mark.parametrize('devices', [1, 8])
def test_the_mesh_decides(devices):
  device = jax.sharding.AbstractDevice(
    device_kind='TPU v5 lite', num_cores=1, platform='tpu'
  )
  shape = (devices,), ('data',)
  abstract = jax.sharding.AbstractMesh(*shape, abstract_device=device)
  operands = arrays((8, 64), 256, (128,))
  with jax.sharding.use_abstract_mesh(abstract):
    text, plain = (
      str(jax.jit(layer('int8', implementation=i)).trace(*operands).jaxpr)
      for i in (None, 'xla')
    )
  found = set(re.findall(r'quantize_matmul_\w+', text))
  assert found == ({'quantize_matmul_int8_NT'} if devices == 1 else set())
  assert 'pallas_call' not in plain


def test_an_unknown_implementation_is_refused():
  for linear in (lowbit.dot_general, lowbit.dot_generals):
    with pytest.raises(
      ValueError, match="'mosiac' of linear layers: give 'xla'"
    ):
      linear(lowbit.recipe('int8'), implementation='mosiac')
