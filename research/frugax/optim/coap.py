"""COAP: Adam in subspaces that follow the gradient without an SVD of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import scale_by_adam_hf, step_and_decay
from frugax.optim.low_rank import low_rank
from frugax.optim.moments import Moments, PolicyFn, Turn, for_adam
from frugax.optim.projectors import correlation_aware
from frugax.optim.quantized import in_few_bits
from frugax.quant.codecs import Codec


def restore(first: list[jax.Array], second: list[jax.Array], turn: Turn):
  r"""COAP's moment policy, 'restore_state' in the released code.

  .. math::
    M \leftarrow C M, \qquad V \leftarrow (C \sqrt V)^{\circ 2}, \qquad
    C = P_{new}^T P_{old}

  For `low_rank(moments=restore)`. It turns roots of second moments as if they
  were gradients: where they cancel, the second moment vanishes and the next
  steps are large. `moments='rotate'` cannot do that.
  """
  c = turn.matrix
  with jax.default_matmul_precision('highest'):
    return (
      [c @ m for m in first],
      [jnp.square(c @ jnp.sqrt(v)) for v in second],
    )


def coap(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 32,
  lambda_: int = 5,
  scale: jax.typing.ArrayLike = 1.0,
  scale_free: bool = False,
  side: str = 'short',
  moments: str | PolicyFn | Moments = 'keep',
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
  r"""Adam in a subspace that a sketch finds and steps on P correct.

  As `galore`, but P is found every `lambda_` refreshes by `svd_sketch`, warm-
  started from the P before, and at the other refreshes by one step down the
  gradient of `correlation_loss`.

  The defaults compute what the authors' code computes, whose step on P does
  nothing at the gradient scales of language models (`correlation_step`): what
  remains is a sketch every `update_interval * lambda_` steps.
  `scale_free=True` makes the step what the paper means it to be.

  The paper trains LLaMA-1B with learning rate 0.01, rank 512, interval 40 and
  scale 0.25, embedding and head with plain Adam.

  Args:
    learning_rate: a number or a schedule.
    rank: dimension of the subspaces.
    update_interval: steps from one refresh of the subspaces to the next.
    lambda_: refreshes from one sketch to the next.
    scale: multiplies the updates of projected leaves only.
    scale_free: take `scale_free_step` between sketches.
    side: 'short', 'long', 'left' or 'right', see `low_rank`.
    moments: what a refresh does to Adam's moments: 'restore' as the released
      code's `restore_state=True`, or a policy of `low_rank`.
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
    projector_dtype: as in `low_rank`; None takes the parameters'.
    key: seed or PRNG key of the first sketch.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `low_rank` and `correlation_aware`; and from update without
      parameters when `weight_decay` is given.

  Examples:
    >>> loss = lambda params: jnp.sum((params['w'] - 1) ** 2)
    >>> tx = coap(learning_rate=0.1, rank=2, update_interval=5, scale_free=True)
    >>> params = {'w': jnp.zeros((4, 6))}
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...   updates, state = tx.update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss({'w': jnp.zeros((4, 6))}))
    True

  References:
    Xiao et al., `COAP: Memory-Efficient Training with Correlation-Aware
    Gradient Projection <https://arxiv.org/abs/2412.00071>`_, 2024
  """
  return optax.chain(
    low_rank(
      in_few_bits(scale_by_adam_hf(b1, b2, eps, state_dtype), codec, axes),
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      side=side,
      projector=correlation_aware(lambda_, scale_free),
      moments=restore if moments == 'restore' else for_adam(moments, b1, b2),
      axes=axes,
      projector_dtype=projector_dtype,
      key=key,
    ),
    step_and_decay(learning_rate, weight_decay, mask),
  )
