"""Hadamard rotations: outliers spread over the elements of a block."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from frugax.quant.rounding import random_bits

_LARGEST = 128  # of a matrix: larger rotations are Kronecker products


def hadamard(
  x: jax.Array,
  axis: int = -1,
  block: int | None = 128,
  key: jax.Array | None = None,
  inverse: bool = False,
) -> jax.Array:
  r"""Rotate neighbours along an axis by a Hadamard matrix, block by block.

  With :math:`n` the size of a block, a power of two,

  .. math::
    y = H D x, \qquad H_{ij} = n^{-1/2} (-1)^{\mathrm{bits}(i \wedge j)}

  with :math:`D` random signs if there is a key, and else 1. The rotation is
  orthonormal: the inverse is :math:`D H`, and without signs H itself.

  Any length will do. What is left of the axis after the whole blocks is cut
  into its powers of two, the largest first: 5461 elements are 42 blocks of 128
  and one each of 64, 16, 4 and 1. So nothing is padded, and the result has the
  shape of x.

  Args:
    x: a floating-point array; computed in float32.
    axis: along which blocks lie.
    block: elements of a block, a power of two; None for the largest that fit.
    key: a typed key for the signs. They depend on it and on the place along
      the axis alone.
    inverse: undo the rotation of the same arguments.

  Returns:
    An array of the shape and dtype of `x`.

  Raises:
    ValueError: a block that is no power of two, or an axis that x has not.

  Examples:
    >>> x = jnp.array([1., 1., 2., 0., 5.])
    >>> y = hadamard(x, block=2)
    >>> print(y)
    [1.4142135 0.        1.4142135 1.4142135 5.       ]
    >>> bool(jnp.allclose(hadamard(y, block=2, inverse=True), x, atol=1e-6))
    True

  References:
    Sylvester, `Thoughts on inverse orthogonal matrices
    <https://doi.org/10.1080/14786446708639914>`_, 1867

    Ashkboos et al., `QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs
    <https://arxiv.org/abs/2404.00456>`_, 2024
  """
  if block is not None and (block < 1 or block & (block - 1)):
    raise ValueError(f'block={block}: Hadamard blocks are powers of two')
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f'axis={axis} for an array of shape {x.shape}')
  dtype, size = x.dtype, x.shape[axis]
  y = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
  signs = None
  if key is not None:
    bit = random_bits(key, (size,)) >> 31
    signs = 1 - 2 * bit.astype(jnp.float32)
  if signs is not None and not inverse:
    y = y * signs
  parts, start = [], 0
  for n, count in _blocks(size, block):
    part = y[..., start : start + n * count]
    parts.append(_rotate(part.reshape(*y.shape[:-1], count, n)))
    start += n * count
  if parts:
    flat = [p.reshape(*p.shape[:-2], -1) for p in parts]
    y = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)
  if signs is not None and inverse:
    y = y * signs
  return jnp.moveaxis(y, -1, axis).astype(dtype)


def _blocks(size, block):
  """The sizes of blocks, largest first, and how many there are of each."""
  if size and block is None:
    block = 1 << size.bit_length() - 1
  while size:
    count = size // block
    if count:
      yield block, count
    size -= count * block
    block = 1 << size.bit_length() - 1 if size else 1


def _rotate(x):
  """The last axis, a power of two, by products with matrices of limited size.

  A Hadamard matrix is a Kronecker product of smaller ones, each of which acts
  on an axis of its own.
  """
  n = x.shape[-1]
  if n <= _LARGEST:
    return jnp.matmul(x, _matrix(n), precision=jax.lax.Precision.HIGHEST)
  x = x.reshape(*x.shape[:-1], n // _LARGEST, _LARGEST)
  x = _rotate(x)
  x = jnp.swapaxes(_rotate(jnp.swapaxes(x, -1, -2)), -1, -2)
  return x.reshape(*x.shape[:-2], n)


@functools.cache
def _matrix(n):
  h = np.ones((1, 1))
  while len(h) < n:
    h = np.block([[h, h], [h, -h]])
  return np.asarray(h / math.sqrt(n), np.float32)
