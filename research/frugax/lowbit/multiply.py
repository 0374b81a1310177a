"""Products of rounded matrices, by their codes where both have row scales."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from frugax.kernels import blocks, chips, quantize_matmul, quantized_matmul
from frugax.lowbit import cuts, matrices
from frugax.lowbit.operands import Operand
from frugax.quant import Scaling, elements
from frugax.quant.tiles import Tiled, dequantize_tiles


class Unrounded(NamedTuple):
  """A left operand that is rounded by the kernel which multiplies it.

  Attributes:
    x: (*batch, *rows, columns).
    operand: how it is rounded, with a scale a row.
  """

  x: jax.Array
  operand: Operand

  @property
  def format(self) -> str:
    return self.operand.format

  @property
  def scaling(self) -> Scaling:
    return self.operand.scaling


def fuses(
  left: Unrounded,
  right: Tiled | jax.Array,
  splits: Sequence[cuts.Split | None] | None = None,
) -> bool:
  """Whether a kernel shall round an operand, or XLA before any kernel.

  A kernel does where the chip gains by it (`frugax.kernels.blocks.fuses`), the
  rows lie on one device each, and the codes are those of `quantize_tiles`: to
  nearest, by the largest magnitude of a row, without a mask.

  Args:
    left: the operand.
    right: one of those that it is multiplied with.
    splits: as in `rows_by_rows`.
  """
  operand, s = left.operand, left.scaling
  if operand.format not in elements.ELEMENTS:
    return False
  rows = Scaling(factor=s.factor, eps=s.eps, floor=s.floor)
  if operand != Operand(operand.format, rows):
    return False
  kind = _codes(left, right)[1:2]
  whole = chips.uncut() or not any(
    split is None or split.contracted for split in splits or [None]
  )
  return (
    bool(kind)
    and whole
    and blocks.fuses(chips.tpu(), *kind, left.x.shape[-1], left.x.dtype)
  )


def rows_by_rows(
  left: Tiled | Unrounded | jax.Array,
  rights: Sequence[Tiled | jax.Array],
  batch_axes: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
  native: bool | None = None,
  precision: lax.PrecisionLike = None,
  splits: Sequence[cuts.Split | None] | None = None,
  out: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
) -> list[jax.Array]:
  r"""The inner products of all rows of two stacks of matrices.

  With a scale a row, or one for all, the scales are taken out of the sum,

  .. math:: y_{ij} = s_i t_j \sum_k a_{ik} b_{jk}

  and the numbers in it are few bits wide: exact in bfloat16, or multiplied as
  the codes they are. Of mid-rise numbers, :math:`a + 1/2`, the sum is

  .. math::
    \sum_k a_{ik} b_{jk} + \tfrac12 \sum_k a_{ik} + \tfrac12 \sum_k b_{jk} +
    \tfrac{K}{4}

  Several right operands are one, as high as all of them, where their rows need
  not change places for that: on one device, or on each of several.

  Args:
    left: (*batch, *rows, columns); an `Unrounded` if `fuses` says so.
    rights: (*batch, *other rows, columns) each, all rounded alike.
    batch_axes: number of axes over which the matrices are stacked.
    dtype: of rounded operands in floating-point products, float32 where one has
      16 bits; and of sums over several devices.
    native: see `frugax.lowbit.dot_general`.
    precision: of floating-point products.
    splits: how operands and results are cut over devices, for each right one.
      Each device then multiplies its parts, by kernels where it gains, and sums
      are scaled before they travel. Without, XLA cuts products.
    out: dtype of the products that are not such sums.
    implementation: 'xla' for products without kernels.

  Returns:
    (*batch, *rows, *other rows) for each, in `out`, sums over devices in
    `dtype`.

  Examples:
    >>> from frugax.quant import quantize_tiles
    >>> x = jnp.array([[127., 2.], [-4., 127.]])
    >>> q = quantize_tiles(x, 'int8')
    >>> print(rows_by_rows(q, [x.at[0].set(.5)], native=True)[0])
    [[  64.5 -254. ]
     [  61.5 16145. ]]
  """
  sum_dtype = dtype
  if any(isinstance(x, Tiled) and _wide(x) for x in (left, *rights)):
    # Numbers that bfloat16 cannot hold, even where the layer's dtype is that.
    dtype, precision = jnp.float32, lax.Precision.HIGHEST
  alone = chips.uncut() or not splits or None in splits
  if not alone and any(split.contracted for split in splits):
    summed = all(split.contracted for split in splits)
    out = sum_dtype if summed else jnp.float32
  how = _How(
    batch_axes,
    dtype,
    out,
    native,
    precision,
    implementation,
    left.operand if isinstance(left, Unrounded) else None,
    *_codes(left, rights[0]),
  )
  products = functools.partial(_products, how)
  a, *others = (_apart(x, dtype, how.codes) for x in (left, *rights))
  if alone:
    return products(a, others)
  return cuts.over_devices(splits, products, sum_dtype, a, others)


class _How(NamedTuple):
  """All that is static of a product.

  Attributes:
    operand: how its kernel rounds the left operand; None if that is rounded.
    codes: whether codes are multiplied: 'int8', 'float8', or None for numbers.
    kernel: what the kernels call it.
    shifts: of the numbers of both operands against their codes.
  """

  batch: int
  dtype: object
  out: object
  native: bool | None
  precision: object
  implementation: str | None
  operand: Operand | None
  codes: str | None = None
  kernel: str | None = None
  shifts: tuple[float, float] = (0.0, 0.0)


def _codes(left, right):
  if not isinstance(left, Tiled | Unrounded) or not isinstance(right, Tiled):
    return ()
  kinds = {_kind(left), _kind(right)}
  if len(kinds) > 1 or None in kinds:
    return ()
  return kinds.pop(), _kernel_kind(left, right), (_shift(left), _shift(right))


def _products(how, left, rights):
  """Of what `_apart` gives, on one device or of a device's parts."""
  if len(rights) == 1 or not chips.uncut():
    return [_product(how, left, right) for right in rights]
  units = [right[0].shape[how.batch : -1] for right in rights]
  ends = list(itertools.accumulate(math.prod(n) for n in units))
  wide = _product(how, left, _one_below_the_other(rights, how.batch))
  return [
    part.reshape(*part.shape[:-1], *n)
    for part, n in zip(jnp.split(wide, ends[:-1], -1), units, strict=True)
  ]


