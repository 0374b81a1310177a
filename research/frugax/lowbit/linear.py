"""Linear layers in few bits: a product and both gradients, as a recipe says."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from frugax.lowbit import matrices, multiply
from frugax.lowbit.cuts import Cut
from frugax.lowbit.keys import operand_keys, weights_key
from frugax.lowbit.operands import Recipe
from frugax.quant import elements
from frugax.quant.tiles import Tiled


def dot_general(
  recipe: Recipe,
  key: jax.Array | None = None,
  native: bool | None = None,
  cut: Cut | None = None,
  implementation: str | None = None,
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

  On TPUs that gain by it (`frugax.kernels.blocks.fuses`) the kernel of the
  forward product rounds the activations, too, to the codes that XLA would find:
  of 'int8' and 'int4', where a row lies on one device.

  For the backward pass stay the weights, as they are, and of the activations
  the codes that the weights' gradient multiplies (with a mask, a bit each).
  Where that product leaves the activations alone, or draws fresh signs, or the
  recipe says 'arrays', the activations stay instead.

  It is differentiable once, in reverse. Random bits come from a hash of the
  place in the array and a key: with a key that is given, the same on any mesh,
  and those of the weights' number among several (`dot_generals`).

  Args:
    recipe: from `recipe(name)`.
    key: a typed key for what is random, the same in every call: give one for
      each step and layer. None takes it from the bits of the array that is
      rounded: without a state it is another one in each step and layer, and the
      same one where the backward pass computes a layer again; but where a mesh
      sums in another order, and a last bit differs, it is another one, too.
    native: whether codes are multiplied as they are. None does so except on
      CPUs, where products of wider numbers are faster.
    cut: how activations and weights are cut over a mesh; None leaves it to XLA.
      Weights are rounded where they lie, and travel in few bits: of at most 4
      bits as bytes of several codes. Each device multiplies its own parts, by
      the kernels of `frugax.kernels` where it gains by them, and sums over
      devices travel in the layer's dtype, those of the weights' gradient to
      where these are stored. (Not where several axes are one and not the first
      of them alone is cut, such as tokens of a sequence that is cut.)
    implementation: 'xla' for products and rounding without kernels; None for
      kernels where the chip gains by them: elsewhere XLA multiplies, which a
      warning of the logger 'frugax' says once. The codes are the same.

  Returns:
    The function. Its left operand is the activations, its right one the
    weights.

  Raises:
    ValueError: another implementation.

  Examples:
    >>> from frugax import lowbit
    >>> dot = lowbit.dot_general(lowbit.recipe('int8'))
    >>> x, w = jnp.ones((2, 3)), jnp.array([[-64.], [1.4], [127.]])
    >>> print(dot(x, w, (((1,), (0,)), ((), ()))).round(1))
    [[64.]
     [64.]]
  """
  _check(implementation)
  if _is_plain(recipe):
    return lax.dot_general
  how = recipe, key, native, implementation, (cut,)

  def dot(lhs, rhs, *args, **kwargs):
    return _products(*how, lhs, (rhs,), *args, **kwargs)[0]

  return dot


