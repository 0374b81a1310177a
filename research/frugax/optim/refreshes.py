r"""Refresh schedules: when each subspace is found anew, and the refresh itself.

The units of a refresh are layers: the items along the first batch axis of a
stack, or a whole leaf that has no batch axes or whose projector keeps one state
for all of them, such as a random key. Due layers are refreshed one after the
other, in place, so a refresh needs the memory of one layer's factors whatever
the height of the stack. The names that `low_rank(refresh=...)` knows are in
`SCHEDULES`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from frugax import names
from frugax.optim import moments as moments_lib
from frugax.optim.declared import by_layer, only_saves_work
from frugax.optim.leaves import Leaf
from frugax.optim.projection import Context


class Clock(NamedTuple):
  """What a schedule decides by.

  Attributes:
    count: updates before this one, an int32 scalar.
    interval: `update_interval` of `low_rank`.
    layers: how many the leaf has.
  """

  count: jax.Array
  interval: int
  layers: int


class Schedule(NamedTuple):
  """When to refresh. Everything must be due at count 0: there is no basis yet.

  Attributes:
    init: `(slots, interval) -> memory`, arrays (layers, ...) or () for none;
      slots, int32 (layers,), are the steps of the interval that are the layers'
      own, over which all those of a tree are spread evenly.
    due: `(clock, memory) -> bool (layers,)`.
    number: `(clock, memory) -> int32 (layers,)`, refreshes before this one.
    after: `(memory, turns) -> memory` of one layer that was refreshed, given
      its change of basis as `frugax.optim.moments.Turn`, one for each projected
      side; None if the schedule does not look at it.
    together: whether all layers of all leaves are due at the same steps.
  """

  init: Callable[[np.ndarray, int], Any]
  due: Callable[[Clock, Any], jax.Array]
  number: Callable[[Clock, Any], jax.Array]
  after: Callable[[Any, tuple[moments_lib.Turn, ...]], Any] | None = None
  together: bool = False


together = Schedule(
  init=lambda slots, interval: (),
  due=lambda clock, memory: jnp.broadcast_to(
    clock.count % clock.interval == 0, clock.layers
  ),
  number=lambda clock, memory: jnp.broadcast_to(
    clock.count // clock.interval, clock.layers
  ),
  together=True,
)

staggered = Schedule(
  # Remembered, so that one layer can be updated without the others.
  init=lambda slots, interval: jnp.asarray(slots),
  due=lambda clock, slots: (
    (clock.count == 0) | (clock.count % clock.interval == slots)
  ),
  # A layer of slot 3 is refreshed at 0, 3, n + 3, 2n + 3 ...
  number=lambda clock, slots: (
    clock.count // clock.interval + ((clock.count > 0) & (slots > 0))
  ),
)


class LazyMemory(NamedTuple):
  """What the lazy schedule remembers of each layer.

  Attributes:
    interval: steps between its refreshes, int32 (layers,).
    refreshes: how often it was refreshed, int32 (layers,).
    similarities: of the last changes of basis, float32 (layers, window).
  """

  interval: jax.Array
  refreshes: jax.Array
  similarities: jax.Array


def overlap(turn: moments_lib.Turn) -> jax.Array:
  r"""How much of the old subspace is in the new, :math:`\|P^T P'\|_F^2 / r`.

  Between 0 and 1 for orthonormal bases, and the same for all bases of the two
  subspaces.
  """
  c = turn.matrix
  return jnp.mean(jnp.sum(c * c, axis=(-2, -1)) / c.shape[-1])


def first_cosine(turn: moments_lib.Turn) -> jax.Array:
  """The cosine of the first basis vectors, with its sign, as released."""
  a, b = turn.old[..., 0], turn.new[..., 0]
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  tiny = jnp.finfo(norms.dtype).tiny
  return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, tiny))


SIMILARITIES = {
  'subspace': overlap,
  'vector': lambda turn: jnp.abs(first_cosine(turn)),
  'signed': first_cosine,
}


def lazy(
  threshold: float = 0.4, window: int = 5, similarity: str = 'subspace'
) -> Schedule:
  """Q-GaLore: layers whose subspace hardly turns are refreshed less often.

  Each layer starts with `update_interval` steps between refreshes. When the
  mean similarity of its last `window` changes of basis is at least `threshold`
  its interval doubles, and may double again at its next refresh. All of this
  is state on the device: nothing is compiled anew.

  Args:
    threshold: mean similarity from which on the interval doubles.
    window: changes of basis to look back on.
    similarity: 'subspace', the share of the old subspace that is in the new, as
      the paper describes; 'vector', the magnitude of the cosine between the
      first singular vectors, old and new; 'signed', that cosine itself as in
      the authors' code, in which it depends on the sign that a linear algebra
      library happens to give to singular vectors.

  Returns:
    A Schedule for `low_rank(refresh=...)`.

  Raises:
    ValueError: an unknown similarity, or a window below 1.

  Examples:
    >>> memory = lazy().init(slots=range(24), interval=200)
    >>> memory.interval.shape, memory.similarities.shape
    ((24,), (24, 5))

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and
    Layer-Adaptive Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
  """
  if similarity not in SIMILARITIES:
    raise names.unknown('similarity', similarity, SIMILARITIES)
  if window < 1:
    raise ValueError(f'window={window!r}: give an int of at least 1')
  measure = SIMILARITIES[similarity]

  def init(slots, interval):
    layers = len(slots)
    return LazyMemory(
      interval=jnp.full(layers, interval, jnp.int32),
      refreshes=jnp.zeros(layers, jnp.int32),
      similarities=jnp.zeros((layers, window)),
    )

  def after(memory, turns):
    found = jnp.mean(jnp.stack([measure(turn) for turn in turns]))
    recent = jnp.roll(memory.similarities, -1, axis=-1).at[..., -1].set(found)
    # The first refresh had no basis to compare with.
    full = memory.refreshes >= window
    longer = full & (jnp.mean(recent, axis=-1) >= threshold)
    # Beyond 2^30 steps no run would see the next refresh, and int32 its end.
    longer &= memory.interval < 2**30
    return LazyMemory(
      interval=jnp.where(longer, 2 * memory.interval, memory.interval),
      refreshes=memory.refreshes + 1,
      similarities=jnp.where(
        memory.refreshes[..., None] > 0, recent, memory.similarities
      ),
    )

  return Schedule(
    init=init,
    due=lambda clock, memory: clock.count % memory.interval == 0,
    number=lambda clock, memory: memory.refreshes,
    after=after,
  )


SCHEDULES: dict[str, Schedule] = {
  'together': together,
  'staggered': staggered,
  'lazy': lazy(),
}


def by_name(refresh: str | Schedule) -> Schedule:
  """The schedule of a name, or the schedule itself.

  Raises:
    ValueError: an unknown name.
  """
  if isinstance(refresh, Schedule):
    return refresh
  if refresh not in SCHEDULES:
    raise names.unknown('refresh schedule', refresh, SCHEDULES)
  return SCHEDULES[refresh]


class Plan(NamedTuple):
  """What is static about the refreshes of a tree.

  Attributes:
    schedule: when layers are due.
    interval: `update_interval`.
    policy: what becomes of the moments.
    leaves: what is static about each leaf.
    groups: where the moments lie in the flat inner state.
  """

  schedule: Schedule
  interval: int
  policy: moments_lib.Moments
  leaves: list[Leaf]
  groups: list[moments_lib.Group]

  def clocks(self, count: jax.Array) -> dict[int, Clock]:
    """The clock of each projected leaf."""
    return {
      i: Clock(count, self.interval, leaf.layers)
      for i, leaf in enumerate(self.leaves)
      if leaf.axes
    }


def init(schedule: Schedule, interval: int, leaves: list[Leaf]) -> list[Any]:
  """What a schedule remembers of each leaf; None for one left whole."""
  total = sum(leaf.layers for leaf in leaves if leaf.axes)
  memories, before = [], 0
  for leaf in leaves:
    if not leaf.axes:
      memories.append(None)
      continue
    places = np.arange(before, before + leaf.layers)
    slots = (places * interval // total).astype(np.int32)
    memories.append(schedule.init(slots, interval))
    before += leaf.layers
  return memories


class Changing(NamedTuple):
  """What refreshes change.

  Attributes:
    projectors: projector states by leaf.
    memories: what the schedule remembers by leaf.
    moments: by position in the flat inner state.
  """

  projectors: dict[int, Any]
  memories: dict[int, Any]
  moments: dict[int, jax.Array]


def run(
  plan: Plan,
  grads: list[jax.Array],
  firsts: dict[int, jax.Array],
  count: jax.Array,
  key: jax.Array,
  old: Changing,
  reset: Callable[[], dict[int, jax.Array]],
) -> Changing:
  """Refresh what is due.

  Args:
    plan: what is static.
    grads: gradients as matrices, by leaf.
    firsts: first moments by leaf, of those that have one.
    count: updates before this one.
    key: a PRNG key; the update and each leaf's path are folded in.
    old: what refreshes change.
    reset: the moments of an inner state that starts anew.

  Returns:
    The same after the refresh.
  """
  clocks = plan.clocks(count)
  key = jax.random.fold_in(key, count)

  def refresh(changing):
    moments = changing.moments
    projectors, memories = {}, {}
    for i, clock in clocks.items():
      own = [group for group in plan.groups if group.leaf == i]
      turning = {j: moments[j] for j in plan.policy.turning(own, 0)}
      projectors[i], turned, memories[i] = _refresh_leaf(
        plan,
        own,
        plan.leaves[i],
        clock,
        key,
        (grads[i], firsts.get(i)),
        (changing.projectors[i], turning, changing.memories[i]),
      )
      moments = moments | turned
    if plan.policy.policy == 'reset':
      moments = reset()
    return Changing(projectors, memories, moments)

  if plan.schedule.together:
    due = count % plan.interval == 0
  else:
    due = functools.reduce(
      jnp.logical_or,
      (
        jnp.any(plan.schedule.due(clock, old.memories[i]))
        for i, clock in clocks.items()
      ),
      False,
    )
  due = only_saves_work(due)  # Within it each layer looks at its own clock.
  # One predicate and one cond for the whole tree, never inside a vmap. Outside
  # of a cond the loops would have a TPU lay out the gradients as suits them.
  new = jax.lax.cond(due, refresh, lambda same: same, old)
  # Else XLA casts the moments of all leaves at once, within the branches.
  return jax.lax.optimization_barrier(new)


def _refresh_leaf(plan, groups, leaf, clock, key, inputs, old):
  """Projector, moments and memory of a leaf, its due layers refreshed."""
  schedule = plan.schedule
  # All layers of a stack share the key, so that each alone would get it too.
  key = jax.random.fold_in(key, leaf.hash())

  inputs = *inputs, schedule.number(clock, old[-1])

  def refresh(projector, inputs, old):
    grad, first, number = inputs
    state, moments, memory = old
    moment = None if first is None else moments_lib.load(first)
    context = Context(key, number, clock.count, moment)
    new = projector.refresh(grad, state, context)
    # What is carried keeps the dtypes of init.
    new = jax.tree.map(lambda x, p: x.astype(p.dtype), new, state)
    if schedule.after or moments:
      turns = leaf.turns(projector, state, new, clock.count)
    if schedule.after:
      memory = schedule.after(memory, turns)
    if moments:
      moments = moments_lib.turn(plan.policy, groups, moments, turns)
    return new, moments, memory

  def whole(inputs, old):
    grad, first, numbers = inputs
    return refresh(leaf.projector, (grad, first, numbers[0]), old)

  def one_by_one(inputs, old):
    def stack(x):
      return x if leaf.stacked else jax.tree.map(lambda x: x[None], x)

    grad, first, numbers = inputs
    projector, moments, memory = old
    inputs = stack(grad), stack(first), numbers
    due = schedule.due(clock, memory)
    order = jnp.argsort(~due)

    def step(k, carry):
      at = order[k]

      def take(x):
        return jax.lax.dynamic_index_in_dim(x, at, keepdims=False)

      def put(x, new):
        return jax.lax.dynamic_update_index_in_dim(x, new, at, 0)

      here = jax.tree.map(take, (inputs, carry))
      return jax.tree.map(put, carry, refresh(leaf.layer, *here))

    projector, moments, memory = jax.lax.fori_loop(
      0,
      jnp.sum(due, dtype=jnp.int32),
      step,
      (stack(projector), stack(moments), memory),
    )
    if not leaf.stacked:
      projector, moments = jax.tree.map(lambda x: x[0], (projector, moments))
    return projector, moments, memory

  if not schedule.together:
    return by_layer(one_by_one)(inputs, old)
  # CPUs are faster on all layers at once; elsewhere that would gather a stack
  # of factors.
  return jax.lax.platform_dependent(
    inputs, old, cpu=whole, default=by_layer(one_by_one)
  )
