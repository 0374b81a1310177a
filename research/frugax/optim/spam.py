"""SPAM: Adam that clips spikes, forgets its moments and warms up again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import names
from frugax.optim.adam import scale_by_adam_hf, step_and_decay
from frugax.optim.axes import as_matrix, from_matrix, matrix_shape, resolve
from frugax.optim.leaves import Leaf, check_positive, seed
from frugax.optim.reset import reset_moments
from frugax.optim.spikes import clip_spikes

ALGORITHMS = ('released', 'paper')


def spam(
  learning_rate: optax.ScalarOrSchedule,
  threshold: jax.typing.ArrayLike = 5000.0,
  reset_interval: int = 500,
  warmup_steps: int = 150,
  density: float = 1.0,
  algorithm: str = 'released',
  guard: int = 20,
  clip_unseen: bool = True,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""Adam with spike clipping and a momentum reset every few hundred steps.

  .. math::
    g_i &\leftarrow \mathrm{sign}(g_i) \sqrt{\theta V_{t-1,i}}
      \quad\text{where}\quad g_i^2 > \theta V_{t-1,i} \\
    M_t &= b_1 M_{t-1} + (1-b_1) G_t, \qquad
    V_t = b_2 V_{t-1} + (1-b_2) G_t^2 \\
    W_t &= W_{t-1} - \eta \, s_j \,
      \frac{\sqrt{1-b_2^t}}{1-b_1^t} \, \frac{M_t}{\sqrt{V_t} + \epsilon} \\
    W_t &\leftarrow W_t - \eta \lambda W_t

  At steps reset_interval, 2 reset_interval, ... M and V are zero before the
  update; :math:`s_j`, j steps later, is the cosine from 0.01 to 1 of
  `reset_moments`. Nothing is clipped in the `guard` steps from there.

  'released' computes what the authors' code does: t, of the bias correction,
  goes on counting over a reset, so that the step after one is 3.16 times Adam's
  before :math:`s_j` makes it small. 'paper' is the algorithm as it is written:
  t starts anew with the moments, and epsilon is added to the corrected root.

  With `density` 1/n, M and V of a matrix are kept for one entry in n, drawn
  anew at every reset, and only these entries are updated: one of each n
  neighbours along the matrix's longer axis, uniformly. So exactly
  :math:`\lceil m/n \rceil` entries a column of length m are stored, no mask
  is, a matrix sharded along either axis is drawn from where it lies, and the
  same key draws the same entries on every host and in every layer of a stack.
  (The authors draw entries independently after the first time, and store the
  mask; their weight decay has no effect on a masked matrix, here it acts on all
  its entries.) Vectors are updated whole.

  Args:
    learning_rate: a number or a schedule.
    threshold: :math:`\theta`, the largest square over V.
    reset_interval: steps from one reset to the next.
    warmup_steps: steps from a reset to the full learning rate; the schedule
      itself is not reset.
    density: kept fraction of a matrix's entries, 1/n.
    algorithm: 'released' or 'paper'.
    guard: steps at the start and after a reset without clipping.
    clip_unseen: whether entries whose gradients were all 0 are clipped, which
      freezes them until the next reset, see `clip_spikes`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; for `density` only.
    state_dtype: dtype of the moments; None takes the parameters'.
    key: seed or PRNG key of the kept entries.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: a density that is not 1/n, an unknown algorithm, or as
      `clip_spikes` and `reset_moments`.

  Examples:
    >>> from frugax.optim import state_bytes
    >>> params = {'w': jnp.zeros((64, 256))}
    >>> sizes = state_bytes(spam(1e-3, density=0.25), params)
    >>> sizes['moments'] == 2 * 4 * 64 * 256 * 0.25
    True

  References:
    Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
    Training <https://arxiv.org/abs/2501.06842>`_, 2025
  """
  if algorithm not in ALGORITHMS:
    raise names.unknown('algorithm', algorithm, ALGORITHMS)
  if isinstance(density, jax.Array) or not 0 < density <= 1:
    raise ValueError(
      f'density={density}: give a Python number in (0, 1]; under '
      'optax.inject_hyperparams name it in static_args'
    )
  check_positive('reset_interval', reset_interval)
  released = algorithm == 'released'
  correction = 'step' if released else 'moments'
  adam = scale_by_adam_hf(b1, b2, eps, state_dtype, correction)
  tx = reset_moments(
    clip_spikes(threshold, adam, guard, reset_interval, clip_unseen),
    reset_interval,
    warmup_steps,
    counters=not released,
  )
  if density != 1:
    tx = _on_kept_entries(tx, density, reset_interval, axes, key)
  return optax.chain(tx, step_and_decay(learning_rate, weight_decay, mask))


