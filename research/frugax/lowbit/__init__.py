"""Matrix products in few bits, as replacements of `jax.lax.dot_general`."""

from frugax.lowbit.linear import dot_general
from frugax.lowbit.operands import Operand, Product, Recipe, Rotation
from frugax.lowbit.recipes import RECIPES, recipe

__all__ = [
  'RECIPES',
  'Operand',
  'Product',
  'Recipe',
  'Rotation',
  'dot_general',
  'recipe',
]
