"""Static estimates of what the kernels gain on TPUs, without a TPU.

    python research/studies/bench_kernels.py
    python research/studies/bench_kernels.py v5e              # only these rows

Cycles of the compiler's own schedule (`static_cycles.py`), which are estimates
and never measured times, as ratios to a plain bfloat16 Pallas product of the
same shape with the best of a few tiles. Operands are 4096 x 4096, or the right
one 4096 x 16384. x arrives in bfloat16, its rounding and rotation count, and
its codes, scales and sums are written out; the other operand is codes already,
of known scales and sums. A layer is the sum of three kernels: forward 'NN', the
input's gradient 'NT' and the weights' 'TN', each rounding the bfloat16 array
that arrives, the last with the activations' codes of the first and their scales
folded into it. It is not the layer as trained, which has what XLA computes
beside them (`tpu_linear.py`). Each count is a process of its own, of up to some
minutes.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import pathlib
import subprocess
import sys

_M, _N, _WIDE = 4096, 4096, 16384


@dataclasses.dataclass(frozen=True)
class Row:
  """A kernel on a chip: sums of cycles, over those of bfloat16 products.

  Attributes:
    kernels: names in `_KERNELS`, whose cycles are added.
    columns: of the right operand.
    bar: the ratio that must hold, None for none.
  """

  chip: str
  label: str
  kernels: tuple[str, ...]
  columns: int
  bar: float | None


def _rows():
  bars = {
    'v5e': (1.6, 2.7, None, 3.5),
    'v6e': (1.25, 1.65, 1.75, 2.8),
  }
  for chip, (int8, int4, wide8, wide4) in bars.items():
    for n, pair in ((_N, (int8, int4)), (_WIDE, (wide8, wide4))):
      for bits, bar in zip((8, 4), pair, strict=True):
        label = f'int{bits}, rotated and rounded, {n} wide'
        yield Row(chip, label, (f'rise{bits}',), n, bar)
  backward = ('int8 NT', 'int8 TN')
  yield Row('v5e', 'layer, int8 x 3', ('int8 NN', *backward), _N, 1.5)
  yield Row('v5e', 'layer, int4 and int8 x 2', ('int4 NN', *backward), _N, 1.7)
  yield Row('tpu7x', 'e4m3 product', ('e4m3',), _N, 1.9)
  yield Row('v5p', 'int8 product', ('plain int8',), _N, None)


ROWS = tuple(_rows())
_TILES = (
  (1024, 1024, 4096),
  (1024, 1024, 1024),
  (512, 2048, 4096),
  (2048, 1024, 2048),
)


def _bfloat16(m, n, k, tiles):
  """A product of bfloat16 in Pallas, to compare with."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  bm, bn, bk = tiles

  def kernel(a, b, out, sums):
    @pl.when(pl.program_id(2) == 0)
    def _():
      sums[...] = jnp.zeros_like(sums)

    sums[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == k // bk - 1)
    def _():
      out[...] = sums[...].astype(out.dtype)

  fn = pl.pallas_call(
    kernel,
    grid=(m // bm, n // bn, k // bk),
    in_specs=[
      pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
      pl.BlockSpec((bk, bn), lambda i, j, k: (k, j)),
    ],
    out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
    scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=60 * 2**20,
    ),
  )
  return fn, [((m, k), jnp.bfloat16), ((k, n), jnp.bfloat16)]


def _kernel(name, n):
  """A function and its operands, of those that the rows name."""
  import jax.numpy as jnp

  from frugax import kernels
  from frugax.quant import Scaling

  left, right = (_M, _N), (_N, n)
  x, line = (left, jnp.bfloat16), ((n,), jnp.float32)
  if name in ('e4m3', 'plain int8'):
    dtype = jnp.float8_e4m3fn if name == 'e4m3' else jnp.int8
    fn = functools.partial(
      kernels.quantized_matmul, dtype=jnp.bfloat16, implementation='mosaic'
    )
    scales = [((_M,), jnp.float32), line]
    return fn, [(left, dtype), (right, dtype), *scales]
  fused = functools.partial(kernels.quantize_matmul, implementation='mosaic')
  if name.startswith('rise'):
    # As QuEST rounds; its constants do not change the cycles.
    fn = functools.partial(
      fused,
      format=name,
      scaling=Scaling(statistic='rms', factor=2.51393, eps=1e-8),
      rotate=True,
      w_shift=0.5,
    )
    codes = jnp.int4 if name == 'rise4' else jnp.int8
    return (
      lambda x, w, scale, sums: fn(x, w, scale, w_sums=sums),
      [x, (right, codes), line, ((n,), jnp.int32)],
    )
  format, layout = name.split()
  fn = functools.partial(fused, format=format, layout=layout)
  codes = jnp.int4 if format == 'int4' else jnp.int8
  if layout == 'TN':
    return (
      lambda x, w, fold: fn(x, w, fold=fold),
      [((_N, _M), jnp.bfloat16), (right, codes), ((_N,), jnp.float32)],
    )
  return fn, [x, (right, codes), line]


def _count(chip, name, n):
  """Cycles, in this process."""
  import static_cycles

  if name.startswith('bf16'):
    tiles = _TILES[int(name.split()[1])]
    fn, operands = _bfloat16(_M, n, _N, tiles)
  else:
    fn, operands = _kernel(name, n)
  # All that is beside the kernel counts, too.
  return sum(static_cycles.cycles(fn, chip, *operands).values())


@functools.cache
def cycles(chip, name, n):
  """Cycles, in a process of its own; None where the compiler ends it."""
  done = subprocess.run(
    [sys.executable, __file__, '--count', chip, name, str(n)],
    capture_output=True,
    text=True,
  )
  if done.returncode:
    print(done.stderr[-500:], file=sys.stderr)
    return None
  return int(done.stdout.split()[-1])


def baseline(chip, n):
  """Of bfloat16, by the tiles that are the best at the smaller size."""
  tiles = _best_tiles(chip)
  return None if tiles is None else cycles(chip, f'bf16 {tiles}', n)


@functools.cache
def _best_tiles(chip):
  found = [cycles(chip, f'bf16 {i}', _N) for i in range(len(_TILES))]
  return min(
    (i for i, c in enumerate(found) if c is not None),
    key=found.__getitem__,
    default=None,
  )


def main(wanted):
  root = pathlib.Path(__file__).parents[2]
  commit, dirty = (
    subprocess.run(
      ['git', *a], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    for a in (('rev-parse', 'HEAD'), ('status', '--porcelain', 'research'))
  )
  import jax

  print(
    f'commit {commit}{" (changed)" * bool(dirty)}, jax {jax.__version__}, '
    f'libtpu {importlib.metadata.version("libtpu")}'
  )
  print('static estimate: cycles of the compiled schedule, not measured times')
  for row in ROWS:
    if wanted and row.chip not in wanted:
      continue
    own = [cycles(row.chip, name, row.columns) for name in row.kernels]
    base = baseline(row.chip, row.columns)
    if None in (base, *own):
      print(f'{row.chip:6s}{row.label:42s} the compiler gave no count')
      continue
    base *= len(own)
    ratio = base / sum(own)
    bar = ''
    if row.bar:
      bar = f'  bar {row.bar:.2f} {"reached" if ratio >= row.bar else "missed"}'
    parts = ' + '.join(f'{c:,}' for c in own)
    print(
      f'{row.chip:6s}{row.label:36s}{ratio:6.2f} x bf16{bar}'
      f'  ({base:,} over {parts})',
      flush=True,
    )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('chips', nargs='*')
  parser.add_argument('--count', nargs=3, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.count:
    chip, name, n = arguments.count
    print(_count(chip, name, int(n)))
  else:
    main(arguments.chips)
