"""Operations between linear layers that keep their inputs in few bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from frugax import lowbit


def normal(*shape, seed=0, dtype=jnp.float32):
  x = np.random.default_rng(seed).standard_t(5, size=shape)
  return jnp.asarray(x, dtype)


def swiglu(gate, up):
  return jax.nn.silu(gate) * up


def norm(x, scale):
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def float8_groups(x, dtype, floor):
  """In groups of 16 along the last axis, by ml_dtypes."""
  top = float(ml_dtypes.finfo(dtype).max)
  *rows, size = x.shape
  groups = np.pad(x, [(0, 0)] * len(rows) + [(0, -size % 16)])
  groups = groups.reshape(*rows, -1, 16)
  step = np.maximum(np.abs(groups).max(-1, keepdims=True) / top, floor)
  out = (groups / step).astype(dtype).astype(np.float64) * step
  return out.reshape(*rows, -1)[..., :size]


def int8_groups(x):
  *rows, size = x.shape
  groups = np.pad(x, [(0, 0)] * len(rows) + [(0, -size % 128)])
  groups = groups.reshape(*rows, -1, 128)
  step = np.abs(groups).max(-1, keepdims=True) / 127
  out = np.round(groups / step) * step
  return out.reshape(*rows, -1)[..., :size]


def gradients(function, inputs, others, g):
  """In float64."""
  with jax.enable_x64(True):
    arrays = [jnp.asarray(np.asarray(a, np.float64)) for a in inputs + others]
    y, back = jax.vjp(function, *arrays)
    return [np.asarray(a) for a in (y, *back(jnp.asarray(g, jnp.float64)))]


@pytest.mark.parametrize('name', ['coat', 'int8'])
def test_is_the_operation_at_rounded_inputs(name):
  flow = lowbit.flow(name)
  for function, inputs, others in (
    (swiglu, [normal(2, 3, 37), normal(2, 3, 37, seed=1)], []),
    (norm, [normal(2, 3, 37)], [normal(37, seed=1)]),
  ):
    g = normal(2, 3, 37, seed=2)
    few = lowbit.keep_in_few_bits(function, flow)

    @jax.jit
    def value(inputs, others, g, few=few):
      y, back = jax.vjp(few, tuple(inputs), tuple(others))
      return y, *jax.tree.leaves(back(g))

    got = value(inputs, others, g)
    low = [np.asarray(x, np.float64) for x in inputs]
    wide_g = np.asarray(g, np.float64)
    if name == 'coat':
      low = [float8_groups(x, ml_dtypes.float8_e4m3fn, 1e-10) for x in low]
      wide_g = float8_groups(wide_g, ml_dtypes.float8_e5m2, 1e-10)
      want = gradients(function, low, others, wide_g)
    else:  # exact
      y, *_ = gradients(function, inputs, others, wide_g)
      low = [int8_groups(x) for x in low]
      want = [y, *gradients(function, low, others, wide_g)[1:]]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(
  ('name', 'each'),
  [
    ('none', 2),
    ('coat', 1 + 4 / 16),
    ('fp8', 1 + 4 / 16),
    ('jetfire', 1 + 4 / 1024),
    ('int8', 1 + 4 / 128),
    ('int4', 1 / 2 + 4 / 32),
  ],
)
def test_bytes_that_stay(name, each):
  x = normal(2, 64, 256, dtype=jnp.bfloat16)
  few = lowbit.keep_in_few_bits(jnp.multiply, lowbit.flow(name))
  back = jax.eval_shape(lambda: jax.vjp(lambda a, b: few((a, b)), x, x + 1)[1])
  kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(back))
  assert kept == 2 * x.size * each


def test_a_key_may_be_traced_where_the_operation_is():
  """As a layer's key is within a scan over the layers."""
  keys = jax.random.split(jax.random.key(3), 2)

  def layer(x, key):
    few = lowbit.keep_in_few_bits(jnp.tanh, lowbit.flow('jetfire'), key)
    return few((x,)), None

  def gradient(x, walk):
    return jax.jit(jax.grad(lambda x: walk(layer, x, keys)[0].sum()))(x)

  def by_hand(layer, x, keys):
    for i in range(len(keys)):
      x, _ = layer(x, keys[i])
    return x, None

  x = normal(4, 40)
  scanned, other = gradient(x, lax.scan), gradient(x, by_hand)
  np.testing.assert_allclose(scanned, other, rtol=1e-6)
  keys = keys[::-1]
  assert (gradient(x, by_hand) != other).any()


def test_jit_scan_vmap_and_remat_give_the_same_and_no_nan():
  """Of the flow with random bits."""
  few = lowbit.keep_in_few_bits(swiglu, lowbit.flow('jetfire'))
  hard = jnp.array([0.0, 1e-41, jnp.inf, -jnp.inf, 3e38, 1.0, 1.0])
  # Or the products would have infinities of their own.
  x = normal(3, 40, 37).at[1, :7, 0].set(jnp.clip(hard, -1e15, 1e15))
  x, g = x.at[2].set(0), normal(3, 40, 37, seed=2)

  def value(x, g, f=few):
    y, back = jax.vjp(lambda a, b: f((a, b)), x, -0.5 * x)
    return y, *back(g)

  @jax.jit
  def all_ways(x, g):
    scanned = lax.scan(lambda _, item: (None, value(*item)), None, (x, g))[1]
    remat = jax.checkpoint(few)
    return (
      scanned,
      jax.vmap(value)(x, g),
      jax.vmap(lambda x, g: value(x, g, remat))(x, g),
    )

  one = jax.jit(value)
  want = [one(*item) for item in zip(x, g, strict=True)]
  for got in all_ways(x, g):
    for a, b in zip(got, zip(*want, strict=True), strict=True):
      b = np.stack(b)
      assert np.isfinite(b).all()
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
