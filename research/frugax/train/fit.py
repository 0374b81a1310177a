"""Training by hand: a model, an optimizer of one's own, and batches."""

from collections.abc import Iterable, Iterator

import jax
import optax

from frugax.train.step import (
  Batch,
  TrainState,
  init_state,
  make_train_step,
)


def fit(
  model,
  tx: optax.GradientTransformation,
  batches: Iterable[Batch],
  *,
  seed: int = 0,
  **options,
) -> Iterator[tuple[TrainState, dict[str, jax.Array]]]:
  """Trains a model with any optax transformation, a step at a time.

  For scripts and notebooks. The step is that of a run, on one device and
  without a mesh, checkpoints or metric files, for which there is `loop.train`.
  States are not donated: any of them may be kept, and two are held at a time.

  Args:
    model: a Llama, or what has its `init` and the loss of
      `frugax.models.losses`.
    tx: the optimizer, its learning rate included.
    batches: dicts of arrays (rows, length), as `data.train_batches` gives.
    seed: of the parameters and of what the optimizer draws.
    **options: of `step.make_train_step`, such as clip_norm.

  Yields:
    After each step the state and the step's metrics, which are on the device:
    looking at them waits for the step.

  Examples:
    >>> import numpy as np
    >>> from frugax.models import llama
    >>> size = dict(dim=16, ffn=24, n_layers=1, vocab_size=8)
    >>> model = llama.Llama(llama.config('tiny', **size))
    >>> ids = np.arange(8).reshape(1, 8)
    >>> batch = {'tokens': ids, 'labels': np.roll(ids, -1),
    ...          'segment_ids': np.ones_like(ids), 'positions': ids}
    >>> steps = fit(model, optax.adam(1e-2), [batch] * 20)
    >>> losses = [float(metrics['loss']) for _, metrics in steps]
    >>> losses[-1] < losses[0]
    True
  """
  take_step = jax.jit(make_train_step(model, tx, **options))
  state = jax.jit(lambda key: init_state(model, tx, key))(
    jax.random.PRNGKey(seed)
  )
  for batch in batches:
    state, metrics = take_step(state, batch)
    yield state, metrics
