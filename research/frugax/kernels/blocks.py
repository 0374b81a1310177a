"""Block sizes of the kernels, for each chip: one table for all of them.

Those of TPUs by static cycle counts for v5e, and of `quantize_matmul` for v6e
(`make bench-kernels`); those of GPUs by what fits, and of `quantized_matmul` of
two of few bits by times on an H200, for matrices of 8192 x 8192
(`studies/bench_gpu.log`, which compares none of `encode` or of the loss).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of the VMEM of a core, 64 MiB on v5p and tpu7x and 128 MiB on v5e and v6e,
# what a kernel may ask for.
VMEM_LIMIT = 60 * 2**20


class Blocks(NamedTuple):
  """The largest blocks: elements of the result's rows and columns, and of K."""

  rows: int
  columns: int
  contracted: int


_MATMUL = {
  'int8': Blocks(1024, 1024, 4096),
  'int4': Blocks(1024, 1024, 4096),
  'float8': Blocks(1024, 1024, 4096),
  'float4': Blocks(1024, 1024, 4096),
  'mixed': Blocks(1024, 1024, 1024),
}


def matmul(chip: str | None, kind: str) -> Blocks:
  """Of `quantized_matmul`; for no chip those of v5e."""
  found = _MATMUL[kind]
  if chip == 'tpu7x' and kind == 'int8':
    # There sums are in float32 within a block, exact up to 2^24 = 1024 128^2.
    found = found._replace(contracted=1024)
  if chip == 'v4':
    found = Blocks(512, 512, 512)
  return found


_FUSED = {
  'int8': Blocks(1024, 1024, 4096),
  'int4': Blocks(1024, 1024, 4096),
  'float8': Blocks(1024, 1024, 4096),
}
# There memory is slower against the matrix unit. While a step multiplies, the
# next block of x is on its way, for which short steps have no time.
_FUSED_V6E = {
  'int8': Blocks(1024, 2048, 4096),
  'int4': Blocks(1024, 4096, 4096),
}


def fused(
  chip: str | None,
  kind: str,
  contracted: int,
  itemsizes: tuple[int, int],
  residuals: bool,
) -> Blocks:
  """Of `quantize_matmul`: rows of x, of which a block is all of them.

  Args:
    chip: None for v5e.
    kind: of the product.
    contracted: elements of a row.
    itemsizes: bytes of an element of x, and of the result.
    residuals: whether codes are written out, of which there are then two
      blocks, one that is computed and one that is copied.
  """
  found = _FUSED[kind]
  if chip == 'v6e':
    found = _FUSED_V6E.get(kind, found)
  if chip == 'tpu7x' and kind == 'int8':
    found = found._replace(contracted=1024)
  code = 0.5 if kind == 'int4' else 1
  row = contracted * (2 * itemsizes[0] + code * (1 + residuals))
  rows, columns = found.rows, found.columns
  while rows > 128 and rows * row > VMEM_LIMIT // 2:
    rows //= 2
  # Of the result there are two blocks, too, and sums if w has several.
  out = rows * (2 * itemsizes[1] + 4 * (contracted > found.contracted))
  column = 2 * code * min(contracted, found.contracted) + out
  while columns > 1024 and rows * row + columns * column > 0.9 * VMEM_LIMIT:
    columns //= 2
  return found._replace(rows=rows, columns=columns)


def fuses(
  chip: str | None, kind: str, contracted: int, dtype: jax.typing.DTypeLike
) -> bool:
  """Whether a linear layer's forward product gains by `quantize_matmul`.

  By the compiler's estimates for int8 on v5e (`studies/tpu_linear.log`); of
  other chips and of int4 that is taken over.

  Args:
    chip: None for none.
    kind: of the product.
    contracted: elements of a row.
    dtype: of x.
  """
  if chip not in ('v5e', 'v5p', 'v6e') or kind not in ('int8', 'int4'):
    return False
  if dtype not in ('bfloat16', 'float32'):
    return False
  itemsize = jnp.dtype(dtype).itemsize
  blocks = fused(chip, kind, contracted, (itemsize, itemsize), False)
  # Fewer would read w too often.
  return blocks.rows >= 512


def cross_entropy(
  width: int, itemsize: int, backward: bool = False
) -> tuple[int, int]:
  """Rows and tokens of the vocabulary of a block of `linear_cross_entropy`.

  Args:
    width: D, of which a block has all.
    itemsize: bytes of an element of both operands.
    backward: whether there are gradients of either operand, too.
  """
  rows, columns = 1024, 512
  width = -(-width // 128) * 128
  # Two of each operand and of its gradient, whose sum is in float32.
  each = width * (2 * itemsize + backward * (2 * itemsize + 4))

  def size():
    most = max(rows, columns) if backward else rows + columns
    least = min(rows, columns) * width * 2 * itemsize if backward else 0
    return most * each + least + 4 * 4 * rows * columns

  while size() > VMEM_LIMIT and max(rows, columns) > 128:
    if rows > columns:
      rows //= 2
    else:
      columns //= 2
  return rows, columns


class GpuBlocks(NamedTuple):
  """As `Blocks`, and how a GPU works on them.

  Attributes:
    rows: of the result, a power of two.
    columns: likewise.
    contracted: likewise, for one step along K.
    warps: of 32 threads, that compute a block of the result; by Mosaic GPU in
      groups of four, which share its rows, and one group more copies.
    stages: steps whose operands are in shared memory or on their way.
    group: blocks of rows whose programs run next to each other, so that they
      read the same columns from the cache.
  """

  rows: int
  columns: int
  contracted: int
  warps: int
  stages: int
  group: int


# The largest results that the registers hold, and what the 227 KiB of shared
# memory have stages for. A partial sum of 8-bit floats takes as many registers
# as the sum itself. 'mixed' was not timed.
_GPU_MATMUL = {
  ('triton', 'int8'): GpuBlocks(128, 256, 128, 8, 4, 8),
  ('triton', 'mixed'): GpuBlocks(128, 128, 64, 8, 3, 8),
  ('mosaic_gpu', 'int8'): GpuBlocks(128, 256, 128, 8, 4, 8),
  ('mosaic_gpu', 'float8'): GpuBlocks(128, 128, 256, 8, 3, 8),
}


def gpu_matmul(implementation: str, kind: str) -> GpuBlocks:
  """Of `quantized_matmul` on Hopper, which multiplies int4 as int8."""
  return _GPU_MATMUL[implementation, 'int8' if kind == 'int4' else kind]


# Of products of two bfloat16, and of two float32, which have no matrix unit
# that is exact.
_GPU_CROSS_ENTROPY = {
  2: GpuBlocks(128, 256, 64, 8, 4, 8),
  4: GpuBlocks(64, 64, 32, 4, 2, 8),
}


def gpu_cross_entropy(itemsize: int) -> GpuBlocks:
  """Of `linear_cross_entropy` on Hopper: of logits, and of gradients.

  Args:
    itemsize: bytes of an element of both operands.
  """
  return _GPU_CROSS_ENTROPY[itemsize]


class EncodeBlocks(NamedTuple):
  """Of `encode`: rows and columns of x, and warps of a program."""

  rows: int
  columns: int
  warps: int


def gpu_encode(turned: bool) -> EncodeBlocks:
  """Of `encode` on Hopper; `turned` for codes of the transpose."""
  return EncodeBlocks(64, 128, 4) if turned else EncodeBlocks(32, 256, 4)
