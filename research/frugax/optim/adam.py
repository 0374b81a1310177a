"""Adam and weight decay as the public low-rank codes compute them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax import names

CORRECTIONS = ('step', 'moments', 'none')


class ScaleByAdamHFState(NamedTuple):
  """Step counter and the two moments."""

  count: jax.Array
  mu: Any
  nu: Any


def scale_by_adam_hf(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  state_dtype: jax.typing.DTypeLike | None = None,
  correction: str = 'step',
) -> optax.GradientTransformation:
  r"""Adam with epsilon beside the uncorrected second moment.

  The form of the early Hugging Face AdamW, which GaLore, Q-GaLore, COAP, Fira,
  APOLLO, SN/SM and SPAM share:

  .. math::
    M &\leftarrow b_1 M + (1-b_1) G, \qquad
    V \leftarrow b_2 V + (1-b_2) G^2 \\
    U &= \frac{\sqrt{1-b_2^t}}{1-b_1^t} \; \frac{M}{\sqrt{V} + \epsilon}

  `optax.scale_by_adam` adds epsilon to the corrected root instead. The
  difference is :math:`\epsilon / \sqrt{1-b_2^t}`: at the first step epsilon
  acts 31 times stronger here, which shows with the 1e-5 gradients of language
  models.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the uncorrected second moment.
    state_dtype: dtype of both moments; None takes the parameters'. They are
      updated in float32 and rounded to nearest once: in bfloat16 with b2=0.999
      the second moment can then grow but hardly shrink, so bfloat16 parameters
      deserve state_dtype=jnp.float32.
    correction: of the bias of the moments. 'step' is the form above. 'moments'
      corrects the moments, then adds epsilon to the corrected root, as
      `optax.scale_by_adam` does. 'none' leaves it to a `correct_bias` later in
      the chain, for what acts on the uncorrected update.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Raises:
    ValueError: an unknown correction.

  Examples:
    >>> tx = scale_by_adam_hf(eps=1e-3)
    >>> params = {'w': jnp.zeros(2)}
    >>> updates, _ = tx.update({'w': jnp.array([1., -1e-3])}, tx.init(params))
    >>> print(updates['w'].round(4))
    [ 0.9693 -0.0307]

  References:
    Kingma and Ba, `Adam: A Method for Stochastic Optimization
    <https://arxiv.org/abs/1412.6980>`_, 2014 (the efficient order of
    computation at the end of section 2)
  """
  if correction not in CORRECTIONS:
    raise names.unknown('correction', correction, CORRECTIONS)

  def init_fn(params):
    def zeros(p):
      return jnp.zeros(p.shape, state_dtype or p.dtype)

    return ScaleByAdamHFState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree.map(zeros, params),
      nu=jax.tree.map(zeros, params),
    )

  def update_fn(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    step, root = _bias(count, b1, b2) if correction != 'none' else (1.0, 1.0)
    corrected_eps = eps * root if correction == 'moments' else eps

    def first(g, old):
      return b1 * wide(old) + (1 - b1) * wide(g)

    def second(g, old):
      # Not (1-b2) * (g*g): who else squares g would share it, in memory.
      return b2 * wide(old) + (1 - b2) * wide(g) * wide(g)

    mu = jax.tree.map(first, updates, state.mu)
    nu = jax.tree.map(second, updates, state.nu)
    updates = jax.tree.map(
      lambda g, m, v: (step * m / (jnp.sqrt(v) + corrected_eps)).astype(
        g.dtype
      ),
      updates,
      mu,
      nu,
    )
    mu, nu = jax.tree.map(
      lambda new, old: new.astype(old.dtype), (mu, nu), (state.mu, state.nu)
    )
    return updates, ScaleByAdamHFState(count, mu, nu)

  return optax.GradientTransformation(init_fn, update_fn)


class CorrectBiasState(NamedTuple):
  """Step counter."""

  count: jax.Array


def correct_bias(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  reset_interval: int | None = None,
) -> optax.GradientTransformation:
  r"""The bias correction of Adam as a transformation of its own.

  .. math:: U \leftarrow \frac{\sqrt{1-b_2^t}}{1-b_1^t} \; U

  After `scale_by_adam_hf(correction='none')` it completes the step, and what
  stands between the two sees the uncorrected update, as in Fira and APOLLO.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment; one that accumulates, 1, has no bias.
    reset_interval: steps after which the moments start anew, so that t does
      too; None if they do not.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Examples:
    >>> tx = correct_bias()
    >>> updates, _ = tx.update(jnp.array([3.1623]), tx.init(jnp.zeros(1)))
    >>> print(updates.round(3))
    [1.]
  """

  def init_fn(params):
    del params
    return CorrectBiasState(jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    t = count if reset_interval is None else state.count % reset_interval + 1
    step, _ = _bias(t, b1, b2)
    updates = jax.tree.map(lambda u: (step * wide(u)).astype(u.dtype), updates)
    return updates, CorrectBiasState(count)

  return optax.GradientTransformation(init_fn, update_fn)


def _bias(count, b1, b2):
  """What the step, and what the second moment's root, is short of."""
  t = count.astype(jnp.float32)
  root = jnp.sqrt(jnp.where(b2 == 1, 1.0, 1 - b2**t))
  return root / (1 - b1**t), root


