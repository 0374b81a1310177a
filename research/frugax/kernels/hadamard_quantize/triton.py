"""`hadamard_quantize` for GPUs, by Triton: statistics, then codes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from frugax.kernels import products
from frugax.kernels.codes import coded
from frugax.kernels.hadamard_quantize import steps
from frugax.kernels.hadamard_quantize.options import TILE, Copy, Rounded

_LEAST = 16  # rows of a block: a product has no fewer
_WARPS = 8


class _Plan(NamedTuple):
  """All that is static.

  Attributes:
    tokens: rows of x.
    features: columns of x.
    block: tokens of a block, which has 128 features.
    counts: blocks of tokens, and of features.
    group: tokens that share the scales of columns.
    copies: those by 'rows' and by 'columns' that are asked for.
    interpret: whether kernels run as plain JAX.
  """

  tokens: int
  features: int
  block: int
  counts: tuple[int, int]
  group: int
  copies: dict[str, Copy]
  interpret: bool

  @property
  def shape(self) -> tuple[int, int]:
    return self.block, TILE

  @property
  def whole(self) -> tuple[int, int]:
    """Tokens and features with those that fill up the last blocks."""
    return self.counts[0] * self.block, self.counts[1] * TILE

  @property
  def groups(self) -> int:
    return -(-self.tokens // self.group)

  def call(self, kernel, given, specs, out, name):
    """A program a block; inputs and outputs are dicts of arrays."""
    x = given['x']
    varying = jax.typeof(x).manual_axis_type
    shapes = {
      key: jax.ShapeDtypeStruct(*array, manual_axis_type=varying)
      for key, (*array, _) in out.items()
    }
    rotations = {c.rotation for c in self.copies.values() if c.along != 'none'}
    cost = products.rounding_cost(
      x.size,
      len(self.copies),
      len(rotations) * _count(x.dtype),
      [*given.values(), *shapes.values()],
    )
    return pl.pallas_call(
      functools.partial(kernel, self),
      grid=self.counts,
      in_specs=[specs],
      out_specs={key: spec for key, (*_, spec) in out.items()},
      out_shape=shapes,
      cost_estimate=cost,
      compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
      interpret=self.interpret,
      name=name,
    )(given)


def refusal(tokens: int, rows: Copy | None, columns: Copy | None) -> str | None:
  """What is asked for that the kernels do not do; None if they do it all.

  Examples:
    >>> from frugax.quant import Scaling
    >>> refusal(99, None, Copy(scaling=Scaling((1, 40))))
    'groups of 40 tokens: kernels take multiples of 16'
  """
  group = columns.scaling.tile[1] if columns else None
  turned = any(c.along == 'tokens' for c in (rows, columns) if c)
  least = TILE if turned else _LEAST
  if group and group < tokens and group % least:
    return f'groups of {group} tokens: kernels take multiples of {least}'
  return None


def copies_of(
  x: jax.Array,
  rows: Copy | None,
  columns: Copy | None,
  signs: dict[str, jax.Array],
  words: jax.Array | None,
  interpret: bool = False,
) -> tuple[Rounded | None, Rounded | None]:
  """See `frugax.kernels.hadamard_quantize`.

  A program has a block of up to 128 tokens and 128 features. The first kernel
  reads x for the statistics of its rows and of its columns, block by block, of
  which XLA makes the scales; the second reads it for the codes of both copies,
  from the cache where x fits into it (50 MB on Hopper).

  Args:
    x: (tokens, features), bfloat16 or float32.
    rows: the copy with a scale a row, or None.
    columns: the copy with a scale a column, or None.
    signs: of the rotations with signs, by the axis that is rotated.
    words: see `steps.bits`; None if all is rounded to nearest.
    interpret: run as plain JAX.

  Returns:
    Both copies.
  """
  plan = _plan(x, rows, columns, interpret)
  given, specs = _inputs(plan, x, signs)
  numbers = {
    'rows': ((plan.counts[1], plan.whole[0]), _of_rows(plan)),
    'columns': ((plan.counts[0], plan.whole[1]), _of_columns()),
  }
  out = {
    name: (numbers[name][0], jnp.float32, numbers[name][1])
    for name in plan.copies
  }
  totals = plan.call(_gather, given, specs, out, 'hadamard_quantize_scales')
  scales, out = {}, {}
  for name, copy in plan.copies.items():
    scales[name], inverse = _scales(plan, name, totals[name])
    if name == 'rows':
      given[name] = products.pad(inverse, 0, plan.whole[0])
      specs[name] = pl.BlockSpec((plan.block,), lambda i, j: (i,))
    else:
      given[name] = products.pad(inverse, 1, plan.whole[1])
      each = plan.group // plan.block if plan.groups > 1 else plan.counts[0]
      specs[name] = pl.BlockSpec(
        (None, TILE), functools.partial(lambda each, i, j: (i // each, j), each)
      )
    # Integers of 4 bits leave the kernel in 8.
    dtype = jnp.int8 if copy.dtype == jnp.int4 else copy.dtype
    block = pl.BlockSpec(plan.shape, lambda i, j: (i, j))
    out[f'{name} codes'] = x.shape, dtype, block
    if copy.mask != 'none':
      packed = plan.whole[0], plan.whole[1] // 8
      block = pl.BlockSpec((plan.block, TILE // 8), lambda i, j: (i, j))
      out[f'{name} mask'] = packed, jnp.uint8, block
    if copy.sums:
      out[f'{name} sums'] = numbers[name][0], jnp.int32, numbers[name][1]
  if words is not None:
    given['words'], specs['words'] = words, _same(words)
  found = plan.call(_round, given, specs, out, 'hadamard_quantize')
  return tuple(
    _rounded(plan, name, scales[name], found) if name in scales else None
    for name in ('rows', 'columns')
  )


def _plan(x, rows, columns, interpret):
  tokens, features = x.shape
  if reason := refusal(tokens, rows, columns):
    raise ValueError(f"{reason}; give such a tile, or implementation='xla'")
  copies = {n: c for n, c in (('rows', rows), ('columns', columns)) if c}
  group = columns.scaling.tile[1] if columns else None
  group = tokens if group is None else min(group, tokens)
  block = TILE
  while group < tokens and group % block:
    block //= 2
  counts = -(-tokens // block), -(-features // TILE)
  return _Plan(tokens, features, block, counts, group, copies, interpret)


def _inputs(plan, x, signs):
  """x, and of each rotation the matrices, their gains, and its signs."""
  given = {'x': x}
  specs = {'x': pl.BlockSpec(plan.shape, lambda i, j: (i, j))}
  for copy in plan.copies.values():
    if copy.along == 'none':
      continue
    axis = int(copy.along == 'features')
    matrices, gains = steps.rotation(x.shape[axis], copy.block)
    for name, array in (
      ('matrices', jnp.asarray(matrices, jnp.bfloat16)),
      ('gains', jnp.asarray(gains)),
    ):
      given[_key(name, copy)] = array
      specs[_key(name, copy)] = _same(array)
    if copy.signs:
      found = products.pad(signs[copy.along], 0, plan.whole[axis])
      given[_key('signs', copy)] = found
      specs[_key('signs', copy)] = pl.BlockSpec(
        plan.shape[axis : axis + 1],
        (lambda i, j: (j,)) if axis else (lambda i, j: (i,)),
      )
  return given, specs


def _key(name, copy):
  return f'{name} {copy.rotation}'


def _same(array):
  """For all programs."""
  return pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)


def _of_rows(plan):
  """A number for each row of a block, of all blocks (columns, rows)."""
  return pl.BlockSpec((None, plan.block), lambda i, j: (j, i))


def _of_columns():
  return pl.BlockSpec((None, TILE), lambda i, j: (i, j))


def _gather(plan, given, out):
  """The statistics of a block."""
  turned = _rotations(plan, given)
  for name, copy in plan.copies.items():
    axis = 1 if name == 'rows' else 0
    y = steps.statistic(copy.scaling, turned(copy))
    if copy.scaling.statistic == 'absmax':
      out[name][...] = steps.largest(y, axis).reshape(-1)
    else:
      out[name][...] = y.sum(axis)


def _round(plan, given, out):
  """The codes of a block, their mask and their sums."""
  turned, inside = _rotations(plan, given), _inside(plan)
  start = pl.program_id(0) * plan.block, pl.program_id(1) * TILE
  for name, copy in plan.copies.items():
    axis = 1 if name == 'rows' else 0
    t = turned(copy) * jnp.expand_dims(given[name][...], axis)
    random = None
    if copy.stochastic:
      random = steps.bits(given['words'], 2 - 2 * axis, plan.shape, start)
    codes = coded(copy.element, t, random, _nearest, not copy.bounded)
    if codes.dtype == jnp.float32:
      codes = codes.astype(jnp.int32)
    ref = out[f'{name} codes']
    pltriton.store(ref, codes.astype(ref.dtype), mask=inside)
    if copy.mask != 'none':
      mask = jnp.abs(t) <= copy.bound
      mask = mask if inside is None else mask & inside
      bits = mask.astype(jnp.int32).reshape(plan.block, TILE // 8, 8)
      bits = bits << jax.lax.broadcasted_iota(jnp.int32, bits.shape, 2)
      out[f'{name} mask'][...] = bits.sum(2).astype(jnp.uint8)
    if copy.sums:
      whole = codes if inside is None else jnp.where(inside, codes, 0)
      out[f'{name} sums'][...] = whole.sum(axis)


def _inside(plan):
  """Which elements of a block are x's; None for all."""
  found = None
  for axis, (size, whole) in enumerate(
    zip((plan.tokens, plan.features), plan.whole, strict=True)
  ):
    if size < whole:
      length = plan.shape[axis]
      index = jax.lax.broadcasted_iota(jnp.int32, plan.shape, axis)
      within = pl.program_id(axis) * length + index < size
      found = within if found is None else found & within
  return found


