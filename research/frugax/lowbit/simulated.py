"""Linear layers whose operands are rounded to few bits and then multiplied."""

import dataclasses
from collections.abc import Callable

import jax
from jax import lax

from frugax import names
from frugax.quant import simulated

FORMATS = {
  'fp4_e1m2': simulated.fp4_e1m2,
  'int4_min_max': simulated.int4_min_max,
  'int4_absmax': simulated.int4_absmax,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the operands of a linear layer are rounded; None leaves one alone.

  Attributes:
    activations: format of the left operand, a name in `FORMATS`.
    weights: format of the right operand.
    block: elements that share a scale, along the contracted axes.

  Raises:
    ValueError: an unknown format, or a block below 1.
  """

  activations: str | None = None
  weights: str | None = None
  block: int = 256

  def __post_init__(self):
    for format in (self.activations, self.weights):
      if format is not None and format not in FORMATS:
        raise names.unknown('format', format, FORMATS)
    if self.block < 1:
      raise ValueError(
        f'block={self.block}: give the elements a block, at least 1'
      )


RECIPES = {
  'none': Recipe(),
  'fp4_sim': Recipe(activations='fp4_e1m2', weights='fp4_e1m2'),
  'int4_sim': Recipe(activations='int4_absmax', weights='int4_min_max'),
}


def recipe(name: str) -> Recipe:
  """The recipe of a name.

  Args:
    name: 'none' rounds nothing. 'fp4_sim' and 'int4_sim' are the 4-bit setups
      of the Stable-SPAM paper, simulated: they show what 4-bit training does
      to the loss, on any device, and cost time instead of saving it.

  Returns:
    The recipe.

  Raises:
    ValueError: an unknown name, with the nearest valid one.

  Examples:
    >>> recipe('int4_sim')
    Recipe(activations='int4_absmax', weights='int4_min_max', block=256)

  References:
    Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
    Adam <https://arxiv.org/abs/2502.17055>`_, 2025
  """
  if name not in RECIPES:
    raise names.unknown('low-bit recipe', name, RECIPES)
  return RECIPES[name]


def dot_general(recipe: Recipe) -> Callable[..., jax.Array]:
  r"""A function like `jax.lax.dot_general` with both operands rounded.

  With activations :math:`x`, weights :math:`w` and their rounded forms

  .. math::
    y = \hat x \hat w, \qquad
    \bar x = \bar y \hat w^T, \qquad
    \bar w = \hat x^T \bar y

  The rounding passes gradients straight through, so both gradients are those of
  a product of the rounded operands, and :math:`\bar y` is rounded nowhere.

  Groups run along the contracted axes and, where these are no multiple of the
  block, on into the next row: the layout of a torch weight (out, in). A group
  may therefore lie on two devices, and the rounding of a sharded array may
  gather it.

  Args:
    recipe: from `recipe(name)`.

  Returns:
    The function, its left operand the activations, its right one the weights.

  Examples:
    >>> import jax.numpy as jnp
    >>> dot = dot_general(recipe('int4_sim'))
    >>> x, w = jnp.ones((2, 3)), jnp.array([[-5.], [.6], [10.]])
    >>> print(dot(x, w, (((1,), (0,)), ((), ()))))
    [[6.]
     [6.]]
  """
  if recipe == Recipe():
    return lax.dot_general

  def dot(lhs, rhs, dimension_numbers, *args, **kwargs):
    (lhs_axes, rhs_axes), _ = dimension_numbers
    lhs = _rounded(lhs, lhs_axes, recipe.activations, recipe.block)
    rhs = _rounded(rhs, rhs_axes, recipe.weights, recipe.block)
    return lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)

  return dot


def _rounded(x, axes, format, block):
  """Rounded in groups along `axes`, which come last in the order of groups."""
  if format is None:
    return x
  order = [i for i in range(x.ndim) if i not in axes] + list(axes)
  back = sorted(range(x.ndim), key=order.__getitem__)

  @jax.custom_jvp
  def rounded(x):
    return FORMATS[format](x.transpose(order), block).transpose(back)

  rounded.defjvps(lambda tangent, _, x: tangent)
  return rounded(x)
