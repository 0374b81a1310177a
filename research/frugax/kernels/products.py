"""What the products of all kernels have in common: layouts, kinds, the dot."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from frugax import names

# Which axis of each operand is contracted.
LAYOUTS = {'NN': (1, 0), 'NT': (1, 1), 'TN': (0, 0)}
_INTEGERS = (jnp.int8, jnp.int4)
_FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
_WIDE = (jnp.bfloat16, jnp.float32)
_TILE = 128


def kind(a: jax.typing.DTypeLike, b: jax.typing.DTypeLike) -> str:
  """How numbers of two dtypes are multiplied.

  Returns:
    'int8', 'int4' (both of 4 bits), 'float8', 'float4', or 'mixed' for bfloat16
    or float32 times integers.

  Raises:
    ValueError: dtypes that have no such product.

  Examples:
    >>> kind(jnp.int8, jnp.int4), kind(jnp.bfloat16, jnp.int4)
    ('int8', 'mixed')
  """
  a, b = jnp.dtype(a), jnp.dtype(b)
  if a in _INTEGERS and b in _INTEGERS:
    return 'int4' if a == b == jnp.int4 else 'int8'
  if a in _FLOAT8 and b in _FLOAT8:
    return 'float8'
  if a == b == jnp.float4_e2m1fn:
    return 'float4'
  if (a in _WIDE and b in _INTEGERS) or (a in _INTEGERS and b in _WIDE):
    return 'mixed'
  raise ValueError(
    f'no product of {a} and {b}: give two of int8 and int4, two of '
    'float8_e4m3fn and float8_e5m2, two float4_e2m1fn, or one bfloat16 or '
    'float32 and one int8 or int4'
  )


def sizes(a: jax.Array, b: jax.Array, layout: str) -> tuple[int, int, int]:
  """Rows, columns and contracted elements of the product of two matrices.

  Raises:
    ValueError: an unknown layout, or shapes that do not fit.

  Examples:
    >>> sizes(jnp.ones((2, 3)), jnp.ones((5, 3)), 'NT')
    (2, 5, 3)
  """
  if layout not in LAYOUTS:
    raise names.unknown('layout', layout, LAYOUTS)
  if a.ndim != 2 or b.ndim != 2:
    raise ValueError(
      f'operands of shapes {a.shape} and {b.shape}: give matrices, and '
      'jax.vmap for stacks of them'
    )
  i, j = LAYOUTS[layout]
  if a.shape[i] != b.shape[j]:
    raise ValueError(
      f'layout={layout!r} contracts axis {i} of {a.shape} with axis {j} of '
      f'{b.shape}, which differ in size'
    )
  if 0 in (*a.shape, *b.shape):
    raise ValueError(f'an empty operand: shapes {a.shape} and {b.shape}')
  return a.shape[1 - i], b.shape[1 - j], a.shape[i]


def contracted_last(
  a: jax.Array, b: jax.Array, layout: str
) -> tuple[jax.Array, jax.Array]:
  """Both operands as they are in layout 'NT'.

  Examples:
    >>> a, b = contracted_last(jnp.ones((2, 3)), jnp.ones((3, 5)), 'NN')
    >>> a.shape, b.shape
    ((2, 3), (5, 3))
  """
  i, j = LAYOUTS[layout]
  return a if i else a.T, b if j else b.T


def dot(
  a: jax.Array, b: jax.Array, axes: tuple[int, int], interpret: bool = False
) -> jax.Array:
  """The product within a kernel: exact in int32 of integers, else in float32.

  Args:
    a: of any dtype that `kind` takes.
    b: likewise.
    axes: the contracted axis of each.
    interpret: whether the kernel runs as plain JAX, which has no product of
      int4: they become int8, with the same result.

  Returns:
    A matrix, int32 or float32.
  """
  product, precision = kind(a.dtype, b.dtype), None
  if product == 'mixed':
    wide = a.dtype if a.dtype in _WIDE else b.dtype
    a, b = a.astype(wide), b.astype(wide)
    if wide == jnp.float32:
      precision = lax.Precision.HIGHEST
  elif product == 'int8' or (product == 'int4' and interpret):
    a, b = a.astype(jnp.int8), b.astype(jnp.int8)
  elif product == 'float4' and interpret:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  return lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    precision,
    preferred_element_type=sum_dtype(product),
  )


def sum_dtype(kind: str) -> jax.typing.DTypeLike:
  """In which the products of a kind are summed."""
  return jnp.int32 if kind.startswith('int') else jnp.float32


def fit(size: int, block: int, exact: bool = False) -> tuple[int, int]:
  """The length of the blocks of an axis, and how many there are.

  A multiple of 128. The fewest blocks that are no longer than `block`, and as
  even as they can be, so that little is computed beyond the end of the axis.

  Args:
    size: of the axis.
    block: the largest length, a multiple of 128.
    exact: take up to twice as many if these end where the axis does.

  Examples:
    >>> fit(5461, 1024), fit(8960, 4096), fit(8960, 4096, exact=True)
    ((1024, 6), (3072, 3), (1792, 5))
  """
  count = -(-size // block)
  if exact:
    for n in range(count, 2 * count + 1):
      if size % (n * _TILE) == 0:
        return size // n, n
  length = -(-size // (count * _TILE)) * _TILE
  return length, -(-size // length)


def grouped(
  p: jax.Array, rows: int, columns: int, group: int
) -> tuple[jax.Array, jax.Array]:
  """The block of rows and that of columns which a program of a GPU computes.

  Programs that run at the same time have numbers that follow each other. They
  go down a group of blocks of rows before they go on to the next columns, and
  so read few operands.

  Args:
    p: number of the program.
    rows: blocks of rows.
    columns: blocks of columns.
    group: blocks of rows in a group.

  Examples:
    >>> [tuple(map(int, grouped(jnp.int32(p), 3, 2, 2))) for p in range(6)]
    [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
  """
  size = group * columns
  first = p // size * group
  height = jnp.minimum(group, rows - first)
  return first + p % size % height, p % size // height


def pad(x: jax.Array, axis: int, size: int) -> jax.Array:
  """Zeros at the end of an axis, up to a size."""
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


def nbytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
  """Bytes of an array as a TPU stores it: of 4-bit numbers two a byte."""
  four = x.dtype in (jnp.int4, jnp.float4_e2m1fn)
  return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // (1 + four)


def cost(m: int, n: int, k: int, arrays, transcendentals: int = 0):
  """What a kernel tells XLA of a product: operations, and bytes read once."""
  return pl.CostEstimate(
    flops=2 * m * n * k,
    transcendentals=transcendentals,
    bytes_accessed=sum(nbytes(x) for x in arrays),
  )


def rounding_cost(size: int, copies: int, rotations: int, arrays):
  """What a kernel tells XLA of rounding: some ten operations for each code.

  Args:
    size: elements that are rounded.
    copies: into how many copies.
    rotations: products with matrices of a tile.
    arrays: that are read or written once.
  """
  return pl.CostEstimate(
    flops=size * (2 * _TILE * rotations + 10 * copies),
    transcendentals=0,
    bytes_accessed=sum(nbytes(x) for x in arrays),
  )
