"""GaLore: Adam in a low-rank subspace of each gradient."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from frugax.optim.adam import scale_by_adam_hf, step_and_decay
from frugax.optim.low_rank import low_rank
from frugax.optim.moments import Moments, PolicyFn, for_adam
from frugax.optim.projection import ProjectorFn
from frugax.optim.quantized import in_few_bits
from frugax.optim.refreshes import Schedule
from frugax.quant.codecs import Codec


def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 200,
  scale: jax.typing.ArrayLike = 0.25,
  side: str = 'short',
  projector: str | ProjectorFn = 'svd',
  moments: str | PolicyFn | Moments = 'keep',
  refresh: str | Schedule = 'together',
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  codec: str | Codec | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""Adam on the gradient's projection onto its leading singular vectors.

  For a kernel of shape (m, n) = (in, out) with :math:`m \le n`

  .. math::
    P_t &= U_{:,:r} \;\text{of}\; G_t = U \Sigma V^T
      \;\text{every update\_interval steps, else}\; P_{t-1} \\
    R_t &= P_t^T G_t \\
    M_t &= b_1 M_{t-1} + (1-b_1) R_t, \qquad
    V_t = b_2 V_{t-1} + (1-b_2) R_t^2 \\
    W_t &= W_{t-1} - \eta \, \alpha \,
      \frac{\sqrt{1-b_2^t}}{1-b_1^t} \, P_t \frac{M_t}{\sqrt{V_t} + \epsilon} \\
    W_t &\leftarrow W_t - \eta \lambda W_t

  and for :math:`m > n` the same from the right. Vectors and scalars get plain
  Adam at the same rate. The optimizer holds :math:`m r + 2 r n` numbers for a
  matrix where Adam holds :math:`2 m n`.

  The defaults compute what the authors' code computes, its two oddities
  included: at a refresh the moments keep their numbers although the basis has
  changed, and decay acts on the weight after the step. Because of the first,
  the authors' path depends on the signs that a linear algebra library happens
  to give to singular vectors; here the largest entry of each is positive, so a
  run is the same everywhere and equals theirs up to such a sign.

  The paper trains with learning rate 0.01, scale 0.25, a fourth to a half of
  the model dimension as rank, and leaves embedding and head to plain Adam:
  `axes=matrix_axes(names, whole=('vocab',))`.

  Under `optax.inject_hyperparams` name in `static_args` the integers 'rank',
  'update_interval' and each argument that is given a function or a dtype.

  Args:
    learning_rate: a number or a schedule.
    rank: dimension of the subspaces.
    update_interval: steps from one refresh of the subspaces to the next.
    scale: :math:`\alpha`; applied to projected leaves only.
    side: 'short', 'long', 'left', 'right' or 'both', see `low_rank`.
    projector: 'svd', 'sketch', 'random' or a function, see `low_rank`.
    moments: what a refresh does to Adam's moments: 'keep', 'reset', 'zero',
      'sign', 'rotate', 'ldadam' or a function, see `low_rank`. With 'rotate'
      nothing depends on the signs of singular vectors.
    refresh: 'together', 'staggered' or 'lazy', see `low_rank`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the uncorrected second moment.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the moments; None takes the parameters'.
    codec: how moments are stored between updates, see `quantize_state`; None
      leaves them in `state_dtype`.
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
    >>> tx = galore(learning_rate=0.1, rank=2, update_interval=10, scale=1.0)
    >>> params = {'w': jnp.zeros((4, 6))}
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...   updates, state = tx.update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss({'w': jnp.zeros((4, 6))}))
    True

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection <https://arxiv.org/abs/2403.03507>`_, 2024
  """
  return optax.chain(
    low_rank(
      in_few_bits(scale_by_adam_hf(b1, b2, eps, state_dtype), codec, axes),
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      side=side,
      projector=projector,
      moments=for_adam(moments, b1, b2),
      refresh=refresh,
      axes=axes,
      projector_dtype=projector_dtype,
      key=key,
    ),
    step_and_decay(learning_rate, weight_decay, mask),
  )
