"""The training step: loss, gradient, clipping, update. And the evaluation.

`build` at the end makes the compiled program of a run from its config.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import lowbit, names, optim
from frugax.models import llama, losses
from frugax.train import memory as fx_memory
from frugax.train import mesh as fx_mesh
from frugax.train import optimizer as fx_optimizer

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
  """All that a step changes, and all that a checkpoint must hold of it."""

  step: jax.Array  # completed steps
  params: Any
  opt_state: Any
  key: jax.Array  # source of randomness of every step, folded with `step`
  skipped: jax.Array  # steps left out because they were not finite


def init_state(model, tx, key: jax.Array) -> TrainState:
  """A fresh state; jit it with `out_shardings` to have it born sharded."""
  init_key, key = jax.random.split(key)
  params = model.init(init_key)
  zero = jnp.zeros([], jnp.int32)
  opt_state = tx.init(lowbit.load_weights(params))
  return TrainState(zero, params, opt_state, key, zero)


def _norm(tree):
  """Global norm in float32; a sum of bfloat16 squares would be percents off."""
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))


def make_train_step(
  model,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule | None = None,
  *,
  accumulation: int = 1,
  clip_norm: float = 0.0,
  z_loss: float = 0.0,
  skip_nonfinite: bool = False,
  rounding: str = 'nearest',
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Builds the function (state, batch) -> (state, metrics); jit it, donate.

  The gradient is that of sum(loss) / sum(tokens) over the whole batch, however
  many micro-batches it is summed over, and however many pad tokens each has.

  Args:
    model: as in `losses.of_batch`. Parameters that are stored in few bits stay
      so: the optimizer sees arrays.
    tx: any optax transformation; it is offered `value` (the loss) and `key`.
    schedule: step -> learning rate, for the metrics only.
    accumulation: number of micro-batches; divides the batch.
    clip_norm: largest global norm of the gradient; 0 leaves it alone.
    z_loss: weight of mean(logsumexp(logits)^2), which keeps logits small.
    skip_nonfinite: leave parameters and optimizer state as they were when the
      loss, the gradient or the update is not finite, and count it.
    rounding: of bfloat16 parameters, see `optim.apply_updates`.

  Returns:
    The step. Its metrics are scalars: loss (nats per token, without the
    z-loss), tokens, learning_rate, grad_norm (before clipping), update_norm,
    param_norm, skipped, and those that `optim.counts` finds.

  Raises:
    ValueError: accumulation does not divide the batch (when traced).

  References:
    z-loss: Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311, 2022.
  """
  tx = optax.with_extra_args_support(tx)

  def loss_fn(values, stored, batch, n_tokens, key):
    params = lowbit.attach(stored, values)
    nll, lse, _ = losses.of_batch(model, params, batch, key)
    loss = jnp.sum(nll) / n_tokens
    return loss + z_loss * jnp.sum(jnp.square(lse)) / n_tokens, loss

  grad_fn = jax.grad(loss_fn, has_aux=True)

  def gradient(params, stored, batch, n_tokens, key):
    if accumulation == 1:
      return grad_fn(params, stored, batch, n_tokens, key)

    def body(total, part):
      micro, key = part
      grads, loss = grad_fn(params, stored, micro, n_tokens, key)
      return jax.tree.map(jnp.add, total, (grads, loss)), None

    # Sums in float32 even for bfloat16 parameters.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    (grads, loss), _ = jax.lax.scan(
      body,
      (zeros, jnp.zeros([])),
      (
        fx_mesh.micro_batches(batch, accumulation),
        jax.random.split(key, accumulation),
      ),
    )
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), loss

  def train_step(state: TrainState, batch: Batch):
    tokens = jnp.sum(batch['labels'] >= 0)
    n_tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    values = lowbit.load_weights(state.params)
    key = jax.random.fold_in(state.key, state.step)
    own = jax.random.fold_in(key, 2**32 - 1)  # not one that the optimizer has
    grads, loss = gradient(values, state.params, batch, n_tokens, own)
    grad_norm = _norm(grads)
    if clip_norm:
      factor = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-30))
      grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
    old = fx_memory.fetch(state.opt_state)
    updates, opt_state = tx.update(grads, old, values, value=loss, key=key)
    params = optim.apply_updates(state.params, updates, key, rounding)
    update_norm = _norm(updates)
    skipped = state.skipped
    if skip_nonfinite:
      finite = jnp.isfinite(loss + grad_norm + update_norm)
      params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, old),
      )
      skipped = skipped + jnp.where(finite, 0, 1)
    metrics = {
      'loss': loss,
      'tokens': tokens,
      'grad_norm': grad_norm,
      'update_norm': update_norm,
      'param_norm': _norm(lowbit.load_weights(params)),
      'skipped': skipped,
      **optim.counts(opt_state),
    }
    if schedule is not None:
      # The optimizer does not count the steps that were left out.
      metrics['learning_rate'] = schedule(state.step - state.skipped)
    opt_state = fx_memory.put_like(opt_state, state.opt_state)
    state = TrainState(state.step + 1, params, opt_state, state.key, skipped)
    return state, metrics

  return train_step


