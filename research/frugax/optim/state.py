"""What an optimizer's state costs, and where on the mesh it should live."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from frugax.quant import Blocks, Coded


def state_bytes(
  tx: optax.GradientTransformation, params: Any
) -> dict[str, int]:
  """Bytes of an optimizer's state by category, without allocating it.

  A leaf's bytes are its number of elements times the size of its dtype, so
  packed formats count as they are packed, padding and scales included, and a
  4-bit integer dtype counts as the whole byte it fills when it is not packed.
  Its category is the first that fits:

  - projector: below a field named `projectors` (or `projector`, as in optax);
  - gradients: below `acc_grads`, the accumulator of optax.MultiSteps;
  - moments: belongs to one parameter, whose path is part of the leaf's path;
  - counters: integer scalars, and what a schedule of refreshes remembers;
  - other: the rest, such as injected hyperparameters and random keys.

  Args:
    tx: any optax transformation.
    params: arrays or ShapeDtypeStructs.

  Returns:
    The bytes of the five categories and their 'total'.

  Examples:
    >>> params = {'w': jnp.zeros((64, 256), jnp.bfloat16)}
    >>> state_bytes(optax.adam(1e-3), params)['moments'] == 2 * 2 * 64 * 256
    True
    >>> from frugax.optim import galore
    >>> sizes = state_bytes(galore(1e-3, rank=16), params)
    >>> sizes['projector'] == 2 * 64 * 16, sizes['moments'] == 2 * 2 * 16 * 256
    (True, True)
  """
  sizes = dict.fromkeys(
    ('projector', 'gradients', 'moments', 'counters', 'other', 'total'), 0
  )
  state = jax.eval_shape(tx.init, params)
  categories = state_categories(state, params)
  for leaf, category in zip(jax.tree.leaves(state), categories, strict=True):
    sizes[category] += _bytes(leaf)
    sizes['total'] += _bytes(leaf)
  return sizes


def state_categories(state: Any, params: Any) -> list[str]:
  """The category of each leaf of an optimizer's state, see `state_bytes`.

  Args:
    state: real or abstract.
    params: arrays or ShapeDtypeStructs.

  Returns:
    The names, in the order of `jax.tree.leaves(state)`.

  Examples:
    >>> params = {'w': jnp.zeros((64, 256))}
    >>> state_categories(optax.adam(1e-3).init(params), params)
    ['counters', 'moments', 'moments']
  """
  paths, found = _Paths(params), []
  for path, leaf in jax.tree.leaves_with_path(state):
    fields = {getattr(key, 'name', None) for key in path}
    if fields & {'projectors', 'projector'}:
      found.append('projector')
    elif 'acc_grads' in fields:
      found.append('gradients')
    elif 'refreshes' in fields or (
      leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
    ):
      found.append('counters')
    elif paths.find(path) is not None:
      found.append('moments')
    else:
      found.append('other')
  return found


def parameter_bytes(
  tx: optax.GradientTransformation, params: Any
) -> tuple[Any, int]:
  """Bytes of an optimizer's state by parameter, without allocating it.

  A state leaf, be it a moment or a projector, belongs to the parameter whose
  path is part of its own; its bytes are counted as in `state_bytes`.

  Args:
    tx: any optax transformation.
    params: arrays or ShapeDtypeStructs.

  Returns:
    A tree like `params` with the bytes of the state that belongs to each, and
    the bytes of what belongs to none, such as counters.

  Examples:
    >>> params = {'w': jnp.zeros((64, 256)), 'b': jnp.zeros(256)}
    >>> parameter_bytes(optax.adam(1e-3), params)
    ({'b': 2048, 'w': 131072}, 4)
  """
  leaves, treedef = jax.tree.flatten(params)
  paths, sizes, shared = _Paths(params), [0] * len(leaves), 0
  state = jax.eval_shape(tx.init, params)
  for path, leaf in jax.tree.leaves_with_path(state):
    index = paths.find(path)
    if index is None:
      shared += _bytes(leaf)
    else:
      sizes[index] += _bytes(leaf)
  return treedef.unflatten(sizes), shared


def _bytes(leaf):
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def state_shardings(
  tx_or_state: optax.GradientTransformation | Any, params: Any, shardings: Any
) -> Any:
  """Shardings for an optimizer's state, from those of the parameters.

  A state leaf belongs to the parameter whose path is part of its own path. Of
  the same shape as that parameter, it gets the same sharding. Otherwise its
  axes are matched in order with the parameter's: an axis of the size of a
  parameter's axis, or of several neighbouring ones flattened, gets their mesh
  axes if they divide it; one of another size, such as a rank, gets the mesh
  axes that no other took. So for a kernel (layers, embed, heads, head_dim)
  moments of shape (layers, rank, heads * head_dim) keep the mesh axes of layers
  and heads, and the rank takes those of embed. The packed codes of Blocks,
  whose items lie flat, are cut by all mesh axes that would cut an item, if they
  divide: where those are several, a projector should know of the mesh, see
  `frugax.optim.meshes`. A leaf that belongs to no parameter is replicated.

  Use it for `out_shardings` of a jitted `tx.init`, which by itself replicates
  what it allocates. Boxes that carry partition names must be taken off the
  parameters first.

  Args:
    tx_or_state: a transformation, or its state, real or abstract.
    params: arrays or ShapeDtypeStructs.
    shardings: a tree like `params` with NamedSharding leaves.

  Returns:
    A tree like the state with a NamedSharding for each leaf.

  Raises:
    ValueError: `params` is empty, or `shardings` is not a tree of NamedSharding
      like it.

  Examples:
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> params = {'w': jnp.zeros((64, 256))}
    >>> shardings = {'w': NamedSharding(mesh, PartitionSpec(None, 'fsdp'))}
    >>> from frugax.optim import low_rank
    >>> tx = low_rank(optax.scale_by_adam(), rank=16)
    >>> state = state_shardings(tx, params, shardings)
    >>> tuple(state.inner.mu['w'].spec), tuple(state.projectors['w'].spec)
    ((None, 'fsdp'), (None, 'fsdp'))
    >>> state = jax.jit(tx.init, out_shardings=state)(params)
  """
  state = tx_or_state
  if hasattr(state, 'init') and hasattr(state, 'update'):
    state = jax.eval_shape(state.init, params)
  leaves, treedef = jax.tree.flatten(params)
  found, found_treedef = jax.tree.flatten(shardings)
  if treedef != found_treedef or not all(
    isinstance(s, NamedSharding) for s in found
  ):
    raise ValueError(
      'shardings must be a tree of the same structure as params with '
      f'NamedSharding leaves; params: {treedef}; shardings: {shardings}'
    )
  if not leaves:
    raise ValueError('params is an empty tree: there is no mesh to shard on')
  paths = _Paths(params)
  replicated = NamedSharding(found[0].mesh, PartitionSpec())

  def one(path, leaf):
    index = paths.find(path)
    if index is None:
      return jax.tree.map(lambda _: replicated, leaf)
    shape, sharding = leaves[index].shape, found[index]
    if leaf.shape == shape and not _packed(leaf):
      return sharding
    spec = _derived_spec(leaf.shape, shape, sharding)
    if leaf.shape == shape:
      spec = sharding.spec  # Not to be read from sizes, which may repeat.

    def sharded(x):
      of_x = spec
      if isinstance(leaf, Coded):
        of_x = _coded_spec(x, leaf, spec, sharding.mesh)
      elif _packed(leaf):
        # Items lie flat: whatever cuts an item cuts its only axis.
        batch = leaf.data.ndim - 1
        of_x = PartitionSpec(*spec[:batch])
        axes = _mesh_axes(spec[batch:])
        if axes and x.shape[-1] % _size(sharding.mesh, axes) == 0:
          stack = (*of_x, *[None] * (batch - len(of_x)))
          of_x = PartitionSpec(*stack, _entry(axes))
      return NamedSharding(
        sharding.mesh, of_x, memory_kind=sharding.memory_kind
      )

    return jax.tree.map(sharded, leaf)

  return jax.tree.map_with_path(one, state, is_leaf=_packed)


def _packed(x):
  return isinstance(x, Coded | Blocks)


def _coded_spec(x, coded, spec, mesh):
  """The spec of the codes or of the scales of a Coded array with this spec."""
  ndim = len(coded.shape)
  spec = (*spec, *[None] * (ndim - len(spec)))
  # Of scales, an axis of rows or, the last one, of blocks.
  entry = spec[-1] if x.ndim == ndim else None
  shards = _size(mesh, [entry])
  if x is not coded.codes:
    shards *= coded.codec.block
  if coded.size % shards or x.shape[-1] % _size(mesh, [entry]):
    entry = None
  return PartitionSpec(*spec[: x.ndim - 1], entry)


def _size(mesh, entries):
  """Number of shards of an axis with these entries of a PartitionSpec."""
  return math.prod(mesh.shape[axis] for axis in _mesh_axes(entries))


def _mesh_axes(entries):
  """The mesh axes in entries of a PartitionSpec, flat."""
  axes = []
  for entry in entries:
    axes += entry if isinstance(entry, tuple) else [entry] if entry else []
  return axes


def _entry(axes):
  """An entry of a PartitionSpec: no mesh axes, one, or several."""
  return tuple(axes) if len(axes) > 1 else axes[0] if axes else None


class _Paths:
  """Finds the parameter that a state leaf belongs to."""

  def __init__(self, params):
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    self._index = {path: i for i, path in enumerate(paths)}
    self._lengths = sorted({len(path) for path in paths}, reverse=True)

  def find(self, path):
    """Index of the parameter whose path comes last in `path`, else None.

    What follows it are the parts of one parameter's state; what precedes it
    are wrappers, whose keys may look like a parameter (labels of a partition).
    """
    for end in range(len(path), -1, -1):
      for length in self._lengths:
        tail = path[end - length : end]
        if length <= end and tail in self._index:
          return self._index[tail]
    return None


def _derived_spec(shape, param_shape, sharding):
  """The spec of a state array whose shape differs from its parameter's."""
  spec = tuple(sharding.spec) + (None,) * (
    len(param_shape) - len(sharding.spec)
  )
  ranges = _align(tuple(shape), tuple(param_shape))
  entries = []
  for size, (start, stop) in zip(shape, ranges, strict=True):
    axes = _mesh_axes(spec[start:stop])
    usable = axes if size % _size(sharding.mesh, axes) == 0 else []
    entries.append(usable)
  # What cuts the side that a rank stands in for cuts the rank.
  taken = {axis for axes in entries for axis in axes}
  left = [axis for axis in _mesh_axes(spec) if axis not in taken]
  for i, (start, stop) in enumerate(ranges):
    if left and start == stop and shape[i] % _size(sharding.mesh, left) == 0:
      entries[i], left = left, []
  entries = [_entry(axes) for axes in entries]
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def _align(shape, param_shape):
  """For each axis of a state array the range of parameter axes it stems from.

  Both shapes are read from left to right. A state axis may equal a run of
  parameter axes (their product), stand in for a run (a rank for an input side;
  it stems from nothing, an empty range), or be new; a parameter axis may be
  reduced away. The reading with the most equal axes wins, and among those the
  one with the fewest new and reduced axes: in (rank, d) for a kernel
  (heads, head_dim, d) the d is the last axis, not heads * head_dim.
  """

  @functools.cache
  def best(i, j):
    """(equal axes, minus new and reduced axes, ranges) of shape[i:]."""
    if i == len(shape):
      return 0, j - len(param_shape), ()
    options = [_add(best(i + 1, j), 0, -1, (j, j))]
    if j < len(param_shape):
      options.append(_add(best(i, j + 1), 0, -1))
    for k in range(j + 1, len(param_shape) + 1):
      equal = shape[i] == math.prod(param_shape[j:k]) and shape[i] > 1
      run = (j, k) if equal else (j, j)
      options.append(_add(best(i + 1, k), int(equal), 0, run))
    return max(options, key=lambda option: option[:2])

  return best(0, 0)[2]


def _add(rest, equal, lost, run=None):
  return rest[0] + equal, rest[1] + lost, ((run, *rest[2]) if run else rest[2])
