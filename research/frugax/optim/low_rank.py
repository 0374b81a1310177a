"""Run any optax transformation in low-rank subspaces of the gradients."""

import numbers
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax import names
from frugax.optim import projectors as projectors_lib
from frugax.optim.axes import (
  MatrixAxes,
  as_matrix,
  from_matrix,
  matrix_shape,
  path_name,
  resolve,
)

MOMENTS = ('keep', 'reset')


class LowRankState(NamedTuple):
  """State of `low_rank`.

  Attributes:
    count: updates so far, int32.
    projectors: a tree like the parameters with each matrix's projector state;
      leaves left whole hold an empty optax.MaskedNode.
    inner: the state of the wrapped transformation, on the small matrices.
  """

  count: jax.Array
  projectors: Any
  inner: optax.OptState


class _Leaf(NamedTuple):
  """What is static about one parameter; axes is None if it is left whole."""

  path: tuple[Any, ...]
  shape: tuple[int, ...]
  axes: MatrixAxes | None
  projector: projectors_lib.Projector | None

  def small(self, x, state):
    """The projection of an array of the parameter's shape."""
    if self.axes is None:
      return x
    r = self.projector.project(as_matrix(x, self.axes), state)
    return r.astype(x.dtype)

  def full(self, r, state, scale, dtype):
    """The scaled update of the parameter's shape from the inner one."""
    if self.axes is None:
      return r
    update = scale * self.projector.back(r, state)
    return from_matrix(update, self.axes, self.shape).astype(dtype)


