"""Codecs for optimizer state: arrays in blocks of a few bits, or in bfloat16.

What distinguishes them from `frugax.quant.blocks`: zero and the largest
magnitude of a block are exact, small numbers keep a relative precision where
the map is not linear, and the codes keep the axes of the array, so that they
can be sharded as it is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from frugax import names
from frugax.quant import groups, range_expansion
from frugax.quant.maps import Dynamic, Linear, Map
from frugax.quant.rounding import round_stochastic

# The maps of first moments, which have both signs, and of second moments.
MAPS: dict[str, tuple[Map, Map]] = {
  'dynamic8': (Dynamic(8, 7, signed=True), Dynamic(8, 7, signed=False)),
  'linear8': (Linear(8, 127, -127), Linear(8, 255, 0)),
  'dynamic4': (Dynamic(4, 3, signed=True), Linear(4, 16, 1)),
  'linear4': (Linear(4, 7, -7), Linear(4, 16, 1)),
}
# Elements a block, as in the libraries that the formats come from.
BLOCKS = {
  'dynamic8': 256,
  'linear8': 256,
  'dynamic4': 128,
  'linear4': 128,
  'fp8_e4m3': 128,
  'fp8_e5m2': 128,
}
PLAIN = ('f32', 'bf16', 'bf16_stochastic')
CODECS = (*BLOCKS, *PLAIN)


@dataclasses.dataclass(frozen=True)
class Codec:
  """How an array of an optimizer's state is stored.

  Formats, with bytes a number:

  - 'dynamic8' (1 + 4/block): blocks with the dynamic tree maps of bitsandbytes;
  - 'linear8' (1 + 4/block): blocks with equal steps, 127 or 255 from 0 to 1;
  - 'dynamic4', 'linear4' (1/2 + 4/block): torchao's 4-bit maps; the second
    moment's is i/16 without zero in both;
  - 'fp8_e4m3', 'fp8_e5m2' (1 + 5/block): COAT's 8-bit floats, see
    `frugax.quant.range_expansion`;
  - 'bf16' (2), rounded to nearest: a second moment with a decay of 0.999 can
    grow but not shrink; 'bf16_stochastic' (2): without bias, so it can;
  - 'f32' (4): as it is.

  Args:
    format: one of the above.
    block: elements that share a scale, along the last axis, or the last few
      axes if it is short; the last block of a row is shorter if need be. None
      is 256 for 8-bit maps and 128 for others.
    signed: whether the map has numbers below zero. Unsigned maps keep what is
      greater than zero greater than zero. Floats are signed in any case.
    sqrt: store the root of numbers that are not negative, for twice the range
      on a logarithmic scale.

  Raises:
    ValueError: an unknown format, or a block below 1.

  Examples:
    >>> Codec('dynamic8').bytes_of((512, 1376)) == 512 * (1376 + 4 * 6)
    True

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021

    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023
  """

  format: str
  block: int | None = None
  signed: bool = True
  sqrt: bool = False

  def __post_init__(self):
    if self.format not in CODECS:
      raise names.unknown('codec', self.format, CODECS)
    if self.block is None:
      object.__setattr__(self, 'block', BLOCKS.get(self.format, 1))
    if self.block < 1:
      raise ValueError(f'block={self.block}: give a block at least one element')

  @property
  def map(self) -> Map | None:
    """The map of codes to numbers; None if it is not one of the maps."""
    maps = MAPS.get(self.format)
    return maps and maps[0 if self.signed else 1]

  @property
  def bits(self) -> int:
    """Bits of a code."""
    return self.map.bits if self.map else 8

  def bytes_of(self, shape: tuple[int, ...], batch_axes: int = 0) -> int:
    """Bytes that an array of this shape takes."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    coded = jax.eval_shape(lambda x, k: encode(x, self, batch_axes, k), x, key)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(coded))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
  """An array as the codes of blocks: a pytree that jit, scan and vmap take.

  Leading batch axes are axes of all arrays: slicing them gives the items'.

  Attributes:
    codes: uint8 of the array's shape; for 4 bits with half of the last axis,
      the earlier number in the low half of a byte.
    scales: float32 (*rows, blocks), the largest magnitude of each block.
    powers: uint8 of the same shape for 8-bit floats, else None.
    size: length of the array's last axis, static.
    merged: number of last axes along which the blocks run, static.
    codec: static.
  """

  codes: jax.Array
  scales: jax.Array
  powers: jax.Array | None
  size: int = dataclasses.field(metadata={'static': True})
  merged: int = dataclasses.field(metadata={'static': True})
  codec: Codec = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that `decode` gives."""
    return (*self.codes.shape[:-1], self.size)


def encode(
  x: jax.Array,
  codec: Codec,
  batch_axes: int = 0,
  random: jax.Array | None = None,
) -> Coded | jax.Array:
  """Store an array.

  A block that holds a NaN or an infinity comes back as NaN.

  Args:
    x: a floating-point array; computed in float32.
    codec: the codec.
    batch_axes: number of leading axes over which items are stacked: no block
      holds elements of two items, and all get the same random bits.
    random: a typed key for 'bf16_stochastic', or bits as in `round_stochastic`;
      the others do not use it.

  Returns:
    A Coded, or an array if the format is f32 or bf16.

  Raises:
    ValueError: an array that is not floating-point, or of no axes.

  Examples:
    >>> print(decode(encode(jnp.array([0., .1, -1., 2.]), Codec('dynamic4'))))
    [ 0.     0.065 -0.875  2.   ]
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'codecs take floating-point arrays, not {x.dtype}')
  x = x.astype(jnp.float32)
  root = jnp.sqrt if codec.sqrt else lambda x: x
  if codec.format == 'f32':
    return root(x)
  if codec.format == 'bf16':
    return root(x).astype(jnp.bfloat16)
  if codec.format == 'bf16_stochastic':
    return round_stochastic(root(x), random, jnp.bfloat16, batch_axes)
  if not x.ndim:
    raise ValueError('blocks run along an axis, but the array has none')
  merged = _merged(x.shape, batch_axes, codec.block)
  shape, size = x.shape, x.shape[-1]
  x = x.reshape(*shape[: x.ndim - merged], -1)
  powers = None
  if codec.map is None:
    codes, scales, powers = range_expansion.expand(
      root(x), codec.format, codec.block
    )
  else:
    # The root of the largest, not the largest root: XLA would compute all roots
    # once more, one by one, within the reduction.
    scales = root(groups.largest(jnp.abs(x), codec.block))
    # What is less than normal may be flushed to zero.
    divisor = jnp.where(scales < jnp.finfo(jnp.float32).tiny, jnp.inf, scales)
    codes = codec.map.encode(
      root(x) / groups.spread(divisor, codec.block, x.shape)
    )
    # Their low bits then: a conversion would first ask for NaN and overflow.
    codes = jax.lax.bitcast_convert_type(codes + 2.0**23, jnp.int32)
    codes = codes.astype(jnp.uint8)
  codes = codes.reshape(shape)
  if codec.bits == 4:
    codes = groups.pack(codes)
  return Coded(codes, scales, powers, size, merged, codec)


def decode(coded: Coded | jax.Array, sqrt: bool = False) -> jax.Array:
  """The array that is stored, in float32.

  Args:
    coded: from `encode`.
    sqrt: of plain arrays, whose codec is not known: whether it was `sqrt`.

  Returns:
    An array in float32.
  """
  if not isinstance(coded, Coded):
    x = coded.astype(jnp.float32)
    return jnp.square(x) if sqrt else x
  codec, codes, shape = coded.codec, coded.codes, coded.shape
  if codec.bits == 4:
    codes = groups.unpack(codes, coded.size)
  codes = codes.reshape(*shape[: len(shape) - coded.merged], -1)
  if codec.map is None:
    x = range_expansion.contract(
      codes, coded.scales, coded.powers, codec.format, codec.block
    )
  else:
    x = codec.map.decode(codes.astype(jnp.int32))
    x = x * groups.spread(coded.scales, codec.block, x.shape)
  x = x.reshape(shape)
  return jnp.square(x) if codec.sqrt else x


def _merged(shape, batch_axes, block):
  """How many last axes it takes to fill a block, within an item."""
  merged = 1
  while math.prod(shape[-merged:]) < block and len(shape) - merged > batch_axes:
    merged += 1
  return merged
