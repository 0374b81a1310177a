"""The rotation against dense matrices in float64, for any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugax.quant import hadamard


def matrix(size, block):
  """The whole rotation, block by block along the diagonal."""
  out, start = np.zeros((size, size)), 0
  block = block or 2 ** (size.bit_length() - 1)
  while start < size:
    while block > size - start:
      block //= 2
    i = np.arange(block)
    parity = np.vectorize(lambda x: int(x).bit_count())(i[:, None] & i)
    at = slice(start, start + block)
    out[at, at] = (-1.0) ** parity / np.sqrt(block)
    start += block
  return out


def normal(*shape):
  x = np.random.default_rng(0).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


@settings(max_examples=12, deadline=None)
@given(
  size=st.sampled_from([1, 3, 31, 64, 85, 130]),
  block=st.sampled_from([1, 2, 32, 128, None]),
  axis=st.sampled_from([0, -1]),
)
def test_is_the_dense_rotation_and_its_own_inverse(size, block, axis):
  shape = [2, 3, 2]
  shape[axis] = size
  x = normal(*shape)
  rotate = jax.jit(hadamard, static_argnums=(1, 2))
  y = rotate(x, axis, block)
  want = np.moveaxis(np.asarray(x, np.float64), axis, -1) @ matrix(size, block)
  np.testing.assert_allclose(y, np.moveaxis(want, -1, axis), atol=2e-6)
  np.testing.assert_allclose(rotate(y, axis, block), x, atol=2e-6)


@pytest.mark.parametrize(('size', 'block'), [(256, None), (1024, 512)])
def test_large_blocks_are_products(size, block):
  x = normal(2, size)
  want = np.asarray(x, np.float64) @ matrix(size, block)
  np.testing.assert_allclose(hadamard(x, block=block), want, atol=1e-5)


def test_signs_are_drawn_from_the_key_and_undone():
  x, key = normal(4, 77), jax.random.key(3)
  y = hadamard(x, block=16, key=key)
  assert jnp.abs(y - hadamard(x, block=16)).max() > 0.1
  back = hadamard(y, block=16, key=key, inverse=True)
  np.testing.assert_allclose(back, x, atol=2e-6)
  diagonal = np.asarray(hadamard(jnp.eye(77), block=1, key=key))
  np.testing.assert_array_equal(np.abs(diagonal), np.eye(77))
  assert 20 < (np.diag(diagonal) < 0).sum() < 57
  # Products over the rotated axis are what they were.
  w = normal(5, 77)
  rotated = y @ hadamard(w, block=16, key=key).T
  np.testing.assert_allclose(rotated, x @ w.T, atol=1e-4)


def test_an_outlier_is_spread_over_its_block():
  x = jnp.zeros(300).at[130].set(8.0)
  y = np.abs(np.asarray(hadamard(x)))
  np.testing.assert_allclose(y[128:256], 8 / np.sqrt(128), rtol=1e-6)
  assert not y[:128].any() and not y[256:].any()


def test_dtype_and_empty_axes_stay():
  assert hadamard(jnp.ones((3, 5), jnp.bfloat16)).dtype == jnp.bfloat16
  assert hadamard(jnp.ones((3, 0))).shape == (3, 0)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [({'block': 12}, 'block=12'), ({'block': 0}, 'block=0'), ({'axis': 2}, '2')],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    hadamard(jnp.ones((3, 5)), **arguments)