class DecayAfterStepState(NamedTuple):
  """Step counter, for learning rates that are schedules."""

  count: jax.Array


def decay_after_step(
  learning_rate: optax.ScalarOrSchedule, weight_decay: jax.typing.ArrayLike
) -> optax.GradientTransformation:
  r"""Decoupled weight decay on the weight as it is after the step.

  .. math::
    u \leftarrow u - \eta_t \lambda \, (p + u)

  `u` is the finished update, learning rate and sign included, so this comes
  last in a chain. `optax.add_decayed_weights` decays the weight as it was
  before the step; the two differ by :math:`\eta_t \lambda u`.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule.
    weight_decay: :math:`\lambda`.

  Returns:
    An optax.GradientTransformation; its update needs the parameters.

  Raises:
    ValueError: update is called without parameters.

  Examples:
    >>> tx = decay_after_step(learning_rate=0.1, weight_decay=0.5)
    >>> params = jnp.array([2.])
    >>> print(tx.update(jnp.array([-1.]), tx.init(params), params)[0])
    [-1.05]

  References:
    Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2017
  """

  def init_fn(params):
    del params
    return DecayAfterStepState(jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError(
        'weight decay needs the parameters: tx.update(grads, state, params)'
      )
    lr = (
      learning_rate(state.count) if callable(learning_rate) else learning_rate
    )

    def decay(u, p):
      return (wide(u) - lr * weight_decay * (p + wide(u))).astype(u.dtype)

    updates = jax.tree.map(decay, updates, params)
    return updates, DecayAfterStepState(optax.safe_increment(state.count))

  return optax.GradientTransformation(init_fn, update_fn)


def step_and_decay(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any = None,
) -> optax.GradientTransformation:
  r"""The end of a chain: scale by the learning rate, then decay the weights.

  .. math::
    u = -\eta_t g, \qquad u \leftarrow u - \eta_t \lambda \, (p + u)

  Args:
    learning_rate: a number or a schedule.
    weight_decay: strength of the decay; with the number 0 the parameters are
      not needed.
    mask: which leaves decay: a tree of booleans or a function from the
      parameters to one, as in `optax.masked`.

  Returns:
    An optax.GradientTransformation.

  Examples:
    >>> tx = optax.chain(scale_by_adam_hf(), step_and_decay(1e-3, 0.1))
    >>> params = jnp.ones(3)
    >>> updates, _ = tx.update(jnp.ones(3), tx.init(params), params)
    >>> print(updates.round(6))
    [-0.0011 -0.0011 -0.0011]
  """
  step = optax.scale_by_learning_rate(learning_rate)
  if isinstance(weight_decay, int | float) and weight_decay == 0:
    return step
  decay = decay_after_step(learning_rate, weight_decay)
  if mask is not None:
    decay = optax.masked(decay, mask)
  return optax.chain(step, decay)


def wide(x: jax.Array) -> jax.Array:
  """At least float32: optimizer arithmetic never runs in half precision."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
