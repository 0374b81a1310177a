"""How the arrays of a linear layer are cut over the devices of a mesh.

A cut is a tuple of mesh axes for each axis of an array, as the entries of a
`PartitionSpec` are.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

Axes = tuple[str, ...]


class Layout(Protocol):
  """What is asked of a mesh and its rules: `frugax.train.mesh.Layout` is one.

  Attributes:
    mesh: the mesh.
  """

  mesh: Mesh

  def spec(self, names, shape) -> PartitionSpec:
    """The partition of an array whose axes have these names."""

  def whole(self, names, shape) -> PartitionSpec:
    """That of weights as products have them, cut for more than storage."""

  def gather(self, x: jax.Array, names) -> jax.Array:
    """Weights, or codes of them, with the partition `whole`."""


@dataclasses.dataclass(frozen=True)
class Cut:
  """The names of a linear layer's axes, and what a mesh makes of names.

  Args:
    layout: the mesh and its rules.
    rows: of each axis of the activations that is neither contracted nor
      stacked.
    weights: of each axis of the weights.
  """

  layout: Layout
  rows: tuple[str | None, ...]
  weights: tuple[str | None, ...]

  def gather(self, codes: jax.Array, axes: Sequence[int | None]) -> jax.Array:
    """Codes of the weights as products have them.

    Args:
      codes: of weights that are rounded where they lie.
      axes: of each axis of the codes, which of the weights' axes it is made of:
        the first, of several; None for none.
    """
    names = [None if i is None else self.weights[i] for i in axes]
    return self.layout.gather(codes, names)

  def parts(
    self,
    rows: Sequence[int],
    weights: Sequence[int],
    axes: tuple[Axes, Axes, Axes],
  ) -> 'Parts | None':
    """How a layer's arrays are cut, None where they are not.

    Args:
      rows: sizes of the axes that `self.rows` names.
      weights: the shape of the weights.
      axes: of the weights, those stacked, kept and contracted.
    """
    layout = self.layout
    if layout.mesh.size == 1:
      return None
    left = _entries(layout.spec(self.rows, rows))
    whole = _entries(layout.whole(self.weights, weights))
    stored = _entries(layout.spec(self.weights, weights))
    stacked, kept, contracted = axes
    column = [whole[i] for i in contracted]
    used = [a for entry in (*left, *whole) for a in entry]
    if len(set(used)) < len(used) or not _one(column):
      return None
    # Where a part of the weights' axes cannot be told from the stored ones,
    # gradients are whole along them.
    scattered = [() if w else s for w, s in zip(whole, stored, strict=True)]
    return Parts(
      layout.mesh,
      *(tuple(whole[i] for i in group) for group in (stacked, kept)),
      _merged(column),
      left,
      tuple(scattered[i] for i in kept),
      scattered[contracted[0]] if _one([stored[i] for i in contracted]) else (),
    )


class Parts(NamedTuple):
  """The cuts of a layer's arrays.

  Attributes:
    mesh: the mesh.
    stacked: of the axes over which matrices are stacked.
    units: of the weights' kept axes.
    column: of the contracted axes, as one.
    rows: of the activations' kept axes.
    stored_units: how the weights, and their gradients, are cut further along
      the units.
    stored_column: likewise, along the contracted axes.
  """

  mesh: Mesh
  stacked: tuple[Axes, ...]
  units: tuple[Axes, ...]
  column: Axes
  rows: tuple[Axes, ...]
  stored_units: tuple[Axes, ...]
  stored_column: Axes

  def forward(self) -> 'Split | None':
    """Rows by units."""
    return self._split(self.rows, self.units, [self.column])

  def input_grad(self, along_rows: bool) -> 'Split | None':
    """Rows, or all of them as one axis, by columns."""
    rows = self.rows
    if along_rows:
      if not _one(rows):
        return None
      rows = (_merged(rows),)
    return self._split(rows, (self.column,), self.units)

  def weight_grad(self) -> 'Split | None':
    """Units by columns, cut in the end as the weights are stored."""
    return self._split(
      self.units,
      (self.column,),
      self.rows,
      (*self.stored_units, self.stored_column),
    )

  def _split(self, left, right, contracted, scattered=None):
    if not _one(contracted):
      return None
    contracted = _merged(contracted)
    scattered = scattered or [()] * len(left + right)
    scattered = tuple(s if set(s) <= set(contracted) else () for s in scattered)
    return Split(self.mesh, self.stacked, left, right, contracted, scattered)


class Split(NamedTuple):
  """The cuts of a product's operands and of its result.

  Attributes:
    mesh: the mesh.
    stacked: of the axes over which matrices are stacked.
    left: of the kept axes of the left operand, and of the result.
    right: likewise, of the right one.
    contracted: of the contracted axis: sums run over these mesh axes.
    scattered: of each kept axis of the result, over which of these the sums are
      cut, too.
  """

  mesh: Mesh
  stacked: tuple[Axes, ...]
  left: tuple[Axes, ...]
  right: tuple[Axes, ...]
  contracted: Axes
  scattered: tuple[Axes, ...]

  def swapped(self) -> 'Split':
    """That of the right operand by the left one."""
    n = len(self.left)
    scattered = self.scattered[n:] + self.scattered[:n]
    return self._replace(left=self.right, right=self.left, scattered=scattered)

  def operand(self, x: jax.Array, side: str) -> PartitionSpec:
    """Of codes, or of scales, whose axes of size 1 are whole."""
    entries = (*self.stacked, *getattr(self, side), self.contracted)
    return PartitionSpec(
      *(e if n > 1 else () for e, n in zip(entries, x.shape, strict=True))
    )

  def result(self) -> PartitionSpec:
    kept = zip(self.left + self.right, self.scattered, strict=True)
    return PartitionSpec(*self.stacked, *(k or s for k, s in kept))

  def sum(self, y: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Of all devices' parts of the sums; they travel in `dtype`."""
    if not self.contracted:
      return y
    y, left = y.astype(dtype), list(self.contracted)
    for i, axes in enumerate(self.scattered, len(self.stacked)):
      if axes:
        # As a matrix, of which XLA transposes none.
        rest = y.shape[i + 1 :]
        y = y.reshape(*y.shape[: i + 1], math.prod(rest))
        y = lax.psum_scatter(y, axes, scatter_dimension=i, tiled=True)
        y = y.reshape(*y.shape[: i + 1], *rest)
        left = [a for a in left if a not in axes]
    return lax.psum(y, tuple(left)) if left else y


