"""Matrices in few bits, with a scale for each tile of rows and columns."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from frugax import names
from frugax.quant import elements, groups
from frugax.quant.qtensor import QTensor
from frugax.quant.rounding import random_bits

STATISTICS = ('absmax', 'rms', 'mean', 'median')
SCALES = ('float32', 'power_up', 'power_down', 'ocp', 'nv')

# Larger magnitudes saturate, so that no product of a scale and a number of the
# format is infinite, even where the scale is rounded up to a power of two.
_LARGEST = 2.0**126
_TINY = float(jnp.finfo(jnp.float32).tiny)
_NV = elements.element('fp8_e4m3')


@dataclasses.dataclass(frozen=True)
class Scaling:
  r"""Which elements share a scale, and how it follows from them.

  .. math::
    \alpha = \max(\mathrm{factor} \cdot \mathrm{statistic} + \mathrm{eps},
    \mathrm{floor}), \qquad s = \alpha / \mathrm{top}

  so that :math:`\alpha` is the magnitude which the format's top stands for.

  Args:
    tile: (rows, columns) that share a scale; None is all of them. (1, None) is
      a scale a row, (None, None) one for the matrix, (1, 32) one for each group
      of 32 along the columns, (128, 128) one for each such block. The last tile
      of a row or column is smaller if need be.
    statistic: 'absmax', 'rms' (the root of the mean square; zero where the
      squares are below float32, as of 1e-20, and the largest that is allowed
      where they are beyond it, as of 1e20), or 'mean' or 'median' of the
      magnitudes, the latter for (None, None) alone.
    factor: see above.
    eps: see above.
    floor: see above.
    scale: how s is stored: 'float32' as it is; 'power_up' and 'power_down' as
      the power of two that is not less and not greater, in one byte; 'ocp' as
      2^(floor(log2 alpha) - floor(log2 top)), the rule of the MX formats, with
      which up to an octave may saturate; 'nv' in float8_e4m3 beside one float32
      for the matrix, as NVFP4 has it.
    stretch: s is this much larger once it has been rounded: 4/3 makes room for
      what 'ocp' saturates in E2M1.
    gain: the numbers that come back are this much larger than those that were
      rounded to, which makes up for what rounding to nearest takes away from
      their product with what was rounded.

  Raises:
    ValueError: an unknown name, or a tile that is empty or has no median.
  """

  tile: tuple[int | None, int | None] = (1, None)
  statistic: str = 'absmax'
  factor: float = 1.0
  eps: float = 0.0
  floor: float = 0.0
  scale: str = 'float32'
  stretch: float = 1.0
  gain: float = 1.0

  def __post_init__(self):
    if self.statistic not in STATISTICS:
      raise names.unknown('statistic', self.statistic, STATISTICS)
    if self.scale not in SCALES:
      raise names.unknown('scale', self.scale, SCALES)
    if len(self.tile) != 2 or any(n is not None and n < 1 for n in self.tile):
      raise ValueError(
        f'tile={self.tile}: give two numbers, at least 1 or None for all'
      )
    if self.statistic == 'median' and self.tile != (None, None):
      raise ValueError(
        f'a median of tile={self.tile}: only (None, None) has one'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiled(QTensor):
  """Matrices in few bits, with a scale for each tile.

  Leading batch axes are axes of all arrays: slicing them gives the items'.

  Attributes:
    data: codes, in the format's `dtype`; of at most 4 bits packed along the
      last axis, unless it was asked for without.
    scales: one a tile, with axes of size 1 to be multiplied with; float32, or
      uint8 exponents, or float8_e4m3fn.
    tensor: float32, the scale of the scales for 'nv', else None.
    item_shape: (*rows, columns) of one matrix, static.
    format: a name in `elements.ELEMENTS`, static.
    scaling: static.
  """

  data: jax.Array
  scales: jax.Array
  tensor: jax.Array | None
  item_shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  format: str = dataclasses.field(metadata={'static': True})
  scaling: Scaling = dataclasses.field(metadata={'static': True})

  @property
  def batch_axes(self) -> int:
    """Number of leading axes over which matrices are stacked."""
    return self.data.ndim - len(self.item_shape)

  def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The array that this stands for, in `dtype`."""
    return dequantize_tiles(self, dtype)

  def requantize(self, x: jax.Array, key: jax.Array | None = None) -> 'Tiled':
    """Another array of this shape, in the same format."""
    return quantize_tiles(x, self.format, self.scaling, self.batch_axes, key)

  def codes(self) -> jax.Array:
    """The codes without packing, in the format's dtype."""
    element, size = elements.element(self.format), self.item_shape[-1]
    if (self.data.shape[-1], self.data.dtype) == (size, element.dtype):
      return self.data
    return element.unpack(self.data, size)

  def packed(self) -> 'Tiled':
    """The same, in its fewest bytes."""
    data = elements.element(self.format).pack(self.codes())
    return dataclasses.replace(self, data=data)

  def numbers(self) -> jax.Array:
    """The numbers of the codes without their scales, in float32."""
    return elements.element(self.format).decode(self.codes())

  def steps(self) -> jax.Array:
    """The scales in float32, to be multiplied with if a tile is a whole row.

    They broadcast to `shape` if the tile is (1, None) or (None, None).
    """
    s = _stored(self.scales)
    if self.tensor is not None:
      s = s * self.tensor
    factor = self.scaling.stretch * self.scaling.gain
    return s * factor if factor != 1 else s


