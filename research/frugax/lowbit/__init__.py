"""Matrix products in few bits, as replacements of `jax.lax.dot_general`."""

from frugax.lowbit.cuts import Cut, Layout
from frugax.lowbit.flow import FLOWS, Flow, flow, keep_in_few_bits
from frugax.lowbit.linear import dot_general, dot_generals
from frugax.lowbit.operands import Operand, Product, Recipe, Rotation
from frugax.lowbit.recipes import RECIPES, recipe
from frugax.lowbit.stored import attach, load_weights, store_weights

__all__ = [
  'FLOWS',
  'RECIPES',
  'Cut',
  'Flow',
  'Layout',
  'Operand',
  'Product',
  'Recipe',
  'Rotation',
  'attach',
  'dot_general',
  'dot_generals',
  'flow',
  'keep_in_few_bits',
  'load_weights',
  'recipe',
  'store_weights',
]
