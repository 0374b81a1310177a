"""LISA: a few layers drawn anew every so often train, the others rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import scale_by_adam_hf
from frugax.optim.axes import path_name
from frugax.optim.leaves import check_positive, seed


def lisa(
  learning_rate: optax.ScalarOrSchedule,
  active: int = 2,
  update_interval: int = 20,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  stacked: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""AdamW on a few layers at a time, drawn anew every `update_interval` steps.

  `sample_layers` around Adam and decoupled weight decay. Embedding, head and
  norms outside of the layers train at every step; a layer that was not drawn
  neither moves nor decays. With :math:`\gamma` active layers of L the
  optimizer's state for the layers is :math:`\gamma / L` of Adam's.

  Args:
    learning_rate: a number or a schedule.
    active: layers that train at a time, :math:`\gamma`.
    update_interval: steps from one draw to the next.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the corrected second moment.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    stacked: which leaves are stacks of layers, see `sample_layers`.
    state_dtype: dtype of the moments; None takes the parameters'.
    key: a seed or a key of any kind; the draws depend on it alone.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `sample_layers`.

  Examples:
    >>> tx = lisa(learning_rate=0.1, active=1)
    >>> params = {'layers': {'w': jnp.ones((4, 2))}, 'head': jnp.ones(2)}
    >>> updates, state = tx.update(params, tx.init(params))
    >>> print(updates['layers']['w'].sum().round(3))
    -0.2
    >>> print(updates['head'].round(3))
    [-0.1 -0.1]

  References:
    Pan et al., `LISA: Layerwise Importance Sampling for Memory-Efficient Large
    Language Model Fine-Tuning <https://arxiv.org/abs/2403.17919>`_, 2024
  """
  inner = scale_by_adam_hf(b1, b2, eps, state_dtype, correction='moments')
  if not (isinstance(weight_decay, int | float) and weight_decay == 0):
    inner = optax.chain(inner, optax.add_decayed_weights(weight_decay, mask))
  return optax.chain(
    sample_layers(inner, active, update_interval, stacked, key),
    optax.scale_by_learning_rate(learning_rate),
  )


class SampleLayersState(NamedTuple):
  """State of `sample_layers`.

  Attributes:
    count: updates so far.
    layers: (active,), the layers that the last update trained, in order.
    inner: the state of `inner` for them, (active, ...) where parameters are
      (layers, ...).
    rest: its state for all that is not stacked.
  """

  count: jax.Array
  layers: jax.Array
  inner: Any
  rest: Any


