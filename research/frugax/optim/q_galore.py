"""Q-GaLore: GaLore with 4-bit projectors, 8-bit moments and lazy refreshes."""

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


def q_galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 200,
  scale: jax.typing.ArrayLike = 0.25,
  side: str = 'short',
  projector: str | ProjectorFn = 'svd',
  moments: str | PolicyFn | Moments = 'keep',
  refresh: str | Schedule = 'lazy',
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  codec: str | Codec = 'dynamic8',
  min_size: int | None = None,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  projector_dtype: jax.typing.DTypeLike | None = 'int4',
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""GaLore whose projectors take 4 bits a number and whose moments take 8.

  The update is that of `galore`, with Adam's usual correction,
  :math:`\hat M / (\sqrt{\hat V} + \epsilon)`, on moments that are rounded after
  every step, and a projector that is rounded when it is found. A layer whose
  subspace hardly turns is refreshed less and less often, see
  `frugax.optim.refreshes.lazy`. The optimizer holds about
  :math:`m r / 2 + 2 r n` bytes for an m x n matrix, :math:`m \le n`, where Adam
  in float32 holds :math:`8 m n`.

  What differs from the authors' code: 4-bit numbers are packed, two a byte;
  blocks whose values have all one sign do not saturate; the similarity that
  decides about the interval does not depend on the signs of singular vectors
  (`refresh=lazy(similarity='signed')` brings that back). Their 8-bit weights
  without a master copy are not part of the optimizer: see `apply_updates`.

  The authors train with learning rate 0.015 (60M, 130M), 0.01 (350M, 1B) and
  0.004 (7B, with an interval of 500), the ranks being GaLore's.

  Args:
    learning_rate: a number or a schedule.
    rank: dimension of the subspaces.
    update_interval: steps from one refresh to the next, until it doubles.
    scale: :math:`\alpha`; applied to projected leaves only.
    side: 'short', 'long', 'left', 'right' or 'both', see `low_rank`.
    projector: 'svd', 'sketch', 'random' or a function, see `low_rank`.
    moments: what a refresh does to the moments, see `low_rank`; 'reset' needs
      refresh='together'.
    refresh: 'lazy', 'together', 'staggered' or as made by
      `frugax.optim.refreshes.lazy`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the corrected second moment.
    codec: how moments are stored, see `quantize_state`.
    min_size: moments of a layer with fewer elements stay in float32; None takes
      the default of `quantize_state`.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    projector_dtype: how projectors are stored: 'int4', 'int8' or a dtype.
    key: seed or PRNG key of 'sketch' and 'random'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `low_rank` and `quantize_state`; and from update without
      parameters when `weight_decay` is given.

  Examples:
    >>> import jax.numpy as jnp
    >>> from frugax.optim import state_bytes
    >>> params = {'w': jnp.zeros((512, 1024), jnp.bfloat16)}
    >>> sizes = state_bytes(q_galore(1e-2, rank=128), params)
    >>> sizes['projector'] == 512 * 128 * (1 / 2 + 4 / 256)
    True
    >>> sizes['moments'] == 2 * 128 * 1024 * (1 + 4 / 256)
    True

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and
    Layer-Adaptive Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
  """
  return optax.chain(
    low_rank(
      in_few_bits(
        scale_by_adam_hf(b1, b2, eps, correction='moments'),
        codec,
        axes,
        min_size,
      ),
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
