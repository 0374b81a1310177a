"""LAMB with a trust ratio for each layer, and a subset-norm second moment."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax.optim.adam import scale_by_adam_hf, wide
from frugax.optim.axes import layer_axes
from frugax.optim.subset_norm import scale_by_adam_sn


def lamb(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  subset: str | int | None = None,
  reduction: str = 'sum',
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""Adam whose step is as long as the weight, layer by layer.

  .. math::
    U_t = \mathrm{Adam}(G_t) + \lambda W_{t-1}, \qquad
    W_t = W_{t-1} - \eta \, \frac{\|W_{t-1}\|}{\|U_t\|} \, U_t

  `optax.lamb` takes each array as one layer, so that all layers of a stacked
  model share a ratio; here each layer of a stack has its own. On arrays that
  are one layer the two agree.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment: of the corrected one as in
      optax, with `subset` of the uncorrected one as in `adam_sn`.
    subset: None for a second moment of each entry, else which entries of a
      matrix share one, see `scale_by_subset_norm`: 'heuristic' or an int.
    reduction: 'sum' or 'mean' of their squares. The ratio undoes the size of
      the step, so it matters only beside weight decay.
    weight_decay: strength of the decay that is part of the step.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: what is one layer of an array, see `scale_by_trust_ratio`, and the
      matrices of `subset`.
    state_dtype: dtype of the moments; None takes the parameters'.

  Returns:
    An optax.GradientTransformation; its update needs the parameters.

  Raises:
    ValueError: axes that do not fit, a bad subset, or update without
      parameters.

  Examples:
    >>> loss = lambda params: jnp.sum((params['w'] - 1) ** 2)
    >>> tx = lamb(learning_rate=0.1, subset='heuristic')
    >>> params = start = {'w': jnp.eye(4, 6) + 0.1}
    >>> state = tx.init(params)
    >>> for _ in range(40):
    ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss(start))
    True

  References:
    You et al., `Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes <https://arxiv.org/abs/1904.00962>`_, 2019

    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm and
    Subspace-Momentum <https://arxiv.org/abs/2411.07120>`_, 2024
  """
  if subset is None:
    adam = scale_by_adam_hf(b1, b2, eps, state_dtype, correction='moments')
  else:
    adam = scale_by_adam_sn(b1, b2, eps, subset, reduction, axes, state_dtype)
  return optax.chain(
    adam,
    optax.add_decayed_weights(weight_decay, mask),
    scale_by_trust_ratio(axes),
    optax.scale_by_learning_rate(learning_rate),
  )


def scale_by_trust_ratio(
  axes: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  r"""Give the update of each layer the norm of the layer's weight.

  .. math:: U \leftarrow \frac{\|W\|}{\|U\|} \, U

  or U as it is where either norm is 0.

  Args:
    axes: what is one layer of an array: MatrixAxes, optax's dimension numbers,
      or a tuple of logical axis names, whose 'layers' and 'experts' are stacks;
      None takes the array as one. A tree of these or a function that makes it;
      None for arrays of at most two axes.

  Returns:
    An optax.GradientTransformation; its update needs the parameters.

  Raises:
    ValueError: axes that do not fit, or update without parameters.

  Examples:
    Two stacked vectors, each with its own ratio:

    >>> tx = scale_by_trust_ratio(axes=('layers', 'norm'))
    >>> params = jnp.array([[3., 4.], [0.6, 0.8]])
    >>> updates = jnp.array([[0., 1.], [0., 1.]])
    >>> print(tx.update(updates, tx.init(params), params)[0])
    [[0. 5.]
     [0. 1.]]
  """

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError(
        'trust ratios need the parameters: tx.update(grads, state, params)'
      )
    leaves, treedef = jax.tree.flatten(updates)

    def scaled(u, p, over):
      weight, step = (_norms(x, over) for x in (p, u))
      known = (weight > 0) & (step > 0)
      ratio = jnp.where(known, weight / jnp.where(known, step, 1.0), 1.0)
      return (ratio * wide(u)).astype(u.dtype)

    return treedef.unflatten(
      scaled(*each)
      for each in zip(
        leaves,
        treedef.flatten_up_to(params),
        layer_axes(updates, axes),
        strict=True,
      )
    ), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update_fn)


def _norms(x, over):
  return jnp.sqrt(jnp.sum(jnp.square(wide(x)), axis=over, keepdims=True))
