"""Integers of 4 and 8 bits with a scale and a zero point for each block."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from frugax import names
from frugax.quant import groups
from frugax.quant.qtensor import QTensor
from frugax.quant.rounding import random_bits

AFFINE = {'int4': 4, 'int8': 8}  # bits an element

# The zero point lies at most this many steps from the block's values, so that
# it fits an int16: the step of a nearly constant block is bounded from below.
_FAR = 2**15 - 2**9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks(QTensor):
  """4 or 8 bits with a step and a zero point for each block.

  The elements lie in blocks along the flattened array, the last block being
  shorter if need be. Leading batch axes are axes of all three arrays: slicing
  or scanning over them gives the Blocks of each item.

  Attributes:
    data: uint8 (*batch, bytes): one element a byte, or two, the earlier one in
      the low half. An odd number is padded by half a byte.
    scales: bfloat16 (*batch, blocks), the step of each block.
    zeros: int16 (*batch, blocks), the code of zero; beyond the codes' range if
      the values of a block have all one sign.
    item_shape: shape of one item, static.
    format: a name in `AFFINE`, static.
    block: elements a block, static.
  """

  data: jax.Array
  scales: jax.Array
  zeros: jax.Array
  item_shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  format: str = dataclasses.field(metadata={'static': True})
  block: int = dataclasses.field(metadata={'static': True})

  @property
  def batch_axes(self) -> int:
    """Number of leading axes over which items are stacked."""
    return self.data.ndim - 1

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The array that this stands for, in `dtype`."""
    return dequantize(self, dtype)

  def requantize(self, x: jax.Array, key: jax.Array | None = None) -> 'Blocks':
    """Another array of this shape, in the same format."""
    return quantize(x, self.format, self.block, self.batch_axes, key)


def quantize(
  x: jax.Array,
  format: str,
  block: int = 256,
  batch_axes: int = 0,
  key: jax.Array | None = None,
) -> Blocks:
  r"""Round to 4 or 8 bits with a step and a zero point for each block.

  With :math:`l` and :math:`h` the least and greatest value of a block and
  :math:`b` bits

  .. math::
    s = \frac{h - l}{2^b - 1}, \qquad z = -\mathrm{round}(l / s), \qquad
    q = \mathrm{round}(x / s) + z, \qquad \hat x = s \, (q - z)

  so that :math:`|\hat x - x| \le s/2`, and zero stays zero in a block of both
  signs. The step is rounded up to bfloat16 and is at least 1/32256 of the
  block's largest magnitude: z is an int16 and may lie outside of the codes, as
  blocks of one sign need. (The released Q-GaLore clips it to the codes, and
  such blocks saturate.) A constant block is exact to that step.

  With a key the rounding is stochastic: :math:`x / s` goes to one of its two
  neighbours, the nearer one with more probability, so that
  :math:`E[\hat x] = x` for every element. The block then has one step less,
  :math:`2^b - 2`, and :math:`z = -\lfloor l / s \rfloor`: both neighbours of
  its least and of its greatest value are codes, where clipping would draw
  these inwards. What lies on a code stays there.

  A block that holds a NaN or an infinity comes back as NaN.

  Args:
    x: a floating-point array; computed in float32.
    format: 'int4' or 'int8'.
    block: elements that share a step, counted along the flattened item.
    batch_axes: number of leading axes over which items are stacked. No block
      holds elements of two items, so that quantising a stack is stacking.
    key: a typed key, for stochastic rounding; all items of a stack get the
      same random bits. None rounds to nearest.

  Returns:
    Blocks; an item of n elements takes n bytes in 8 bits, ceil(n / 2) in 4,
    and four more for each block.

  Raises:
    ValueError: an unknown format, a block below 1, more batch axes than axes,
      or an array that is not floating-point.

  Examples:
    >>> q = quantize(jnp.linspace(-1., 2., 512).reshape(2, 256), 'int4')
    >>> q.data.shape, q.scales.shape, q.nbytes
    ((256,), (2,), 264)
    >>> print(dequantize(quantize(jnp.array([0., 1., 1.5]), 'int4')))
    [0.        1.0009766 1.5014648]

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021

    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and
    Layer-Adaptive Low-Rank Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
  """
  if format not in AFFINE:
    raise names.unknown('format', format, AFFINE)
  if block < 1:
    raise ValueError(f'block={block}: give the elements a block, at least 1')
  if not 0 <= batch_axes <= x.ndim:
    raise ValueError(f'batch_axes={batch_axes} for an array of shape {x.shape}')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'quantize takes floating-point arrays, not {x.dtype}')
  batch, item_shape = x.shape[:batch_axes], x.shape[batch_axes:]
  size = math.prod(item_shape)
  x = x.astype(jnp.float32).reshape(*batch, size)
  top = 2 ** AFFINE[format] - 1
  steps = top if key is None else top - 1

  x = _blocks(x, block, mode='edge')
  low, high = x.min(-1), x.max(-1)
  # Divided before subtracted: the range may be beyond float32.
  step = jnp.maximum(high / steps - low / steps, jnp.maximum(-low, high) / _FAR)
  step = jnp.maximum(step, jnp.finfo(jnp.float32).tiny)
  # Seen in the numbers: XLA's extremes need not keep a NaN on CPUs.
  finite = jnp.isfinite(x).all(-1)
  scales = _round_up(jnp.where(finite, step, jnp.nan))
  step = scales.astype(jnp.float32)
  codes = x / step[..., None]
  if key is None:
    zeros = -jnp.round(low / step)
    codes = jnp.round(codes)
  else:
    zeros = -jnp.floor(low / step)
    codes = _round_stochastic(codes, key, batch_axes)
  codes = jnp.clip(codes + zeros[..., None], 0, top).astype(jnp.uint8)
  codes = _flat(codes, size)
  return Blocks(
    data=groups.pack(codes) if format == 'int4' else codes,
    scales=scales,
    zeros=zeros.astype(jnp.int16),
    item_shape=item_shape,
    format=format,
    block=block,
  )


