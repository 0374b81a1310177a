"""What all arrays in few bits have in common."""

import jax
import jax.numpy as jnp


class QTensor:
  """An array in few bits: a pytree that jit, scan, vmap and device_put take.

  `frugax.quant.quantize` makes them: `Blocks`, with a step and a zero point for
  each block of the flattened array, and `Tiled`, with a scale for each tile.
  Leading batch axes are axes of all arrays within: slicing or scanning over
  them gives the QTensor of each item. Orbax saves and restores one bit for bit.

  Attributes:
    data: codes.
    scales: what they are multiplied with.
    item_shape: shape of one item, static.
    format: name of the codes' format, static.
  """

  data: jax.Array
  scales: jax.Array
  item_shape: tuple[int, ...]
  format: str

  @property
  def batch_axes(self) -> int:
    """Number of leading axes over which items are stacked."""
    raise NotImplementedError

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that `dequantize` gives."""
    return (*self.data.shape[: self.batch_axes], *self.item_shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The array that this stands for; see `frugax.quant.dequantize`."""
    raise NotImplementedError

  def requantize(self, x: jax.Array, key: jax.Array | None = None) -> 'QTensor':
    """Another array of this shape, in the same format.

    Args:
      x: the array.
      key: a typed key, for stochastic rounding.

    Returns:
      A QTensor of this structure, with new scales.
    """
    raise NotImplementedError
