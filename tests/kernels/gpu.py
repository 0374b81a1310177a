"""Compiles the kernels for a GPU that is not there: `python gpu.py`.

A process of its own, because XLA reads its flags once. Prints one JSON object a
program: for each kernel the instructions of the matrix units that its PTX has,
by how many axes its copies to memory are told where to, and the bytes of
temporaries; or the error that a compiler raised.
"""

import os
import sys
import tempfile

os.environ['MOSAIC_GPU_DUMP_TO'] = tempfile.mkdtemp(prefix='ptx_')
os.environ |= {
  'XLA_FLAGS': f'--xla_dump_to={os.environ["MOSAIC_GPU_DUMP_TO"]}',
  # It would return programs without compiling, and so without dumps.
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
}

import collections
import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from frugax import kernels, lowbit, quant
from frugax.plan import topologies

_DUMP = os.environ['MOSAIC_GPU_DUMP_TO']
LAYOUTS = ('NN', 'NT', 'TN')
# The odd sizes are no multiples of any block.
SIZES = {'': (512, 256, 512), ' odd': (200, 333, 173), ' tiny': (4, 64, 32)}
KINDS = {
  'int8': ('int8', 'int8'),
  'int4': ('int4', 'int4'),
  'e4m3': ('float8_e4m3fn', 'float8_e4m3fn'),
  'e5m2': ('float8_e5m2', 'float8_e5m2'),
  'e5m2 x e4m3': ('float8_e5m2', 'float8_e4m3fn'),
  'bf16 x int8': ('bfloat16', 'int8'),
  'bf16 x int4': ('bfloat16', 'int4'),
  'f32 x int8': ('float32', 'int8'),
}
# Mosaic GPU multiplies two kinds of 8-bit floats since then.
UNLIKE = jax.__version_info__ >= (0, 11)
# As in wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 and, of older matrix
# units, mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32: the operands.
_MATRIX = re.compile(
  r'\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+k\d+[\w.]*'
)
_ENTRY = re.compile(r'\.entry (\w+)')
# Of a copy to memory, the axes by which it is told where to.
_STORES = re.compile(r'cp\.async\.bulk\.tensor\.(\d)d\.global')


def shapes(layout, m, n, k):
  return {
    'NN': ((m, k), (k, n)),
    'NT': ((m, k), (n, k)),
    'TN': ((k, m), (k, n)),
  }[layout]


def products():
  """Name, function and operands of each program."""
  f32 = jnp.float32
  for kind, dtypes in KINDS.items():
    if kind == 'e5m2 x e4m3' and not UNLIKE:
      continue
    for odd, (m, n, k) in SIZES.items():
      for layout in LAYOUTS:
        pair = list(zip(shapes(layout, m, n, k), dtypes, strict=True))
        for name in implementations(kind):
          fn = functools.partial(
            kernels.quantized_matmul, layout=layout, implementation=name
          )
          ends = [((m,), f32), ((n,), f32)]
          yield f'{kind} {layout}{odd} {name}', fn, [*pair, *ends]
  # What is chosen where nothing is asked for.
  fn = jax.vmap(functools.partial(kernels.quantized_matmul, layout='NT'))
  for kind in ('int8', 'e4m3'):
    yield f'{kind} stack', fn, [((4, 64, 256), d) for d in KINDS[kind]]
  fn = functools.partial(kernels.quantize_matmul, layout='NT')
  x, w = ((512, 256), jnp.bfloat16), ((512, 256), jnp.int8)
  yield 'int8 rounded', fn, [x, w]
  w = ((256, 512), jnp.bfloat16)
  yield 'int8 linear', functools.partial(linear, 'int8'), [x, w]
  yield 'fp8 linear', functools.partial(linear, 'fp8'), [x, w]
  yield from losses()
  yield from copies()
  yield from codes()


def codes():
  for shape, dtype in (((512, 256), 'bfloat16'), ((200, 333), 'float32')):
    for format in ('int8', 'rise4', 'fp8_e4m3', 'fp8_e5m2'):
      for turned in (False, True):
        for key in (None, jax.random.key(0)):
          fn = functools.partial(
            kernels.encode, format=format, turned=turned, key=key
          )
          steps = (shape[1 if turned else 0], 1), jnp.float32
          name = f'codes {format} of {dtype}'
          name += ' turned' * turned + ' stochastic' * (key is not None)
          yield name, fn, [(shape, dtype), steps]