class KeptEntriesState(NamedTuple):
  """Step counter and the inner state, of the kept entries' size."""

  count: jax.Array
  inner: Any


def _on_kept_entries(inner, density, reset_interval, axes, key):
  """Run `inner` on a random part of each matrix; the rest gets no update."""
  every = round(1 / density)
  if abs(every * density - 1) > 1e-3:
    raise ValueError(
      f'density={density}: one entry in every n is kept, so give 1/n, such as '
      f'1/{every} or 1/{every + 1}'
    )

  def kept(tree, count):
    """Arrays, the tree's structure, and for each array (small, back)."""
    base = jax.random.fold_in(seed(key), count // reset_interval)
    found, treedef = jax.tree.flatten_with_path(tree)
    pairs = [
      _entries(
        x.shape,
        spec,
        every,
        jax.random.fold_in(base, Leaf(path, x.shape, spec).hash()),
      )
      for (path, x), spec in zip(found, resolve(tree, axes), strict=True)
    ]
    return [x for _, x in found], treedef, pairs

  def shrunk(arrays, treedef, pairs):
    return treedef.unflatten(
      small(x) for x, (small, _) in zip(arrays, pairs, strict=True)
    )

  def init_fn(params):
    count = jnp.zeros([], jnp.int32)
    return KeptEntriesState(count, inner.init(shrunk(*kept(params, count))))

  def update_fn(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    arrays, treedef, pairs = kept(updates, count)
    updates, inner_state = inner.update(
      shrunk(arrays, treedef, pairs), state.inner
    )
    updates = [
      back(u)
      for u, (_, back) in zip(
        treedef.flatten_up_to(updates), pairs, strict=True
      )
    ]
    return treedef.unflatten(updates), KeptEntriesState(count, inner_state)

  return optax.GradientTransformation(init_fn, update_fn)


def _entries(shape, spec, every, key):
  """The functions from an array to its kept entries and back."""
  if spec is None:
    return (lambda x: x), (lambda u: u)
  *batch, m, n = matrix_shape(shape, spec)
  wide = m < n

  def turned(x):
    """The longer axis second to last."""
    return jnp.swapaxes(x, -1, -2) if wide else x

  m, n = max(m, n), min(m, n)
  groups = -(-m // every)
  sizes = np.minimum(every, m - every * np.arange(groups))
  offsets = jax.random.randint(key, (groups, n), 0, sizes[:, None])
  # Compared instead of gathered: a gather would collect a sharded gradient.
  chosen = np.arange(every)[:, None] == offsets[:, None, :]

  def small(x):
    x = turned(as_matrix(x, spec))
    pad = [(0, 0)] * len(batch) + [(0, groups * every - m), (0, 0)]
    x = jnp.pad(x, pad).reshape(*batch, groups, every, n)
    return turned(jnp.sum(jnp.where(chosen, x, 0), axis=-2))

  def back(u):
    full = jnp.where(chosen, turned(u)[..., None, :], 0)
    full = full.reshape(*batch, groups * every, n)[..., :m, :]
    return from_matrix(turned(full), spec, shape)

  return small, back
