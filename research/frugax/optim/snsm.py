"""SNSM: momentum in a low-rank subspace over a subset-norm second moment."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import correct_bias, step_and_decay
from frugax.optim.low_rank import low_rank
from frugax.optim.moments import Moments, PolicyFn
from frugax.optim.projection import ProjectorFn
from frugax.optim.refreshes import Schedule
from frugax.optim.subset_norm import scale_by_subset_norm
from frugax.optim.subspace import scale_by_momentum


def snsm(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 200,
  side: str = 'short',
  projector: str | ProjectorFn = 'svd',
  moments: str | PolicyFn | Moments = 'stale',
  refresh: str | Schedule = 'together',
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  subset: str | int = 'heuristic',
  reduction: str = 'sum',
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""Adam with momentum in a subspace and one second moment a row or column.

  For a kernel of shape (m, n) = (in, out) with :math:`m \le n`

  .. math::
    R_t &= P_t^T G_t, \qquad M_t = b_1 M_{t-1} + (1-b_1) R_t \\
    v_{t,j} &= b_2 v_{t-1,j} + (1-b_2) \sum_i G_{t,ij}^2 \\
    U_t &= \frac{\sqrt{1-b_2^t}}{1-b_1^t} \;
      \frac{P_t M_t + G_t - P_t R_t}{\sqrt{v_t} + \epsilon} \\
    W_t &= W_{t-1} - \eta U_t, \qquad W_t \leftarrow W_t - \eta \lambda W_t

  and for :math:`m > n` the same from the right, with a second moment for each
  row. That is `scale_by_subset_norm` around subspace momentum. The optimizer
  holds :math:`m r + r n + n` numbers for a matrix where Adam holds
  :math:`2 m n`. What is left whole has plain Adam.

  The authors compress all linear layers, the head included, with learning rate
  0.05; see `adam_sn` about its size.

  Args:
    learning_rate: a number or a schedule.
    rank: dimension of the subspaces.
    update_interval: steps from one refresh of the subspaces to the next.
    side: 'short', 'long', 'left' or 'right', see `low_rank`.
    projector: 'svd', 'sketch', 'random' or a function, see `low_rank`.
    moments: what a refresh does to the momentum. 'stale' is the released code:
      it refreshes at step 0 and at steps n - 1, 2n - 1, ...; that step still
      uses the old momentum, though its coordinates belong to the old basis,
      and then momentum and the step's own gradient are dropped. 'zero' clears
      it before it is used, at steps 0, n, 2n, ...; 'rotate' turns it with the
      basis; also 'keep', 'sign' or a function, see `low_rank`.
    refresh: 'together', 'staggered' or 'lazy', see `low_rank`; only 'together'
      goes with 'stale'.
    b1: decay of the momentum.
    b2: decay of the second moment; 1 accumulates (AdaGrad).
    eps: added to the root of the uncorrected second moment.
    subset: which entries share a second moment, see `scale_by_subset_norm`.
    reduction: 'sum' or 'mean' of their squares.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the moments; None takes the parameters'.
    projector_dtype: dtype of the projectors; None takes the parameters'.
    key: seed or PRNG key of 'sketch' and 'random'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `low_rank` and `scale_by_subset_norm`; moments='stale' with
      another schedule than 'together'; and from update without parameters when
      `weight_decay` is given.

  Examples:
    >>> loss = lambda params: jnp.sum((params['w'] - 1) ** 2)
    >>> tx = snsm(learning_rate=0.2, rank=2)
    >>> params = {'w': jnp.zeros((4, 6))}
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...   updates, state = tx.update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss({'w': jnp.zeros((4, 6))}))
    True

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm and
    Subspace-Momentum <https://arxiv.org/abs/2411.07120>`_, 2024
  """
  stale = moments == 'stale'
  if stale and refresh != 'together':
    raise ValueError(
      f"moments='stale' has the released code's own steps of refresh, not "
      f"refresh={refresh!r}: use moments='zero', or refresh='together'"
    )
  momentum = low_rank(
    scale_by_momentum(b1, state_dtype),
    rank=rank,
    update_interval=update_interval,
    side=side,
    projector=projector,
    moments='keep' if stale else moments,
    residual='sgd',
    refresh=_BEFORE_MULTIPLES if stale else refresh,
    axes=axes,
    projector_dtype=projector_dtype,
    key=key,
  )
  if stale:
    momentum = _cleared_after_refresh(momentum, update_interval)
  return optax.chain(
    scale_by_subset_norm(
      momentum, b2, eps, subset, reduction, axes, state_dtype
    ),
    correct_bias(b1, b2),
    step_and_decay(learning_rate, weight_decay, mask),
  )


# The released code counts from 1, and refreshes at the first step besides.
_BEFORE_MULTIPLES = Schedule(
  init=lambda slots, interval: (),
  due=lambda clock, memory: jnp.broadcast_to(
    (clock.count == 0) | ((clock.count + 1) % clock.interval == 0),
    clock.layers,
  ),
  number=lambda clock, memory: jnp.broadcast_to(
    (clock.count + 1) // clock.interval, clock.layers
  ),
)


def _cleared_after_refresh(tx, interval):
  """The momentum of projected leaves is dropped once a refresh has used it."""

  def update_fn(updates, state, params=None, **extra_args):
    cleared = (state.count > 0) & ((state.count + 1) % interval == 0)
    updates, state = tx.update(updates, state, params, **extra_args)
    leaves, treedef = jax.tree.flatten(state.inner.mu)
    projectors = treedef.flatten_up_to(state.projectors)
    mu = treedef.unflatten(
      m
      if isinstance(projector, optax.MaskedNode)
      else jnp.where(cleared, jnp.zeros_like(m), m)
      for m, projector in zip(leaves, projectors, strict=True)
    )
    return updates, state._replace(inner=state.inner._replace(mu=mu))

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)
