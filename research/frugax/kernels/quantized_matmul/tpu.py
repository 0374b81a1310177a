"""`quantized_matmul` for TPUs, by Mosaic."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from frugax.kernels import blocks as tables
from frugax.kernels import products
from frugax.kernels.products import LAYOUTS
from frugax.kernels.quantized_matmul.reference import rescaled

_TILE = 128


def quantized_matmul(
  a: jax.Array,
  b: jax.Array,
  rows: jax.Array | None,
  columns: jax.Array | None,
  layout: str,
  dtype: jax.typing.DTypeLike,
  blocks: tables.Blocks,
  interpret: bool = False,
) -> jax.Array:
  """See `frugax.kernels.quantized_matmul.reference`.

  The grid runs over blocks of rows, of columns and of the contracted axis, the
  last one fastest, with the sums of a block of the result in VMEM. Operands are
  read in the layout that they have. What lies beyond the ends of rows and
  columns is computed from whatever is there and never written; a contracted
  axis that is no multiple of its block is filled with zeros before.

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
  (bm, i_count), (bn, j_count) = (
    products.fit(size, block)
    for size, block in zip((m, n), blocks[:2], strict=True)
  )
  bk, k_count = products.fit(k, blocks.contracted, exact=True)
  axes = LAYOUTS[layout]
  a = products.pad(a, axes[0], bk * k_count)
  b = products.pad(b, axes[1], bk * k_count)
  operands, specs = [a, b], list(_operand_specs(layout, bm, bn, bk))
  if rows is not None:
    # Along the lanes, as XLA has vectors: it would have to copy columns.
    operands.append(rows.T)
    specs.append(pl.BlockSpec((rows.shape[1], bm), lambda i, j, k: (0, i)))
  if columns is not None:
    operands.append(columns)
    specs.append(pl.BlockSpec((columns.shape[0], bn), lambda i, j, k: (0, j)))
  out = jax.ShapeDtypeStruct((m, n), dtype)
  return pl.pallas_call(
    functools.partial(
      _kernel, axes, k_count, rows is not None, columns is not None, interpret
    ),
    grid=(i_count, j_count, k_count),
    in_specs=specs,
    out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
    out_shape=out,
    scratch_shapes=[pltpu.VMEM((bm, bn), products.sum_dtype(kind))]
    if k_count > 1
    else [],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tables.VMEM_LIMIT,
    ),
    cost_estimate=products.cost(m, n, k, [*operands, out]),
    interpret=interpret,
    name=f'quantized_matmul_{kind}_{layout}',
  )(*operands)


def _operand_specs(layout, bm, bn, bk):
  i, j = LAYOUTS[layout]
  if i == 1:
    yield pl.BlockSpec((bm, bk), lambda i, j, k: (i, k))
  else:
    yield pl.BlockSpec((bk, bm), lambda i, j, k: (k, i))
  if j == 0:
    yield pl.BlockSpec((bk, bn), lambda i, j, k: (k, j))
  else:
    yield pl.BlockSpec((bn, bk), lambda i, j, k: (j, k))


def _kernel(axes, k_count, has_rows, has_columns, interpret, a, b, *refs):
  refs = list(refs)
  rows = refs.pop(0) if has_rows else None
  columns = refs.pop(0) if has_columns else None
  out = refs.pop(0)

  def product():
    return products.dot(a[...], b[...], axes, interpret)

  def write(y):
    scales, terms = [], []
    for n, found in enumerate((scales, terms)):
      if rows is not None and n < rows.shape[0]:
        found.append(_column(rows[n : n + 1]))
      if columns is not None and n < columns.shape[0]:
        found.append(columns[n : n + 1])
    y = rescaled(y.astype(jnp.float32), terms, scales)
    out[...] = y.astype(out.dtype)

  if k_count == 1:
    write(product())
    return
  (sums,) = refs
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  sums[...] += product()

  @pl.when(k == k_count - 1)
  def _():
    write(sums[...])


def _column(row):
  """A row of numbers as a column, by transposing squares."""
  squares = [
    jnp.broadcast_to(row[:, start : start + _TILE], (_TILE, _TILE)).T[:, :1]
    for start in range(0, row.shape[1], _TILE)
  ]
  return jnp.concatenate(squares, 0)
