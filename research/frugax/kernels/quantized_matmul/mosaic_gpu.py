"""`quantized_matmul` for Hopper, by Mosaic GPU: int8 and 8-bit floats."""

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
_GROUP = 4  # warps that issue instructions together
_REGISTERS = 40  # of a thread that copies; the others have the rest
# Of an H100 or H200 with SXM. Where there are fewer, some programs wait.
_PROCESSORS = 132
_SLOTS = 2  # parts of a result that are on their way to memory


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

  A program for each processor goes over blocks of the result. One group of
  warps copies blocks of both operands into shared memory, and goes on with the
  next block of the result while that before is written; the others (two, by
  `frugax.kernels.blocks`) multiply, each some rows of a block. A group ends its
  product before it says that the operands of a step may be written over, the
  last of a block, too: while it waits the others multiply. Integers are summed
  in the matrix unit. Of a sum of 8-bit floats it keeps about 14 bits, so that
  the part of each step (`blocks.contracted` of K) is added to the others in
  float32.

  The matrix unit takes 8-bit numbers only with the contracted axis last in
  memory: XLA transposes the others before, or where it computes them. It also
  fills up what is no whole number of tiles of memory, and cuts the result.

  Args:
    a: (M, K), or (K, M) for 'TN'.
    b: (K, N), or (N, K) for 'NT', of the same kind: integers, or 8-bit floats
      (before jax 0.11 of one dtype).
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
  name = f'quantized_matmul_{products.kind(a.dtype, b.dtype)}_{layout}'
  a, b = (x.astype(jnp.int8) if x.dtype == jnp.int4 else x for x in (a, b))
  kind = products.kind(a.dtype, b.dtype)
  a, b = products.contracted_last(a, b, layout)
  bm, bn, bk = blocks[:3]
  counts = pl.cdiv(m, bm), pl.cdiv(n, bn), pl.cdiv(k, bk)
  whole = counts[0] * bm, counts[1] * bn, counts[2] * bk
  store = _tiles(n, dtype)
  if interpret:
    filled = size = whole[:2]
  else:
    # What is copied beyond the end of an array is zero, and is not written. A
    # block at least: along an axis with a single tile all copies are to that.
    filled = max(_whole(m, 8), bm), max(_whole(n, 8), bn)
    size = filled[0], max(_whole(n, store[1]), bn)
  a, b = (
    products.pad(products.pad(x, 0, length), 1, whole[2])
    for x, length in zip((a, b), filled, strict=True)
  )
  if interpret:
    b = b.T  # The simulated matrix unit knows no other layout.
  # Vectors of rows and of columns: scales, and terms if there are any.
  ends = [
    [] if x is None else list(products.pad(x, 1, size))
    for x, size in zip(
      (rows if rows is None else rows.T, columns), whole[:2], strict=True
    )
  ]
  body = functools.partial(
    _kernel, kind, blocks, counts, len(ends[0]), store, interpret
  )
  body.__name__ = name
  y = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(size, dtype),
    grid=(min(_PROCESSORS, counts[0] * counts[1]),),
    grid_names=('processor',),
    num_threads=blocks.warps // _GROUP + 1,
    thread_name='group',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=_interpreter() if interpret else None,
  )(a, b, *ends[0], *ends[1])
  return y[:m, :n]


def _whole(size, unit):
  return pl.cdiv(size, unit) * unit


def _tiles(n, dtype):
  """The swizzle of a result of n columns, and columns of a tile of it.

  The widest that divides the columns, as what fills them up is written and cut
  off again.
  """
  size = jnp.dtype(dtype).itemsize
  for swizzle in (128, 64, 32):
    if n * size % swizzle == 0:
      break
  return swizzle, swizzle // size


def _transforms(swizzle, columns):
  return (
    plgpu.TilingTransform((8, columns)),
    plgpu.SwizzleTransform(swizzle),
  )


def _kernel(kind, blocks, counts, row_ends, store, interpret, a, b, *refs):
  *ends, out = refs
  ends = ends[:row_ends], ends[row_ends:]
  bm, bn, bk = blocks[:3]
  groups = blocks.warps // _GROUP
  height, dtype = bm // groups, products.sum_dtype(kind)
  group = lax.axis_index('group')
  mine = pl.ds(group * height, height)

  def pipeline(step, compute):
    return plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(counts[2],),
      memory_registers=_REGISTERS,
      in_specs=[
        spec((bm, bk), 1),
        spec((bk, bn), 0) if interpret else spec((bn, bk), 1),
      ],
      max_concurrent_steps=blocks.stages,
      wg_axis='group',
      num_compute_wgs=groups,
      compute_context=compute,
    )

  def spec(shape, axis):
    return plgpu.BlockSpec(
      shape,
      lambda k: (0, k) if axis else (k, 0),
      memory_space=plgpu.SMEM,
      transforms=_transforms(_SWIZZLE, _SWIZZLE),
    )

  def multiply(a, b, sums):
    plgpu.wgmma(sums, a.at[mine], b if interpret else b.transpose((1, 0)))

  def whole(_, a, b, sums):
    multiply(a, b, sums)
    # Had it `delay_release`, the last step would never release its operands,
    # and the next block would be copied over what is still multiplied.
    plgpu.wgmma_wait(0)
    return sums

  def in_parts(_, a, b, sums):
    def part(sums):
      multiply(a, b, sums)
      return sums[...]

    return sums + pl.run_scoped(part, plgpu.ACC((height, bn), dtype))

  def block(i, j, parts, allocations):
    rows, columns = pl.ds(i * bm + group * height, height), pl.ds(j * bn, bn)

    def finish(y):
      scales, terms = [], []
      for axis, at in enumerate((rows, columns)):
        for found, x in zip((scales, terms), ends[axis], strict=False):
          x = x[at] if interpret else _load(x.at[at])
          found.append(lax.broadcast_in_dim(x, y.shape, (axis,)))
      y = rescaled(y.astype(jnp.float32), terms, scales).astype(out.dtype)
      width = parts.shape[-1]
      for n in range(0, bn, width):
        part = parts.at[group, n // width % _SLOTS]
        plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
        part[...] = y[:, n : n + width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part, out.at[rows, pl.ds(j * bn + n, width)])

    def compute(steps):
      if kind != 'int8':
        return finish(steps(jnp.zeros((height, bn), dtype)))

      def scope(sums):
        steps(sums)
        finish(sums[...])

      return pl.run_scoped(scope, plgpu.ACC((height, bn), dtype))

    pipeline(whole if kind == 'int8' else in_parts, compute)(
      a.at[pl.ds(i * bm, bm)],
      b.at[:, columns] if interpret else b.at[columns],
      allocations=allocations,
    )

  def blocks_of_a_processor(parts, allocations):
    @plgpu.nd_loop((counts[0] * counts[1],), collective_axes='processor')
    def _(loop):
      i, j = products.grouped(loop.index[0], counts[0], counts[1], blocks.group)
      block(i, j, parts, allocations)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  width = _SWIZZLE // out.dtype.itemsize
  pl.run_scoped(
    blocks_of_a_processor,
    parts=plgpu.SMEM(
      (groups, _SLOTS, height, width),
      out.dtype,
      transforms=_transforms(*store),
    ),
    allocations=pipeline(None, lambda _: None).get_allocations(a, b),
    collective_axes='group',
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
