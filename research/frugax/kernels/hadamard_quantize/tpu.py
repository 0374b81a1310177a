"""`hadamard_quantize` for TPUs, by Mosaic: the grid and its blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from frugax.kernels import blocks as tables
from frugax.kernels import products
from frugax.kernels.hadamard_quantize import kernel, steps
from frugax.kernels.hadamard_quantize.options import TILE, Copy, Rounded

_ROWS = (256, 128, 64, 32)  # of a block; 8-bit registers hold 32
_PACKED = 8 * TILE  # elements whose mask fills the lanes of a register


def copies_of(
  x: jax.Array,
  rows: Copy | None,
  columns: Copy | None,
  signs: dict[str, jax.Array],
  words: jax.Array | None,
  interpret: bool = False,
) -> tuple[Rounded | None, Rounded | None]:
  """See `frugax.kernels.hadamard_quantize`.

  The grid runs over groups of tokens that share the scales of columns (all of
  them if there is no copy by columns), and in each over blocks of tokens with
  all their features: once to round by rows and to gather the statistic of
  columns, and once more to round by columns. In between the blocks of a group
  stay in VMEM if they fit, and x is read once; else it is read again.

  Args:
    x: (tokens, features), bfloat16 or float32.
    rows: the copy with a scale a row, or None.
    columns: the copy with a scale a column, or None.
    signs: of the rotations with signs, by the axis that is rotated.
    words: uint32, (7,): two for the bits of each copy, then the first row and
      column of x and the number of columns in the array of which x is a part;
      None if all is rounded to nearest.
    interpret: run as plain JAX.

  Returns:
    Both copies.
  """
  plan = _plan(x, rows, columns)
  tokens, features = x.shape
  groups, _, count = plan.grid
  held = not plan.keep

  # The last group may have blocks beyond the end, for which nothing is done.
  end = -(-tokens // plan.block) - 1

  def block(group, phase, i):
    return jnp.minimum(group * count + i, end), 0

  def first(group, phase, i):
    # Stays in the second phase where it was: nothing is read or written.
    return block(group, phase, jnp.where(phase == 0, i, count - 1))

  def second(group, phase, i):
    return block(group, phase, jnp.where(phase == 0, 0, i))

  operands = [x]
  specs = [pl.BlockSpec((plan.block, plan.width), block if held else first)]
  for copy in plan.rotations:
    axis = int(copy.along == 'features')
    matrices, gains = steps.rotation(x.shape[axis], copy.block)
    operands.append(jnp.asarray(matrices, x.dtype))
    specs.append(_whole(matrices.shape))
    gains = jnp.asarray(gains[:, None, :] if axis else gains[:, :, None])
    operands.append(gains)
    specs.append(_whole(gains.shape))
    if copy.signs and axis:
      operands.append(products.pad(signs['features'][None], 1, plan.width))
      specs.append(pl.BlockSpec((1, plan.width), lambda g, p, i: (0, 0)))
    elif copy.signs:
      # What lies beyond the ends is zero times something.
      padded = -(-tokens // plan.block) * plan.block
      operands.append(products.pad(signs['tokens'][:, None], 0, padded))
      specs.append(pl.BlockSpec((plan.block, 1), block))
  if plan.masked:
    operands.append(jnp.asarray(kernel.packing(), jnp.bfloat16))
    specs.append(_whole((_PACKED, TILE)))
  if words is not None:
    operands.append(words)
    specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))

  shapes, out_specs = [], []

  def out(shape, dtype, block_shape, index):
    shapes.append(
      jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
      )
    )
    out_specs.append(pl.BlockSpec(block_shape, index))

  for copy, index in ((rows, first), (columns, second)):
    if copy is None:
      continue
    out((tokens, features), copy.dtype, (plan.block, plan.width), index)
    scale_shape = ((tokens, 1), (plan.block, 1), index)
    if copy is columns:
      scale_shape = (
        (groups, 1, features),
        (1, 1, plan.width),
        lambda g, p, i: (g, 0, 0),
      )
    out(scale_shape[0], jnp.float32, *scale_shape[1:])
    if copy.mask != 'none':
      packed = plan.width // 8
      out((tokens, packed), jnp.uint8, (plan.block, packed), index)
    if copy.sums:
      out(scale_shape[0], jnp.int32, *scale_shape[1:])
  results = pl.pallas_call(
    functools.partial(kernel.run, plan, interpret),
    grid=plan.grid,
    in_specs=specs,
    out_specs=out_specs,
    out_shape=shapes,
    scratch_shapes=plan.scratch(x.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(
        'parallel',
        'arbitrary',
        'arbitrary' if columns else 'parallel',
      ),
      vmem_limit_bytes=tables.VMEM_LIMIT,
    ),
    cost_estimate=_cost(plan, x, [*operands, *shapes]),
    interpret=interpret,
    name='hadamard_quantize',
  )(*operands)
  results = list(results)
  return tuple(
    copy and _rounded(copy, results, x.shape, group)
    for copy, group in ((rows, None), (columns, plan.group))
  )


def _whole(shape):
  return pl.BlockSpec(shape, lambda g, p, i: (0,) * len(shape))


def _rounded(copy, results, shape, group):
  """The next results as a copy."""
  codes, scales = results.pop(0), results.pop(0)
  mask = sums = None
  if copy.mask != 'none':
    mask = results.pop(0)[:, : -(-shape[1] // 8)]
  if copy.sums:
    sums = results.pop(0)
    sums = sums[:, 0] if sums.ndim == 3 else sums
  scales = scales[:, 0] if scales.ndim == 3 else scales
  return Rounded(codes, scales, mask, sums, copy.format, group)


def _plan(x, rows, columns):
  tokens, features = x.shape
  copies = [c for c in (rows, columns) if c]
  rotations = {c.rotation: c for c in copies if c.along != 'none'}
  masked = any(c.mask != 'none' for c in copies)
  unit = _PACKED if masked else TILE
  width = -(-features // unit) * unit
  group = columns.scaling.tile[1] if columns else None
  if group is None or group >= tokens:
    group = None
  limit = tables.VMEM_LIMIT * 0.9
  least = TILE if any(c.along == 'tokens' for c in copies) else 32
  if group and group % least:
    raise ValueError(
      f'groups of {group} tokens: kernels take multiples of {least}; give such '
      "a tile, or implementation='xla'"
    )
  # Each token's bytes in a block: x and what is written twice, for what is on
  # its way; what is rotated in float32; 1-column results fill a register.
  item = x.dtype.itemsize
  per_token = width * 2 * item + 4 * TILE * 4
  for c in copies:
    per_token += width * 2 * (1 if c.dtype != jnp.int4 else 0.5)
    per_token += width // 4 if c.mask != 'none' else 0
  per_token += width * 4 if rows else 0
  fits = []
  for block in _ROWS:
    if block < least or (group and group % block):
      continue
    if block > least and block // 2 >= (group or tokens):
      continue
    count = -(-(group or tokens) // block)
    kept = width * item * block * count if columns else 0
    if block * per_token + kept <= limit:
      fits.append((block, True))
    elif block * per_token <= limit:
      fits.append((block, False))
  if not fits:
    raise ValueError(
      f'{features} features: a block of {least} tokens does not fit into '
      "VMEM; give implementation='xla'"
    )
  # To read once is worth more than long blocks.
  keep = columns is not None and any(k for _, k in fits)
  block = next(b for b, k in fits if k == keep or not columns)
  count = -(-(group or tokens) // block)
  return kernel.Plan(
    tokens=tokens,
    features=features,
    block=block,
    width=width,
    grid=(
      -(-tokens // group) if group else 1,
      2 if columns else 1,
      count,
    ),
    group=group or tokens,
    keep=keep,
    rows=rows,
    columns=columns,
    rotations=tuple(rotations.values()),
    masked=masked,
  )


def _cost(plan, x, arrays):
  copies = len([c for c in (plan.rows, plan.columns) if c])
  if plan.columns is not None and not plan.keep:
    arrays = [*arrays, x]  # It is read again.
  rotations = copies if plan.rotations else 0
  return products.rounding_cost(x.size, copies, rotations, arrays)
