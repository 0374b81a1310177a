"""One update with a state in few bits, of which little is decoded at a time."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from frugax.optim import leafwise
from frugax.optim.declared import by_layer, only_saves_work
from frugax.optim.meshes import lying_on, mesh_of
from frugax.quant.codecs import Codec, Coded, decode, encode
from frugax.quant.rounding import random_bits

# Elements that a CPU's cache holds in float32, several times.
_CACHED = 2**18
# Elements of which a CPU keeps the old state until the update is made.
_KEPT = 2**25
# A first axis that is longer than that is not one of layers.
_LAYERS = 128
# Elements of a part on an accelerator: a small share of its memory, and work
# for all of it. Rows of a part come in tiles, lest a layout is changed.
_CHIP = 2**21
_TILE = 32


class Spot(NamedTuple):
  """What is known of an array of the state, or of a gradient.

  Attributes:
    owner: the parameter that it belongs to, or `leafwise.SHARED`.
    codec: how it is stored; None if it is left as it is.
    batch_axes: number of leading axes that blocks and random bits respect.
    stack: whether its first axis is taken for one of layers.
    hash: a number of its path.
    given: whether it is not the state's, so that the caller may still use it.
  """

  owner: int = leafwise.SHARED
  codec: Codec | None = None
  batch_axes: int = 0
  stack: bool = False
  hash: int = 0
  given: bool = False

  @property
  def packed(self) -> bool:
    """Whether decoding takes more memory than what is stored."""
    return self.codec is not None and self.codec.format != 'f32'

  @property
  def random(self) -> bool:
    return self.codec is not None and self.codec.format == 'bf16_stochastic'

  def store(self, x, key, shape=None, rows=None):
    """Encode an array, or (start, size) rows of an array of that shape."""
    if self.codec is None:
      return x
    bits = None
    if self.random:
      own = jax.random.fold_in(key, self.hash)
      bits = random_bits(own, shape or x.shape, self.batch_axes, rows)
      bits = bits.reshape(x.shape)
    return encode(x, self.codec, self.batch_axes, bits)

  def load(self, x):
    """The inverse of `store`."""
    return x if self.codec is None else decode(x, self.codec.sqrt)


def run(
  function: Callable[..., list[jax.Array]],
  arrays: list[jax.Array | Coded],
  spots: list[Spot],
  mirrored: list[int],
  key: jax.Array | None,
) -> list[jax.Array | Coded]:
  """Decode the inputs of a function, and encode its outputs.

  If the function does not mix what belongs to different owners, this is done
  for one owner after the other; if it is elementwise, in parts besides: layers
  of a stack, on one device rows of other arrays, too, and on one CPU device
  what fits the cache. Otherwise all is decoded at once.

  Args:
    function: from the decoded inputs to a list of outputs.
    arrays: the inputs, stored.
    spots: what is known of them.
    mirrored: for each output the input that it takes the place of.
    key: for stochastic rounding, of this update.

  Returns:
    The outputs, stored.
  """
  owners = [spot.owner for spot in spots]
  outputs = {}
  for j, k in enumerate(mirrored):
    outputs.setdefault(owners[k], []).append(j)
  mesh = mesh_of(arrays)
  structs = [
    lying_on(mesh, jax.eval_shape(spot.load, x))
    for spot, x in zip(spots, arrays, strict=True)
  ]
  program = leafwise.Program(function, structs, owners)
  if not program.separates([owners[k] for k in mirrored]):
    new = function(*map(Spot.load, spots, arrays))
    return [spots[k].store(x, key) for k, x in zip(mirrored, new, strict=True)]

  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
  alone = all(mesh.size <= 1 for mesh in meshes)

  def divide(i, out, cached):
    rows = _rows(i, out, program, structs, spots, arrays)
    if not rows:
      return None
    own = [k for k, owner in enumerate(owners) if owner == i]
    shape = structs[own[0]].shape
    if cached:
      return leafwise.cut(shape, rows, _CACHED)
    stack = any(spots[k].stack and spots[k].packed for k in own)
    if stack and shape[0] <= _LAYERS:
      return leafwise.Parts(shape[0], 1, (1, *shape[1:]))
    # Several devices may each have a part of the rows.
    return leafwise.cut(shape, rows, _CHIP, _TILE) if alone else None

  def leaves(arrays, key, cached):
    divided = {i: divide(i, out, cached) for i, out in outputs.items()}
    parts = {i: division for i, division in divided.items() if division}
    cut = [
      lying_on(mesh, jax.ShapeDtypeStruct(parts[i].shape, x.dtype))
      if i in parts
      else x
      for i, x in zip(owners, structs, strict=True)
    ]
    small = leafwise.Program(function, cut, owners) if parts else program
    shared = {
      k: arrays[k] for k, i in enumerate(owners) if i == leafwise.SHARED
    }
    part, whole = (
      functools.partial(_step, p, spots, shared, key) for p in (small, program)
    )
    new, states = {}, []
    for i, out in outputs.items():
      places = {j: mirrored[j] for j in out}
      updates = {j: k for j, k in places.items() if spots[k].given}
      state = {j: k for j, k in places.items() if j not in updates}
      own = {k: arrays[k] for k, o in enumerate(owners) if o == i}
      packed = any(spots[k].packed for k in own)
      if packed and states and not cached:
        # Nothing of this leaf is decoded before the last one is stored.
        own, _ = jax.lax.optimization_barrier((own, states[-1]))
      # What a function does may depend on shapes.
      if i not in parts or small.names(out) != program.names(out):
        found = whole(places, own)
      elif not cached or math.prod(structs[mirrored[out[0]]].shape) > _KEPT:
        found = _loop(part, places, own, parts[i], cached)
      else:
        # The state is stored in place, and its old codes are kept instead of
        # updates: those can be made where they are used, without a copy. One
        # leaf waits for the last that is cut, so that few are kept.
        kept = _copy({k: own[k] for k in state.values()}, states[-1:])
        # A loop takes the bits of numbers in bfloat16, so copies them: these.
        onto = {
          k: own[k] if isinstance(x, Coded) else x for k, x in kept.items()
        }
        found = _loop(part, state, own | kept, parts[i], cached, onto)
        # The gradient may give way to the update: after its last use.
        kept = {k: _hold(x, found) for k, x in kept.items()}
        found |= whole(updates, own | kept)
      new |= found
      if packed and (i in parts or not cached):
        states.append([found[j] for j in state])
    return [new[j] for j in range(len(mirrored))]

  if not alone:
    return leaves(arrays, key, cached=False)
  return jax.lax.platform_dependent(
    arrays,
    key,
    cpu=functools.partial(leaves, cached=True),
    default=functools.partial(leaves, cached=False),
  )


def _rows(owner, outputs, program, structs, spots, arrays):
  """How many first axes of a leaf's arrays may be divided; 0 for none."""
  own = [k for k, spot in enumerate(spots) if spot.owner == owner]
  packed = [k for k in own if spots[k].packed]
  if owner == leafwise.SHARED or not packed:
    return 0
  shape = structs[own[0]].shape
  if not program.elementwise(outputs, shape):
    return 0
  rows = min(
    len(shape) - (x.merged if isinstance(x, Coded) else 1)
    for x in (arrays[k] for k in packed)
  )
  # Random bits are counted along one axis: the first, or several flattened if
  # that makes no difference.
  random = [spots[k] for k in own if spots[k].random]
  if random and (random[0].batch_axes or math.prod(shape) >= 2**32):
    rows = min(rows, 1)
  return rows


