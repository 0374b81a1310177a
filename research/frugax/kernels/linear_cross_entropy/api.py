"""Cross entropy of a linear layer, whose logits are never in memory."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from frugax import names
from frugax.kernels import chips
from frugax.kernels.linear_cross_entropy import labels as fx_labels
from frugax.kernels.linear_cross_entropy import reference, tpu, triton

# None, a probability, or 'auto'.
Filter = float | str | None
# Which axis of w is the vocabulary.
LAYOUTS = {'NN': 1, 'NT': 0}
_KERNELS = {'mosaic': tpu, 'triton': triton}


def linear_cross_entropy(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  *,
  layout: str = 'NN',
  softcap: float | None = None,
  z_loss: float = 0.0,
  ignore_index: int = -1,
  return_lse: bool = False,
  vocab_axis: str | Sequence[str] | None = None,
  filter_eps: Filter | tuple[Filter, Filter] = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  r"""Losses of tokens against logits x w, in memory of O(N + V) beside both.

  .. math::
    l_i = \log \sum_j e^{z_{ij}} - z_{i y_i} + \lambda
      \Big(\log \sum_j e^{z_{ij}}\Big)^2, \qquad
    z_{ij} = c \tanh\Big(\frac{1}{c} \sum_k x_{ik} w_{kj}\Big)

  without the cap c where there is none. A part of the vocabulary at a time is
  multiplied, and its exponentials added up; the backward pass multiplies it
  once more. Any N and V is exact: no part is filled up, none is left out.
  Products are summed, and all else is computed, in float32.

  Both operands have gradients, each in its own dtype, and so has the
  log-partition that `return_lse` gives.

  Args:
    x: (..., D), of any floating-point dtype.
    w: (D, V), or (V, D) in layout 'NT', as a tied embedding is. Products are in
      the wider dtype of the two.
    labels: integers (...). One that is neither in [0, V) nor `ignore_index` has
      a loss that is not a number.
    layout: 'NN', or 'NT' (w transposed).
    softcap: c, a positive number, or None.
    z_loss: lambda, which keeps log-partitions near 0.
    ignore_index: the label of tokens that have a loss of 0 and no gradient.
    return_lse: whether to return the log-partitions as well.
    vocab_axis: the name (or names) of the mesh axis over which the vocabulary
      of w is cut, within `jax.shard_map` over it or under `jax.set_mesh`. Each
      device computes the logits of its own part. What travels is a few numbers
      a token and, summed, the gradient of x: no logit, and nothing of w. Under
      `jax.set_mesh` it may be any vocabulary: of one that the axis does not
      divide, each device has the few columns that are left as well.
    filter_eps: None for exact gradients; or a probability, say 1e-4, or 'auto',
      a 32nd of the operands' epsilon (2^-12 in bfloat16), or a pair of these,
      for the gradients of x and of w. Of a block of logits in which each token
      of the vocabulary has a probability below it and none is a label, nothing
      is added to the gradient. With p eps, r tokens' gradients g and v the
      vocabulary, that errs in x_ik by at most p |g_i| sum_v |w_kv|, and in w_kv
      by at most p sum_i |g_i x_ik|. Blocks are small on Hopper (128 x 256), and
      of a trained model most are left out there; those of TPUs and XLA are
      larger and save little. Tokens that are rare get no gradient in w from
      contexts that do not end in them: for pre-training filter that of x alone,
      (1e-4, None).
    implementation: 'mosaic' (kernels for TPUs), 'triton' (for Hopper GPUs),
      'xla', or None, which takes the kernels for bfloat16 on v5e, v5p, v6e,
      tpu7x and Hopper (H100, H200), on one device or within `jax.shard_map`
      with check_vma=False, and else XLA. Kernels hold no logits but blocks in
      the chip; XLA at most 2^24 of them in memory, or 512 a row. Backward, that
      for Hopper holds gradients of 3 2^23 logits, or 512 a row, in x's dtype.
    interpret: run the kernels as plain JAX, on any platform, those of TPUs if
      no other are asked for.

  Returns:
    The losses (...) in float32, and with `return_lse` also the log-partitions,
    which are 0 where labels are ignored.

  Raises:
    ValueError: an unknown layout, shapes that do not fit, labels that are not
      integers, an axis that is none of a mesh, a cap that is not positive, or
      an implementation that is unknown or does not run here.

  Examples:
    >>> x, w = jnp.eye(3, 4), jnp.zeros((4, 5))
    >>> losses = linear_cross_entropy(x, w, jnp.array([0, 4, -1]))
    >>> [round(float(loss), 4) for loss in losses]  # log(5) = 1.6094
    [1.6094, 1.6094, 0.0]
    >>> dw = jax.grad(lambda w: linear_cross_entropy(x, w, jnp.arange(3)).sum())
    >>> [round(float(g), 4) for g in dw(w)[0]]
    [-0.8, 0.2, 0.2, 0.2, 0.2]

  References:
    Wijmans et al., `Cut Your Losses in Large-Vocabulary Language Models
    <https://arxiv.org/abs/2411.09009>`_, 2024

    Chowdhery et al., `PaLM: Scaling Language Modeling with Pathways
    <https://arxiv.org/abs/2204.02311>`_, 2022 (z-loss)

    Gemma Team, `Gemma 2: Improving Open Language Models at a Practical Size
    <https://arxiv.org/abs/2408.00118>`_, 2024 (softcap)
  """
  x, w = jnp.asarray(x), jnp.asarray(w)
  if not isinstance(labels, jax.Array):
    labels = np.asarray(labels)
  _check(x, w, labels, layout, softcap)
  labels = fx_labels.as_int32(labels, ignore_index)
  axis = LAYOUTS[layout]
  axes = (vocab_axis,) if isinstance(vocab_axis, str) else vocab_axis or ()
  within = functools.partial(
    linear_cross_entropy,
    layout=layout,
    softcap=softcap,
    filter_eps=filter_eps,
    implementation=implementation,
    interpret=interpret,
  )
  if _outside(axes, vocab_axis):
    found = _over_devices(within, x, w, labels, axes, axis, z_loss)
    return found if return_lse else found[0]
  counts, own = labels != fx_labels.IGNORED, labels
  if axes:
    own -= lax.axis_index(axes) * w.shape[axis]
  # A label that is not here is none.
  known = counts & (own >= 0) & (own < w.shape[axis])
  dtype = jnp.promote_types(x.dtype, w.dtype)
  operands = x.astype(dtype), w.astype(dtype), jnp.where(known, own, -1)
  which = _choose(dtype, operands, implementation, interpret)
  filters = _filters(filter_eps, dtype)
  if not labels.size:
    losses = lse = x[..., 0].astype(jnp.float32)
    return (losses, lse) if return_lse else losses
  options = _Options(axis, softcap, filters, which, interpret)
  lse, at = _core(options, *_alike(operands))
  if axes:
    top = lax.pmax(lax.stop_gradient(lse), axes)
    lse = top + jnp.log(lax.psum(jnp.exp(lse - top), axes))
    at = lax.psum(at, axes)
    known = lax.psum(known.astype(jnp.int32), axes) > 0
  lse = jnp.where(counts, lse, 0)
  losses = jnp.where(counts, jnp.where(known, lse - at, jnp.nan), 0)
  losses += z_loss * jnp.square(lse)
  return (losses, lse) if return_lse else losses


def _over_devices(loss, x, w, labels, axes, axis, z_loss):
  """Losses and log-partitions, of a vocabulary that is cut over these axes.

  Of one that they do not divide each device has the columns that are left.
  """
  mesh = jax.sharding.get_abstract_mesh()
  vocabulary = w.shape[axis]
  at = vocabulary - vocabulary % math.prod(mesh.shape[a] for a in axes)
  spec = P(None, axes) if axis else P(axes)
  parts = [(w, axes, spec) if at else (w, None, P())]
  if 0 < at < vocabulary:
    cut, left = jnp.split(w, [at], axis)
    parts = [(cut, axes, spec), (left, None, P())]
  ws, cut_over, specs = zip(*parts, strict=True)

  def of_parts(x, ws, labels):
    def of(w, axes):
      return lambda labels: loss(x, w, labels, vocab_axis=axes, return_lse=True)

    both = list(map(of, ws, cut_over))
    if len(both) == 2:
      return fx_labels.in_two(*both, labels, at, vocabulary, z_loss)
    losses, lse = both[0](labels)
    return losses + z_loss * jnp.square(lse), lse

  return jax.shard_map(
    of_parts,
    in_specs=(P(), specs, P()),
    out_specs=P(),
    axis_names=set(axes),
    check_vma=False,
  )(x, ws, labels)


class _Options(NamedTuple):
  axis: int
  softcap: float | None
  filters: tuple[float | None, float | None]
  implementation: str
  interpret: bool


def _choose(dtype, operands, implementation, interpret):
  if implementation is None and not interpret:
    cpu = chips.current() is None and jax.default_backend() == 'cpu'
    # A kernel says nothing of the axes over which its results vary.
    if cpu or any(map(reference.varying, operands)):
      return 'xla'
  return chips.choose(
    'linear_cross_entropy', str(dtype), implementation, interpret
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(options, x, w, labels):
  """Log-partition and the logit at the label, of this device's vocabulary."""
  axis, softcap, _, which, interpret = options
  if which == 'xla':
    return reference.forward(x, w, labels, axis, softcap)
  flat = x.reshape(-1, x.shape[-1]), w, labels.reshape(-1)
  found = _KERNELS[which].forward(*flat, axis, softcap, interpret)
  return tuple(a.reshape(labels.shape) for a in found)


