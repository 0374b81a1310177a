"""Limit how fast the norm of an update may grow from step to step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import wide
from frugax.optim.axes import (
  MatrixAxes,
  as_matrix,
  from_matrix,
  layer_axes,
  resolve,
)


def limit_growth(
  x: jax.Array, previous: jax.Array, threshold: jax.typing.ArrayLike = 1.01
) -> tuple[jax.Array, jax.Array]:
  r"""Scale matrices down so that no norm exceeds `threshold` times the last.

  .. math::
    l = \max(\|X\| / (s + 10^{-8}), \gamma) / \gamma, \qquad
    X \leftarrow X / l, \qquad s \leftarrow \|X\| / l

  A previous norm of 0 limits nothing: there was no step before, or one without
  a gradient. (The published code lets a matrix whose norm was once 0 grow from
  there by 1 % a step, which is never.)

  Args:
    x: (*batch, m, n); the norm is each matrix's own.
    previous: (*batch,), the norms after limiting of the step before, float32.
    threshold: :math:`\gamma`, the largest growth.

  Returns:
    The limited matrices and their norms.

  Examples:
    >>> x, norm = limit_growth(3 * jnp.eye(1), jnp.float32(1.0), threshold=2.0)
    >>> print(x, norm)
    [[2.]] 2.0
  """
  norm = jnp.sqrt(jnp.sum(jnp.square(wide(x)), axis=(-2, -1)))
  factor = growth_factor(norm, previous, threshold)
  return (x * factor[..., None, None]).astype(x.dtype), norm * factor


def growth_factor(
  norm: jax.Array, previous: jax.Array, threshold: jax.typing.ArrayLike
) -> jax.Array:
  """What `limit_growth` multiplies matrices of these norms by."""
  excess = jnp.maximum(norm / (previous + 1e-8), threshold) / threshold
  return jnp.where(previous > 0, 1 / excess, 1.0)


class LimitNormGrowthState(NamedTuple):
  """The norms of the last updates: one for each matrix of each leaf."""

  norms: Any


def limit_norm_growth(
  threshold: jax.typing.ArrayLike = 1.01,
  axes: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  r"""Keep the norm of an update below `threshold` times that of the last one.

  .. math::
    l_t = \max(\|U_t\| / (s_{t-1} + 10^{-8}), \gamma) / \gamma, \qquad
    U_t \leftarrow U_t / l_t, \qquad s_t = \|U_t\| / l_t

  The first update is not limited. Norms may shrink at once and grow by 1 % a
  step, which takes the edge off loss spikes. Fira and APOLLO limit the norms of
  a part of their updates; this is the same as a transformation of its own.

  Args:
    threshold: :math:`\gamma`, the largest growth of a norm.
    axes: which axes form the matrices, see `low_rank`; each matrix of a stack
      has its own norm. A leaf without matrix axes has one norm; hide leaves
      that should not be limited with optax.masked.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Raises:
    ValueError: axes that do not fit.

  Examples:
    >>> tx = limit_norm_growth(threshold=1.5)
    >>> params = {'w': jnp.zeros((2, 2))}
    >>> state = tx.init(params)
    >>> for size in (1.0, 8.0, 8.0):
    ...   updates, state = tx.update({'w': size * jnp.eye(2)}, state)
    ...   print(updates['w'][0, 0])
    1.0
    1.5
    2.25

  References:
    Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
  """

  def init_fn(params):
    stacks, treedef, _ = matrices(params, axes)
    return LimitNormGrowthState(
      treedef.unflatten(jnp.zeros(x.shape[:-2], jnp.float32) for x in stacks)
    )

  def update_fn(updates, state, params=None):
    del params
    stacks, treedef, specs = matrices(updates, axes)
    limited = [
      limit_growth(x, previous, threshold)
      for x, previous in zip(
        stacks, treedef.flatten_up_to(state.norms), strict=True
      )
    ]
    norms = treedef.unflatten(norm for _, norm in limited)
    updates = from_matrices([x for x, _ in limited], updates, specs)
    return updates, LimitNormGrowthState(norms)

  return optax.GradientTransformation(init_fn, update_fn)


def matrices(
  tree: Any, axes: Any | Callable[[Any], Any] | None
) -> tuple[list[jax.Array], Any, list[MatrixAxes | None]]:
  """Each leaf as a stack of matrices; a layer without matrix axes as a column.

  Args:
    tree: arrays.
    axes: as in `low_rank`.

  Returns:
    The stacks, the tree's structure and each leaf's matrix axes.
  """
  found, treedef = jax.tree.flatten(tree)
  specs = resolve(tree, axes)
  stacks = []
  for x, spec, layer in zip(found, specs, layer_axes(tree, axes), strict=True):
    if spec is None:
      height = min(layer, default=0)  # batch axes of its names come first
      stacks.append(x.reshape(*x.shape[:height], -1, 1))
    else:
      stacks.append(as_matrix(x, spec))
  return stacks, treedef, specs


def from_matrices(
  stacks: Sequence[jax.Array], like: Any, specs: list[MatrixAxes | None]
) -> Any:
  """Undo `matrices`, for a tree of the shapes of `like`."""
  found, treedef = jax.tree.flatten(like)
  return treedef.unflatten(
    y.reshape(x.shape) if spec is None else from_matrix(y, spec, x.shape)
    for y, x, spec in zip(stacks, found, specs, strict=True)
  )
