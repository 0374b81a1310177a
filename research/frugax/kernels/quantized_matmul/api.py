"""Products of codes, and of numbers with codes, with scales of rows."""

import jax
import jax.numpy as jnp

from frugax.kernels import blocks as tables
from frugax.kernels import chips, products
from frugax.kernels.quantized_matmul import reference, tpu, triton


def quantized_matmul(
  a: jax.Array,
  b: jax.Array,
  a_scale: jax.Array | None = None,
  b_scale: jax.Array | None = None,
  *,
  layout: str = 'NN',
  shifts: tuple[float, float] = (0.0, 0.0),
  sums: tuple[jax.Array | None, jax.Array | None] = (None, None),
  dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  r"""The product of two matrices of few bits, and its scales, in one kernel.

  .. math::
    y_{ij} = s_i t_j \sum_k (a_{ik} + \alpha)(b_{kj} + \beta)
      = s_i t_j \left(\sum_k a_{ik} b_{kj} + \beta \sum_k a_{ik} +
        \alpha \sum_k b_{kj} + K \alpha \beta\right)

  with a shift :math:`\alpha, \beta` of 1/2 for mid-rise numbers, which are
  halves of odd integers. Integers are summed in int32, all else in float32; the
  rest is computed in float32, on blocks that have not left the chip.

  Both operands are int8 or int4, or both float8_e4m3fn or float8_e5m2, or both
  float4_e2m1fn; or one is bfloat16 or float32 and the other, say weights, int8
  or int4, which then become numbers of that dtype in the kernel.

  `implementation=None` takes the kernel where the chip gains by it: int8 and
  int4 on v5e, v5p and v6e, 8-bit floats, int4 and float4 on tpu7x, integers as
  weights on all of these; on Hopper (H100, H200) int8, int4 and 8-bit floats by
  Mosaic GPU (two different ones from jax 0.11 on). Elsewhere XLA computes the
  same, of 8-bit floats on GPUs and CPUs as bfloat16, and a warning of the
  logger 'frugax' says so once; so it does on several devices, over which a
  kernel is cut by `jax.shard_map` alone (with check_vma=False).

  Args:
    a: (M, K), or (K, M) in layout 'TN'.
    b: (K, N), or (N, K) in layout 'NT'.
    a_scale: s: (M,), (M, 1) or (), float32; None is 1.
    b_scale: t: (N,), (1, N), (N, 1) or (), likewise.
    layout: 'NN', 'NT' (b transposed) or 'TN' (a transposed). TPUs read operands
      as they lie in memory; Hopper's matrix units take codes with K last, and
      what has it first is transposed before.
    shifts: of the numbers of a and b against their codes.
    sums: of the codes of a along K, (M,) or (M, 1), and of b, (N,) or with an
      axis of 1, where they are known; else they are computed if needed.
    dtype: of the result.
    implementation: 'mosaic' (a TPU kernel), 'triton' or 'mosaic_gpu' (kernels
      for Hopper, of integers, and of 8-bit floats or integers), 'xla', or
      None.
    interpret: run the kernel as plain JAX, on any platform.

  Returns:
    (M, N). It has no gradient: codes have none. See
    `frugax.lowbit.dot_general`.

  Raises:
    ValueError: shapes, dtypes or a layout that do not fit, or an implementation
      that is unknown or does not run here.

  Examples:
    >>> a = jnp.array([[1, 2, 3], [-1, 0, 127]], jnp.int8)
    >>> b = jnp.array([[1, 0], [0, 1], [1, 1]], jnp.int8)
    >>> print(quantized_matmul(a, b, jnp.array([1., .5]),
    ...                        implementation='xla'))
    [[ 4.   5. ]
     [63.  63.5]]
    >>> y = quantized_matmul(a, a, layout='NT', interpret=True)
    >>> print(y.astype(int))
    [[   14   380]
     [  380 16130]]

  References:
    Dettmers et al., `LLM.int8(): 8-bit Matrix Multiplication for Transformers
    at Scale <https://arxiv.org/abs/2208.07339>`_, 2022 (scales of rows and
    columns)

    Panferov et al., `QuEST: Stable Training of LLMs with 1-Bit Weights and
    Activations <https://arxiv.org/abs/2502.05003>`_, 2025 (mid-rise numbers)
  """
  m, n, k = products.sizes(a, b, layout)
  kind = products.kind(a.dtype, b.dtype)
  which = chips.choose('quantized_matmul', kind, implementation, interpret)
  if which == 'mosaic_gpu' and kind == 'float8' and not _multiplies(a, b):
    if implementation:
      raise ValueError(
        "quantized_matmul: implementation='mosaic_gpu' has no products of "
        f'{a.dtype} and {b.dtype} before jax 0.11, and this is '
        f"{jax.__version__}: give both in one, or implementation='xla'"
      )
    chips.say_so('quantized_matmul', f'{a.dtype} x {b.dtype}', 'hopper')
    which = 'xla'
  rows, columns = epilogue(
    (a, b),
    (m, n, k),
    (a_scale, b_scale),
    products.LAYOUTS[layout],
    shifts,
    sums,
  )
  if which == 'xla':
    return reference.quantized_matmul(a, b, rows, columns, layout, dtype)
  if which == 'mosaic':
    kernel = tpu.quantized_matmul
    blocks = tables.matmul(chips.current(), kind)
  else:
    kernel = _gpu_kernel(which)
    blocks = tables.gpu_matmul(which, kind)
  return kernel(a, b, rows, columns, layout, dtype, blocks, interpret)


def _multiplies(a, b):
  return a.dtype == b.dtype or jax.__version_info__ >= (0, 11)


def _gpu_kernel(implementation):
  if implementation == 'triton':
    return triton.quantized_matmul
  # Its imports take a second, and are of no use without it.
  from frugax.kernels.quantized_matmul import mosaic_gpu

  return mosaic_gpu.quantized_matmul


def epilogue(operands, sizes, scales, axes, shifts, sums):
  """Scales and terms as the kernel takes them: (M, 1 or 2) and (1 or 2, N)."""
  m, n, k = sizes
  left, right = shifts
  # Of a's rows the term has b's shift, and the other way round.
  terms = []
  for x, axis, size, known, shift in zip(
    operands, axes, (m, n), sums, (right, left), strict=True
  ):
    if not shift:
      terms.append(None)
      continue
    if known is None:
      whole = jnp.issubdtype(x.dtype, jnp.integer)
      known = x.sum(axis, dtype=jnp.int32 if whole else jnp.float32)
    terms.append(shift * vector(known, size, 'sums').astype(jnp.float32))
  if left and right:
    terms[1] = terms[1] + k * left * right
  out = []
  for scale, term, size, axis, name in zip(
    scales, terms, (m, n), (1, 0), ('a_scale', 'b_scale'), strict=True
  ):
    if scale is None and term is None:
      out.append(None)
      continue
    parts = [vector(1.0 if scale is None else scale, size, name)]
    if term is not None:
      parts.append(term)
    out.append(jnp.stack(parts, axis))
  return out


def vector(x: jax.typing.ArrayLike, size: int, name: str) -> jax.Array:
  """Numbers of rows or columns, with an axis of 1 or without, as (size,)."""
  x = jnp.asarray(x)
  if x.dtype != jnp.int32:
    x = x.astype(jnp.float32)
  if x.size == 1:
    return jnp.broadcast_to(x.reshape(()), (size,))
  if x.size != size or max(x.shape) != size:
    raise ValueError(
      f'{name} of shape {x.shape} for {size} rows or columns: give one number '
      'for each of them, or one for all'
    )
  return x.reshape(size)