def over_devices(
  splits: Sequence[Split],
  products: Callable,
  dtype: jax.typing.DTypeLike,
  left: Sequence[jax.Array],
  rights: Sequence[Sequence[jax.Array]],
) -> list[jax.Array]:
  """Products of one left operand with several, each device those of its parts.

  Args:
    splits: one for each right operand, of one left operand and mesh.
    products: (left, rights) -> a list of products.
    dtype: in which sums over devices are sent.
    left: codes and what else there is of the left operand, such as scales.
    rights: likewise, of each right operand.

  Returns:
    The products.
  """

  def local(left, rights):
    ys = products(left, rights)
    return [s.sum(y, dtype) for s, y in zip(splits, ys, strict=True)]

  return jax.shard_map(
    local,
    mesh=splits[0].mesh,
    in_specs=(
      [splits[0].operand(x, 'left') for x in left],
      [
        [split.operand(x, 'right') for x in right]
        for split, right in zip(splits, rights, strict=True)
      ],
    ),
    out_specs=[split.result() for split in splits],
    check_vma=False,
  )(left, rights)


def _entries(spec):
  """Tuples, as many as the spec has entries."""
  return tuple(
    () if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec
  )


def _one(entries):
  """Whether axes, as one, are cut into parts that follow each other."""
  return not any(entries[1:])


def _merged(entries):
  return entries[0] if entries else ()
