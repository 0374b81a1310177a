"""`hadamard_quantize` in plain JAX: what kernels must compute, too."""

import jax
import jax.numpy as jnp
from jax import lax

from frugax.kernels.codes import coded
from frugax.kernels.hadamard_quantize import steps
from frugax.kernels.hadamard_quantize.options import TILE, Copy, Rounded
from frugax.quant import elements


def copy_of(
  x: jax.Array,
  copy: Copy,
  by_rows: bool,
  signs: jax.Array | None,
  random: jax.Array | None,
) -> Rounded:
  """One copy; see `frugax.kernels.hadamard_quantize`.

  Args:
    x: (tokens, features).
    copy: how it is rounded.
    by_rows: whether a scale belongs to a row, else to a column.
    signs: one for each element of the axis that is rotated, or None.
    random: uint32 of x's shape, or None to round to nearest.

  Returns:
    The copy, of two axes.
  """
  y, group = rotated(x, copy, signs), None
  if not by_rows:
    tokens, features = y.shape
    group = min(copy.scaling.tile[1] or tokens, tokens)
    counts = jnp.minimum(group, tokens - jnp.arange(0, tokens, group))
    y = jnp.pad(y, [(0, -tokens % group), (0, 0)])
    y = y.reshape(-1, group, features)
    axis, counts = 1, counts[:, None, None].astype(jnp.float32)
  else:
    axis, counts = 1, x.shape[1]
  total = steps.statistic(copy.scaling, y)
  if copy.scaling.statistic == 'absmax':
    total = steps.largest(total, axis)
  else:
    total = total.sum(axis, keepdims=True)
  scales, inverse = steps.step(copy, total, counts)
  t = y * inverse
  if not by_rows:
    t = t.reshape(-1, x.shape[1])[: x.shape[0]]
  codes = coded(copy.element, t, random, clip=not copy.bounded)
  mask = sums = None
  if copy.mask != 'none':
    mask = elements.pack(jnp.abs(t) <= copy.bound, 1)
  if copy.sums:
    whole = codes.astype(jnp.int32)
    if not by_rows:
      whole = jnp.pad(whole, [(0, y.shape[0] * y.shape[1] - len(x)), (0, 0)])
      whole = whole.reshape(y.shape)
    sums = whole.sum(axis, keepdims=True)
  if not by_rows:
    scales = scales[:, 0]
    sums = None if sums is None else sums[:, 0]
  codes = codes.astype(copy.dtype)
  return Rounded(codes, scales, mask, sums, copy.format, group)


def rotated(x: jax.Array, copy: Copy, signs: jax.Array | None) -> jax.Array:
  """(tokens, features) in float32, rotated but for the copy's gain."""
  if copy.along == 'none':
    return x.astype(jnp.float32)
  if copy.along == 'tokens':
    across = Copy(along='features', block=copy.block)
    return rotated(x.T, across, signs).T
  limit = jnp.asarray(steps.LARGEST, x.dtype)
  x = jnp.clip(x, -limit, limit)
  if signs is not None:
    x = x * signs.astype(x.dtype)
  size = x.shape[1]
  matrices, gains = steps.rotation(size, copy.block)
  whole = size // TILE * TILE
  parts = []
  if whole:
    tiles = x[:, :whole].reshape(len(x), -1, TILE)
    y = _product(tiles, matrices[0])
    parts.append(y.reshape(len(x), whole))
  if size - whole:
    tail = slice(0, size - whole)
    y = _product(x[:, whole:], matrices[1][tail, tail])
    parts.append(y * gains[1][tail])
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def _product(x, matrix):
  """Exact in float32 but for its sums: signs are numbers of any dtype."""

  def product(x):
    return lax.dot_general(
      x,
      jnp.asarray(matrix, x.dtype),
      (((x.ndim - 1,), (0,)), ((), ())),
      precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )

  def wide(x):
    return product(x.astype(jnp.float32))

  # CPUs do not have all products of bfloat16.
  return lax.platform_dependent(x, cpu=wide, default=product)