def sample_layers(
  inner: optax.GradientTransformation,
  active: int,
  every: int,
  stacked: Any | Callable[[Any], Any] | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs `inner` on a few layers of a stack, drawn anew at intervals.

  Before the steps 0, every, 2 every, ... `active` of the L layers are drawn
  uniformly and without replacement. Until the next draw `inner` sees their
  gradients, and all other layers get updates of zero. Its state for the layers
  has places for `active` of them, which start anew with each draw, step
  counters included; so a learning-rate schedule belongs outside. What is not
  stacked has a state of its own that goes on.

  The layers of all leaves are the same. That the shapes are static, layers
  being gathered and scattered by an index, is what saves the memory under jit.
  The gradients of resting layers are not used: whoever computes the next step's
  may leave them out, `state.layers` says which unless a draw is due.

  Args:
    inner: any optax transformation; its learning rate may be inside if it is
      constant.
    active: layers that train at a time.
    every: steps from one draw to the next.
    stacked: which leaves have layers as their first axis: a tree of booleans or
      a function that makes one from the parameters; a tuple of logical axis
      names says it by beginning with 'layers', so that `model.axes()` will do.
      None: those below a key 'layers', as in our models.
    key: a seed or a key of any kind. The draws depend on it and on the count
      of intervals alone, so they are the same on all hosts.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: active or every is no int of at least 1, active is more than
      there are layers, nothing is stacked, or stacks differ in their layers.

  Examples:
    >>> tx = sample_layers(optax.sgd(1.0), active=2, every=10)
    >>> params = {'layers': jnp.ones((5, 3)), 'head': jnp.ones(2)}
    >>> updates, state = tx.update(params, tx.init(params))
    >>> sorted(updates['layers'].sum(1).tolist()), updates['head'].tolist()
    ([-3.0, -3.0, 0.0, 0.0, 0.0], [-1.0, -1.0])
    >>> updates['layers'][state.layers].sum().item()
    -6.0

  References:
    Pan et al., `LISA: Layerwise Importance Sampling for Memory-Efficient Large
    Language Model Fine-Tuning <https://arxiv.org/abs/2403.17919>`_, 2024
  """
  check_positive('active', active)
  check_positive('every', every)
  inner = optax.with_extra_args_support(inner)

  def draw(interval, n_layers):
    interval_key = jax.random.fold_in(seed(key), interval)
    chosen = jax.random.choice(interval_key, n_layers, (active,), replace=False)
    return jnp.sort(chosen)

  def init_fn(params):
    stacks = _stacks(params, stacked, active)
    layers = draw(0, stacks.n_layers)
    return SampleLayersState(
      count=jnp.zeros([], jnp.int32),
      layers=layers,
      inner=inner.init(stacks.gather(params, layers)),
      rest=inner.init(stacks.others(params)),
    )

  def update_fn(updates, state, params=None, **extra_args):
    stacks = _stacks(updates, stacked, active)
    due = state.count % every == 0
    layers = draw(state.count // every, stacks.n_layers)
    small = stacks.gather(updates, layers)
    small_params = None if params is None else stacks.gather(params, layers)
    # Only what `init` makes of it is used, which is seldom more than zeros.
    fresh = inner.init(small if params is None else small_params)
    old = jax.tree.map(
      lambda x, new: jnp.where(due, new.astype(x.dtype), x), state.inner, fresh
    )
    small, new = inner.update(small, old, small_params, **extra_args)
    others, rest = inner.update(
      stacks.others(updates),
      state.rest,
      None if params is None else stacks.others(params),
      **extra_args,
    )
    updates = stacks.merge(updates, small, others, layers)
    count = optax.safe_increment(state.count)
    return updates, SampleLayersState(count, layers, new, rest)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Stacks(NamedTuple):
  """Which leaves of a tree are stacks, and of how many layers."""

  flags: Any
  n_layers: int

  def gather(self, tree, layers):
    """The stacks at these layers; all else is hidden, as by optax.masked."""

    def one(stack, x):
      return jnp.take(x, layers, axis=0) if stack else optax.MaskedNode()

    return self._map(one, tree)

  def others(self, tree):
    """What is not stacked."""
    return self._map(lambda stack, x: optax.MaskedNode() if stack else x, tree)

  def merge(self, like, small, others, layers):
    """The inverse of the two, zero where there was no layer."""

    def one(stack, x, new, other):
      if not stack:
        return other
      return jnp.zeros(x.shape, new.dtype).at[layers].set(new)

    return self._map(one, like, small, others)

  def _map(self, f, *trees):
    return jax.tree.map(f, self.flags, *trees)


def _stacks(tree, stacked, active):
  """What is stacked, checked."""
  found, treedef = jax.tree.flatten_with_path(tree, is_leaf=_masked)
  if stacked is None:
    flags = [any(_key(k) == 'layers' for k in path) for path, _ in found]
  else:
    stacked = stacked(tree) if callable(stacked) else stacked
    try:
      flags = treedef.flatten_up_to(stacked)
    except (ValueError, TypeError) as error:
      raise ValueError(
        'stacked must be a tree of the same structure as the parameters, or a '
        f'function that makes it: {error}'
      ) from None
  flags = [
    not _masked(x) and (f[:1] == ('layers',) if isinstance(f, tuple) else f)
    for f, (_, x) in zip(flags, found, strict=True)
  ]
  n_layers = {
    path_name(path): x.shape[:1]
    for f, (path, x) in zip(flags, found, strict=True)
    if f
  }
  sizes = set(n_layers.values())
  if len(sizes) != 1 or () in sizes:
    raise ValueError(
      f'layers are drawn from stacks of equal length, found {n_layers}: say '
      'which leaves are stacked, stacked={...: True} or the logical names of '
      'their axes'
    )
  ((n,),) = sizes
  if active > n:
    raise ValueError(f'active={active} of {n} layers: give {n} at most')
  return _Stacks(treedef.unflatten(flags), n)


def _key(entry):
  return getattr(entry, 'key', getattr(entry, 'name', None))


def _masked(x):
  return isinstance(x, optax.MaskedNode)
