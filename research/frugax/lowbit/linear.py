"""Linear layers in few bits: a product and both gradients, as a recipe says."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from frugax.lowbit import matrices, multiply
from frugax.lowbit.keys import operand_keys
from frugax.lowbit.operands import Recipe
from frugax.quant import elements
from frugax.quant.tiles import Tiled


def dot_general(
  recipe: Recipe, key: jax.Array | None = None, native: bool | None = None
) -> Callable[..., jax.Array]:
  """A function like `jax.lax.dot_general`, computed as a recipe says.

  Both operands are seen as stacks of matrices whose columns are contracted:
  kept axes form the rows, several contracted axes one, in the order in which
  the dimension numbers name them. Each of the three products rounds its own
  operands, and scales and groups lie along the axes of that product.

  Where both operands have a scale a row, or one for all, the codes themselves
  are multiplied: integers as int8 with sums in int32, 8-bit floats as they are.
  Mid-rise numbers are integers and a half, so their products take sums over
  rows besides. All else is multiplied in the operands' dtype.

  For the backward pass stay the weights, as they are, and of the activations
  the codes that the weights' gradient multiplies (with a mask, a bit each).
  Where that product leaves the activations alone, or draws fresh signs, or the
  recipe says 'arrays', the activations stay instead.

  It is differentiable once, in reverse. Random bits come from a hash of the
  place in the array and a key, and so they are the same on any mesh.

  Args:
    recipe: from `recipe(name)`.
    key: a typed key for what is random, the same in every call. None takes it
      from the bits of the array that is rounded: without a state it is another
      one in each step and layer, and the same one where the backward pass
      computes a layer again.
    native: whether codes are multiplied as they are. None does so except on
      CPUs, where products of wider numbers are faster.

  Returns:
    The function. Its left operand is the activations, its right one the
    weights.

  Examples:
    >>> from frugax import lowbit
    >>> dot = lowbit.dot_general(lowbit.recipe('int8'))
    >>> x, w = jnp.ones((2, 3)), jnp.array([[-64.], [1.4], [127.]])
    >>> print(dot(x, w, (((1,), (0,)), ((), ()))).round(1))
    [[64.]
     [64.]]
  """
  if dataclasses.replace(recipe, weights='none', flow='none') == Recipe():
    return lax.dot_general

  def dot(
    lhs,
    rhs,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    *,
    out_sharding=None,
  ):
    if out_sharding is not None:
      raise ValueError(
        'low-bit products take no out_sharding: constrain the result with '
        'jax.lax.with_sharding_constraint'
      )
    for x in (lhs, rhs):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
          f'low-bit products take floating-point arrays, not {x.dtype}'
        )
    (lc, rc), (lb, rb) = dimension_numbers
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    layer = _Layer(
      recipe, len(lb), dtype, native, precision, preferred_element_type
    )
    return _linear(
      layer, matrices.view(lhs, lb, lc), matrices.view(rhs, rb, rc), key
    )

  return dot


class _Layer(NamedTuple):
  """All that is static."""

  recipe: Recipe
  batch: int
  dtype: object
  native: bool | None
  precision: object
  preferred: object

  def multiply(self, left, right):
    return multiply.rows_by_rows(
      left, right, self.batch, self.dtype, self.native, self.precision
    )


# Of views alone: transposes and reshapes around it differentiate themselves.
# x is (*batch, *rows, columns), w (*batch, *units, columns), and the result
# (*batch, *rows, *units).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(layer, x, w, key):
  return _forward(layer, x, w, key)[0]


def _forward(layer, x, w, key):
  product = layer.recipe.forward
  keys = operand_keys(key, 0, x, w)
  left, left_mask = _rounded(layer, product, 'left', x, keys[0])
  right, _ = _rounded(layer, product, 'right', w, keys[1])
  y = layer.multiply(left, right)
  y = _result(layer, product, 3, y, key)
  return y.astype(layer.preferred or layer.dtype), _residuals(
    layer, x, w, key, left, left_mask
  )


def _residuals(layer, x, w, key, left, mask):
  recipe = layer.recipe
  operand, rotation = recipe.weight_grad.right, recipe.weight_grad.rotation
  fresh = rotation is not None and rotation.signs == 'fresh'
  if operand.source == 'forward':
    coded = left if isinstance(left, Tiled) else None
  elif operand.format in elements.ELEMENTS and not fresh:
    coded = _weight_grad_right(layer, x, None, key)
  else:
    coded = None
  if recipe.residuals == 'arrays' or coded is None:
    return x, w, key
  if mask is not None:
    mask = elements.pack(mask, 1)
  # An array of no elements brings x's shape and dtype along.
  return (coded, mask, jnp.zeros((0, *x.shape), x.dtype)), w, key


def _backward(layer, residuals, g):
  kept, w, key = residuals
  recipe, batch = layer.recipe, layer.batch
  if isinstance(kept, tuple):
    coded, mask, like = kept
    shape, dtype = like.shape[1:], like.dtype
    forward_x = coded if recipe.weight_grad.right.source == 'forward' else None
    if mask is not None:
      mask = elements.unpack(mask, 1, shape[-1]).astype(bool)
  else:
    coded, shape, dtype = None, kept.shape, kept.dtype
    forward_x, mask = _rounded(
      layer, recipe.forward, 'left', kept, operand_keys(key, 0, kept, w)[0]
    )
  forward_w, w_mask = _rounded(
    layer, recipe.forward, 'right', w, operand_keys(key, 0, w, w)[1]
  )
  g = g.astype(layer.dtype)
  rows = len(shape) - 1  # axes of g before the units

  # Of x: g (*batch, *rows, units) by w (*batch, columns, units).
  product = recipe.input_grad
  own, rotation = product.right.source == 'array', product.rotation
  left = matrices.merge(g, rows)
  along_rows = rotation is not None and rotation.along == 'rows'
  if along_rows:
    left = matrices.merge(left, batch, -1)
  key_g, key_w = operand_keys(key, 1, left, w)
  signs = key_g if rotation and rotation.signs == 'fresh' else None
  if along_rows:
    left = matrices.rotate(left, rotation, signs, axis=-2)
  left, _ = matrices.rounded(
    product.left, matrices.turned(left, rotation, signs), layer.batch, key_g
  )
  right = w if own else matrices.as_array(forward_w, w.dtype)
  right = jnp.moveaxis(right, -1, batch)
  right = matrices.turned(matrices.merge(right, batch + 1), rotation, signs)
  right, _ = matrices.rounded(product.right, right, layer.batch, key_w)
  dx = layer.multiply(left, right)
  if along_rows:
    dx = matrices.rotate(dx, rotation, signs, axis=-2, inverse=True)
  dx = _unturned(recipe.forward.rotation, dx.reshape(shape), mask, own)
  dx = _result(layer, product, 4, dx, key)

  # Of w: g (*batch, *units, rows) by x (*batch, columns, rows).
  product = recipe.weight_grad
  own = product.right.source == 'array'
  left = matrices.tokens_last(g, batch, rows)
  key_g, _ = operand_keys(key, 2, left, left)
  signs = None
  if product.rotation and product.rotation.signs == 'fresh':
    signs = key_g
  left = matrices.turned(left, product.rotation, signs)
  left, _ = matrices.rounded(product.left, left, layer.batch, key_g)
  if own and coded is not None:
    right = coded
  elif own:
    right = _weight_grad_right(layer, kept, signs, key)
  else:
    right = matrices.as_array(forward_x, dtype)
    right = matrices.columns_first(right, batch)
    right = matrices.turned(right, product.rotation, signs)
    right, _ = matrices.rounded(
      product.right, right, layer.batch, operand_keys(key, 2, w, w)[1]
    )
  dw = layer.multiply(left, right)
  dw = _unturned(recipe.forward.rotation, dw.reshape(w.shape), w_mask, own)
  dw = _result(layer, product, 5, dw, key)
  return dx.astype(dtype), dw.astype(w.dtype), None


_linear.defvjp(_forward, _backward)


def _weight_grad_right(layer, x, signs, key):
  """The activations as the gradient of the weights multiplies them."""
  product = layer.recipe.weight_grad
  right = matrices.columns_first(x, layer.batch)
  key = operand_keys(key, 2, right, right)[1]
  right = matrices.turned(right, product.rotation, signs)
  return matrices.rounded(product.right, right, layer.batch, key)[0]


def _rounded(layer, product, side, x, key):
  """An operand of the forward product, and its mask."""
  x = matrices.turned(x, product.rotation, None)
  return matrices.rounded(getattr(product, side), x, layer.batch, key)


def _result(layer, product, index, y, key):
  """What a product gives, rounded if the recipe says so."""
  if product.result.format is None:
    return y
  key = operand_keys(key, index, y, y)[0] if product.result.stochastic else None
  return matrices.as_array(
    matrices.rounded(product.result, y, layer.batch, key)[0], y.dtype
  )


def _unturned(rotation, x, mask, own):
  """A gradient in the basis of the layer's arrays, where its mask lets it pass.

  Where the other operand was that of the forward product, the gradient is that
  of the rotated array, and so is the mask.
  """
  if rotation is None or (own and mask is None):
    return x if mask is None else jnp.where(mask, x, 0)
  if own:
    x = matrices.rotate(x, rotation, None)
  if mask is not None:
    x = jnp.where(mask, x, 0)
  return matrices.rotate(x, rotation, None, inverse=True)
