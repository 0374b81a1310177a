"""The body of `hadamard_quantize` for TPUs: what is done with one block."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from frugax.kernels import counter
from frugax.kernels.codes import coded
from frugax.kernels.hadamard_quantize import steps
from frugax.kernels.hadamard_quantize.options import TILE, Copy

_SUBLANES = 8


class Plan(NamedTuple):
  """All that is static.

  Attributes:
    tokens: rows of x.
    features: columns of x.
    block: tokens of a block.
    width: columns of a block, those of x and what fills the last register.
    grid: groups of tokens, phases, blocks of a group.
    group: tokens that share the scales of columns.
    keep: whether the blocks of a group stay in VMEM.
    rows: the copy by rows, or None.
    columns: the copy by columns, or None.
    rotations: copies with the different rotations.
    masked: whether there is a mask.
  """

  tokens: int
  features: int
  block: int
  width: int
  grid: tuple[int, int, int]
  group: int
  keep: bool
  rows: Copy | None
  columns: Copy | None
  rotations: tuple[Copy, ...]
  masked: bool

  @property
  def together(self) -> int:
    """Tiles of 128 columns that one turn of a loop computes."""
    tiles = self.width // TILE
    if self.masked:
      return 8
    return next(n for n in (4, 3, 2, 1) if tiles % n == 0)

  def scratch(self, dtype) -> list:
    """What stays in VMEM from one step or loop to the next."""
    found = []
    if self.rows:
      found.append(pltpu.VMEM((self.block, self.width), jnp.float32))
    if self.columns:
      found.append(pltpu.VMEM((_SUBLANES, self.width), jnp.float32))
      if self.columns.sums:
        found.append(pltpu.VMEM((_SUBLANES, self.width), jnp.float32))
    if self.keep:
      kept = self.grid[2] * self.block
      found.append(pltpu.VMEM((kept, self.width), dtype))
    return found


def packing() -> np.ndarray:
  """(1024, 128), by which bits become bytes in a product of matrices.

  Examples:
    >>> print(packing()[:9, :2].astype(int).T)
    [[  1   2   4   8  16  32  64 128   0]
     [  0   0   0   0   0   0   0   0   1]]
  """
  places = np.arange(8 * TILE)
  out = np.zeros((8 * TILE, TILE), np.float32)
  out[places, places // 8] = 2.0 ** (places % 8)
  return out


class _Refs(NamedTuple):
  """Of a copy's results; of the mask and the sums if there are any."""

  codes: object
  scales: object
  mask: object
  sums: object


def run(plan: Plan, interpret: bool, x, *refs):
  """The kernel of a step of the grid; see `tpu.copies_of`."""
  _Step(plan, interpret, x, list(refs)).run()


