"""One function for all formats: `quantize`, and `dequantize` back."""

import jax
import jax.numpy as jnp

from frugax import names
from frugax.quant import blocks, tiles
from frugax.quant.elements import ELEMENTS
from frugax.quant.qtensor import QTensor
from frugax.quant.tiles import Scaling

_MX = Scaling((1, 32), scale='ocp')
# Formats that are an element and a scaling in one.
SCALED: dict[str, tuple[str, Scaling]] = {
  'mxfp8': ('fp8_e4m3', _MX),
  'mxfp8_e4m3': ('fp8_e4m3', _MX),
  'mxfp8_e5m2': ('fp8_e5m2', _MX),
  'mxfp6_e3m2': ('fp6_e3m2', _MX),
  'mxfp6_e2m3': ('fp6_e2m3', _MX),
  'mxfp4': ('fp4_e2m1', _MX),
  'mxint8': ('int8', _MX),
  'nvfp4': ('fp4_e2m1', Scaling((1, 16), scale='nv')),
}
FORMATS = (*ELEMENTS, *SCALED)
GRANULARITIES = ('flat', 'tensor', 'row', 'channel', 'group', 'block')

_GROUP = 128  # elements of a group, and of either side of a block


def quantize(
  x: jax.Array,
  format: str,
  block: int | None = None,
  batch_axes: int = 0,
  key: jax.Array | None = None,
  *,
  granularity: str | None = None,
  scaling: Scaling | None = None,
) -> QTensor:
  r"""Round to a format of a few bits.

  The formats are those of `element`, 'int2' to 'int8', 'int16', 'ternary',
  'rise1' to 'rise8', 'e{E}m{M}', 'fp8_e4m3', 'fp8_e5m2' and so on; and the
  block formats 'mxfp8' ('mxfp8_e5m2'), 'mxfp6_e3m2', 'mxfp6_e2m3', 'mxfp4' and
  'mxint8', groups of 32 with a power of two, and 'nvfp4', groups of 16.

  Numbers that share a scale:

  - 'flat': `block` (256) neighbours of the flattened item. For 'int4' and
    'int8', whose default it is: the codes are unsigned, with a zero point for
    each block; see `frugax.quant.blocks.quantize`.
  - 'tensor': all of an item;
  - 'row': all along the last axis, the default of the other formats;
  - 'channel': all with the same place along the last axis;
  - 'group': `block` (128) neighbours along the last axis;
  - 'block': of `block` x `block` (128 x 128) along it and all other axes.

  Their scale puts the largest magnitude of them on the largest number of the
  format; `scaling` has other rules. See `frugax.quant.quantize_tiles` for what
  becomes of NaN, infinities and zeros.

  Args:
    x: a floating-point array, of at least one axis beyond the batch axes unless
      it is 'flat'; computed in float32.
    format: see above.
    block: see above; makes 'group' the default of formats that have no other.
    batch_axes: number of leading axes over which items are stacked: quantising
      a stack is stacking.
    key: a typed key, for stochastic rounding, whose random bits depend on the
      key and the element's place in the item: they are the same in any blocks,
      under jit or not, and on any mesh. None rounds to nearest.
    granularity: see above.
    scaling: in place of granularity and block.

  Returns:
    A QTensor.

  Raises:
    ValueError: an unknown name, with the nearest valid one; a granularity that
      the format has not; arguments that contradict each other; an array that is
      not floating-point, or has too few axes.

  Examples:
    >>> x = jnp.linspace(-1., 2., 512).reshape(2, 256)
    >>> quantize(x, 'int4').nbytes, quantize(x, 'nvfp4').nbytes
    (264, 292)
    >>> print(dequantize(quantize(jnp.array([[6., 2.6, -.4]]), 'fp4_e2m1')))
    [[ 6.   3.  -0.5]]

  References:
    Rouhani et al., `OCP Microscaling Formats (MX) Specification
    <https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>`_,
    2023
  """
  if format not in FORMATS:
    raise names.unknown('format', format, FORMATS)
  if granularity is not None and granularity not in GRANULARITIES:
    raise names.unknown('granularity', granularity, GRANULARITIES)
  if block is not None and block < 1:
    raise ValueError(f'block={block}: give the elements a block, at least 1')
  named = granularity is not None or block is not None
  if named and (scaling is not None or format in SCALED):
    raise ValueError(
      f'granularity={granularity!r}, block={block}: format={format!r} and '
      f'scaling={scaling} say so already; give neither'
    )
  if format in SCALED:
    if scaling is not None:
      raise ValueError(
        f'scaling={scaling}: {format!r} has one; name the element format, '
        f'{SCALED[format][0]!r}, to give another'
      )
    format, scaling = SCALED[format]
  if granularity is None and scaling is None:
    default = 'row' if block is None else 'group'
    granularity = 'flat' if format in blocks.AFFINE else default
  if granularity == 'flat':
    if format not in blocks.AFFINE:
      raise ValueError(
        f"granularity='flat' of format={format!r}: only "
        f"{' and '.join(blocks.AFFINE)} have it; give 'group'"
      )
    return blocks.quantize(x, format, block or 256, batch_axes, key)
  if scaling is None:
    n = _GROUP if block is None else block
    if block is not None and granularity not in ('group', 'block'):
      raise ValueError(
        f'block={block}, but granularity={granularity!r} has none: give '
        "'group', 'block' or 'flat', or no block"
      )
    tile = {
      'tensor': (None, None),
      'row': (1, None),
      'channel': (None, 1),
      'group': (1, n),
      'block': (n, n),
    }[granularity]
    scaling = Scaling(tile)
  return tiles.quantize_tiles(x, format, scaling, batch_axes, key)


def dequantize(
  q: QTensor, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """The array that a QTensor stands for.

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
  return q.dequantize(dtype)
