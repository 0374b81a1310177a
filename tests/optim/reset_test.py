"""Resets of the moments of any transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim


def run(tx, grads, params):
  state, update, out = tx.init(params), jax.jit(tx.update), []
  for g in grads:
    updates, state = update(g, state, params)
    out.append(updates)
  return out, state


def trees(steps, seed=0):
  draw = np.random.default_rng(seed)
  return [
    {
      'm': jnp.asarray(draw.normal(size=(3, 4)), jnp.float32),
      'nu': jnp.asarray(draw.normal(size=5), jnp.float32),
    }
    for _ in range(steps)
  ]


@pytest.mark.parametrize(
  'inner',
  [
    optax.adamw(0.1, weight_decay=0.1),
    optax.lion(0.1),
    optax.sgd(0.1, momentum=0.9, nesterov=True),
    optax.rmsprop(0.1),
    optax.masked(optax.adam(0.1), {'m': True, 'nu': False}),
    optax.partition(
      {'a': optax.adam(0.1), 'b': optax.adagrad(0.1)}, {'m': 'a', 'nu': 'b'}
    ),
    optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    optim.galore(0.1, rank=2, update_interval=100, projector='random'),
  ],
)
def test_with_counters_every_interval_is_a_fresh_start(inner):
  """But for what is no moment: a projector, the count of a schedule."""
  grads, params = trees(8), trees(1, seed=1)[0]
  got, state = run(optim.reset_moments(inner, 3, counters=True), grads, params)
  want = []
  for first, last in ((0, 2), (2, 5), (5, 8)):
    want += run(inner, grads[first:last], params)[0]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    got,
    want,
  )
  assert optim.counts(state) == {'reset_count': 2}


def test_without_counters_bias_is_corrected_as_if_nothing_had_happened():
  g = jnp.array([2.0, -0.5])
  tx = optim.reset_moments(optim.scale_by_adam_hf(eps=0.0), 4)
  out, state = run(tx, [g] * 5, g)
  np.testing.assert_allclose(out[2], jnp.sign(g), rtol=1e-5)
  step = np.sqrt(1 - 0.999**4) / (1 - 0.9**4) * 0.1 / np.sqrt(0.001)
  np.testing.assert_allclose(out[3], step * jnp.sign(g), rtol=1e-4)
  assert state.inner.count == 5


def test_schedules_go_on():
  schedule = optax.linear_schedule(1.0, 0.0, 10)
  tx = optim.reset_moments(optax.adam(schedule), 2, counters=True)
  out, _ = run(tx, [jnp.ones(())] * 6, jnp.ones(()))
  np.testing.assert_allclose(out, -1 + 0.1 * np.arange(6), rtol=1e-4)


def test_updates_warm_up_after_a_reset_and_not_before():
  tx = optim.reset_moments(optax.trace(decay=0.0), 5, warmup=3)
  out, _ = run(tx, [jnp.ones(())] * 12, jnp.ones(()))
  rise = [1 - 0.99 * (1 + np.cos(np.pi * j / 4)) / 2 for j in range(3)]
  want = [1, 1, 1, 1, *rise, 1, 1, *rise]
  np.testing.assert_allclose(out, want, rtol=1e-6)
  assert want[4] == pytest.approx(0.01)


def test_a_stale_reset_uses_the_old_moments_once_more():
  tx = optim.reset_moments(optax.ema(0.5, debias=False), 3, stale=True)
  g = [jnp.float32(x) for x in (8, 8, 8, 16, 16)]
  out, _ = run(tx, g, g[0])
  np.testing.assert_allclose(out, [4, 6, 7, 8, 12])


def test_accumulated_gradients_stay():
  inner = optax.MultiSteps(optax.sgd(1.0, momentum=1.0), every_k_schedule=2)
  tx = optim.reset_moments(inner.gradient_transformation(), 4)
  out, _ = run(tx, [jnp.float32(x) for x in (1, 3, 5, 7)], jnp.zeros(()))
  # The reset comes between 5 and 7: the trace of 2 is gone, 5 is not.
  np.testing.assert_allclose(out, [0, -2, 0, -6])


def test_moments_of_other_names_are_found_by_name_or_refused():
  inner = optax.GradientTransformation(
    lambda params: {'velocity': params}, lambda u, s, p=None: (u, s)
  )
  with pytest.raises(ValueError, match=r'found no moments.*velocity.*fields'):
    optim.reset_moments(inner, 3).init(jnp.zeros(2))
  tx = optim.reset_moments(optax.scale_by_rms(), 1, fields=('nu',))
  out, _ = run(tx, [jnp.float32(x) for x in (2, 5)], jnp.zeros(()))
  np.testing.assert_allclose(out, [0.1**-0.5] * 2, rtol=1e-4)


def test_the_reset_is_no_branch_and_costs_no_copy():
  params = {'w': jnp.zeros((256, 256))}
  sizes = []
  for tx in (
    optax.scale_by_adam(),
    optim.reset_moments(optax.scale_by_adam(), 7, counters=True),
  ):
    state = tx.init(params)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = step.lower(params, state).compile()
    assert 'conditional' not in compiled.as_text()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[1] <= sizes[0] + 1024


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'every': 0}, 'every=0: give an int of at least 1'),
    ({'every': jnp.int32(3)}, 'static_args'),
    ({'every': 3, 'warmup': -1}, 'warmup=-1: give a Python int'),
    ({'every': 3, 'warmup': 0.5}, 'warmup=0.5'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    optim.reset_moments(optax.adam(1.0), **arguments)
