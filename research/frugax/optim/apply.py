"""Adding updates to weights that have less than 32 bits."""

from typing import Any

import jax
import jax.numpy as jnp

from frugax import names, quant
from frugax.optim.adam import wide
from frugax.optim.axes import path_name
from frugax.optim.leaves import Leaf, seed
from frugax.quant.rounding import random_bits, round_stochastic

ROUNDINGS = ('nearest', 'stochastic')
# What a sum in float32 can be rounded to without bias, beside int4 and int8.
_STOCHASTIC = ('bfloat16', 'float32', 'float64')


def apply_updates(
  params: Any,
  updates: Any,
  key: jax.Array | int | None = None,
  rounding: str = 'stochastic',
  layer: tuple[jax.typing.ArrayLike, int] | None = None,
) -> Any:
  r"""Adds updates to parameters that are rounded without bias.

  .. math:: p \leftarrow \mathrm{round}(p + u)

  The sum is taken in float32. Rounded to nearest, an update below half the
  spacing of the numbers at p is lost, however often it comes: bfloat16 weights
  of 0.02 ignore updates below 6e-5. Rounded stochastically, each step is right
  in expectation, and no master copy in float32 is needed.

  A `frugax.quant.QTensor` among the parameters stays one: it is dequantised,
  updated and quantised again, with new scales and zero points, as in Q-GaLore.
  Its update is an array of its shape. float32 parameters are not rounded.

  Infinities and NaN in bfloat16 stay what they are; a block of a QTensor that
  holds one becomes NaN as a whole.

  Args:
    params: floating-point arrays and QTensors.
    updates: one array for each of them.
    key: a seed or a key of any kind, a new one at each step; the random bits of
      a leaf depend on it, on the leaf's path and on the place in the array, so
      that they are the same on any mesh. Not used by rounding='nearest'.
    rounding: 'stochastic', or 'nearest', which is `optax.apply_updates`, for
      QTensors too.
    layer: (i, n): the arrays are item i of stacks of n, with a first axis of
      size 1, and are rounded as they would be there.

  Returns:
    The new parameters, of the structure and the dtypes of the old ones.

  Raises:
    ValueError: an unknown rounding, stochastic rounding without a key, or a
      dtype that cannot be rounded to stochastically.

  Examples:
    >>> params = {'w': jnp.ones(1000, jnp.bfloat16)}
    >>> updates = {'w': jnp.full(1000, 2**-10)}  # an eighth of the spacing
    >>> apply_updates(params, updates, rounding='nearest')['w'].max()
    Array(1, dtype=bfloat16)
    >>> w = apply_updates(params, updates, key=0)['w']
    >>> sorted(set(w.tolist())), 90 < (w > 1).sum() < 160
    ([1.0, 1.0078125], Array(True, dtype=bool))
    >>> q = quant.quantize(jnp.linspace(-1., 1., 512), 'int8')
    >>> apply_updates({'w': q}, {'w': jnp.full(512, 1e-3)}, key=0)['w'].nbytes
    520

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and
    Layer-Adaptive Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024

    Zamirai et al., `Revisiting BFloat16 Training
    <https://arxiv.org/abs/2010.06192>`_, 2020
  """
  if rounding not in ROUNDINGS:
    raise names.unknown('rounding', rounding, ROUNDINGS)
  if rounding == 'nearest':
    key = None
  elif key is None:
    raise ValueError(
      'stochastic rounding needs a key, a new one at each step: '
      "key=jax.random.fold_in(key, step); or say rounding='nearest'"
    )
  else:
    key = seed(key)

  def one(path, p, u):
    if p is None:
      return None
    if not isinstance(p, quant.QTensor):
      p = jnp.asarray(p)
    leaf_key = None
    if key is not None:
      leaf_key = jax.random.fold_in(key, Leaf(path, p.shape, None).hash())
    return _add(path, p, u, leaf_key, layer)

  return jax.tree.map_with_path(
    one,
    params,
    updates,
    is_leaf=lambda x: x is None or isinstance(x, quant.QTensor),
  )


def _add(path, p, u, key, layer):
  if isinstance(p, quant.QTensor):
    return _add_quantised(p, jnp.broadcast_to(u, p.shape), key)
  if key is None or not jnp.issubdtype(p.dtype, jnp.floating):
    return (p + u).astype(p.dtype)
  if p.dtype.name not in _STOCHASTIC:
    raise ValueError(
      f'{path_name(path)} is {p.dtype}, to which there is no stochastic '
      "rounding: make it bfloat16, or say rounding='nearest'"
    )
  if p.dtype != jnp.bfloat16:
    return (p + u).astype(p.dtype)
  if layer:
    stack = (layer[1], *p.shape[1:])
    key = random_bits(key, stack, rows=(layer[0], 1))
  return round_stochastic(wide(p) + wide(u), key)


def _add_quantised(p, u, key):
  if not p.batch_axes:
    return p.requantize(quant.dequantize(p) + wide(u), key)

  # One layer of a stack after the other, in place: all of them at once would
  # be there in float32.
  def layer(i, p):
    new = _add_quantised(jax.tree.map(lambda a: a[i], p), u[i], key)
    return jax.tree.map(lambda a, b: a.at[i].set(b), p, new)

  return jax.lax.fori_loop(0, u.shape[0], layer, p)