def _one_below_the_other(rights, batch):
  """All rows as one axis, with a scale each."""
  columns = []
  for x, *scales in rights:
    spread = [jnp.broadcast_to(s, (*x.shape[:-1], 1)) for s in scales]
    columns.append([matrices.merge(y, batch, -1) for y in (x, *spread)])
  return [jnp.concatenate(each, batch) for each in zip(*columns, strict=True)]


def _product(how, left, right):
  if how.operand is None:
    return _of_rounded(how, left, right)

  def together(x, *right):
    return _by_fused_kernel(how, x, *right)

  def apart(x, *right):
    q, _ = matrices.rounded(how.operand, x, how.batch, None)
    return _of_rounded(how, [q.codes(), q.steps()], right)

  if how.native is None:
    return lax.platform_dependent(*left, *right, cpu=apart, default=together)
  return together(*left, *right)


def _of_rounded(how, left, right):
  (a, *left_scale), (b, *right_scale) = left, right
  batch = how.batch
  stacked = tuple(range(batch))
  dims = (((a.ndim - 1,), (b.ndim - 1,)), (stacked, stacked))

  def product(a, b):
    return lax.dot_general(
      a, b, dims, how.precision, preferred_element_type=jnp.float32
    )

  def rescaled(y):
    for s in left_scale:
      y = y * _among_rows(s, batch, a.ndim, b.ndim)
    for s in right_scale:
      y = y * _among_other_rows(s, batch, a.ndim)
    return y.astype(how.out)

  if how.codes is None:
    return rescaled(product(a, b))

  def wide(a, b):
    a, b = (
      x.astype(how.dtype) + jnp.asarray(shift, how.dtype)
      for x, shift in zip((a, b), how.shifts, strict=True)
    )
    return rescaled(product(a, b))

  def narrow(a, b):
    if how.implementation != 'xla' and chips.takes('lowbit', how.kernel):
      return _by_kernel(how, a, b, left_scale + right_scale)
    if how.codes == 'float8':
      # XLA's compiler does not get through with these products for GPUs.
      return lax.platform_dependent(
        a, b, cuda=wide, default=lambda a, b: rescaled(product(a, b))
      )
    return rescaled(_integers(a, b, dims, batch, *how.shifts))

  if how.native is None:
    return lax.platform_dependent(a, b, cpu=wide, default=narrow)
  return narrow(a, b) if how.native else wide(a, b)


