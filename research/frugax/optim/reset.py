"""Forget the moments of any transformation at regular intervals."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import wide
from frugax.optim.leaves import check_positive
from frugax.optim.moments import FIRST, SECOND

# Gradients that wait for their step are in no moment yet.
MOMENTS = tuple(n for n in FIRST + SECOND if n != 'acc_grads')


class ResetMomentsState(NamedTuple):
  """Step counter, resets so far, and the inner state."""

  count: jax.Array
  reset_count: jax.Array
  inner: Any


def reset_moments(
  inner: optax.GradientTransformation,
  every: int,
  warmup: int = 0,
  counters: bool = False,
  stale: bool = False,
  fields: tuple[str, ...] = MOMENTS,
) -> optax.GradientTransformationExtraArgs:
  r"""Start the moments of `inner` anew at steps every, 2 every, 3 every, ...

  Steps count from 1. A moment that a spike has spoiled is so forgotten after
  `every` steps at the latest. In the first steps from a reset on the update is
  scaled by

  .. math::
    1 - \frac{0.99}{2} \left( 1 + \cos \frac{\pi j}{N + 1} \right),
    \qquad j = 0, 1, \dots, N - 1

  with N = `warmup`, that is from 0.01 to nearly 1. Before the first reset it is
  not: that is the learning-rate schedule's part.

  A moment is an array below a field of the inner state with one of the names
  in `fields`, in any wrapper; it gets the value that `inner.init` gives it.
  Wrapped in `optax.MultiSteps`, this counts its steps; a MultiSteps inside
  keeps its accumulated gradients.

  Args:
    inner: any optax transformation that has moments.
    every: steps from one reset to the next.
    warmup: N, over how many steps updates grow to their full size.
    counters: whether a step counter beside moments (in the same NamedTuple)
      starts anew with them, so that their bias is corrected as at the first
      step. Those of learning-rate schedules never do.
    stale: take the step of the reset with the old moments, its counter at 1 if
      `counters`, and forget them and its gradient afterwards, as the code of
      Stable-SPAM does.
    fields: names of fields that hold moments.

  Returns:
    An optax.GradientTransformation. Its state counts the resets.

  Raises:
    ValueError: every or warmup is not an int in its range, or the inner state
      has no field of these names.

  Examples:
    >>> tx = reset_moments(optax.trace(decay=1.0), every=3)
    >>> state = tx.init(jnp.zeros(()))
    >>> for _ in range(4):
    ...   updates, state = tx.update(jnp.array(1.0), state)
    ...   print(updates)
    1.0
    2.0
    1.0
    2.0

  References:
    Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
    Training <https://arxiv.org/abs/2501.06842>`_, 2025
  """
  check_positive('every', every)
  if isinstance(warmup, jax.Array) or not isinstance(warmup, int) or warmup < 0:
    raise ValueError(
      f'warmup={warmup!r}: give a Python int of at least 0; under '
      'optax.inject_hyperparams name it in static_args'
    )
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    state = inner.init(params)
    if 0 not in _kinds(state, fields, counters):
      raise ValueError(
        'reset_moments found no moments in the state of inner, '
        f'{jax.tree.structure(state)}: give the names of their fields in '
        '`fields`'
      )
    zero = jnp.zeros([], jnp.int32)
    return ResetMomentsState(zero, zero, state)

  def update_fn(updates, state, params=None, **extra_args):
    count = optax.safe_increment(state.count)
    due = count % every == 0
    # Only moments and counters of it are used; the rest is never computed.
    fresh = inner.init(updates if params is None else params)
    # Stale moments are forgotten before the next step instead of after this
    # one: the same path, without a second copy of them.
    spent = (state.count >= every) & (state.count % every == 0)
    when = [spent if stale else due, due]
    old, treedef = jax.tree.flatten(state.inner)
    renewed = [
      x if kind is None else jnp.where(when[kind], new.astype(x.dtype), x)
      for x, new, kind in zip(
        old,
        jax.tree.leaves(fresh),
        _kinds(state.inner, fields, counters),
        strict=True,
      )
    ]
    updates, inner_state = inner.update(
      updates, treedef.unflatten(renewed), params, **extra_args
    )
    if warmup:
      since = jnp.where(count < every, warmup, count % every)
      factor = _warmed(since, warmup)
      updates = jax.tree.map(
        lambda u: (factor * wide(u)).astype(u.dtype), updates
      )
    return updates, ResetMomentsState(
      count, state.reset_count + due, inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _warmed(since, warmup):
  """The factor on updates so many steps after a reset."""
  wave = 1 + jnp.cos(jnp.pi * since / (warmup + 1))
  return jnp.where(since >= warmup, 1.0, 1 - 0.99 * wave / 2)


def _kinds(state, fields, counters):
  """For each array of a state: 0 for a moment, 1 for a counter, else None."""
  found = jax.tree.leaves_with_path(state)
  kinds: list[int | None] = [None] * len(found)
  beside = set()
  for i, (path, _) in enumerate(found):
    for j, key in enumerate(path):
      if getattr(key, 'name', None) in fields:
        kinds[i] = 0
        beside.add(path[:j])
  for i, (path, x) in enumerate(found):
    integer = jnp.issubdtype(x.dtype, jnp.integer) and x.ndim == 0
    if counters and kinds[i] is None and integer and path[:-1] in beside:
      kinds[i] = 1
  return kinds
