"""AdaClip and AdaGN: gradients measured with what they usually are.

Both keep running means of one number of each array, or of each layer of a
stack: of the largest entry and of the norm.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import wide
from frugax.optim.axes import layer_axes
from frugax.optim.counts import add_count
from frugax.optim.leaves import check_positive


class AdaptiveClipState(NamedTuple):
  """Step counter, arrays clipped so far, and running means of the largest."""

  count: jax.Array
  clip_count: jax.Array
  largest: Any


def adaptive_clip(
  gamma3: jax.typing.ArrayLike = 0.999,
  reset_interval: int | None = None,
  scalar_dtype: jax.typing.DTypeLike | None = jnp.float32,
  axes: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  r"""AdaClip: scale entries above the usual largest one down to it.

  .. math::
    x_t &= \max_i |g_i|, \qquad
    m_t = \gamma_3 m_{t-1} + (1 - \gamma_3) x_t, \qquad
    \hat m_t = \frac{m_t}{1 - \gamma_3^t} \\
    g_i &\leftarrow \frac{\hat m_t}{x_t} \, g_i
    \quad\text{where}\quad |g_i| > \hat m_t

  so signs stay, the largest entry becomes :math:`\hat m_t` and others above it
  keep their proportion to that one. Nothing is clipped at t = 1, where
  :math:`\hat m_1 = x_1`, whatever rounding makes of that.

  Args:
    gamma3: decay of the mean of the largest entries.
    reset_interval: steps after which t, though not m, starts anew, as in the
      authors' code, where all of the optimizer shares one counter: the
      threshold is then some hundred times too high at first, and clips
      nothing. None lets t count all steps.
    scalar_dtype: dtype of m; None takes the parameters'. In bfloat16, as the
      authors' code has it, m comes no nearer than about half to the mean.
    axes: which axes of an array are batch axes, with a threshold for each of
      their indices: MatrixAxes or optax's dimension numbers name the others;
      a tuple of logical axis names has 'layers' and 'experts' as batch axes
      and serves stacks of vectors too; None takes the array as one. A tree of
      these, a function that makes it, or None for arrays of at most two axes.

  Returns:
    An optax.GradientTransformation; it does not use the parameters. Its state
    counts the arrays, each layer of a stack as one, that were clipped.

  Raises:
    ValueError: axes that do not fit, or a reset_interval that is no int.

  Examples:
    >>> tx = adaptive_clip(gamma3=0.5)
    >>> state = tx.init(jnp.zeros(3))
    >>> for g in ([1.0, 1.0, 0.0], [1.0, 4.0, -3.5]):
    ...   updates, state = tx.update(jnp.array(g), state)
    >>> print(updates, state.clip_count)
    [ 1.     3.    -2.625] 1

  References:
    Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
    Adam <https://arxiv.org/abs/2502.17055>`_, 2025
  """
  init_fn, measure = _range(gamma3, reset_interval, scalar_dtype, axes)

  def update_fn(updates, state, params=None):
    del params
    grads, treedef = jax.tree.flatten(updates)
    layers = layer_axes(updates, axes)
    limits, state = measure(grads, layers, treedef, state)
    clipped = [
      _clip(g, *limit, over).astype(g.dtype)
      for g, limit, over in zip(grads, limits, layers, strict=True)
    ]
    return treedef.unflatten(clipped), state

  return optax.GradientTransformation(init_fn, update_fn)


class AdaptiveNormState(NamedTuple):
  """Step counter, norms above the mean so far, and the running means."""

  count: jax.Array
  damp_count: jax.Array
  norms: Any
  squares: Any


def adaptive_norm(
  gamma1: jax.typing.ArrayLike = 0.7,
  gamma2: jax.typing.ArrayLike = 0.9,
  eps: jax.typing.ArrayLike = 1e-8,
  reset_interval: int | None = None,
  total_steps: int | None = None,
  eta_min: jax.typing.ArrayLike = 0.5,
  scalar_dtype: jax.typing.DTypeLike | None = jnp.float32,
  axes: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  r"""AdaGN: give the gradient the norm of a running mean over its deviation.

  .. math::
    m_t &= \gamma_1 m_{t-1} + (1 - \gamma_1) \|g_t\|, \qquad
    v_t = \gamma_2 v_{t-1} + (1 - \gamma_2) \|g_t\|^2 \\
    g_t &\leftarrow \frac{g_t}{\|g_t\|} \cdot
      \frac{m_t / (1 - \gamma_1^t)}{\sqrt{v_t / (1 - \gamma_2^t)} + \epsilon}

  While norms are steady every array gets a norm of about 1, whatever the size
  of its gradient; one step of a large norm moves the factor by little. A
  gradient of 0 stays 0.

  Args:
    gamma1: decay of the mean norm.
    gamma2: decay of the mean squared norm.
    eps: keeps the quotient finite.
    reset_interval: steps after which t, though neither mean, starts anew, as
      in the authors' code; None lets t count all steps.
    total_steps: if given, gamma1 is multiplied by a cosine that falls from 1
      to eta_min over this many steps, as in the authors' code.
    eta_min: the end of that cosine.
    scalar_dtype: dtype of the means; None takes the parameters', see
      `adaptive_clip`.
    axes: which axes of an array are batch axes, see `adaptive_clip`.

  Returns:
    An optax.GradientTransformation; it does not use the parameters. Its state
    counts the arrays, each layer of a stack as one, whose norm was above its
    running mean, so that they were damped.

  Raises:
    ValueError: axes that do not fit, or an interval that is no int.

  Examples:
    It serves any optimizer; here Lion with both parts of Stable-SPAM:

    >>> tx = optax.chain(adaptive_clip(), adaptive_norm(), optax.lion(1e-3))
    >>> params = {'w': jnp.ones((2, 2)), 'b': jnp.ones(2)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> print(updates['b'].round(4))
    [-0.001 -0.001]

    By itself:

    >>> tx = adaptive_norm()
    >>> updates, _ = tx.update(jnp.array([0.0, 50.0]), tx.init(jnp.zeros(2)))
    >>> print(updates)
    [0. 1.]

  References:
    Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
    Adam <https://arxiv.org/abs/2502.17055>`_, 2025
  """
  init_fn, measure = _norm(
    gamma1,
    gamma2,
    eps,
    reset_interval,
    total_steps,
    eta_min,
    scalar_dtype,
    axes,
  )

  def update_fn(updates, state, params=None):
    del params
    grads, treedef = jax.tree.flatten(updates)
    layers = layer_axes(updates, axes)
    squares = [
      jnp.sum(jnp.square(wide(g)), axis=over)
      for g, over in zip(grads, layers, strict=True)
    ]
    factors, state = measure(squares, treedef, state)
    scaled = [
      (wide(g) * jnp.expand_dims(factor, over)).astype(g.dtype)
      for g, factor, over in zip(grads, factors, layers, strict=True)
    ]
    return treedef.unflatten(scaled), state

  return optax.GradientTransformation(init_fn, update_fn)


def adaptive_clip_and_norm(
  gamma1: jax.typing.ArrayLike,
  gamma2: jax.typing.ArrayLike,
  gamma3: jax.typing.ArrayLike,
  eps: jax.typing.ArrayLike,
  reset_interval: int | None,
  total_steps: int | None,
  eta_min: jax.typing.ArrayLike,
  scalar_dtype: jax.typing.DTypeLike | None,
  axes: Any | Callable[[Any], Any] | None,
) -> optax.GradientTransformation:
  """`adaptive_clip`, then `adaptive_norm`, in two readings of the gradient.

  The same states and updates as a chain of the two, but that the clipped
  gradient is neither stored nor, in low precision, rounded in between.

  Args:
    gamma1: see `adaptive_norm`.
    gamma2: see `adaptive_norm`.
    gamma3: see `adaptive_clip`.
    eps: see `adaptive_norm`.
    reset_interval: of both.
    total_steps: see `adaptive_norm`.
    eta_min: see `adaptive_norm`.
    scalar_dtype: of both.
    axes: of both.

  Returns:
    An optax.GradientTransformation.
  """
  init_range, measure_range = _range(gamma3, reset_interval, scalar_dtype, axes)
  init_norm, measure_norm = _norm(
    gamma1,
    gamma2,
    eps,
    reset_interval,
    total_steps,
    eta_min,
    scalar_dtype,
    axes,
  )

  def init_fn(params):
    return init_range(params), init_norm(params)

  def update_fn(updates, state, params=None):
    del params
    grads, treedef = jax.tree.flatten(updates)
    layers = layer_axes(updates, axes)
    limits, clip_state = measure_range(grads, layers, treedef, state[0])
    squares = [
      _clipped_square(g, *limit, over)
      for g, limit, over in zip(grads, limits, layers, strict=True)
    ]
    factors, norm_state = measure_norm(squares, treedef, state[1])
    updates = [
      (_clip(g, *limit, over) * jnp.expand_dims(factor, over)).astype(g.dtype)
      for g, limit, factor, over in zip(
        grads, limits, factors, layers, strict=True
      )
    ]
    return treedef.unflatten(updates), (clip_state, norm_state)

  return optax.GradientTransformation(init_fn, update_fn)


def cosine(
  total_steps: int | None, eta_min: jax.typing.ArrayLike
) -> Callable[[jax.Array], jax.Array | float]:
  r"""The factor on decays of the authors' code, by completed steps.

  .. math::
    c_t = \eta + \frac{1 - \eta}{2} \left( 1 + \cos \frac{\pi t}{T + 1} \right)

  Args:
    total_steps: T; from then on the factor stays. None makes it 1 throughout.
    eta_min: :math:`\eta`.

  Returns:
    A function from t - 1 to the factor.

  Raises:
    ValueError: total_steps is no int of at least 1.

  Examples:
    >>> print(cosine(total_steps=1, eta_min=0.5)(jnp.int32(0)))
    0.75
  """
  if total_steps is None:
    return lambda count: 1.0
  check_positive('total_steps', total_steps)

  def factor(count):
    phase = jnp.minimum((count + 1) / (total_steps + 1), 1.0)
    return eta_min + (1 - eta_min) * (1 + jnp.cos(jnp.pi * phase)) / 2

  return factor


def _range(gamma3, reset_interval, scalar_dtype, axes):
  """init, and measure: from gradients to the (limit, factor) of each."""
  if reset_interval is not None:
    check_positive('reset_interval', reset_interval)

  def init_fn(params):
    zero = jnp.zeros([], jnp.int32)
    return AdaptiveClipState(zero, zero, _zeros(params, axes, scalar_dtype))

  def measure(grads, layers, treedef, state):
    decay = jnp.asarray(gamma3, jnp.float32)
    since = _since(state.count, reset_interval)
    bias = 1 - decay**since
    clips, limits, means = state.clip_count, [], []
    for g, old, over in zip(
      grads, treedef.flatten_up_to(state.largest), layers, strict=True
    ):
      top = jnp.max(jnp.abs(wide(g)), axis=over, initial=0.0)
      means.append(_mean(old, top, decay))
      limit = wide(means[-1]) / bias
      # A first maximum is its own mean, whatever rounding makes of that.
      above = (top > limit) & (since > 1)
      limits.append((limit, jnp.where(above, limit / top, 1.0)))
      clips = add_count(clips, jnp.sum(above, dtype=jnp.int32))
    count = optax.safe_increment(state.count)
    return limits, AdaptiveClipState(count, clips, treedef.unflatten(means))

  return init_fn, measure


def _norm(
  gamma1,
  gamma2,
  eps,
  reset_interval,
  total_steps,
  eta_min,
  scalar_dtype,
  axes,
):
  """init, and measure: from squared norms to the factor of each."""
  if reset_interval is not None:
    check_positive('reset_interval', reset_interval)
  decline = cosine(total_steps, eta_min)

  def init_fn(params):
    zero = jnp.zeros([], jnp.int32)
    norms, squares = (_zeros(params, axes, scalar_dtype) for _ in range(2))
    return AdaptiveNormState(zero, zero, norms, squares)

  def measure(squares, treedef, state):
    since = _since(state.count, reset_interval)
    decay1 = jnp.asarray(gamma1, jnp.float32) * decline(state.count)
    decay2 = jnp.asarray(gamma2, jnp.float32)
    bias1, bias2 = 1 - decay1**since, 1 - decay2**since
    damps, factors, means, mean_squares = state.damp_count, [], [], []
    for square, m, v in zip(
      squares,
      treedef.flatten_up_to(state.norms),
      treedef.flatten_up_to(state.squares),
      strict=True,
    ):
      norm = jnp.sqrt(square)
      means.append(_mean(m, norm, decay1))
      mean_squares.append(_mean(v, square, decay2))
      m, v = wide(means[-1]) / bias1, wide(mean_squares[-1]) / bias2
      target = m / (jnp.sqrt(v) + eps)
      factors.append(jnp.where(norm > 0, target / norm, 1.0))
      damps = add_count(damps, jnp.sum(norm > m, dtype=jnp.int32))
    return factors, AdaptiveNormState(
      optax.safe_increment(state.count),
      damps,
      treedef.unflatten(means),
      treedef.unflatten(mean_squares),
    )

  return init_fn, measure


def _clip(g, limit, factor, over):
  """Entries above the limit times the factor."""
  g, limit, factor = wide(g), *_spread(limit, factor, over)
  # Not |g| > limit: with the |g| of the maximum XLA would store it for both.
  return jnp.where((g > limit) | (g < -limit), g * factor, g)


def _clipped_square(g, limit, factor, over):
  """The sum of squares of what `_clip` returns."""

  def square(g, limit, factor):
    return jnp.sum(jnp.square(_clip(g, limit, factor, over)), axis=over)

  # On CPUs XLA does not fuse a select with a reduction and would store the
  # clipped gradient. A slice at a time it stays in the cache; the slices are
  # strided so that every shard has a part of each.
  split = [
    math.gcd(n, 16) if i in over[:-1] else 1 for i, n in enumerate(g.shape)
  ]
  slices = max(split, default=1)
  if slices == 1 or g.size < 2**20:
    return square(g, limit, factor)
  axis = split.index(slices)
  shape = list(g.shape)
  shape[axis : axis + 1] = [g.shape[axis] // slices, slices]

  def sliced(g, limit, factor):
    def add(i, total):
      part = jax.lax.dynamic_index_in_dim(
        g.reshape(shape), i, axis + 1, keepdims=False
      )
      return total + square(part, limit, factor)

    return jax.lax.fori_loop(0, slices, add, jnp.zeros_like(limit))

  def plain(g, limit, factor):
    del limit, factor
    return jnp.sum(jnp.square(wide(g)), axis=over)

  def on_cpu(g, limit, factor):
    clips = jnp.any(factor < 1)
    return jax.lax.cond(clips, sliced, plain, g, limit, factor)

  return jax.lax.platform_dependent(
    g, limit, factor, cpu=on_cpu, default=square
  )


def _spread(limit, factor, over):
  return jnp.expand_dims(limit, over), jnp.expand_dims(factor, over)


def _since(count, reset_interval):
  """The authors' counter of bias corrections: at 2 in the step after a reset.

  It is set to 1 at the end of the step of a reset and incremented before use.
  """
  if reset_interval is None:
    return count + 1
  return jnp.where(
    count < reset_interval, count + 1, count % reset_interval + 2
  )


def _mean(old, x, decay):
  """A running mean; in low precision every product and the sum are rounded.

  That is how the authors' code comes to stall, and reduce_precision is what a
  compiler may not optimise away.
  """
  dtype = old.dtype
  if dtype.itemsize >= 4:
    return (decay * old + (1 - decay) * x).astype(dtype)
  info = jnp.finfo(dtype)

  def rounded(y):
    return jax.lax.reduce_precision(y, info.nexp, info.nmant)

  return rounded(rounded(decay * wide(old)) + rounded((1 - decay) * x)).astype(
    dtype
  )


def _zeros(params, axes, dtype):
  """A zero for each layer of each parameter."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten(
    jnp.zeros(
      [n for i, n in enumerate(x.shape) if i not in over], dtype or x.dtype
    )
    for x, over in zip(leaves, layer_axes(params, axes), strict=True)
  )