def quantize_tiles(
  x: jax.Array,
  format: str,
  scaling: Scaling | None = None,
  batch_axes: int = 0,
  key: jax.Array | None = None,
  packed: bool = True,
) -> Tiled:
  """Round to a format, with a scale for each tile.

  The last axis holds the columns, and all others after the batch axes the rows.
  Codes keep the axes of x, so they can be sharded as it is.

  A tile that holds a NaN comes back as NaN ('nv': the matrix). Infinity
  saturates like what is beyond 2^126: it comes back finite, and nothing becomes
  NaN that was none. Where a scale would be less than a normal float32 it is the
  least of those, and where all of a tile is zero the tile comes back as zero
  (of a mid-rise format, as the least numbers).

  Args:
    x: a floating-point array of at least one axis beyond the batch axes;
      computed in float32.
    format: a name that `elements.element` knows.
    scaling: None is one scale a row, from the largest magnitude.
    batch_axes: number of leading axes over which matrices are stacked.
    key: a typed key, for stochastic rounding; all items of a stack get the same
      random bits, which depend on the element's index alone. None rounds to
      nearest.
    packed: whether codes of at most 4 bits share bytes.

  Returns:
    A Tiled.

  Raises:
    ValueError: an unknown format, an array that is not floating-point, or too
      few axes.

  Examples:
    >>> x = jnp.array([[-7., 3.4, 1.2, 0.], [14., 9., 5., -1.]])
    >>> q = quantize_tiles(x, 'int4')
    >>> q.data.shape, q.data.dtype, q.scales.shape
    ((2, 2), dtype('uint8'), (2, 1))
    >>> print(dequantize_tiles(q))
    [[-7.  3.  1.  0.]
     [14.  8.  4.  0.]]
    >>> mxfp4 = Scaling((1, 32), scale='ocp')
    >>> quantize_tiles(jnp.ones((2, 64)), 'fp4_e2m1', mxfp4).nbytes
    68

  References:
    Rouhani et al., `OCP Microscaling Formats (MX) Specification
    <https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>`_,
    2023

    NVIDIA, `Pretraining Large Language Models with NVFP4
    <https://arxiv.org/abs/2509.25149>`_, 2025
  """
  element, scaling = elements.element(format), scaling or Scaling()
  if not 0 <= batch_axes < x.ndim:
    raise ValueError(
      f'batch_axes={batch_axes} leaves no axis of an array of shape {x.shape}'
    )
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'quantize_tiles takes floating-point arrays, not {x.dtype}'
    )
  item_shape = x.shape[batch_axes:]
  view = _View(scaling.tile, x.shape, batch_axes)
  t = view.cut(x.astype(jnp.float32))
  scales, tensor = _scales(t, view, scaling, element)
  step = _stored(scales) * scaling.stretch
  if tensor is not None:
    step = step * tensor
    tensor = view.scales(tensor)
  random = None
  if key is not None:
    random = view.cut(random_bits(key, x.shape, batch_axes))
  # A scale of zero, which 'nv' may have, makes zeros.
  numbers = element.round(t / jnp.where(step == 0, jnp.inf, step), random)
  codes = element.encode(view.join(numbers))
  scales = view.scales(scales)
  q = Tiled(codes, scales, tensor, item_shape, format, scaling)
  return q.packed() if packed else q


