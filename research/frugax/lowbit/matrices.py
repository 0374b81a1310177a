"""Operands of a product: their matrices, rotations and rounding.

x is (*batch, *rows, columns), w (*batch, *units, columns), and the gradient of
the result g (*batch, *rows, *units).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from frugax.kernels import encode
from frugax.kernels.codes import FORMATS
from frugax.kernels.encode.api import gains as encode_gains
from frugax.lowbit.operands import Operand, Rotation
from frugax.quant import elements, hadamard, quantize_tiles
from frugax.quant.tiles import Tiled, dequantize_tiles, spread_steps, within

_LARGEST = 2.0**100


def view(x, batch, contracted):
  """(*batch, *rows, columns), the columns being all contracted axes."""
  batch, contracted = tuple(batch), tuple(contracted)
  rows = [i for i in range(x.ndim) if i not in (*batch, *contracted)]
  x = x.transpose(*batch, *rows, *contracted)
  kept = len(batch) + len(rows)
  return x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))


def columns_first(x, batch):
  """(*batch, *rows, columns) to (*batch, columns, rows)."""
  return merge(jnp.moveaxis(x, -1, batch), batch + 1)


def tokens_last(g, batch, rows):
  """(*batch, *rows, *units) to (*batch, *units, rows)."""
  n = g.ndim
  order = (*range(batch), *range(rows, n), *range(batch, rows))
  return merge(g.transpose(order), batch + n - rows)


def merge(x, start, stop=None):
  """The axes from start to stop as one."""
  stop = x.ndim if stop is None else stop % x.ndim
  size = math.prod(x.shape[start:stop])
  return x.reshape(*x.shape[:start], size, *x.shape[stop:])


def rounded(operand: Operand, x, batch, key, implementation=None, turned=None):
  """The operand as a Tiled without packing, or an array; its mask or None.

  Args:
    operand: how.
    x: (*batch, *rows, columns).
    batch: how many axes.
    key: for stochastic rounding.
    implementation: 'xla' for no kernel.
    turned: what x is the transpose of, (*columns, *rows), for a kernel to read
      as it lies in memory; None if x lies there as it is.
  """
  if operand.format is None:
    return x, None
  if operand.simulated:
    return operand.simulated(x), None
  key = key if operand.stochastic else None
  q = quantize_tiles(x, operand.format, operand.scaling, batch, key, False)
  if implementation != 'xla' and not batch and _by_kernel(operand, x):
    return _encoded(q, x, key, turned), None
  kept = None
  if operand.keep == '2:4':
    kept = _two_of_four_pairs(x)
    # The code 0 stands for zero in every format that has one.
    codes = jnp.where(kept, q.data, jnp.zeros((), q.data.dtype))
    q = dataclasses.replace(q, data=codes)
  if operand.mask == 'none':
    return q, None
  mask = within(x, q, 0.0 if operand.mask == 'clip' else 0.5)
  if kept is not None and operand.mask == 'trust':
    # What was made zero is trusted where that is a small error.
    half = 0.5 * elements.element(q.format).top_step / q.scaling.gain
    small = jnp.abs(x.astype(jnp.float32)) <= spread_steps(q) * half
    mask = mask & (kept | small)
  return q, mask


def _by_kernel(operand, x):
  """Whether the codes, which follow from the scales, are a kernel's."""
  s = operand.scaling
  plain = (operand.keep, operand.mask, s.gain) == ('all', 'none', 1)
  return (
    plain
    and operand.format in FORMATS
    and s.tile in ((1, None), (None, None))
    and s.scale != 'nv'
    and x.dtype in (jnp.bfloat16, jnp.float32)
    and 0 < x.size <= 2**31
    and encode_gains()
  )


def _encoded(q, x, key, turned):
  """The same with the codes of a kernel, and scales from what it reads."""

  def by_kernel(x):
    if turned is None:
      x, scaled = x.reshape(-1, q.shape[-1]), q
    else:
      x = x.reshape(q.shape[-1], -1)
      tile = q.scaling.tile[::-1]
      scaling = dataclasses.replace(q.scaling, tile=tile)
      scaled = quantize_tiles(x, q.format, scaling, packed=False)
    steps = scaled.steps().reshape(-1, 1)
    data = encode(x, steps, q.format, turned=turned is not None, key=key)
    scales = scaled.scales.reshape(q.scales.shape)
    return dataclasses.replace(q, data=data.reshape(q.shape), scales=scales)

  # Where x is, is not known when it is traced.
  return lax.platform_dependent(
    x if turned is None else turned, cpu=lambda _: q, default=by_kernel
  )


def _two_of_four_pairs(x):
  """Which numbers of the last axis stay; of pairs alike, the earlier ones.

  What is left of the axis after the whole eights is filled up with zeros.
  """
  *rows, size = x.shape
  x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(rows) + [(0, -size % 8)])
  pairs = jnp.abs(x).reshape(*rows, -1, 4, 2)
  # Halved, so that no norm of finite numbers is infinite.
  norm = jnp.hypot(pairs[..., 0] / 2, pairs[..., 1] / 2)
  a, b = norm[..., :, None], norm[..., None, :]
  earlier = jnp.arange(4)[:, None] > jnp.arange(4)
  ahead = ((b > a) | ((b == a) & earlier)).sum(-1)
  kept = jnp.broadcast_to((ahead < 2)[..., None], pairs.shape)
  return kept.reshape(x.shape)[..., :size]


def as_array(x: Tiled | jax.Array, dtype) -> jax.Array:
  """What the product multiplies, as an array."""
  return dequantize_tiles(x, dtype) if isinstance(x, Tiled) else x


def turned(x, rotation: Rotation | None, signs):
  """Rotated along the columns, if that is what the rotation is of."""
  if rotation is None or rotation.along != 'contracted':
    return x
  return rotate(x, rotation, signs)


def rotate(x, rotation, signs, axis=-1, inverse=False):
  """In float32. Sums of infinities of both signs would be NaN."""
  x = jnp.clip(x.astype(jnp.float32), -_LARGEST, _LARGEST)
  if rotation.signs == 'fixed':
    signs = jax.random.key(0, impl='threefry2x32')
  return hadamard(x, axis, rotation.block, signs, inverse)


def unturned(rotation: Rotation | None, x, mask, own):
  """A gradient in the basis of the layer's arrays, where its mask lets it pass.

  Where the other operand was that of the forward product, the gradient is that
  of the rotated array, and so is the mask.
  """
  if rotation is None or (own and mask is None):
    return x if mask is None else jnp.where(mask, x, 0)
  if own:
    x = rotate(x, rotation, None)
  if mask is not None:
    x = jnp.where(mask, x, 0)
  return rotate(x, rotation, None, inverse=True)
