"""`quantized_matmul` in plain JAX: what XLA computes, and what kernels must."""

import jax
import jax.numpy as jnp
from jax import lax

from frugax.kernels import products
from frugax.kernels.products import LAYOUTS


def quantized_matmul(
  a: jax.Array,
  b: jax.Array,
  rows: jax.Array | None,
  columns: jax.Array | None,
  layout: str,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """See `frugax.kernels.quantized_matmul`.

  Args:
    a: (M, K), or (K, M) for 'TN'.
    b: (K, N), or (N, K) for 'NT'.
    rows: (M, 2) float32, a scale and a term before it, or (M, 1) without the
      term, or None.
    columns: (2, N) or (1, N) likewise.
    layout: a name in `LAYOUTS`.
    dtype: of the result.

  Returns:
    (M, N).
  """
  i, j = LAYOUTS[layout]
  y = _sums(a, b, (i, j)).astype(jnp.float32)
  return scaled(y, rows, columns).astype(dtype)


def scaled(
  y: jax.Array, rows: jax.Array | None, columns: jax.Array | None
) -> jax.Array:
  """Terms and scales of rows and columns, in float32."""
  scales, terms = (
    [
      lax.slice_in_dim(x, n, n + 1, axis=axis)
      for x, axis in ((rows, 1), (columns, 0))
      if x is not None and n < x.shape[axis]
    ]
    for n in (0, 1)
  )
  return rescaled(y, terms, scales)


def rescaled(y: jax.Array, terms, scales) -> jax.Array:
  """All terms are added, and then it is multiplied by all scales."""
  for x in terms:
    y = y + x
  for x in scales:
    y = y * x
  return y


def _sums(a, b, axes):
  kind = products.kind(a.dtype, b.dtype)
  if kind == 'int4':
    # XLA multiplies int4 as int8 on TPUs, and not at all on CPUs.
    a, b = a.astype(jnp.int8), b.astype(jnp.int8)
  if kind not in ('float8', 'float4'):
    return products.dot(a, b, axes)

  def wide(a, b):
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(
      a,
      b,
      (((axes[0],), (axes[1],)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  if kind == 'float4':
    return wide(a, b)
  # The numbers are exact in bfloat16, whose products CPUs are faster at, and in
  # which alone XLA's compiler gets through for GPUs.
  return lax.platform_dependent(
    a, b, cpu=wide, cuda=wide, default=lambda a, b: products.dot(a, b, axes)
  )
