"""SPAM's clipping of entries against hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim


def clipped_in_float64(grads, threshold, guard, interval, b2=0.999):
  """What goes down the chain, and how many entries were clipped so far."""
  v, out, count = np.zeros_like(grads[0]), [], 0
  for t, g in enumerate(grads, 1):
    if interval and t % interval == 0:
      v = 0 * v
    if t >= guard and (not interval or t % interval >= guard):
      spikes = g**2 > threshold * v
      g = np.where(spikes, np.sign(g) * np.sqrt(threshold * v), g)
      count += spikes.sum()
    v = b2 * v + (1 - b2) * g**2
    out.append(g)
  return np.array(out), count


@pytest.mark.parametrize('interval', [None, 7])
@pytest.mark.parametrize('shape', [(5,), (3, 7), (2, 3, 5), ()])
def test_equals_a_float64_twin_with_its_own_or_the_inner_second_moment(
  shape, interval
):
  draw = np.random.default_rng(0)
  grads = draw.standard_t(2, size=(20, *shape))
  want, count = clipped_in_float64(grads, 30.0, 3, interval)
  assert 0 < count < grads.size
  clip = optim.clip_spikes(30.0, guard=3, reset_interval=interval)
  seen = optax.GradientTransformation(
    lambda params: {'seen': params}, lambda u, s, p=None: (u, {'seen': u})
  )
  inner = optax.chain(seen, optax.scale_by_adam())
  around = optim.clip_spikes(30.0, inner, guard=3, reset_interval=interval)
  if interval:
    clip = optim.reset_moments(clip, interval)
    around = optim.reset_moments(around, interval)
  params = jnp.zeros(shape)
  own, shared = clip.init(params), around.init(params)
  for g, w in zip(grads, want, strict=True):
    g = jnp.asarray(g, jnp.float32)
    got, own = jax.jit(clip.update)(g, own)
    np.testing.assert_allclose(got, w, rtol=2e-5, atol=1e-7)
    _, shared = jax.jit(around.update)(g, shared)
    state = shared.inner if interval else shared
    np.testing.assert_allclose(state.inner[0]['seen'], w, rtol=2e-5, atol=1e-7)
  assert optim.counts(own)['spike_count'] == count
  assert optim.counts(shared)['spike_count'] == count


def test_an_entry_never_seen_before_is_clipped_or_let_through():
  g = [jnp.array([1.0, 0.0]), jnp.array([1.0, 5.0])]
  for clip_unseen, want, count in ((True, 0.0, 1), (False, 5.0, 0)):
    tx = optim.clip_spikes(guard=2, clip_unseen=clip_unseen)
    state = tx.init(g[0])
    for x in g:
      updates, state = tx.update(x, state)
    np.testing.assert_array_equal(updates, [1.0, want])
    assert state.spike_count == count


def test_no_second_moment_is_stored_twice():
  params = {'w': jnp.zeros((6, 4))}
  sizes = optim.state_bytes(optim.clip_spikes(inner=optax.adam(1.0)), params)
  assert sizes['moments'] == 2 * 4 * 24
  assert optim.state_bytes(optim.clip_spikes(), params)['moments'] == 4 * 24


def test_an_inner_without_second_moment_is_refused():
  tx = optim.clip_spikes(inner=optax.sgd(1.0, momentum=0.9))
  with pytest.raises(ValueError, match='no second moment of layers/w'):
    tx.init({'layers': {'w': jnp.zeros((2, 2))}})


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'guard': -1}, 'guard=-1: give a Python int'),
    ({'guard': jnp.int32(2)}, 'static_args'),
    ({'reset_interval': 0}, 'reset_interval=0: give an int of at least 1'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    optim.clip_spikes(**arguments)


def test_inner_gets_parameters_and_extra_arguments():
  def update(updates, state, params=None, *, value):
    return jax.tree.map(lambda u, p: value * p, updates, params), state

  probe = optax.GradientTransformationExtraArgs(lambda params: (), update)
  tx = optim.clip_spikes(inner=optax.chain(optax.scale_by_adam(), probe))
  params = jnp.array([2.0])
  updates, _ = tx.update(params, tx.init(params), params, value=3.0)
  np.testing.assert_array_equal(updates, [6.0])


def test_counts_of_the_same_name_are_added_and_stop_at_the_largest_int():
  tx = optax.partition(
    {'a': optim.clip_spikes(), 'b': optim.clip_spikes()}, {'x': 'a', 'y': 'b'}
  )
  params = {'x': jnp.zeros(2), 'y': jnp.zeros(3)}
  state = tx.init(params)
  assert optim.counts(state) == {'spike_count': 0}
  for g in [jax.tree.map(jnp.zeros_like, params)] * 19 + [
    jax.tree.map(jnp.ones_like, params)
  ]:
    _, state = tx.update(g, state)
  assert optim.counts(state) == {'spike_count': 5}
  full = jax.tree.map(
    lambda x: jnp.int32(2**31 - 1) if x.ndim == 0 and x == 2 else x, state
  )
  assert optim.counts(full)['spike_count'] == 2**31 - 1
  assert optim.counts(optax.sgd(1.0).init(params)) == {}
