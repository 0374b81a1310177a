"""Run any optax transformation in low-rank subspaces of the gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax import names
from frugax.optim import leaves as leaves_lib
from frugax.optim import moments as moments_lib
from frugax.optim import projection
from frugax.optim import projectors as projectors_lib
from frugax.optim import refreshes as refreshes_lib
from frugax.optim import residuals as residuals_lib
from frugax.optim.axes import from_matrix, matrix_shape, resolve


class LowRankState(NamedTuple):
  """State of `low_rank`.

  Attributes:
    count: updates so far, int32.
    projectors: a tree like the parameters with each matrix's projector state;
      leaves left whole hold an empty optax.MaskedNode.
    inner: the state of the wrapped transformation, on the small matrices.
    residuals: a tree like the parameters with what the residual policy
      remembers of each matrix, such as norms; nothing for most.
    refreshes: the same of the refresh schedule.
  """

  count: jax.Array
  projectors: Any
  inner: optax.OptState
  residuals: Any
  refreshes: Any


def low_rank(
  inner: optax.GradientTransformation,
  rank: int | float = 128,
  update_interval: int = 200,
  scale: jax.typing.ArrayLike = 1.0,
  side: str = 'short',
  projector: str | projection.ProjectorFn = 'svd',
  moments: str | moments_lib.PolicyFn | moments_lib.Moments = 'keep',
  residual: str | residuals_lib.Residual | Callable[..., jax.Array] = 'drop',
  refresh: str | refreshes_lib.Schedule = 'together',
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

  Batch axes are carried through the linear algebra: inside a `vmap` over
  parameters a refresh would run at every update, so stack them and name the
  batch axes instead. The layers of a stack, along its first batch axis, are
  refreshed one after the other: keep that axis unsharded. With 'svd' the
  refresh of a sharded gradient gathers the gradient of one layer, since XLA
  does not partition it; 'sketch' gathers nothing larger than its basis.

  Args:
    inner: the transformation to run in the subspaces, without learning rate.
    rank: dimension of the subspaces; a matrix with a shorter side than that
      keeps it whole. A float below 1 is that share of each matrix's shorter
      side, rounded down, 1 at least.
    update_interval: updates from one refresh of the subspaces to the next.
    scale: :math:`\alpha`, multiplies the updates of projected leaves only.
    side: which side is projected: 'short', 'long', 'left' (rows, the input
      side of a kernel), 'right' (columns), or 'both', for which the small
      matrices are (r, r) and residual policies know one factor a matrix. A
      square matrix is projected on its rows by 'short'.
    projector: 'svd', the leading singular vectors; 'sketch' ('sketch2'), one
      (two) warm-started steps of orthogonal iteration, matmuls and a thin QR;
      'random', Gaussian, drawn anew from a key and never stored; another of
      `frugax.optim.projectors`, or a function as described there.
    moments: what becomes of the inner state at a refresh. 'keep' leaves the
      numbers although their coordinates now mean something else, as the
      published GaLore does. 'reset' starts all of it anew, counters and the
      leaves left whole included, so that bias corrections stay right; keep
      schedules outside of `inner` then. 'zero' only clears moments of projected
      leaves, 'sign' flips coordinates whose vector was flipped, 'rotate' turns
      them with the basis, 'ldadam' does so by LDAdam's estimate (with Adam's
      usual decays), or a function: see `frugax.optim.moments`, also for inner
      states whose field names are not the usual ones (`Moments`).
    residual: what becomes of the gradient outside of the subspaces. 'drop' as
      above; 'fira', 'sgd', 'sign', 'channel' and 'tensor' as described in
      `frugax.optim.residuals`, or a function from its `Parts` to the update.
    refresh: when subspaces are refreshed: 'together', all at the same steps;
      'staggered', all at the first step and from then on each layer at its own
      step of the interval, of N matrices at most :math:`\lceil N/n \rceil` a
      step; 'lazy', Q-GaLore's, those that hardly turn less often; or as made by
      `frugax.optim.refreshes.lazy`. Staggered layers have different phases: a
      stack is not trained quite as its layers alone would be.
    axes: which axes of a leaf form its matrix. None: 2-D leaves are matrices,
      scalars and vectors are left whole, others are refused. Else a tree of the
      parameters' structure, or a function that makes it from them, with
      MatrixAxes, optax's Galore and Muon dimension numbers, or None to leave a
      leaf whole. `matrix_axes` makes it from logical axis names.
    projector_dtype: how P is stored: a dtype, 'int4' or 'int8' (packed blocks);
      None takes the parameter's dtype. It is computed in float32.
    key: a seed or a jax PRNG key for 'sketch' and 'random'. Each leaf folds in
      its path and the refresh, so that all hosts draw the same.

  Returns:
    An optax.GradientTransformationExtraArgs. Parameters and extra arguments of
    `update` are passed on to `inner`; it alone decides whether it needs them.

  Raises:
    ValueError: a rank that is neither an int of at least 1 nor a float between
      0 and 1; update_interval below 1 or no int; an unknown name; and, from
      init and update, axes that do not fit or a leaf that is not
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
  share = isinstance(rank, float) and 0 < rank < 1
  if not share:
    leaves_lib.check_positive('rank', rank, ' or a share between 0 and 1')
  leaves_lib.check_positive('update_interval', update_interval)
  sides = (*projection.SIDES, 'both')
  if side not in sides:
    raise names.unknown('side', side, sides)
  moments = moments_lib.by_name(moments)
  schedule = refreshes_lib.by_name(refresh)
  if moments.policy == 'reset' and not schedule.together:
    raise ValueError(
      f"moments='reset' starts the inner state of all leaves anew at once, "
      f"which refresh={refresh!r} has no step for: use 'zero', or 'together'"
    )
  residual = residuals_lib.by_name(residual)
  if not callable(projector) and projector not in projectors_lib.PROJECTORS:
    raise names.unknown('projector', projector, projectors_lib.PROJECTORS)
  build = projectors_lib.PROJECTORS.get(projector, projector)
  if side == 'both':
    build = projection.both(build)
  inner = optax.with_extra_args_support(inner)

  def make(shape, dtype):
    own = max(int(rank * min(shape[-2:])), 1) if share else rank
    return build(shape, own, side, projector_dtype or dtype)

  def describe(tree):
    return leaves_lib.describe(tree, resolve(tree, axes), make, side)

  def init_small(leaves, arrays, treedef):
    return treedef.unflatten(
      jnp.zeros(leaf.small_shape, x.dtype) if leaf.axes else x
      for leaf, x in zip(leaves, arrays, strict=True)
    )

  def find_moments(leaves, inner_state):
    smalls = {leaf.path: leaf.small_shape for leaf in leaves}
    return moments_lib.find(moments, inner_state, smalls)

  def init_fn(params):
    arrays, treedef, leaves = describe(params)
    if moments.turns or schedule.after:
      leaves_lib.check_bases(leaves, moments.policy, refresh)
    inner_state = inner.init(init_small(leaves, arrays, treedef))
    find_moments(leaves, inner_state)  # Refuses early.

    clocks = refreshes_lib.init(schedule, update_interval, leaves)

    def tree(one):
      return treedef.unflatten(
        one(leaf, x) if leaf.axes else optax.MaskedNode()
        for leaf, x in zip(leaves, arrays, strict=True)
      )

    return LowRankState(
      count=jnp.zeros([], jnp.int32),
      projectors=tree(lambda leaf, x: leaf.projector.init()),
      inner=inner_state,
      residuals=tree(
        lambda leaf, x: residual.init(matrix_shape(x.shape, leaf.axes), x.dtype)
      ),
      refreshes=treedef.unflatten(
        clock if leaf.axes else optax.MaskedNode()
        for leaf, clock in zip(leaves, clocks, strict=True)
      ),
    )

  def update_fn(updates, state, params=None, **extra_args):
    arrays, treedef, leaves = describe(updates)
    old = treedef.flatten_up_to(state.projectors)
    memories = treedef.flatten_up_to(state.residuals)
    schedules = treedef.flatten_up_to(state.refreshes)
    projected = [i for i, leaf in enumerate(leaves) if leaf.axes is not None]
    grads = [
      leaf.matrix(x, residual.carry and leaf.axes and residual.carry(memory))
      for leaf, x, memory in zip(leaves, arrays, memories, strict=True)
    ]
    flat, inner_treedef = moments_lib.flatten(state.inner)
    groups = find_moments(leaves, state.inner)
    first = {g.leaf: g.first[0] for g in reversed(groups) if g.first}

    def reset():
      whole = arrays if params is None else treedef.flatten_up_to(params)
      small = init_small(leaves, whole, treedef)
      fresh, _ = moments_lib.flatten(inner.init(small))
      # Gradients may be of another dtype than the parameters in init were.
      fresh = jax.tree.map(lambda x, old: x.astype(old.dtype), fresh, flat)
      return dict(enumerate(fresh))

    new = refreshes_lib.run(
      refreshes_lib.Plan(schedule, update_interval, moments, leaves, groups),
      grads,
      {i: flat[at] for i, at in first.items()},
      state.count,
      leaves_lib.seed(key),
      refreshes_lib.Changing(
        projectors={i: old[i] for i in projected},
        memories={i: schedules[i] for i in projected},
        moments={i: flat[i] for i in moments.turning(groups, len(flat))},
      ),
      reset,
    )
    states = [new.projectors.get(i, x) for i, x in enumerate(old)]
    turned = [new.moments.get(i, x) for i, x in enumerate(flat)]

    def shrink(xs):
      return [
        leaf.small(x, p) for leaf, x, p in zip(leaves, xs, states, strict=True)
      ]

    small = [
      r.astype(x.dtype) for r, x in zip(shrink(grads), arrays, strict=True)
    ]
    if params is not None:
      whole = treedef.flatten_up_to(params)
      params = treedef.unflatten(
        shrink(leaf.matrix(x) for leaf, x in zip(leaves, whole, strict=True))
      )
    inner_updates, inner_state = inner.update(
      treedef.unflatten(small),
      inner_treedef.unflatten(turned),
      params,
      **extra_args,
    )
    outputs = treedef.flatten_up_to(inner_updates)

    for i, leaf in enumerate(leaves):
      if leaf.axes is not None:
        at = first.get(i)
        sources = residuals_lib.Sources(
          grad=grads[i],
          small=small[i],
          update=outputs[i],
          projector=states[i],
          moment=None if at is None else turned[at],
          old_projector=old[i],
          old_moment=None if at is None else flat[at],
        )
        full, memories[i] = residuals_lib.finish(
          residual, leaf, scale, sources, memories[i]
        )
        full = from_matrix(full, leaf.axes, leaf.shape)
        outputs[i] = full.astype(arrays[i].dtype)
    return treedef.unflatten(outputs), LowRankState(
      count=optax.safe_increment(state.count),
      projectors=treedef.unflatten(states),
      inner=inner_state,
      residuals=treedef.unflatten(memories),
      refreshes=treedef.unflatten(
        new.memories.get(i, x) for i, x in enumerate(schedules)
      ),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
