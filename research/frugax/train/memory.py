"""Which of a device's memories arrays lie in: its own, or its host's."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from frugax import names

KINDS = ('device', 'pinned_host')
_SMALL = 4096  # bytes; what is smaller stays on the device


class Memory:
  """One of JAX's kinds of memory, for arrays inside of a jitted function.

  Stacks in the host's memory are read and written along their first axis: XLA
  moves what it slices along one axis alone.

  Args:
    kind: 'device', or 'pinned_host', which a device reads and writes on its
      own.

  Examples:
    >>> host = Memory('pinned_host')
    >>> def f(x):
    ...   stack = host.empty((3, *x.shape), x.dtype)
    ...   return host.get(host.put(stack, 1, x), 1)
    >>> jax.jit(f)(jnp.ones(2))
    Array([1., 1.], dtype=float32)
  """

  def __init__(self, kind: str = 'device'):
    self.kind = kind

  def store(self, x: jax.Array) -> jax.Array:
    """An array of the device's memory, in this one."""
    if self.kind == 'device':
      return x
    return jax.device_put(x, jax.memory.Space.Host)

  def shardings(self, shardings: Any, shapes: Any) -> Any:
    """Those of arrays that lie here, unless they are smaller than a page."""

    def one(sharding, x):
      small = x.size * x.dtype.itemsize < _SMALL
      if small or self.kind == 'device':
        return sharding
      return sharding.with_memory_kind(self.kind)

    return jax.tree.map(one, shardings, shapes)

  def empty(self, shape: Sequence[int], dtype: jax.typing.DTypeLike):
    """An array to be written."""
    # Broadcast there, or the device would hold and send all of it.
    return jax.lax.broadcast(self.store(jnp.zeros([], dtype)), shape)

  def get(self, stack: jax.Array, i: jax.typing.ArrayLike) -> jax.Array:
    """An entry of a stack, on the device."""
    x = fetch(jax.lax.dynamic_slice_in_dim(stack, i, 1))
    return self._in_order(x)[0]

  def put(
    self, stack: jax.Array, i: jax.typing.ArrayLike, x: jax.Array
  ) -> jax.Array:
    """The stack with an array of the device as its entry."""
    x = self.store(self._in_order(x[None]))
    return jax.lax.dynamic_update_slice_in_dim(stack, x, i, 0)

  def _in_order(self, x):
    """Or each loop might lay out the stack anew, all of it on the device."""
    if self.kind == 'device':
      return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def fetch(tree: Any) -> Any:
  """Arrays of a jitted function, in the device's memory, whatever theirs is.

  Examples:
    >>> there = Memory('pinned_host')
    >>> jax.jit(lambda x: fetch(there.store(x)) + 1)(jnp.ones(2))
    Array([2., 2.], dtype=float32)
  """
  return put_like(tree, jax.tree.map(lambda _: 0, tree))


def put_like(tree: Any, like: Any) -> Any:
  """Arrays of a jitted function, each in the memory of another.

  Examples:
    >>> there = Memory('pinned_host')
    >>> f = jax.jit(lambda x, y: put_like(x, there.store(y)))
    >>> f(jnp.ones(2), jnp.zeros(2)).sharding.memory_kind
    'pinned_host'
  """

  def one(x, like):
    space = jax.typeof(like).memory_space
    there = jax.typeof(x).memory_space == space
    if there:
      return x
    # Or the TPU's compiler would lay it out anew on the way, and fail to.
    barrier = jax.lax.optimization_barrier
    return barrier(jax.device_put(barrier(x), space))

  return jax.tree.map(one, tree, like)


def check(field: str, kind: str, devices: Sequence[jax.Device]) -> None:
  """Raises unless devices have the kind of memory that a field names.

  Args:
    field: its name.
    kind: its value.
    devices: those of the mesh, described ones included.

  Raises:
    ValueError: no such kind, or the devices have none of it.

  Examples:
    >>> check('inputs', 'pinned_host', jax.devices())
    >>> check('inputs', 'host', jax.devices())
    Traceback (most recent call last):
    ...
    ValueError: unknown inputs 'host': did you mean 'pinned_host'? Valid:
    device, pinned_host
  """
  if kind not in KINDS:
    raise names.unknown(field, kind, KINDS)
  there = [memory.kind for memory in devices[0].addressable_memories()]
  if kind != 'device' and kind not in there:
    raise ValueError(
      f'{field}={kind!r}: a {devices[0].device_kind} has but the memories '
      f"{there}: set it to 'device'"
    )