def _rotations(plan, given):
  """A function from a copy to its rotated block, in float32, once for each."""
  inside = _inside(plan)
  if inside is None:
    x = given['x'][...]
  else:
    x = pltriton.load(given['x'], mask=inside, other=0.0)
  found = {}

  def turned(copy):
    if copy.rotation not in found:
      found[copy.rotation] = _turned(plan, given, copy, x)
    return found[copy.rotation]

  return turned


def _turned(plan, given, copy, x):
  if copy.along == 'none':
    return x.astype(jnp.float32)
  axis = int(copy.along == 'features')
  ready, limit = x.astype(jnp.float32), steps.LARGEST
  # A clip would make a number of NaN, of which Triton's extremes know nothing.
  ready = jnp.where(ready > limit, limit, ready)
  ready = jnp.where(ready < -limit, -limit, ready)
  if copy.signs:
    signs = given[_key('signs', copy)][...]
    ready = ready * jnp.expand_dims(signs, 1 - axis)
  matrices = given[_key('matrices', copy)]
  last = 0
  if (plan.features if axis else plan.tokens) % TILE:
    last = (pl.program_id(axis) == plan.counts[axis] - 1).astype(jnp.int32)
  y = 0.0
  for part in _parts(ready, x.dtype):
    # A matrix and its transpose are the same.
    pair = (part, matrices[last]) if axis else (matrices[last], part)
    y += steps.dot(*pair, plan.interpret)
  gains = given[_key('gains', copy)][last]
  return y * jnp.expand_dims(gains, 1 - axis)


