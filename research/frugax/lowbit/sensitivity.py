"""How much rounding takes away, and how sharp a loss is."""

import jax
import jax.numpy as jnp

from frugax.lowbit import matrices
from frugax.lowbit.keys import operand_keys
from frugax.lowbit.operands import Operand, Recipe
from frugax.quant.tiles import Tiled, within

RATES = ('error', 'saturation', 'underflow')


def sharpness(
  logits: jax.Array, labels: jax.Array, eps: float = 1e-3
) -> jax.Array:
  r"""The greatest relative increase of a loss when logits move a little.

  .. math::
    \phi = 100 \, \max_{|z_i| \le \epsilon (|y_i| + 1)}
    \frac{L(y + z) - L(y)}{1 + L(y)}

  with the logits :math:`y` of one token and its cross entropy :math:`L`. The
  loss falls with the logit of the label and rises with all others, so the
  maximum lies in a corner of the box, and no search is needed.

  The published metric takes the last token of each sequence. Its authors adapt
  Keskar's, whose box this is; how wide theirs is we have not seen.

  Args:
    logits: (..., vocabulary).
    labels: integers, (...).
    eps: half of the box's width, relative to the logits' size plus one.

  Returns:
    float32, (...), in percent.

  Raises:
    ValueError: eps is negative.

  Examples:
    >>> y = jnp.array([[0., 0.], [9., 0.]])
    >>> print(sharpness(y, jnp.array([0, 0]), eps=.1).round(2))
    [6.2  0.02]

  References:
    Lee et al., `To FP8 and Back Again: Quantifying the Effects of Reducing
    Precision on LLM Training Stability <https://arxiv.org/abs/2405.18710>`_,
    2024

    Keskar et al., `On Large-Batch Training for Deep Learning: Generalization
    Gap and Sharp Minima <https://arxiv.org/abs/1609.04836>`_, 2017
  """
  if eps < 0:
    raise ValueError(f'eps={eps}: give the box a width of 0 or more')
  y = logits.astype(jnp.float32)
  at_label = jax.nn.one_hot(labels, y.shape[-1], dtype=bool)

  def loss(y):
    log_p = jax.nn.log_softmax(y, axis=-1)
    return -jnp.where(at_label, log_p, 0).sum(-1)

  z = eps * (jnp.abs(y) + 1)
  before = loss(y)
  worst = loss(y + jnp.where(at_label, -z, z))
  return 100 * (worst - before) / (1 + before)


def rounding_rates(
  operand: Operand, x: jax.Array, batch_axes: int = 0
) -> jax.Array:
  r"""What rounding does to an array.

  Args:
    operand: how it is rounded.
    x: (*batch, *rows, columns).
    batch_axes: number of axes over which matrices are stacked.

  Returns:
    float32 (3,), in the order of `RATES`: the error,
    :math:`\lVert \hat x - x \rVert / \lVert x \rVert`; the share of numbers
    beyond the format's largest, of formats in `frugax.quant.ELEMENTS`; and the
    share of all numbers that are not zero and become so.

  Examples:
    >>> x = jnp.array([[.01, 1., 3., 7.]])
    >>> error, beyond, lost = rounding_rates(Operand('int4'), x)
    >>> round(float(error), 4), float(beyond), float(lost)
    (0.0013, 0.0, 0.25)
  """
  x = x.astype(jnp.float32)
  rounded, saturation = x, jnp.float32(0)
  if operand.format is not None:
    key = operand_keys(None, 0, x, x)[0]
    q, _ = matrices.rounded(operand, x, batch_axes, key)
    rounded = matrices.as_array(q, jnp.float32)
    if isinstance(q, Tiled):
      saturation = (~within(x, q)).mean(dtype=jnp.float32)
  # Divided by the largest, so that squares are normal numbers.
  unit = jnp.maximum(jnp.abs(x).max(), jnp.finfo(jnp.float32).tiny)
  norm = jnp.linalg.norm((x / unit).ravel())
  error = jnp.linalg.norm(((rounded - x) / unit).ravel())
  lost = ((rounded == 0) & (x != 0)).mean(dtype=jnp.float32)
  error = jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), error)
  return jnp.stack([error, saturation, lost])


def forward_rates(
  recipe: Recipe, x: jax.Array, w: jax.Array, dimension_numbers
) -> dict[str, jax.Array]:
  """`rounding_rates` of the activations and the weights of a product.

  Args:
    recipe: the product's.
    x: activations.
    w: weights.
    dimension_numbers: as of `jax.lax.dot_general`.

  Returns:
    'activations' and 'weights', those of them that the forward product rounds,
    or else a gradient.
  """
  (lc, rc), (lb, rb) = dimension_numbers
  batch, product = len(lb), recipe.forward
  x, w = matrices.view(x, lb, lc), matrices.view(w, rb, rc)
  out = {}
  for name, a, first, later in (
    ('activations', x, product.left, recipe.weight_grad),
    ('weights', w, product.right, recipe.input_grad),
  ):
    operand, rotation = first, product.rotation
    if first.format is None:
      operand, rotation = later.right, later.rotation
      a = matrices.columns_first(a, batch)
    if operand.format is not None:
      a = matrices.turned(a, rotation, None)
      out[name] = rounding_rates(operand, a, batch)
  return out


def gradient_rates(
  recipe: Recipe, g: jax.Array, batch_axes: int, rows: int
) -> jax.Array | None:
  """`rounding_rates` of the gradient of a product's result.

  Args:
    recipe: the product's.
    g: the gradient, (*batch, *rows, *units).
    batch_axes: number of batch axes.
    rows: number of axes of the activations that are kept.

  Returns:
    float32 (3,), as the input's gradient rounds it, or else the weights'; None
    if both leave it alone.
  """
  product = recipe.input_grad
  if product.left.format is not None:
    g = matrices.merge(g, batch_axes + rows)
    if product.rotation and product.rotation.along == 'rows':
      g = matrices.merge(g, batch_axes, -1)
      g = matrices.rotate(g, product.rotation, None, axis=-2)
  elif recipe.weight_grad.left.format is not None:
    product = recipe.weight_grad
    g = matrices.tokens_last(g, batch_axes, batch_axes + rows)
  else:
    return None
  g = matrices.turned(g, product.rotation, None)
  return rounding_rates(product.left, g, batch_axes)