def dot_generals(
  recipe: Recipe,
  key: jax.Array | None = None,
  native: bool | None = None,
  cuts: Sequence[Cut | None] | None = None,
  implementation: str | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
  r"""Several linear layers of the same activations, such as q, k and v.

  .. math::
    y_i = \langle x \rangle \langle w_i \rangle, \qquad
    \bar x = \sum_i \langle \bar y_i \rangle \langle w_i^T \rangle, \qquad
    \bar w_i = \langle x^T \rangle \langle \bar y_i \rangle

  The numbers are those of `dot_general` for each of the weights, to within the
  order of sums: every weight and every gradient has scales of its own, those
  for a whole matrix included. But the activations are rounded once, and one
  copy of their codes (and of their mask) stays for the backward pass.

  The forward product is one, as wide as all weights, or as what each device has
  of them. On a mesh without `cuts`, where weights would have to change places
  for that, each has its own product with the same codes. So have the gradients,
  which contract over the units of one weight, or round what they multiply with
  for each of the gradients.

  Args:
    recipe: as in `dot_general`. With `fuse=False` every weight is a layer of
      its own.
    key: as in `dot_general`.
    native: as in `dot_general`.
    cuts: the `cut` of each of the weights; None for none.
    implementation: as in `dot_general`.

  Returns:
    A function like `jax.lax.dot_general` whose right operand is a sequence of
    weights, with the same dimension numbers, and whose result is a tuple.

  Examples:
    >>> from frugax import lowbit
    >>> dots = lowbit.dot_generals(lowbit.recipe('int8'))
    >>> x, w = jnp.ones((2, 3)), jnp.array([[-64.], [1.4], [127.]])
    >>> y, z = dots(x, (w, jnp.ones((3, 5))), (((1,), (0,)), ((), ())))
    >>> print(y.round(1).ravel(), z.shape)
    [64. 64.] (2, 5)

  References:
    Xi et al., `COAT: Compressing Optimizer States and Activation for
    Memory-Efficient FP8 Training <https://arxiv.org/abs/2410.19313>`_, 2024
    (what is saved of activations, and how often)
  """
  _check(implementation)
  how = recipe, key, native, implementation
  if recipe.fuse and not _is_plain(recipe):
    return functools.partial(_products, *how, cuts)

  def dots(lhs, rhs, *args, **kwargs):
    each = cuts or [None] * len(rhs)
    if _is_plain(recipe):
      return tuple(lax.dot_general(lhs, w, *args, **kwargs) for w in rhs)
    return tuple(
      _products(*how, (cut,), lhs, (w,), *args, first=i, **kwargs)[0]
      for i, (w, cut) in enumerate(zip(rhs, each, strict=True))
    )

  return dots


def _is_plain(recipe):
  bare = dataclasses.replace(recipe, weights='none', flow='none', fuse=True)
  return bare == Recipe()


def _check(implementation):
  if implementation not in (None, 'xla'):
    raise ValueError(
      f"implementation={implementation!r} of linear layers: give 'xla', or "
      'None for kernels where the chip gains by them'
    )


def _products(
  recipe,
  key,
  native,
  implementation,
  cuts,
  lhs: jax.Array,
  rhs: Sequence[jax.Array],
  dimension_numbers,
  precision=None,
  preferred_element_type=None,
  *,
  out_sharding=None,
  first=0,
):
  if out_sharding is not None:
    raise ValueError(
      'low-bit products take no out_sharding: constrain the result with '
      'jax.lax.with_sharding_constraint'
    )
  for x in (lhs, *rhs):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f'low-bit products take floating-point arrays, not {x.dtype}'
      )
  (lc, rc), (lb, rb) = dimension_numbers
  dtype = jnp.result_type(lhs.dtype, *(w.dtype for w in rhs))
  units = [i for i in range(rhs[0].ndim) if i not in (*rb, *rc)]
  axes = (tuple(rb), tuple(units), tuple(rc))
  rows = [n for i, n in enumerate(lhs.shape) if i not in (*lb, *lc)]
  cuts = tuple(cuts or [None] * len(rhs))
  layer = _Layer(
    recipe,
    len(lb),
    dtype,
    native,
    precision,
    preferred_element_type,
    cuts,
    tuple(
      cut and cut.parts(rows, w.shape, axes)
      for cut, w in zip(cuts, rhs, strict=True)
    ),
    axes,
    first,
    implementation,
  )
  ws = tuple(matrices.view(w, rb, rc) for w in rhs)
  return _linear(layer, matrices.view(lhs, lb, lc), ws, key)


class _Layer(NamedTuple):
  """All that is static."""

  recipe: Recipe
  batch: int
  dtype: object
  native: bool | None
  precision: object
  preferred: object
  cuts: tuple
  parts: tuple  # what the cuts are for these arrays
  axes: tuple  # of the weights: stacked, kept, contracted
  first: int  # the number of the first of the weights
  implementation: str | None

  def key(self, key, i):
    """Of what belongs to the weights, number i, of all here."""
    return weights_key(key, self.first + i)

  def gathered(self, i, w, transposed=False):
    """The rounded weights, number i, their codes gathered."""
    cut = self.cuts[i]
    if not isinstance(w, Tiled) or cut is None or cut.layout.mesh.size == 1:
      return w
    w = w.packed()
    batch, units, columns = self.axes
    column = next(iter(columns), None)
    if transposed:
      axes = (*batch, column, next(iter(units), None))
    else:
      axes = (*batch, *units, column)
    return dataclasses.replace(w, data=cut.gather(w.data, axes))

  def fuses(self, left, rights, splits):
    """Whether the kernel of the forward product rounds its left operand.

    Not where the backward pass takes the codes: to compute them again it would
    have to multiply again.
    """
    recipe = self.recipe
    kept = recipe.weight_grad.right.source == 'forward'
    if kept or recipe.forward.rotation or self.native is False:
      return False
    return not self.implementation and multiply.fuses(left, rights[0], splits)

  def rounded(self, operand, x, key, rotation=None, turned=None):
    """`matrices.rounded`, of what a rotation leaves as `turned`'s transpose."""
    turned = turned if rotation is None else None
    how = self.batch, key, self.implementation, turned
    return matrices.rounded(operand, x, *how)

  def multiply(self, left, rights, splits, out):
    return multiply.rows_by_rows(
      left,
      rights,
      self.batch,
      self.dtype,
      self.native,
      self.precision,
      splits,
      out,
      self.implementation,
    )


