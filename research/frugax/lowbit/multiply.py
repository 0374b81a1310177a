"""Products of rounded matrices, by their codes where both have row scales."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from frugax.kernels import chips, quantized_matmul
from frugax.quant import elements
from frugax.quant.tiles import Tiled, dequantize_tiles


def rows_by_rows(
  left: Tiled | jax.Array,
  right: Tiled | jax.Array,
  batch_axes: int = 0,
  dtype: jax.typing.DTypeLike = jnp.float32,
  native: bool | None = None,
  precision: lax.PrecisionLike = None,
) -> jax.Array:
  r"""The inner products of all rows of two stacks of matrices.

  With a scale a row, or one for all, the scales are taken out of the sum,

  .. math:: y_{ij} = s_i t_j \sum_k a_{ik} b_{jk}

  and the numbers in it are few bits wide: exact in bfloat16, or multiplied as
  the codes they are. Of mid-rise numbers, :math:`a + 1/2`, the sum is

  .. math::
    \sum_k a_{ik} b_{jk} + \tfrac12 \sum_k a_{ik} + \tfrac12 \sum_k b_{jk} +
    \tfrac{K}{4}

  Args:
    left: (*batch, *rows, columns).
    right: (*batch, *other rows, columns).
    batch_axes: number of axes over which the matrices are stacked.
    dtype: of rounded operands in floating-point products; float32 where one has
      16 bits.
    native: see `frugax.lowbit.dot_general`.
    precision: of floating-point products.

  Returns:
    (*batch, *rows, *other rows) in float32.

  Examples:
    >>> from frugax.quant import quantize_tiles
    >>> x = jnp.array([[127., 2.], [-4., 127.]])
    >>> q = quantize_tiles(x, 'int8')
    >>> print(rows_by_rows(q, x.at[0].set(.5), native=True))
    [[  64.5 -254. ]
     [  61.5 16145. ]]
  """
  if any(isinstance(x, Tiled) and _wide(x) for x in (left, right)):
    # Numbers that bfloat16 cannot hold, even where the layer's dtype is that.
    dtype, precision = jnp.float32, lax.Precision.HIGHEST
  if isinstance(left, Tiled) and isinstance(right, Tiled):
    kinds = {_kind(left), _kind(right)}
  else:
    kinds = {None}
  a, left_scale = _apart(left, dtype, kinds)
  b, right_scale = _apart(right, dtype, kinds)
  stacked = tuple(range(batch_axes))
  dims = (((a.ndim - 1,), (b.ndim - 1,)), (stacked, stacked))

  def product(a, b):
    return lax.dot_general(
      a, b, dims, precision, preferred_element_type=jnp.float32
    )

  def rescaled(y):
    if left_scale is not None:
      y = y * _among_rows(left_scale, batch_axes, a.ndim, b.ndim)
    if right_scale is not None:
      y = y * _among_other_rows(right_scale, batch_axes, a.ndim)
    return y

  if kinds in ({'int8'}, {'float8'}):
    shifts = [_shift(x) for x in (left, right)]

    def wide(a, b):
      a, b = (
        x.astype(dtype) + jnp.asarray(shift, dtype)
        for x, shift in zip((a, b), shifts, strict=True)
      )
      return rescaled(product(a, b))

    def narrow(a, b):
      kind = _kernel_kind(left, right)
      if chips.gains(kind):
        scales = left_scale, right_scale
        return _by_kernel(a, b, scales, batch_axes, shifts, kind)
      if kinds == {'float8'}:
        return rescaled(product(a, b))
      return rescaled(_integers(a, b, dims, batch_axes, *shifts))

    if native is None:
      return lax.platform_dependent(a, b, cpu=wide, default=narrow)
    return narrow(a, b) if native else wide(a, b)
  return rescaled(product(a, b))


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


def _apart(x, dtype, kinds):
  """An array to multiply, and a scale of its rows or None."""
  if not isinstance(x, Tiled):
    return x.astype(dtype), None
  if kinds in ({'int8'}, {'float8'}):
    return x.codes(), x.steps()
  rows, columns = x.scaling.tile
  if columns is None and rows in (1, None):
    return x.numbers().astype(dtype), x.steps()
  # Without the scale of scales the rest is exact in bfloat16.
  inner = dataclasses.replace(x, tensor=None)
  return dequantize_tiles(inner, dtype), x.tensor


def _kernel_kind(left, right):
  """What the kernels call products of these formats."""
  formats = [elements.element(x.format) for x in (left, right)]
  if formats[0].dtype != 'int8':
    return 'float8'
  return 'int4' if all(f.bits <= 4 for f in formats) else 'int8'


def _by_kernel(a, b, scales, batch, shifts, kind):
  """The product with its scales, its rows and other rows as one axis each."""
  stacked = a.shape[:batch]
  shape = (*a.shape[:-1], *b.shape[batch:-1])
  flat = []
  for x, scale in zip((a, b), scales, strict=True):
    scale = jnp.broadcast_to(scale, (*x.shape[:-1], 1))
    flat.append(scale.reshape(*stacked, -1))
  a, b = (x.reshape(*stacked, -1, x.shape[-1]) for x in (a, b))
  if kind == 'int4':
    a, b = a.astype(jnp.int4), b.astype(jnp.int4)

  def product(a, b, s, t):
    return quantized_matmul(a, b, s, t, layout='NT', shifts=tuple(shifts))

  for _ in range(batch):
    product = jax.vmap(product)
  return product(a, b, *flat).reshape(shape)


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
