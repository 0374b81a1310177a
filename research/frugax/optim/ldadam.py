"""LDAdam: Adam in a subspace that is refreshed at every step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax import names
from frugax.optim import linalg, moments, projection, residuals
from frugax.optim.adam import scale_by_adam_hf
from frugax.optim.low_rank import low_rank


def ldadam(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 1,
  scale: jax.typing.ArrayLike = 1.0,
  side: str = 'short',
  rho: jax.typing.ArrayLike = 0.908,
  first_projector: str = 'svd',
  error_feedback: bool = True,
  b1: jax.typing.ArrayLike = 0.908,
  b2: jax.typing.ArrayLike = 0.99,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  error_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""Adam in a subspace that follows gradient and momentum from step to step.

  For a kernel of shape (m, n) = (in, out) with :math:`m \le n`, and
  :math:`G_t` the gradient plus the error :math:`E_{t-1}`

  .. math::
    B_t &= \rho \, \frac{P_{t-1} M_{t-1}}{1-b_1^{t-1}} + (1-\rho) G_t \\
    P_t &= \mathrm{qr}(B_t B_t^T P_{t-1}), \qquad R_t = P_t^T G_t, \qquad
    C_t = P_t^T P_{t-1} \\
    M'_{t-1} &= C_t M_{t-1}, \qquad
    V'_{t-1} = (1-b_2^{t-1}) \left| (C_t \circ C_t)
      (\hat V_{t-1} - \hat M_{t-1}^2) + \hat M_{t-1}^{\prime 2} \right| \\
    W_t &= W_{t-1} (1 - \eta \lambda) - \eta \,
      P_t \, \mathrm{adam}(R_t; M'_{t-1}, V'_{t-1}) \\
    E_t &= G_t - P_t R_t
      + \frac{b_1}{1-b_1} (P_{t-1} M_{t-1} - P_t M'_{t-1})

  and for :math:`m > n` the same from the right. :math:`P_1` are the leading
  singular vectors; a hat is the bias correction. Vectors and scalars get plain
  Adam.

  The authors keep E in the gradient buffer, which then is never freed; here it
  is state of the optimizer, as large as the gradient. Without error feedback
  the state is GaLore's. Their code projects square matrices from the other side
  than all of this package does.

  Args:
    learning_rate: a number or a schedule; the authors use 0.001.
    rank: dimension of the subspaces; the authors use 8 with error feedback.
    update_interval: steps from one power iteration to the next.
    scale: multiplies the updates of projected leaves.
    side: 'short', 'long', 'left' or 'right', see `low_rank`.
    rho: weight of the momentum in what the subspace is fitted to.
    first_projector: how :math:`P_1` is found: 'svd', or 'sketch', two steps of
      orthogonal iteration, on TPUs, whose compiler takes very long for an SVD.
    error_feedback: whether to add what was missed to the next gradient.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the corrected second moment.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the moments; None takes the parameters'.
    projector_dtype: dtype of the projectors; None takes the parameters'.
    error_dtype: dtype of E; None takes the parameters'.
    key: seed or PRNG key of 'sketch'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `low_rank`; an unknown `first_projector`; and from update
      without parameters when `weight_decay` is given.

  Examples:
    >>> target = jnp.arange(24.0).reshape(4, 6) % 7 - 3
    >>> loss = lambda params: jnp.sum((params['w'] - target) ** 2)
    >>> tx = ldadam(learning_rate=0.1, rank=1)
    >>> params = {'w': jnp.zeros((4, 6))}
    >>> state, update = tx.init(params), jax.jit(tx.update)
    >>> for _ in range(100):
    ...   updates, state = update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * jnp.sum(target**2))
    True

  References:
    Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
    Statistics <https://arxiv.org/abs/2410.16103>`_, 2024
  """
  decay = optax.identity()
  if not (isinstance(weight_decay, int | float) and weight_decay == 0):
    decay = optax.add_decayed_weights(weight_decay, mask)
  return optax.chain(
    low_rank(
      scale_by_adam_hf(b1, b2, eps, state_dtype, correction='moments'),
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      side=side,
      projector=momentum_basis(b1, rho, first_projector),
      moments=moments.ldadam(b1, b2),
      residual=residuals.feedback(b1, error_dtype)
      if error_feedback
      else 'drop',
      axes=axes,
      projector_dtype=projector_dtype,
      key=key,
    ),
    decay,
    optax.scale_by_learning_rate(learning_rate),
  )


def momentum_basis(
  b1: jax.typing.ArrayLike, rho: jax.typing.ArrayLike, first: str = 'svd'
) -> projection.ProjectorFn:
  r"""One power iteration on a mean of momentum and gradient.

  .. math::
    B = \rho \, P_{old} M / (1 - b_1^t) + (1-\rho) G, \qquad
    P = \mathrm{qr}(B B^T P_{old})

  and the leading singular vectors of G at the first refresh.

  Args:
    b1: decay of the inner transformation's first moment, which is expected.
    rho: weight of the momentum.
    first: what finds those, 'svd' or 'sketch'.

  Returns:
    A projector function for `low_rank(projector=...)`.

  Raises:
    ValueError: an unknown name in `first`.
  """
  if first not in _FIRST:
    raise names.unknown('first_projector', first, _FIRST)

  def follow(g, old, moment, steps):
    bias = 1 - b1 ** steps.astype(jnp.float32)
    kept, new = rho / bias * moment, 1 - rho
    # B is as large as the gradient, and never formed.
    with jax.default_matmul_precision('highest'):
      start = kept.mT @ (old.mT @ old) + new * (g.mT @ old)
      start = linalg.unit(start)
      image = old @ (kept @ start) + new * (g @ start)
      return linalg.orthonormal(linalg.unit(image))

  def find(g, old, rank, context):
    return jax.lax.cond(
      context.count == 0,
      lambda: _FIRST[first](g, rank, context.key),
      lambda: follow(g, old, context.moment, context.steps),
    )

  return projection.from_context(find)


def _sketch(g, rank, key):
  # One draw for all matrices of a stack: a layer alone gets the same one.
  start = jax.random.normal(key, (g.shape[-2], rank), g.dtype)
  return linalg.orthogonal_iteration(g, start, steps=2)


_FIRST = {
  'svd': lambda g, rank, key: linalg.left_vectors(g)[..., :rank],
  'sketch': _sketch,
}
