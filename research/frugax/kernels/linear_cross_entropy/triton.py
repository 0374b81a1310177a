"""`linear_cross_entropy` for GPUs, by Triton: logits live in registers."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from frugax.kernels import blocks as tables
from frugax.kernels import products
from frugax.kernels.linear_cross_entropy import reference

# Gradients of logits that are in memory at once, in bfloat16 48 MiB, and the
# most columns that these are of: so many of w are copied.
_GRADIENTS, _COLUMNS = 3 * 2**23, 8192
# Rows that Hopper's matrix unit takes at once, and no block is shorter.
_LEAST = 64
# Of logits that are not there: finite, so that differences of them are, too.
_NONE = -1e30


def forward(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  axis: int,
  softcap: float | None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As `reference.forward`, of x (N, D) and labels (N,).

  A part of the vocabulary at a time, a program computes a block of logits and
  writes the log-partition of each of its rows, and its logit at the label. With
  `interpret` it runs as plain JAX.
  """
  n, vocabulary = len(x), w.shape[axis]
  blocks = tables.gpu_cross_entropy(x.dtype.itemsize)
  x, labels = _filled(x, blocks), _filled(labels, blocks)

  def part(start, size, carry):
    lse, at = carry
    own = _filled(reference.cut(w, start, size, axis), blocks)
    product = _Product((x, own), (1, 1 - axis), blocks)
    shape = product.counts[1], len(x)
    tops, hits = product.call(
      functools.partial(_forward, softcap, size),
      [(labels - start, product.rows)],
      [(shape, jnp.float32, product.row_of_each)] * 2,
      'linear_cross_entropy',
      interpret,
    )
    lse = jnp.logaddexp(lse, jax.nn.logsumexp(tops, 0))
    return lse, at + hits.sum(0)

  zeros = jnp.zeros(len(x), jnp.float32)
  size = reference.columns(n, vocabulary, _GRADIENTS, _COLUMNS)
  lse, at = reference.in_parts(size, vocabulary, part, (zeros - jnp.inf, zeros))
  return lse[:n], at[:n]


def _forward(softcap, size, z, place, labels, lse, at):
  z = reference.capped(z, softcap)
  column = _columns(z, place)
  at[...] = jnp.where(column == labels[...][:, None], z, 0.0).sum(1)
  z = jnp.where(column < size, z, _NONE)
  top = z.max(1)
  lse[...] = top + jnp.log(jnp.exp(z - top[:, None]).sum(1))


