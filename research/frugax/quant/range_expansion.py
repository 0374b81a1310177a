"""8-bit floats with the dynamic range of each group expanded to theirs."""

import math

import jax
import jax.numpy as jnp

from frugax.quant import groups

FLOATS = {'fp8_e4m3': jnp.float8_e4m3fn, 'fp8_e5m2': jnp.float8_e5m2}


def expand(
  x: jax.Array, format: str, group: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Groups to 8-bit floats, in a power that fills the floats' range.

  With M and m the largest and the least nonzero magnitude of a group and f the
  largest float of the format

  .. math::
    k = \frac{1}{16} \left\lfloor 16 \,
      \frac{\log_2 (f^2/2)}{\log_2 (M/m)} \right\rfloor, \qquad
    q = \mathrm{round}\left(f \, \mathrm{sign}(x)
      \left(\frac{|x|}{M}\right)^{k}\right)

  Groups of a narrower range than the format's (k > 1) get more significant
  bits; in groups of a wider one (k < 1) nothing underflows. Zeros stay zeros
  and do not count as m; k is between 1/16 and 255/16, which is also that of a
  constant group and of zeros alone.

  The released COAT differs in three ways. It adds 1e-30 to both M and m, so
  that one exact zero makes the range 1e30 and k an eighth. A constant group has
  M/m = 1 and k infinite. And it centres x on :math:`\sqrt{Mm}` before the power
  and scales after it, which needs a third number a group and cancels.

  Args:
    x: (*rows, n) in float32.
    format: a name in `FLOATS`.
    group: elements a group, along the last axis.

  Returns:
    The bits of q in uint8 and, for each group, M in float32 and 16 k in uint8.

  References:
    Xi et al., `COAT: Compressing Optimizer States and Activation for
    Memory-Efficient FP8 Training <https://arxiv.org/abs/2410.19313>`_, 2024
  """
  dtype = FLOATS[format]
  top = float(jnp.finfo(dtype).max)
  size = jnp.abs(x)
  most = groups.largest(size, group)
  least = -groups.largest(jnp.where(size > 0, -size, -jnp.inf), group)
  # Of zeros alone the difference is -inf, and the power is the largest.
  span = jnp.maximum(jnp.log2(most) - jnp.log2(least), 0)
  powers = jnp.clip(jnp.floor(16 * math.log2(top**2 / 2) / span), 1, 255)
  # The logarithm of the quotient would be less exact for numbers near M.
  share = size / groups.spread(jnp.where(most > 0, most, 1), group, x.shape)
  share = jnp.exp2(groups.spread(powers / 16, group, x.shape) * jnp.log2(share))
  q = jnp.copysign(top * share, x).astype(dtype)
  return (
    jax.lax.bitcast_convert_type(q, jnp.uint8),
    most,
    powers.astype(jnp.uint8),
  )


def contract(
  codes: jax.Array,
  most: jax.Array,
  powers: jax.Array,
  format: str,
  group: int,
) -> jax.Array:
  """The inverse of `expand`, up to its rounding.

  Args:
    codes: bits of 8-bit floats, (*rows, n).
    most: (*rows, groups).
    powers: of the same shape.
    format: a name in `FLOATS`.
    group: elements a group.

  Returns:
    An array in float32.
  """
  dtype = FLOATS[format]
  q = jax.lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)
  share = jnp.abs(q) / float(jnp.finfo(dtype).max)
  root = 16 / jnp.maximum(powers, 1).astype(jnp.float32)
  size = jnp.exp2(groups.spread(root, group, q.shape) * jnp.log2(share))
  size = size * groups.spread(most, group, q.shape)
  return jnp.copysign(size, q)