# Of views alone: transposes and reshapes around it differentiate themselves.
# x is (*batch, *rows, columns), each w of ws (*batch, *units, columns), and the
# results (*batch, *rows, *units).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(layer, x, ws, key):
  return _forward(layer, x, ws, key)[0]


def _forward(layer, x, ws, key):
  product = layer.recipe.forward
  rights = [
    layer.gathered(i, _forward_weights(layer, w, layer.key(key, i))[0])
    for i, w in enumerate(ws)
  ]
  splits = [parts and parts.forward() for parts in layer.parts]
  left, mask = multiply.Unrounded(x, product.left), None
  if not layer.fuses(left, rights, splits):
    key_x = operand_keys(key, 0, x, x)[0]
    left, mask = _rounded(layer, product, 'left', x, key_x)
  dtype = layer.preferred or layer.dtype
  out = _as_written(product, dtype)
  ys = tuple(
    _result(layer, product, 3, y, layer.key(key, i)).astype(dtype)
    for i, y in enumerate(layer.multiply(left, rights, splits, out))
  )
  return ys, _residuals(layer, x, ws, key, left, mask)


def _residuals(layer, x, ws, key, left, mask):
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
    return x, ws, key
  if mask is not None:
    mask = elements.pack(mask, 1)
  # An array of no elements brings x's shape and dtype along.
  return (coded.packed(), mask, jnp.zeros((0, *x.shape), x.dtype)), ws, key


def _backward(layer, residuals, gs):
  kept, ws, key = residuals
  recipe = layer.recipe
  if isinstance(kept, tuple):
    coded, mask, like = kept
    shape, dtype = like.shape[1:], like.dtype
    forward_x = coded if recipe.weight_grad.right.source == 'forward' else None
    if mask is not None:
      mask = elements.unpack(mask, 1, shape[-1]).astype(bool)
  else:
    coded, shape, dtype = None, kept.shape, kept.dtype
    forward_x, mask = _rounded(
      layer, recipe.forward, 'left', kept, operand_keys(key, 0, kept, kept)[0]
    )
  dxs, dws = [], []
  for i, (w, g) in enumerate(zip(ws, gs, strict=True)):
    own_key = layer.key(key, i)
    forward_w, w_mask = _forward_weights(layer, w, own_key)
    g = g.astype(layer.dtype)
    dx = _input_grad(
      layer, i, g, w, forward_w, (len(shape) - 1, dtype), own_key
    )
    dxs.append(dx.reshape(shape))
    if recipe.weight_grad.right.source == 'forward':
      right = matrices.as_array(forward_x, dtype)
    else:
      right = kept if coded is None else coded
    dw = _weight_grad(
      layer, i, g, w, right, w_mask, len(shape) - 1, (key, own_key)
    )
    dws.append(dw.astype(w.dtype))
  product = recipe.input_grad
  own, rotation = product.right.source == 'array', recipe.forward.rotation
  if product.result.format is None:  # rotating the sum is enough
    dxs = [functools.reduce(operator.add, dxs)]
  dxs = [matrices.unturned(rotation, dx, mask, own) for dx in dxs]
  dxs = [
    _result(layer, product, 4, dx, layer.key(key, i))
    for i, dx in enumerate(dxs)
  ]
  dx = functools.reduce(operator.add, dxs)
  return dx.astype(dtype), tuple(dws), None


