"""Weights that are stored in few bits, and trained so."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from frugax.quant import QTensor, dequantize, quantize

BLOCK = 256  # elements that share a step and a zero point


def store_weights(
  params: Any, format_of: Callable[[str], str], batch_axes: int = 0
) -> Any:
  """Weights in few bits, without a copy of theirs in more.

  The result takes the place of the parameters: `load_weights` gives the arrays
  to compute with, `attach` makes their gradients known, and
  `frugax.optim.apply_updates` adds an update and rounds stochastically, so that
  what is smaller than a step is not lost.

  Args:
    params: nested dicts of arrays.
    format_of: the format in `frugax.quant.AFFINE` of the weight at a path such
      as 'attn/q/kernel', or 'none' for one that stays an array.
    batch_axes: leading axes over which layers are stacked; a block holds
      elements of one layer.

  Returns:
    The tree with a `frugax.quant.QTensor` for each array that has a format.

  Examples:
    >>> params = {'kernel': jnp.ones((2, 16, 32)), 'scale': jnp.ones((2, 16))}
    >>> def format_of(path):
    ...   return 'int8' if path == 'kernel' else 'none'
    >>> stored = store_weights(params, format_of, batch_axes=1)
    >>> stored['kernel'].nbytes, stored['kernel'].shape
    (1040, (2, 16, 32))

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and
    Layer-Adaptive Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
  """

  def one(path, w):
    format = format_of('/'.join(str(p.key) for p in path))
    if format == 'none':
      return w
    return quantize(w, format, BLOCK, batch_axes)

  return jax.tree.map_with_path(one, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Attached:
  """Stored weights, and arrays in whose name gradients are taken."""

  stored: QTensor
  values: jax.Array


def attach(params: Any, values: Any) -> Any:
  """Parameters whose gradients are those with respect to `values`.

  Args:
    params: a tree with QTensors, from `store_weights`.
    values: the arrays that `load_weights(params)` gives. Where there is a
      QTensor they are not read, only differentiated by.

  Returns:
    A tree for `load_weights`, inside of the function to be differentiated.

  Examples:
    >>> params = {'w': quantize(jnp.ones(4), 'int8')}
    >>> def loss(values):
    ...   w = load_weights(attach(params, values))['w']
    ...   return (3 * w).sum()
    >>> print(jax.grad(loss)(load_weights(params))['w'])
    [3. 3. 3. 3.]
  """
  return jax.tree.map(
    lambda p, v: _Attached(p, v) if isinstance(p, QTensor) else v,
    params,
    values,
    is_leaf=_is_stored,
  )


def load_weights(params: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
  """The tree with an array for each stored weight.

  Args:
    params: a tree that `store_weights` or `attach` made, or one layer of it.
    dtype: of the arrays that were stored, others stay as they are; None is that
      of the first array of the tree that is not stored, or else float32.

  Returns:
    A tree of arrays.
  """
  leaves = jax.tree.leaves(params, is_leaf=_is_stored)
  if not any(map(_is_stored, leaves)):
    return params
  if dtype is None:
    arrays = (p.dtype for p in leaves if not _is_stored(p))
    dtype = next(arrays, jnp.float32)

  def one(p):
    if isinstance(p, _Attached):
      return _load(dtype, p.stored, p.values)
    return dequantize(p, dtype) if isinstance(p, QTensor) else p

  return jax.tree.map(one, params, is_leaf=_is_stored)


def _is_stored(p):
  return isinstance(p, QTensor | _Attached)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _load(dtype, stored, values):
  del values
  return dequantize(stored, dtype)


def _load_forward(dtype, stored, values):
  # An array of no elements brings the dtype along.
  return dequantize(stored, dtype), jnp.zeros((0,), values.dtype)


def _load_backward(dtype, like, g):
  return None, g.astype(like.dtype)


_load.defvjp(_load_forward, _load_backward)
