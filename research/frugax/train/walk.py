"""One layer's gradient at a time: a pass forward, and passes back over it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from frugax import lowbit
from frugax.models import llama

# (index, layer, gradient, values, carry) -> (new layer or None, carry)
Visit = Callable[..., tuple[Any, Any]]


def first(tree: Any) -> Any:
  """Stacks of height 1 as what they hold."""
  return jax.tree.map(lambda x: x[0], tree)


class Walk:
  """The gradient of a step's loss, piece by piece, from the last layer on.

  Micro-batches all go forward first, and a piece of the gradient is summed over
  them before the next one is computed.

  Args:
    model: as `frugax.train.layerwise.make_layerwise_step`.
    params: the parameters. Of 'layers' only the forward pass takes these.
    micros: the batch, its arrays (micro-batches, rows, ...).
    keys: one for each micro-batch, for what low-bit recipes round at random.
    n_tokens: what the sum of the losses is divided by.
    z_loss: see `frugax.train.step.make_train_step`.
    constrain: gives gradients a sharding.

  Attributes:
    inputs: of each layer, (micro-batches, layers, rows, length, dim).
    last: the output of the last layer, (micro-batches, rows, length, dim).
  """

  def __init__(self, model, params, micros, keys, n_tokens, z_loss, constrain):
    self._model, self._constrain = model, constrain
    layer_keys, head_keys = self._each(
      lambda key: llama.rounding_keys(model.config, key), keys
    )
    self._micros = micros | {'layer_keys': layer_keys, 'head_key': head_keys}
    self._n_tokens, self._z_loss = n_tokens, z_loss
    self._outer = {k: v for k, v in params.items() if k != 'layers'}
    self.inputs, self.last = self._forward(params['layers'])

  def _forward(self, layers):
    def one(micro):
      x, inputs = self._model.embed(self._outer, micro['tokens']), []
      for start, stop, index in self._model.segments():
        part = jax.tree.map(lambda p: p[start:stop], layers)  # noqa: B023

        def layer(x, inputs, index=index):
          return self._block(inputs[0], x, micro, index, inputs[1]), x

        keys = micro['layer_keys'][start:stop]
        x, xs = jax.lax.scan(layer, x, (part, keys))
        inputs.append(xs)
      return jnp.concatenate(inputs) if len(inputs) > 1 else inputs[0], x

    return self._each(one, self._micros)

  def _block(self, layer, x, micro, index, key):
    return self._model.block(
      layer,
      x,
      segment_ids=micro['segment_ids'],
      positions=micro['positions'],
      index=index,
      key=key,
    )

  def _each(self, function, *args):
    """What a function makes of each micro-batch, stacked."""
    if jax.tree.leaves(args)[0].shape[0] == 1:
      return jax.tree.map(lambda x: x[None], function(*first(args)))
    return jax.lax.map(lambda args: function(*args), args)

  def _total(self, function, like, *args):
    """The sum of its first results; its second ones, stacked."""
    if jax.tree.leaves(args)[0].shape[0] == 1:
      grads, rest = function(*first(args))
      return grads, jax.tree.map(lambda x: x[None], rest)

    def body(total, args):
      grads, rest = function(*args)
      return jax.tree.map(jnp.add, total, grads), rest

    # Sums in float32 even for bfloat16 parameters.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), like)
    grads, rest = jax.lax.scan(body, zeros, args)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, like), rest

  def head(
    self, last: jax.Array
  ) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Gradients of what the head uses and of the last output, and the loss.

    Args:
      last: `self.last`, or a copy that is there later.
    """
    used = {k: v for k, v in self._outer.items() if k != 'embed'}
    if self._model.config.tie_embeddings:
      used = self._outer

    def loss_fn(used, x, micro):
      labels, key = micro['labels'], micro['head_key']
      nll, lse = self._model.head_losses(used, x, labels, key)
      loss = jnp.sum(nll) / self._n_tokens
      squares = jnp.sum(jnp.square(lse)) / self._n_tokens
      return loss + self._z_loss * squares, loss

    def one(x, micro):
      grad_fn = jax.grad(loss_fn, (0, 1), has_aux=True)
      (grads, dx), loss = grad_fn(used, x, micro)
      return grads, (dx, loss)

    grads, (dx, losses) = self._total(one, used, last, self._micros)
    return self._constrain(grads), dx, jnp.sum(losses)

  def layers(
    self,
    dx: jax.Array,
    layers: Any,
    carry: Any,
    visit: Visit,
    enabled: jax.Array | bool = True,
  ) -> tuple[jax.Array, Any, Any]:
    """Walks the layers from the last to the first one, in place.

    Args:
      dx: gradient of the last output.
      layers: the parameters of the layers.
      carry: what `visit` carries from one to the next.
      visit: called with a layer's index, the layer as a stack of height 1, its
        gradient, the arrays that that is of, and the carry. Returns what takes
        the layer's place, or None, and the carry.
      enabled: False goes nowhere.

    Returns:
      The gradient of the first layer's inputs, the layers and the carry.
    """
    for start, stop, index in reversed(self._model.segments()):

      def body(k, state, stop=stop, index=index):
        dx, layers, carry = state
        at = stop - 1 - k
        layer = jax.tree.map(
          lambda p: jax.lax.dynamic_slice_in_dim(p, at, 1), layers
        )
        # Read before it is written, or the whole stack would be copied.
        layer = jax.lax.optimization_barrier(layer)
        values = lowbit.load_weights(layer)
        grads, dx = self._layer(at, layer, values, dx, index)
        new, carry = visit(at, layer, grads, values, carry)
        if new is not None:
          layers = jax.tree.map(
            lambda p, q: jax.lax.dynamic_update_slice_in_dim(p, q, at, 0),
            layers,
            new,
          )
        return dx, layers, carry

      count = jnp.where(enabled, stop - start, 0)
      if enabled is True:
        count = stop - start
      dx, layers, carry = jax.lax.fori_loop(0, count, body, (dx, layers, carry))
    return dx, layers, carry

  def _layer(self, at, layer, values, dx, index):
    def one(x, dx, micro):
      def run(values, x):
        attached = first(lowbit.attach(layer, values))
        return self._block(attached, x, micro, index, micro['layer_keys'][at])

      return jax.vjp(run, values, x)[1](dx)

    x = jax.lax.dynamic_index_in_dim(self.inputs, at, 1, keepdims=False)
    grads, dx = self._total(one, values, x, dx, self._micros)
    return self._constrain({'layers': grads})['layers'], dx

  def embed(self, dx: jax.Array, tied: Any = None) -> dict[str, Any]:
    """The gradient of the embedding.

    Args:
      dx: that of the first layer's inputs.
      tied: what the head adds to it.
    """
    table = {'embed': self._outer['embed']}

    def one(dx, micro):
      def run(table):
        return self._model.embed(table, micro['tokens'])

      return jax.vjp(run, table)[1](dx)[0], ()

    grads, _ = self._total(one, table, dx, self._micros)
    if tied is not None:
      grads = jax.tree.map(jnp.add, grads, {'embed': tied})
    return self._constrain(grads)
