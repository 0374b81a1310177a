"""Which implementation of the products a chip gets, and what is refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels
from frugax.kernels import chips
from frugax.quant import Scaling

# Mosaic GPU multiplies two kinds of 8-bit floats since then.
MIXED = jax.__version_info__ >= (0, 11)
KINDS = {
  'int8': ('int8', 'int8'),
  'int4': ('int4', 'int4'),
  'e4m3': ('float8_e4m3fn', 'float8_e4m3fn'),
  'e5m2 x e4m3': ('float8_e5m2', 'float8_e4m3fn'),
  'e2m1': ('float4_e2m1fn', 'float4_e2m1fn'),
}


def test_without_a_chip_xla_computes_and_says_so_once(caplog):
  chips.say_so.cache_clear()
  a = jnp.ones((3, 4), 'int8')
  with caplog.at_level(logging.WARNING, logger='frugax'):
    for _ in range(2):
      text = jax.jit(lambda a: kernels.quantized_matmul(a, a, layout='NT'))
      assert 'pallas' not in str(text.trace(a).jaxpr)
  assert [r.getMessage() for r in caplog.records] == [
    'quantized_matmul: int8 products are left to XLA on this platform'
  ]


HOPPER = ('int8', 'int4', 'e4m3', 'e5m2', *['e5m2 x e4m3'] * MIXED)
DEVICES = {
  'TPU v4': (),
  'TPU v5 lite': ('int8', 'int4'),
  'TPU v5': ('int8', 'int4'),
  'TPU v6 lite': ('int8', 'int4'),
  'TPU7x': ('int4', 'e4m3', 'e5m2 x e4m3', 'e2m1'),
  'NVIDIA H200': HOPPER,
  'NVIDIA H100 80GB HBM3': HOPPER,
  'NVIDIA A100-SXM4-80GB': (),
}


@pytest.mark.parametrize('device_kind', DEVICES)
def test_the_chip_decides(device_kind):
  device = jax.sharding.AbstractDevice(
    device_kind=device_kind,
    num_cores=1,
    platform='tpu' if device_kind.startswith('TPU') else 'gpu',
  )
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  for kind in KINDS:
    a, b = (jnp.ones((8, 8), dtype) for dtype in KINDS[kind])
    with jax.sharding.use_abstract_mesh(mesh):
      traced = jax.jit(lambda a, b: kernels.quantized_matmul(a, b)).trace(a, b)
    native = kind in DEVICES[device_kind]
    assert ('quantized_matmul_' in str(traced.jaxpr)) == native, kind


def test_a_chip_has_a_kernel_for_each_kind_and_others_by_name():
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200', num_cores=132, platform='gpu'
  )
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    for kind, name, found in (
      ('int8', 'mosaic', 'needs a TPU'),
      ('float8', 'triton', 'has no float8 products for hopper, but int8'),
      ('mixed', 'mosaic_gpu', 'has no mixed products'),
      ('float4', 'mosaic_gpu', 'has no float4 products'),
    ):
      with pytest.raises(ValueError, match=found):
        chips.choose('op', kind, name, interpret=False)
    for kind, name in (
      ('int8', 'triton'),
      ('int8', 'mosaic_gpu'),
      ('int8', 'xla'),
      ('float8', 'mosaic_gpu'),
    ):
      assert chips.choose('op', kind, name, interpret=False) == name
    for kind in ('int8', 'int4', 'float8'):
      found = chips.choose('op', kind, None, interpret=False)
      assert found == 'mosaic_gpu', kind
    assert chips.choose('op', 'bfloat16', None, interpret=False) == 'triton'
    assert chips.choose('op', 'mixed', None, interpret=False) == 'xla'


A = np.ones((4, 6), np.int8)
X = jnp.ones((4, 6), jnp.bfloat16)


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    (
      (A, A),
      {'layout': 'NT', 'implementation': 'mosiac'},
      "did you mean 'mosaic'",
    ),
    ((A, A), {'layout': 'NM'}, "unknown layout 'NM'"),
    ((A, A), {'layout': 'NN'}, r'axis 1 of \(4, 6\) with axis 0 of \(4, 6\)'),
    ((A, A.astype('f')[..., None]), {}, 'give matrices'),
    ((A[:0], A), {'layout': 'NT'}, 'an empty operand'),
    ((A, A.astype('uint8')), {'layout': 'NT'}, 'no product of int8 and uint8'),
    ((A, A, A[0]), {'layout': 'NT'}, r'a_scale of shape \(6,\) for 4 rows'),
    ((A, A), {'layout': 'NT', 'implementation': 'mosaic'}, 'needs a TPU'),
    ((A, A), {'layout': 'NT', 'implementation': 'triton'}, 'needs a GPU'),
    ((A, A), {'layout': 'NT', 'implementation': 'mosaic_gpu'}, 'needs a GPU'),
    (
      (A, A),
      {'layout': 'NT', 'implementation': 'xla', 'interpret': True},
      'only a kernel can be interpreted',
    ),
  ],
)
def test_bad_products(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    kernels.quantized_matmul(*map(jnp.asarray, arguments), **options)


def test_two_kinds_of_8_bit_floats_need_a_jax_that_has_them(
  monkeypatch, caplog
):
  """Asked for it is refused; else XLA computes it, and that is said."""
  device = jax.sharding.AbstractDevice(
    device_kind='NVIDIA H200', num_cores=132, platform='gpu'
  )
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  a, b = (jnp.ones((8, 8), dtype) for dtype in KINDS['e5m2 x e4m3'])
  monkeypatch.setattr(jax, '__version_info__', (0, 10, 2))
  with pytest.raises(ValueError, match=r'float8_e4m3fn before jax 0\.11'):
    kernels.quantized_matmul(a, b, implementation='mosaic_gpu', interpret=True)
  chips.say_so.cache_clear()
  product = jax.jit(lambda a, b: kernels.quantized_matmul(a, b))
  with jax.sharding.use_abstract_mesh(mesh):
    text = str(product.trace(a, b).jaxpr)
  assert 'quantized_matmul_' not in text
  (record,) = caplog.records
  assert 'float8_e5m2 x float8_e4m3fn' in record.getMessage()


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    ((X, A), {'format': 'int9'}, "unknown element format 'int9'"),
    ((X, A), {'format': 'e2m1'}, 'cannot be multiplied'),
    ((X, A), {'scaling': Scaling((1, 32))}, 'one float32 scale a row'),
    ((X, A), {'scaling': Scaling(scale='ocp')}, 'one float32 scale a row'),
    ((X, A), {'format': 'fp8_e4m3'}, 'no product of float8_e4m3fn and int8'),
    ((A, A), {}, 'x of int8'),
    ((X, A), {'fold': A[0], 'rotate': True}, 'cannot be folded'),
    ((X, A), {'fold': A[:, 0]}, r'fold of shape \(4,\) for 6'),
  ],
)
def test_bad_fused_products(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    kernels.quantize_matmul(
      *map(jnp.asarray, arguments), layout='NT', **options
    )