def _step(program, spots, shared, key, places, own, shape=None, rows=None):
  """Load, compute and store arrays of a leaf, or parts of them, by output."""
  values = {k: spots[k].load(x) for k, x in own.items()}
  new = program.run(list(places), shared | values)
  return {
    j: spots[k].store(x, key, shape, rows)
    for (j, k), x in zip(places.items(), new, strict=True)
  }


def _there(arrays):
  """True, but XLA cannot tell before these arrays are there."""
  first = jnp.ravel(jax.tree.leaves(arrays)[0])[0]
  true = jnp.isnan(first.astype(jnp.float32)).astype(jnp.int32) >= 0
  return only_saves_work(true)


def _copy(arrays, after):
  """A copy that is made when other arrays are there."""
  # A branch is fused with nothing.
  return jax.lax.cond(
    _there(after or arrays),
    lambda x: x,
    lambda x: jax.tree.map(jnp.zeros_like, x),
    arrays,
  )


def _hold(arrays, after):
  """The same arrays, used when others are there."""
  leaves, treedef = jax.tree.flatten(arrays)
  least = min(range(len(leaves)), key=lambda i: leaves[i].size)
  leaves[least] = jnp.where(_there(after), leaves[least], 0)
  return treedef.unflatten(leaves)


def _loop(step, places, own, parts, cached, onto=None):
  """The same part by part, in place of `own` or of its copies in `onto`."""
  loop = functools.partial(_looped, step, places, parts, cached)
  return by_layer(loop)(own, onto)


def _looped(step, places, parts, cached, own, onto):
  shape = jax.tree.leaves(own)[0].shape
  shape = (math.prod(shape[: parts.rows]), *shape[parts.rows :])
  height = parts.shape[parts.rows - 1]
  split = {k: jax.tree.map(parts.split, x) for k, x in own.items()}
  first = {
    j: jax.tree.map(parts.split, (onto or own)[k]) for j, k in places.items()
  }

  def body(i, new):
    def take(arrays):
      return jax.tree.map(lambda x, like: parts.at(x, like, i), arrays, own)

    def run(here):
      return step(places, here, shape, (i * height, height))

    def branch(function, arrays):
      def never(arrays):
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(function, arrays))

      return jax.lax.cond(i >= 0, function, never, arrays)

    # What is read must be read before anything is written. Where it is fused
    # with what is computed from it, XLA finds no such order and copies whole
    # arrays instead. CPUs drop barriers before they fuse, but not branches.
    # What writes is kept from fusing as well: that would take one thread only.
    if onto:
      found = branch(lambda arrays: run(take(arrays)), split)
    else:
      here = take(split | {k: new[j] for j, k in places.items()})
      if cached:
        found = branch(run, here)
      else:
        here = jax.lax.optimization_barrier(here)
        found = jax.lax.optimization_barrier(run(here))
    return jax.tree.map(lambda x, y: parts.put(x, y, i), new, found)

  new = jax.lax.fori_loop(0, parts.count, body, first)
  return jax.tree.map(parts.join, new, {j: own[k] for j, k in places.items()})