def _input_grad(layer, i, g, w, forward_w, like, key):
  """g (*batch, *rows, units) by w (*batch, columns, units), number i."""
  product, batch = layer.recipe.input_grad, layer.batch
  rows, dtype = like
  rotation = product.rotation
  left = matrices.merge(g, rows)
  along_rows = rotation is not None and rotation.along == 'rows'
  if along_rows:
    left = matrices.merge(left, batch, -1)
  key_g, key_w = operand_keys(key, 1, left, w)
  signs = key_g if rotation and rotation.signs == 'fresh' else None
  if along_rows:
    left = matrices.rotate(left, rotation, signs, axis=-2)
  left = matrices.turned(left, rotation, signs)
  left = layer.rounded(product.left, left, key_g)[0]
  own = product.right.source == 'array'
  right = w
  if not own:
    right = matrices.as_array(layer.gathered(i, forward_w), w.dtype)
  straight = right
  right = matrices.columns_first(right, batch)
  right = matrices.turned(right, rotation, signs)
  right = layer.rounded(product.right, right, key_w, rotation, straight)[0]
  if own:
    right = layer.gathered(i, right, transposed=True)
  parts = layer.parts[i]
  split = parts and parts.input_grad(along_rows)
  out = jnp.float32
  if len(layer.parts) == 1 and not layer.recipe.forward.rotation:
    out = _as_written(product, dtype)
  dx = layer.multiply(left, [right], [split], out)[0]
  if along_rows:
    dx = matrices.rotate(dx, rotation, signs, axis=-2, inverse=True)
  return dx


def _weight_grad(layer, i, g, w, x, mask, rows, keys):
  """g (*batch, *units, rows) by x (*batch, columns, rows), number i.

  x is a Tiled that is ready to be multiplied, or an array (*batch, *rows,
  columns) to be rounded here, by the first of the keys; all else by the second.
  """
  product, batch = layer.recipe.weight_grad, layer.batch
  left = matrices.tokens_last(g, batch, rows)
  x_key, key = keys
  key_g, _ = operand_keys(key, 2, g, g)
  signs = None
  if product.rotation and product.rotation.signs == 'fresh':
    signs = key_g
  left = matrices.turned(left, product.rotation, signs)
  left = layer.rounded(product.left, left, key_g, product.rotation, g)[0]
  if not isinstance(x, Tiled):
    x = _weight_grad_right(layer, x, signs, x_key)
  split = layer.parts[i] and layer.parts[i].weight_grad()
  out = jnp.float32
  if not layer.recipe.forward.rotation:
    out = _as_written(product, w.dtype)
  if split and split.scattered[-1]:
    # A TPU scatters sums along the outermost axis alone: it would send all of
    # them along another.
    dw = layer.multiply(x, [left], [split.swapped()], out)[0]
    dw = jnp.moveaxis(dw, batch, -1)
  else:
    dw = layer.multiply(left, [x], [split], out)[0]
  dw = dw.reshape(w.shape)
  own = product.right.source == 'array'
  dw = matrices.unturned(layer.recipe.forward.rotation, dw, mask, own)
  return _result(layer, product, 5, dw, key)


_linear.defvjp(_forward, _backward)


def _weight_grad_right(layer, x, signs, key):
  """The activations as the gradient of the weights multiplies them."""
  product = layer.recipe.weight_grad
  right = matrices.columns_first(x, layer.batch)
  key = operand_keys(key, 2, x, x)[1]
  right = matrices.turned(right, product.rotation, signs)
  return layer.rounded(product.right, right, key, product.rotation, x)[0]


def _forward_weights(layer, w, key):
  key = operand_keys(key, 0, w, w)[1]
  return _rounded(layer, layer.recipe.forward, 'right', w, key)


def _rounded(layer, product, side, x, key):
  """An operand of the forward product, and its mask."""
  x = matrices.turned(x, product.rotation, None)
  return layer.rounded(getattr(product, side), x, key)


def _as_written(product, dtype):
  """Of a product's result, which is written once if it is not worked on."""
  if product.result.format is None and product.rotation is None:
    return dtype
  return jnp.float32


def _result(layer, product, index, y, key):
  """What a product gives, rounded if the recipe says so."""
  if product.result.format is None:
    return y
  key = operand_keys(key, index, y, y)[0] if product.result.stochastic else None
  return matrices.as_array(layer.rounded(product.result, y, key)[0], y.dtype)
