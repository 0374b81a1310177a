"""GradNormLoRP: low-rank Adam on the directions of kernels, Adam on norms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import decay_after_step, scale_by_adam_hf, wide
from frugax.optim.axes import as_matrix, from_matrix, resolve
from frugax.optim.galore import galore
from frugax.optim.moments import Moments, PolicyFn
from frugax.optim.projection import ProjectorFn
from frugax.optim.refreshes import Schedule


def grad_norm_lorp(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_interval: int = 250,
  scale: jax.typing.ArrayLike = 0.25,
  side: str = 'short',
  projector: str | ProjectorFn = 'svd',
  moments: str | PolicyFn | Moments = 'keep',
  refresh: str | Schedule = 'together',
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
  projector_dtype: jax.typing.DTypeLike | None = None,
  key: jax.Array | int = 0,
) -> optax.GradientTransformation:
  r"""GaLore on the directions and Adam on the norms of a kernel's columns.

  `weight_normalized(galore, adam)`: with :math:`W = V \, \mathrm{diag}(g /
  \|V\|)`, one norm for each output,

  .. math::
    \nabla_g = v^T \nabla_W, \qquad
    \nabla_V = \frac{g}{\|V\|} (I - v v^T) \nabla_W, \qquad v = V / \|V\|

  for each column, :math:`\nabla_g` is given to Adam and :math:`\nabla_V` to
  Adam in a low-rank subspace. What is left whole (vectors, and the leaves for
  which `axes` has None) has plain Adam. The state is GaLore's and two numbers a
  column.

  This is the mathematics of the paper. The authors' code is another algorithm:
  it leaves :math:`v v^T` out, overwrites the learnt norms at each step, and
  holds a second copy of the weights; no published figure can be expected.

  Under `optax.inject_hyperparams` name in `static_args` the integers 'rank',
  'update_interval' and each argument that is given a function or a dtype.

  Args:
    learning_rate: a number or a schedule.
    rank: dimension of the subspaces.
    update_interval: steps from one refresh of the subspaces to the next.
    scale: of GaLore's updates of the directions.
    side: 'short', 'long', 'left' or 'right', see `low_rank`.
    projector: 'svd', 'sketch', 'random' or a function, see `low_rank`.
    moments: what a refresh does to GaLore's moments, see `low_rank`.
    refresh: 'together', 'staggered' or 'lazy', see `low_rank`.
    b1: decay of the first moments.
    b2: decay of the second moments.
    eps: added to the root of the uncorrected second moments.
    weight_decay: strength of decoupled decay, which acts on the weight after
      the step (and so on its norms).
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the moments; None takes the parameters'.
    projector_dtype: dtype of the projectors; None takes the parameters'.
    key: seed or PRNG key of 'sketch' and 'random'.

  Returns:
    An optax.GradientTransformation; its update needs the parameters.

  Raises:
    ValueError: as `low_rank` and `weight_normalized`.

  Examples:
    >>> loss = lambda params: jnp.sum((params['w'] - 1) ** 2)
    >>> tx = grad_norm_lorp(learning_rate=0.1, rank=2, scale=1.0)
    >>> params = start = {'w': jnp.eye(4, 6) + 0.1}
    >>> state = tx.init(params)
    >>> for _ in range(40):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss(start))
    True

  References:
    Huang et al., `Gradient Weight-normalized Low-rank Projection for Efficient
    LLM Training <https://arxiv.org/abs/2412.19616>`_, 2024
  """
  tx = weight_normalized(
    direction=galore(
      learning_rate,
      rank=rank,
      update_interval=update_interval,
      scale=scale,
      side=side,
      projector=projector,
      moments=moments,
      refresh=refresh,
      b1=b1,
      b2=b2,
      eps=eps,
      axes=axes,
      state_dtype=state_dtype,
      projector_dtype=projector_dtype,
      key=key,
    ),
    magnitude=optax.chain(
      scale_by_adam_hf(b1, b2, eps, state_dtype),
      optax.scale_by_learning_rate(learning_rate),
    ),
    axes=axes,
  )
  if isinstance(weight_decay, int | float) and weight_decay == 0:
    return tx
  decay = decay_after_step(learning_rate, weight_decay)
  return optax.chain(tx, decay if mask is None else optax.masked(decay, mask))


class WeightNormalizedState(NamedTuple):
  """The states of the two transformations.

  Attributes:
    direction: on a tree like the parameters.
    magnitude: on the norms (*batch, n) of the columns; leaves that are left
      whole are an empty optax.MaskedNode.
  """

  direction: optax.OptState
  magnitude: optax.OptState


def weight_normalized(
  direction: optax.GradientTransformation,
  magnitude: optax.GradientTransformation,
  axes: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Optimize the directions and the norms of columns by two transformations.

  Each matrix is written, anew at each step, as :math:`W = V \,
  \mathrm{diag}(g/\|V\|)` with :math:`V = W` and :math:`g = \|W\|`, column by
  column (a column of a kernel (in, out) makes one output), so that no second
  copy of the weights is kept. Then

  .. math::
    v &= W / \|W\|, \qquad
    \nabla_g = v^T \nabla_W, \qquad \nabla_V = (I - v v^T) \nabla_W \\
    W' &= (g + \Delta_g) \, \frac{W + \Delta_V}{\|W + \Delta_V\|}

  where the transformations make :math:`\Delta_V` of :math:`\nabla_V` and
  :math:`\Delta_g` of :math:`\nabla_g`; the update is :math:`W' - W`. Both are
  whole optimizers, with learning rate and sign, because what follows is not
  linear in them. A column of zeros has no direction: it is moved by
  :math:`\Delta_V` alone.

  Args:
    direction: for :math:`V`; leaves left whole are its too, as they are. Decay
      by it changes nothing but those.
    magnitude: for :math:`g`.
    axes: which axes form the matrices, see `low_rank`.

  Returns:
    An optax.GradientTransformationExtraArgs; its update needs the parameters.

  Raises:
    ValueError: axes that do not fit; update is called without parameters.

  Examples:
    A gradient along the columns changes their norms, and nothing else:

    >>> tx = weight_normalized(optax.sgd(0.5), optax.sgd(0.1))
    >>> params = jnp.array([[3., 0.], [4., 1.]])
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates)
    [[-0.3 -0. ]
     [-0.4 -0.1]]

  References:
    Salimans and Kingma, `Weight Normalization
    <https://arxiv.org/abs/1602.07868>`_, 2016
  """
  direction = optax.with_extra_args_support(direction)
  magnitude = optax.with_extra_args_support(magnitude)

  def norms_of(params, specs):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
      optax.MaskedNode()
      if spec is None
      else _norm(as_matrix(p, spec)).astype(p.dtype)
      for p, spec in zip(leaves, specs, strict=True)
    )

  def init_fn(params):
    return WeightNormalizedState(
      direction.init(params),
      magnitude.init(norms_of(params, resolve(params, axes))),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        'weight normalisation needs the parameters: '
        'tx.update(grads, state, params)'
      )
    specs = resolve(updates, axes)
    grads, treedef = jax.tree.flatten(updates)
    weights = treedef.flatten_up_to(params)
    split = [
      (g, optax.MaskedNode())
      if spec is None
      else _split(as_matrix(g, spec), as_matrix(w, spec))
      for g, w, spec in zip(grads, weights, specs, strict=True)
    ]
    along = treedef.unflatten(
      s if spec is None else from_matrix(s, spec, g.shape)
      for (s, _), g, spec in zip(split, grads, specs, strict=True)
    )
    turns, of_direction = direction.update(
      along, state.direction, params, **extra_args
    )
    grows, of_magnitude = magnitude.update(
      treedef.unflatten(s for _, s in split),
      state.magnitude,
      norms_of(params, specs),
      **extra_args,
    )
    outputs = treedef.flatten_up_to(turns)
    grows = treedef.flatten_up_to(grows)
    for i, spec in enumerate(specs):
      if spec is not None:
        moved = _joined(
          as_matrix(weights[i], spec), as_matrix(outputs[i], spec), grows[i]
        )
        moved = from_matrix(moved, spec, grads[i].shape)
        outputs[i] = moved.astype(grads[i].dtype)
    return treedef.unflatten(outputs), WeightNormalizedState(
      of_direction, of_magnitude
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _norm(x):
  return jnp.linalg.norm(wide(x), axis=-2)


def _split(g, w):
  """The gradients of direction and norm, in the dtype of g."""
  norm = _norm(w)
  v = wide(w) / jnp.where(norm > 0, norm, 1.0)[..., None, :]
  along = jnp.sum(v * wide(g), axis=-2)
  across = wide(g) - v * along[..., None, :]
  return across.astype(g.dtype), along.astype(g.dtype)


def _joined(w, turn, grow):
  """W' - W, without the difference of nearly equal numbers."""
  w, turn, grow = wide(w), wide(turn), wide(grow)
  old, new = _norm(w), _norm(w + turn)
  known = (old > 0) & (new > 0)
  old, new = (jnp.where(known, x, 1.0) for x in (old, new))
  stretch = jnp.sum((2 * w + turn) * turn, axis=-2) / (old + new)
  # W' = (1 + excess) (W + turn)
  excess = jnp.where(known, (grow - stretch) / new, 0.0)[..., None, :]
  return excess * w + (1 + excess) * turn