def dequantize_tiles(
  q: Tiled, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """The array that a Tiled stands for.

  Args:
    q: from `quantize_tiles`, or a slice of it along batch axes.
    dtype: of the result; computed in float32.

  Returns:
    An array of shape `q.shape`.
  """
  return (q.numbers() * spread_steps(q)).astype(dtype)


def spread_steps(q: Tiled) -> jax.Array:
  """The scale of each element, in float32; broadcasts to `q.shape`."""
  view = _View(q.scaling.tile, q.shape, q.batch_axes)
  return view.spread(q.steps())


def within(x: jax.Array, q: Tiled, margin: float = 0.0) -> jax.Array:
  """Which elements lie in the range of the format, where gradients may pass.

  Args:
    x: what was quantised.
    q: the result.
    margin: how far beyond the top an element still counts, in steps of the
      format at its top: 0 is the clip mask, 1/2 the trust mask, which holds
      where the error is at most half a step.

  Returns:
    A boolean array of x's shape; false for NaN.

  Examples:
    >>> q = quantize_tiles(jnp.array([-1., .2, 3., 5.]), 'int4',
    ...                    Scaling(factor=.5))
    >>> print(within(jnp.array([-1., .2, 2.6, 5.]), q, margin=.5))
    [ True  True  True False]

  References:
    Panferov et al., `QuEST: Stable Training of LLMs with 1-Bit Weights and
    Activations <https://arxiv.org/abs/2502.05003>`_, 2025
  """
  element = elements.element(q.format)
  bound = element.top + margin * element.top_step
  # Half a unit in the last place or so, as x / s is rounded.
  bound *= (1 + 2.0**-22) / q.scaling.gain
  return jnp.abs(x.astype(jnp.float32)) <= spread_steps(q) * bound


class _View:
  """An array cut into tiles: axes for the tile and axes within it."""

  def __init__(self, tile, shape, batch):
    self.shape, self.batch = shape, batch
    self.rows, self.columns = shape[batch:-1], shape[-1]
    down, across = tile
    self.down = down if self.rows and down not in (None, 1) else None
    self.across, self.all_rows = across, down is None
    # Axes of the view, and over which of them a tile extends.
    axis = batch
    self.within = []
    if self.down:
      self.within.append(axis + 1)
      axis += 2
    else:
      if down is None:
        self.within += range(axis, axis + len(self.rows))
      axis += len(self.rows)
    self.within.append(axis if across is None else axis + 1)
    self.within = tuple(self.within)

  def cut(self, x):
    batch = self.shape[: self.batch]
    rows, columns = self.rows, (self.columns,)
    if self.down:
      rows = (math.prod(rows),)
      x = x.reshape(*batch, *rows, *columns)
      x, rows = _cut(x, self.batch, self.down)
    if self.across:
      x, columns = _cut(x, x.ndim - 1, self.across)
    return x

  def join(self, t):
    if self.across:
      t = t.reshape(*t.shape[:-2], -1)[..., : self.columns]
    if self.down:
      n = math.prod(self.rows)
      t = t.reshape(*t.shape[: self.batch], -1, self.columns)
      t = t[(slice(None),) * self.batch + (slice(0, n),)]
    return t.reshape(self.shape)

  def scales(self, s):
    """Axes of size 1 that the view adds are taken out."""
    out = []
    if self.down:
      out.append(self.batch + 1)
    if self.across:
      out.append(s.ndim - 1)
    return jnp.squeeze(s, out)

  def spread(self, s):
    """The scales of tiles, for each element or to be broadcast."""
    if self.across:
      s = jnp.repeat(s, self.across, axis=-1)[..., : self.columns]
    if self.down:
      n = math.prod(self.rows)
      s = jnp.repeat(s, self.down, axis=self.batch)
      s = s[(slice(None),) * self.batch + (slice(0, n),)]
      s = s.reshape(*self.shape[:-1], s.shape[-1])
    return s

  def count(self):
    """Elements of each tile that are not padding; broadcasts to scales."""
    columns = _counts(self.columns, self.across)
    if self.down:
      rows = _counts(math.prod(self.rows), self.down)
      return rows.reshape(rows.shape + (1,) * columns.ndim) * columns
    return columns * (math.prod(self.rows) if self.all_rows else 1)


def _counts(size, n):
  if n is None:
    return np.full((1,), size, np.float32)
  left = size - n * np.arange(-(-size // n))
  return np.minimum(left, n).astype(np.float32)[:, None]


def _cut(x, axis, n):
  """One axis into pieces of n, the last filled with zeros."""
  size = x.shape[axis]
  if size % n:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -size % n)
    x = jnp.pad(x, pad)
  cut = (-(-size // n), n)
  return x.reshape(*x.shape[:axis], *cut, *x.shape[axis + 1 :]), cut


def _scales(t, view, scaling, element):
  """The scales to store, and that of the matrix if there is one."""
  size = jnp.abs(t)
  if scaling.statistic == 'absmax':
    statistic = groups.maximum(size, view.within, keepdims=True)
  elif scaling.statistic == 'median':
    statistic = jnp.median(size, view.within, keepdims=True)
  else:
    power = size if scaling.statistic == 'mean' else size * size
    statistic = power.sum(view.within, keepdims=True) / view.count()
    if scaling.statistic == 'rms':
      statistic = jnp.sqrt(statistic)
  alpha = jnp.maximum(scaling.factor * statistic + scaling.eps, scaling.floor)
  alpha = jnp.minimum(alpha, _LARGEST)
  # Not divided: XLA multiplies by the reciprocal under jit, but not without.
  step = alpha * np.float32(1 / element.top)
  if scaling.scale == 'nv':
    axes = tuple(range(view.batch, t.ndim))
    tensor = groups.maximum(step, axes, keepdims=True) * np.float32(1 / _NV.top)
    tensor = jnp.maximum(tensor, _TINY)
    scales = _NV.round(step / tensor)
    return _NV.encode(scales), tensor
  step = jnp.maximum(step, _TINY)
  if scaling.scale == 'float32':
    return step, None
  if scaling.scale == 'ocp':
    octave = math.frexp(element.top)[1] - 1
    step = jnp.maximum(alpha, _TINY) * 2.0**-octave
    step = jnp.maximum(step, _TINY)
  bits = jax.lax.bitcast_convert_type(step, jnp.uint32)
  if scaling.scale == 'power_up':
    bits = bits + 0x7FFFFF
  exponents = (bits >> 23).astype(jnp.uint8)
  return jnp.where(jnp.isnan(step), jnp.uint8(255), exponents), None


def _stored(scales):
  """What is stored, in float32; of exponents 255 is NaN."""
  if scales.dtype != jnp.uint8:
    return scales.astype(jnp.float32)
  bits = scales.astype(jnp.uint32) << 23
  power = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(scales == 255, jnp.nan, power)
