"""Formats of a few bits against ml_dtypes and against a search in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from frugax.quant import elements
from frugax.quant.elements import ELEMENTS, element
from frugax.quant.rounding import random_bits

DTYPES = {
  'fp8_e4m3': ml_dtypes.float8_e4m3fn,
  'fp8_e5m2': ml_dtypes.float8_e5m2,
  'e3m4': ml_dtypes.float8_e3m4,  # below its infinity
  'fp6_e3m2': ml_dtypes.float6_e3m2fn,
  'fp6_e2m3': ml_dtypes.float6_e2m3fn,
  'fp4_e2m1': ml_dtypes.float4_e2m1fn,
}
NAMES = sorted(ELEMENTS)


def inputs(e):
  """Numbers of the format, their middles and what is just beside both."""
  numbers = np.array(e.numbers())
  middles = (numbers[1:] + numbers[:-1]) / 2
  x = np.concatenate([numbers, middles, [0, e.top * 1.1, 1e30, 1e-30, 1e-40]])
  x = x.astype(np.float32)
  x = np.concatenate([x, np.nextafter(x, np.float32(0)), x * (1 + 2**-20)])
  x = np.concatenate([x, np.random.default_rng(0).normal(size=50) * e.top / 2])
  # Of one size for all formats, so that each operation is compiled once.
  return np.resize(np.concatenate([x, -x]).astype(np.float32), 4096)


def all_numbers(e):
  positive = np.array(e.numbers())
  return np.unique(np.concatenate([-positive, positive]))


def nearest(e, x):
  """By search. A tie goes to the even multiple of the step."""
  # As on most chips, what is less than a normal number is zero.
  x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)
  numbers = all_numbers(e)
  at = np.clip(np.searchsorted(numbers, x), 1, len(numbers) - 1)
  low, high = numbers[at - 1], numbers[at]
  x = np.clip(x.astype(np.float64), -e.top, e.top)
  shift = 0.5 if e.rise else 0.0
  even = (low / (high - low) + shift) % 2 == 0
  middle = (low + high) / 2  # exact
  take_low = (x < middle) | ((x == middle) & even)
  return np.where(take_low, low, high)


@pytest.mark.parametrize('name', NAMES)
def test_rounds_to_the_nearest_and_ties_to_even(name):
  e = element(name)
  x = inputs(e)
  np.testing.assert_array_equal(e.round(jnp.asarray(x)), nearest(e, x))


@pytest.mark.parametrize('name', DTYPES)
def test_rounds_as_ml_dtypes_does(name):
  e, dtype = element(name), DTYPES[name]
  limit = float(ml_dtypes.finfo(dtype).max)
  x = inputs(e)
  x = np.where(np.abs(x) <= limit, x, 0)
  got = e.round(jnp.asarray(x))
  np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))
  if name != 'e3m4':
    assert e.top == limit


@pytest.mark.parametrize('name', NAMES)
def test_codes_are_packed_and_come_back(name):
  e = element(name)
  numbers = all_numbers(e)
  assert len(numbers) <= 2**e.bits
  size = max(257, len(numbers) | 1)  # odd, and every number once
  x = np.resize(numbers, (2, size)).astype(np.float32)
  codes = e.encode(jnp.asarray(x))
  assert codes.dtype == e.dtype
  assert len(np.unique(np.asarray(codes))) == len(numbers)
  packed = e.pack(codes)
  each = {1: 8, 2: 4, 4: 2, 8: 1, 16: 1}[e.stored_bits]
  assert packed.shape == (2, -(-size // each))
  unpacked = e.unpack(packed, size)
  assert unpacked.dtype == codes.dtype
  np.testing.assert_array_equal(e.decode(unpacked), x)


@pytest.mark.parametrize('name', ['fp8_e5m2', 'e2m0', 'int4', 'rise3'])
def test_stochastic_rounding_has_no_bias_and_takes_neighbours(name):
  e = element(name)
  x = np.float32(e.top * np.array([0.0, 0.013, 0.17, 0.5, 0.77, 1.0, -0.6]))
  tiled = jnp.broadcast_to(x, (4096, 7))
  got = np.asarray(
    e.round(tiled, random_bits(jax.random.key(0), tiled.shape)), np.float64
  )
  numbers = all_numbers(e)
  at = np.clip(np.searchsorted(numbers, x), 1, len(numbers) - 1)
  low, high = numbers[at - 1], numbers[at]
  assert ((got == low) | (got == high)).all()
  # Six standard deviations of a mean of 4096 of two values.
  np.testing.assert_array_less(
    np.abs(got.mean(0) - x), 6 * (high - low) / 2 / 64
  )
  for i in np.flatnonzero(np.isin(x, numbers)):
    assert (got[:, i] == x[i]).all()


@pytest.mark.parametrize('name', NAMES)
def test_nan_stays_and_infinity_saturates(name):
  e = element(name)
  x = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
  for random in (None, jnp.full(3, 12345, jnp.uint32)):
    got = np.asarray(e.round(x, random))
    np.testing.assert_array_equal(got, [np.nan, e.top, -e.top])


@pytest.mark.parametrize(
  ('name', 'top', 'count'),
  [
    ('e4m3', 480, 128),
    ('e5m2', 114688, 128),
    ('e1m2', 3.5, 8),
    ('e7m0', 2.0**64, 128),
    ('fp6_e3m2', 28, 32),
    ('int8', 127, 128),
    ('rise4', 7.5, 8),
    ('ternary', 1, 2),
  ],
)
def test_tops_and_counts(name, top, count):
  numbers = element(name).numbers()
  assert numbers[-1] == element(name).top == top and len(numbers) == count


def test_every_float_of_at_most_eight_bits_has_a_name():
  found = {(e, m) for e in range(1, 8) for m in range(8) if e + m < 8}
  assert {n for n in NAMES if n[0] == 'e'} == {f'e{e}m{m}' for e, m in found}


@pytest.mark.parametrize('bits', [1, 2, 4])
@pytest.mark.parametrize('size', [0, 1, 7, 16])
def test_packing(bits, size):
  codes = np.random.default_rng(0).integers(0, 2**bits, (3, size), np.uint8)
  packed = elements.pack(jnp.asarray(codes), bits)
  assert packed.shape == (3, -(-size * bits // 8))
  np.testing.assert_array_equal(elements.unpack(packed, bits, size), codes)


def test_an_unknown_name():
  with pytest.raises(ValueError, match="'fp8_e4m4': did you mean 'fp8_e4m3'"):
    element('fp8_e4m4')