class _Step:
  """The references of a step, by what they are."""

  def __init__(self, plan, interpret, x, refs):
    self.plan, self.interpret, self.x = plan, interpret, x
    self.group, self.phase, self.i = (pl.program_id(n) for n in range(3))
    self.rotations = {}
    for copy in plan.rotations:
      matrices, scales = refs.pop(0), refs.pop(0)
      signs = refs.pop(0) if copy.signs else None
      self.rotations[copy.rotation] = matrices, scales, signs
    self.packing = refs.pop(0) if plan.masked else None
    copies = [c for c in (plan.rows, plan.columns) if c]
    random = any(c.stochastic for c in copies)
    self.words = refs.pop(0) if random else None
    self.rows = self._results(plan.rows, refs)
    self.columns = self._results(plan.columns, refs)
    self.rotated = refs.pop(0) if plan.rows else None
    self.total = refs.pop(0) if plan.columns else None
    has_sums = plan.columns is not None and plan.columns.sums
    self.column_sums = refs.pop(0) if has_sums else None
    self.kept = refs.pop(0) if plan.keep else None

  def _results(self, copy, refs):
    if copy is None:
      return None
    codes, scales = refs.pop(0), refs.pop(0)
    mask = refs.pop(0) if copy.mask != 'none' else None
    return _Refs(codes, scales, mask, refs.pop(0) if copy.sums else None)

  def run(self):
    if not self.plan.columns:
      self._by_rows()
      return
    inside = self._first_row < self.plan.tokens

    @pl.when((self.phase == 0) & inside)
    def _():
      self._gather()
      if self.plan.rows:
        self._by_rows()

    @pl.when((self.phase == 1) & inside)
    def _():
      self._by_columns()

  @property
  def _first_row(self):
    return (self.group * self.plan.grid[2] + self.i) * self.plan.block

  def _loop(self, body, init=None):
    """`body(column of the first tile, carry)`, for each turn."""
    turn = self.plan.together * TILE

    def step(j, carry):
      return body(pl.multiple_of(j * turn, TILE), carry)

    return lax.fori_loop(0, self.plan.width // turn, step, init)

  def _tiles(self, column):
    return [
      pl.ds(pl.multiple_of(column + n * TILE, TILE), TILE)
      for n in range(self.plan.together)
    ]

  def _by_rows(self):
    plan, copy, refs = self.plan, self.plan.rows, self.rows
    shape = (plan.block, TILE)

    def rotate(column, total):
      for tile in self._tiles(column):
        y = self._turned(copy, self._ready(copy, tile), tile)
        self.rotated[:, tile] = y
        total = _gathered(copy, total, steps.statistic(copy.scaling, y))
      return total

    total = self._loop(rotate, jnp.zeros(shape, jnp.float32))
    total = _ended(copy, total, axis=1)
    scales, inverse = steps.step(copy, total, plan.features)
    refs.scales[...] = scales
    base = self._base(copy, 0)

    def write(column, sums):
      masks = []
      for tile in self._tiles(column):
        t = self.rotated[:, tile] * inverse
        codes = self._codes(copy, t, tile, base)
        refs.codes[:, tile] = codes.astype(refs.codes.dtype)
        masks.append(self._mask(copy, t, tile))
        if copy.sums:
          inside = self._inside(tile)
          sums += codes if inside is None else jnp.where(inside, codes, 0)
      self._pack(refs, masks, column)
      return sums

    init = jnp.zeros(shape, jnp.int32) if copy.sums else None
    sums = self._loop(write, init)
    if copy.sums:
      # Through float32, which is exact below 2^24: chips sum no integers.
      sums = sums.astype(jnp.float32).sum(1, keepdims=True)
      refs.sums[...] = sums.astype(jnp.int32)

  def _gather(self):
    copy = self.plan.columns

    @pl.when(self.i == 0)
    def _():
      self.total[...] = jnp.zeros_like(self.total)
      if self.column_sums is not None:
        self.column_sums[...] = jnp.zeros_like(self.column_sums)

    def gather(column, _):
      for tile in self._tiles(column):
        ready = self._ready(copy, tile)
        if self.kept is not None:
          self.kept[self._place(), tile] = ready
        y = steps.statistic(copy.scaling, self._turned(copy, ready, tile))
        while len(y) > _SUBLANES:
          half = len(y) // 2
          y = _gathered(copy, y[:half], y[half:])
        self.total[:, tile] = _gathered(copy, self.total[:, tile], y)

    self._loop(gather)

  def _by_columns(self):
    plan, copy, refs = self.plan, self.plan.columns, self.columns
    count = jnp.minimum(plan.group, plan.tokens - self.group * plan.group)
    base = self._base(copy, 2)

    def write(column, _):
      masks = []
      for tile in self._tiles(column):
        total = _ended(copy, self.total[:, tile], axis=0)
        scales, inverse = steps.step(copy, total, count.astype(jnp.float32))
        refs.scales[0, :, tile] = scales
        if self.kept is None:
          ready = self._ready(copy, tile)
        else:
          ready = self.kept[self._place(), tile]
        t = self._turned(copy, ready, tile) * inverse
        codes = self._codes(copy, t, tile, base)
        refs.codes[:, tile] = codes.astype(refs.codes.dtype)
        masks.append(self._mask(copy, t, tile))
        if copy.sums:
          self._add_columns(codes, refs, tile)
      self._pack(refs, masks, column)

    self._loop(write)

  def _add_columns(self, codes, refs, tile):
    codes = codes.astype(jnp.float32)
    if self.plan.tokens % self.plan.block:
      codes = jnp.where(self._before_end(), codes, 0)
    self.column_sums[:, tile] += codes.reshape(-1, _SUBLANES, TILE).sum(0)
    sums = self.column_sums[:, tile].sum(0, keepdims=True)
    refs.sums[0, :, tile] = sums.astype(jnp.int32)

  def _place(self):
    """Of the block among those that stay."""
    block = self.plan.block
    return pl.ds(pl.multiple_of(self.i * block, block), block)

  def _inside(self, tile):
    """Which elements are features of x; None for all."""
    if self.plan.features == self.plan.width:
      return None
    columns = lax.broadcasted_iota(jnp.int32, (self.plan.block, TILE), 1)
    return columns < self.plan.features - tile.start

  def _before_end(self):
    rows = lax.broadcasted_iota(jnp.int32, (self.plan.block, TILE), 0)
    return rows < self.plan.tokens - self._first_row

  def _ready(self, copy, tile):
    """A tile of x, as it is multiplied: clipped, and zero beyond the ends."""
    x, plan = self.x[:, tile], self.plan
    inside = self._inside(tile)
    if plan.tokens % plan.block and (plan.columns or copy.along == 'tokens'):
      rows = self._before_end()
      inside = rows if inside is None else inside & rows
    if copy.along == 'none' and inside is None:
      return x
    dtype, x = x.dtype, x.astype(jnp.float32)
    if copy.along != 'none':
      x = jnp.clip(x, -steps.LARGEST, steps.LARGEST)
      signs = self.rotations[copy.rotation][2]
      if signs is not None:
        x = x * (signs[:, tile] if copy.along == 'features' else signs[...])
    return (x if inside is None else jnp.where(inside, x, 0)).astype(dtype)

  def _dot(self, a, b):
    return steps.dot(a, b, self.interpret)

  def _turned(self, copy, x, tile):
    """The product with a rotation's signs, in float32."""
    if copy.along == 'none':
      return x.astype(jnp.float32)
    matrices, gains, _ = self.rotations[copy.rotation]
    if copy.along == 'features':
      if self.plan.features % TILE == 0:
        return self._dot(x, matrices[0])
      last = (tile.start + TILE >= self.plan.features).astype(jnp.int32)
      return self._dot(x, matrices[last]) * gains[last]
    parts = []
    for start in range(0, self.plan.block, TILE):
      part = x[start : start + TILE]
      # A matrix and its transpose are the same.
      if self.plan.tokens % TILE == 0:
        parts.append(self._dot(matrices[0], part))
        continue
      end = self._first_row + start + TILE
      last = (end >= self.plan.tokens).astype(jnp.int32)
      parts.append(self._dot(matrices[last], part) * gains[last])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)

  def _base(self, copy, word):
    """Of the random bits of the first tile: the index, times its factor."""
    if not copy.stochastic:
      return None
    w = self.words
    shape = (self.plan.block, TILE)
    row, column = (lax.broadcasted_iota(jnp.uint32, shape, n) for n in (0, 1))
    row = row + (w[4] + self._first_row.astype(jnp.uint32))
    index = row * w[6] + (column + w[5])
    return counter.begin(w[word], index), w[word + 1]

  def _codes(self, copy, t, tile, base):
    """int32, or of the format's dtype."""
    random = None
    if base is not None:
      start = jnp.asarray(tile.start).astype(jnp.uint32)
      random = counter.end(
        base[0] + counter.begin(jnp.uint32(0), start), base[1]
      )
    codes = coded(copy.element, t, random, clip=not copy.bounded)
    return codes.astype(jnp.int32) if codes.dtype == jnp.float32 else codes

  def _mask(self, copy, t, tile):
    if copy.mask == 'none':
      return None
    mask = jnp.abs(t) <= copy.bound
    if self.plan.features % 8:
      mask = mask & self._inside(tile)
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)

  def _pack(self, refs, masks, column):
    if refs.mask is None:
      return
    packed = self._dot(jnp.concatenate(masks, 1), self.packing[...])
    place = pl.ds(pl.multiple_of(column // 8, TILE), TILE)
    refs.mask[:, place] = packed.astype(jnp.int32).astype(jnp.uint8)


def _gathered(copy: Copy, old, new):
  if copy.scaling.statistic == 'absmax':
    return jnp.maximum(old, new)
  return old + new


def _ended(copy: Copy, total, axis):
  if copy.scaling.statistic == 'absmax':
    # A maximum along an axis need not keep a NaN, but a sum does.
    largest, sums = (
      reduce(total, axis, keepdims=True) for reduce in (jnp.max, jnp.sum)
    )
    return jnp.where(jnp.isnan(sums), sums, largest)
  return total.sum(axis, keepdims=True)
