"""Matrix products in few bits, as replacements of `jax.lax.dot_general`."""

from frugax.lowbit.simulated import RECIPES, Recipe, dot_general, recipe

__all__ = ['RECIPES', 'Recipe', 'dot_general', 'recipe']
