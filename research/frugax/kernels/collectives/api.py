"""All-gather and reduce-scatter in few bits, for use within shard_map."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from frugax.kernels import counter
from frugax.kernels.collectives.wire import Wire


def all_gather(
  x: jax.Array,
  axis_name: str | Sequence[str],
  format: str = 'int8',
  *,
  axis: int = 0,
  scale_axes: Sequence[int] | None = None,
  key: jax.Array | None = None,
  gradient: str | None = 'int8',
  gradient_key: jax.Array | None = None,
) -> jax.Array:
  """The whole of a sharded array, which travels in few bits.

  Every device rounds its shard, with scales that one pmax makes the same on
  all, sends codes, and multiplies what it got by the scales: the result is what
  rounding the whole array would be, on any number of devices. In bytes an
  all-gather of int8 is a half, and of int4 a quarter, of one of bfloat16.

  The gradient is reduced and scattered likewise; see `reduce_scatter`.

  Args:
    x: this device's shard, floating-point.
    axis_name: of the axis of the mesh, or of several.
    format: 'int8', 'int4', 'fp8_e4m3' or 'fp8_e5m2'.
    axis: along which the array is sharded.
    scale_axes: over which elements share a scale; None is `axis` alone, so that
      of a kernel (in, out) sharded along its inputs each output has one. All
      axes are one scale for the array. Without `axis` every device has scales
      of its own, which are gathered instead of compared.
    key: a typed key rounds stochastically; the bits depend on it and on the
      index in the whole array. None rounds to nearest.
    gradient: the format of the gradient's `reduce_scatter`; None sums it as it
      is.
    gradient_key: a typed key rounds the gradient stochastically.

  Returns:
    The whole array, the same on all devices, in x's dtype.

  Raises:
    ValueError: an unknown format, an array that is not floating-point, or an
      axis that x has not.

  Examples:
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> mesh = jax.make_mesh((jax.device_count(),), ('fsdp',),
    ...                      axis_types=(AxisType.Auto,))
    >>> w = jnp.full((8 * jax.device_count(), 2), 3.)
    >>> whole = jax.shard_map(lambda w: all_gather(w, 'fsdp'), mesh=mesh,
    ...   in_specs=P('fsdp'), out_specs=P(), check_vma=False)(w)
    >>> whole.shape == w.shape, float(whole.max())
    (True, 3.0)

  References:
    Ashkboos et al., `HALO: Hadamard-Assisted Lower-Precision Optimization for
    LLMs <https://arxiv.org/abs/2501.02625>`_, 2025 (all-gather in 8 bits)

    Wang et al., `ZeRO++: Extremely Efficient Collective Communication for Giant
    Model Training <https://arxiv.org/abs/2306.10209>`_, 2023
  """
  wire = _wire(x, axis_name, format, axis, scale_axes)
  back = (
    None
    if gradient is None
    else _wire(x, axis_name, gradient, axis, scale_axes)
  )
  return _gathered(wire, back, x, key, gradient_key)


def gather_codes(
  x: jax.Array,
  axis_name: str | Sequence[str],
  format: str = 'int8',
  *,
  axis: int = 0,
  scale_axes: Sequence[int] | None = None,
  key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """As `all_gather`, but the codes and scales, to be multiplied as they are.

  It has no gradient: codes have none.

  Args:
    x: see `all_gather`, as the others.
    axis_name: as there.
    format: as there.
    axis: as there.
    scale_axes: as there.
    key: as there.

  Returns:
    The codes of the whole array, int8, int4, float8_e4m3fn or float8_e5m2, and
    float32 scales with axes of size 1 where elements share them.

  Raises:
    ValueError: see `all_gather`.
  """
  return _codes(_wire(x, axis_name, format, axis, scale_axes), x, key)


def reduce_scatter(
  x: jax.Array,
  axis_name: str | Sequence[str],
  format: str = 'int8',
  *,
  axis: int = 0,
  scale_axes: Sequence[int] | None = None,
  key: jax.Array | None = None,
) -> jax.Array:
  r"""This device's shard of the sum of arrays, which travel in few bits.

  .. math:: y_i = s \sum_d Q(x_i^{(d)} / s)

  with :math:`s` from the largest magnitude on any device, by one pmax. Codes
  are exchanged all to all, and each device sums those of its shard, without
  rounding again: the error of the result is that of one rounding for each
  device, and with a key it is zero in the mean.

  Args:
    x: this device's term of the sum, floating-point.
    axis_name: of the axis of the mesh, or of several.
    format: see `all_gather`.
    axis: along which the sum is scattered.
    scale_axes: over which elements share a scale; None is `axis` alone.
    key: a typed key, the same on all devices, rounds stochastically, with
      other bits on each; None rounds to nearest, which biases sums of many.

  Returns:
    The shard, in x's dtype. Computed in float32.

  Raises:
    ValueError: see `all_gather`, or an axis that cannot be scattered evenly.

  References:
    Wang et al., `ZeRO++: Extremely Efficient Collective Communication for Giant
    Model Training <https://arxiv.org/abs/2306.10209>`_, 2023 (all to all)

    Alistarh et al., `QSGD: Communication-Efficient SGD via Gradient
    Quantization and Encoding <https://arxiv.org/abs/1610.02132>`_, 2017
  """
  return _scattered(_wire(x, axis_name, format, axis, scale_axes), x, key)


def _wire(x, axis_name, format, axis, scale_axes):
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'collectives round floating-point arrays, not {x.dtype}')
  if not isinstance(axis_name, str):
    axis_name = tuple(axis_name)
  axes = (axis,) if scale_axes is None else tuple(scale_axes)
  for a in (axis, *axes):
    if not -x.ndim <= a < x.ndim:
      raise ValueError(f'axis={a} for an array of shape {x.shape}')
  axes = tuple(sorted({a % x.ndim for a in axes}))
  return Wire(axis_name, format, axis % x.ndim, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(wire, back, x, key, gradient_key):
  codes, scales = _codes(wire, x, key)
  return (wire.element.decode(codes) * scales).astype(x.dtype)


def _forward(wire, back, x, key, gradient_key):
  return _gathered(wire, back, x, key, gradient_key), gradient_key


def _backward(wire, back, key, g):
  if back is None:
    g = lax.psum_scatter(
      g, wire.axis_name, scatter_dimension=wire.axis, tiled=True
    )
  else:
    g = _scattered(back, g, key)
  return g, None, None


_gathered.defvjp(_forward, _backward)


def _codes(wire, x, key):
  shared = wire.axis in wire.scale_axes
  scales = wire.scales(x, shared)
  sent = wire.pack(wire.encode(x, scales, wire.random(key, x.shape)))
  # Devices are an axis of their own until the codes are unpacked: those of an
  # odd number end within a byte.
  codes = lax.all_gather(sent, wire.axis_name)
  codes = _merged(wire.unpack(codes, x.shape[-1]), wire.axis)
  if not shared:
    scales = _merged(lax.all_gather(scales, wire.axis_name), wire.axis)
  return codes, scales


def _scattered(wire, x, key):
  devices, size = wire.devices, x.shape[wire.axis]
  if size % devices:
    raise ValueError(
      f'axis {wire.axis} of {x.shape} over {devices} devices: scatter along an '
      f'axis whose size is a multiple of {devices}, or pad it with zeros'
    )
  scales, random = wire.scales(x, True), None
  if key is not None:
    # Errors that are alike on all devices would add up.
    key = jax.random.fold_in(key, lax.axis_index(wire.axis_name))
    start = (0,) * x.ndim
    random = counter.part(key, x.shape, x.shape, start)
  codes = _split(wire.encode(x, scales, random), wire.axis, devices)
  codes = lax.all_to_all(wire.pack(codes), wire.axis_name, 0, 0, tiled=True)
  # Whole numbers: a sum of these is exact in float32, in any order.
  y = wire.element.decode(wire.unpack(codes, _last(x, wire, devices))).sum(0)
  if wire.axis not in wire.scale_axes:
    each = size // devices
    place = lax.axis_index(wire.axis_name) * each
    scales = lax.dynamic_slice_in_dim(scales, place, each, wire.axis)
  return (y * scales).astype(x.dtype)


def _last(x, wire, devices):
  """The size of a shard's last axis."""
  return x.shape[-1] // (devices if wire.axis == x.ndim - 1 else 1)


def _merged(x, axis):
  """(devices, ...) with the devices' parts one after the other along an axis.

  Examples:
    >>> print(_merged(jnp.arange(4).reshape(2, 1, 2), 1))
    [[0 1 2 3]]
  """
  x = jnp.moveaxis(x, 0, axis)
  shape = x.shape
  size = shape[axis] * shape[axis + 1]
  return x.reshape(*shape[:axis], size, *shape[axis + 2 :])


def _split(x, axis, devices):
  """The inverse of `_merged`."""
  shape = x.shape
  parts = (devices, shape[axis] // devices)
  x = x.reshape(*shape[:axis], *parts, *shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)
