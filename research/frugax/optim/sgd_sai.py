"""SGD-SaI: momentum with one learning rate a layer, fixed at the start."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import wide
from frugax.optim.axes import layer_axes
from frugax.optim.declared import only_saves_work


def sgd_sai(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""SGD with momentum, each layer scaled by its first gradient's SNR.

  .. math::
    W_t = (1 - \eta \lambda) W_{t-1} - \eta \, \gamma \, M_t

  with the momentum and the factors :math:`\gamma` of `scale_by_sai`. The
  optimizer holds half of what Adam does. The authors train with learning rate
  0.01 and decay 0.01.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the momentum.
    eps: added to the deviation.
    weight_decay: strength of decoupled decay, of the weight before the step;
      the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: what is one layer of an array, see `scale_by_sai`.
    state_dtype: dtype of the momentum; None takes the parameters'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: axes that do not fit; and from update without parameters when
      `weight_decay` is given.

  Examples:
    >>> loss = lambda params: jnp.sum((params['w'] - jnp.eye(4)) ** 2)
    >>> tx = sgd_sai(learning_rate=0.02)
    >>> params = {'w': jnp.zeros((4, 4))}
    >>> state = tx.init(params)
    >>> for _ in range(30):
    ...   updates, state = tx.update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss({'w': jnp.zeros((4, 4))}))
    True

  References:
    Xu et al., `No More Adam: Learning Rate Scaling at Initialization is All You
    Need <https://arxiv.org/abs/2412.11768>`_, 2024
  """
  tx = scale_by_sai(b1, eps, axes, state_dtype)
  rate = optax.scale_by_learning_rate(learning_rate)
  if isinstance(weight_decay, int | float) and weight_decay == 0:
    return optax.chain(tx, rate)
  return optax.chain(tx, optax.add_decayed_weights(weight_decay, mask), rate)


class ScaleBySaiState(NamedTuple):
  """State of `scale_by_sai`.

  Attributes:
    count: updates so far.
    mu: the momentum.
    gsnr: one factor for each layer of each parameter; 0 until it has had a
      gradient.
  """

  count: jax.Array
  mu: Any
  gsnr: Any


def scale_by_sai(
  b1: jax.typing.ArrayLike = 0.9,
  eps: jax.typing.ArrayLike = 1e-8,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""Momentum times the signal-to-noise ratio of each layer's first gradient.

  .. math::
    \gamma = \frac{\|G_1\|}{\mathrm{std}(G_1) + \epsilon}, \qquad
    M_1 = G_1, \quad M_t = b_1 M_{t-1} + (1-b_1) G_t, \qquad
    U_t = \gamma \, M_t

  with the deviation of a sample (its size less one). For a gradient whose mean
  is near 0 the ratio is the root of the layer's size, whatever the gradient.

  Where the released code fails it is changed: a layer whose first gradient is 0
  takes the first that is not (there it stands still for ever); one of a single
  entry, which has no deviation, has ratio 1 (there 1e8 times the gradient).

  Args:
    b1: decay of the momentum.
    eps: added to the deviation.
    axes: what is one layer of an array: MatrixAxes, optax's dimension numbers,
      or a tuple of logical axis names, whose 'layers' and 'experts' are stacks;
      None takes the array as one. A tree of these or a function that makes it;
      None for arrays of at most two axes.
    state_dtype: dtype of the momentum; None takes the parameters'.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Raises:
    ValueError: axes that do not fit.

  Examples:
    >>> tx = scale_by_sai()
    >>> params = jnp.zeros(2)
    >>> updates, state = tx.update(jnp.array([3., -1.]), tx.init(params))
    >>> print(state.gsnr.round(3), updates.round(3))
    1.118 [ 3.354 -1.118]
  """

  def init_fn(params):
    leaves, treedef = jax.tree.flatten(params)
    return ScaleBySaiState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree.map(
        lambda p: jnp.zeros(p.shape, state_dtype or p.dtype), params
      ),
      gsnr=treedef.unflatten(
        jnp.zeros(_batch_shape(x.shape, over), jnp.float32)
        for x, over in zip(leaves, layer_axes(params, axes), strict=True)
      ),
    )

  def update_fn(updates, state, params=None):
    del params
    grads, treedef = jax.tree.flatten(updates)
    layers = layer_axes(updates, axes)

    def measured(old):
      return [
        jnp.where(ratio == 0, _ratio(wide(g), over, eps), ratio)
        for ratio, g, over in zip(old, grads, layers, strict=True)
      ]

    ratios = treedef.flatten_up_to(state.gsnr)
    unknown = [jnp.any(ratio == 0) for ratio in ratios]
    if ratios:
      ratios = jax.lax.cond(
        only_saves_work(jnp.any(jnp.stack(unknown))),
        measured,
        lambda same: same,
        ratios,
      )
    first = state.count == 0
    mu = jax.tree.map(
      lambda g, m: b1 * wide(m) + jnp.where(first, 1.0, 1 - b1) * wide(g),
      updates,
      state.mu,
    )
    scaled = [
      (jnp.expand_dims(ratio, over) * m).astype(g.dtype)
      for ratio, m, g, over in zip(
        ratios, jax.tree.leaves(mu), grads, layers, strict=True
      )
    ]
    return treedef.unflatten(scaled), ScaleBySaiState(
      count=optax.safe_increment(state.count),
      mu=jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu),
      gsnr=treedef.unflatten(ratios),
    )

  return optax.GradientTransformation(init_fn, update_fn)


def _batch_shape(shape, over):
  return tuple(size for i, size in enumerate(shape) if i not in over)


def _ratio(g, over, eps):
  norm = jnp.sqrt(jnp.sum(jnp.square(g), axis=over))
  size = g.size // max(norm.size, 1)
  if size == 1:
    return (norm > 0).astype(norm.dtype)
  return norm / (jnp.std(g, axis=over, ddof=1) + eps)
