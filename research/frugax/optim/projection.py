r"""What a projector is, and the building of one from a basis.

A projector is a function `build(shape, rank, side, dtype) -> Projector`, called
once for each matrix leaf with the shape (*batch, m, n); a Projector is four
functions on arrays. Batch axes are carried along, never mapped over. A new
basis needs one function only: `from_basis(find)` does the rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frugax import names, quant
from frugax.optim.adam import wide
from frugax.optim.meshes import uncut

SIDES = ('short', 'long', 'left', 'right')  # and 'both' in `low_rank`


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
      inner state with the basis; None if there is no such thing. A pair of
      the two where both sides are projected.
    orthonormal: whether the basis is, but for rounding. Fira then has its norms
      without a matmul.
  """

  init: Callable[[], Any]
  refresh: Callable[[jax.Array, Any, Context], Any]
  project: Callable[[jax.Array, Any], jax.Array]
  back: Callable[[jax.Array, Any], jax.Array]
  basis: Callable[[Any], Any] | None = None
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
      init=lambda: store(jnp.zeros((*batch, *basis_shape(m, n, rank, rows)))),
      refresh=refresh,
      project=lambda g, p: project(g, p, rows, load),
      back=lambda r, p: back_project(r, p, rows, load),
      basis=lambda p: turn(wide(load(p))),
      # Blocks of few bits round too coarsely to count on it.
      orthonormal=orthonormal and jnp.issubdtype(dtype, jnp.floating),
    )

  return build


def both(build: ProjectorFn) -> ProjectorFn:
  r"""Project both sides, :math:`R = P^T G Q^T` of shape (r, r).

  The second subspace is found in the first one's image, which for singular
  vectors makes no difference and costs less. Projectors that follow a first
  moment get none: it is in neither image.

  Args:
    build: the projector function of one side.

  Returns:
    A projector function whose state is the pair of both; it ignores `side`.

  Examples:
    >>> from frugax.optim.projectors import svd
    >>> p = both(svd)((6, 4), 2, 'both', jnp.float32)
    >>> g = jnp.outer(jnp.arange(6.0), jnp.arange(4.0))
    >>> state = p.refresh(g, p.init(), Context(jax.random.key(0)))
    >>> print(jnp.abs(p.back(p.project(g, state), state) - g).max() < 1e-4)
    True
  """

  def build_both(shape, rank, side, dtype):
    del side
    *batch, m, n = shape
    rank = min(rank, m, n)
    left = build(shape, rank, 'left', dtype)
    right = build((*batch, rank, n), rank, 'right', dtype)

    def refresh(g, state, context):
      context = context._replace(moment=None)
      rows = left.refresh(g, state[0], context)
      context = context._replace(key=jax.random.fold_in(context.key, 1))
      return rows, right.refresh(left.project(g, rows), state[1], context)

    return Projector(
      init=lambda: (left.init(), right.init()),
      refresh=refresh,
      project=lambda g, s: right.project(left.project(g, s[0]), s[1]),
      back=lambda r, s: left.back(right.back(r, s[1]), s[0]),
      basis=left.basis and (lambda s: (left.basis(s[0]), right.basis(s[1]))),
      orthonormal=left.orthonormal and right.orthonormal,
    )

  return build_both


def basis_shape(m: int, n: int, rank: int, rows: bool) -> tuple[int, int]:
  """Shape of the basis of an m x n matrix, which lies as the matrix does."""
  return (m, rank) if rows else (rank, n)


def project(g: jax.Array, p: Any, rows: bool, load=lambda p: p) -> jax.Array:
  """Small matrices: P^T G, or G P^T for the columns.

  Args:
    g: (*batch, m, n).
    p: the bases as they are stored, with the same batch axes.
    rows: whether the rows are projected.
    load: from stored bases to arrays.
  """
  axis = -2 if rows else -1
  coded = isinstance(p, quant.Blocks)

  def one(g, p):
    p = load(p)
    if p.shape[-1 if rows else -2] == 1:
      # XLA would copy the transposed gradient for a product of rank one.
      return jnp.sum(wide(p) * wide(g), axis, keepdims=True)
    r = _transpose(p) @ g if rows else g @ _transpose(p)
    # Codes lie flat, so the bases' long axis is cut by all mesh axes at once,
    # also those that cut the gradient along its other axis. XLA would then
    # gather the gradient if it could make each device a part of the rank.
    return uncut(r, axis) if coded else r

  return _each(one, g, p)


def back_project(
  r: jax.Array, p: Any, rows: bool, load=lambda p: p
) -> jax.Array:
  """Full matrices: P R, or R P for the columns; arguments as of `project`."""

  def one(r, p):
    p = load(p)
    if p.shape[-1 if rows else -2] == 1:
      return p * r
    return p @ r if rows else r @ p

  return _each(one, r, p)


def _each(f, x, p):
  """`f` on each matrix of a stack, one after the other where memory counts.

  Products of a whole stack would be communicated as a whole, and bases in few
  bits be held in many. CPUs are faster on all at once.
  """
  batch = x.shape[:-2]
  if not batch:
    return f(x, p)

  def one_by_one(x, p):
    xs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(batch) :]), (x, p))
    # TPUs' compiler would cast the whole stack ahead of the loop. A factor that
    # it cannot see to be one keeps the cast inside.
    one = jax.lax.optimization_barrier(jnp.ones([], x.dtype))
    y = jax.lax.map(lambda pair: f(one * pair[0], pair[1]), xs)
    return y.reshape(*batch, *y.shape[1:])

  return jax.lax.platform_dependent(x, p, cpu=f, default=one_by_one)


def _storage(dtype, rows, batch_axes):
  """How bases are stored and loaded: in a float dtype or in quantised blocks.

  Blocks run along the rank first, so that what lies together belongs to
  neighbours on the side that may be sharded.
  """
  name = jnp.dtype(dtype).name
  if name not in quant.AFFINE:
    if not jnp.issubdtype(name, jnp.floating):
      raise ValueError(
        f'projectors cannot be stored as {name}: give a floating-point dtype '
        f'or one of {", ".join(quant.AFFINE)}'
      )
    return (lambda p: p.astype(dtype)), (lambda p: p)
  turn = (lambda x: x) if rows else _transpose
  return (
    lambda p: quant.quantize(turn(p), name, batch_axes=batch_axes),
    lambda q: turn(quant.dequantize(q)),
  )


def _transpose(x):
  return jnp.swapaxes(x, -1, -2)