def backward(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  lse: jax.Array,
  g_lse: jax.Array,
  g_at: jax.Array,
  axis: int,
  softcap: float | None,
  filters: tuple[float | None, float | None] = (None, None),
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As `reference.backward`, of x (N, D) and rows of N numbers.

  A part of the vocabulary at a time, the logits are computed anew, and a kernel
  writes their gradients in x's dtype. Two others multiply these: one adds to
  the gradient of x, which is in float32 until the end, the other computes that
  of the part of w. Each number is written by one program: the order of sums,
  and so the result, is always the same. What a filter leaves out of these two
  is neither read nor multiplied.
  """
  n, d, vocabulary = *x.shape, w.shape[axis]
  blocks = tables.gpu_cross_entropy(x.dtype.itemsize)
  x = _filled(x, blocks)
  filtered = any(eps is not None for eps in filters)
  # Rows that are filled up have no gradients: all of theirs are zero.
  labels, *rows = (_filled(a, blocks) for a in (labels, lse, g_lse, g_at))

  def part(start, size, carry):
    dx, dw = carry
    own = _filled(reference.cut(w, start, size, axis), blocks)
    product = _Product((x, own), (1, 1 - axis), blocks)
    dz, *peaks = product.call(
      functools.partial(_gradient, softcap, size),
      [(a, product.rows) for a in (labels - start, *rows)],
      [
        (product.shape, x.dtype, product.block),
        *([(product.counts, jnp.float32, product.each)] if filtered else []),
      ],
      'linear_cross_entropy_dz',
      interpret,
    )
    keep_x, keep_w = (
      None if eps is None else (peaks[0] >= eps).astype(jnp.int32)
      for eps in filters
    )
    product = _Product((dz, own), (1, axis), blocks)
    (dx,) = product.call(
      _add,
      [(dx, product.block)],
      [(product.shape, dx.dtype, product.block)],
      'linear_cross_entropy_dx',
      interpret,
      keep=keep_x,
      over=True,
    )
    # As (size, D) or (D, size).
    product = _Product((x, dz) if axis else (dz, x), (0, 0), blocks)
    (own,) = product.call(
      _write,
      [],
      [(product.shape, w.dtype, product.block)],
      'linear_cross_entropy_dw',
      interpret,
      keep=keep_w if keep_w is None else keep_w.T,
      along=axis,
    )
    own = own[:d, :size] if axis else own[:size, :d]
    return dx, lax.dynamic_update_slice_in_dim(dw, own, start, axis)

  start = jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(w)
  size = reference.columns(n, vocabulary, _GRADIENTS, _COLUMNS)
  dx, dw = reference.in_parts(size, vocabulary, part, start)
  return dx[:n, :d].astype(x.dtype), dw


def _gradient(softcap, size, z, place, labels, lse, g_lse, g_at, dz, *peaks):
  z = reference.capped(z, softcap)
  column = _columns(z, place)
  hits = column == labels[...][:, None]
  logits = z, hits, *(a[...][:, None] for a in (lse, g_lse, g_at))
  found = reference.gradient(*logits, softcap)
  dz[...] = jnp.where(column < size, found, 0.0).astype(dz.dtype)
  for peak in peaks:
    peak[...] = reference.peak(*logits)


def _add(y, place, old, new):
  new[...] = old[...] + y


def _write(y, place, out):
  out[...] = y.astype(out.dtype)


def _columns(z, place):
  return place[1] * z.shape[1] + lax.broadcasted_iota(jnp.int32, z.shape, 1)


def _filled(x, blocks):
  """With zeros, so that each axis is a whole number of blocks."""
  longest = max(blocks[:3])
  for axis, size in enumerate(x.shape):
    unit = min(longest, max(_LEAST, pl.next_power_of_2(size)))
    x = products.pad(x, axis, pl.cdiv(size, unit) * unit)
  return x


class _Product:
  """A product of two matrices, a program a block, and what is made of it.

  Args:
    operands: a and b, filled up.
    axes: the contracted axis of each.
    blocks: the largest blocks.
  """

  def __init__(
    self,
    operands: tuple[jax.Array, jax.Array],
    axes: tuple[int, int],
    blocks: tables.GpuBlocks,
  ):
    (m, k), (n, _) = (
      (a.shape[1 - axis], a.shape[axis])
      for a, axis in zip(operands, axes, strict=True)
    )
    self.operands, self.axes, self.blocks = operands, axes, blocks
    self.shape, self.contracted = (m, n), k
    self.sizes = min(blocks.rows, m), min(blocks.columns, n)
    self.counts = m // self.sizes[0], n // self.sizes[1]

  def place(self, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the block of a program."""
    return products.grouped(p, *self.counts, self.blocks.group)

  @property
  def block(self) -> pl.BlockSpec:
    """A block of an array of the product's shape."""
    return pl.BlockSpec(self.sizes, self.place)

  @property
  def rows(self) -> pl.BlockSpec:
    """Of an array with a number for each row, those of the block."""
    return pl.BlockSpec(self.sizes[:1], lambda p: self.place(p)[:1])

  @property
  def row_of_each(self) -> pl.BlockSpec:
    """Of an array (blocks of columns, rows), the block's own numbers."""
    return pl.BlockSpec(
      (None, self.sizes[0]), lambda p: tuple(reversed(self.place(p)))
    )

  @property
  def each(self) -> pl.BlockSpec:
    """Of an array (blocks of rows, blocks of columns), the block's number."""
    return pl.BlockSpec((None, None), self.place)

  def call(
    self,
    finish: Callable,
    ends: Sequence[tuple[jax.Array, pl.BlockSpec]],
    outs: Sequence[tuple[tuple[int, ...], jnp.dtype, pl.BlockSpec]],
    name: str,
    interpret: bool,
    keep: jax.Array | None = None,
    along: int = 0,
    over: bool = False,
  ) -> Sequence[jax.Array]:
    """What finish(block of the product, its place, *refs) writes.

    Args:
      finish: called with the references of `ends` and `outs`.
      ends: more operands, and their blocks.
      outs: shapes, dtypes and blocks of the results.
      name: of the kernel.
      interpret: run as plain JAX.
      keep: (parts of an axis of the product, parts of the contracted axis), 0
        where the latter adds nothing to the former; None to add all.
      along: that axis of the product.
      over: whether the result is written over the first of `ends`.
    """
    specs = []
    for which, axis in enumerate(self.axes):
      block = self.sizes[which], self.contracted
      specs.append(
        pl.BlockSpec(
          block if axis else block[::-1],
          functools.partial(self._operand, which, axis),
        )
      )
    arrays = [*self.operands]
    if keep is not None:
      arrays.append(keep)
      specs.append(pl.BlockSpec(keep.shape, lambda p: (0, 0)))
    first = len(arrays)
    arrays += [a for a, _ in ends]
    specs += [spec for _, spec in ends]
    shapes = [jax.ShapeDtypeStruct(*out[:2]) for out in outs]
    return pl.pallas_call(
      functools.partial(self._kernel, finish, along, keep is not None),
      grid=(self.counts[0] * self.counts[1],),
      in_specs=specs,
      out_specs=[spec for *_, spec in outs],
      out_shape=shapes,
      input_output_aliases={first: 0} if over else {},
      compiler_params=pltriton.CompilerParams(
        num_warps=self.blocks.warps, num_stages=self.blocks.stages
      ),
      cost_estimate=products.cost(
        *self.shape, self.contracted, [*arrays, *shapes]
      ),
      interpret=interpret,
      name=name,
    )(*arrays)

  def _operand(self, which, axis, p):
    own = self.place(p)[which]
    return (own, 0) if axis else (0, own)

  def _kernel(self, finish, along, has_keep, a, b, *refs):
    place = self.place(pl.program_id(0))
    step = min(self.blocks.contracted, self.contracted)

    def add(k, sums):
      at = pl.ds(k * step, step)
      left = a[:, at] if self.axes[0] else a[at, :]
      right = b[:, at] if self.axes[1] else b[at, :]
      return sums + reference.dot(left, right, self.axes[:1], self.axes[1:])

    steps, sums = self.contracted // step, jnp.zeros(self.sizes, jnp.float32)
    if has_keep:
      keep, refs = refs[0], refs[1:]
      each = steps // keep.shape[1]
      # Blocks of a part of the product's axis have one row of it.
      row = place[along] // (self.counts[along] // keep.shape[0])

      def part(t, sums):
        def all_of_it(sums):
          return lax.fori_loop(t * each, (t + 1) * each, add, sums)

        return lax.cond(keep[row, t] != 0, all_of_it, lambda s: s, sums)

      sums = lax.fori_loop(0, keep.shape[1], part, sums)
    else:
      sums = lax.fori_loop(0, steps, add, sums)
    finish(sums, place, *refs)
