"""The layer-wise step: each layer is updated inside of the backward pass.

The forward pass keeps the input of every layer. The backward pass walks the
stack in reverse: it computes the gradient of one layer, updates that layer's
weights and state in place and drops the gradient, so that no more than one
layer's gradient is ever there. The walk is `frugax.train.walk`, the optimizer
is taken apart by `frugax.optim.separate`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax import lowbit, names, optim
from frugax.optim.separate import NotSeparable, Separate
from frugax.train import memory as fx_memory
from frugax.train import mesh as fx_mesh
from frugax.train import step as fx_step
from frugax.train.walk import Walk

CLIPS = ('global', 'layer')
# Policies of `LlamaConfig.remat` that it can run with. To it 'none' is 'full':
# each layer is computed again from its input.
REMAT = ('none', 'inputs', 'full')


class Sums(NamedTuple):
  """Sums of squares over what was updated so far."""

  grads: jax.typing.ArrayLike = 0.0
  updates: jax.typing.ArrayLike = 0.0
  params: jax.typing.ArrayLike = 0.0


class _Progress(NamedTuple):
  """What all parts of an update add to.

  Attributes:
    sums: for the metrics.
    counts: what parts added to counts that they share, by index.
  """

  sums: Sums
  counts: dict[int, jax.Array]


def _squares(tree):
  leaves = jax.tree.leaves(tree)
  return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)


def _stack_squares(params, layers):
  """The sum of squares of the first layers, one dequantised at a time."""

  def add(i, total):
    layer = jax.tree.map(lambda x: x[i], params['layers'])
    return total + _squares(lowbit.load_weights(layer))

  return jax.lax.fori_loop(0, layers, add, jnp.zeros([], jnp.float32))


def make_layerwise_step(
  model,
  tx: optax.GradientTransformation,
  shapes: Any,
  schedule: optax.Schedule | None = None,
  *,
  accumulation: int = 1,
  clip: str = 'global',
  clip_norm: float = 0.0,
  z_loss: float = 0.0,
  skip_nonfinite: bool = False,
  rounding: str = 'nearest',
  constrain: Callable[[Any], Any] = lambda grads: grads,
  inputs: str = 'device',
) -> Callable[..., tuple[fx_step.TrainState, dict[str, jax.Array]]]:
  """Builds the function (state, batch) -> (state, metrics); jit it, donate.

  State, metrics and results are those of `frugax.train.step.make_train_step`,
  but for the order of sums, so a run may change its step between two resumes.
  Counters and keys of the optimizer tick once a step. The embedding, and the
  head with the final norm, are parts of their own.

  Micro-batches: all of them go forward, and each layer's gradient is summed
  over them before it is used. So the sum is exact, whatever the optimizer makes
  of it, and costs one layer's gradient; what is kept of each micro-batch are
  the inputs of its layers. The host's memory can keep them: each is written
  once and read once (with two backward passes, twice), one layer of one
  micro-batch at a time.

  The optimizer's state stays in the memory where it is given. Of a stack in the
  host's memory, one layer is on the device at a time; stacks with one axis
  beside that of the layers, such as the codes of a state in few bits, are there
  whole while the layers are walked: the TPU's compiler slices none of those
  ("Sublane slicing size not multiple of chunk sublane size").

  Args:
    model: has `embed`, `block`, `head`, `segments` and `config`, as
      `frugax.models.llama.Llama`.
    tx: any optax transformation that `frugax.optim.separate` can take apart.
    shapes: the parameters' shapes, as the optimizer sees them.
    schedule: step -> learning rate, for the metrics only.
    accumulation: number of micro-batches; divides the batch.
    clip: 'global', to the norm of the whole gradient, as the ordinary step. It
      is known when the first layer's gradient is, so the backward pass is made
      twice, the first time for norms alone. 'layer' takes one pass: each layer,
      the embedding, and the head are clipped to `clip_norm` each on its own.
    clip_norm: largest norm; 0 leaves the gradient alone.
    z_loss: weight of mean(logsumexp(logits)^2).
    skip_nonfinite: leave out steps whose loss or gradient is not finite, which
      takes two passes, too; an update that is not finite is not found out.
    rounding: of bfloat16 parameters, see `optim.apply_updates`.
    constrain: gives gradients, any part of the parameters' tree, a sharding.
    inputs: the kind of memory that keeps the inputs of layers, see `Memory`;
      'pinned_host' makes what the device holds independent of accumulation.

  Returns:
    The step.

  Raises:
    ValueError: an unknown clip, a transformation that cannot be taken apart,
      skip_nonfinite with clip='layer'.

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with
    Limited Resources <https://arxiv.org/abs/2306.09782>`_, 2023 (LOMO: updates
    in the backward pass, norms by a pass of their own)
  """
  if clip not in CLIPS:
    raise names.unknown('clip', clip, CLIPS)
  if skip_nonfinite and clip == 'layer':
    raise ValueError(
      "skip_nonfinite with clip='layer' would find out too late, when layers "
      "have been updated: use clip='global'"
    )
  head = tuple(key for key in shapes if key not in ('layers', 'embed'))
  parts = {'head': head, 'layers': ('layers',), 'embed': ('embed',)}
  separate = Separate(tx, shapes, parts)
  twice = skip_nonfinite or (clip == 'global' and clip_norm > 0)

  def train_step(state: fx_step.TrainState, batch: fx_step.Batch):
    tokens = jnp.sum(batch['labels'] >= 0)
    n_tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    micros = fx_mesh.micro_batches(batch, accumulation)
    key = jax.random.fold_in(state.key, state.step)
    keys = jax.random.fold_in(key, 2**32 - 1)[None]  # as in the ordinary step
    if accumulation > 1:
      keys = jax.random.split(keys[0], accumulation)
    memory = fx_memory.Memory(inputs)
    walk = Walk(
      *(model, state.params, micros, keys, n_tokens, z_loss, constrain, memory)
    )
    layers, enabled, factor = state.params['layers'], True, 1.0
    grads, dx, loss = walk.head(walk.inputs)

    if twice:
      squares = _squares({k: grads[k] for k in head})
      dx, _, squares = walk.layers(
        dx,
        layers,
        squares,
        lambda at, layer, grads, values, sum: (None, sum + _squares(grads)),
      )
      squares += _squares(walk.embed(dx, grads.get('embed')))
      grad_norm = jnp.sqrt(squares)
      if clip_norm:
        factor = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-30))
      if skip_nonfinite:
        enabled = jnp.isfinite(loss + grad_norm)
      # The head's gradient is made again: it is not kept during the first pass.
      later, _ = jax.lax.optimization_barrier((walk.inputs, squares))
      grads, dx, _ = walk.head(later)

    kept = separate.flatten(state.opt_state)
    old = dict(enumerate(fx_memory.fetch(kept)))
    new = dict(old)

    def update(part, stored, values, grads, leaves, progress, layer=None):
      """New parameters, new state and progress of a part, or of a layer."""
      squares = _squares(grads)
      scale = factor
      if clip_norm and not twice:
        norm = jnp.maximum(jnp.sqrt(squares), 1e-30)
        scale = jnp.minimum(1.0, clip_norm / norm)
      if clip_norm:
        grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
      updates, leaves = separate.update(
        part, grads, leaves, values, value=loss, key=key
      )
      params = optim.apply_updates(stored, updates, key, rounding, layer)
      sums = Sums(
        squares, _squares(updates), _squares(lowbit.load_weights(params))
      )
      counts = {
        i: count + leaves.pop(i) if i in leaves else count
        for i, count in progress.counts.items()
      }
      sums = Sums(*(a + b for a, b in zip(progress.sums, sums, strict=True)))
      return params, leaves, _Progress(sums, counts)

    def outer(part, grads, progress):
      """Updates a part other than the layers, unless disabled."""
      keys = parts[part]
      stored = {k: state.params[k] for k in keys}
      leaves = {i: old[i] for i in separate.indices[part]}

      def run(grads, progress):
        values = lowbit.load_weights(stored)
        return update(part, stored, values, grads, leaves, progress)

      def rest(grads, progress):
        kept = {i: x for i, x in leaves.items() if i not in progress.counts}
        sums = progress.sums
        more = sums.params + _squares(lowbit.load_weights(stored))
        return stored, kept, progress._replace(sums=sums._replace(params=more))

      grads = {k: grads[k] for k in keys}
      if enabled is True:
        return run(grads, progress)
      return jax.lax.cond(enabled, run, rest, grads, progress)

    zero = jnp.zeros([], jnp.float32)
    progress = _Progress(
      Sums(zero, zero, zero),
      {i: jnp.zeros_like(old[i]) for i in separate.counted},
    )
    params, leaves, progress = outer('head', grads, progress)
    new |= leaves

    own = {i for i in separate.indices['layers'] if i not in separate.shared}
    shared = {i: old[i] for i in separate.indices['layers'] if i not in own}
    before = {i: old[i] for i in own if i not in separate.axes}

    def visit(at, layer, grads, values, carry):
      stacks, _, progress = carry
      here = fx_memory.fetch(separate.layer(stacks, at))
      here = jax.lax.optimization_barrier(here)
      layer, leaves, progress = update(
        'layers',
        {'layers': layer},
        {'layers': values},
        {'layers': grads},
        here | before | shared,
        progress,
        (at, model.config.n_layers),
      )
      layer, leaves = jax.lax.optimization_barrier((layer, leaves))
      here = fx_memory.put_like({i: leaves[i] for i in stacks}, stacks)
      stacks = separate.put(stacks, here, at)
      common = {i: leaves[i] for i in before}
      return layer['layers'], (stacks, common, progress)

    # Fetched layer by layer, where a layer has two axes or more.
    stacks = {
      i: kept[i] if axis == 0 and kept[i].ndim > 2 else old[i]
      for i, (axis, _) in separate.axes.items()
    }
    dx, params['layers'], (stacks, common, progress) = walk.layers(
      dx, layers, (stacks, before, progress), visit, enabled
    )
    new |= stacks | common
    grads = walk.embed(dx, grads.get('embed'))
    found, leaves, progress = outer('embed', grads, progress)
    params |= found
    new |= leaves
    for i, count in progress.counts.items():
      new[i] = separate.add(old[i], count)

    opt_state = separate.unflatten(
      fx_memory.put_like([new[i] for i in range(len(new))], kept)
    )
    sums, skipped = progress.sums, state.skipped
    if skip_nonfinite:
      skipped = skipped + jnp.where(enabled, 0, 1)
      rest = jnp.where(enabled, 0, model.config.n_layers)
      sums = sums._replace(params=_stack_squares(params, rest) + sums.params)
    metrics = {
      'loss': loss,
      'tokens': tokens,
      'grad_norm': grad_norm if twice else jnp.sqrt(sums.grads),
      'update_norm': jnp.sqrt(sums.updates),
      'param_norm': jnp.sqrt(sums.params),
      'skipped': skipped,
      **optim.counts(opt_state),
    }
    if schedule is not None:
      metrics['learning_rate'] = schedule(state.step - state.skipped)
    done = {k: params[k] for k in state.params}
    return fx_step.TrainState(
      state.step + 1, done, opt_state, state.key, skipped
    ), metrics

  return train_step


def make(config, model, tx, shapes, shardings, schedule, **options):
  """The step of a run's config, see `make_layerwise_step`.

  Args:
    config: the run's config.
    model: the model.
    tx: the optimizer.
    shapes: the parameters' shapes.
    shardings: theirs.
    schedule: the learning rate.
    **options: those of every step.

  Raises:
    ValueError: as there, or a remat policy that would change nothing.
  """
  if model.config.remat not in REMAT:
    raise ValueError(
      f'model.remat={model.config.remat!r} changes nothing with step=layerwise,'
      ' which computes each layer again from its input: use full (none is the'
      ' same) or inputs; layerwise.inputs=pinned_host moves what is kept to the'
      ' host'
    )

  def constrain(grads):
    own = {key: shardings[key] for key in grads}
    return jax.lax.with_sharding_constraint(grads, own)

  try:
    return make_layerwise_step(
      model,
      tx,
      shapes,
      schedule,
      constrain=constrain,
      **config.layerwise.to_dict(),
      **options,
    )
  except NotSeparable as e:
    raise ValueError(
      f'step=layerwise cannot run optimizer {config.optimizer.name}, which '
      f'needs all layers at once: {e}. Use step=ordinary, or another optimizer'
    ) from e