def dequantize(
  q: Blocks, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """The array that Blocks stand for.

  Args:
    q: from `quantize`, or a slice of it along batch axes.
    dtype: of the result; computed in float32.

  Returns:
    An array of shape `q.shape`.

  Examples:
    >>> q = quantize(jnp.ones((3, 5, 7)), 'int8', batch_axes=1)
    >>> dequantize(jax.tree.map(lambda x: x[0], q)).shape
    (5, 7)
  """
  size = math.prod(q.item_shape)
  codes = groups.unpack(q.data, size) if q.format == 'int4' else q.data
  codes = _blocks(codes, q.block, mode='constant').astype(jnp.float32)
  x = codes - q.zeros.astype(jnp.float32)[..., None]
  x = x * q.scales.astype(jnp.float32)[..., None]
  return _flat(x, size).reshape(q.shape).astype(dtype)


def _blocks(x, block, mode):
  """(*batch, n) to (*batch, blocks, block); the last block is filled up."""
  *batch, size = x.shape
  rest = -size % block
  if rest:
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, rest)], mode=mode)
  return x.reshape(*batch, (size + rest) // block, block)


def _flat(blocks, size):
  """(*batch, blocks, block) to (*batch, size): the inverse of `_blocks`."""
  *batch, n, block = blocks.shape
  return blocks.reshape(*batch, n * block)[..., :size]


def _round_stochastic(x, key, batch_axes):
  """To an integer. The fraction is exact, so the probability is, to 2^-24."""
  below = jnp.floor(x)
  random = random_bits(key, x.shape, batch_axes) >> 8
  return below + (random.astype(jnp.float32) * 2.0**-24 < x - below)


def _round_up(x):
  """Positive float32 to the next bfloat16 that is not smaller."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = (bits + 0xFFFF) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
