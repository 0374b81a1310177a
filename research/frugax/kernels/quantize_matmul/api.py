"""Rounding and product in one kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from frugax.kernels import blocks as tables
from frugax.kernels import chips, products
from frugax.kernels.quantize_matmul import reference, tpu
from frugax.kernels.quantize_matmul.rounding import Rounding
from frugax.kernels.quantized_matmul.api import (
  epilogue,
  quantized_matmul,
  vector,
)
from frugax.quant import Scaling


class Quantized(NamedTuple):
  """A product, and what the rounded operand became.

  Attributes:
    product: (M, N).
    codes: of x's shape, in int8, int4 or a float of 8 bits; or None.
    scales: float32, of size 1 along the contracted axis of x; or None.
    sums: int32, of the codes along that axis, of integers alone; or None.
  """

  product: jax.Array
  codes: jax.Array | None = None
  scales: jax.Array | None = None
  sums: jax.Array | None = None


def quantize_matmul(
  x: jax.Array,
  w: jax.Array,
  w_scale: jax.Array | None = None,
  *,
  format: str = 'int8',
  scaling: Scaling | None = None,
  rotate: bool = False,
  fold: jax.Array | None = None,
  layout: str = 'NN',
  w_shift: float = 0.0,
  w_sums: jax.Array | None = None,
  dtype: jax.typing.DTypeLike | None = None,
  residuals: bool = True,
  implementation: str | None = None,
  interpret: bool = False,
) -> Quantized:
  r"""Rounds an array to a few bits and multiplies the codes with others.

  Of :math:`v_k = x_k f_k`, rotated by H if asked, each row has a scale that
  follows from its own numbers, as `frugax.quant.quantize_tiles` finds it, and

  .. math::
    y = \langle v H \rangle \, w \quad\text{('NN')}, \qquad
    y = \langle v H \rangle \, w^T \quad\text{('NT')}, \qquad
    y = w^T \langle H v \rangle \quad\text{('TN')}

  with w in codes, whose own scales and shift are as in `quantized_matmul`. They
  are the products of a linear layer: forward, the gradient of the input and
  that of the weights, where x is the gradient that arrives and w the codes of
  the activations. Where these have scales along the contracted axis, as
  activations rounded for the forward product, `fold` takes them into x.

  The kernel reads x once, in the dtype that it has, rounds a block of rows in
  VMEM and keeps the codes there for all columns of w. By the largest magnitude
  and without a rotation they are the codes of the reference. Else sums, which
  are taken in another order, make a code differ by one where a number is
  half-way between two, to within a few units in the last place.

  Args:
    x: (M, K), or (K, N) in layout 'TN'; bfloat16 or float32.
    w: codes: (K, N), (N, K) in 'NT', (K, M) in 'TN'; int8 or int4 for integer
      formats, float8 for 8-bit floats.
    w_scale: of each column of the product ('TN': row), or one for all, or None.
    format: of x: 'int2' to 'int8', 'ternary', 'rise1' to 'rise8', 'fp8_e4m3',
      'fp8_e5m2'. Codes of at most 4 bits are int4.
    scaling: how a row's scale follows from it: tile (1, None), a statistic of
      'absmax', 'rms' and 'mean', scales in float32. None is the largest
      magnitude.
    rotate: by Hadamard matrices of 128 along the contracted axis, as
      `frugax.quant.hadamard`. The scales of w are those of rotated weights.
    fold: f: (K,), with an axis of 1 or without; None is 1. Not with `rotate`.
    layout: 'NN', 'NT' or 'TN'; see above.
    w_shift: what to add to the codes of w: 1/2 if they are mid-rise.
    w_sums: sums of w's codes along K, where they are known and x is mid-rise.
    dtype: of the product; None is that of x.
    residuals: whether codes, scales and sums of x are returned.
    implementation: 'mosaic' (a TPU kernel), 'xla', or None for the kernel where
      `quantized_matmul` would take it. With 'triton' or 'mosaic_gpu', which
      None is on Hopper, XLA rounds and the kernel of this name multiplies.
    interpret: run the kernel as plain JAX, on any platform.

  Returns:
    A Quantized. It has no gradient.

  Raises:
    ValueError: shapes, dtypes, a format, scaling or layout that do not fit, or
      an implementation that is unknown or does not run here.

  Examples:
    >>> x, w = jnp.array([[127., 2.2], [0., 2.]]), jnp.array([[1], [3]])
    >>> y = quantize_matmul(x, w.astype(jnp.int8), implementation='xla')
    >>> print(y.product.ravel(), y.codes.tolist(), y.sums.ravel())
    [133.   6.] [[127, 2], [0, 127]] [129 127]

  References:
    Panferov et al., `QuEST: Stable Training of LLMs with 1-Bit Weights and
    Activations <https://arxiv.org/abs/2502.05003>`_, 2025

    Google, `Qwix <https://github.com/google/qwix>`_ (scales of the activations
    folded into the gradient)
  """
  rounding = Rounding(format, scaling or Scaling(), rotate)
  _check(x, w, rounding, layout, fold)
  kind = products.kind(rounding.dtype, w.dtype)
  which = chips.choose('quantize_matmul', kind, implementation, interpret)
  dtype = x.dtype if dtype is None else dtype
  axis = 0 if layout == 'TN' else 1
  if fold is not None:
    fold = jnp.expand_dims(vector(fold, x.shape[axis], 'fold'), 1 - axis)
  if which != 'mosaic':
    codes, scales, sums = reference.quantize(x, rounding, axis, fold)
    pair = (codes, scales, rounding.shift, sums)
    other = (w, w_scale, w_shift, w_sums)
    a, b = (other, pair) if layout == 'TN' else (pair, other)
    y = quantized_matmul(
      a[0],
      b[0],
      a[1],
      b[1],
      layout=layout,
      shifts=(a[2], b[2]),
      sums=(a[3], b[3]),
      dtype=dtype,
      implementation='xla' if which == 'xla' else implementation,
      interpret=interpret,
    )
    got = (y, codes, scales, sums)
    return Quantized(*got if residuals else got[:1])
  m, n, k = products.sizes(*((w, x) if layout == 'TN' else (x, w)), layout)
  # x's own scale and term come from the kernel; its shift is in w's term.
  mine = 1 if layout == 'TN' else 0
  ends = epilogue(
    (w, x) if mine else (x, w),
    (m, n, k),
    (w_scale, None) if mine else (None, w_scale),
    products.LAYOUTS[layout],
    (0.0, rounding.shift) if mine else (rounding.shift, 0.0),
    (w_sums, None) if mine else (None, w_sums),
  )[1 - mine]
  if rounding.shift and w_shift:
    constant = np.float32([[0, k * rounding.shift * w_shift]])
    ends = ends + (constant if mine else constant.T)
  itemsizes = x.dtype.itemsize, jnp.dtype(dtype).itemsize
  blocks = tables.fused(chips.current(), kind, k, itemsizes, residuals)
  return Quantized(
    *tpu.quantize_matmul(
      x,
      w,
      ends,
      fold,
      rounding,
      layout,
      w_shift,
      dtype,
      residuals,
      blocks,
      interpret,
    )
  )


def _check(x, w, rounding, layout, fold):
  products.sizes(*((w, x) if layout == 'TN' else (x, w)), layout)
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f'x of {x.dtype}: give bfloat16 or float32, which are rounded here'
    )
  kind = products.kind(rounding.dtype, w.dtype)
  if kind == 'mixed':
    raise ValueError(
      f'w of {w.dtype} with x in {rounding.format}: give codes of the same '
      'kind, integers or 8-bit floats'
    )
  if fold is not None and rounding.rotate:
    raise ValueError(
      'fold with rotate=True: scales along a rotated axis cannot be folded; '
      'rotate w before it is rounded, or give no fold'
    )
