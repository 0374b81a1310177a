"""One layer's gradient at a time: a pass forward, and passes back over it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from frugax import lowbit
from frugax.models import llama
from frugax.train.memory import Memory

# (index, layer, gradient, values, carry) -> (new layer or None, carry)
Visit = Callable[..., tuple[Any, Any]]


def first(tree: Any) -> Any:
  """Stacks of height 1 as what they hold."""
  return jax.tree.map(lambda x: x[0], tree)


def _at(tree, index):
  """What lies there in stacks."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree
  )


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
    memory: where `inputs` is, and the gradients `dx` of several micro-batches.

  Attributes:
    inputs: of the layers and then of the head, of one micro-batch after the
      other: (micro-batches * (layers + 1), rows, length, dim).
  """

  def __init__(
    self, model, params, micros, keys, n_tokens, z_loss, constrain, memory
  ):
    self._model, self._constrain, self._memory = model, constrain, memory
    self._micros, self._count = micros, len(keys)
    # The only micro-batch's is what the next layer takes at once.
    self._passed = memory if self._count > 1 else Memory()
    self._keys = jax.vmap(lambda key: llama.rounding_keys(model.config, key))(
      keys
    )
    self._n_tokens, self._z_loss = n_tokens, z_loss
    self._outer = {k: v for k, v in params.items() if k != 'layers'}
    self._height = model.config.n_layers + 1  # of a micro-batch's inputs
    self.inputs = self._forward(params['layers'])

  def _forward(self, layers):
    def embed(m):
      tokens = _at(self._micros['tokens'], m)
      return self._model.embed(self._outer, tokens)

    def one(m, inputs):
      x = embed(m)
      for start, stop, index in self._model.segments():

        def layer(at, state, index=index):
          x, inputs = state
          inputs = self._memory.put(inputs, m * self._height + at, x)
          return self._block(_at(layers, at), x, m, at, index), inputs

        x, inputs = jax.lax.fori_loop(start, stop, layer, (x, inputs))
      return self._memory.put(inputs, (m + 1) * self._height - 1, x)

    x = jax.eval_shape(embed, 0)
    height = self._count * self._height
    inputs = self._memory.empty((height, *x.shape), x.dtype)
    if self._count == 1:
      return one(0, inputs)
    return jax.lax.fori_loop(0, self._count, one, inputs)

  def _block(self, layer, x, m, at, index):
    """What a layer makes of the input that a micro-batch has there."""
    layer_keys, _ = self._keys
    return self._model.block(
      layer,
      x,
      segment_ids=_at(self._micros['segment_ids'], m),
      positions=_at(self._micros['positions'], m),
      index=index,
      key=_at(_at(layer_keys, m), at),
    )

  def _total(self, function, like, dx):
    """The sum over micro-batches of its first results; what dx becomes.

    Args:
      function: (m, dx) -> (arrays to be summed, dx).
      like: the sum's shapes and dtypes.
      dx: a stack of what each micro-batch has.
    """
    if self._count == 1:
      return function(0, dx)

    def body(m, state):
      total, dx = state
      more, dx = function(m, dx)
      return jax.tree.map(jnp.add, total, more), dx

    # Sums in float32 even for bfloat16 parameters.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), like)
    total, dx = jax.lax.fori_loop(0, self._count, body, (zeros, dx))
    return jax.tree.map(lambda g, p: g.astype(p.dtype), total, like), dx

  def head(
    self, inputs: jax.Array
  ) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Gradients of what the head uses and of its inputs, and the loss.

    Args:
      inputs: `self.inputs`, or a copy that is there later.
    """
    used = {k: v for k, v in self._outer.items() if k != 'embed'}
    if self._model.config.tie_embeddings:
      used = self._outer

    def one(m, dx):
      labels, key = _at((self._micros['labels'], self._keys[1]), m)

      def loss_fn(used, x):
        nll, lse = self._model.head_losses(used, x, labels, key)
        loss = jnp.sum(nll) / self._n_tokens
        squares = jnp.sum(jnp.square(lse)) / self._n_tokens
        return loss + self._z_loss * squares, loss

      x = self._memory.get(inputs, (m + 1) * self._height - 1)
      grads, loss = jax.grad(loss_fn, (0, 1), has_aux=True)(used, x)
      return (grads[0], loss), self._passed.put(dx, m, grads[1])

    dx = self._passed.empty((self._count, *inputs.shape[1:]), inputs.dtype)
    (grads, loss), dx = self._total(one, (used, jnp.zeros([])), dx)
    return self._constrain(grads), dx, loss

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
    def one(m, dx):
      def run(values, x):
        attached = first(lowbit.attach(layer, values))
        return self._block(attached, x, m, at, index)

      x = self._memory.get(self.inputs, m * self._height + at)
      grads, new = jax.vjp(run, values, x)[1](self._passed.get(dx, m))
      return grads, self._passed.put(dx, m, new)

    grads, dx = self._total(one, values, dx)
    return self._constrain({'layers': grads})['layers'], dx

  def embed(self, dx: jax.Array, tied: Any = None) -> dict[str, Any]:
    """The gradient of the embedding.

    Args:
      dx: that of the first layer's inputs.
      tied: what the head adds to it.
    """
    table = {'embed': self._outer['embed']}

    def one(m, dx):
      def run(table):
        return self._model.embed(table, _at(self._micros['tokens'], m))

      return jax.vjp(run, table)[1](self._passed.get(dx, m))[0], dx

    grads, _ = self._total(one, table, dx)
    if tied is not None:
      grads = jax.tree.map(jnp.add, grads, {'embed': tied})
    return self._constrain(grads)
