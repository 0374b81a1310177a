"""Block sizes of the kernels, for each chip: one table for all of them.

Those of TPUs by static cycle counts for v5e (`make bench-kernels`), not for
each chip; those of GPUs by what fits, untimed.
"""

from typing import NamedTuple

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


def matmul(chip: str | None, kind: str, layout: str) -> Blocks:
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


def fused(
  chip: str | None,
  kind: str,
  layout: str,
  contracted: int,
  itemsize: int,
  residuals: bool,
) -> Blocks:
  """Of `quantize_matmul`: rows of x, of which a block is all of them.

  Args:
    chip: None for v5e.
    kind: of the product.
    layout: of the product.
    contracted: elements of a row.
    itemsize: bytes of an element of x.
    residuals: whether codes are written out, of which there are then two
      blocks, one that is computed and one that is copied.
  """
  found = _FUSED[kind]
  if chip == 'tpu7x' and kind == 'int8':
    found = found._replace(contracted=1024)
  row = contracted * (2 * itemsize + (1 + residuals))
  rows = found.rows
  while rows > 128 and rows * row > VMEM_LIMIT // 2:
    rows //= 2
  return found._replace(rows=rows)


class GpuBlocks(NamedTuple):
  """As `Blocks`, and how a GPU works on them.

  Attributes:
    rows: of the result, a power of two.
    columns: likewise.
    contracted: likewise, for one step along K.
    warps: of 32 threads, that compute a block of the result.
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


# Nothing here was timed. These are the largest results that the registers hold
# without spilling, and what the 227 KiB of shared memory have stages for. A
# partial sum of 8-bit floats takes as many registers as the sum itself.
_GPU_MATMUL = {
  ('triton', 'int8'): GpuBlocks(128, 256, 128, 8, 4, 8),
  ('triton', 'mixed'): GpuBlocks(128, 128, 64, 8, 3, 8),
  ('mosaic_gpu', 'int8'): GpuBlocks(128, 128, 128, 8, 6, 8),
  ('mosaic_gpu', 'float8'): GpuBlocks(128, 128, 128, 8, 6, 8),
}


def gpu_matmul(implementation: str, kind: str) -> GpuBlocks:
  """Of `quantized_matmul` on Hopper, which multiplies int4 as int8."""
  return _GPU_MATMUL[implementation, 'int8' if kind == 'int4' else kind]
