"""In bfloat16 with b2=0.999 Adam's second moment grows but cannot shrink.

optax keeps it in the parameters' dtype, so this happens to whoever makes the
parameters bfloat16. A decay of 0.001 is below half the spacing of bfloat16
numbers, which is 0.002 to 0.004 of them: rounded to nearest, it is undone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.quant.rounding import round_stochastic

LOUD, QUIET = 1000, 3000  # steps with gradients of N(0, 1) and of N(0, 0.1^2)
SIZE = 2048


def every_bfloat16():
  """All positive normal numbers but the smallest, which has none below it."""
  patterns = np.arange(0x0081, 0x7F80, dtype=np.uint16)
  return jax.lax.bitcast_convert_type(jnp.asarray(patterns), jnp.bfloat16)


def test_no_bfloat16_number_can_decay_by_a_thousandth():
  v = every_bfloat16()
  decayed = (0.999 * v.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(decayed, v)


def test_every_bfloat16_number_can_decay_by_a_hundredth():
  v = every_bfloat16()
  assert ((0.99 * v.astype(jnp.float32)).astype(jnp.bfloat16) < v).all()


def test_rounded_stochastically_all_of_them_decay_in_the_mean():
  v = every_bfloat16()[:, None].astype(jnp.float32)
  v = jnp.broadcast_to(v, (v.size, 500))
  decayed = round_stochastic(0.999 * v, jax.random.key(0))
  relative = np.asarray(decayed, np.float64) / np.asarray(v, np.float64)
  # One draw is off by at most 2^-7, with a deviation of half that: over all
  # draws, five standard deviations (6e-7) of the mean.
  limit = 5 * 2**-8 / np.sqrt(v.size)
  assert limit < 1e-5 and abs(relative.mean() - 0.999) < limit


@functools.cache
def run(name, dtype):
  """The last update and the state after each of the two stretches of steps."""
  tx = OPTIMIZERS[name]
  params = jnp.zeros(SIZE, dtype)

  def stretch(state, scale, keys):
    def step(state, key):
      g = scale * jax.random.normal(key, (SIZE,))
      updates, state = tx.update(g.astype(dtype), state, params)
      return state, updates

    state, updates = jax.lax.scan(step, state, keys)
    # The mean over its last steps has less of the noise of each.
    return state, jnp.sqrt(jnp.mean(jnp.square(updates[-100:])))

  @jax.jit
  def both(state):
    keys = jax.random.split(jax.random.key(0), LOUD + QUIET)
    loud, _ = stretch(state, 1.0, keys[:LOUD])
    return loud, *stretch(loud, 0.1, keys[LOUD:])

  loud, quiet, update = both(tx.init(params))
  return loud, quiet, float(update)


def coded(codec):
  return optim.quantize_state(optim.scale_by_adam_hf(), codec, min_size=0)


OPTIMIZERS = {
  'optax': optax.scale_by_adam(),
  'ours': optim.scale_by_adam_hf(),
  'ours_float32': optim.scale_by_adam_hf(state_dtype=jnp.float32),
  'bf16': coded('bf16'),
  'bf16_stochastic': coded('bf16_stochastic'),
  'dynamic8': coded('dynamic8'),
  'linear8': coded('linear8'),
}
REMAINS = 0.999**QUIET  # of what the loud steps left


@pytest.mark.parametrize('name', ['optax', 'ours'])
def test_the_second_moment_of_adam_is_a_ratchet_in_bfloat16(name):
  loud, quiet, _ = run(name, jnp.bfloat16)
  assert loud.nu.dtype == jnp.bfloat16
  # Thirty times fewer would be right; not one of them has shrunk.
  assert (quiet.nu >= loud.nu).all()
  loud, quiet, _ = run(name, jnp.float32)
  mean = float((quiet.nu - REMAINS * loud.nu).mean())
  np.testing.assert_allclose(mean, 0.01 * (1 - REMAINS), rtol=0.02)


@pytest.mark.parametrize('name', ['optax', 'ours'])
def test_its_steps_are_several_times_too_small(name):
  want = run('optax', jnp.float32)[2]
  assert run(name, jnp.bfloat16)[2] < 0.3 * want
  np.testing.assert_allclose(run(name, jnp.float32)[2], want, rtol=0.02)


def test_a_state_in_float32_mends_it_for_bfloat16_parameters():
  want = run('optax', jnp.float32)[2]
  got = run('ours_float32', jnp.bfloat16)[2]
  np.testing.assert_allclose(got, want, rtol=0.02)


@pytest.mark.parametrize('codec', ['bf16_stochastic', 'dynamic8', 'linear8'])
def test_codecs_do_not_suffer(codec):
  """Adam's moments in 8 bits or stochastically rounded, bfloat16 weights."""
  want = run('optax', jnp.float32)[2]
  got = run(codec, jnp.bfloat16)[2]
  np.testing.assert_allclose(got, want, rtol=0.05)


def test_rounding_to_nearest_once_a_step_does():
  """The ratchet is not in how often a step rounds."""
  want = run('optax', jnp.float32)[2]
  assert run('bf16', jnp.bfloat16)[2] < 0.3 * want