def _count(dtype):
  """Numbers of bfloat16 whose sum is any number of a dtype."""
  return 1 if dtype == jnp.bfloat16 else 3


def _parts(x, dtype):
  """Arrays of bfloat16 whose sum is x, which matrix units multiply exactly."""
  parts = []
  for _ in range(_count(dtype)):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def _nearest(t):
  """Triton has no function for it; `codes.nearest` may take a product in."""
  below = jnp.floor(t)
  left, half = t - below, below * 0.5
  odd = jnp.floor(half) != half
  up = (left > 0.5) | ((left == 0.5) & odd)
  return below + jnp.where(up, 1.0, 0.0)


def _together(plan, name, found, reduce):
  """Of rows (tokens, 1), of columns (groups, features), from blocks' own."""
  if name == 'rows':
    return reduce(found, 0).reshape(-1, 1)[: plan.tokens]
  found = found[:, : plan.features]
  if plan.groups > 1:
    each = plan.group // plan.block
    found = products.pad(found, 0, plan.groups * each)
    found = found.reshape(plan.groups, each, -1)
    return reduce(found, 1).reshape(plan.groups, -1)
  return reduce(found, 0).reshape(1, -1)


def _scales(plan, name, totals):
  """The scales, and what to multiply with: of rows (tokens,)."""
  copy, reduce = plan.copies[name], jnp.sum
  if copy.scaling.statistic == 'absmax':
    reduce = steps.largest
  totals = _together(plan, name, totals, reduce)
  if name == 'rows':
    scales, inverse = steps.step(copy, totals, plan.features)
    return scales, inverse[:, 0]
  first = np.arange(plan.groups) * plan.group
  counts = np.minimum(plan.group, plan.tokens - first)[:, None]
  return steps.step(copy, totals, jnp.asarray(counts, jnp.float32))


def _rounded(plan, name, scales, found):
  copy, mask, sums = plan.copies[name], None, None
  if copy.mask != 'none':
    mask = found[f'{name} mask'][: plan.tokens, : -(-plan.features // 8)]
  if copy.sums:
    sums = _together(plan, name, found[f'{name} sums'], jnp.sum)
  codes = found[f'{name} codes'].astype(copy.dtype)
  group = plan.group if name == 'columns' else None
  return Rounded(codes, scales, mask, sums, copy.format, group)