def copies():
  """What is chosen where nothing is asked for."""
  quest = quant.Scaling(statistic='rms', factor=2.51393, eps=1e-8)
  for name, rows, columns, shape in (
    ('', 'int8', 'int8', (512, 512)),
    (
      ' odd',
      kernels.Copy('rise4', scaling=quest, mask='trust', sums=True),
      kernels.Copy('int4', 'tokens', signs=True, stochastic=True, sums=True),
      (200, 333),
    ),
    (
      ' groups',
      kernels.Copy('int8', signs=True, stochastic=True),
      kernels.Copy(scaling=quant.Scaling((1, 64)), mask='clip', sums=True),
      (256, 512),
    ),
    (
      ' float8',
      kernels.Copy('fp8_e4m3', signs=True, stochastic=True),
      kernels.Copy('fp8_e5m2', 'tokens'),
      (256, 512),
    ),
  ):
    fn = functools.partial(
      kernels.hadamard_quantize,
      rows=rows,
      columns=columns,
      key=jax.random.key(0),
      signs=jax.random.key(1),
    )
    for dtype in ('bfloat16', 'float32'):
      yield f'copies of {dtype}{name}', fn, [(shape, dtype)]


def losses():
  """Forward and backward."""
  for name, (n, vocabulary, d), dtype, options in (
    ('', (512, 1024, 512), 'bfloat16', {}),
    (' odd', (200, 5003, 333), 'bfloat16', {'softcap': 30.0}),
    (' float32', (200, 5003, 333), 'float32', {'implementation': 'triton'}),
    (' gemma', (8192, 256000, 2304), 'bfloat16', {}),
    (' filtered', (512, 1024, 512), 'bfloat16', {'filter_eps': 'auto'}),
  ):
    for layout in ('NN', 'NT'):

      def total(x, w, labels, options=options, layout=layout):
        losses = kernels.linear_cross_entropy(
          x, w, labels, layout=layout, **options
        )
        return losses.sum()

      w = (d, vocabulary) if layout == 'NN' else (vocabulary, d)
      operands = [((n, d), dtype), (w, dtype), ((n,), jnp.int32)]
      yield f'loss {layout}{name}', jax.value_and_grad(total, (0, 1)), operands


def linear(recipe, x, w):
  """Forward and backward."""
  dot = lowbit.dot_general(lowbit.recipe(recipe))

  def product(x, w):
    return dot(x, w, (((1,), (0,)), ((), ())))

  y, pull = jax.vjp(product, x, w)
  return y, pull(y)


def implementations(kind):
  if kind.startswith('e'):
    return ('mosaic_gpu',)
  both = kind in ('int8', 'int4')
  return ('triton', 'mosaic_gpu') if both else ('triton',)


def dumped():
  """What the PTX of the last program says, and nothing of it is kept."""
  instructions, stores = collections.defaultdict(set), set()
  for path in pathlib.Path(_DUMP).rglob('*'):
    if path.suffix == '.ptx':
      text = path.read_text()
      for kernel in _ENTRY.findall(text):
        instructions[kernel] |= set(_MATRIX.findall(text))
      stores |= set(_STORES.findall(text))
    if path.is_file():
      path.unlink()
  instructions = {kernel: sorted(i) for kernel, i in instructions.items()}
  return {'instructions': instructions, 'stores': sorted(stores)}


def main(wanted):
  topologies.prepare('h200')
  mesh = jax.sharding.Mesh(np.array(topologies.devices('h200')), ('x',))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  for name, fn, operands in products():
    if wanted not in name:
      continue
    arrays = [jax.ShapeDtypeStruct(s, d, sharding=whole) for s, d in operands]
    row = {'name': name}
    try:
      with jax.set_mesh(mesh):
        compiled = jax.jit(fn).lower(*arrays).compile()
      row['temporaries'] = compiled.memory_analysis().temp_size_in_bytes
    except Exception as error:
      row['error'] = f'{type(error).__name__}: {error}'[:2000]
    row |= dumped()
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
  try:
    main(' '.join(sys.argv[1:]))
  finally:
    shutil.rmtree(_DUMP, ignore_errors=True)
