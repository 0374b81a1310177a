"""What is sent: codes, with scales that all devices know."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from frugax import names
from frugax.kernels import chips, counter
from frugax.quant import Element, element

FORMATS = ('int8', 'int4', 'fp8_e4m3', 'fp8_e5m2')
_LARGEST = 2.0**126  # as `frugax.quant.quantize_tiles` has it
_TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Wire:
  """How an array is sent.

  Args:
    axis_name: of the mesh axis, or a tuple of several.
    format: a name in `FORMATS`.
    axis: which is gathered or scattered.
    scale_axes: over which elements share a scale.

  Raises:
    ValueError: an unknown format.
  """

  axis_name: str | tuple[str, ...]
  format: str
  axis: int
  scale_axes: tuple[int, ...]

  def __post_init__(self):
    if self.format not in FORMATS:
      raise names.unknown('format of a collective', self.format, FORMATS)

  @property
  def element(self) -> Element:
    return element(self.format)

  @property
  def dtype(self) -> jnp.dtype:
    """Of the codes."""
    return jnp.dtype(jnp.int4 if self.format == 'int4' else self.element.dtype)

  @property
  def devices(self) -> int:
    return lax.axis_size(self.axis_name)

  def scales(self, x: jax.Array, shared: bool) -> jax.Array:
    """Scales with axes of size 1, to be multiplied with.

    Args:
      x: of this device.
      shared: whether they are the same on all devices: one pmax finds them.

    Returns:
      float32.
    """
    # Of magnitudes NaN has the largest bits; a maximum of floats, along an axis
    # or across devices, need not keep it.
    size = jnp.abs(x.astype(jnp.float32))
    bits = lax.bitcast_convert_type(size, jnp.int32)
    bits = bits.max(self.scale_axes, keepdims=True)
    if shared:
      bits = lax.pmax(bits, self.axis_name)
    largest = lax.bitcast_convert_type(bits, jnp.float32)
    alpha = jnp.minimum(largest, _LARGEST)
    return jnp.maximum(alpha * np.float32(1 / self.element.top), _TINY)

  def encode(
    self, x: jax.Array, scales: jax.Array, random: jax.Array | None
  ) -> jax.Array:
    """The codes of x, on this device."""
    e = self.element
    codes = e.encode(e.round(x.astype(jnp.float32) / scales, random))
    return codes.astype(self.dtype)

  def pack(self, codes: jax.Array) -> jax.Array:
    """As they are sent: on TPUs int4 are two a byte, elsewhere made so."""
    if self.format != 'int4' or chips.tpu():
      return codes
    return self.element.pack(codes.astype(jnp.int8))

  def unpack(self, sent: jax.Array, size: int) -> jax.Array:
    """The inverse of `pack`, for a last axis of this size."""
    if self.format != 'int4' or chips.tpu():
      return sent
    return self.element.unpack(sent, size).astype(self.dtype)

  def random(
    self, key: jax.Array | None, shape: tuple[int, ...]
  ) -> jax.Array | None:
    """Bits of this device's shard of the gathered array, or None."""
    if key is None:
      return None
    whole, start = list(shape), [0] * len(shape)
    whole[self.axis] *= self.devices
    start[self.axis] = lax.axis_index(self.axis_name) * shape[self.axis]
    return counter.part(key, shape, tuple(whole), tuple(start))
