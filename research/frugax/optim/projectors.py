r"""Projectors: the subspaces that matrices are taken to, and how to find them.

The names that `low_rank(projector=...)` knows are in `PROJECTORS`; anything
else with the signature of `frugax.optim.projection` can be passed in their
place.
"""

import functools

import jax
import jax.numpy as jnp

from frugax.optim import correlation, linalg
from frugax.optim.adam import wide
from frugax.optim.declared import by_layer
from frugax.optim.linalg import unit
from frugax.optim.projection import (
  Projector,
  ProjectorFn,
  back_project,
  basis_shape,
  from_basis,
  from_context,
  project,
  projects_rows,
)


def _svd_basis(g, old, rank, key):
  """The leading left singular vectors: the best subspace of the rank."""
  del old, key
  return linalg.left_vectors(g)[..., :rank]


# Weight of fresh random directions in the warm start. Without it a direction
# orthogonal to the old basis would never be found; above one tenth the noise
# costs captured energy.
_EXPLORE = 0.1


def sketch_with(power_steps: int = 1) -> ProjectorFn:
  r"""The sketch: steps of orthogonal iteration on G G^T from the old basis.

  .. math::
    S = P_{old} + 0.1\, \Omega, \qquad
    P = \mathrm{qr}(G G^T \cdots \mathrm{qr}(G G^T S)), \qquad
    \Omega_{ij} \sim N(0, 1/m)

  and :math:`S = \Omega` before there is a basis. The QR of a thin matrix aside
  it is matmuls only. Its diagonal is made positive: the basis turns as little
  as the gradient does, and alike on every back end. Householder's QR is used
  because Cholesky's, though faster, squares a condition number that is a square
  already, :math:`(\sigma_1 / \sigma_r)^4`, and fails in float32.

  Args:
    power_steps: multiplications by :math:`G G^T`. One follows a gradient that
      turns slowly; a second one brings the first basis, which starts from
      nothing, closer to the optimum, for twice the price.

  Returns:
    A projector function for `low_rank(projector=...)`.

  Examples:
    >>> from frugax.optim.projection import Context
    >>> g = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(6))
    >>> p = sketch_with(power_steps=2)(g.shape, 1, 'short', jnp.float32)
    >>> state = p.refresh(g, p.init(), Context(jax.random.key(0)))
    >>> print(jnp.abs(p.back(p.project(g, state), state) - g).max() < 1e-4)
    True

  References:
    Halko, Martinsson and Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2009
  """

  def find(g, old, rank, key):
    m = g.shape[-2]
    # One draw for all matrices of a stack: a layer alone gets the same one.
    fresh = jax.random.normal(key, (m, rank), g.dtype) / jnp.sqrt(m)
    later = jnp.any(old != 0, axis=(-2, -1), keepdims=True)
    p = old + jnp.where(later, _EXPLORE, 1.0) * fresh
    return linalg.orthogonal_iteration(g, p, power_steps)

  return from_basis(find, orthonormal=True)


def correlation_aware(
  lambda_: int = 5,
  scale_free: bool = False,
) -> ProjectorFn:
  """COAP: a sketch every `lambda_` refreshes, else a step on P.

  The first sketch starts from random directions, a later one from the basis
  before it. The steps in between need the first moment of the inner
  transformation; without one every refresh is a sketch.

  Args:
    lambda_: refreshes from one sketch to the next.
    scale_free: `correlation.scale_free_step` in place of the released
      `correlation.correlation_step`, which does nothing to small gradients.

  Returns:
    A projector function for `low_rank(projector=...)`.

  Raises:
    ValueError: `lambda_` below 1.

  Examples:
    >>> from frugax.optim.projection import Context
    >>> g = jnp.arange(24.0).reshape(4, 6)  # of rank 2
    >>> p = correlation_aware()(g.shape, 2, 'short', jnp.float32)
    >>> state = p.refresh(g, p.init(), Context(jax.random.key(0)))
    >>> print(jnp.abs(p.back(p.project(g, state), state) - g).max() < 1e-4)
    True
  """
  if lambda_ < 1:
    raise ValueError(f'lambda_={lambda_!r}: give an int of at least 1')
  step = (
    correlation.scale_free_step if scale_free else correlation.correlation_step
  )

  def find(g, old, rank, context, axis):
    fresh = jax.random.normal(context.key, (g.shape[-2], rank))
    start = jnp.where(context.count == 0, fresh, old)
    if context.moment is None:
      return correlation.svd_sketch(g, start)
    return jax.lax.cond(
      context.count % lambda_ == 0,
      lambda: correlation.svd_sketch(g, start),
      lambda: step(old, g, context.moment, axis),
    )

  def build(shape, rank, side, dtype):
    # `find` sees the projected side first, the input axis is the kernel's rows.
    axis = -2 if projects_rows(*shape[-2:], side) else -1
    make = from_context(functools.partial(find, axis=axis))
    return make(shape, rank, side, dtype)

  return build


