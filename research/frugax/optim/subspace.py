"""Subspace momentum: momentum inside a subspace, plain SGD outside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import step_and_decay, wide
from frugax.optim.low_rank import low_rank
from frugax.optim.moments import Moments, PolicyFn
from frugax.optim.projection import ProjectorFn
from frugax.optim.refreshes import Schedule


def subspace_momentum(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 200,
  side: str = 'short',
  projector: str | ProjectorFn = 'svd',
  moments: str | PolicyFn | Moments = 'zero',
  refresh: str | Schedule = 'together',
  b1: jax.typing.ArrayLike = 0.9,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""SGD with momentum in a low-rank subspace of each gradient only.

  For a kernel of shape (m, n) = (in, out) with :math:`m \le n`

  .. math::
    R_t &= P_t^T G_t, \qquad M_t = b_1 M_{t-1} + (1-b_1) R_t \\
    W_t &= W_{t-1} - \eta \, (P_t M_t + G_t - P_t R_t) \\
    W_t &\leftarrow W_t - \eta \lambda W_t

  and for :math:`m > n` the same from the right; vectors and scalars have
  momentum throughout. There is no second moment and no bias correction.

  Two things differ from the authors' code. They refresh at steps n - 1, 2n - 1,
  ... counted from 0 (and at 0), here it is 0, n, 2n, as in all methods of this
  package. And at a refresh they clear the state, but that one step still uses
  the old momentum in the new basis, and its gradient is lost to the next;
  here the momentum is cleared before it is used.

  Args:
    learning_rate: a number or a schedule.
    rank: dimension of the subspaces.
    update_interval: steps from one refresh of the subspaces to the next.
    side: 'short', 'long', 'left', 'right' or 'both', see `low_rank`.
    projector: 'svd', 'sketch', 'random' or a function, see `low_rank`.
    moments: what a refresh does to the momentum: 'zero' clears it, 'keep' keeps
      the numbers, 'rotate' turns it with the basis; see `low_rank`.
    refresh: 'together', 'staggered' or 'lazy', see `low_rank`.
    b1: decay of the momentum.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the momentum; None takes the parameters'.
    projector_dtype: dtype of the projectors; None takes the parameters'.
    key: seed or PRNG key of 'sketch' and 'random'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `low_rank`; and from update without parameters when
      `weight_decay` is given.

  Examples:
    >>> import jax.numpy as jnp
    >>> loss = lambda params: jnp.sum((params['w'] - 1) ** 2)
    >>> tx = subspace_momentum(learning_rate=0.1, rank=2)
    >>> params = {'w': jnp.zeros((4, 6))}
    >>> state = tx.init(params)
    >>> for _ in range(60):
    ...   updates, state = tx.update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss({'w': jnp.zeros((4, 6))}))
    True

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm and
    Subspace-Momentum <https://arxiv.org/abs/2411.07120>`_, 2024
  """
  return optax.chain(
    low_rank(
      scale_by_momentum(b1, state_dtype),
      rank=rank,
      update_interval=update_interval,
      side=side,
      projector=projector,
      moments=moments,
      refresh=refresh,
      residual='sgd',
      axes=axes,
      projector_dtype=projector_dtype,
      key=key,
    ),
    step_and_decay(learning_rate, weight_decay, mask),
  )


class ScaleByMomentumState(NamedTuple):
  """The first moment."""

  mu: Any


def scale_by_momentum(
  b1: jax.typing.ArrayLike = 0.9,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""Replace the gradient by its moving average, without bias correction.

  .. math:: M \leftarrow b_1 M + (1-b_1) G

  Args:
    b1: decay of the average.
    state_dtype: dtype of M; None takes the parameters'. It is updated in
      float32 and rounded once.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Examples:
    >>> tx = scale_by_momentum(b1=0.5)
    >>> updates, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    >>> print(tx.update(jnp.ones(2), state)[0])
    [0.75 0.75]
  """

  def init_fn(params):
    return ScaleByMomentumState(
      jax.tree.map(lambda p: jnp.zeros(p.shape, state_dtype or p.dtype), params)
    )

  def update_fn(updates, state, params=None):
    del params
    mu = jax.tree.map(
      lambda g, m: b1 * wide(m) + (1 - b1) * wide(g), updates, state.mu
    )
    updates = jax.tree.map(lambda m, g: m.astype(g.dtype), mu, updates)
    mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
    return updates, ScaleByMomentumState(mu)

  return optax.GradientTransformation(init_fn, update_fn)
