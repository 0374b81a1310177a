"""Linear layers whose products are kernels, where the chip gains by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels, lowbit
from frugax.kernels import chips
from frugax.lowbit import matrices, multiply

DIMS = {
  'dense': ((2, 5, 37), (37, 3, 7), (((2,), (0,)), ((), ()))),
  'experts': ((3, 6, 35), (3, 35, 18), (((2,), (1,)), ((0,), (0,)))),
}


def layer(name, dims, **arguments):
  """The product, and both gradients of its sum of squares."""
  x_shape, w_shape, numbers = DIMS[dims]
  rng = np.random.default_rng(0)
  x, w = (
    jnp.asarray(rng.normal(size=s), 'float32') for s in (x_shape, w_shape)
  )
  # A key: where random bits come from the gradient's, a unit in its last place
  # would draw others.
  key = jax.random.key(0)
  dot = lowbit.dot_general(lowbit.recipe(name), key, **arguments)

  def value(x, w):
    y, back = jax.vjp(lambda x, w: dot(x, w, numbers), x, w)
    return y, *back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  return value, x, w


@pytest.mark.parametrize(
  ('name', 'dims'),
  [
    ('int8', 'experts'),
    ('int4', 'dense'),
    ('quest4', 'experts'),
    ('fp8', 'dense'),
  ],
)
def test_kernels_give_what_xla_does(name, dims, monkeypatch):
  value, x, w = layer(name, dims, native=True)
  want = jax.jit(value)(x, w)
  seen = []

  def interpreted(a, b, *args, **kwargs):
    seen.append(a.dtype)
    return kernels.quantized_matmul(a, b, *args, interpret=True, **kwargs)

  monkeypatch.setattr(multiply.chips, 'gains', lambda kind: True)
  monkeypatch.setattr(multiply, 'quantized_matmul', interpreted)
  got = jax.jit(layer(name, dims, native=True)[0])(x, w)
  four = name in ('int4', 'quest4')
  assert seen and (jnp.dtype('int4') in seen) == four
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
  ('name', 'straight', 'turned'),
  [
    # The weights of the forward product are there for both passes.
    ('int8', 4, 3),
    ('fp8', 4, 3),
    ('b1.58', 3, 0),  # of which the gradients take what it stands for
    ('halo1', 4, 3),
    ('quest4', 0, 0),  # has masks
    ('nvfp4', 0, 0),  # has groups
  ],
)
def test_a_kernel_rounds_what_xla_does(name, straight, turned, monkeypatch):
  value, x, w = layer(name, 'dense', native=True)
  want = jax.jit(value)(x, w)
  seen = []

  def interpreted(x, *args, **kwargs):
    seen.append(kwargs['turned'])
    return kernels.encode(x, *args, interpret=True, **kwargs)

  # The branch for this platform is XLA's.
  def not_of_cpus(*arrays, default, **of_platforms):
    del of_platforms
    return default(*arrays)

  monkeypatch.setattr(matrices, 'encode_gains', lambda: True)
  monkeypatch.setattr(matrices, 'encode', interpreted)
  monkeypatch.setattr(matrices.lax, 'platform_dependent', not_of_cpus)
  got = jax.jit(layer(name, 'dense', native=True)[0])(x, w)
  assert (seen.count(False), seen.count(True)) == (straight, turned)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  seen.clear()
  value = layer(name, 'dense', native=True, implementation='xla')[0]
  jax.jit(value)(x, w)
  assert not seen


@pytest.mark.parametrize(
  ('devices', 'name', 'kind'),
  [
    (1, 'int8', 'int8_NT'),
    (1, 'int4', 'int4_NT'),
    (8, 'int8', None),
    (1, 'fp8', None),
  ],
)
def test_the_mesh_decides(devices, name, kind):
  """On v5e, which widens 8-bit floats."""
  device = jax.sharding.AbstractDevice(
    device_kind='TPU v5 lite', num_cores=1, platform='tpu'
  )
  mesh = jax.sharding.AbstractMesh(
    (devices,), ('data',), abstract_device=device
  )
  value, x, w = layer(name, 'dense')
  with jax.sharding.use_abstract_mesh(mesh):
    text = str(jax.jit(value).trace(x, w).jaxpr)
  if kind is None:
    assert 'pallas_call' not in text
  else:
    assert f'quantized_matmul_{kind}' in text


@pytest.mark.parametrize(
  ('device_kind', 'devices', 'where'),
  [
    (None, 0, 'this platform'),
    ('TPU v4', 1, 'v4'),
    ('NVIDIA H200', 2, 'several devices outside of jax.shard_map'),
  ],
)
def test_products_left_to_xla_are_said_once(
  device_kind, devices, where, caplog
):
  """Unless that is asked for."""
  chips.say_so.cache_clear()
  mesh = jax.sharding.get_abstract_mesh()
  if device_kind:
    platform = 'tpu' if device_kind.startswith('TPU') else 'gpu'
    device = jax.sharding.AbstractDevice(
      device_kind=device_kind, num_cores=1, platform=platform
    )
    mesh = jax.sharding.AbstractMesh((devices,), ('x',), abstract_device=device)
  for arguments in (
    {'implementation': 'xla'},
    {'native': False},
    {},
    {'native': True},
  ):
    value, x, w = layer('int8', 'dense', **arguments)
    with jax.sharding.use_abstract_mesh(mesh):
      jax.jit(value).trace(x, w)
    said = [r.getMessage() for r in caplog.records]
    asked = 'implementation' in arguments or arguments.get('native') is False
    message = f'lowbit: int8 products are left to XLA on {where}'
    assert said == ([] if asked else [message]), arguments
