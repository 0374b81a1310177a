r"""Few bits simulated in floating point, as published experiments had them.

The 4-bit functions are those of Stable-SPAM's runs, kept as the released code
computes them. Each rounds the groups of `block` neighbours along the flattened
array, the last group being shorter if need be. `truncate` cuts off bits of
bfloat16. All give an array like their argument: nothing is packed; `quantize`
is the one to store arrays with.

References:
  Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
  <https://arxiv.org/abs/2502.17055>`_, 2025
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from frugax.quant.blocks import _blocks, _flat


def fp4_e1m2(x: jax.Array, block: int = 256) -> jax.Array:
  r"""Nine even levels a group, the two largest magnitudes left as they are.

  With :math:`\alpha` the third largest magnitude of the group, 1e-6 at least,

  .. math:: \hat x = \tfrac{\alpha}{4} \, \mathrm{round}(4 x / \alpha)

  for all but the two largest. It goes by the name of FP4 E1M2, but a format
  with these bits has 15 levels: the released formula makes 9 of them.

  Args:
    x: a floating-point array; computed in float32.
    block: elements a group.

  Returns:
    An array of the shape and dtype of `x`.

  Examples:
    >>> print(fp4_e1m2(jnp.array([9., -7., 1., .6, -.2, .1])))
    [ 9.   -7.    1.    0.5  -0.25  0.  ]
  """
  return _beside_outliers(x, block, 1e-6, 4)


def int4_absmax(x: jax.Array, block: int = 256) -> jax.Array:
  r"""Fifteen even levels a group, the two largest magnitudes left as they are.

  With :math:`\alpha` the third largest magnitude of the group, 1e-6 at least,

  .. math:: \hat x = \tfrac{\alpha}{7} \, \mathrm{round}(7 x / \alpha)

  for all but the two largest: what the published 4-bit runs do to activations.

  Args:
    x: a floating-point array; computed in float32.
    block: elements a group.

  Returns:
    An array of the shape and dtype of `x`.

  Examples:
    >>> print(int4_absmax(jnp.array([9., -7., 1.4, .5, -.3, .1])))
    [ 9.        -7.         1.4        0.4       -0.4        0.       ]
  """
  return _beside_outliers(x, block, 1e-6, 7)


def int4_min_max(x: jax.Array, block: int = 256) -> jax.Array:
  r"""Sixteen even levels a group, from its least to its greatest value.

  With :math:`l` and :math:`h` the least and greatest value of the group

  .. math::
    s = \frac{\max(h - l, 10^{-5})}{15}, \qquad
    z = \mathrm{clip}(-\mathrm{round}(l / s), 0, 15), \qquad
    \hat x = s \, (\mathrm{clip}(\mathrm{round}(x / s) + z, 0, 15) - z)

  which is what the published 4-bit runs do to weights. The zero point is one of
  the codes, so a group whose values have all one sign saturates: weights never
  lie so.

  Args:
    x: a floating-point array; computed in float32.
    block: elements a group.

  Returns:
    An array of the shape and dtype of `x`.

  Examples:
    >>> print(int4_min_max(jnp.array([-5., 10., .4, .6])))
    [-5. 10.  0.  1.]
    >>> print(int4_min_max(jnp.array([20., 35.])))
    [15. 15.]
  """

  def group(x):
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = jnp.maximum(high - low, 1e-5) / 15
    zero = jnp.clip(-jnp.round(low / step), 0, 15)
    return step * (jnp.clip(jnp.round(x / step) + zero, 0, 15) - zero)

  return _by_groups(x, block, 'edge', group)


def truncate(x: jax.Array, exponent: int = 8, mantissa: int = 7) -> jax.Array:
  r"""Cut bits off a bfloat16, whose exponent has 8 and whose mantissa has 7.

  Mantissa bits are masked, so numbers go towards zero, to the next one of the
  shorter mantissa: without a scale, and with a bias. Of a shorter exponent, of
  :math:`E` bits around the same middle, the magnitudes from
  :math:`2^{2 - 2^{E-1}}` to below :math:`2^{2^{E-1}}` remain: smaller ones
  become zero and larger ones, infinity among them, the largest. NaN stays.

  Args:
    x: a floating-point array; rounded to the nearest bfloat16 first.
    exponent: bits of the exponent, 2 to 8.
    mantissa: bits of the mantissa, 0 to 7.

  Returns:
    An array of the shape and dtype of `x`.

  Raises:
    ValueError: a number of bits that a bfloat16 has not.

  Examples:
    >>> print(truncate(jnp.array([1.99, -1.3, 3.]), mantissa=1))
    [ 1.5 -1.   3. ]
    >>> print(truncate(jnp.array([100., 0.01, 3.]), exponent=4))
    [100.   0.   3.]

  References:
    Lee et al., `To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability <https://arxiv.org/abs/2405.18710>`_,
    2024
  """
  if not (2 <= exponent <= 8 and 0 <= mantissa <= 7):
    raise ValueError(
      f'exponent={exponent}, mantissa={mantissa}: a bfloat16 has 8 and 7 bits; '
      'give 2 to 8 and 0 to 7'
    )
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  bits = bits & jnp.uint16(0xFFFF << 7 - mantissa & 0xFFFF)
  y = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
  middle = 2 ** (exponent - 1) - 1
  largest = 2.0**middle * (2 - 2.0**-mantissa)
  y = jnp.where(jnp.abs(y) < 2.0 ** (1 - middle), 0, y)
  y = jnp.clip(y, -largest, largest)
  # A NaN whose payload is cut off would have become infinity.
  return jnp.where(jnp.isnan(x), x, y.astype(x.dtype))


def _beside_outliers(x, block, floor, steps):
  def group(x):
    third = _third_largest(jnp.abs(x))
    alpha = jnp.maximum(third, floor)
    rounded = jnp.round(steps * x / alpha) * (alpha / steps)
    return jnp.where(jnp.abs(x) > third, x, rounded)

  return _by_groups(x, block, 'constant', group)


def _third_largest(x):
  """The third of the sorted values, equal ones counted; x is not negative.

  Reductions, as XLA's top_k takes eighty times as long on a CPU.
  """

  def largest(x):
    return x.max(-1, keepdims=True)

  def count(value):
    return (x == value).sum(-1, keepdims=True)

  first = largest(x)
  second = largest(jnp.where(x < first, x, 0))
  third = largest(jnp.where(x < second, x, 0))
  firsts = count(first)
  below = jnp.where(firsts + count(second) > 2, second, third)
  return jnp.where(firsts > 2, first, below)


def _by_groups(
  x: jax.Array,
  block: int,
  fill: str,
  group: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  groups = _blocks(x.astype(jnp.float32).reshape(x.size), block, mode=fill)
  return _flat(group(groups), x.size).reshape(x.shape).astype(x.dtype)
