"""Layers cut over eight devices: each its own products, and one's numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels, lowbit
from frugax.lowbit import multiply
from frugax.train import mesh

ROWS = ('batch', 'sequence')
# Names of a linear's axes with what it contracts; widths of those beside it.
LINEARS = {
  'qkv': ('embed', 'heads', 'head_dim'),
  'o': ('heads', 'head_dim', 'embed'),
}
SHAPES = {'qkv': [(32, 4, 8), (32, 2, 8)], 'o': [(4, 8, 24)]}


def arrays(linear, dtype=jnp.float32):
  draw = np.random.default_rng(0)

  def normal(shape):
    return jnp.asarray(draw.standard_t(5, shape), dtype)

  rows, shapes = (8, 6), SHAPES[linear]
  n = 1 if linear == 'qkv' else 2  # contracted axes
  return (
    normal((*rows, *shapes[0][:n])),
    [normal(s) for s in shapes],
    [normal((*rows, *s[n:])) for s in shapes],
  )


def layer(name, linear, layout=None, **arguments):
  """x, ws, gs -> the products and all gradients."""
  cuts = None
  if layout is not None:
    cuts = [lowbit.Cut(layout, ROWS, LINEARS[linear])] * len(SHAPES[linear])
  recipe, key = lowbit.recipe(name), jax.random.key(0)
  dots = lowbit.dot_generals(recipe, key, cuts=cuts, **arguments)

  def value(x, ws, gs):
    n = x.ndim - 2
    dims = ((tuple(range(2, 2 + n)), tuple(range(n))), ((), ()))
    ys, back = jax.vjp(lambda x, ws: tuple(dots(x, ws, dims)), x, ws)
    return ys, *back(tuple(gs))

  return value


def put(layout, linear, x, ws, gs):
  names = LINEARS[linear]
  n = x.ndim - 2
  ways = (
    (x, (*ROWS, *[m if m != 'embed' else None for m in names[:n]])),
    *((w, names) for w in ws),
    *(
      (g, (*ROWS, *[m if m != 'embed' else None for m in names[n:]]))
      for g in gs
    ),
  )
  x, *rest = (
    jax.device_put(a, layout.sharding(names, a.shape)) for a, names in ways
  )
  return x, rest[: len(ws)], rest[len(ws) :]


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels wherever codes are multiplied on a device's own parts."""
  seen = []

  def kernel(a, b, *args, **kwargs):
    seen.append((a.shape, b.shape, a.dtype.name))
    return kernels.quantized_matmul(a, b, *args, interpret=True, **kwargs)

  monkeypatch.setattr(multiply.chips, 'gains', lambda _: multiply.chips.uncut())
  monkeypatch.setattr(multiply, 'quantized_matmul', kernel)
  return seen


def check(name, linear, spec, tolerance=2e-6, **arguments):
  layout = mesh.make_layout(spec)
  whole = arrays(linear)
  # Eight devices without a mesh: nothing is wide, and no kernel runs.
  want = jax.jit(layer(name, linear, native=True))(*whole)
  with jax.set_mesh(layout.mesh):
    got = jax.jit(layer(name, linear, layout, **arguments))(
      *put(layout, linear, *whole)
    )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
  return layout, got


@pytest.mark.parametrize(
  ('name', 'linear'), [('int8', 'qkv'), ('int4', 'o'), ('quest4', 'qkv')]
)
def test_kernels_on_parts_give_one_devices_numbers(name, linear, interpreted):
  layout, (_, _, dws) = check(
    name, linear, 'data=2,fsdp=2,tensor=2', native=True
  )
  for dw in dws * (name != 'quest4'):  # where the weights lie
    want = layout.sharding(LINEARS[linear], dw.shape)
    assert dw.sharding.is_equivalent_to(want, dw.ndim)
  # Rows over four devices, over two units (of q and k) or what is contracted.
  forward = ((12, 32), (24, 32)) if linear == 'qkv' else ((12, 16), (24, 16))
  dtype = 'int8' if name == 'int8' else 'int4'
  assert interpreted[0] == (*forward, dtype)
  assert len(interpreted) == (3 if linear == 'o' else 5) - 4 * (
    name == 'quest4'
  )


@pytest.mark.parametrize(
  ('name', 'spec'),
  [('fp8', 'fsdp=4,tensor=2'), ('halo2', 'fsdp=2,context=2,tensor=2')],
)
def test_products_of_xla_give_one_devices_numbers(name, spec):
  """Even where no device has neighbouring tokens: sequences are cut, too."""
  check(name, 'o', spec)


def test_sums_over_devices_travel_in_the_layers_dtype():
  layout = mesh.make_layout('fsdp=4,tensor=2')
  found = []
  for linear in LINEARS:
    whole = arrays(linear, jnp.bfloat16)
    with jax.set_mesh(layout.mesh):
      value = layer('int8', linear, layout, native=True)
      text = str(jax.make_jaxpr(value)(*whole))
    found += re.findall(r':(\S+) = (reduce_scatter|psum)\b', text)
  # Of q and k the weights' gradients, along embed, and the inputs', over units.
  assert sorted(found) == sorted(
    [
      *[('bf16[8,16]', 'reduce_scatter'), ('bf16[8,8]', 'reduce_scatter')],
      *[('bf16[2,6,32]', 'psum')] * 2,
      *[('bf16[2,6,24]', 'psum'), ('bf16[6,16]', 'reduce_scatter')],
    ]
  )