def random(shape, rank, side, dtype) -> Projector:
  r"""Gaussian projection that is drawn anew from a stored key, never stored.

  :math:`P_{ij} \sim N(0, 1/r)`, so that :math:`E[P P^T] = I`. The state is the
  key of the last refresh, eight bytes; all matrices of a stack share P.

  References:
    Hao, Cao and Mou, `Flora: Low-Rank Adapters Are Secretly Gradient
    Compressors <https://arxiv.org/abs/2402.03293>`_, 2024
  """
  *batch, m, n = shape
  rank = min(rank, m, n)
  rows = projects_rows(m, n, side)
  # What is not stored cannot be quantised.
  drawn = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32

  def draw(key_data):
    key = jax.random.wrap_key_data(key_data)
    p = jax.random.normal(key, basis_shape(m, n, rank, rows), jnp.float32)
    return (p / jnp.sqrt(rank)).astype(drawn)

  def spread(p):
    return jnp.broadcast_to(p, (*batch, *p.shape))

  def project_drawn(g, state):
    # From the left one for each matrix, else XLA moves the stack around its
    # product with a single one; from the right all rows are one matrix.
    p = draw(state)
    return project(g, spread(p), rows) if rows else g @ p.mT

  return Projector(
    init=lambda: jax.random.key_data(jax.random.key(0)),
    refresh=lambda g, state, context: jax.random.key_data(context.key),
    project=project_drawn,
    back=lambda r, state: back_project(r, spread(draw(state)), rows),
    basis=lambda state: wide(spread(draw(state) if rows else draw(state).mT)),
  )


def _coordinates(init, choose, load) -> ProjectorFn:
  """A projector that picks entries of the projected side.

  Args:
    init: `(batch, rank) -> state`.
    choose: `(norms, rank, context) -> state`; norms are (*batch, size).
    load: `(state, size, rank) -> indices`, (*batch, rank) or (rank,).
  """

  def build(shape, rank, side, dtype):
    del dtype  # Indices are int32.
    *batch, m, n = shape
    rank = min(rank, m, n)
    rows = projects_rows(m, n, side)
    axis, size = (-2, m) if rows else (-1, n)

    def indices(state):
      picked = jnp.broadcast_to(load(state, size, rank), (*batch, rank))
      return jnp.expand_dims(picked, -1 if rows else -2)

    def put(r, state):
      zeros = jnp.zeros((*batch, m, n), r.dtype)
      at = jnp.broadcast_to(indices(state), r.shape)
      return by_layer(
        lambda at, r: jnp.put_along_axis(zeros, at, r, axis, inplace=False)
      )(at, r)

    def basis(state):
      picked = jnp.broadcast_to(load(state, size, rank), (*batch, rank))
      return jax.nn.one_hot(picked, size, axis=-2, dtype=jnp.float32)

    def refresh(g, state, context):
      del state
      g = unit(wide(g))
      return choose(jnp.sum(g * g, axis=-1 if rows else -2), rank, context)

    return Projector(
      init=lambda: init(batch, rank),
      refresh=refresh,
      project=lambda g, s: jnp.take_along_axis(g, indices(s), axis),
      back=put,
      basis=basis,
    )

  return build


# In ascending order, so that a row that stays is likelier to keep its place.
coordinates = _coordinates(
  init=lambda batch, rank: (
    jnp.zeros((*batch, rank), jnp.int32) + jnp.arange(rank, dtype=jnp.int32)
  ),
  choose=lambda norms, rank, context: jnp.sort(jax.lax.top_k(norms, rank)[1]),
  load=lambda indices, size, rank: indices,
)
random_coordinates = _coordinates(
  init=lambda batch, rank: jax.random.key_data(jax.random.key(0)),
  choose=lambda norms, rank, context: jax.random.key_data(context.key),
  load=lambda key_data, size, rank: jnp.sort(
    jax.random.permutation(jax.random.wrap_key_data(key_data), size)[:rank]
  ),
)
svd = from_basis(_svd_basis, orthonormal=True)
sketch = sketch_with(power_steps=1)
PROJECTORS: dict[str, ProjectorFn] = {
  'svd': svd,
  'sketch': sketch,
  'sketch2': sketch_with(power_steps=2),
  'correlation_aware': correlation_aware(),
  'random': random,
  'coordinates': coordinates,
  'random_coordinates': random_coordinates,
}
