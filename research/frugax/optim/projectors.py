r"""Projectors: how a matrix is taken to a low-rank subspace and back.

A projector is a function `build(shape, rank, side, dtype) -> Projector`, called
once for each matrix leaf with the shape (*batch, m, n); a Projector is four
functions on arrays. Batch axes are carried along, never mapped over. The
names that `low_rank(projector=...)` knows are in `PROJECTORS`; anything else
with this signature can be passed in their place. A new basis needs one
function only: `from_basis(find)` does the rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frugax import names
from frugax.optim.adam import wide

SIDES = ('short', 'long', 'left', 'right')


class Projector(NamedTuple):
  """One leaf's projection. Its state is any pytree of arrays, never typed keys.

  Attributes:
    init: `() -> state`, before the first gradient.
    refresh: `(g, state, key) -> state`, a new subspace from the gradient g, a
      (*batch, m, n) array. `key` differs for each leaf and refresh, and is the
      same for all matrices of a stack, so that a stack and its layers agree.
    project: `(g, state) -> r`, the small matrices.
    back: `(r, state) -> g`, small matrices to full ones.
  """

  init: Callable[[], Any]
  refresh: Callable[[jax.Array, Any, jax.Array], Any]
  project: Callable[[jax.Array, Any], jax.Array]
  back: Callable[[jax.Array, Any], jax.Array]


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

  Returns:
    A projector function for `low_rank(projector=...)`.

  Examples:
    The first coordinates as a subspace:

    >>> coordinates = from_basis(lambda g, old, rank, key: jnp.zeros_like(
    ...   old).at[..., :rank, :].set(jnp.eye(rank)))
    >>> p = coordinates((3, 4), 2, 'short', jnp.float32)
    >>> g = jnp.arange(12.).reshape(3, 4)
    >>> state = p.refresh(g, p.init(), jax.random.key(0))
    >>> print(p.project(g, state))
    [[0. 1. 2. 3.]
     [4. 5. 6. 7.]]
  """

  def build(shape, rank, side, dtype):
    *batch, m, n = shape
    rank = min(rank, m, n)
    rows = projects_rows(m, n, side)
    turn = (lambda x: x) if rows else _transpose
    size = (m, rank) if rows else (rank, n)

    def refresh(g, old, key):
      basis = find(turn(wide(g)), turn(wide(old)), rank, key)
      return turn(basis).astype(old.dtype)

    return Projector(
      init=lambda: jnp.zeros((*batch, *size), dtype),
      refresh=refresh,
      project=lambda g, p: _project(g, p, rows),
      back=lambda r, p: _back(r, p, rows),
    )

  return build


def _project(g, p, rows):
  return _transpose(p) @ g if rows else g @ _transpose(p)


def _back(r, p, rows):
  return p @ r if rows else r @ p


def _transpose(x):
  return jnp.swapaxes(x, -1, -2)


def _factorize(f, x):
  """`f(x)` for a stack of matrices; on CPUs for one of them after the other.

  jaxlib hands the matrices of a stack to the thread pool that its caller runs
  on, and waits: several virtual devices at once wait for each other for ever.
  """
  *batch, m, n = x.shape
  if not batch:
    return f(x)

  def one_by_one(x):
    factors = jax.lax.map(f, x.reshape(-1, m, n))
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), factors)

  return jax.lax.platform_dependent(x, cpu=one_by_one, default=f)


def _svd_basis(g, old, rank, key):
  """The leading left singular vectors: the best subspace of the rank.

  Their signs are arbitrary and differ between back ends, yet moments that are
  kept across a refresh depend on them: the largest entry is made positive.
  """
  del old, key
  left = _factorize(lambda x: jnp.linalg.svd(x, full_matrices=False)[0], g)
  basis = left[..., :rank]
  at = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
  return basis * jnp.sign(jnp.take_along_axis(basis, at, axis=-2))


# Weight of fresh random directions in the warm start. Without it a direction
# orthogonal to the old basis would never be found; above one tenth the noise
# costs captured energy.
_EXPLORE = 0.1


def _sketch_basis(g, old, rank, key):
  """One step of orthogonal iteration on G G^T from the old basis."""
  tiny = jnp.finfo(g.dtype).tiny
  # Squares of 1e-20 gradients would vanish in float32.
  g = g / jnp.maximum(jnp.abs(g).max(axis=(-1, -2), keepdims=True), tiny)
  m = g.shape[-2]
  # One draw for all matrices of a stack: a layer alone gets the same one.
  fresh = jax.random.normal(key, (m, rank), g.dtype) / jnp.sqrt(m)
  start = old + jnp.where(jnp.any(old != 0), _EXPLORE, 1.0) * fresh
  with jax.default_matmul_precision('highest'):
    image = g @ (_transpose(g) @ start)
    q, r = _factorize(jnp.linalg.qr, image)
  # A positive diagonal makes the factorisation unique: the basis turns as
  # little as the gradient does, and alike on every back end.
  signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
  return q * jnp.where(signs == 0, 1, signs)[..., None, :]


def random(shape, rank, side, dtype) -> Projector:
  r"""Gaussian projection that is drawn anew from a stored key, never stored.

  :math:`P_{ij} \sim N(0, 1/r)`, so that :math:`E[P P^T] = I`. The state is the
  key of the last refresh, eight bytes; all matrices of a stack share P.

  References:
    Hao, Cao and Mou, `Flora: Low-Rank Adapters Are Secretly Gradient
    Compressors <https://arxiv.org/abs/2402.03293>`_, 2024
  """
  *_, m, n = shape
  rank = min(rank, m, n)
  rows = projects_rows(m, n, side)

  def draw(key_data):
    key = jax.random.wrap_key_data(key_data)
    p = jax.random.normal(key, (m, rank) if rows else (rank, n), jnp.float32)
    return (p / jnp.sqrt(rank)).astype(dtype)

  return Projector(
    init=lambda: jax.random.key_data(jax.random.key(0)),
    refresh=lambda g, state, key: jax.random.key_data(key),
    project=lambda g, state: _project(g, draw(state), rows),
    back=lambda r, state: _back(r, draw(state), rows),
  )


svd = from_basis(_svd_basis)
sketch = from_basis(_sketch_basis)
PROJECTORS: dict[str, ProjectorFn] = {
  'svd': svd,
  'sketch': sketch,
  'random': random,
}
