"""Keep the state of any optax transformation in few bits."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim import leaves as leaves_lib
from frugax.optim import streamed
from frugax.optim.axes import handed_on, layer_axes
from frugax.optim.moments import FIRST, SECOND, _field, _owner, is_coded
from frugax.optim.streamed import Spot
from frugax.quant.codecs import Codec


class QuantizeState(NamedTuple):
  """State of `quantize_state`.

  Attributes:
    inner: the state of the wrapped transformation, with a Coded, or an array of
      another dtype, in place of each moment.
    count: updates so far, int32, if moments are rounded at random; else None.
  """

  inner: optax.OptState
  count: jax.Array | None


def quantize_state(
  inner: optax.GradientTransformation,
  codec: str | Codec = 'dynamic8',
  block: int | None = None,
  sqrt: bool = False,
  min_size: int = 4096,
  fields: Mapping[str, str | Codec] | None = None,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Keep the moments of a transformation in few bits between its updates.

  With D and E the decoder and the encoder of a codec

  .. math::
    (u_t, s_t) = \mathrm{inner}(g_t, D(z_{t-1})), \qquad z_t = E(s_t)

  The moments are the leaves of the inner state that belong to a parameter, by
  their path, and lie in a field whose name is known: see `FIRST` and `SECOND`
  in `frugax.optim.moments`, of which `acc_grads` is left alone. First moments
  have both signs; second moments have none, and what is greater than zero is
  never stored as zero, since a first moment is divided by its root. All other
  state, such as counters, projectors and moments in fields of other names,
  stays as it is: `state_bytes` tells what was saved.

  As the `inner` of `low_rank` it stores the small moments; around a `low_rank`
  it does the same, but holds the decoded moments of a leaf beside all that is
  made of its gradient. The moments are computed in float32, whatever the dtype
  of the parameters.

  Args:
    inner: any transformation.
    codec: a format of `frugax.quant.codecs.Codec`: 'dynamic8', 'linear8',
      'dynamic4', 'linear4', 'fp8_e4m3', 'fp8_e5m2', 'bf16', 'bf16_stochastic'.
    block: elements that share a scale; None takes the format's.
    sqrt: store the roots of second moments.
    min_size: moments with fewer elements are stored in float32; with `axes` the
      elements of one layer count.
    fields: for further names of fields, or instead of the rule above, a format
      or a Codec; {'nu': 'f32'} leaves the second moment in float32.
    mask: a tree of booleans like the parameters, or a function that makes it
      from them: where it is False, moments are stored in float32.
    axes: which axes are batch axes, as in `low_rank`, of the tree that this
      transformation sees. No block holds elements of two layers then, and all
      layers of a stack are rounded with the same random bits, so that a stack
      is trained as its layers alone would be. With None the last two axes of a
      stack of matrices are never left by a block either, but random bits and
      sizes are those of the whole array.
    key: a seed or a jax PRNG key, for 'bf16_stochastic'. Bits depend on the
      update, the leaf's path and the element's index: not on the mesh.

  Returns:
    An optax.GradientTransformationExtraArgs. It needs the parameters if `inner`
    does, and a mask or axes that are functions get the gradients in `update`.

  Raises:
    ValueError: an unknown codec, or a block below 1.

  Examples:
    >>> tx = optax.chain(
    ...   quantize_state(optax.scale_by_adam(), 'dynamic8'),
    ...   optax.scale_by_learning_rate(1e-3))
    >>> params = {'kernel': jnp.ones((512, 256)), 'bias': jnp.ones(256)}
    >>> state = tx.init(params)
    >>> state[0].inner.mu['kernel'].codes.dtype, state[0].inner.mu['bias'].dtype
    (dtype('uint8'), dtype('float32'))
    >>> updates, state = jax.jit(tx.update)(params, state)

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021

    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023

    Xi et al., `COAT: Compressing Optimizer States and Activation for
    Memory-Efficient FP8 Training <https://arxiv.org/abs/2410.19313>`_, 2024
  """
  codecs = _codecs(codec, block, sqrt, dict(fields or {}))
  random = any(c.format == 'bf16_stochastic' for c in codecs.values())
  inner = optax.with_extra_args_support(inner)

  def spots(tree, leaves):
    return _spots(codecs, min_size, mask, axes, tree, leaves)

  def fold(count):
    if count is None:
      return None
    return jax.random.fold_in(leaves_lib.seed(key), count)

  def init_fn(params):
    leaves, treedef = jax.tree.flatten_with_path(inner.init(params))
    count = jnp.zeros([], jnp.int32) if random else None
    stored = [
      # XLA would fold the codes of all these zeros while it compiles.
      spot.store(jax.lax.optimization_barrier(x), fold(count))
      for spot, (_, x) in zip(spots(params, leaves), leaves, strict=True)
    ]
    return QuantizeState(treedef.unflatten(stored), count)

  def update_fn(updates, state, params=None, **extra_args):
    leaves, treedef = jax.tree.flatten_with_path(state.inner, is_leaf=is_coded)
    grads, of_grads = jax.tree.flatten(updates)
    whole = [] if params is None else of_grads.flatten_up_to(params)
    count = None if state.count is None else optax.safe_increment(state.count)
    n, before = len(grads), len(grads) + len(whole)

    def function(*arrays):
      new, new_state = inner.update(
        of_grads.unflatten(arrays[:n]),
        treedef.unflatten(arrays[before:]),
        of_grads.unflatten(arrays[n:before]) if whole else params,
        **extra_args,
      )
      new = of_grads.flatten_up_to(new)
      new = [u.astype(g.dtype) for u, g in zip(new, grads, strict=True)]
      return new + treedef.flatten_up_to(new_state)

    new = streamed.run(
      function,
      grads + whole + [x for _, x in leaves],
      [Spot(i % n, given=True) for i in range(before)] + spots(updates, leaves),
      [*range(n), *range(before, before + len(leaves))],
      fold(count),
    )
    return of_grads.unflatten(new[:n]), QuantizeState(
      treedef.unflatten(new[n:]), count
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_few_bits(
  inner: optax.GradientTransformation,
  codec: str | Codec | None,
  axes: Any | Callable[[Any], Any] | None,
  min_size: int | None = None,
) -> optax.GradientTransformation:
  """What `low_rank` wraps, its moments stored by a codec if there is one.

  So one leaf's small moments are decoded at a time. Around `low_rank`, whose
  products mix the elements of a leaf, `quantize_state` stores the same, but
  decodes a leaf beside all that the update makes of it.

  Args:
    inner: the transformation.
    codec: of `quantize_state`; None leaves `inner` as it is.
    axes: those of `low_rank`.
    min_size: of `quantize_state`; None takes its default.
  """
  if codec is None:
    return inner
  size = {} if min_size is None else {'min_size': min_size}
  return quantize_state(inner, codec, axes=handed_on(axes), **size)


def _codecs(codec, block, sqrt, fields):
  """The codec of each field, by its name."""

  def make(codec, signed):
    if isinstance(codec, Codec):
      return codec
    return Codec(codec, block, signed, sqrt=sqrt and not signed)

  usual = {name: codec for name in FIRST + SECOND if name != 'acc_grads'}
  return {
    name: make(one, signed=name not in SECOND)
    for name, one in (usual | fields).items()
  }


def _spots(codecs, min_size, mask, axes, tree, leaves):
  """What is known of each leaf of the inner state."""
  params = jax.tree.leaves_with_path(tree)
  index = {path: i for i, (path, _) in enumerate(params)}
  kept = [True] * len(params)
  if mask is not None:
    mask = mask(tree) if callable(mask) else mask
    kept = jax.tree.leaves(jax.tree.broadcast(mask, tree))
  layers = None if axes is None else layer_axes(tree, axes)
  found = []
  for path, x in leaves:
    prefix, i = _owner(path, index)
    if i is None:
      found.append(Spot())
      continue
    codec = codecs.get(_field(prefix))
    if codec is None or not _real(x):
      found.append(Spot(i))
      continue
    size, ndim = math.prod(x.shape), len(x.shape)
    batch = max(ndim - 2, 0)
    stack = batch > 0
    if layers is not None:
      batch = _batch_axes(layers[i], ndim)
      stack = batch > 0
      size = math.prod(x.shape[batch:])
    elif codec.format == 'bf16_stochastic':
      batch = 0
    if size < max(min_size, 1) or not ndim or not kept[i]:
      codec = Codec('f32')
    name = jax.tree_util.keystr(path).encode()
    found.append(Spot(i, codec, batch, stack, zlib.crc32(name)))
  return found


def _batch_axes(layer, ndim):
  """Number of leading axes that are not those of a layer."""
  batch = 0
  while batch < ndim and batch not in layer:
    batch += 1
  return batch


def _real(x):
  return is_coded(x) or jnp.issubdtype(x.dtype, jnp.floating)
