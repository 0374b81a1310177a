"""What is static about each leaf of a tree whose matrices are projected."""

import numbers
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frugax.optim.adam import wide
from frugax.optim.axes import MatrixAxes, as_matrix, matrix_shape, path_name
from frugax.optim.moments import Turn
from frugax.optim.projection import Projector, projects_rows


class Leaf(NamedTuple):
  """One parameter; axes and projector are None if it is left whole.

  Attributes:
    path: its path in the tree.
    shape: its shape, not as a matrix.
    axes: which of its axes form the matrix.
    rows: whether the projection takes the place of the row axis; None if of
      both.
    projector: the projector bound to its shape.
    layers: how many items are refreshed on their own.
    stacked: whether they lie along a leading axis, of the gradient as matrices
      as of the projector's state.
    layer: the projector of one item.
    small_shape: the shape of the small matrices.
  """

  path: tuple[Any, ...]
  shape: tuple[int, ...]
  axes: MatrixAxes | None
  rows: bool | None = True
  projector: Projector | None = None
  layers: int = 1
  stacked: bool = False
  layer: Projector | None = None
  small_shape: tuple[int, ...] | None = None

  @property
  def axis(self) -> int | tuple[int, int]:
    """What is projected: an axis of the matrices, or both."""
    return (-2, -1) if self.rows is None else -2 if self.rows else -1

  def hash(self) -> int:
    """A number of its path, the same on every host."""
    return zlib.crc32(path_name(self.path).encode())

  def matrix(self, x, carried=None):
    """An array as matrices, plus what is carried over from the last update."""
    if self.axes is None:
      return x
    x = as_matrix(x, self.axes)
    return x if carried is None else wide(x) + wide(carried)

  def small(self, x, state):
    """The projection of matrices; an array that is left whole stays."""
    if self.axes is None:
      return x
    return self.projector.project(x, state).astype(x.dtype)

  def back(self, state):
    """The function from small matrices to full ones."""
    return lambda r: self.projector.back(r, state)

  def turns(self, projector, old, new, steps):
    """The changes of basis from one projector state to another, by side."""
    old, new = projector.basis(old), projector.basis(new)
    if self.rows is not None:
      return (Turn(old, new, steps, self.rows),)
    return tuple(map(Turn, old, new, (steps, steps), (True, False)))


def describe(
  tree: Any,
  specs: list[MatrixAxes | None],
  build: Callable[[tuple[int, ...], Any], Projector],
  side: str,
) -> tuple[list[jax.Array], Any, list[Leaf]]:
  """The arrays of a tree, its structure and what is static about each array.

  Args:
    tree: parameters or gradients.
    specs: the matrix axes of each array, see `frugax.optim.axes.resolve`.
    build: `(shape, dtype) -> Projector` for a leaf as matrices.
    side: which side is projected.

  Returns:
    Arrays, tree structure and leaves.

  Raises:
    ValueError: an array that is not floating-point.
  """
  found, treedef = jax.tree.flatten_with_path(tree)
  leaves = []
  for (path, x), spec in zip(found, specs, strict=True):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f'{path_name(path)} is {x.dtype}: low_rank takes floating-point '
        'leaves; hide the others from it with optax.masked'
      )
    leaf = Leaf(path, x.shape, spec)
    if spec is not None:
      shape = matrix_shape(x.shape, spec)
      projector = build(shape, x.dtype)
      leaf = leaf._replace(
        rows=None if side == 'both' else projects_rows(*shape[-2:], side),
        projector=projector,
        layer=projector,
      )
      if _stacks(build, shape, x.dtype):
        leaf = leaf._replace(
          layers=shape[0], stacked=True, layer=build(shape[1:], x.dtype)
        )
      small = jax.eval_shape(
        lambda x, leaf=leaf: leaf.small(leaf.matrix(x), leaf.projector.init()),
        x,
      )
      leaf = leaf._replace(small_shape=small.shape)
    leaves.append(leaf)
  return [x for _, x in found], treedef, leaves


def _stacks(build, shape, dtype):
  """Whether a stack's projector state has an item for each of its layers.

  A random key, or anything that all layers share, does not grow with them.
  """
  if len(shape) < 3:
    return False
  height, *rest = shape
  low, high = (
    jax.eval_shape(build((h, *rest), dtype).init) for h in (height, height + 1)
  )
  return jax.tree.all(
    jax.tree.map(
      lambda a, b: a.shape == (height, *b.shape[1:]) and a.shape != b.shape,
      low,
      high,
    )
  )


def check_bases(leaves: list[Leaf], moments: Any, refresh: Any) -> None:
  """Refuse projectors without a basis where something turns with it."""
  for leaf in leaves:
    if leaf.axes and leaf.projector.basis is None:
      raise ValueError(
        f'the projector of {path_name(leaf.path)} does not give its basis '
        f'(Projector.basis), which '
        f'moments={moments!r} with refresh={refresh!r} needs: '
        "use moments='keep' or 'reset' and refresh='together' or 'staggered'"
      )


def check_positive(name: str, value: Any, otherwise: str = '') -> None:
  """Refuse what is no int of at least 1, traced numbers included.

  Args:
    name: of the argument.
    value: what was given.
    otherwise: what else the caller takes, as the message goes on.
  """
  if isinstance(value, jax.Array):
    raise ValueError(
      f'{name} is fixed when the program is compiled, so it must be a Python '
      f'int, not {value}: under optax.inject_hyperparams name it in static_args'
    )
  if not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(f'{name}={value!r}: give an int of at least 1{otherwise}')


def seed(key: jax.Array | int) -> jax.Array:
  """A key of jax's default kind, from a seed or from a key of any kind."""
  if isinstance(key, jax.Array) and (
    key.ndim or not jnp.issubdtype(key.dtype, jnp.integer)
  ):
    key = jax.random.bits(key, dtype=jnp.uint32)
  return jax.random.key(key)