def low_rank(
  inner: optax.GradientTransformation,
  rank: int = 128,
  update_interval: int = 200,
  scale: jax.typing.ArrayLike = 1.0,
  side: str = 'short',
  projector: str | projectors_lib.ProjectorFn = 'svd',
  moments: str = 'keep',
  axes: Any | Callable[[Any], Any] | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Run a transformation in a low-rank subspace of each gradient matrix.

  For a gradient :math:`G_t` of shape (m, n) with :math:`m \le n`

  .. math::
    R_t = P_t^T G_t, \qquad (N_t, s_t) = \mathrm{inner}(R_t, s_{t-1}), \qquad
    U_t = \alpha P_t N_t

  and for :math:`m > n` the same from the right, :math:`R_t = G_t P_t^T`. P is
  found anew from the current gradient at updates 0, n, 2n, ... and kept in
  between. The state of `inner` has the size of R: :math:`r n` for an m x n
  matrix instead of :math:`m n`.

  `inner` sees one tree of the parameters' structure: small matrices
  (*batch, r, n) or (*batch, m, r) where a leaf is projected, and the gradient
  itself where a leaf is left whole. It may be any transformation. One that
  needs the parameters gets them projected alike; one whose `init` looks at
  their values finds zeros for the projected leaves, there being no subspace
  before the first gradient.

  The refresh is under a single `lax.cond` for all leaves, and batch axes are
  carried through the linear algebra: inside a `vmap` over parameters it would
  run at every update, so stack them and name the batch axes instead. The
  refresh of a sharded gradient gathers that gradient, since XLA does not
  partition SVD and QR; the updates between refreshes do not.

  Args:
    inner: the transformation to run in the subspaces, without learning rate.
    rank: dimension of the subspaces; a matrix with a shorter side than that
      keeps it whole.
    update_interval: updates from one refresh of the subspaces to the next.
    scale: :math:`\alpha`, multiplies the updates of projected leaves only.
    side: which side is projected: 'short', 'long', 'left' (rows, the input
      side of a kernel) or 'right' (columns). A square matrix is projected on
      its rows by 'short'.
    projector: 'svd', the leading singular vectors; 'sketch', one warm-started
      step of orthogonal iteration, matmuls and a QR of a thin matrix; 'random',
      Gaussian and drawn anew from a key when needed, never stored; or a
      function as `frugax.optim.projectors` describes.
    moments: what becomes of the inner state at a refresh. 'keep' leaves the
      numbers although their coordinates now mean something else, as the
      published GaLore does. 'reset' starts all of it anew, counters and the
      leaves left whole included, so that bias corrections stay right; keep
      schedules outside of `inner` then.
    axes: which axes of a leaf form its matrix. None: 2-D leaves are matrices,
      scalars and vectors are left whole, others are refused. Else a tree of the
      parameters' structure, or a function that makes it from them, with
      MatrixAxes, optax's Galore and Muon dimension numbers, or None to leave a
      leaf whole. `matrix_axes` makes it from logical axis names.
    projector_dtype: dtype in which P is stored; None takes the parameter's. It
      is computed in float32.
    key: a seed or a jax PRNG key for 'sketch' and 'random'. Each leaf folds in
      its path and the refresh, so that all hosts draw the same.

  Returns:
    An optax.GradientTransformationExtraArgs. Parameters and extra arguments of
    `update` are passed on to `inner`; it alone decides whether it needs them.

  Raises:
    ValueError: rank or update_interval below 1 or no int; an unknown name;
      and, from init and update, axes that do not fit or a leaf that is not
      floating-point.

  Examples:
    >>> tx = optax.chain(
    ...   low_rank(optax.scale_by_adam(), rank=2, scale=0.25),
    ...   optax.scale_by_learning_rate(1e-2))
    >>> params = {'kernel': jnp.ones((8, 32)), 'bias': jnp.ones(32)}
    >>> state = tx.init(params)
    >>> jax.tree.map(jnp.shape, state[0].inner.mu)
    {'bias': (32,), 'kernel': (2, 32)}
    >>> updates, state = jax.jit(tx.update)(params, state)
    >>> jax.tree.map(jnp.shape, updates)
    {'bias': (32,), 'kernel': (8, 32)}

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection <https://arxiv.org/abs/2403.03507>`_, 2024

    Halko, Martinsson and Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2009 (the sketch)
  """
  _check_positive('rank', rank)
  _check_positive('update_interval', update_interval)
  if side not in projectors_lib.SIDES:
    raise names.unknown('side', side, projectors_lib.SIDES)
  if moments not in MOMENTS:
    raise names.unknown('moments policy', moments, MOMENTS)
  if not callable(projector) and projector not in projectors_lib.PROJECTORS:
    raise names.unknown('projector', projector, projectors_lib.PROJECTORS)
  build = projectors_lib.PROJECTORS.get(projector, projector)
  inner = optax.with_extra_args_support(inner)

  def describe(tree):
    """The leaves of `tree`, its structure and what is static about each."""
    found, treedef = jax.tree.flatten_with_path(tree)
    leaves = []
    for (path, x), spec in zip(found, resolve(tree, axes), strict=True):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
          f'{path_name(path)} is {x.dtype}: low_rank takes floating-point '
          'leaves; hide the others from it with optax.masked'
        )
      bound = None
      if spec is not None:
        dtype = projector_dtype or x.dtype
        bound = build(matrix_shape(x.shape, spec), rank, side, dtype)
      leaves.append(_Leaf(path, x.shape, spec, bound))
    return [x for _, x in found], treedef, leaves

  def refresh(leaves, arrays, states, count):
    base = jax.random.fold_in(_seed(key), count)
    return [
      leaf.projector.refresh(
        as_matrix(x, leaf.axes),
        state,
        jax.random.fold_in(base, zlib.crc32(path_name(leaf.path).encode())),
      )
      if leaf.axes
      else state
      for leaf, x, state in zip(leaves, arrays, states, strict=True)
    ]

  def init_small(leaves, arrays, treedef):
    def one(leaf, x):
      if leaf.axes is None:
        return x
      size = jax.eval_shape(lambda x: leaf.small(x, leaf.projector.init()), x)
      return jnp.zeros(size.shape, x.dtype)

    return treedef.unflatten(map(one, leaves, arrays))

  def init_fn(params):
    arrays, treedef, leaves = describe(params)
    states = [
      leaf.projector.init() if leaf.axes else optax.MaskedNode()
      for leaf in leaves
    ]
    return LowRankState(
      count=jnp.zeros([], jnp.int32),
      projectors=treedef.unflatten(states),
      inner=inner.init(init_small(leaves, arrays, treedef)),
    )

  def update_fn(updates, state, params=None, **extra_args):
    arrays, treedef, leaves = describe(updates)

    # One predicate and one cond for the whole tree, never inside a vmap.
    turns = state.count % update_interval == 0
    states = jax.lax.cond(
      turns,
      lambda old: refresh(leaves, arrays, old, state.count),
      lambda old: old,
      treedef.flatten_up_to(state.projectors),
    )
    inner_state = state.inner
    if moments == 'reset':
      whole = arrays if params is None else treedef.flatten_up_to(params)
      fresh = inner.init(init_small(leaves, whole, treedef))
      # Gradients may be of another dtype than the parameters in init were.
      inner_state = jax.tree.map(
        lambda x, old: jnp.where(turns, x.astype(old.dtype), old),
        fresh,
        inner_state,
      )

    def shrink(tree):
      xs = treedef.flatten_up_to(tree)
      return treedef.unflatten(map(_Leaf.small, leaves, xs, states))

    small, inner_state = inner.update(
      shrink(updates),
      inner_state,
      None if params is None else shrink(params),
      **extra_args,
    )
    updates = treedef.unflatten(
      leaf.full(r, p, scale, g.dtype)
      for leaf, r, p, g in zip(
        leaves, treedef.flatten_up_to(small), states, arrays, strict=True
      )
    )
    count = optax.safe_increment(state.count)
    return updates, LowRankState(count, treedef.unflatten(states), inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_positive(name, value):
  if isinstance(value, jax.Array):
    raise ValueError(
      f'{name} is fixed when the program is compiled, so it must be a Python '
      f'int, not {value}: under optax.inject_hyperparams name it in static_args'
    )
  if not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(f'{name}={value!r}: give an int of at least 1')


def _seed(key):
  """A key of jax's default kind, from a seed or from a key of any kind."""
  if isinstance(key, jax.Array) and (
    key.ndim or not jnp.issubdtype(key.dtype, jnp.integer)
  ):
    key = jax.random.bits(key, dtype=jnp.uint32)
  return jax.random.key(key)
