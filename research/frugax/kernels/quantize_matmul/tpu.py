"""`quantize_matmul` for TPUs, by Mosaic."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from frugax.kernels import blocks as tables
from frugax.kernels import chips, products
from frugax.kernels.products import LAYOUTS
from frugax.kernels.quantize_matmul.rounding import Rounding
from frugax.kernels.quantized_matmul.reference import scaled

_TILE = 128
_UNROLL = 48  # tiles of a row
_AT_ONCE = 128  # tiles of several rows
_LARGEST = 2.0**100


class _Plan(NamedTuple):
  """All that is static. Blocks of x are `rows` x K, whichever way x lies."""

  rounding: Rounding
  layout: str
  size: int  # of the contracted axis, without what it is filled up with
  padded: int
  rows: int
  columns: int
  steps: int  # blocks of the contracted axis of w
  w_shift: float
  has_fold: bool
  has_ends: bool  # scales, and perhaps terms, of w
  residuals: bool
  halves: bool  # whether to count codes in int16
  interpret: bool

  @property
  def axis(self):
    """The contracted axis of x."""
    return 0 if self.layout == 'TN' else 1

  @property
  def block(self):
    return self.at(self.rows, self.padded)

  def at(self, along_rows, along_axis):
    """A pair in the order of x's axes."""
    pair = along_rows, along_axis
    return pair[::-1] if self.axis == 0 else pair

  @property
  def swapped(self):
    """Whether w gives the rows of the result, and x the columns."""
    return self.layout == 'TN'


def quantize_matmul(
  x: jax.Array,
  w: jax.Array,
  ends: jax.Array | None,
  fold: jax.Array | None,
  rounding: Rounding,
  layout: str,
  w_shift: float,
  dtype: jax.typing.DTypeLike,
  residuals: bool,
  blocks: tables.Blocks,
  interpret: bool = False,
) -> tuple[jax.Array, ...]:
  """The product, and codes, scales and sums of x if they are asked for.

  The grid runs over blocks of x's rows, of w's columns and of the contracted
  axis, the last fastest. With the first product of a block of x its codes are
  computed, from all of its rows, and they stay in VMEM for the others; where
  codes are asked for, in the block that is written out at the end.

  Args:
    x: (M, K), or (K, N) for 'TN'.
    w: (K, N), (N, K) for 'NT', or (K, M) for 'TN'.
    ends: scales and terms of w as `quantized_matmul.epilogue` gives them.
    fold: (1, K), or (K, 1) for 'TN', float32; or None.
    rounding: of x.
    layout: a name in `LAYOUTS`.
    w_shift: of w's numbers against their codes.
    dtype: of the result.
    residuals: whether to return codes, scales and sums.
    blocks: the largest blocks; `rows` are those of x.
    interpret: run as plain JAX.

  Returns:
    The product, and with residuals codes, scales, and sums of integers.
  """
  axis = 0 if layout == 'TN' else 1
  w_axis = LAYOUTS[layout][0 if layout == 'TN' else 1]
  size, m, n = x.shape[axis], x.shape[1 - axis], w.shape[1 - w_axis]
  bk, steps = products.fit(size, blocks.contracted, exact=True)
  bm, i_count = products.fit(m, blocks.rows)
  bn, j_count = products.fit(n, blocks.columns)
  plan = _Plan(
    rounding,
    layout,
    size,
    bk * steps,
    bm,
    bn,
    steps,
    w_shift,
    fold is not None,
    ends is not None,
    residuals,
    _halves(rounding, size),
    interpret,
  )
  x = products.pad(x, axis, plan.padded)
  operands = [x, products.pad(w, w_axis, plan.padded)]
  whole = pl.BlockSpec(plan.block, lambda i, j, k: plan.at(i, 0))
  specs = [whole, _w_spec(w_axis, bn, bk)]
  if fold is not None:
    operands.append(products.pad(fold, axis, plan.padded))
    specs.append(pl.BlockSpec(plan.at(1, plan.padded), lambda i, j, k: (0, 0)))
  if rounding.rotate:
    for h in _rotations(size, axis, x.dtype):
      operands.append(h)
      specs.append(pl.BlockSpec(h.shape, lambda i, j, k: (0, 0)))
  if ends is not None:
    operands.append(ends)
    if plan.swapped:
      specs.append(pl.BlockSpec((bn, ends.shape[1]), lambda i, j, k: (j, 0)))
    else:
      specs.append(pl.BlockSpec((ends.shape[0], bn), lambda i, j, k: (0, j)))
  shape, block = ((n, m), (bn, bm)) if plan.swapped else ((m, n), (bm, bn))
  outs = [jax.ShapeDtypeStruct(shape, dtype)]
  order = (lambda i, j: (j, i)) if plan.swapped else (lambda i, j: (i, j))
  out_specs = [pl.BlockSpec(block, lambda i, j, k: order(i, j))]
  line = [pltpu.VMEM(plan.at(bm, 1), jnp.float32)]
  if rounding.sums:
    line.append(pltpu.VMEM(plan.at(bm, 1), jnp.int32))
  scratch = line
  if residuals:
    outs.append(jax.ShapeDtypeStruct(x.shape, rounding.dtype))
    out_specs.append(whole)
    # Along the lanes, as XLA has vectors: it would have to copy columns.
    for part in line:
      outs.append(jax.ShapeDtypeStruct((1, m), part.dtype))
      out_specs.append(pl.BlockSpec((1, bm), lambda i, j, k: (0, i)))
  else:
    scratch = [pltpu.VMEM(plan.block, rounding.dtype), *line]
  if steps > 1:
    kind = products.kind(rounding.dtype, w.dtype)
    scratch.append(pltpu.VMEM(block, products.sum_dtype(kind)))
  got = pl.pallas_call(
    functools.partial(_kernel, plan),
    grid=(i_count, j_count, steps),
    in_specs=specs,
    out_specs=out_specs,
    out_shape=outs,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=tables.VMEM_LIMIT,
    ),
    cost_estimate=products.cost(m, n, size, [*operands, *outs]),
    interpret=interpret,
    name=f'quantize_matmul_{rounding.format}_{layout}',
  )(*operands)
  if not residuals:
    return tuple(got)
  y, codes, *line = got
  if plan.padded != size:
    codes = lax.slice_in_dim(codes, 0, size, axis=axis)
  return (y, codes, *(part.reshape(plan.at(m, 1)) for part in line))


