"""Compiles the products for a TPU that is not there: `python tpu.py v5e`.

A process of its own, because libtpu reads its flags once, and because what it
does to a process that it does not like is to end it. Prints one JSON object a
kernel: the operands of the matrix unit that its machine code names, or the
error that the compiler raised.
"""

import os
import tempfile

from frugax.plan import environment

os.environ |= environment.TPU | {
  'LIBTPU_INIT_ARGS': '--xla_jf_dump_llo_text=true '
  '--xla_jf_dump_llo_pass_label_regex=final_bundles '
  '--xla_jf_dump_to=' + tempfile.mkdtemp(prefix='bundles_'),
  # It would return programs without compiling, and so without dumps.
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
}

import functools
import json
import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from frugax import kernels
from frugax.quant import Scaling

_DUMP = os.environ['LIBTPU_INIT_ARGS'].split('=')[-1]
TOPOLOGIES = {
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  'tpu7x': 'tpu7x:2x2x1',
}
LAYOUTS = ('NN', 'NT', 'TN')
# The odd sizes have blocks beyond the ends of all axes.
_SIZES = {'': (256, 128, 256), ' odd': (200, 333, 173)}
# As in vmatpush.s8.msra.mxu0 and vmatmul.msk.f8e4m3fn.vlgmr.msra.gmra.mxu1.
_PUSH = re.compile(r'\bvmat(?:push|mul)[\w.]*?\.((?:s|u|bf|f)\d\w*)')


def shapes(layout, m, n, k):
  return {
    'NN': ((m, k), (k, n)),
    'NT': ((m, k), (n, k)),
    'TN': ((k, m), (k, n)),
  }[layout]


def _variants(i, all_layouts):
  """Layouts, and one of them with odd sizes."""
  one = LAYOUTS[i % 3]
  for layout in LAYOUTS if all_layouts else (one,):
    yield layout, ''
  yield one, ' odd'


def products(chip):
  """Name, function and operands of each kernel."""
  kinds = {
    'int8': ('int8', 'int8'),
    'int4': ('int4', 'int4'),
    'e4m3': ('float8_e4m3fn', 'float8_e4m3fn'),
    'e5m2 x e4m3': ('float8_e5m2', 'float8_e4m3fn'),
    'bf16 x int8': ('bfloat16', 'int8'),
    'bf16 x int4': ('bfloat16', 'int4'),
  }
  if chip == 'tpu7x':
    kinds['e2m1'] = ('float4_e2m1fn', 'float4_e2m1fn')
  f32 = jnp.float32
  for i, (kind, dtypes) in enumerate(kinds.items()):
    for layout, odd in _variants(i, kind in ('int8', 'int4', 'e4m3')):
      m, n, k = _SIZES[odd]
      pair = zip(shapes(layout, m, n, k), dtypes, strict=True)
      fn = functools.partial(
        kernels.quantized_matmul, layout=layout, implementation='mosaic'
      )
      yield f'{kind} {layout}{odd}', fn, [*pair, ((m,), f32), ((n,), f32)]


def fused(chip):
  rms = Scaling(statistic='rms', factor=2.5, eps=1e-8)
  cases = {
    'int8': ('int8', {}),
    'int4': ('int4', {'residuals': False}),
    'rise4': ('int4', {'scaling': rms, 'rotate': True, 'w_shift': 0.5}),
    'rise8': ('int8', {'scaling': rms, 'rotate': True, 'w_shift': 0.5}),
    'fp8_e4m3': ('float8_e4m3fn', {}),
    'fp8_e5m2': ('float8_e4m3fn', {'rotate': True}),
  }
  for i, (format, (w_dtype, options)) in enumerate(cases.items()):
    for layout, odd in _variants(i, format in ('int8', 'rise4', 'fp8_e4m3')):
      m, n, k = _SIZES[odd]
      fn = functools.partial(
        kernels.quantize_matmul,
        format=format,
        layout=layout,
        implementation='mosaic',
        **options,
      )
      pair = shapes(layout, m, n, k)
      x, w, other = (*pair, n) if layout != 'TN' else (*pair[::-1], m)
      operands = [(x, jnp.bfloat16), (w, w_dtype), ((other,), jnp.float32)]
      yield f'fused {format} {layout}{odd}', fn, operands
  fold = functools.partial(
    kernels.quantize_matmul, layout='TN', implementation='mosaic'
  )
  yield (
    'fused fold',
    lambda x, w, f: fold(x, w, fold=f),
    [((256, 128), 'bfloat16'), ((256, 128), 'int8'), ((256,), 'float32')],
  )


def losses():
  """Forward and backward; the odd sizes have blocks beyond the ends."""
  for dtype, layout, softcap, filter_eps in (
    ('bfloat16', 'NN', None, None),
    ('float32', 'NT', 9.0, 'auto'),
  ):
    fn = functools.partial(
      kernels.linear_cross_entropy,
      layout=layout,
      softcap=softcap,
      filter_eps=filter_eps,
      implementation='mosaic',
    )

    def both(x, w, labels, fn=fn):
      return jax.grad(lambda x, w: fn(x, w, labels).sum(), (0, 1))(x, w)

    m, n, k = _SIZES[' odd']
    pair = zip(shapes(layout, m, n, k), (dtype, dtype), strict=True)
    yield f'loss {dtype}', both, [*pair, ((m,), 'int32')]


def pushes():
  """What the bundles of the last program say, and nothing of it is kept."""
  found = set()
  for path in pathlib.Path(_DUMP).rglob('*'):
    if path.is_file():
      found |= set(_PUSH.findall(path.read_text(errors='replace')))
      path.unlink()
  return sorted(found)


def main(chip, wanted):
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=TOPOLOGIES[chip]
  )
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ('x',))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  for name, fn, operands in [*products(chip), *fused(chip), *losses()]:
    if wanted and wanted not in name:
      continue
    arrays = [jax.ShapeDtypeStruct(s, d, sharding=whole) for s, d in operands]
    row = {'name': name}
    try:
      with jax.set_mesh(mesh):
        jax.jit(fn).lower(*arrays).compile()
    except Exception as error:
      row['error'] = f'{type(error).__name__}: {error}'[:2000]
    row['pushes'] = pushes()
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
  try:
    main(sys.argv[1], ' '.join(sys.argv[2:]))
  finally:
    shutil.rmtree(_DUMP, ignore_errors=True)