def make_eval_step(
  model, bytes_per_id: np.ndarray
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  """Builds (params, batch) -> float32 sums of loss, tokens and text bytes.

  Args:
    model: as in `make_train_step`.
    bytes_per_id: UTF-8 bytes that each token id stands for, shape (V,).

  Returns:
    The function. Sums, not means, so that batches with few real tokens do not
    weigh as much as full ones.
  """

  def eval_step(params, batch):
    labels = batch['labels']
    nll, _, counts = losses.of_batch(model, params, batch)
    n_bytes = jnp.take(
      jnp.asarray(bytes_per_id), jnp.maximum(labels, 0), axis=0
    )
    return {
      'loss': jnp.sum(nll),
      'tokens': jnp.sum(counts),
      'bytes': jnp.sum(jnp.where(counts, n_bytes, 0)),
    }

  return eval_step


@dataclasses.dataclass(frozen=True)
class Program:
  """What a config compiles to on a mesh, before any data or state exists.

  Attributes:
    layout: the mesh and its rules.
    model: the model.
    tx: the optimizer.
    shapes: the parameters' ShapeDtypeStructs, as the optimizer sees them.
    shardings: a `TrainState` of shardings.
    init: key -> TrainState, jitted.
    train_step: (state, batch) -> (state, metrics), jitted; donates the state.
  """

  layout: fx_mesh.Layout
  model: llama.Llama
  tx: optax.GradientTransformation
  shapes: Any
  shardings: TrainState
  init: Callable[[jax.Array], TrainState]
  train_step: Callable[[TrainState, Batch], tuple[TrainState, Any]]

  def abstract_state(self) -> TrainState:
    """ShapeDtypeStructs of the state, with shardings."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(self.init, jax.random.PRNGKey(0)),
      self.shardings,
    )

  def put(self, batch) -> Batch:
    """This process's rows of a batch as global, sharded arrays."""

    parts = self.layout.parts()
    _, count = self.layout.share()

    def place(x):
      shape = (x.shape[0] * count, *x.shape[1:])
      size = x.shape[0] // len(parts)

      def part(slices):
        rows, columns = slices
        start, stop, _ = rows.indices(shape[0])
        first = parts.index(start // size) * size
        return x[first : first + stop - start, columns]

      sharding = self.layout.sharding(('batch', 'sequence'), shape)
      return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


STEPS = ('ordinary', 'layerwise')
# It runs once: a third of the time to compile, and the same numbers.
_INIT = {'cpu': {'xla_backend_optimization_level': 1}}
_OPTIONS = (
  *('accumulation', 'clip_norm', 'z_loss', 'skip_nonfinite', 'rounding'),
)


def build(config, devices: Sequence[jax.Device] | None = None) -> Program:
  """Makes the program of a run. Nothing is compiled or allocated yet.

  Args:
    config: the run's config; data, eval, checkpoint and log are not used.
    devices: the devices of the mesh, described ones included; default all.

  Returns:
    The program.

  Raises:
    ValueError: a config that cannot run.
  """
  layout = fx_mesh.make_layout(config.mesh, devices)
  if config.step not in STEPS:
    raise names.unknown('step', config.step, STEPS)
  for name in ('steps', 'batch_size', 'accumulation'):
    if config[name] < 1:
      raise ValueError(f'{name} must be 1 or more, got {config[name]}')
  for name in ('clip_norm', 'z_loss', 'filter_eps'):
    if config[name] < 0:
      raise ValueError(f'{name} must be 0 (off) or more, got {config[name]}')
  if config.batch_size % config.accumulation:
    raise ValueError(
      f'accumulation {config.accumulation} does not divide batch_size'
      f' {config.batch_size}'
    )
  for name, kind in (
    ('opt_state', config.opt_state),
    ('layerwise.inputs', config.layerwise.inputs),
  ):
    fx_memory.check(name, kind, layout.mesh.devices.flat)
  layout.share()  # raises where processes cannot share out a batch
  layout.check_batch(
    config.batch_size // config.accumulation,
    config.data.sequence_length,
    'a micro-batch (batch_size / accumulation)',
  )
  fields = config.model.to_dict()
  if config.filter_eps and fields.get('matmul_head', 'none') != 'none':
    raise ValueError(
      f'filter_eps with model.matmul_head={fields["matmul_head"]!r}: a head '
      'with a recipe has logits; give filter_eps=0'
    )
  model = llama.Llama(
    llama.config(fields.pop('size'), **fields),
    constrain=layout.constrain,
    layout=layout,
    cross_entropy=functools.partial(
      layout.cross_entropy, filter_eps=(config.filter_eps or None, None)
    ),
  )
  stored = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  shapes = jax.eval_shape(lowbit.load_weights, stored)
  tx, schedule = fx_optimizer.make_optimizer(config, shapes, model.axes())
  params = layout.tree(model.axes(), shapes)
  opt_state = fx_memory.Memory(config.opt_state).shardings(
    optim.state_shardings(tx, shapes, params), jax.eval_shape(tx.init, shapes)
  )
  whole = layout.replicated()
  shardings = TrainState(
    step=whole,
    params=optim.state_shardings(stored, shapes, params),
    opt_state=opt_state,
    key=whole,
    skipped=whole,
  )
  options = {name: config[name] for name in _OPTIONS}
  if config.step == 'layerwise':
    from frugax.train import layerwise  # imports this file

    train_step = layerwise.make(
      config, model, tx, shapes, params, schedule, **options
    )
  else:
    train_step = make_train_step(model, tx, schedule, **options)
  return Program(
    layout=layout,
    model=model,
    tx=tx,
    shapes=shapes,
    shardings=shardings,
    init=jax.jit(
      lambda key: init_state(model, tx, key),
      out_shardings=shardings,
      compiler_options=_INIT.get(layout.mesh.devices.flat[0].platform),
    ),
    train_step=jax.jit(
      train_step, donate_argnums=0, out_shardings=(shardings, whole)
    ),
  )
