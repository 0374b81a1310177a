"""`linear_cross_entropy` in plain JAX: a part of the vocabulary at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Logits that are in memory at once, in float32 64 MiB, and the most columns of
# them: more are no faster.
_LOGITS, _COLUMNS = 2**24, 2048
_LEAST = 512


def columns(
  rows: int, vocabulary: int, logits: int = _LOGITS, most: int = _COLUMNS
) -> int:
  """Columns of logits in a part: parts are even, and but the last one full.

  Args:
    rows: of the logits.
    vocabulary: columns of all parts.
    logits: the most in a part, unless it has fewer than 512 columns.
    most: columns in a part.

  Examples:
    >>> columns(8192, 256000), columns(4, 2304), columns(2**20, 50257)
    (2048, 1152, 512)
  """
  limit = min(max(logits // max(rows, 1) // 128 * 128, _LEAST), most)
  parts = -(-vocabulary // limit)
  return -(-vocabulary // (parts * 128)) * 128 if parts > 1 else vocabulary


def forward(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  axis: int,
  softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Log-partition of the logits of each row, and its logit at the label.

  The sum of exponentials is kept relative to the largest logit so far.

  Args:
    x: (..., D), of w's dtype.
    w: (D, V), or (V, D).
    labels: integers (...); the logit at one that is not in [0, V) is 0.
    axis: of w, that is the vocabulary.
    softcap: see `linear_cross_entropy`.

  Returns:
    Two arrays (...) in float32.
  """
  labels = labels[..., None]

  def part(start, size, carry):
    top, total, at = carry
    z = logits(x, cut(w, start, size, axis), axis, softcap)
    new = jnp.maximum(top, z.max(-1))
    total = total * jnp.exp(top - new) + jnp.exp(z - new[..., None]).sum(-1)
    return new, total, at + jnp.where(_hits(labels, start, z), z, 0).sum(-1)

  zeros = _zeros(x, x.shape[:-1])
  start = zeros - jnp.inf, zeros, zeros
  top, total, at = in_parts(_size(x, w, axis), w.shape[axis], part, start)
  return top + jnp.log(total), at


def backward(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  lse: jax.Array,
  g_lse: jax.Array,
  g_at: jax.Array,
  axis: int,
  softcap: float | None,
  filters: tuple[float | None, float | None] = (None, None),
) -> tuple[jax.Array, jax.Array]:
  """Gradients of x and w, from those of what `forward` returns.

  The logits are computed anew. The gradient of w is summed over all rows at
  once, in float32, and that of x over parts of the vocabulary.

  Args:
    x: as in `forward`.
    w: likewise.
    labels: likewise.
    lse: the log-partitions.
    g_lse: gradient with respect to them, (...) in float32.
    g_at: and to the logits at the labels.
    axis: as in `forward`.
    softcap: likewise.
    filters: for the gradients of x and of w, the probability below which a part
      is left out, see `peak`; None for none.

  Returns:
    Two arrays, of the shapes and dtypes of x and w.
  """
  rows = tuple(range(x.ndim - 1))
  per_row = lse[..., None], g_lse[..., None], g_at[..., None]

  def part(start, size, carry):
    dx, dw = carry
    own = cut(w, start, size, axis)
    z = logits(x, own, axis, softcap)
    hits = _hits(labels[..., None], start, z)
    dz = gradient(z, hits, *per_row, softcap).astype(x.dtype)
    # As (size, D) or (D, size).
    pair = (x, dz) if axis else (dz, x)

    def add_dx(dx):
      return dx + dot(dz, own, (x.ndim - 1,), (axis,))

    def put_dw(dw):
      found = dot(*pair, rows, rows).astype(w.dtype)
      return lax.dynamic_update_slice_in_dim(dw, found, start, axis)

    most = peak(z, hits, *per_row)
    return tuple(
      add(old) if eps is None else lax.cond(most >= eps, add, lambda a: a, old)
      for add, old, eps in zip((add_dx, put_dw), (dx, dw), filters, strict=True)
    )

  start = _zeros(x, x.shape), jnp.zeros_like(w)
  dx, dw = in_parts(_size(x, w, axis), w.shape[axis], part, start)
  return dx.astype(x.dtype), dw


def logits(x, w, axis, softcap):
  """Of x (..., D) and w, in float32."""
  return capped(dot(x, w, (x.ndim - 1,), (1 - axis,)), softcap)


def capped(z, softcap):
  return z if softcap is None else softcap * jnp.tanh(z / softcap)


def gradient(z, hits, lse, g_lse, g_at, softcap):
  """Of logits before the cap, given those after it."""
  dz = jnp.exp(z - lse) * g_lse + jnp.where(hits, g_at, 0)
  return dz if softcap is None else dz * (1 - jnp.square(z / softcap))


def _sums(x):
  return jnp.promote_types(x.dtype, jnp.float32)


def _zeros(x, shape):
  return vary(jnp.zeros(shape, _sums(x)), varying(x))


def peak(z, hits, lse, g_lse, g_at):
  """The largest probability in a block of logits, of rows with a gradient.

  2 where one is that of a label, or is no number: no filter leaves it out.
  """
  p = jnp.where(g_lse == 0, 0.0, jnp.exp(z - lse))
  certain = (hits & (g_at != 0)) | ~(p <= 1)
  return jnp.where(certain, 2.0, p).max()


def dot(a, b, i, j):
  """Contracts axes i of a and j of b, in float32."""
  highest = a.dtype == jnp.float32  # else a TPU rounds them to bfloat16
  return lax.dot_general(
    a,
    b,
    ((i, j), ((), ())),
    lax.Precision.HIGHEST if highest else None,
    preferred_element_type=_sums(a),
  )


def cut(w, start, size, axis):
  """A part of the vocabulary."""
  return lax.dynamic_slice_in_dim(w, start, size, axis)


def _hits(labels, start, z):
  index = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
  return labels - start == index


def _size(x, w, axis):
  return columns(math.prod(x.shape[:-1]), w.shape[axis])


def in_parts(size: int, vocabulary: int, part: Callable, carry: Any) -> Any:
  """part(start, size, carry) for all parts, the last one as long as it is.

  Filled up to the length of the others it would add logits that are not there.
  """
  count, rest = divmod(vocabulary, size)
  carry = lax.fori_loop(0, count, lambda i, c: part(i * size, size, c), carry)
  return part(count * size, rest, carry) if rest else carry


def varying(x: jax.Array) -> frozenset[str]:
  """Axes of a mesh over which x may vary, if a shard_map keeps account."""
  kind = jax.typeof(x)
  # jax 0.10 has another name for it.
  return kind.vma if hasattr(kind, 'vma') else kind.manual_axis_type.varying


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """x as one that may vary over these axes, too."""
  axes = axes - varying(x)
  return lax.pcast(x, tuple(axes), to='varying') if axes else x
