r"""Maps between codes of a few bits and numbers of magnitude at most 1.

A map is two elementwise functions on float32 arrays, in closed form: they fuse
with what is around them and need no search and no sort. `encode` gives the code
of the nearest number, `decode` the number of a code; codes are whole numbers,
counted in the order of the numbers. Unsigned maps have one exception to
nearest: what is greater than zero never becomes zero. They hold second moments,
by whose root a first moment is divided.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Map(Protocol):
  """What the maps below have in common."""

  bits: int

  @property
  def zero(self) -> int:
    """The code of zero; the least code if there is none."""

  def encode(self, x: jax.Array) -> jax.Array:
    """The codes of numbers in [-1, 1], or [0, 1] if unsigned."""

  def decode(self, codes: jax.Array) -> jax.Array:
    """The numbers of codes."""


def _smaller(x, y):
  """`jnp.minimum` but for NaN, of which nothing is kept: one instruction."""
  return jnp.where(x < y, x, y)


def _larger(x, y):
  return jnp.where(x > y, x, y)


@dataclasses.dataclass(frozen=True)
class Linear:
  r"""Numbers at equal distances.

  .. math:: i / n, \qquad i = -n, \dots, n \quad\text{or}\quad i = l, \dots, n

  Args:
    bits: of a code.
    top: n, the number of steps from 0 to 1.
    low: the least i, -n if signed.

  Examples:
    >>> unsigned = Linear(bits=8, top=255, low=0)
    >>> print(unsigned.encode(jnp.array([0., 1e-9, .5, 1.])))
    [  0.   1. 128. 255.]

  References:
    bitsandbytes, `create_linear_map
    <https://github.com/bitsandbytes-foundation/bitsandbytes>`_ (8 bits)

    torchao, `low-bit optimizers <https://github.com/pytorch/ao>`_ (4 bits:
    i/16 without zero for second moments)
  """

  bits: int
  top: int
  low: int

  @property
  def zero(self) -> int:
    return max(-self.low, 0)

  def encode(self, x: jax.Array) -> jax.Array:
    x = x * self.top
    i = jnp.round(x)
    if self.low == 0:
      return jnp.where(x > 0, _larger(i, 1), 0)
    return _larger(i, self.low) - self.low

  def decode(self, codes: jax.Array) -> jax.Array:
    return (codes + self.low) / self.top


@dataclasses.dataclass(frozen=True)
class Dynamic:
  r"""The dynamic tree map: each decade below 1 has half as many numbers.

  Of the decades :math:`i = 0, \dots, d-1` each is cut into :math:`p_i` cells of
  equal width, of which it takes the centres,

  .. math::
    10^{i-d} \left(1 + 9 \, \frac{j + 1/2}{p_i}\right), \qquad
    j = 0, \dots, p_i - 1

  with :math:`p_i = 2^i` (:math:`2^{i+1}` if unsigned); 0 and 1 are added, and
  if signed all of these but 1 with the other sign.

  Closed form: number the codes K so that those of a decade run from
  :math:`p_i` to :math:`2 p_i - 1`, and let :math:`C_i = 10^{d-i} p_i`, an
  integer. Then :math:`C_i x` lies in :math:`[p_i, 10 p_i)`, the cells begin at
  :math:`p_i + 9 j`, and the number of a code is
  :math:`(9 K - 8 p_i + 9/2) / C_i`, with one rounding. Only the first cell of a
  decade begins later, at 0.2 of its width, half-way from the coarser decade
  below. Encoding rounds the product and the boundary, so that the number found
  is the nearest unless x is within :math:`2^{-23} x` of the middle of two.

  Args:
    bits: of a code: 8 with 7 decades, 4 with 3.
    decades: d.
    signed: whether numbers below zero have codes.

  Examples:
    >>> signed = Dynamic(bits=4, decades=3, signed=True)
    >>> print(signed.decode(jnp.arange(7., 16.)))
    [0.     0.0055 0.0325 0.0775 0.2125 0.4375 0.6625 0.8875 1.    ]
    >>> print(signed.encode(jnp.array([-1., 0., 0.05, 0.7])))
    [ 0.  7.  9. 13.]

  References:
    Dettmers, `8-Bit Approximations for Parallelism in Deep Learning
    <https://arxiv.org/abs/1511.04561>`_, 2015

    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021
  """

  bits: int
  decades: int
  signed: bool

  @property
  def zero(self) -> int:
    return self._cells[-1] * 2 - 1 if self.signed else 0

  @functools.cached_property
  def _cells(self):
    return [2 ** (i + (not self.signed)) for i in range(self.decades)]

  @functools.cached_property
  def _factors(self):
    return [10 ** (self.decades - i) * p for i, p in enumerate(self._cells)]

  @functools.cached_property
  def _starts(self):
    """The least float32 of each decade, and that of 1."""
    p, c = self._cells, self._factors
    exact = [(p[0] + 4.5) / c[0] / 2]
    exact += [(a + 1.8) / b for a, b in zip(p[1:], c[1:], strict=True)]
    exact += [1 - 0.225 / p[-1]]
    rounded = np.asarray(exact, np.float32)
    up = np.nextafter(rounded, np.float32(2))
    return np.where(rounded < exact, up, rounded)

  def encode(self, x: jax.Array) -> jax.Array:
    first, last = self._cells[0], 2 * self._cells[-1]
    size = jnp.abs(x)
    start = functools.partial(jnp.greater_equal, size)
    cells, factor = jnp.float32(first), jnp.float32(self._factors[0])
    for i in range(1, self.decades):
      here = start(self._starts[i])
      cells = jnp.where(here, np.float32(self._cells[i]), cells)
      factor = jnp.where(here, np.float32(self._factors[i]), factor)
    code = jnp.floor((size * factor - cells) / 9)
    code = cells + _smaller(code, cells - 1)
    # Of the negative numbers there is no -1.
    code = jnp.where(x >= self._starts[-1], np.float32(last), code)
    if self.signed:
      code = jnp.where(start(self._starts[0]), code, 0)
      return jnp.where(x < 0, -code, code) + (last - 1)
    return jnp.where(x > 0, _larger(code, first) - (first - 1), 0)

  def decode(self, codes: jax.Array) -> jax.Array:
    # CPUs read a small table faster than they compute.
    return jax.lax.platform_dependent(
      codes, cpu=self._look_up, default=self._compute
    )

  def _look_up(self, codes):
    table = jnp.asarray(self._numbers)
    return table.at[codes.astype(jnp.int32)].get(mode='promise_in_bounds')

  @functools.cached_property
  def _numbers(self):
    """All numbers of the map, in the order of their codes."""
    decades = [
      (9 * np.arange(p, 2 * p) - 8 * p + 4.5) / c
      for p, c in zip(self._cells, self._factors, strict=True)
    ]
    positive = np.concatenate([*decades, [1]])
    negative = -positive[-2::-1] if self.signed else []
    return np.concatenate([negative, [0], positive]).astype(np.float32)

  def _compute(self, codes):
    first, last = self._cells[0], 2 * self._cells[-1]
    codes = codes.astype(jnp.float32)
    code = codes + (first - 1)
    if self.signed:
      codes = codes - (last - 1)
      code = jnp.abs(codes)
    # The power of two that begins the decade of a code is its exponent.
    bits = jax.lax.bitcast_convert_type(code, jnp.int32) & 0x7F800000
    cells = jax.lax.bitcast_convert_type(bits, jnp.float32)
    factor = jnp.float32(self._factors[0])
    for p, c in zip(self._cells[1:], self._factors[1:], strict=True):
      factor = jnp.where(code >= p, np.float32(c), factor)
    size = (9 * code - 8 * cells + 4.5) / factor
    size = jnp.where(code >= last, 1.0, size)
    size = jnp.where(code < first, 0.0, size)
    return jnp.where(codes < 0, -size, size) if self.signed else size
