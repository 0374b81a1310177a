r"""Projectors: how a matrix is taken to a low-rank subspace and back.

A projector is a function `build(shape, rank, side, dtype) -> Projector`, called
once for each matrix leaf with the shape (*batch, m, n); a Projector is four
functions on arrays. Batch axes are carried along, never mapped over. The
names that `low_rank(projector=...)` knows are in `PROJECTORS`; anything else
with this signature can be passed in their place. A new basis needs one
function only: `from_basis(find)` does the rest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frugax import names, quant
from frugax.optim import correlation, linalg
from frugax.optim.adam import wide
from frugax.optim.linalg import orthonormal, unit

SIDES = ('short', 'long', 'left', 'right')


class Context(NamedTuple):
  """What a projector may look at besides the gradient when it is refreshed.

  Attributes:
    key: a PRNG key; differs for each leaf and refresh, and is the same for all
      matrices of a stack, so that a stack and its layers agree.
    count: refreshes before this one, an int32 scalar.
    steps: updates before this one, an int32 scalar.
    moment: the inner transformation's first moment of this leaf, small and in
      the old basis, or None if it has none.
  """

  key: jax.Array
  count: jax.typing.ArrayLike = 0
  steps: jax.typing.ArrayLike = 0
  moment: jax.Array | None = None


class Projector(NamedTuple):
  """One leaf's projection. Its state is any pytree of arrays, never typed keys.

  Attributes:
    init: `() -> state`, before the first gradient.
    refresh: `(g, state, context) -> state`, a new subspace from the gradient g,
      a (*batch, m, n) array, and a `Context`.
    project: `(g, state) -> r`, the small matrices.
    back: `(r, state) -> g`, small matrices to full ones.
    basis: `state -> P`, (*batch, m, r) for the row side and (*batch, n, r) for
      the column side, in float32. Needed by the moment policies that turn the
      inner state with the basis; None if there is no such thing.
    orthonormal: whether the basis is, but for rounding. Fira then has its norms
      without a matmul.
  """

  init: Callable[[], Any]
  refresh: Callable[[jax.Array, Any, Context], Any]
  project: Callable[[jax.Array, Any], jax.Array]
  back: Callable[[jax.Array, Any], jax.Array]
  basis: Callable[[Any], jax.Array] | None = None
  orthonormal: bool = False


ProjectorFn = Callable[[tuple[int, ...], int, str, Any], Projector]


def projects_rows(m: int, n: int, side: str) -> bool:
  """Whether an m x n matrix loses its row axis (P^T G) or its columns (G P^T).

  Args:
    m: rows, the input side of a kernel.
    n: columns.
    side: 'short' or 'long', the smaller or larger of the two (of a square
      matrix the rows count as the short side); 'left' for the rows, 'right' for
      the columns.

  Returns:
    True for the rows.

  Raises:
    ValueError: an unknown side.

  Examples:
    >>> projects_rows(4, 6, 'short'), projects_rows(4, 4, 'long')
    (True, False)
  """
  if side not in SIDES:
    raise names.unknown('side', side, SIDES)
  return {'short': m <= n, 'long': m > n, 'left': True, 'right': False}[side]


def from_basis(
  find: Callable[[jax.Array, jax.Array, int, jax.Array], jax.Array],
  orthonormal: bool = False,
) -> ProjectorFn:
  r"""A projector that stores a basis, from the function that finds the basis.

  For the row side :math:`R = P^T G` and :math:`\hat G = P R` with
  :math:`P \in R^{m \times r}`; for the column side :math:`R = G P^T` and
  :math:`\hat G = R P` with :math:`P \in R^{r \times n}`. P lies as the gradient
  does, so that its long axis can be sharded as the parameter's is.

  Args:
    find: `(g, old, rank, key) -> basis` for the row side: g is (*batch, m, n)
      in float32, old and basis are (*batch, m, rank); old is zero before the
      first refresh. The column side is handed to it transposed.
    orthonormal: whether the bases always are.

  Returns:
    A projector function for `low_rank(projector=...)`.

  Examples:
    The first coordinates as a subspace:

    >>> coordinates = from_basis(lambda g, old, rank, key: jnp.zeros_like(
    ...   old).at[..., :rank, :].set(jnp.eye(rank)))
    >>> p = coordinates((3, 4), 2, 'short', jnp.float32)
    >>> g = jnp.arange(12.).reshape(3, 4)
    >>> state = p.refresh(g, p.init(), Context(jax.random.key(0)))
    >>> print(p.project(g, state))
    [[0. 1. 2. 3.]
     [4. 5. 6. 7.]]
  """
  return from_context(
    lambda g, old, rank, context: find(g, old, rank, context.key), orthonormal
  )


def from_context(
  find: Callable[[jax.Array, jax.Array, int, Context], jax.Array],
  orthonormal: bool = False,
) -> ProjectorFn:
  """As `from_basis`, for bases that depend on more than the gradient.

  Args:
    find: `(g, old, rank, context) -> basis`, as in `from_basis`; the `Context`
      has the key, the number of the refresh and the first moment, which is
      (*batch, rank, n) as g is (*batch, m, n).
    orthonormal: whether the bases always are.

  Returns:
    A projector function for `low_rank(projector=...)`.
  """

  def build(shape, rank, side, dtype):
    *batch, m, n = shape
    rank = min(rank, m, n)
    rows = projects_rows(m, n, side)
    turn = (lambda x: x) if rows else _transpose
    store, load = _storage(dtype, rows, len(batch))

    def refresh(g, old, context):
      if context.moment is not None:
        context = context._replace(moment=turn(wide(context.moment)))
      return store(
        turn(find(turn(wide(g)), turn(wide(load(old))), rank, context))
      )

    return Projector(
      init=lambda: store(jnp.zeros((*batch, *_size(m, n, rank, rows)))),
      refresh=refresh,
      project=lambda g, p: _project(g, load(p), rows),
      back=lambda r, p: _back(r, load(p), rows),
      basis=lambda p: turn(wide(load(p))),
      # Blocks of few bits round too coarsely to count on it.
      orthonormal=orthonormal and jnp.issubdtype(dtype, jnp.floating),
    )

  return build


def _size(m, n, rank, rows):
  return (m, rank) if rows else (rank, n)


def _storage(dtype, rows, batch_axes):
  """How bases are stored and loaded: in a float dtype or in quantised blocks.

  Blocks run along the rank first, so that what lies together belongs to
  neighbours on the side that may be sharded.
  """
  name = jnp.dtype(dtype).name
  if name not in quant.FORMATS:
    if not jnp.issubdtype(name, jnp.floating):
      raise ValueError(
        f'projectors cannot be stored as {name}: give a floating-point dtype '
        f'or one of {", ".join(quant.FORMATS)}'
      )
    return (lambda p: p.astype(dtype)), (lambda p: p)
  turn = (lambda x: x) if rows else _transpose
  return (
    lambda p: quant.quantize(turn(p), name, batch_axes=batch_axes),
    lambda q: turn(quant.dequantize(q)),
  )


def _project(g, p, rows):
  axis = -2 if rows else -1
  if p.shape[-1 if rows else -2] == 1:
    # XLA would copy the transposed gradient for a product of rank one.
    return jnp.sum(wide(p) * wide(g), axis, keepdims=True)
  return _transpose(p) @ g if rows else g @ _transpose(p)


def _back(r, p, rows):
  if p.shape[-1 if rows else -2] == 1:
    return p * r
  return p @ r if rows else r @ p


def _transpose(x):
  return jnp.swapaxes(x, -1, -2)


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
    g = unit(g)
    m = g.shape[-2]
    # One draw for all matrices of a stack: a layer alone gets the same one.
    fresh = jax.random.normal(key, (m, rank), g.dtype) / jnp.sqrt(m)
    p = old + jnp.where(jnp.any(old != 0), _EXPLORE, 1.0) * fresh
    for _ in range(power_steps):
      with jax.default_matmul_precision('highest'):
        p = orthonormal(g @ (_transpose(g) @ p))
    return p

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
    p = jax.random.normal(key, _size(m, n, rank, rows), jnp.float32)
    return (p / jnp.sqrt(rank)).astype(drawn)

  def basis(key_data):
    p = wide(draw(key_data))
    p = p if rows else _transpose(p)
    return jnp.broadcast_to(p, (*batch, *p.shape))

  return Projector(
    init=lambda: jax.random.key_data(jax.random.key(0)),
    refresh=lambda g, state, context: jax.random.key_data(context.key),
    project=lambda g, state: _project(g, draw(state), rows),
    back=lambda r, state: _back(r, draw(state), rows),
    basis=basis,
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
      return jnp.put_along_axis(zeros, at, r, axis, inplace=False)

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
