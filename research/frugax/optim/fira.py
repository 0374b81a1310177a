"""Fira: GaLore plus the residual gradient, scaled as Adam scales inside."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from frugax.optim import residuals
from frugax.optim.adam import correct_bias, scale_by_adam_hf, step_and_decay
from frugax.optim.low_rank import low_rank
from frugax.optim.moments import Moments, PolicyFn, for_adam
from frugax.optim.projection import ProjectorFn
from frugax.optim.refreshes import Schedule


def fira(
  learning_rate: optax.ScalarOrSchedule,
  rank: int | float = 128,
  update_interval: int = 200,
  scale: jax.typing.ArrayLike = 0.25,
  side: str = 'short',
  projector: str | ProjectorFn = 'svd',
  moments: str | PolicyFn | Moments = 'keep',
  refresh: str | Schedule = 'together',
  threshold: jax.typing.ArrayLike = 1.01,
  residual_uses_alpha: bool = True,
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
  r"""GaLore, and outside of its subspace the gradient at Adam's scale.

  For a kernel of shape (m, n) = (in, out) with :math:`m \le n`, P, R, M and V
  as in `galore`:

  .. math::
    N_t &= \frac{M_t}{\sqrt{V_t} + \epsilon}, \qquad
    \phi_j = \frac{\|N_{t,j}\|}{\|R_{t,j}\| + 10^{-8}}
      \;\text{for each column}\; j \\
    S_t &= (G_t - \alpha P_t R_t) \, \mathrm{diag}(\phi) \\
    l_t &= \max(\|S_t\| / \|S_{t-1}\|, \gamma) / \gamma, \qquad
    S_t \leftarrow S_t / l_t \\
    W_t &= W_{t-1} - \eta \, \frac{\sqrt{1-b_2^t}}{1-b_1^t} \,
      (\alpha P_t N_t + S_t)

  then decay as in `galore`. Vectors and scalars get plain Adam. Beside GaLore's
  state there is one number for each matrix, the last :math:`\|S\|`.

  The defaults compute what the authors' code computes. It takes
  :math:`\alpha P R` from the gradient where the paper takes :math:`P R`: with
  :math:`\alpha = 0.25` three quarters of the gradient inside the subspace pass
  for residual, and the update is close to that of `apollo` with an SVD.
  `residual_uses_alpha=False` is the paper's.

  Args:
    learning_rate: a number or a schedule.
    rank: dimension of the subspaces.
    update_interval: steps from one refresh of the subspaces to the next.
    scale: :math:`\alpha`; applied to projected leaves only. The authors use
      0.25, and 0.0625 from a billion parameters on.
    side: 'short', 'long', 'left', 'right' or 'both', see `low_rank`.
    projector: 'svd', 'sketch', 'random' or a function, see `low_rank`.
    moments: what a refresh does to Adam's moments, see `low_rank`.
    refresh: 'together', 'staggered' or 'lazy', see `low_rank`.
    threshold: :math:`\gamma`, the largest growth of the norm of S in a step.
    residual_uses_alpha: whether S lacks :math:`\alpha P R` or :math:`P R`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the uncorrected second moment.
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
    ValueError: as `low_rank`; and from update without parameters when
      `weight_decay` is given.

  Examples:
    A subspace of one dimension, and yet the target is reached:

    >>> import jax.numpy as jnp
    >>> target = jnp.arange(24.0).reshape(4, 6) % 7 - 3
    >>> loss = lambda params: jnp.sum((params['w'] - target) ** 2)
    >>> tx = fira(learning_rate=0.1, rank=1, update_interval=10, scale=1.0)
    >>> params = {'w': jnp.zeros((4, 6))}
    >>> state, update = tx.init(params), jax.jit(tx.update)
    >>> for _ in range(100):
    ...   updates, state = update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.01 * jnp.sum(target**2))
    True

  References:
    Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
  """
  return optax.chain(
    low_rank(
      scale_by_adam_hf(b1, b2, eps, state_dtype, correction='none'),
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      side=side,
      projector=projector,
      moments=for_adam(moments, b1, b2),
      refresh=refresh,
      residual=residuals.fira(threshold, residual_uses_alpha),
      axes=axes,
      projector_dtype=projector_dtype,
      key=key,
    ),
    correct_bias(b1, b2, update_interval if moments == 'reset' else None),
    step_and_decay(learning_rate, weight_decay, mask),
  )
