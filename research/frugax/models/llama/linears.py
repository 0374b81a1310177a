"""The linears of a layer, those of one input computed together."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from frugax import lowbit
from frugax.models.llama import axes
from frugax.models.llama.config import LlamaConfig

SAVED = 'linear'  # what `remat='linears'` keeps
ROUNDING = 'rounding'  # the name of linen's random bits for products


def identity(x, names):
  """What a model does to arrays without a mesh."""
  return x


def normal(std):
  """An initializer."""

  # Drawn in float32 and then rounded: a bfloat16 draw has 128 distinct values.
  def init(key, shape, dtype):
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

  return init


def rounding_key(module: nn.Module) -> jax.Array | None:
  """A key of the module and the call, if random bits are given to it."""
  return module.make_rng(ROUNDING) if module.has_rng(ROUNDING) else None


def rounding_keys(
  config: LlamaConfig, key: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
  """What `Llama.apply` makes of its key, for who walks the layers himself.

  Args:
    config: the model's.
    key: a key, typed or not; or None.

  Returns:
    The keys of the layers' `Llama.block`, stacked, and that of `Llama.head`;
    None for both if there is none.
  """
  if key is None:
    return None, None
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  each = jax.random.split(key, config.n_layers + 1)
  return each[:-1], each[-1]


def one_by_one(dots: Sequence[Callable]) -> Callable:
  """(x, kernels, dimension numbers) -> a product with each, by its own dot."""

  def products(x, kernels, dimension_numbers):
    return [
      dot(x, kernel, dimension_numbers)
      for dot, kernel in zip(dots, kernels, strict=True)
    ]

  return products


def plain(paths, key=None):
  """Products in the dtype of the operands."""
  del key
  return one_by_one([lax.dot_general] * len(paths))


def cut(config, path, layout):
  """How `lowbit.dot_general` finds a linear's arrays on a mesh."""
  if layout is None:
    return None
  names = axes.of_linear(config, path)
  return lowbit.Cut(layout, ('batch', 'sequence'), names)


def by_recipe(
  config: LlamaConfig,
  dot_general: Callable | None = None,
  wrap: Callable | None = None,
  layout: lowbit.Layout | None = None,
) -> Callable:
  """Products as the recipes of the config say: of one recipe, together.

  Args:
    config: names the recipe of each linear.
    dot_general: computes all of them in its place, one by one.
    wrap: (path, dot_general) -> another one; with it they are one by one, too.
    layout: see `Llama`.

  Returns:
    (paths of linears of the same input, key of what is random or None) -> what
    `one_by_one` returns.
  """

  def product(paths, key=None):
    if dot_general is not None:
      return one_by_one([dot_general] * len(paths))
    recipes = [lowbit.recipe(config.recipe_of(path)) for path in paths]
    cuts = [cut(config, path, layout) for path in paths]
    if wrap is not None:
      dots = [
        lowbit.dot_general(recipe, key, cut=own)
        for recipe, own in zip(recipes, cuts, strict=True)
      ]
      return one_by_one(list(map(wrap, paths, dots)))

    def products(x, kernels, dimension_numbers):
      out = {}
      for recipe in dict.fromkeys(recipes):
        where = [i for i, other in enumerate(recipes) if other == recipe]
        own = [cuts[i] for i in where]
        dots = lowbit.dot_generals(recipe, key, cuts=own)
        ys = dots(x, [kernels[i] for i in where], dimension_numbers)
        out |= zip(where, ys, strict=True)
      return [out[i] for i in range(len(recipes))]

    return products

  return product


def head(
  config: LlamaConfig,
  wrap: Callable | None = None,
  layout: lowbit.Layout | None = None,
) -> Callable:
  """(key or None) -> the `dot_general` of the head; arguments: `by_recipe`."""
  own = cut(config, 'lm_head', layout)
  recipe = lowbit.recipe(config.matmul_head)

  def product(key=None):
    dot = lowbit.dot_general(recipe, key, cut=own)
    return dot if wrap is None else wrap('lm_head', dot)

  return product


class _Kernel(nn.Module):
  """A parameter at the path that `nn.Dense` gives it."""

  config: LlamaConfig
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self):
    config = self.config
    init, dtype = normal(config.init_std), jnp.dtype(config.param_dtype)
    return self.param('kernel', init, self.shape, dtype).astype(config.dtype)


class Linears(nn.Module):
  """Base of the modules whose matmuls go through `product(paths, key)`.

  Attributes:
    config: the model's.
    product: gives, for the paths of linears of the same input and a key, a
      function of the input, their kernels and dimension numbers, that computes
      them.
    constrain: see `Llama`.
  """

  config: LlamaConfig
  product: Callable
  constrain: Callable

  def linears(self, x, features, axes=1):
    """Products of x with a kernel for each name in `features`.

    Args:
      x: the input, whose last axes are contracted.
      features: name -> the axes of what the linear gives, as a tuple.
      axes: how many axes are contracted.

    Returns:
      A list of arrays.
    """
    inputs = x.shape[x.ndim - axes :]
    kernels = [
      _Kernel(self.config, (*inputs, *outputs), name=name)()
      for name, outputs in features.items()
    ]
    paths = [f'{self.name}/{name}' for name in features]
    products = self.product(paths, rounding_key(self))
    dims = (tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes)))
    ys = products(x.astype(self.config.dtype), kernels, (dims, ((), ())))
    return [checkpoint_name(y, SAVED) for y in ys]
