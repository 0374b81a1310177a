r"""The numbers that a few bits stand for: integers, small floats, mid-rise.

One description covers all of them. Below :math:`2^l` the numbers of a format
lie :math:`2^{l-m}` apart, in each octave above they lie twice as far apart as
in the one before, and the largest is its top. Integers are the case without an
octave above.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from frugax import names


@dataclasses.dataclass(frozen=True)
class Element:
  """The numbers of a format, before any scale.

  Attributes:
    name: as in `ELEMENTS`.
    bits: of a code.
    mantissa: bits below the leading one.
    least: exponent below which the numbers stay equally far apart.
    top: the largest number; beyond it everything saturates, infinity too.
    rise: whether the numbers are halves of odd integers, without a zero.
    dtype: in which codes are multiplied: int8, int16, float8_e4m3fn or
      float8_e5m2 where a code is such a number (of mid-rise numbers, less a
      half); uint8 where it is the sign and the place in the order of
      magnitudes.

  Examples:
    >>> element('fp4_e2m1').numbers()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    >>> element('rise2').numbers()
    [0.5, 1.5]
  """

  name: str
  bits: int
  mantissa: int
  least: int
  top: float
  rise: bool = False
  dtype: str = 'uint8'

  @property
  def stored_bits(self) -> int:
    """Bits that a packed code takes: 1, 2, 4, 8 or 16."""
    return 1 << (self.bits - 1).bit_length()

  @property
  def top_step(self) -> float:
    """How far apart the two largest numbers lie (mid-rise: 1)."""
    if self.top < 2.0 ** (self.least + 1):
      return 2.0 ** (self.least - self.mantissa)
    return 2.0 ** (math.frexp(self.top)[1] - 1 - self.mantissa)

  def numbers(self) -> list[float]:
    """All numbers that are not negative, in their order."""
    found, x = [], 0.5 if self.rise else 0.0
    while x <= self.top:
      found.append(x)
      exponent = max(math.frexp(x)[1] - 1, self.least) if x else self.least
      x += 2.0 ** (exponent - self.mantissa)
    return found

  def round(self, x: jax.Array, random: jax.Array | None = None) -> jax.Array:
    """The number of the format that is nearest to x, or one of the nearest two.

    To nearest, what is half-way goes to the even multiple of the step there, as
    IEEE 754 has it (without a mantissa: up; mid-rise: the multiple before a
    half is taken off). NaN stays NaN.

    Args:
      x: an array; computed in float32.
      random: uint32 of x's shape rounds stochastically: up with a probability
        of the distance to the number below over that between the two, in
        steps of 2^-24.

    Returns:
      A float32 array.

    Examples:
      >>> print(element('fp4_e2m1').round(jnp.array([.2, .25, 2.6, 5., -99.])))
      [ 0.  0.  3.  4. -6.]
    """
    x = jnp.clip(x.astype(jnp.float32), -self.top, self.top)
    step = self._step(x)
    x = x / step
    shift = 0.5 if self.rise else 0.0
    if random is not None:
      below = jnp.floor(x + shift)
      uniform = (random >> 8).astype(jnp.float32) * 2.0**-24
      return (below + (uniform < x + shift - below) - shift) * step
    if not self.rise:
      return jnp.round(x) * step
    # Not round(x + 1/2) - 1/2: the sum is rounded where x is small.
    below = jnp.floor(x)
    tie = (x == below) & (jnp.floor(below / 2) * 2 == below)
    return below + jnp.where(tie, -0.5, 0.5)

  def encode(self, x: jax.Array) -> jax.Array:
    """The codes of numbers of the format, in `dtype`; of NaN it is undefined.

    Examples:
      >>> print(element('e2m3').encode(jnp.array([0., .125, 1., -7.5])))
      [ 0  1  8 63]
    """
    if self.dtype in ('int8', 'int16'):
      return (x - 0.5 if self.rise else x).astype(self.dtype)
    if self.dtype != 'uint8':
      return x.astype(self.dtype)
    size = jnp.abs(x)
    step = self._step(size)
    octaves = _exponent(step) - (self.least - self.mantissa)
    place = (size / step).astype(jnp.int32) + (octaves << self.mantissa)
    return (place | (x < 0).astype(jnp.int32) << self.bits - 1).astype('uint8')

  def decode(self, codes: jax.Array) -> jax.Array:
    """The numbers of codes, in float32.

    Examples:
      >>> print(element('e2m3').decode(jnp.array([0, 1, 8, 63], jnp.uint8)))
      [ 0.     0.125  1.    -7.5  ]
    """
    if self.dtype != 'uint8':
      x = codes.astype(jnp.float32)
      return x + 0.5 if self.rise else x
    codes = codes.astype(jnp.int32)
    place = codes & 2 ** (self.bits - 1) - 1
    octaves = jnp.maximum((place >> self.mantissa) - 1, 0)
    size = (place - (octaves << self.mantissa)).astype(jnp.float32)
    size = size * _power(octaves + (self.least - self.mantissa))
    return jnp.where(codes >> self.bits - 1 == 1, -size, size)

  def pack(self, codes: jax.Array) -> jax.Array:
    """Codes of at most 4 bits in fewer bytes, along the last axis; see `pack`.

    Examples:
      >>> int4 = element('int4')
      >>> packed = int4.pack(jnp.array([-7, 7, 1], jnp.int8))
      >>> print(packed, int4.unpack(packed, 3))
      [121   1] [-7  7  1]
    """
    if self.stored_bits >= 8:
      return codes
    mask = jnp.uint8(2**self.stored_bits - 1)
    return pack(codes.astype(jnp.uint8) & mask, self.stored_bits)

  def unpack(self, packed: jax.Array, size: int) -> jax.Array:
    """The inverse of `pack`, for a last axis of this size."""
    if self.stored_bits >= 8:
      return packed
    codes = unpack(packed, self.stored_bits, size)
    if self.dtype == 'uint8':
      return codes
    # The sign is the highest of the stored bits.
    sign = 2 ** (self.stored_bits - 1)
    return (codes ^ sign).astype(jnp.int8) - jnp.int8(sign)

  def _step(self, x):
    """How far apart the numbers lie where x is."""
    if self.top < 2.0 ** (self.least + 1):  # no octave above
      return jnp.float32(2.0 ** (self.least - self.mantissa))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7F800000
    octave = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.maximum(octave, 2.0**self.least) * 2.0**-self.mantissa


def pack(codes: jax.Array, bits: int) -> jax.Array:
  """Several codes a byte along the last axis, the earlier ones lower.

  Args:
    codes: uint8 (or bool), each less than 2^bits.
    bits: 1, 2 or 4.

  Returns:
    uint8; the last byte of a row is filled with zeros.

  Examples:
    >>> print(pack(jnp.array([1, 2, 3, 0, 1], jnp.uint8), 2))
    [57  1]
  """
  each = 8 // bits
  *rows, size = codes.shape
  if size % each:
    codes = jnp.pad(codes, [(0, 0)] * len(rows) + [(0, -size % each)])
  parts = codes.astype(jnp.uint8).reshape(*rows, -1, each)
  return functools.reduce(
    jnp.bitwise_or, [parts[..., i] << i * bits for i in range(each)]
  )


def unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
  """The inverse of `pack`, for a last axis of this size."""
  mask = 2**bits - 1
  parts = [packed >> i * bits & mask for i in range(8 // bits)]
  codes = jnp.stack(parts, axis=-1)
  return codes.reshape(*packed.shape[:-1], -1)[..., :size]


def element(name: str) -> Element:
  """The format of a name.

  - 'int2' to 'int8' and 'int16': -n to n with n = 2^(bits-1) - 1;
  - 'ternary': -1, 0, 1;
  - 'rise1' to 'rise8': the 2^bits numbers -1/2, 1/2, -3/2, 3/2 ...;
  - 'e{E}m{M}' with E + M < 8: sign, exponent and mantissa, subnormal numbers,
    and neither infinity nor NaN: every code is a number;
  - 'fp8_e4m3', 'fp8_e5m2': the 8-bit floats of accelerators, which end at 448
    and 57344; 'fp6_e3m2', 'fp6_e2m3', 'fp4_e2m1': the e{E}m{M} of these bits.

  Args:
    name: one of these.

  Returns:
    The format.

  Raises:
    ValueError: an unknown name, with the nearest valid one.

  Examples:
    >>> element('int4').top, element('fp8_e4m3').top, element('e4m3').top
    (7.0, 448.0, 480.0)

  References:
    Micikevicius et al., `FP8 Formats for Deep Learning
    <https://arxiv.org/abs/2209.05433>`_, 2022

    Rouhani et al., `OCP Microscaling Formats (MX) Specification
    <https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>`_,
    2023

    Sun et al., `Scaling Laws for Floating Point Quantization Training
    <https://arxiv.org/abs/2501.02423>`_, 2025
  """
  if name not in ELEMENTS:
    raise names.unknown('element format', name, ELEMENTS)
  return ELEMENTS[name]


def _integer(name, bits):
  top = 2.0 ** (bits - 1) - 1
  dtype = 'int8' if bits <= 8 else 'int16'
  return Element(name, bits, bits - 1, bits - 1, top, dtype=dtype)


def _rise(bits):
  top = (2.0**bits - 1) / 2
  return Element(f'rise{bits}', bits, bits, bits, top, rise=True, dtype='int8')


def _float(name, exponent, mantissa, top=None, dtype='uint8'):
  bias = 2 ** (exponent - 1) - 1
  if top is None:
    top = 2.0 ** (2**exponent - 1 - bias) * (2 - 2.0**-mantissa)
  bits = 1 + exponent + mantissa
  return Element(name, bits, mantissa, 1 - bias, top, dtype=dtype)


def _all():
  yield from (_integer(f'int{bits}', bits) for bits in (*range(2, 9), 16))
  yield _integer('ternary', 2)
  yield from (_rise(bits) for bits in range(1, 9))
  for exponent in range(1, 8):
    for mantissa in range(8 - exponent):
      yield _float(f'e{exponent}m{mantissa}', exponent, mantissa)
  yield _float('fp8_e4m3', 4, 3, 448.0, 'float8_e4m3fn')
  yield _float('fp8_e5m2', 5, 2, 57344.0, 'float8_e5m2')
  yield _float('fp6_e3m2', 3, 2)
  yield _float('fp6_e2m3', 2, 3)
  yield _float('fp4_e2m1', 2, 1)


def _exponent(x):
  """Of powers of two."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return (bits >> 23) - 127


def _power(exponent):
  """Two to an integer that is the exponent of a normal float32."""
  bits = exponent + 127 << 23
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


ELEMENTS = {e.name: e for e in _all()}
