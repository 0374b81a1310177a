"""One field of the config gives the mesh; logical names give every sharding."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from frugax import kernels
from frugax import names as fx_names
from frugax.kernels.linear_cross_entropy import labels as fx_labels

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

  def whole(
    self, names: Sequence[str | None], shape: Sequence[int]
  ) -> PartitionSpec:
    """Of weights as products have them: along 'embed' storage alone is cut."""
    cut = self.spec(names, shape)
    return PartitionSpec(
      *(
        None if n == 'embed' else axes
        for n, axes in zip(names, cut, strict=True)
      )
    )

  def gather(self, x: jax.Array, names) -> jax.Array:
    """Weights inside jit, gathered: their partition becomes `whole`.

    They travel as they are, in few bits if they were rounded. The compiler,
    told to have x whole, may as well gather what x was computed from.
    """
    cut, whole = self.spec(names, x.shape), self.whole(names, x.shape)
    if cut == whole:
      return x

    def gathered(x):
      for i, (axes, left) in enumerate(zip(cut, whole, strict=True)):
        if axes != left:
          x = jax.lax.all_gather(x, axes, axis=i, tiled=True)
      return x

    return jax.shard_map(
      gathered, mesh=self.mesh, in_specs=cut, out_specs=whole, check_vma=False
    )(x)

  def cross_entropy(
    self,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    layout: str,
    return_lse: bool = False,
    ignore_index: int = -1,
    z_loss: float = 0.0,
    **options,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.linear_cross_entropy` of the devices' own rows and tokens.

    Each has its part of the batch, and of the vocabulary: equally many columns
    of w, and if some are left, which are fewer than devices, each has them all.
    Along 'embed' w is gathered, and its gradient reduced and scattered.
    """
    names = ('embed', 'vocab')[:: 1 if layout == 'NN' else -1]
    axis = names.index('vocab')
    vocabulary = w.shape[axis]
    n = math.prod(self.mesh.shape[a] for a in self.rules['vocab'])
    left = vocabulary % n
    if left and n < vocabulary:
      # w is whole on each. So shall be its gradient, before it is put together.
      stored = tuple(None if a == 'vocab' else a for a in names)

      def of(part):
        def loss(labels):
          w = self.constrain(part, stored)
          return self.cross_entropy(
            x, w, labels, layout=layout, return_lse=True, **options
          )

        return loss

      at = vocabulary - left
      found = fx_labels.in_two(
        *map(of, jnp.split(w, [at], axis)),
        fx_labels.as_int32(labels, ignore_index),
        *(at, vocabulary, z_loss),
      )
      return found if return_lse else found[0]
    spec = self.spec(names, w.shape)
    embed, vocab = spec[1 - axis], spec[axis]

    def own(x, w, labels):
      if embed is not None:
        w = jax.lax.all_gather(w, embed, axis=1 - axis, tiled=True)
      return kernels.linear_cross_entropy(
        x,
        w,
        labels,
        layout=layout,
        return_lse=return_lse,
        ignore_index=ignore_index,
        z_loss=z_loss,
        vocab_axis=vocab,
        **options,
      )

    rows = self.spec(('batch', 'sequence'), labels.shape)
    return jax.shard_map(
      own,
      mesh=self.mesh,
      in_specs=(rows, spec, rows),
      out_specs=rows,
      check_vma=False,
    )(x, w, labels)

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
    across hosts) have the same share. Shares are numbered by their first
    process: where each process has one of its own, it is the same on every
    mesh, and so are the rows it loads. Where in the batch they lie is not, see
    `parts`; a loss that is a sum over rows does not depend on it.

    Returns:
      (index, count): this process loads 1 / count of the rows.

    Raises:
      ValueError: shares that are not equally large, or a process without
        devices in the mesh.
    """
    shares = self._shares()
    for i, (processes, _) in enumerate(shares):
      if jax.process_index() in processes:
        return i, len(shares)
    raise ValueError(
      f'process {jax.process_index()} has no device in the mesh {self}'
    )

  def parts(self) -> list[int]:
    """Which parts of a batch, cut over data x fsdp, are this process's share.

    They need not be neighbours: the mesh winds through the machine so that
    devices next to each other on an axis are next to each other in hardware.
    On a TPU v5e:4x4 one of four processes holds the parts 0, 1, 6 and 15 of 16.

    Returns:
      The parts in ascending order; the process's rows belong there in order.
    """
    return sorted(self._shares()[self.share()[0]][1])

  def _shares(self) -> list[tuple[set[int], set[int]]]:
    """The processes and the parts of each share; no two have any in common."""
    n_parts = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    parts: dict[int, set[int]] = {}
    for part, devices in enumerate(self.mesh.devices.reshape(n_parts, -1)):
      for device in devices:
        parts.setdefault(device.process_index, set()).add(part)
    shares: list[tuple[set[int], set[int]]] = []
    for process, own in parts.items():
      together = {process}
      for other in [share for share in shares if share[1] & own]:
        shares.remove(other)
        together |= other[0]
        own |= other[1]
      shares.append((together, own))
    if len({len(own) for _, own in shares}) > 1:
      raise ValueError(
        f'processes hold {sorted(len(own) for _, own in shares)} of the'
        f' {n_parts} parts of a batch on the mesh {self}, but all must load'
        ' equally many rows; give each process equally many devices'
      )
    return sorted(shares, key=lambda share: min(share[0]))

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
    devices: the devices; their order is left to jax, which knows how they are
      wired.

  Returns:
    The layout, with the rules `RULES`.

  Raises:
    ValueError: as `parse_mesh`; slices of TPUs that do not divide over it.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = parse_mesh(spec, len(devices))
  # Auto axes: linen's modules know nothing of shardings in types.
  mesh = Mesh(
    _arrange(tuple(sizes.values()), devices),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )
  return Layout(mesh, RULES)


def _arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]):
  """The devices in this shape, neighbours on an axis also in hardware.

  jax.make_mesh does the same, but knows neither several slices of TPUs nor,
  except on v5e, an axis that is a part of a hardware axis.
  """
  slices = {getattr(device, 'slice_index', 0) for device in devices}
  if devices[0].platform != 'tpu' or len(slices) == 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  # The slow network between slices is for the outermost axes.
  outer, left = [], len(slices)
  for size in shape:
    outer.append(math.gcd(size, left))
    left //= outer[-1]
  if left > 1:
    raise ValueError(
      f'the {len(slices)} slices do not divide over the axes of the mesh'
      f' {dict(zip(AXES, shape, strict=True))}; choose a size of data or fsdp'
      f' that is a multiple of {len(slices)}'
    )
  inner = [size // n for size, n in zip(shape, outer, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(
    inner, outer, devices, allow_split_physical_axes=True
  )


def micro_batches(
  batch: dict[str, jax.Array], accumulation: int
) -> dict[str, jax.Array]:
  """The batch with a leading axis of so many micro-batches.

  Raises:
    ValueError: they do not divide it.
  """
  rows = batch['tokens'].shape[0]
  if rows % accumulation:
    raise ValueError(
      f'accumulation {accumulation} does not divide the batch of {rows}'
    )

  # Row i goes to micro-batch i % accumulation: each device cuts its own rows
  # and none travels.
  def split(x):
    x = x.reshape(rows // accumulation, accumulation, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, batch)
