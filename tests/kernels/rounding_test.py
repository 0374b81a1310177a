"""Codes of numbers half-way between two, to which random ones seldom come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.kernels.quantize_matmul.rounding import Rounding
from frugax.quant import Scaling


@pytest.mark.parametrize('format', ['int4', 'int8', 'rise1', 'rise4', 'rise8'])
def test_what_is_half_way_goes_to_the_even_multiple(format):
  rounding = Rounding(format, Scaling())
  x = np.arange(-300, 300.25, 0.25)
  top, half = rounding.element.top, rounding.shift
  below = np.clip(x + half, half - top, half + top)
  want = np.rint(below) - (1 if half else 0)
  x = jnp.asarray(x, jnp.float32)
  codes = jax.jit(rounding.codes, static_argnums=1)
  got = codes(x, False)
  assert rounding.offset % 2**8 == 0
  np.testing.assert_array_equal(got - rounding.offset, want)
  np.testing.assert_array_equal(got.astype(jnp.int8), want)
  np.testing.assert_array_equal(codes(x, True), want)
