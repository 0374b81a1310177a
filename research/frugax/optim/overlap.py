"""How much of the subspaces of one state is in those of another."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax import quant
from frugax.optim import linalg
from frugax.optim.adam import wide
from frugax.optim.axes import path_name
from frugax.optim.low_rank import LowRankState


def subspace_overlap(
  before: optax.OptState, after: optax.OptState
) -> dict[str, jax.Array]:
  r"""How much of each subspace of one state is in that of another.

  .. math:: \|P^T P'\|_F^2 / r

  for orthonormal bases P and P' of the two. It is 1 if the subspaces are the
  same, 0 if they are orthogonal, and on average r / m for two random ones of
  dimension r in m dimensions. The bases that a state holds need not be
  orthonormal, nor in full precision: they are made so here.

  Args:
    before: the state of an optimizer that has `low_rank` in it, anywhere in a
      chain.
    after: another state of the same optimizer, a refresh later, say.

  Returns:
    By the name of each projected parameter an array with the overlap of each
    matrix of its stack; NaN where there is no subspace yet. Where both sides
    are projected, the name ends in /0 for the rows and in /1 for the columns.

  Raises:
    ValueError: states without subspaces, of two different optimizers, or of
      projectors that store no basis ('random' and 'coordinates').

  Examples:
    >>> from frugax.optim import galore
    >>> tx = galore(1e-3, rank=2, update_interval=1)
    >>> params = {'kernel': jnp.zeros((4, 6)), 'bias': jnp.zeros(6)}
    >>> state = tx.init(params)
    >>> grads = {'kernel': jnp.eye(4, 6), 'bias': jnp.ones(6)}
    >>> grads['kernel'] *= jnp.array([[4.0], [3.0], [2.0], [1.0]])
    >>> _, one = tx.update(grads, state, params)
    >>> grads['kernel'] *= jnp.array([[1.0], [1.0], [9.0], [1.0]])
    >>> _, two = tx.update(grads, one, params)
    >>> print(subspace_overlap(one, two)['kernel'].round(2))
    0.5
  """
  old, new = _bases(before), _bases(after)
  if not old:
    raise ValueError(
      'the state has no subspaces: give that of an optimizer with low_rank'
    )
  if jax.tree.map(jnp.shape, old) != jax.tree.map(jnp.shape, new):
    raise ValueError('the states are of two different optimizers')
  return {name: _overlap(old[name], new[name]) for name in old}


def _bases(state: Any) -> dict[str, jax.Array]:
  """The bases of each projected parameter, (*batch, m, r), by its name."""

  def is_low_rank(x):
    return isinstance(x, LowRankState)

  return {
    path_name(path): _basis(path, basis)
    for part in jax.tree.leaves(state, is_leaf=is_low_rank)
    if is_low_rank(part)
    for path, basis in jax.tree.leaves_with_path(
      part.projectors, is_leaf=lambda x: isinstance(x, quant.QTensor)
    )
  }


def _basis(path, x):
  if isinstance(x, quant.QTensor):
    x = quant.dequantize(x)
  if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'the projector of {path_name(path)} stores no basis: there is one with'
      " 'svd', 'sketch' and 'correlation_aware'"
    )
  x = wide(x)
  # A basis lies as its gradient does; it is longer than the rank.
  return jnp.swapaxes(x, -1, -2) if x.shape[-2] < x.shape[-1] else x


def _overlap(old, new):
  with jax.default_matmul_precision('highest'):
    c = jnp.swapaxes(linalg.orthonormal(new), -1, -2) @ linalg.orthonormal(old)
  share = jnp.sum(c * c, axis=(-2, -1)) / c.shape[-1]
  # The QR of a basis of zeros is one of something.
  found = jnp.any(old != 0, (-2, -1)) & jnp.any(new != 0, (-2, -1))
  return jnp.where(found, share, jnp.nan)
