"""Which axes of a parameter form its matrix, and which are batch axes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Logical axes along which independent matrices are stacked.
BATCH_NAMES = frozenset({'layers', 'experts'})
# The residual stream: every kernel of the model reads from it or writes to it.
RESIDUAL_NAME = 'embed'


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
  r"""The axes of an array that form the rows and the columns of a matrix.

  All axes that are in neither tuple are batch axes: the array is a stack of
  matrices. With shape :math:`s`, each has :math:`m=\prod_{i\in rows}s_i` rows
  and :math:`n=\prod_{j\in cols}s_j` columns. Kernels are (in, out), so rows are
  the input side.

  A MatrixAxes is one leaf of a pytree, never a node.

  Args:
    rows: axes of the row index, slowest first; negative axes count from the
      end.
    cols: axes of the column index.

  Raises:
    ValueError: `rows` or `cols` is empty or no tuple of ints.

  Examples:
    A stack of attention kernels (layers, embed, heads, head_dim):

    >>> axes = MatrixAxes(rows=(1,), cols=(2, 3))
    >>> as_matrix(jnp.zeros((4, 16, 2, 8)), axes).shape
    (4, 16, 16)
  """

  rows: tuple[int, ...]
  cols: tuple[int, ...]

  def __post_init__(self):
    for name in ('rows', 'cols'):
      value = getattr(self, name)
      value = (value,) if isinstance(value, int) else tuple(value)
      if not value or not all(isinstance(axis, int) for axis in value):
        raise ValueError(
          f'MatrixAxes {name}={value!r}: give at least one axis number; a leaf '
          'that is no matrix gets None instead of a MatrixAxes'
        )
      object.__setattr__(self, name, value)

  @classmethod
  def from_names(cls, names: tuple[str | None, ...]) -> 'MatrixAxes | None':
    """The matrix of a parameter, from the logical names of its axes.

    'layers' and 'experts' are batch axes. The others are split at the residual
    axis 'embed', which is one whole side: what comes before or after it is the
    other side.

    Args:
      names: one logical name an axis.

    Returns:
      The axes, or None for scalars and (stacks of) vectors.

    Raises:
      ValueError: there are two or more axes besides the batch axes, and
        'embed' is not exactly the first or the last of them.

    Examples:
      >>> MatrixAxes.from_names(('layers', 'embed', 'heads', 'head_dim'))
      MatrixAxes(rows=(1,), cols=(2, 3))
      >>> MatrixAxes.from_names(('layers', 'heads', 'head_dim', 'embed'))
      MatrixAxes(rows=(1, 2), cols=(3,))
      >>> MatrixAxes.from_names(('layers', 'norm')) is None
      True
    """
    axes = tuple(i for i, name in enumerate(names) if name not in BATCH_NAMES)
    if len(axes) < 2:
      return None
    if [names[i] for i in axes].count(RESIDUAL_NAME) == 1:
      if names[axes[0]] == RESIDUAL_NAME:
        return cls(rows=axes[:1], cols=axes[1:])
      if names[axes[-1]] == RESIDUAL_NAME:
        return cls(rows=axes[:-1], cols=axes[-1:])
    raise ValueError(
      f'axis names {names!r} do not say where the matrix splits: besides the '
      f'batch axes {sorted(BATCH_NAMES)} the first or the last axis, and no '
      f'other, should be {RESIDUAL_NAME!r}; write MatrixAxes(rows=..., '
      'cols=...) for this parameter, or None to leave it whole'
    )


def matrix_axes(names: Any, whole: tuple[str, ...] = ()) -> Any:
  """The `axes` of a model, from the logical names of its parameters' axes.

  Args:
    names: a tree whose leaves are tuples of logical axis names.
    whole: parameters with one of these names are left whole. The published
      recipes leave the embedding and the head to plain Adam: `('vocab',)`.

  Returns:
    The same tree with a MatrixAxes, or None, for each tuple.

  Raises:
    ValueError: as `MatrixAxes.from_names`, with the parameter's path.

  Examples:
    >>> matrix_axes({'up': ('embed', 'mlp'), 'norm': ('norm',)})
    {'norm': None, 'up': MatrixAxes(rows=(0,), cols=(1,))}
    >>> matrix_axes({'head': ('embed', 'vocab')}, whole=('vocab',))
    {'head': None}
  """

  def one(path, leaf):
    if not set(whole).isdisjoint(leaf):
      return None
    try:
      return MatrixAxes.from_names(leaf)
    except ValueError as error:
      raise ValueError(f'{path_name(path)}: {error}') from None

  return jax.tree.map_with_path(one, names, is_leaf=_is_names)


def as_matrix(x: jax.Array, axes: MatrixAxes) -> jax.Array:
  """View an array as a stack of matrices.

  Args:
    x: any array.
    axes: which of its axes form the matrix.

  Returns:
    An array (*batch, m, n); the batch axes keep their order.

  Raises:
    ValueError: `axes` does not fit the array's shape.

  Examples:
    >>> as_matrix(jnp.zeros((2, 3, 4, 5)), MatrixAxes((-1,), (1, 2))).shape
    (2, 5, 12)
  """
  shape, order = _canonical(x.shape, axes)
  return jnp.transpose(x, order).reshape(shape)


def from_matrix(
  y: jax.Array, axes: MatrixAxes, shape: tuple[int, ...]
) -> jax.Array:
  """Undo `as_matrix`.

  Args:
    y: an array (*batch, m, n).
    axes: the axes that `as_matrix` was called with.
    shape: the shape of the array that `as_matrix` was called with.

  Returns:
    An array of that shape.

  Raises:
    ValueError: `axes` does not fit the shape.

  Examples:
    >>> x, axes = jnp.arange(24).reshape(2, 3, 4), MatrixAxes((2,), (0, 1))
    >>> bool((from_matrix(as_matrix(x, axes), axes, x.shape) == x).all())
    True
  """
  _, order = _canonical(shape, axes)
  inverse = sorted(range(len(order)), key=order.__getitem__)
  return jnp.transpose(y.reshape([shape[i] for i in order]), inverse)


def matrix_shape(shape: tuple[int, ...], axes: MatrixAxes) -> tuple[int, ...]:
  """The shape (*batch, m, n) that `as_matrix` gives."""
  return _canonical(shape, axes)[0]


def _canonical(shape, axes):
  """The shape (*batch, m, n) and the transposition that leads to it."""
  ndim = len(shape)
  for axis in axes.rows + axes.cols:
    if not -ndim <= axis < ndim:
      raise ValueError(
        f'{axes} names axis {axis}, but the shape is {tuple(shape)}: use axes '
        f'from {-ndim} to {ndim - 1}'
        if ndim
        else f'{axes} on a scalar: use None to leave it whole'
      )
  rows = tuple(axis % ndim for axis in axes.rows)
  cols = tuple(axis % ndim for axis in axes.cols)
  if len({*rows, *cols}) < len(rows) + len(cols):
    raise ValueError(
      f'{axes} uses an axis twice for shape {tuple(shape)}: each axis belongs '
      'to the rows, to the columns or, if in neither, to the batch'
    )
  batch = tuple(i for i in range(ndim) if i not in rows + cols)
  m, n = (math.prod(shape[i] for i in group) for group in (rows, cols))
  return (*(shape[i] for i in batch), m, n), batch + rows + cols


def resolve(
  tree: Any, axes: Any | Callable[[Any], Any] | None
) -> list[MatrixAxes | None]:
  """One entry for each array of `tree`: its matrix axes, or None.

  Args:
    tree: arrays or ShapeDtypeStructs; optax.MaskedNode leaves are passed over.
    axes: None, a tree of the same structure, or a function from the tree to
      such a tree. Its leaves are MatrixAxes, optax's GaLoreDimensionNumbers or
      MuonDimensionNumbers, or None to leave that array whole; so does a tuple
      of logical axis names, which `layer_axes` understands. With `axes=None`
      2-D arrays are matrices and 0-D and 1-D arrays are left whole.

  Returns:
    A list in the order of `jax.tree.leaves(tree)`.

  Raises:
    ValueError: an n-D array without axes, axes that do not fit the array or
      the tree, or a leaf of another type; the message names the leaf.
  """
  leaves, treedef = jax.tree.flatten_with_path(tree, is_leaf=_masked)
  if all(_masked(leaf) for _, leaf in leaves):
    return []
  if axes is None:
    specs = [_default(path, leaf) for path, leaf in leaves]
  else:
    axes = axes(tree) if callable(axes) else axes
    try:
      specs = treedef.flatten_up_to(axes)
    except (ValueError, TypeError) as error:
      raise ValueError(
        'axes must be a tree of the same structure as the parameters (with '
        f'None for the leaves left whole), or a function that makes it: {error}'
      ) from None
  return [
    _check(path, leaf, spec)
    for (path, leaf), spec in zip(leaves, specs, strict=True)
    if not _masked(leaf)
  ]


def layer_axes(
  tree: Any, axes: Any | Callable[[Any], Any] | None
) -> list[tuple[int, ...]]:
  """The axes of each array that belong to one layer, all but the batch axes.

  For what measures whole arrays and should measure each layer of a stack.

  Args:
    tree: arrays or ShapeDtypeStructs.
    axes: as in `resolve`. A leaf without matrix axes is one layer; one whose
      logical axis names are given has 'layers' and 'experts' as batch axes,
      which is how stacks of vectors are told.

  Returns:
    A list in the order of `jax.tree.leaves(tree)`.

  Raises:
    ValueError: as `resolve`, or names that do not fit the array.

  Examples:
    >>> params = {'w': jnp.zeros((3, 4, 5)), 'norm': jnp.zeros((3, 4))}
    >>> layer_axes(params, {
    ...   'w': MatrixAxes((1,), (2,)), 'norm': ('layers', 'norm')})
    [(1,), (1, 2)]
  """
  axes = axes(tree) if callable(axes) else axes
  specs = iter(resolve(tree, axes))
  leaves, treedef = jax.tree.flatten_with_path(tree, is_leaf=_masked)
  given = [None] * len(leaves) if axes is None else treedef.flatten_up_to(axes)
  found = []
  for (path, x), own in zip(leaves, given, strict=True):
    if _masked(x):
      continue
    spec, batch = next(specs), set()
    if spec is not None:
      batch = set(range(x.ndim)) - {i % x.ndim for i in spec.rows + spec.cols}
    elif _is_names(own) and not _masked(own):
      if len(own) != x.ndim:
        raise ValueError(
          f'{path_name(path)} is {tuple(x.shape)}, but the names of its axes '
          f'are {own}: give one name an axis'
        )
      batch = {i for i, name in enumerate(own) if name in BATCH_NAMES}
    found.append(tuple(i for i in range(x.ndim) if i not in batch))
  return found


def handed_on(axes: Any | Callable[[Any], Any] | None) -> Callable[[Any], Any]:
  """The axes of what `low_rank` hands to the transformation that it wraps.

  Its matrices lie in the last two axes. Arrays that it leaves whole keep the
  names of theirs, by which a stack of vectors is told from a matrix.

  Args:
    axes: as `low_rank` has them.

  Returns:
    A function from the tree that is handed on to its axes.

  Examples:
    >>> axes = handed_on({'w': MatrixAxes((0,), (2,)), 'norm': ('layers', 'd')})
    >>> axes({'w': jnp.zeros((3, 4, 5)), 'norm': jnp.zeros((3, 4))})
    {'norm': ('layers', 'd'), 'w': MatrixAxes(rows=(-2,), cols=(-1,))}
  """

  def of(tree):
    own = axes(tree) if callable(axes) else axes
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_masked)
    given = [None] * len(leaves) if own is None else treedef.flatten_up_to(own)
    matrix = MatrixAxes((-2,), (-1,))
    found = [
      a if _is_names(a) or _masked(x) else matrix if x.ndim > 1 else None
      for x, a in zip(leaves, given, strict=True)
    ]
    return treedef.unflatten(found)

  return of


def _default(path, leaf):
  if _masked(leaf) or leaf.ndim < 2:
    return None
  if leaf.ndim == 2:
    return MatrixAxes((0,), (1,))
  raise ValueError(
    f'{path_name(path)} has {leaf.ndim} axes, {tuple(leaf.shape)}: say which '
    'form its matrix, axes={..., MatrixAxes(rows=(...), cols=(...))}, all '
    'others being batch axes; or None for this leaf to leave it whole; or '
    'derive all of them from logical axis names with matrix_axes(names)'
  )


def _check(path, leaf, spec):
  """A leaf's axes in our type, tried on the leaf's shape."""
  dimension_numbers = (
    optax.contrib.GaLoreDimensionNumbers,
    optax.contrib.MuonDimensionNumbers,
  )
  if isinstance(spec, dimension_numbers):
    spec = MatrixAxes(spec.reduction_axis, spec.output_axis)
  if spec is None or _masked(spec) or _is_names(spec) or 0 in leaf.shape:
    return None
  if not isinstance(spec, MatrixAxes):
    raise ValueError(
      f'axes for {path_name(path)} are {spec!r}: give MatrixAxes(rows=..., '
      "cols=...), optax's dimension numbers, or None to leave it whole"
    )
  try:
    _canonical(leaf.shape, spec)
  except ValueError as error:
    raise ValueError(f'{path_name(path)}: {error}') from None
  return spec


def path_name(path: tuple[Any, ...]) -> str:
  """A leaf's path as a reader writes it: 'layers/wq'."""
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  return name or 'the parameter'


def _masked(x):
  return isinstance(x, optax.MaskedNode)


def _is_names(x):
  return isinstance(x, tuple) and all(
    name is None or isinstance(name, str) for name in x
  )
