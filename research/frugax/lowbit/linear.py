"""Linear layers in few bits: a product and both gradients, as a recipe says."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from frugax.lowbit import multiply
from frugax.lowbit.operands import SIMULATED, Operand, Recipe, Rotation
from frugax.quant import elements, hadamard, quantize_tiles
from frugax.quant.tiles import Tiled, dequantize_tiles, within

_LARGEST = 2.0**100


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
  if recipe == Recipe():
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
    return _linear(layer, _view(lhs, lb, lc), _view(rhs, rb, rc), key)

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


def _view(x, batch, contracted):
  """(*batch, *rows, columns), the columns being all contracted axes."""
  batch, contracted = tuple(batch), tuple(contracted)
  rows = [i for i in range(x.ndim) if i not in (*batch, *contracted)]
  x = x.transpose(*batch, *rows, *contracted)
  kept = len(batch) + len(rows)
  return x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))


# Of views alone: transposes and reshapes around it differentiate themselves.
# x is (*batch, *rows, columns), w (*batch, *units, columns), and the result
# (*batch, *rows, *units).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(layer, x, w, key):
  return _forward(layer, x, w, key)[0]


def _forward(layer, x, w, key):
  product = layer.recipe.forward
  keys = _keys(key, 0, x, w)
  left, left_mask = _rounded(layer, product, 'left', x, keys[0])
  right, _ = _rounded(layer, product, 'right', w, keys[1])
  y = layer.multiply(left, right)
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
      layer, recipe.forward, 'left', kept, _keys(key, 0, kept, w)[0]
    )
  forward_w, w_mask = _rounded(
    layer, recipe.forward, 'right', w, _keys(key, 0, w, w)[1]
  )
  g = g.astype(layer.dtype)
  rows = len(shape) - 1  # axes of g before the units

  # Of x: g (*batch, *rows, units) by w (*batch, columns, units).
  product = recipe.input_grad
  own, rotation = product.right.source == 'array', product.rotation
  left = _merge(g, rows)
  along_rows = rotation is not None and rotation.along == 'rows'
  if along_rows:
    left = _merge(left, batch, -1)
  key_g, key_w = _keys(key, 1, left, w)
  signs = key_g if rotation and rotation.signs == 'fresh' else None
  if along_rows:
    left = _rotate(left, rotation, signs, axis=-2)
  left, _ = _operand(layer, product.left, _turned(left, rotation, signs), key_g)
  right = w if own else _array(forward_w, w.dtype)
  right = jnp.moveaxis(right, -1, batch)
  right = _turned(_merge(right, batch + 1), rotation, signs)
  right, _ = _operand(layer, product.right, right, key_w)
  dx = layer.multiply(left, right)
  if along_rows:
    dx = _rotate(dx, rotation, signs, axis=-2, inverse=True)
  dx = _unturned(recipe.forward.rotation, dx.reshape(shape), mask, own)

  # Of w: g (*batch, *units, rows) by x (*batch, columns, rows).
  product = recipe.weight_grad
  own = product.right.source == 'array'
  left = _tokens_last(g, batch, rows)
  key_g, _ = _keys(key, 2, left, left)
  signs = None
  if product.rotation and product.rotation.signs == 'fresh':
    signs = key_g
  left = _turned(left, product.rotation, signs)
  left, _ = _operand(layer, product.left, left, key_g)
  if own and coded is not None:
    right = coded
  elif own:
    right = _weight_grad_right(layer, kept, signs, key)
  else:
    right = _array(forward_x, dtype)
    right = _tokens_last_of_x(right, batch)
    right = _turned(right, product.rotation, signs)
    right, _ = _operand(layer, product.right, right, _keys(key, 2, w, w)[1])
  dw = layer.multiply(left, right)
  dw = _unturned(recipe.forward.rotation, dw.reshape(w.shape), w_mask, own)
  return dx.astype(dtype), dw.astype(w.dtype), None


_linear.defvjp(_forward, _backward)


def _weight_grad_right(layer, x, signs, key):
  """The activations as the gradient of the weights multiplies them."""
  product = layer.recipe.weight_grad
  right = _tokens_last_of_x(x, layer.batch)
  key = _keys(key, 2, right, right)[1]
  right = _turned(right, product.rotation, signs)
  return _operand(layer, product.right, right, key)[0]


def _tokens_last_of_x(x, batch):
  """(*batch, *rows, columns) to (*batch, columns, rows)."""
  return _merge(jnp.moveaxis(x, -1, batch), batch + 1)


def _tokens_last(g, batch, rows):
  """(*batch, *rows, *units) to (*batch, *units, rows)."""
  n = g.ndim
  order = (*range(batch), *range(rows, n), *range(batch, rows))
  return _merge(g.transpose(order), batch + n - rows)


def _merge(x, start, stop=None):
  """The axes from start to stop as one."""
  stop = x.ndim if stop is None else stop % x.ndim
  size = math.prod(x.shape[start:stop])
  return x.reshape(*x.shape[:start], size, *x.shape[stop:])


def _rounded(layer, product, side, x, key):
  """An operand of the forward product, and its mask."""
  x = _turned(x, product.rotation, None)
  return _operand(layer, getattr(product, side), x, key)


def _operand(layer, operand: Operand, x, key):
  """The operand as a Tiled, or an array, and its mask or None."""
  if operand.format is None:
    return x, None
  scaling = operand.scaling
  if operand.format in SIMULATED:
    return SIMULATED[operand.format](x, scaling.tile[1]), None
  key = key if operand.stochastic else None
  q = quantize_tiles(x, operand.format, scaling, layer.batch, key)
  if operand.mask == 'none':
    return q, None
  return q, within(x, q, 0.0 if operand.mask == 'clip' else 0.5)


def _array(x, dtype):
  return dequantize_tiles(x, dtype) if isinstance(x, Tiled) else x


def _turned(x, rotation: Rotation | None, signs):
  """Rotated along the columns, if that is what the rotation is of."""
  if rotation is None or rotation.along != 'contracted':
    return x
  return _rotate(x, rotation, signs)


def _rotate(x, rotation, signs, axis=-1, inverse=False):
  """In float32. Sums of infinities of both signs would be NaN."""
  x = jnp.clip(x.astype(jnp.float32), -_LARGEST, _LARGEST)
  if rotation.signs == 'fixed':
    signs = jax.random.key(0, impl='threefry2x32')
  return hadamard(x, axis, rotation.block, signs, inverse)


def _unturned(rotation, x, mask, own):
  """A gradient in the basis of the layer's arrays, where its mask lets it pass.

  Where the other operand was that of the forward product, the gradient is that
  of the rotated array, and so is the mask.
  """
  if rotation is None or (own and mask is None):
    return x if mask is None else jnp.where(mask, x, 0)
  if own:
    x = _rotate(x, rotation, None)
  if mask is not None:
    x = jnp.where(mask, x, 0)
  return _rotate(x, rotation, None, inverse=True)


def _keys(key, product, left, right):
  """One key for each operand of a product."""
  out = []
  for i, x in enumerate((left, right)):
    k = _content_key(x) if key is None else key
    out.append(jax.random.fold_in(k, 2 * product + i))
  return out


def _content_key(x):
  """A key from the bits of an array.

  Sums of integers, which do not depend on the order and so not on the mesh.
  """
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  mixed = (bits ^ bits >> 15) * jnp.uint32(0x85EBCA6B)
  words = jnp.stack([bits.sum(), (mixed ^ mixed >> 13).sum()])
  return jax.random.wrap_key_data(words, impl='threefry2x32')