def _core_forward(options, x, w, labels):
  lse, at = _core(options, x, w, labels)
  return (lse, at), (x, w, labels, lse)


def _core_backward(options, residuals, gradients):
  *how, which, interpret = options
  if which == 'xla':
    return *reference.backward(*residuals, *gradients, *how), None
  x, w, *rows = *residuals, *gradients
  flat = x.reshape(-1, x.shape[-1]), w, *(a.reshape(-1) for a in rows)
  dx, dw = _KERNELS[which].backward(*flat, *how, interpret)
  return dx.reshape(x.shape), dw, None


_core.defvjp(_core_forward, _core_backward)


def _filters(filter_eps, dtype):
  """For the gradients of x and of w."""
  pair = filter_eps if isinstance(filter_eps, tuple) else (filter_eps,) * 2
  auto = float(jnp.finfo(dtype).eps) / 32
  found = tuple(auto if eps == 'auto' else eps for eps in pair)
  if len(found) != 2 or any(
    eps is not None and not (isinstance(eps, int | float) and 0 < eps < 1)
    for eps in found
  ):
    raise ValueError(
      f'filter_eps={filter_eps!r}: give None, a probability between 0 and 1, '
      "'auto', or a pair of these, for the gradients of x and of w"
    )
  return found


def _alike(arrays):
  """All varying over the same axes, which a shard_map may check."""
  axes = frozenset().union(*map(reference.varying, arrays))
  return [reference.vary(a, axes) for a in arrays]


