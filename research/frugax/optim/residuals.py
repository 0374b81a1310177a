r"""Residual policies: the gradient outside of the subspace, and what it adds.

A policy makes the update of a matrix from the parts that `low_rank` has at
hand: the gradient, its projection, the inner transformation's update of that,
and the way back. A function from `Parts` to the update is a policy; one that
remembers something is a `Residual`. The names that `low_rank(residual=...)`
knows are in `RESIDUALS`.

A policy treats each matrix of a stack as if it were alone: except on CPUs, it
is called with one layer after the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frugax import names
from frugax.optim import declared
from frugax.optim.adam import wide
from frugax.optim.axes import path_name
from frugax.optim.leaves import Leaf
from frugax.optim.limits import growth_factor
from frugax.optim.moments import load


class Parts(NamedTuple):
  r"""What there is to make one leaf's update from, in float32.

  Attributes:
    grad: G, (*batch, m, n), with what `Residual.carry` added to it.
    small: R, the projected gradient.
    update: N, what the inner transformation made of R.
    back: from small matrices to (*batch, m, n), not scaled.
    scale: :math:`\alpha` of `low_rank`.
    axis: of the small matrices, the one that was projected: -2 or -1.
    orthonormal: whether the basis is, so that back keeps norms.
    moment: a function without arguments: the inner transformation's first
      moment before this update, small and in the present basis.
    before: the same in the basis of the last update and taken back from it,
      (*batch, m, n). The two differ at a refresh by what the subspace lost.
  """

  grad: jax.Array
  small: jax.Array
  update: jax.Array
  back: Callable[[jax.Array], jax.Array]
  scale: jax.typing.ArrayLike
  axis: int
  orthonormal: bool
  moment: Callable[[], jax.Array]
  before: Callable[[], jax.Array]


class Residual(NamedTuple):
  """A residual policy with a memory.

  Attributes:
    init: `(shape, dtype) -> state` for one leaf as matrices (*batch, m, n) and
      the parameter's dtype; any pytree of arrays.
    update: `(parts, state) -> (update, state)`, the update as matrices.
    carry: `state -> (*batch, m, n)`, to be added to the next gradient before
      anything else, or None.
  """

  init: Callable[[tuple[int, ...], Any], Any]
  update: Callable[[Parts, Any], tuple[jax.Array, Any]]
  carry: Callable[[Any], jax.Array] | None = None


def stateless(f: Callable[[Parts], jax.Array]) -> Residual:
  """The policy of a function from the parts to the update."""
  return Residual(
    init=lambda shape, dtype: (),
    update=lambda parts, state: (f(parts), state),
  )


def _norms(shape, dtype):
  del dtype  # Of a few numbers, which must be able to grow by 1 %.
  return jnp.zeros(shape[:-2], jnp.float32)


def drop(parts: Parts) -> jax.Array:
  r"""GaLore: nothing outside, :math:`U = \alpha P N`."""
  return parts.scale * parts.back(parts.update)


def sgd(parts: Parts) -> jax.Array:
  r"""Subspace momentum: outside the gradient as it is.

  .. math:: U = \alpha P N + (G - P R)

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm and
    Subspace-Momentum <https://arxiv.org/abs/2411.07120>`_, 2024
  """
  return parts.grad + parts.back(parts.scale * parts.update - parts.small)


def sign(parts: Parts) -> jax.Array:
  r"""FRUGAL: outside the signs, :math:`U = \alpha P N + \mathrm{sign}(G - PR)`.

  What float32 leaves of a gradient inside the subspace has signs, too: parts
  below a millionth of the matrix's largest entry count as zero.

  References:
    Zmushko et al., `FRUGAL: Memory-Efficient Optimization by Reducing State
    Overhead <https://arxiv.org/abs/2411.07837>`_, 2024
  """
  outside = parts.grad - parts.back(parts.small)
  size = jnp.abs(parts.grad).max(axis=(-2, -1), keepdims=True)
  signs = jnp.where(jnp.abs(outside) > 1e-6 * size, jnp.sign(outside), 0.0)
  return parts.scale * parts.back(parts.update) + signs


def fira(
  threshold: jax.typing.ArrayLike = 1.01, residual_uses_alpha: bool = True
) -> Residual:
  r"""Fira: outside the gradient, scaled as the optimizer scales it inside.

  .. math::
    \phi_j &= \|N_j\| / (\|R_j\| + 10^{-8}), \qquad
    S = (G - \alpha P R) \, \mathrm{diag}(\phi) \\
    U &= \alpha P N + \mathrm{limit}(S)

  for the columns j (rows, if columns were projected), with the norm of S
  limited as by `limit_norm_growth`.

  Args:
    threshold: the largest growth of the norm of S from one step to the next.
    residual_uses_alpha: as in the authors' code, which subtracts only
      :math:`\alpha P R`, so that a part of the gradient inside the subspace
      is taken for residual (with 0.25 three quarters of it). False subtracts
      :math:`P R`, as the paper does.

  References:
    Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
  """

  def update(parts, previous):
    inside = parts.scale if residual_uses_alpha else 1.0
    ratio = _ratio(parts, parts.axis)
    norms = _outside_norms(parts, inside, ratio)
    factor = growth_factor(norms, previous, threshold)
    ratio *= factor[..., None, None]
    # One way back for both, the ratio being the same all along the subspace.
    small = parts.scale * parts.update - inside * ratio * parts.small
    return ratio * parts.grad + parts.back(small), norms * factor

  return Residual(_norms, update)


def _outside_norms(parts, inside, ratio):
  """Norms of (G - inside P R) diag(ratio)."""
  if parts.orthonormal:
    # |G_j - c P R_j|^2 for each column j, since P^T G_j = R_j.
    total, small = (
      jnp.sum(jnp.square(x), axis=parts.axis, keepdims=True)
      for x in (parts.grad, parts.small)
    )
    squares = jnp.maximum(total - (2 - inside) * inside * small, 0.0)
  else:
    outside = parts.grad - inside * parts.back(parts.small)
    squares = jnp.sum(jnp.square(outside), axis=parts.axis, keepdims=True)
  return jnp.sqrt(jnp.sum(jnp.square(ratio) * squares, axis=(-2, -1)))


def channel(threshold: jax.typing.ArrayLike = 1.01) -> Residual:
  r"""APOLLO: the gradient, each channel scaled by a ratio of small norms.

  .. math::
    \phi_j = \|N_j\| / (\|R_j\| + 10^{-8}), \qquad
    U = \sqrt{\alpha} \; \mathrm{limit}(G \, \mathrm{diag}(\phi))

  The inner update is only used for its norms, never taken back.

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024
  """
  return _scaled_gradient(threshold, lambda parts: parts.axis)


def tensor(threshold: jax.typing.ArrayLike = 1.01) -> Residual:
  r"""APOLLO-Mini: as `channel`, with one factor for the matrix."""
  return _scaled_gradient(threshold, lambda parts: (-2, -1))


def _scaled_gradient(threshold, axis):
  def update(parts, previous):
    ratio = _ratio(parts, axis(parts))
    # The norm comes from those of the rows, columns or whole of G: the update
    # need not exist before its factor is known.
    squares = jnp.sum(parts.grad * parts.grad, axis(parts), keepdims=True)
    norms = jnp.sqrt(jnp.sum(jnp.square(ratio) * squares, axis=(-2, -1)))
    factor = growth_factor(norms, previous, threshold)
    ratio *= jnp.sqrt(parts.scale) * factor[..., None, None]
    return parts.grad * ratio, norms * factor

  return Residual(_norms, update)


def _ratio(parts, axis):
  update, small = (
    jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True))
    for x in (parts.update, parts.small)
  )
  return update / (small + 1e-8)


def feedback(b1: jax.typing.ArrayLike, dtype: Any = None) -> Residual:
  r"""LDAdam: what the subspace misses is added to the next gradient.

  .. math::
    G_t \leftarrow G_t + E_{t-1}, \qquad U_t = \alpha P_t N_t, \qquad
    E_t = G_t - P_t R_t
      + \frac{b_1}{1-b_1} (P_{t-1} M_{t-1} - P_t M'_{t-1})

  with :math:`M'` the first moment in the new basis. E is as large as the
  gradient.

  Args:
    b1: decay of the first moment.
    dtype: of the error; None takes the parameter's.

  References:
    Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
    Statistics <https://arxiv.org/abs/2410.16103>`_, 2024
  """

  def update(parts, error):
    weight = b1 / (1 - b1)
    kept = parts.back(parts.small + weight * parts.moment())
    missed = parts.grad + weight * parts.before() - kept
    return drop(parts), missed.astype(error.dtype)

  return Residual(
    init=lambda shape, own: jnp.zeros(shape, dtype or own),
    update=update,
    carry=lambda error: error,
  )


RESIDUALS: dict[str, Residual] = {
  'drop': stateless(drop),
  'fira': fira(),
  'sgd': stateless(sgd),
  'sign': stateless(sign),
  'channel': channel(),
  'tensor': tensor(),
}


def by_name(
  residual: str | Residual | Callable[[Parts], jax.Array],
) -> Residual:
  """The policy of a name or function.

  Args:
    residual: a name in `RESIDUALS`, a function from `Parts` to the update, or
      a `Residual`.

  Returns:
    A Residual.

  Raises:
    ValueError: an unknown name.
  """
  if isinstance(residual, Residual):
    return residual
  if callable(residual):
    return stateless(residual)
  if residual not in RESIDUALS:
    raise names.unknown('residual policy', residual, RESIDUALS)
  return RESIDUALS[residual]


class Sources(NamedTuple):
  """The arrays that the `Parts` of one leaf are made from.

  Attributes:
    grad: the gradient as matrices, with what was carried over.
    small: its projection.
    update: what the inner transformation made of that.
    projector: the projector's state.
    moment: the first moment before this update, in the present basis; None if
      the inner state has none.
    old_projector: the projector's state at the last update.
    old_moment: the first moment in its basis, or None.
  """

  grad: jax.Array
  small: jax.Array
  update: jax.Array
  projector: Any
  moment: jax.Array | None
  old_projector: Any
  old_moment: jax.Array | None


def finish(
  residual: Residual,
  leaf: Leaf,
  scale: jax.typing.ArrayLike,
  sources: Sources,
  memory: Any,
) -> tuple[jax.Array, Any]:
  """The update of a leaf as matrices, and what the policy remembers.

  Except on CPUs, which are faster on all at once, the layers of a stack are
  finished one after the other and the update of each takes the place of its
  gradient: nothing else of a stack's size need be held.

  Args:
    residual: the policy.
    leaf: what is static about the leaf.
    scale: of `low_rank`.
    sources: the leaf's arrays.
    memory: what the policy remembers.

  Returns:
    The update, in the dtype of the gradient, and the memory.
  """

  def run(projector, sources, memory):
    parts = _parts(leaf, projector, scale, sources)
    update, memory = residual.update(parts, memory)
    return update.astype(sources.grad.dtype), memory

  def whole(sources, memory):
    return run(leaf.projector, sources, memory)

  def one_by_one(sources, memory):
    def layer(k, carry):
      def take(x):
        return jax.lax.dynamic_index_in_dim(x, k, keepdims=False)

      def put(x, new):
        return jax.lax.dynamic_update_index_in_dim(x, new, k, 0)

      grad, memory = carry
      here = jax.tree.map(take, (sources._replace(grad=grad), memory))
      # Read before the gradient is overwritten; casts of what is read stay
      # here instead of being made for the whole stack ahead of the loop.
      here = jax.lax.optimization_barrier(here)
      return jax.tree.map(put, carry, run(leaf.layer, *here))

    return jax.lax.fori_loop(0, leaf.layers, layer, (sources.grad, memory))

  if not leaf.stacked or not _by_layer(residual, sources.grad, memory):
    return whole(sources, memory)
  return jax.lax.platform_dependent(
    sources, memory, cpu=whole, default=declared.by_layer(one_by_one)
  )


def _by_layer(residual, grad, memory):
  """Whether the memory of a stack is a stack of its layers' memories."""
  layers, *shape = grad.shape
  one = jax.eval_shape(lambda: residual.init(tuple(shape), grad.dtype))
  stacked = jax.tree.map(lambda x: (layers, *x.shape), one)
  return jax.tree.map(jnp.shape, memory) == stacked


def _parts(leaf, projector, scale, sources):
  def moment(of):
    if of is None:
      raise ValueError(
        'the residual policy asks for the first moment of '
        f'{path_name(leaf.path)}, which the inner state does not have'
      )
    return load(of)

  return Parts(
    grad=wide(sources.grad),
    small=wide(sources.small),
    update=wide(sources.update),
    back=lambda r: projector.back(r, sources.projector),
    scale=scale,
    axis=leaf.axis,
    orthonormal=leaf.projector.orthonormal,
    moment=lambda: moment(sources.moment),
    before=lambda: projector.back(
      moment(sources.old_moment), sources.old_projector
    ),
  )
