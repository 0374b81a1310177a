r"""4-bit values simulated in floating point, as Stable-SPAM's runs had them.

Each function rounds the groups of `block` neighbours along the flattened array,
the last group being shorter if need be, and gives an array like its argument:
nothing is packed. These are the formats of a published experiment, kept as its
released code computes them; `quantize` is the one to store arrays with.

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
