"""APOLLO: the gradient, scaled by what Adam would do in a random subspace."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from frugax import names
from frugax.optim import residuals
from frugax.optim.adam import correct_bias, scale_by_adam_hf, step_and_decay
from frugax.optim.low_rank import low_rank
from frugax.optim.moments import Moments, PolicyFn, for_adam
from frugax.optim.projection import ProjectorFn

SCALINGS = {'channel': residuals.channel, 'tensor': residuals.tensor}


def apollo(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 200,
  scale: jax.typing.ArrayLike = 1.0,
  side: str = 'short',
  projector: str | ProjectorFn = 'random',
  moments: str | PolicyFn | Moments = 'keep',
  residual: str = 'channel',
  threshold: jax.typing.ArrayLike = 1.01,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""SGD whose channels are scaled as Adam scales a random projection of them.

  For a kernel of shape (m, n) = (in, out) with :math:`m \le n` and a random P,
  :math:`P_{ij} \sim N(0, 1/r)`, drawn anew every update_interval steps

  .. math::
    R_t &= P_t^T G_t, \qquad
    M_t = b_1 M_{t-1} + (1-b_1) R_t, \qquad
    V_t = b_2 V_{t-1} + (1-b_2) R_t^2 \\
    N_t &= \frac{M_t}{\sqrt{V_t} + \epsilon}, \qquad
    \phi_j = \frac{\|N_{t,j}\|}{\|R_{t,j}\| + 10^{-8}}
      \;\text{for each column}\; j \\
    U_t &= G_t \, \mathrm{diag}(\phi), \qquad
    l_t = \max(\|U_t\| / \|U_{t-1}\|, \gamma) / \gamma, \qquad
    U_t \leftarrow U_t / l_t \\
    W_t &= W_{t-1} - \eta \, \sqrt{\alpha} \,
      \frac{\sqrt{1-b_2^t}}{1-b_1^t} \, U_t

  and for :math:`m > n` the same with rows as channels; then decay as in
  `galore`. Vectors and scalars get plain Adam at the same rate. The optimizer
  holds :math:`2 r n + 1` numbers for a matrix: P is drawn from a key where the
  authors' code stores it. The direction has no momentum.

  The authors' `scale_front`, which scales before the limiter, is not an
  argument: the limiter is a ratio of norms, so the order makes no difference.

  Args:
    learning_rate: a number or a schedule; the authors use 0.01.
    rank: dimension of the subspaces; a fourth of the model's is usual.
    update_interval: steps from one P to the next.
    scale: :math:`\alpha`; acts by its root, and on projected leaves only.
    side: 'short', 'long', 'left' or 'right', see `low_rank`.
    projector: 'random', 'svd', 'sketch' or a function, see `low_rank`.
    moments: what a new P does to Adam's moments, see `low_rank`.
    residual: 'channel', or 'tensor' for one factor for the whole matrix,
      :math:`\phi = \|N\| / (\|R\| + 10^{-8})`.
    threshold: :math:`\gamma`, the largest growth of the norm of U in a step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the uncorrected second moment.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the moments; None takes the parameters'.
    projector_dtype: dtype of the projectors; None takes the parameters'.
    key: seed or PRNG key of the random projections.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `low_rank`; another residual; and from update without
      parameters when `weight_decay` is given.

  Examples:
    >>> import jax.numpy as jnp
    >>> from frugax.optim import state_bytes
    >>> params = {'w': jnp.zeros((64, 256))}
    >>> sizes = state_bytes(apollo(1e-2, rank=16), params)
    >>> sizes['moments'] == 4 * (2 * 16 * 256 + 1)
    True

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024
  """
  if residual not in SCALINGS:
    raise names.unknown('scaling of apollo, residual', residual, SCALINGS)
  return optax.chain(
    low_rank(
      scale_by_adam_hf(b1, b2, eps, state_dtype, correction='none'),
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      side=side,
      projector=projector,
      moments=for_adam(moments, b1, b2),
      residual=SCALINGS[residual](threshold),
      axes=axes,
      projector_dtype=projector_dtype,
      key=key,
    ),
    correct_bias(b1, b2, update_interval if moments == 'reset' else None),
    step_and_decay(learning_rate, weight_decay, mask),
  )


def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 1,
  update_interval: int = 200,
  scale: jax.typing.ArrayLike = 128.0,
  side: str = 'short',
  projector: str | ProjectorFn = 'random',
  moments: str | PolicyFn | Moments = 'keep',
  threshold: jax.typing.ArrayLike = 1.01,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""APOLLO of rank 1, with one factor for each matrix.

  .. math::
    \phi = \frac{\|N_t\|}{\|R_t\| + 10^{-8}}, \qquad
    U_t = \sqrt{\alpha} \, \phi \, G_t

  and the rest as `apollo`. For a matrix it holds two moments of one row,
  :math:`2 n + 1` numbers: next to nothing.

  Args:
    learning_rate: a number or a schedule; the authors use 0.01, and found 0.02
      better.
    rank: dimension of the subspaces.
    update_interval: steps from one projection to the next.
    scale: :math:`\alpha`; a fourth of the model's dimension is usual.
    side: as the following ones, see `apollo`.
    projector: 'random', 'svd', 'sketch' or a function.
    moments: what a new projection does to Adam's moments.
    threshold: the largest growth of the norm of U in a step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the uncorrected second moment.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay.
    axes: which axes form the matrices.
    state_dtype: dtype of the moments; None takes the parameters'.
    projector_dtype: dtype of the projectors; None takes the parameters'.
    key: seed or PRNG key of the random projections.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `apollo`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from frugax.optim import state_bytes
    >>> params = {'w': jnp.zeros((64, 256))}
    >>> state_bytes(apollo_mini(1e-2), params)['moments'] == 4 * (2 * 256 + 1)
    True

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024
  """
  return apollo(
    learning_rate,
    rank=rank,
    update_interval=update_interval,
    scale=scale,
    side=side,
    projector=projector,
    moments=moments,
    residual='tensor',
    threshold=threshold,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=mask,
    axes=axes,
    state_dtype=state_dtype,
    projector_dtype=projector_dtype,
    key=key,
  )
