"""Stable-SPAM: Adam on gradients of adaptive range and norm, with resets."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax import names
from frugax.optim.adam import scale_by_adam_hf
from frugax.optim.adaptive import adaptive_clip_and_norm, cosine
from frugax.optim.leaves import check_positive
from frugax.optim.reset import reset_moments

ALGORITHMS = ('released', 'paper')


def stable_spam(
  learning_rate: optax.ScalarOrSchedule,
  gamma1: jax.typing.ArrayLike = 0.7,
  gamma2: jax.typing.ArrayLike = 0.9,
  gamma3: jax.typing.ArrayLike = 0.999,
  reset_interval: int | None = 500,
  total_steps: int | None = None,
  eta_min: jax.typing.ArrayLike = 0.5,
  algorithm: str = 'released',
  scalar_dtype: jax.typing.DTypeLike | None = None,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""Adam behind `adaptive_clip` and `adaptive_norm`, with moment resets.

  .. math::
    G_t &\leftarrow \mathrm{AdaGN}(\mathrm{AdaClip}(G_t)) \\
    M_t &= b_1 M_{t-1} + (1-b_1) G_t, \qquad
    V_t = b_2 V_{t-1} + (1-b_2) G_t^2 \\
    W_t &= (1 - \eta \lambda) W_{t-1} - \eta \,
      \frac{M_t / (1-b_1^t)}{\sqrt{V_t / (1-b_2^t)} + \epsilon}

  and every reset_interval steps M and V start from 0. The optimizer holds as
  many numbers as Adam and three for each array, or layer of a stack.

  Where the paper's algorithm and the authors' code differ, `algorithm` says
  which. 'released' is what the published perplexities came from:

  - All bias corrections share one counter t. A reset sets it to 1 although
    only M and V are forgotten, not the means of AdaClip and AdaGN. AdaClip's
    threshold is then divided by 0.002 and clips nothing for some hundred steps;
    AdaGN's norm with gamma2=0.99999 falls to about 0.2 and climbs back.
  - The step of a reset still uses the old M and V, corrected as if t were 1;
    its own gradient is forgotten with them.
  - The three means have the parameters' dtype. In bfloat16 they stall: with
    gamma3=0.999 at about half of what they should be.

  'paper' counts the steps of each part for itself, forgets M and V before the
  step of a reset, and keeps the means in float32.

  With `total_steps`, b1 and gamma1 are multiplied by a cosine that falls from 1
  to eta_min, as the authors' training script does (with 20000, whatever the
  length of the run) and the paper does not say.

  The defaults are those of 4-bit training. In bfloat16 the authors take
  gamma1=0.85, gamma2=0.99999 and reset_interval=1000, with learning rate 8e-4
  for 130M parameters.

  Args:
    learning_rate: a number or a schedule.
    gamma1: decay of the mean gradient norm.
    gamma2: decay of the mean squared gradient norm.
    gamma3: decay of the mean of the largest entries.
    reset_interval: steps from one reset of the moments to the next; None: none.
    total_steps: length of the cosine; None: no cosine.
    eta_min: the end of the cosine.
    algorithm: 'released' or 'paper'.
    scalar_dtype: dtype of the three means; None takes the parameters' in
      'released' and float32 in 'paper'.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the corrected second moment, and AdaGN's.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes of an array are batch axes, such as layers, each index with
      its own statistics, see `adaptive_clip`.
    state_dtype: dtype of the moments; None takes the parameters'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: an unknown algorithm; as `adaptive_clip` and `reset_moments`.

  Examples:
    >>> tx = stable_spam(learning_rate=0.01)
    >>> params = {'w': jnp.zeros((2, 2))}
    >>> grads = {'w': jnp.array([[1.0, -100.0], [1e-3, 0.0]])}
    >>> updates, state = tx.update(grads, tx.init(params))
    >>> print(updates['w'].round(4))
    [[-0.01  0.01]
     [-0.01 -0.  ]]

  References:
    Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
    Adam <https://arxiv.org/abs/2502.17055>`_, 2025
  """
  if algorithm not in ALGORITHMS:
    raise names.unknown('algorithm', algorithm, ALGORITHMS)
  if reset_interval is not None:
    check_positive('reset_interval', reset_interval)
  released = algorithm == 'released'
  shared = reset_interval if released else None
  if not released:
    scalar_dtype = scalar_dtype or jnp.float32

  def adam(b1):
    return scale_by_adam_hf(b1, b2, eps, state_dtype, correction='moments')

  if total_steps is None:
    moments = adam(b1)
  else:
    decline = cosine(total_steps, eta_min)
    moments = optax.inject_hyperparams(adam, hyperparam_dtype=jnp.float32)(
      b1=lambda count: b1 * decline(count)
    )
  if reset_interval is not None:
    moments = reset_moments(
      moments, reset_interval, counters=True, stale=released
    )
  parts = [
    adaptive_clip_and_norm(
      gamma1,
      gamma2,
      gamma3,
      eps,
      shared,
      total_steps,
      eta_min,
      scalar_dtype,
      axes,
    ),
    moments,
  ]
  if not (isinstance(weight_decay, int | float) and weight_decay == 0):
    parts.append(optax.add_decayed_weights(weight_decay, mask))
  return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
