"""What rounding does to a run's linears, layer by layer, while it trains."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from frugax import lowbit
from frugax.lowbit import sensitivity
from frugax.models import llama, losses
from frugax.train import step

_HEAD = 'lm_head'


def probe(
  config, program: step.Program
) -> Callable[[Any, step.Batch], dict[str, float]]:
  """Builds (params, batch) -> rates of each linear that a recipe rounds.

  It computes the loss and its gradient anew, one layer after the other as the
  step does, keeping nothing but each layer's input, and reads the arrays as
  they enter the products.

  Args:
    config: the run's config; `log.quantization` is the number of steps between
      two calls, 0 for none.
    program: its program.

  Returns:
    The function. Its results are scalars to be logged, which are named
    'quantization/0/attn/q/activations/error' and so on: the layer, the linear,
    'weights' or 'gradients', and one of `sensitivity.RATES`. Layers that are
    exempt have none.

  Raises:
    ValueError: a negative number of steps, or nothing that is rounded.
  """
  every = config.log.quantization
  if every < 0:
    raise ValueError(f'log.quantization={every}: give steps, or 0 for none')
  model_config = program.model.config
  rounded = any(
    _rounds(lowbit.recipe(name))
    for name in (
      *(model_config.matmul, model_config.matmul_head),
      *(name for _, name in model_config.matmul_rules),
    )
  )
  if every and not rounded:
    raise ValueError(
      f'log.quantization={every}, but no linear is rounded: name a recipe in '
      'model.matmul, or set it to 0'
    )
  compiled = jax.jit(
    functools.partial(_rates, model_config, program),
    out_shardings=program.layout.replicated(),
  )
  first, _ = model_config.matmul_exempt

  def place(name, layer):
    return name if name.startswith(_HEAD) else f'{first + layer}/{name}'

  def run(params, batch):
    return {
      f'quantization/{place(name, layer)}/{rate}': float(value)
      for name, layers in jax.device_get(compiled(params, batch)).items()
      for layer, values in enumerate(layers)
      for rate, value in zip(sensitivity.RATES, values, strict=True)
    }

  return run


def _rounds(recipe):
  products = (recipe.forward, recipe.input_grad, recipe.weight_grad)
  return any(o.format for p in products for o in (p.left, p.right))


class _Tape:
  """What the products of one layer leave behind while it is traced."""

  def __init__(self, config):
    self._config = config
    self.rates = {}
    self.probes = {}

  def recipe_of(self, path):
    name = self._config.matmul_head
    return lowbit.recipe(
      name if path == _HEAD else self._config.recipe_of(path)
    )

  def wrap(self, path, dot):
    recipe = self.recipe_of(path)
    if not _rounds(recipe):
      return dot

    def tapped(x, w, dimension_numbers, *args, **kwargs):
      y = dot(x, w, dimension_numbers, *args, **kwargs)
      fixed = lax.stop_gradient((x, w))
      found = sensitivity.forward_rates(recipe, *fixed, dimension_numbers)
      self.rates |= {f'{path}/{k}': v for k, v in found.items()}
      (contracted, _), (batch, _) = dimension_numbers
      rows = x.ndim - len(contracted) - len(batch)
      if f'{path}/gradients' not in self.probes:
        return y
      return _tap(recipe, len(batch), rows, y, self.probes[f'{path}/gradients'])

    return tapped


# The gradient with respect to a probe is what we ask about the gradient of y.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tap(recipe, batch, rows, y, probe):
  del recipe, batch, rows, probe
  return y


def _tap_forward(recipe, batch, rows, y, probe):
  del recipe, batch, rows, probe
  return y, None


def _tap_backward(recipe, batch, rows, _, g):
  return g, sensitivity.gradient_rates(recipe, g, batch, rows)


_tap.defvjp(_tap_forward, _tap_backward)


def _rates(config, program, params, batch):
  """float32 (layers that are not exempt, rates) of each operand."""
  tape = _Tape(config)
  model = llama.Llama(
    config, wrap=tape.wrap, constrain=program.layout.constrain
  )
  first, last = config.matmul_exempt
  stop = max(config.n_layers - last, first)
  ends = (0, first, stop, config.n_layers)
  has_gradients = [
    path
    for path in _PATHS
    if any(
      p.left.format
      for p in (
        tape.recipe_of(path).input_grad,
        tape.recipe_of(path).weight_grad,
      )
    )
  ]

  def zeros(*shape):
    shape = (*shape, len(sensitivity.RATES))
    return {f'{path}/gradients': jnp.zeros(shape) for path in has_gradients}

  def take():
    rates, tape.rates = tape.rates, {}
    return rates

  def loss(probes):
    def walk(x, start, stop, probes):
      @jax.checkpoint
      def layer(x, item):
        layer_params, tape.probes = item
        x = model.block(
          layer_params,
          x,
          segment_ids=batch['segment_ids'],
          positions=batch['positions'],
          index=start,
        )
        return x, take()

      layers = jax.tree.map(lambda p: p[start:stop], params['layers'])
      return lax.scan(layer, x, (layers, probes))

    x, rates = model.embed(params, batch['tokens']), {}
    for start, stop in itertools.pairwise(ends):
      if stop > start:
        inner = start == ends[1] and stop == ends[2]
        x, found = walk(x, start, stop, probes[0] if inner else {})
        rates |= found
    tape.probes = probes[1]
    logits = model.head(params, x)
    rates |= {name: v[None] for name, v in take().items()}
    nll, _, counts = losses.token_losses(logits, batch['labels'])
    return jnp.sum(nll) / jnp.maximum(jnp.sum(counts), 1), rates

  inner, head = zeros(stop - first), zeros()
  grads, rates = jax.grad(loss, has_aux=True)((inner, head))
  if stop > first:
    rates |= {k: v for k, v in grads[0].items() if not k.startswith(_HEAD)}
  return rates | {k: v[None] for k, v in grads[1].items() if _HEAD in k}


_PATHS = (
  *(f'attn/{name}' for name in 'qkvo'),
  *(f'mlp/{name}' for name in ('gate', 'up', 'down')),
  _HEAD,
)