def _kind(q):
  """How the codes can be multiplied: 'int8', 'float8', or None for neither."""
  rows, columns = q.scaling.tile
  if columns is not None or rows not in (1, None):
    return None
  dtype = elements.element(q.format).dtype
  return {'int8': 'int8', 'uint8': None, 'int16': None}.get(dtype, 'float8')


def _wide(q):
  return elements.element(q.format).bits > 8


def _shift(q):
  return 0.5 if elements.element(q.format).rise else 0.0


def _apart(x, dtype, codes):
  """An array to multiply, and a scale of its rows if it has one."""
  if isinstance(x, Unrounded):
    return [x.x]
  if not isinstance(x, Tiled):
    return [x.astype(dtype)]
  if codes is not None:
    return [x.codes(), x.steps()]
  rows, columns = x.scaling.tile
  if columns is None and rows in (1, None):
    return [x.numbers().astype(dtype), x.steps()]
  # Without the scale of scales the rest is exact in bfloat16.
  inner = dataclasses.replace(x, tensor=None)
  scale = [] if x.tensor is None else [x.tensor]
  return [dequantize_tiles(inner, dtype), *scale]


def _kernel_kind(left, right):
  """What the kernels call products of these formats."""
  formats = [elements.element(x.format) for x in (left, right)]
  if formats[0].dtype != 'int8':
    return 'float8'
  return 'int4' if all(f.bits <= 4 for f in formats) else 'int8'


def _by_kernel(how, a, b, scales):
  """The product with its scales, its rows and other rows as one axis each."""
  batch = how.batch
  shape = (*a.shape[:-1], *b.shape[batch:-1])
  (a, s), (b, t) = (
    _flat(x, scale, batch) for x, scale in zip((a, b), scales, strict=True)
  )
  if how.kernel == 'int4':
    a, b = a.astype(jnp.int4), b.astype(jnp.int4)

  def product(a, b, s, t):
    return quantized_matmul(
      a, b, s, t, layout='NT', shifts=how.shifts, dtype=how.out
    )

  for _ in range(batch):
    product = jax.vmap(product)
  return product(a, b, s, t).reshape(shape)


def _by_fused_kernel(how, x, b, scale):
  """Likewise, of rows that the kernel rounds."""
  batch = how.batch
  shape = (*x.shape[:-1], *b.shape[batch:-1])
  b, t = _flat(b, scale, batch)
  if how.kernel == 'int4':
    b = b.astype(jnp.int4)

  def product(x, b, t):
    return quantize_matmul(
      x,
      b,
      t,
      format=how.operand.format,
      scaling=how.operand.scaling,
      layout='NT',
      w_shift=how.shifts[1],
      dtype=how.out,
      residuals=False,
    ).product

  for _ in range(batch):
    product = jax.vmap(product)
  x = x.reshape(*x.shape[:batch], -1, x.shape[-1])
  return product(x, b, t).reshape(shape)


def _flat(x, scale, batch):
  """Rows as one axis, and a scale for each of them."""
  stacked = x.shape[:batch]
  scale = jnp.broadcast_to(scale, (*x.shape[:-1], 1))
  return x.reshape(*stacked, -1, x.shape[-1]), scale.reshape(*stacked, -1)


def _integers(a, b, dims, batch, left_shift, right_shift):
  y = lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)
  y = y.astype(jnp.float32)
  if right_shift:
    sums = a.sum(-1, keepdims=True, dtype=jnp.int32)
    y += right_shift * _among_rows(sums, batch, a.ndim, b.ndim)
  if left_shift:
    sums = b.sum(-1, keepdims=True, dtype=jnp.int32)
    y += left_shift * _among_other_rows(sums, batch, a.ndim)
  return y + a.shape[-1] * left_shift * right_shift


def _among_rows(x, batch, left, right):
  """(*batch, *rows, 1) to (*batch, *rows, *ones for the other rows)."""
  return x.reshape(*x.shape[:-1], *[1] * (right - 1 - batch))


def _among_other_rows(x, batch, left):
  """(*batch, *other rows, 1) to (*batch, *ones for rows, *other rows)."""
  ones = [1] * (left - 1 - batch)
  return x.reshape(*x.shape[:batch], *ones, *x.shape[batch:-1])
