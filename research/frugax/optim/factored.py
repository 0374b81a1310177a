"""Adafactor's second moment, clipping and step size, for stacked matrices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import wide
from frugax.optim.limits import from_matrices, matrices

Axes = Any | Callable[[Any], Any] | None


class FactoredRmsState(NamedTuple):
  """Step counter, and of each leaf the squares' means over its columns, rows.

  A leaf without matrix axes is a column: its `rows` are as large as it is.
  """

  count: jax.Array
  rows: Any
  cols: Any


def scale_by_factored_rms(
  decay: float = 0.8, eps: float = 1e-30, axes: Axes = None
) -> optax.GradientTransformation:
  r"""Divide by the root of a second moment of rank one: a row and a column.

  .. math::
    \beta_t &= 1 - t^{-c}, \qquad X = G^2 + \epsilon \\
    v &\leftarrow \beta_t v + (1-\beta_t) \, \mathrm{mean}_j X_{ij}, \qquad
    w \leftarrow \beta_t w + (1-\beta_t) \, \mathrm{mean}_i X_{ij} \\
    U_{ij} &= G_{ij} \Big/ \sqrt{v_i w_j / \mathrm{mean}_i v_i}

  `optax.scale_by_factored_rms` does this on an array's two largest axes,
  whatever they are; here they are those of the matrix. State is float32.

  Args:
    decay: :math:`c`.
    eps: added to the squares.
    axes: which axes form the matrices, see `low_rank`; leaves without matrix
      axes have a full second moment.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Raises:
    ValueError: axes that do not fit.

  Examples:
    >>> tx = scale_by_factored_rms()
    >>> g = jnp.outer(jnp.array([1., 2.]), jnp.array([1., -3., 5.]))
    >>> print(tx.update(g, tx.init(g))[0].round(3))
    [[ 1. -1.  1.]
     [ 1. -1.  1.]]

  References:
    Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory
    Cost <https://arxiv.org/abs/1804.04235>`_, 2018
  """

  def init_fn(params):
    stacks, treedef, _ = matrices(params, axes)
    rows = [jnp.zeros(x.shape[:-1], jnp.float32) for x in stacks]
    cols = [
      jnp.zeros((*x.shape[:-2], x.shape[-1]), jnp.float32) for x in stacks
    ]
    return FactoredRmsState(
      count=jnp.zeros([], jnp.int32),
      rows=treedef.unflatten(rows),
      cols=treedef.unflatten(cols),
    )

  def update_fn(updates, state, params=None):
    del params
    stacks, treedef, specs = matrices(updates, axes)
    count = optax.safe_increment(state.count)
    beta = 1 - count.astype(jnp.float32) ** -decay

    def one(g, rows, cols):
      square = jnp.square(wide(g)) + eps
      rows = beta * rows + (1 - beta) * square.mean(-1)
      cols = beta * cols + (1 - beta) * square.mean(-2)
      # Three roots, not one of a quotient: that would vanish in float32.
      u = g * jax.lax.rsqrt(rows)[..., None]
      u *= jnp.sqrt(rows.mean(-1))[..., None, None]
      u *= jax.lax.rsqrt(cols)[..., None, :]
      return u.astype(g.dtype), rows, cols

    new = list(
      map(
        one,
        stacks,
        treedef.flatten_up_to(state.rows),
        treedef.flatten_up_to(state.cols),
      )
    )
    return from_matrices([u for u, _, _ in new], updates, specs), (
      FactoredRmsState(
        count,
        treedef.unflatten(rows for _, rows, _ in new),
        treedef.unflatten(cols for _, _, cols in new),
      )
    )

  return optax.GradientTransformation(init_fn, update_fn)


def clip_rms(threshold: float = 1.0, axes: Axes = None):
  r"""Scale each matrix down to a root mean square of at most `threshold`.

  .. math:: U \leftarrow U / \max(1, \mathrm{rms}(U) / d)

  `optax.clip_by_block_rms` takes a stack of matrices for one block.

  Args:
    threshold: :math:`d`.
    axes: which axes form the matrices, see `low_rank`.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Examples:
    >>> tx = clip_rms(1.0)
    >>> print(tx.update(jnp.array([3., -3.]), tx.init(None))[0])
    [ 1. -1.]
  """

  def clip(updates, params):
    del params
    stacks, _, specs = matrices(updates, axes)
    clipped = [
      (x / jnp.maximum(1.0, _rms(x) / threshold)).astype(x.dtype)
      for x in stacks
    ]
    return from_matrices(clipped, updates, specs)

  return optax.stateless(clip)


def scale_by_parameter_rms(minimum: float = 1e-3, axes: Axes = None):
  r"""Make steps relative: multiply by the root mean square of the matrix.

  .. math:: U \leftarrow \max(\mathrm{rms}(W), \epsilon) \, U

  Args:
    minimum: :math:`\epsilon`, so that zero weights can move.
    axes: which axes form the matrices, see `low_rank`.

  Returns:
    An optax.GradientTransformation; its update needs the parameters.

  Raises:
    ValueError: update is called without parameters.

  Examples:
    >>> tx = scale_by_parameter_rms()
    >>> print(tx.update(jnp.ones(2), tx.init(None), jnp.array([3., -3.]))[0])
    [3. 3.]
  """

  def scale(updates, params):
    if params is None:
      raise ValueError(
        'steps relative to the parameters need them: tx.update(grads, state, '
        'params)'
      )
    stacks, _, specs = matrices(updates, axes)
    weights, _, _ = matrices(params, axes)
    scaled = [
      (x * jnp.maximum(_rms(w), minimum)).astype(x.dtype)
      for x, w in zip(stacks, weights, strict=True)
    ]
    return from_matrices(scaled, updates, specs)

  return optax.stateless(scale)


def _rms(x):
  return jnp.sqrt(jnp.mean(jnp.square(wide(x)), (-2, -1), keepdims=True))
