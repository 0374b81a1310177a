"""`quantized_matmul` for GPUs, by Triton: integers, and numbers with integers.

No default reaches it: on Hopper `mosaic_gpu` takes less time for integers, and
XLA is taken for numbers with integers, which were not timed. Nor is it for
8-bit floats, of which Triton makes float16 for Hopper's matrix units, without a
word and at half the rate.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from frugax.kernels import blocks as tables
from frugax.kernels import products
from frugax.kernels.products import LAYOUTS
from frugax.kernels.quantized_matmul.reference import rescaled

# Rows that Hopper's matrix unit takes at once, and no block is shorter.
_LEAST = 64


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

  A program goes along the contracted axis with the sums of a block of the
  result in registers. Operands that are no whole number of blocks are filled
  with zeros before: rows of odd lengths could not be copied in words of 16
  bytes. What the result does not have is not written.

  Hopper's matrix units take integers only with the contracted axis last in
  memory, where a kernel that reads other layouts has to store them byte by
  byte. So XLA transposes these before, or where it computes them. Beside
  floating-point numbers integers are read in the layout that they have.

  Args:
    a: (M, K), or (K, M) for 'TN'.
    b: (K, N), or (N, K) for 'NT'.
    rows: (M, 2), (M, 1) or None.
    columns: (2, N), (1, N) or None.
    layout: a name in `LAYOUTS`.
    dtype: of the result.
    blocks: the largest blocks.
    interpret: run as plain JAX.

  Returns:
    (M, N).
  """
  m, n, k = products.sizes(a, b, layout)
  kind = products.kind(a.dtype, b.dtype)
  name = f'quantized_matmul_{kind}_{layout}'
  a, b = (x.astype(jnp.int8) if x.dtype == jnp.int4 else x for x in (a, b))
  if kind != 'mixed':
    a, b, layout = *products.contracted_last(a, b, layout), 'NT'
  bm, bn, bk = (
    min(block, max(_LEAST, pl.next_power_of_2(size)))
    for block, size in zip(blocks[:3], (m, n, k), strict=True)
  )
  counts = pl.cdiv(m, bm), pl.cdiv(n, bn)
  deep = pl.cdiv(k, bk) * bk
  i, j = LAYOUTS[layout]

  def operand(x, contracted, block, which):
    """Filled up, and all of K for the block of rows (0) or columns (1)."""
    own = 1 - contracted
    x = products.pad(x, own, counts[which] * block)
    shape = (block, deep) if contracted else (deep, block)
    return products.pad(x, contracted, deep), spec(shape, own, which)

  def spec(shape, axis, which):
    def at(p):
      place = products.grouped(p, *counts, blocks.group)[which]
      return (place, 0) if axis == 0 else (0, place)

    return pl.BlockSpec(shape, at)

  operands = [operand(a, i, bm, 0), operand(b, j, bn, 1)]
  if rows is not None:
    x = products.pad(rows, 0, counts[0] * bm)
    operands.append((x, spec((bm, x.shape[1]), 0, 0)))
  if columns is not None:
    x = products.pad(columns, 1, counts[1] * bn)
    operands.append((x, spec((x.shape[0], bn), 1, 1)))
  arrays, specs = zip(*operands, strict=True)
  out = jax.ShapeDtypeStruct((m, n), dtype)
  place = functools.partial(
    products.grouped, rows=counts[0], columns=counts[1], group=blocks.group
  )
  return pl.pallas_call(
    functools.partial(
      _kernel, (i, j), bk, rows is not None, columns is not None, place, (m, n)
    ),
    grid=(counts[0] * counts[1],),
    in_specs=specs,
    out_specs=pl.BlockSpec((bm, bn), place),
    out_shape=out,
    compiler_params=pltriton.CompilerParams(
      num_warps=blocks.warps, num_stages=blocks.stages
    ),
    cost_estimate=products.cost(m, n, k, [*arrays, out]),
    interpret=interpret,
    name=name,
  )(*arrays)


def _kernel(axes, bk, has_rows, has_columns, place, size, a, b, *refs):
  refs = list(refs)
  rows = refs.pop(0) if has_rows else None
  columns = refs.pop(0) if has_columns else None
  (out,) = refs

  def step(k, sums):
    at = pl.ds(k * bk, bk)
    left = a[:, at] if axes[0] else a[at, :]
    right = b[:, at] if axes[1] else b[at, :]
    return sums + products.dot(left, right, axes)

  dtype = products.sum_dtype(products.kind(a.dtype, b.dtype))
  steps = a.shape[axes[0]] // bk
  sums = lax.fori_loop(0, steps, step, jnp.zeros(out.shape, dtype))
  scales, terms = [], []
  for found, n in ((scales, 0), (terms, 1)):
    if has_rows and n < rows.shape[1]:
      found.append(rows[:, n : n + 1])
    if has_columns and n < columns.shape[0]:
      found.append(columns[n : n + 1, :])
  y = rescaled(sums.astype(jnp.float32), terms, scales)
  mask = None
  for axis, block in enumerate(place(pl.program_id(0))):
    if size[axis] % out.shape[axis]:
      index = lax.broadcasted_iota(jnp.int32, out.shape, axis)
      within = block * out.shape[axis] + index < size[axis]
      mask = within if mask is None else mask & within
  pltriton.store(out, y.astype(out.dtype), mask=mask)
