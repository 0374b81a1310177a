"""SPAM against the authors' code and a float64 twin, and its kept entries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugax import optim


def spikes():
  """The first entry of the gradient times 30 at steps 5 and 9."""

  def update(updates, count, params=None):
    del params
    factor = jnp.where((count == 4) | (count == 8), 30.0, 1.0)
    updates = jax.tree.map(lambda g: g.at[0, 0].multiply(factor), updates)
    return updates, count + 1

  return optax.GradientTransformation(lambda params: jnp.int32(0), update)


@pytest.mark.parametrize('spiked', [False, True])
@pytest.mark.parametrize('shape', ['6x4', '4x6'])
def test_follows_the_reference(shape, spiked, trace, golden):
  tx = optim.spam(
    0.01, threshold=2.0, reset_interval=6, warmup_steps=3, guard=2
  )
  got = trace(optax.chain(spikes(), tx) if spiked else tx, shape)
  want = np.array(golden[f'spam {shape}'])[: len(got)]
  np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)


def in_float64(w, grads, theta, interval, warmup, guard, decay, paper):
  """W after each step; learning rate 0.01."""
  w, m, v, out = np.array(w, np.float64), 0.0, np.zeros(w.shape), []
  s = 0
  for t, g in enumerate(grads, 1):
    s += 1
    g = np.array(g, np.float64)
    if t % interval == 0:
      m, v = 0.0, np.zeros(w.shape)
      s = 1 if paper else s
    if t >= guard and t % interval >= guard:
      g = np.where(g**2 > theta * v, np.sign(g) * np.sqrt(theta * v), g)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    if paper:
      u = m / (1 - 0.9**s) / (np.sqrt(v / (1 - 0.999**s)) + 1e-6)
    else:
      u = np.sqrt(1 - 0.999**s) / (1 - 0.9**s) * m / (np.sqrt(v) + 1e-6)
    j = t % interval if t >= interval else warmup
    wave = (1 + np.cos(np.pi * j / (warmup + 1))) / 2
    w = w - 0.01 * (1 if j >= warmup else 1 - 0.99 * wave) * u
    w = w - 0.01 * decay * w
    out.append(w)
  return np.array(out)


def run(tx, w, grads):
  params, update, out = jnp.asarray(w, jnp.float32), jax.jit(tx.update), []
  state = tx.init(params)
  for g in grads:
    updates, state = update(jnp.asarray(g, jnp.float32), state, params)
    params = optax.apply_updates(params, updates)
    out.append(params)
  return np.array(out), state


@pytest.mark.parametrize('algorithm', ['released', 'paper'])
def test_equals_a_float64_twin(algorithm):
  draw = np.random.default_rng(0)
  w = draw.normal(size=(2, 3, 5)).astype(np.float32)
  grads = draw.standard_t(2, size=(30, 2, 3, 5)).astype(np.float32)
  tx = optim.spam(
    0.01,
    threshold=400.0,
    reset_interval=9,
    warmup_steps=4,
    guard=3,
    algorithm=algorithm,
    weight_decay=0.1,
  )
  got, state = run(tx, w, grads)
  want = in_float64(w, grads, 400.0, 9, 4, 3, 0.1, algorithm == 'paper')
  np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-5)
  seen = optim.counts(state)
  assert seen['reset_count'] == 3 and 0 < seen['spike_count'] < 300


def test_the_step_of_a_reset_is_three_times_adams_but_for_the_warm_up():
  tx = optim.spam(1.0, reset_interval=1000, warmup_steps=0)
  state = tx.init(jnp.ones(()))
  update = jax.jit(tx.update)
  for _ in range(1000):
    updates, state = update(jnp.ones(()), state)
  root = np.sqrt(1 - 0.999**1000) / (1 - 0.9**1000)
  np.testing.assert_allclose(updates, -root * 0.1 / 0.001**0.5, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
  shape=st.sampled_from(
    [(1, 1), (4, 4), (7, 3), (3, 7), (13, 1), (1, 5), (2, 8, 5), (5461, 2)]
  ),
  every=st.integers(2, 5),
)
def test_exactly_one_entry_in_every_n_is_kept_and_stored(shape, every):
  axes = optim.MatrixAxes((-2,), (-1,))
  tx = optim.spam(1.0, density=1 / every, axes=lambda params: axes)
  params = jnp.ones(shape, jnp.float32)
  updates, _ = tx.update(params, tx.init(params))
  *batch, m, n = shape
  long, short = max(m, n), min(m, n)
  kept = int(np.prod(batch)) * -(-long // every) * short
  assert np.count_nonzero(updates) == kept
  assert optim.state_bytes(tx, params)['moments'] == 2 * 4 * kept
  # One of each n neighbours along the longer axis.
  updates = np.swapaxes(updates, -1, -2) if m < n else np.asarray(updates)
  for start in range(0, long, every):
    part = updates[..., start : start + every, :]
    assert ((part != 0).sum(-2) == 1).all()


def test_kept_entries_are_adams_and_are_drawn_anew_at_each_reset():
  draw = np.random.default_rng(0)
  grads = draw.normal(size=(12, 8, 6)).astype(np.float32)
  options = dict(reset_interval=5, warmup_steps=2, guard=50)
  dense, _ = run(optim.spam(0.1, **options), grads[0] * 0, grads)
  sparse, _ = run(optim.spam(0.1, density=0.5, **options), grads[0] * 0, grads)
  dense, sparse = (
    np.diff(x, axis=0, prepend=0 * x[:1]) for x in (dense, sparse)
  )
  masks = np.abs(sparse) > 0
  assert (masks.sum((1, 2)) == 24).all()
  np.testing.assert_allclose(sparse, dense * masks, atol=1e-6)
  for first, last in ((0, 4), (4, 9), (9, 12)):
    assert (masks[first:last] == masks[first]).all()
  assert (masks[0] != masks[4]).any() and (masks[4] != masks[9]).any()


def test_every_entry_is_drawn_equally_often():
  """Chi-square of 400 draws of one of 4: 3 degrees of freedom, p = 1e-4."""
  hits = np.zeros((4, 3))
  for seed in range(400):
    tx = optim.spam(1.0, density=0.25, key=seed)
    updates, _ = tx.update(jnp.ones((4, 3)), tx.init(jnp.ones((4, 3))))
    hits += np.asarray(updates) != 0
  assert (hits.sum(0) == 400).all()
  assert ((hits - 100) ** 2 / 100).sum(0).max() < 23.5


def test_leaves_of_the_same_shape_keep_different_entries_and_layers_the_same():
  params = {'a': jnp.ones((2, 16, 8)), 'b': jnp.ones((2, 16, 8))}
  axes = {k: optim.MatrixAxes((1,), (2,)) for k in params}
  tx = optim.spam(1.0, density=0.5, axes=axes, key=jax.random.key(3))
  updates, _ = tx.update(params, tx.init(params))
  kept = {k: np.asarray(u) != 0 for k, u in updates.items()}
  assert (kept['a'] != kept['b']).any()
  np.testing.assert_array_equal(kept['a'][0], kept['a'][1])


def test_unkept_entries_do_not_disturb_even_if_they_are_no_numbers():
  params = jnp.ones((8, 4))
  tx = optim.spam(1.0, density=0.5)
  kept, _ = tx.update(params, tx.init(params))
  got, _ = tx.update(jnp.where(kept != 0, 1, jnp.nan), tx.init(params))
  np.testing.assert_array_equal(got, kept)


@pytest.mark.parametrize('sharded', [0, 1])
def test_a_sharded_gradient_is_not_gathered(sharded):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec(*[None] * sharded, 'x')
  params = {'w': jnp.zeros((128, 64))}
  shardings = {'w': jax.sharding.NamedSharding(mesh, spec)}
  tx = optim.spam(1.0, density=0.25)
  state = jax.eval_shape(tx.init, params)
  of_state = optim.state_shardings(tx, params, shardings)
  assert of_state[0].inner.inner.inner.mu['w'].spec == spec
  step = jax.jit(
    tx.update,
    in_shardings=(shardings, of_state),
    out_shardings=(shardings, of_state),
  )
  text = step.lower(params, state).compile().as_text()
  assert 'all-gather' not in text and 'all-to-all' not in text


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'density': 0.3}, 'density=0.3: one entry in every n is kept.*1/3 or 1/4'),
    ({'density': 0}, 'density=0: give a Python number'),
    ({'density': 2}, 'density=2: give a Python number'),
    ({'density': jnp.float32(0.5)}, 'static_args'),
    ({'algorithm': 'papr'}, "'papr': did you mean 'paper'"),
    ({'reset_interval': 0}, 'reset_interval=0: give an int'),
    ({'warmup_steps': -3}, '-3'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    optim.spam(0.1, **arguments)