def _outside(axes, name) -> bool:
  """Whether the axes are those of a mesh that no shard_map is over yet."""
  mesh = jax.sharding.get_abstract_mesh()
  if unknown := [a for a in axes if a not in mesh.axis_names]:
    raise ValueError(
      f'vocab_axis={name!r}: no mesh here has the axis {unknown[0]!r}, but '
      f'{", ".join(mesh.axis_names) or "none"}: call it within jax.shard_map '
      'or under jax.set_mesh'
    )
  return not set(axes) <= set(mesh.manual_axes)


def _check(x, w, labels, layout, softcap):
  if layout not in LAYOUTS:
    raise names.unknown('layout', layout, LAYOUTS)
  axis = 1 - LAYOUTS[layout]
  if w.ndim != 2 or not x.ndim or x.shape[-1] != w.shape[axis]:
    raise ValueError(
      f'x of shape {x.shape} and w of shape {w.shape} in layout {layout!r}: '
      f'the last axis of x and axis {axis} of w are contracted; give '
      "layout='NN' for w of (D, V), 'NT' for (V, D)"
    )
  if 0 in w.shape:
    raise ValueError(f'an empty operand: w of shape {w.shape}')
  if labels.shape != x.shape[:-1]:
    raise ValueError(
      f'labels of shape {labels.shape} for x of shape {x.shape}: give one for '
      f'each row, {x.shape[:-1]}'
    )
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f'labels of {labels.dtype}: give integers')
  for name, a in (('x', x), ('w', w)):
    if not jnp.issubdtype(a.dtype, jnp.floating):
      raise ValueError(f'{name} of {a.dtype}: give floating-point numbers')
  if softcap is not None and not softcap > 0:
    raise ValueError(f'softcap={softcap}: give a positive number, or None')
