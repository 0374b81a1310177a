"""Flora: Adafactor whose momentum is kept in a random projection."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from frugax.optim.factored import (
  clip_rms,
  scale_by_factored_rms,
  scale_by_parameter_rms,
)
from frugax.optim.low_rank import low_rank
from frugax.optim.moments import Moments, PolicyFn
from frugax.optim.projection import ProjectorFn
from frugax.optim.subspace import scale_by_momentum


def flora(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 1000,
  side: str = 'short',
  projector: str | ProjectorFn = 'random',
  moments: str | PolicyFn | Moments = 'rotate',
  b1: jax.typing.ArrayLike = 0.9,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""Adafactor with a momentum that is stored in a random projection.

  For a kernel of shape (m, n) = (in, out) with :math:`m \le n` and a random P,
  :math:`P_{ij} \sim N(0, 1/r)`, drawn anew every update_interval steps

  .. math::
    U_t &= \mathrm{factored\_rms}(G_t) \\
    M_{t-1} &\leftarrow P_t^T P_{t-1} M_{t-1} \;\text{when P is drawn} \\
    M_t &= b_1 M_{t-1} + (1-b_1) P_t^T U_t \\
    X_t &= b_1 P_t M_{t-1} + (1-b_1) U_t, \qquad
    X_t \leftarrow X_t / \max(1, \mathrm{rms}(X_t)) \\
    W_t &= W_{t-1} - \eta \left( \max(\mathrm{rms}(W_{t-1}), 10^{-3}) \, X_t
      + \lambda W_{t-1} \right)

  and for :math:`m > n` the same from the right. A vector has a full second
  moment and momentum; a stack of vectors is clipped and scaled as one leaf. The
  optimizer holds
  :math:`r n + m + n` numbers for a matrix; P is drawn from a key.

  This follows the authors' PyTorch code, except that it draws a new P before
  the step rather than after it. Their JAX code moves the momentum from the old
  P to the old P, and applies the decay twice. Both skip embeddings and other
  matrices whose sides differ by more than a factor of four; here `axes` says
  what is a matrix.

  Args:
    learning_rate: a number or a schedule; steps are relative to the weights.
    rank: dimension of the subspaces.
    update_interval: steps from one P to the next.
    side: 'short', 'long', 'left' or 'right', see `low_rank`.
    projector: 'random', 'svd', 'sketch' or a function, see `low_rank`.
    moments: what a new P does to the momentum, see `low_rank`.
    b1: decay of the momentum.
    weight_decay: strength of decoupled decay.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the momentum; None takes the parameters'.
    key: seed or PRNG key of the random projections.

  Returns:
    An optax.GradientTransformation; its update needs the parameters.

  Raises:
    ValueError: as `low_rank`; and from update without parameters.

  Examples:
    >>> import jax.numpy as jnp
    >>> from frugax.optim import state_bytes
    >>> params = {'w': jnp.zeros((64, 256))}
    >>> sizes = state_bytes(flora(1e-2, rank=16), params)
    >>> sizes['moments'] == 4 * (16 * 256 + 64 + 256)
    True

  References:
    Hao, Cao and Mou, `Flora: Low-Rank Adapters Are Secretly Gradient
    Compressors <https://arxiv.org/abs/2402.03293>`_, 2024
  """

  def whole_gradient(parts):
    """Only the past is compressed: the new gradient enters as it is."""
    new = 1 - b1
    return new * parts.grad + parts.back(parts.update - new * parts.small)

  decay = optax.identity()
  if not (isinstance(weight_decay, int | float) and weight_decay == 0):
    decay = optax.add_decayed_weights(weight_decay, mask)
  return optax.chain(
    scale_by_factored_rms(axes=axes),
    low_rank(
      scale_by_momentum(b1, state_dtype),
      rank=rank,
      update_interval=update_interval,
      side=side,
      projector=projector,
      moments=moments,
      residual=whole_gradient,
      axes=axes,
      key=key,
    ),
    clip_rms(axes=axes),
    scale_by_parameter_rms(axes=axes),
    decay,
    optax.scale_by_learning_rate(learning_rate),
  )
