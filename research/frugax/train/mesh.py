"""One field of the config gives the mesh; logical names give every sharding."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from frugax import names as fx_names

AXES = ('data', 'fsdp', 'tensor', 'context')

# Logical axis name -> the mesh axes it is cut along. Names of parameters
# first, then of activations; a name that is not here is not cut.
RULES = {
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  'batch': ('data', 'fsdp'),
  'sequence': ('context',),
  'act_heads': ('tensor',),
  'act_kv_heads': ('tensor',),
  'act_mlp': ('tensor',),
  'act_vocab': ('tensor',),
}


def parse_mesh(spec: str, n_devices: int) -> dict[str, int]:
  """Axis sizes from 'data=2,fsdp=-1' (-1: all devices that are left).

  Args:
    spec: name=size pairs over data, fsdp, tensor and context; absent ones
      have size 1.
    n_devices: the number of devices, which the sizes must multiply to.

  Returns:
    The size of each axis of `AXES`, in that order.

  Raises:
    ValueError: an unknown axis, a size that is no positive integer, or sizes
      that do not multiply to the number of devices.

  Examples:
    >>> parse_mesh('fsdp=-1,tensor=2', 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2, 'context': 1}
    >>> parse_mesh('fsdp=3', 8)
    Traceback (most recent call last):
    ...
    ValueError: mesh 'fsdp=3' needs 3 devices, but there are 8; the sizes must
    multiply to 8 (an axis of size -1 takes what is left)
  """
  sizes = dict.fromkeys(AXES, 1)
  for item in filter(None, spec.replace(' ', '').split(',')):
    name, _, size = item.partition('=')
    if name not in sizes:
      raise fx_names.unknown('mesh axis', name, AXES)
    try:
      sizes[name] = int(size)
    except ValueError:
      sizes[name] = 0
    if sizes[name] < 1 and sizes[name] != -1:
      raise ValueError(
        f'mesh axis {item!r} of {spec!r} is not name=size with a positive'
        ' size or -1'
      )
  open_axes = [name for name, size in sizes.items() if size == -1]
  if len(open_axes) > 1:
    raise ValueError(f'mesh {spec!r} has more than one axis of size -1')
  known = math.prod(size for size in sizes.values() if size != -1)
  if open_axes and n_devices % known == 0:
    sizes[open_axes[0]] = n_devices // known
    known = n_devices
  if known != n_devices:
    raise ValueError(
      f'mesh {spec!r} needs {"a multiple of " * bool(open_axes)}{known}'
      f' devices, but there are {n_devices}; the sizes must multiply to'
      f' {n_devices} (an axis of size -1 takes what is left)'
    )
  return sizes


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the rules that map logical axis names onto it.

  A mesh axis that does not divide a dimension is left out there: LLaMA-1b's
  ffn of 5461 stays whole under tensor parallelism, all else is cut.

  Attributes:
    mesh: the device mesh, with the axes `AXES`.
    rules: logical name -> mesh axes.

  Examples:
    >>> layout = make_layout('fsdp=2,tensor=4', jax.devices()[:8])
    >>> tuple(layout.spec(('embed', 'mlp'), (128, 352)))
    ('fsdp', 'tensor')
    >>> tuple(layout.spec(('embed', 'mlp'), (128, 5461)))
    ('fsdp', None)
  """

  mesh: Mesh
  rules: Mapping[str, tuple[str, ...]]

  def spec(
    self, names: Sequence[str | None], shape: Sequence[int]
  ) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names."""
    if len(names) != len(shape):
      raise ValueError(f'{len(names)} logical names {names} for shape {shape}')
    used: set[str] = set()
    entries = []
    for name, size in zip(names, shape, strict=True):
      kept = []
      for axis in self.rules.get(name, ()):
        n = math.prod(self.mesh.shape[a] for a in (*kept, axis))
        if axis not in used and self.mesh.shape[axis] > 1 and size % n == 0:
          kept.append(axis)
      used.update(kept)
      entries.append(kept[0] if len(kept) == 1 else tuple(kept) or None)
    return PartitionSpec(*entries)

  def sharding(self, names, shape) -> NamedSharding:
    """`spec` on this mesh."""
    return NamedSharding(self.mesh, self.spec(names, shape))

  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def constrain(self, x: jax.Array, names) -> jax.Array:
    """Shards an activation inside jit; models get this as an argument."""
    return jax.lax.with_sharding_constraint(x, self.sharding(names, x.shape))

  def tree(self, axes, shapes):
    """Shardings of a tree of arrays, from its tree of logical names."""
    return jax.tree.map(
      lambda names, s: self.sharding(names, s.shape),
      axes,
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )

  def share(self) -> tuple[int, int]:
    """Which share of a batch's rows this process loads, and of how many.

    Processes whose devices hold the same rows (tensor or context parallelism
    across hosts) have the same share.

    Returns:
      (index, count): of a batch of B rows those from index * B / count on.

    Raises:
      ValueError: this process's devices hold rows that are not one block.
    """
    n_groups = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    groups = self.mesh.devices.reshape(n_groups, -1)
    mine = [
      i
      for i, devices in enumerate(groups)
      if any(d.process_index == jax.process_index() for d in devices)
    ]
    n = len(mine)
    if mine != list(range(mine[0], mine[0] + n)) or n_groups % n or mine[0] % n:
      raise ValueError(
        f'the devices of process {jax.process_index()} hold the parts {mine} of'
        f' {n_groups} of a batch on the mesh {self}, which is no block that it'
        ' could load; choose sizes of data and fsdp that divide, or are'
        " divided by, each process's devices"
      )
    return mine[0] // n, n_groups // n

  def check_batch(self, rows: int, sequence_length: int, what: str) -> None:
    """Raises unless the mesh cuts rows x sequence_length evenly."""
    n_batch = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    if rows % n_batch:
      raise ValueError(
        f'{what} of {rows} sequences does not divide over the {n_batch} ='
        ' data x fsdp devices of the mesh; use a multiple of'
        f' {n_batch}, or move devices to the tensor or context axis'
      )
    if sequence_length % self.mesh.shape['context']:
      raise ValueError(
        f'sequence_length {sequence_length} does not divide over the'
        f' {self.mesh.shape["context"]} devices of the context axis'
      )

  def __str__(self):
    sizes = (f'{name}={size}' for name, size in self.mesh.shape.items())
    kind = self.mesh.devices.flat[0].device_kind
    return f'{self.mesh.size} x {kind} ({", ".join(sizes)})'


def make_layout(
  spec: str, devices: Sequence[jax.Device] | None = None
) -> Layout:
  """The `Layout` of a mesh spec over `devices` (default: all of them).

  Args:
    spec: as in `parse_mesh`.
    devices: the devices; their order is left to jax.

  Returns:
    The layout, with the rules `RULES`.

  Raises:
    ValueError: as `parse_mesh`.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = parse_mesh(spec, len(devices))
  # Auto axes: linen's modules know nothing of shardings in types.
  mesh = jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices,
  )
  return Layout(mesh, RULES)
