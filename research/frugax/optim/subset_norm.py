"""Subset-norm: Adam whose second moment is shared by subsets of a matrix."""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from frugax import names
from frugax.optim.adam import correct_bias, step_and_decay, wide
from frugax.optim.axes import as_matrix, from_matrix, matrix_shape, resolve
from frugax.optim.subspace import scale_by_momentum

REDUCTIONS = ('sum', 'mean')
_LONG_ROW = 8192


def adam_sn(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  subset: str | int = 'heuristic',
  reduction: str = 'sum',
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""Adam with a second moment for each row or column of a matrix.

  `scale_by_adam_sn`, the learning rate, and decoupled decay after the step.
  `adamw_sn` is the authors' name of the same.

  Because the second moment is a sum over the subset, the steps are as many
  times smaller than Adam's as the root of its size: the published learning
  rate is 0.05, ten times Adam's. With `reduction='mean'` it is Adam's.

  The authors compress all linear layers, the head included, and leave
  embedding and norms to plain Adam.

  Under `optax.inject_hyperparams` name in `static_args` 'subset', 'reduction'
  and each argument that is given a function or a dtype.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the first moment; the number 0 does without one (RMSprop).
    b2: decay of the second moment; 1 accumulates (AdaGrad).
    eps: added to the root of the uncorrected second moment.
    subset: which entries share a second moment, see `scale_by_subset_norm`.
    reduction: 'sum' or 'mean' of their squares.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`; needed for leaves of
      more than two axes.
    state_dtype: dtype of the moments; None takes the parameters'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `scale_by_subset_norm`; and from update without parameters
      when `weight_decay` is given.

  Examples:
    >>> loss = lambda params: jnp.sum((params['w'] - 1) ** 2)
    >>> tx = adam_sn(learning_rate=0.2)
    >>> params = {'w': jnp.zeros((4, 6))}
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...   updates, state = tx.update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> print(loss(params) < 0.1 * loss({'w': jnp.zeros((4, 6))}))
    True

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm and
    Subspace-Momentum <https://arxiv.org/abs/2411.07120>`_, 2024
  """
  return optax.chain(
    scale_by_adam_sn(b1, b2, eps, subset, reduction, axes, state_dtype),
    step_and_decay(learning_rate, weight_decay, mask),
  )


# The name that the authors' code has for it, their decay being decoupled.
adamw_sn = adam_sn


def adagrad_sn(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  eps: jax.typing.ArrayLike = 1e-6,
  subset: str | int = 'heuristic',
  reduction: str = 'sum',
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any | Callable[[Any], Any] | None = None,
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""AdaGrad with a sum of squares for each row or column of a matrix.

  .. math::
    M \leftarrow b_1 M + (1-b_1) G, \qquad
    v_s \leftarrow v_s + \sum_{i \in s} G_i^2, \qquad
    W \leftarrow W - \eta \, \frac{M}{\sqrt{v_s} + \epsilon}

  without bias correction, as in the authors' code; with `b1=0` it is the
  AdaGrad of the paper's analysis and holds no first moment. Parameters in
  bfloat16 deserve `state_dtype=jnp.float32`: a sum of squares soon grows by
  less than bfloat16 can tell.

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the first moment; the number 0 does without one.
    eps: added to the root of the sum of squares.
    subset: which entries share one, see `scale_by_subset_norm`.
    reduction: 'sum' or 'mean' of their squares at each step.
    weight_decay: strength of decoupled decay; the parameters are then needed.
    mask: which leaves decay: a tree of booleans or a function that makes it.
    axes: which axes form the matrices, see `low_rank`.
    state_dtype: dtype of the state; None takes the parameters'.

  Returns:
    An optax.GradientTransformation.

  Raises:
    ValueError: as `adam_sn`.

  Examples:
    >>> tx = adagrad_sn(learning_rate=1.0, b1=0.0)
    >>> params = jnp.zeros((2, 2))
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...   updates, state = tx.update(jnp.array([[3., 0.], [4., 1.]]), state)
    >>> print((updates * 2 ** 0.5).round(3))
    [[-0.6 -0. ]
     [-0.8 -1. ]]

  References:
    Duchi, Hazan and Singer, `Adaptive Subgradient Methods for Online Learning
    and Stochastic Optimization <https://jmlr.org/papers/v12/duchi11a.html>`_,
    2011

    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm and
    Subspace-Momentum <https://arxiv.org/abs/2411.07120>`_, 2024
  """
  return optax.chain(
    scale_by_subset_norm(
      _momentum(b1, state_dtype), 1.0, eps, subset, reduction, axes, state_dtype
    ),
    step_and_decay(learning_rate, weight_decay, mask),
  )


def scale_by_adam_sn(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  subset: str | int = 'heuristic',
  reduction: str = 'sum',
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
  r"""Adam's step with a second moment that subsets of entries share.

  .. math::
    M &\leftarrow b_1 M + (1-b_1) G, \qquad
    v_s \leftarrow b_2 v_s + (1-b_2) \sum_{i \in s} G_i^2 \\
    U &= \frac{\sqrt{1-b_2^t}}{1-b_1^t} \; \frac{M}{\sqrt{v_s} + \epsilon}

  A chain of `scale_by_subset_norm(scale_by_momentum())` and `correct_bias`.

  Args:
    b1: decay of the first moment; the number 0 does without one.
    b2: decay of the second moment; 1 accumulates, and there is no bias then.
    eps: added to the root of the uncorrected second moment.
    subset: see `scale_by_subset_norm`.
    reduction: see `scale_by_subset_norm`.
    axes: which axes form the matrices, see `low_rank`.
    state_dtype: dtype of the moments; None takes the parameters'.

  Returns:
    An optax.GradientTransformation; it does not use the parameters.

  Raises:
    ValueError: as `scale_by_subset_norm`.

  Examples:
    >>> tx = scale_by_adam_sn()
    >>> params = {'w': jnp.zeros((2, 4))}
    >>> g = {'w': jnp.array([[3., 1., 0., 1.], [4., 0., 2., 1.]])}
    >>> updates, state = tx.update(g, tx.init(params))
    >>> print(updates['w'].round(3))
    [[0.6   1.    0.    0.707]
     [0.8   0.    1.    0.707]]
    >>> print(state[0].nu['w'])
    [0.025 0.001 0.004 0.002]

  References:
    Nguyen and Nguyen, `Lean and Mean Adaptive Optimization via Subset-Norm and
    Subspace-Momentum <https://arxiv.org/abs/2411.07120>`_, 2024
  """
  return optax.chain(
    scale_by_subset_norm(
      _momentum(b1, state_dtype), b2, eps, subset, reduction, axes, state_dtype
    ),
    correct_bias(b1, b2),
  )


def _momentum(b1, state_dtype):
  if isinstance(b1, int | float) and b1 == 0:
    return optax.identity()
  return scale_by_momentum(b1, state_dtype)


class SubsetNormState(NamedTuple):
  """State of `scale_by_subset_norm`.

  Attributes:
    inner: of the transformation that makes the numerator.
    nu: a tree like the parameters with the second moment of each subset.
  """

  inner: optax.OptState
  nu: Any


def scale_by_subset_norm(
  inner: optax.GradientTransformation,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-6,
  subset: str | int = 'heuristic',
  reduction: str = 'sum',
  axes: Any | Callable[[Any], Any] | None = None,
  state_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Divide what another transformation makes of G by norms of subsets of G.

  .. math::
    v_s \leftarrow b_2 v_s + (1-b_2) \sum_{i \in s} G_i^2, \qquad
    U_i = \frac{\mathrm{inner}(G)_i}{\sqrt{v_{s(i)}} + \epsilon}

  There is no bias correction (`correct_bias`). An m x n matrix has
  :math:`\max(m, n)` second moments by the heuristic, and :math:`mn/k` with
  subsets of k entries. The subsets of a matrix in a stack are its own. What is
  left whole (vectors, and the leaves for which `axes` has None) has a second
  moment for each entry. Along a sharded axis the sums are reductions of the
  second moments' size.

  Args:
    inner: makes the numerator.
    b2: decay of the second moment; 1 accumulates, :math:`v_s \leftarrow v_s +
      \sum G_i^2`.
    eps: added to the root of the second moment.
    subset: 'heuristic' sums over the shorter side of a matrix (over the rows of
      a square kernel (in, out), so that each output has its own). An int k
      above 0 takes runs of k entries in the order of the transposed, (out, in)
      kernel, k being reduced to a divisor of the number of entries; below 0 the
      k is :math:`\lfloor \sqrt{mn} / |k| \rfloor`, reduced alike. Runs that
      divide the input side are summed in place; others move entries, which
      costs communication when the matrix is sharded.
    reduction: 'sum' as published, or 'mean', with which the size of steps does
      not depend on that of subsets.
    axes: which axes form the matrices, see `low_rank`.
    state_dtype: dtype of the second moments; None takes the parameters'. They
      are updated in float32 and rounded once.

  Returns:
    An optax.GradientTransformationExtraArgs. Parameters and extra arguments of
    update are passed on to `inner`.

  Raises:
    ValueError: a subset that is neither 'heuristic' nor an int other than 0, an
      unknown reduction, axes that do not fit.

  Examples:
    Normalised gradients, one norm for each column:

    >>> tx = scale_by_subset_norm(optax.identity(), b2=0.0)
    >>> g = jnp.array([[3., 1.], [4., 0.]])
    >>> print(tx.update(g, tx.init(g))[0].round(3))
    [[0.6 1. ]
     [0.8 0. ]]
  """
  _check_subset(subset)
  if reduction not in REDUCTIONS:
    raise names.unknown('reduction', reduction, REDUCTIONS)
  inner = optax.with_extra_args_support(inner)

  def find(tree):
    return [
      None if spec is None else (spec, _subsets(x.shape, spec, subset))
      for x, spec in zip(
        jax.tree.leaves(tree), resolve(tree, axes), strict=True
      )
    ]

  def init_fn(params):
    leaves, treedef = jax.tree.flatten(params)
    return SubsetNormState(
      inner.init(params),
      treedef.unflatten(
        jnp.zeros(
          x.shape if at is None else at[1].state, state_dtype or x.dtype
        )
        for x, at in zip(leaves, find(params), strict=True)
      ),
    )

  def update_fn(updates, state, params=None, **extra_args):
    grads, treedef = jax.tree.flatten(updates)
    numerators, inner_state = inner.update(
      updates, state.inner, params, **extra_args
    )
    gain = jnp.where(b2 == 1, 1.0, 1 - b2)

    def one(g, u, nu, at):
      if at is None:
        v = b2 * wide(nu) + gain * jnp.square(wide(g))
        u = wide(u) / (jnp.sqrt(v) + eps)
      else:
        spec, subsets = at
        entries = subsets.view(as_matrix(g, spec))
        size = entries.shape[subsets.axis] if reduction == 'mean' else 1
        new = _sums_of_squares(entries, subsets.axis)
        v = b2 * wide(nu) + gain / size * new
        root = jnp.expand_dims(jnp.sqrt(v) + eps, subsets.axis)
        u = wide(subsets.view(as_matrix(u, spec))) / root
        u = from_matrix(subsets.undo(u), spec, g.shape)
      return u.astype(g.dtype), v.astype(nu.dtype)

    found = [
      one(*each)
      for each in zip(
        grads,
        treedef.flatten_up_to(numerators),
        treedef.flatten_up_to(state.nu),
        find(updates),
        strict=True,
      )
    ]
    return treedef.unflatten(u for u, _ in found), SubsetNormState(
      inner_state, treedef.unflatten(v for _, v in found)
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Subsets(NamedTuple):
  """How the entries of matrices (*batch, m, n) are divided.

  Attributes:
    matrix: the shape (*batch, m, n).
    turned: whether the view is one of the transposed matrices.
    shape: of the view, one axis of which runs through a subset.
    axis: that axis, counted from the end.
  """

  matrix: tuple[int, ...]
  turned: bool
  shape: tuple[int, ...]
  axis: int

  @property
  def state(self):
    at = len(self.shape) + self.axis
    return self.shape[:at] + self.shape[at + 1 :]

  def view(self, x):
    return (x.mT if self.turned else x).reshape(self.shape)

  def undo(self, x):
    *batch, m, n = self.matrix
    return x.reshape(*batch, n, m).mT if self.turned else x.reshape(self.matrix)


def _subsets(shape, spec, subset):
  shape = matrix_shape(shape, spec)
  *batch, m, n = shape
  if subset == 'heuristic':
    return _Subsets(shape, False, shape, -2 if m <= n else -1)
  size = subset if subset > 0 else math.isqrt(m * n // subset**2)
  small = [k for k in range(1, math.isqrt(m * n) + 1) if m * n % k == 0]
  divisors = {*small, *(m * n // k for k in small)}
  size = max(k for k in divisors if k <= max(size, 1))
  if m % size == 0:
    return _Subsets(shape, False, (*batch, m // size, size, n), -2)
  return _Subsets(shape, True, (*batch, m * n // size, size), -1)


def _sums_of_squares(x, axis):
  """Over one axis, -1 or -2, in at least float32."""
  *batch, m, n = x.shape
  blocks = math.gcd(m, 8)

  def plain(x):
    return jnp.sum(jnp.square(wide(x)), axis=axis)

  def row_by_row(x):
    # Blocks of rows side by side, so that rows may be sharded.
    x = x.reshape(*batch, blocks, m // blocks, n)

    def add(i, sums):
      row = jax.lax.dynamic_index_in_dim(x, i, axis=-2, keepdims=False)
      return sums + jnp.square(wide(row))

    sums = jnp.zeros((*batch, blocks, n), jnp.promote_types(x.dtype, 'float32'))
    sums = jax.lax.fori_loop(0, m // blocks, add, sums)
    return jnp.sum(sums, axis=-2)

  if axis == -1 or n < _LONG_ROW:
    return plain(x)
  # XLA goes down one column after the other: on CPUs, with rows of many pages,
  # every entry of a head would be a miss.
  return jax.lax.platform_dependent(x, cpu=row_by_row, default=plain)


def _check_subset(subset):
  if isinstance(subset, str):
    if subset != 'heuristic':
      raise names.unknown('subset', subset, ('heuristic',))
  elif isinstance(subset, jax.Array):
    raise ValueError(
      f'subset is fixed when the program is compiled, not {subset}: under '
      'optax.inject_hyperparams name it in static_args'
    )
  elif not isinstance(subset, numbers.Integral) or subset == 0:
    raise ValueError(
      f"subset={subset!r}: give 'heuristic', a number of entries that share a "
      'second moment, or a negative int -k for the root of all entries over k'
    )
