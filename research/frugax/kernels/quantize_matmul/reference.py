"""`quantize_matmul` in plain JAX, on what `frugax.quant` rounds."""

import jax
import jax.numpy as jnp

from frugax.kernels.quantize_matmul.rounding import Rounding
from frugax.quant import hadamard, quantize_tiles

# Sums of infinities of both signs would be NaN.
_LARGEST = 2.0**100


def quantize(
  x: jax.Array, rounding: Rounding, axis: int, fold: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """The codes of a matrix, with a scale for all that lies along an axis.

  Args:
    x: a matrix.
    rounding: how.
    axis: the contracted one.
    fold: multiplied with x before, with a size along that axis and 1 along the
      other, or None.

  Returns:
    Codes of x's shape; scales, and sums of codes or None, of size 1 along the
    axis.
  """
  v = x.astype(jnp.float32)
  if fold is not None:
    v = v * fold
  if rounding.rotate:
    v = hadamard(jnp.clip(v, -_LARGEST, _LARGEST), axis)
  v = jnp.moveaxis(v, axis, -1)
  q = quantize_tiles(v, rounding.format, rounding.scaling)
  codes = jnp.moveaxis(q.codes(), -1, axis)
  scales = jnp.moveaxis(q.steps(), -1, axis)
  sums = None
  if rounding.sums:
    sums = codes.sum(axis, dtype=jnp.int32, keepdims=True)
  return codes.astype(rounding.dtype), scales, sums