def _halves(rounding, size):
  """Whether a chip is quick in int16, and codes of all tiles add up there."""
  tiles = -(-size // _TILE)
  return rounding.sums and chips.halves() and tiles * 2**7 < 2**15


def _w_spec(w_axis, bn, bk):
  if w_axis == 0:
    return pl.BlockSpec((bk, bn), lambda i, j, k: (k, j))
  return pl.BlockSpec((bn, bk), lambda i, j, k: (j, k))


def _rotations(size, axis, dtype):
  """Signs of the whole blocks and of the rest, and what to multiply both with.

  Signs are exact in bfloat16, and so are their products with x; the norms, of
  which the rest has several, are multiplied with after.
  """
  signs, norms = [], []
  for n in (_TILE, size % _TILE):
    h = np.zeros((_TILE, _TILE), np.float32)
    start = 0
    while start < n:
      block = 1 << (n - start).bit_length() - 1
      at = slice(start, start + block)
      h[at, at] = _sylvester(block)
      start += block
    signs.append(np.sign(h))
    norms.append(np.abs(h).max(axis=1 - axis))
  norms = jnp.asarray(np.stack(norms, axis=1 - axis))
  return jnp.asarray(np.concatenate(signs), dtype), norms


def _sylvester(n):
  """As `frugax.quant.hadamard` has it, in numpy: there may be no device."""
  h = np.ones((1, 1))
  while len(h) < n:
    h = np.block([[h, h], [h, -h]])
  return h / np.sqrt(n)


def _kernel(plan, x, w, *refs):
  refs = list(refs)
  fold = refs.pop(0) if plan.has_fold else None
  h = (refs.pop(0), refs.pop(0)) if plan.rounding.rotate else None
  ends = refs.pop(0) if plan.has_ends else None
  out, codes = refs.pop(0), refs.pop(0)

  def line():
    return refs.pop(0), refs.pop(0) if plan.rounding.sums else None

  results = line() if plan.residuals else (None, None)
  scales, sums = line()
  j, k = pl.program_id(1), pl.program_id(2)

  @pl.when((j == 0) & (k == 0))
  def _():
    _quantize(plan, x, fold, h, codes, (scales, sums), results)

  def product():
    at = (slice(None), slice(None))
    if plan.steps > 1:
      bk = plan.padded // plan.steps
      start = pl.multiple_of(k * bk, _TILE)
      at = plan.at(slice(None), pl.ds(start, bk))
    axes = (plan.axis, LAYOUTS[plan.layout][0 if plan.swapped else 1])
    if plan.swapped:
      return products.dot(w[...], codes[at], axes[::-1], plan.interpret)
    return products.dot(codes[at], w[...], axes, plan.interpret)

  def write(y):
    y = y.astype(jnp.float32)
    if plan.w_shift:
      y = y + plan.w_shift * sums[...].astype(jnp.float32)
    other = None if ends is None else ends[...]
    pair = (other, scales[...]) if plan.swapped else (scales[...], other)
    out[...] = scaled(y, *pair).astype(out.dtype)

  if plan.steps == 1:
    write(product())
    return
  total = refs.pop(0)

  @pl.when(k == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  total[...] += product()

  @pl.when(k == plan.steps - 1)
  def _():
    write(total[...])


def _quantize(plan, x, fold, h, codes, line, results):
  """All codes of a block of x, 128 rows at a time, and their scales and sums.

  These are kept in the pair `line` for the products, and written out in the
  pair `results` where it is not of None.
  """
  rounding, axis = plan.rounding, plan.axis
  whole, rest = divmod(plan.size, _TILE)
  zeros = jnp.zeros(plan.at(_TILE, _TILE), jnp.float32)
  offset = rounding.offset if rounding.sums and not plan.halves else 0

  def load(r, c):
    v = x[plan.at(pl.ds(r, _TILE), pl.ds(c, _TILE))]
    if fold is None:
      return v
    return v.astype(jnp.float32) * fold[plan.at(slice(None), pl.ds(c, _TILE))]

  def each(visit, carry):
    """Over all tiles of some rows; the last may be part 1, the rest."""

    def body(c, carry):
      return visit(pl.multiple_of(c * _TILE, _TILE), 0, carry)

    if whole:
      carry = lax.fori_loop(0, whole, body, carry, unroll=_unroll(whole))
    if rest:
      carry = visit(whole * _TILE, 1, carry)
    return carry

  def some_rows(i, _):
    r = pl.multiple_of(i * _TILE, _TILE)
    here = plan.at(pl.ds(r, _TILE), slice(None))

    def gather(c, part, seen):
      v = load(r, c)
      if h is not None and not rounding.invariant:
        v = _rotated(v, h, axis, part, rounding) * _norm(h, axis, part)
      return rounding.gather(seen, v.astype(jnp.float32))

    scale = rounding.finish(each(gather, zeros), axis, plan.size)
    line[0][here] = scale
    # The norm of whole blocks is one number, and the scale takes it along.
    inverses = [1 / scale * np.float32(_TILE**-0.5), 1 / scale]

    def write(c, part, total):
      v = load(r, c)
      if h is not None:
        v = _rotated(v, h, axis, part, rounding)
        if part:
          v = v * _norm(h, axis, part)
        v = v * inverses[part]
      else:
        # To the same code as in `quantize_tiles`. The reciprocal that a TPU
        # divides by is found once for all tiles.
        v = v.astype(jnp.float32) / scale
      q = rounding.codes(v, plan.halves)
      if part:
        place = lax.broadcasted_iota(jnp.int32, q.shape, axis)
        q = jnp.where(place < rest, q, jnp.full_like(q, offset))
      codes[plan.at(pl.ds(r, _TILE), pl.ds(c, _TILE))] = q.astype(codes.dtype)
      return total + q if rounding.sums else total

    # In int32 the sums of the offsets go round, and come back. Mosaic adds up
    # rows in float32, in which what is left is exact.
    total = each(write, zeros.astype(jnp.int16 if plan.halves else jnp.int32))
    if rounding.sums:
      tiles = whole + bool(rest)
      total = total.astype(jnp.int32)
      total = total - np.int32(np.int64(tiles * offset).astype(np.int32))
      total = total.astype(jnp.float32).sum(axis, keepdims=True)
      line[1][here] = total.astype(jnp.int32)
    return 0

  # Several short rows at once, so that some are written while the scales of
  # others are computed.
  count = plan.rows // _TILE
  unroll = 1 if whole > _UNROLL else _unroll(count, _AT_ONCE // max(whole, 1))
  lax.fori_loop(0, count, some_rows, 0, unroll=unroll)
  for kept, result in zip(line, results, strict=True):
    if result is not None:
      result[...] = _flat(kept[...], axis).astype(result.dtype)
  filled = (whole + bool(rest)) * _TILE
  if filled < plan.padded:
    at = plan.at(slice(None), slice(filled, plan.padded))
    codes[at] = jnp.zeros(codes[at].shape, codes.dtype)


def _flat(x, axis):
  """Numbers of rows along the lanes, exact if they are in float32."""
  if axis == 0:
    return x
  # Each 128 rows become a column of one square, which is transposed.
  lane = lax.broadcasted_iota(jnp.int32, (_TILE, _TILE), 1)
  square = jnp.zeros((_TILE, _TILE), jnp.float32)
  count = len(x) // _TILE
  for n in range(count):
    part = x[n * _TILE : (n + 1) * _TILE].astype(jnp.float32)
    square = jnp.where(lane == n, part, square)
  square = square.T
  return jnp.concatenate([square[n : n + 1] for n in range(count)], 1)


def _unroll(count, most=_UNROLL):
  """What is short at once: loops keep operations from overlapping."""
  return max(n for n in range(1, max(most, 1) + 1) if count % n == 0)


def _rotated(v, h, axis, part, rounding):
  """Products of 128 neighbours along an axis with signs."""
  if rounding.clips:
    v = jnp.clip(v, -_LARGEST, _LARGEST)
  at = slice(part * _TILE, (part + 1) * _TILE)
  signs = h[0][at, :]
  precision = lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
  return lax.dot_general(
    *((v, signs) if axis == 1 else (signs, v)),
    (((1,), (0,)), ((), ())),
    precision,
    preferred_element_type=jnp.float32,
  )


def _norm(h, axis, part):
  norms = h[1]
  return norms[part : part + 1, :] if axis == 1 else norms[:, part : part + 1]
