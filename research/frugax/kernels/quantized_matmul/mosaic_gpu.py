"""`quantized_matmul` for Hopper, by Mosaic GPU: 8-bit floats, and int8."""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from frugax.kernels import blocks as tables
from frugax.kernels import products
from frugax.kernels.quantized_matmul.reference import rescaled

_SWIZZLE = 128  # bytes, as the matrix unit reads shared memory
_GROUPS = 2  # of four warps that compute; one more copies
_REGISTERS = 40  # of a thread that copies; the others have the rest


def quantized_matmul(
  a: jax.Array,
  b: jax.Array,
  rows: jax.Array | None,
  columns: jax.Array | None,
  layout: str,
  dtype: jax.typing.DTypeLike,
  blocks: tables.GpuBlocks,
  interpret: bool = False,
) -> jax.Array:
  """See `frugax.kernels.quantized_matmul.reference`.

  One group of warps copies blocks of both operands into shared memory, two
  groups multiply them, each half the rows of a block of the result. The matrix
  unit keeps about 14 bits of a sum of 8-bit floats, so that each step's part is
  added to the others in float32.

  The matrix unit takes 8-bit numbers only with the contracted axis last in
  memory: XLA transposes the others before, or where it computes them. It also
  fills up what is no whole number of blocks, and cuts the result.

  Args:
    a: (M, K), or (K, M) for 'TN'.
    b: (K, N), or (N, K) for 'NT', of the same dtype.
    rows: (M, 2), (M, 1) or None.
    columns: (2, N), (1, N) or None.
    layout: a name in `products.LAYOUTS`.
    dtype: of the result.
    blocks: the blocks.
    interpret: run as plain JAX with simulated memories and threads.

  Returns:
    (M, N).

  References:
    DeepSeek-AI, `DeepSeek-V3 Technical Report
    <https://arxiv.org/abs/2412.19437>`_, 2024 (section 3.3.2: the bits of a
    sum, and parts of 128 added in float32)
  """
  m, n, k = products.sizes(a, b, layout)
  kind = products.kind(a.dtype, b.dtype)
  a, b = products.contracted_last(a, b, layout)
  bm, bn, bk = blocks[:3]
  counts = pl.cdiv(m, bm), pl.cdiv(n, bn), pl.cdiv(k, bk)
  whole = counts[0] * bm, counts[1] * bn
  a, b = (
    products.pad(products.pad(x, 0, size), 1, counts[2] * bk)
    for x, size in zip((a, b), whole, strict=True)
  )
  if interpret:
    b = b.T  # The simulated matrix unit knows no other layout.
  # Vectors of rows and of columns: scales, and terms if there are any.
  ends = [
    [] if x is None else list(products.pad(x, 1, size))
    for x, size in zip(
      (rows if rows is None else rows.T, columns), whole, strict=True
    )
  ]
  body = functools.partial(
    _kernel, kind, blocks, counts, len(ends[0]), interpret
  )
  body.__name__ = f'quantized_matmul_{kind}_{layout}'
  y = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(whole, dtype),
    grid=(counts[0] * counts[1],),
    grid_names=('block',),
    num_threads=_GROUPS + 1,
    thread_name='group',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=_interpreter() if interpret else None,
  )(a, b, *ends[0], *ends[1])
  return y[:m, :n]


def _kernel(kind, blocks, counts, row_ends, interpret, a, b, *refs):
  *ends, out = refs
  ends = ends[:row_ends], ends[row_ends:]
  bm, bn, bk = blocks[:3]
  place = lax.axis_index('block')
  i, j = products.grouped(place, counts[0], counts[1], blocks.group)
  half = bm // _GROUPS
  first = lax.axis_index('group') * half
  dtype = products.sum_dtype(kind)

  def step(_, a, b, sums):
    b = b if interpret else plgpu.transpose_ref(b, (1, 0))

    def part(acc):
      plgpu.wgmma(acc, a.at[pl.ds(first, half)], b)
      return acc[...]

    return sums + pl.run_scoped(part, plgpu.ACC((half, bn), dtype))

  def compute(pipeline):
    y = pipeline(jnp.zeros((half, bn), dtype)).astype(jnp.float32)
    at = pl.ds(i * bm + first, half), pl.ds(j * bn, bn)
    scales, terms = [], []
    for axis in (0, 1):
      for found, x in zip((scales, terms), ends[axis], strict=False):
        x = x[at[axis]] if interpret else _load(x.at[at[axis]])
        found.append(lax.broadcast_in_dim(x, y.shape, (axis,)))
    out[at] = rescaled(y, terms, scales).astype(out.dtype)

  def spec(shape, axis):
    return plgpu.BlockSpec(
      shape,
      lambda k: (0, k) if axis else (k, 0),
      memory_space=plgpu.SMEM,
      transforms=(
        plgpu.TilingTransform((8, _SWIZZLE)),
        plgpu.SwizzleTransform(_SWIZZLE),
      ),
    )

  columns = pl.ds(j * bn, bn)
  plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(counts[2],),
    memory_registers=_REGISTERS,
    in_specs=[
      spec((bm, bk), 1),
      spec((bk, bn), 0) if interpret else spec((bn, bk), 1),
    ],
    max_concurrent_steps=blocks.stages,
    wg_axis='group',
    num_compute_wgs=_GROUPS,
    compute_context=compute,
  )(
    a.at[pl.ds(i * bm, bm)],
    b.at[:, columns] if interpret else b.at[columns],
  )


def _load(ref):
  """In whatever way: the layout of a sum's rows or columns has no fast one."""
  # Before jax 0.12 it had an index, too.
  index = ((),) if 'idx' in inspect.signature(plgpu.load).parameters else ()
  return plgpu.load(ref, *index, optimized=False)


def _interpreter():
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  # jax 0.10 has no public name for it.
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()
