"""SPAM's clipping of entries that are far above their own running size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import wide
from frugax.optim.axes import path_name
from frugax.optim.counts import add_count
from frugax.optim.leaves import check_positive
from frugax.optim.moments import Moments, find


class ClipSpikesState(NamedTuple):
  """Step counter, entries clipped so far, and the inner state."""

  count: jax.Array
  spike_count: jax.Array
  inner: Any


def clip_spikes(
  threshold: jax.typing.ArrayLike = 5000.0,
  inner: optax.GradientTransformation | None = None,
  guard: int = 20,
  reset_interval: int | None = None,
  clip_unseen: bool = True,
  b2: jax.typing.ArrayLike = 0.999,
) -> optax.GradientTransformationExtraArgs:
  r"""Clip entries of the gradient that are far above their own running size.

  .. math::
    g_i \leftarrow \mathrm{sign}(g_i) \sqrt{\theta V_i}
    \quad\text{where}\quad g_i^2 > \theta V_i

  V is a running mean of squared gradients before this one, not corrected for
  its bias. With an `inner` transformation it is the second moment that inner
  has anyway, so nothing is stored twice; without one it is kept here and the
  clipped gradient goes on down the chain.

  An entry whose gradient was always 0, such as the embedding of a word not
  seen yet, has V = 0. The authors' rule clips it to 0, so V stays 0 and the
  entry is frozen until the next reset; `clip_unseen=False` lets it through.

  Args:
    threshold: :math:`\theta`, the largest square over V.
    inner: a transformation with a second moment of each parameter, such as
      `optax.scale_by_adam`; it gets the clipped gradients.
    guard: steps at the start, and after a reset, in which V is not yet worth
      comparing with and nothing is clipped.
    reset_interval: steps between two resets of V by a `reset_moments` around
      this; None if there is none.
    clip_unseen: whether entries with V = 0 are clipped, to 0.
    b2: decay of V without `inner`.

  Returns:
    An optax.GradientTransformation. Its state counts clipped entries.

  Raises:
    ValueError: guard or reset_interval is not an int in its range, or inner
      has no second moment for a parameter.

  Examples:
    >>> tx = clip_spikes(threshold=4.0, guard=2, b2=0.75)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([2.0, -2.0], [1.0, -9.0]):
    ...   updates, state = tx.update(jnp.array(g), state)
    >>> print(updates, state.spike_count)
    [ 1. -2.] 1

  References:
    Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
    Training <https://arxiv.org/abs/2501.06842>`_, 2025
  """
  if isinstance(guard, jax.Array) or not isinstance(guard, int) or guard < 0:
    raise ValueError(
      f'guard={guard!r}: give a Python int of at least 0; under '
      'optax.inject_hyperparams name it in static_args'
    )
  if reset_interval is not None:
    check_positive('reset_interval', reset_interval)
  inner = optax.with_extra_args_support(
    _mean_square(b2) if inner is None else inner
  )

  def second_moments(tree, state):
    """The second moment of each leaf of a tree, in a flat inner state."""
    found = jax.tree.leaves_with_path(tree)
    paths = [path for path, _ in found]
    shapes = {path: x.shape for path, x in found}
    at = {
      group.leaf: group.second[0]
      for group in reversed(find(Moments('keep'), state, shapes))
      if group.second
    }
    for i, path in enumerate(paths):
      if i not in at:
        raise ValueError(
          f'inner has no second moment of {path_name(path)} to compare '
          'gradients with: give an inner that has, such as '
          'optax.scale_by_adam(), or none'
        )
    flat = jax.tree.leaves(state)
    return [flat[at[i]] for i in range(len(paths))]

  def init_fn(params):
    state = inner.init(params)
    second_moments(params, state)  # Refuses early.
    zero = jnp.zeros([], jnp.int32)
    return ClipSpikesState(zero, zero, state)

  def update_fn(updates, state, params=None, **extra_args):
    count = optax.safe_increment(state.count)
    active = count >= guard
    if reset_interval is not None:
      active &= count % reset_interval >= guard
    grads, treedef = jax.tree.flatten(updates)
    total, clipped = state.spike_count, []
    for g, v in zip(grads, second_moments(updates, state.inner), strict=True):
      square, largest = jnp.square(wide(g)), threshold * wide(v)
      spikes = active & (square > largest)
      if not clip_unseen:
        spikes &= largest > 0
      limited = jnp.sign(g) * jnp.sqrt(largest)
      clipped.append(jnp.where(spikes, limited, g).astype(g.dtype))
      total = add_count(total, jnp.sum(spikes, dtype=jnp.int32))
    updates, inner_state = inner.update(
      treedef.unflatten(clipped), state.inner, params, **extra_args
    )
    return updates, ClipSpikesState(count, total, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class MeanSquareState(NamedTuple):
  """Running mean of squared gradients."""

  nu: Any


def _mean_square(b2):
  """Gradients go through; the state is the running mean of their squares."""

  def init_fn(params):
    return MeanSquareState(jax.tree.map(jnp.zeros_like, params))

  def update_fn(updates, state, params=None):
    del params
    nu = jax.tree.map(
      lambda g, v: (b2 * wide(v) + (1 - b2) * jnp.square(wide(g))).astype(
        v.dtype
      ),
      updates,
      state.nu,
    )
    return updates, MeanSquareState(nu)

  return optax.GradientTransformation(init_fn, update_fn)
