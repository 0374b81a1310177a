import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugax import optim
from frugax.optim import projectors, refreshes

SHAPES = {
  'stack': (3, 6, 8),
  'tall': (9, 4),
  'experts': (2, 2, 4, 5),
  'b': (4,),
}


def tree(seed):
  draw = np.random.default_rng(seed)
  return {
    k: jnp.asarray(draw.normal(size=shape), jnp.float32)
    for k, shape in SHAPES.items()
  }


def last_two(params):
  axes = optim.MatrixAxes((-2,), (-1,))
  return jax.tree.map(lambda p: axes if p.ndim > 1 else None, params)


def low_rank(interval, **options):
  options = {'rank': 2, 'axes': last_two, **options}
  return optim.low_rank(
    optim.scale_by_adam_hf(), update_interval=interval, **options
  )


def layers_of(states):
  """The items along the first batch axis of a stack, else the whole."""
  return {
    (name, i): np.asarray(layer)
    for name, x in states.items()
    if name != 'b'
    for i, layer in enumerate(x if len(SHAPES[name]) > 2 else [x])
  }


def refreshed(tx, steps, grads=tree):
  """For each step the layers whose basis it changed."""
  state, update = tx.init(tree(0)), jax.jit(tx.update)
  found, old = [], layers_of(state.projectors)
  for step in range(steps):
    _, state = update(grads(step), state)
    new = layers_of(state.projectors)
    found.append({k for k in new if (new[k] != old[k]).any()})
    old = new
  return found


@pytest.mark.parametrize('interval', [1, 2, 4, 9])
def test_staggered_refreshes_each_layer_once_in_an_interval(interval):
  steps = refreshed(low_rank(interval, refresh='staggered'), 2 * interval + 1)
  every = set(layers_of({k: np.zeros(s) for k, s in SHAPES.items()}))
  assert len(every) == 6
  assert steps[0] == every
  for start in range(1, interval + 2):
    window = steps[start : start + interval]
    assert sum(map(len, window)) == len(every)
    assert set().union(*window) == every
  assert max(map(len, steps[1:])) == math.ceil(len(every) / interval)


@settings(max_examples=50, deadline=None)
@given(
  heights=st.lists(st.integers(1, 40), min_size=1, max_size=6),
  interval=st.integers(1, 300),
)
def test_slots_are_spread_evenly(heights, interval):
  spec = optim.MatrixAxes((-2,), (-1,))
  leaves = [
    refreshes.Leaf((), (h, 2, 2), spec, layers=h, stacked=True) for h in heights
  ]
  slots = np.concatenate(refreshes.init(refreshes.staggered, interval, leaves))
  assert slots.min() >= 0 and slots.max() < interval
  assert np.bincount(slots).max() <= math.ceil(len(slots) / interval)


@pytest.mark.parametrize('moments', ['keep', 'rotate', 'zero'])
def test_a_staggered_layer_is_trained_like_one_with_that_phase(moments):
  """The basis is that of its last step; the moments turn at that step only."""
  tx = low_rank(6, refresh='staggered', moments=moments)
  state, update = tx.init(tree(0)), jax.jit(tx.update)
  alone = optim.low_rank(
    optim.scale_by_adam_hf(), 2, update_interval=1, moments=moments
  )
  kept = optim.low_rank(
    optim.scale_by_adam_hf(), 2, update_interval=1000, moments=moments
  )
  twins = {i: alone.init(tree(0)['stack'][i]) for i in range(3)}
  for step in range(14):
    grads = tree(step)
    updates, state = update(grads, state)
    for i in twins:
      # Six matrices in order of their names: experts 0 and 1, then the stack.
      due = step == 0 or step % 6 == 2 + i
      # A count of 1 is due nowhere but in an interval of 1.
      twin = twins[i]._replace(count=jnp.int32(step if due else max(step, 1)))
      want, twins[i] = (alone if due else kept).update(grads['stack'][i], twin)
      np.testing.assert_allclose(updates['stack'][i], want, atol=2e-6)


def q_galore_gaps(similarities, interval, threshold=0.4, window=5):
  """The steps at which a layer is refreshed, in plain Python."""
  queue, steps, gap = [], [], interval
  for step in range(len(similarities)):
    if step % gap == 0:
      if steps:
        queue = [*queue, similarities[step]][-window:]
      if len(queue) == window and sum(queue) / window >= threshold:
        gap *= 2
      steps.append(step)
  return steps


@pytest.mark.parametrize('slow', [True, False])
def test_lazy_doubles_the_interval_where_the_subspace_stays(slow):
  """Layers 0 and 2 of the stack keep their subspace, layer 1 does not."""

  def grads(step):
    new, old = tree(step + 1), tree(1)
    stays = np.array([1, 0, 1])[:, None, None] if slow else 0
    # The same subspace, every time scaled and mixed anew.
    mixed = (1 + step) * old['stack'] + 1e-3 * new['stack']
    return new | {'stack': jnp.where(stays, mixed, new['stack'])}

  lazy = refreshes.lazy(threshold=0.9)
  steps = refreshed(low_rank(2, refresh=lazy), 60, grads)
  for layer in range(3):
    got = [i for i, found in enumerate(steps) if ('stack', layer) in found]
    stays = slow and layer != 1
    assert got == q_galore_gaps([1.0 if stays else 0.0] * 60, 2, 0.9)


def test_lazy_state_follows_the_rule_on_measured_similarities():
  """With the cosine of the first vectors, against plain Python."""
  lazy = refreshes.lazy(threshold=0.8, similarity='vector', window=3)
  tx = optim.low_rank(optax.identity(), 2, 1, refresh=lazy)
  g = tree(0)['tall']
  state, old, gap, queue, gaps = tx.init(g), None, 1, [], []
  for step in range(40):
    g = 0.9 * g + 0.4 * tree(step)['tall']
    due = step % gap == 0
    if due:
      new = np.linalg.svd(np.float64(g))[2][0]
      if old is not None:
        queue = [*queue, abs(new @ old)][-3:]
      if len(queue) == 3 and np.mean(queue) >= 0.8:
        gap *= 2
      old = new
    before = int(state.refreshes.refreshes[0])
    _, state = tx.update(g, state)
    assert int(state.refreshes.refreshes[0]) - before == due
    assert int(state.refreshes.interval[0]) == gap
    gaps.append(gap)
  assert 1 < gap < 40  # Neither never nor always.


def flipping_svd(shape, rank, side, dtype):
  """The svd, all vectors negated at every other refresh."""
  svd = projectors.svd(shape, rank, side, dtype)

  def refresh(g, state, context):
    sign = 1 - 2 * (context.count % 2)
    return svd.refresh(g, state, context) * sign

  return svd._replace(refresh=refresh)


@pytest.mark.parametrize(
  ('similarity', 'same'),
  [('subspace', True), ('vector', True), ('signed', False)],
)
def test_only_the_signed_cosine_depends_on_signs(similarity, same):
  """The released Q-GaLore's flaw, reproduced when it is asked for."""
  lazy = refreshes.lazy(similarity=similarity)
  runs = []
  for projector in ('svd', flipping_svd):
    tx = optim.low_rank(
      optax.identity(), 2, 1, refresh=lazy, projector=projector
    )
    state = tx.init(tree(0)['tall'])
    for step in range(12):
      g = tree(0)['tall'] * (1 + step)
      _, state = tx.update(g, state)
    runs.append(int(state.refreshes.interval[0]))
  assert runs[0] > 1
  assert (runs[0] == runs[1]) == same
  assert same or runs[1] == 1


def test_intervals_do_not_overflow():
  memory = refreshes.lazy().init([0], 2**30)
  memory = memory._replace(refreshes=jnp.array([9]))
  memory = memory._replace(similarities=jnp.ones((1, 5)))
  turn = refreshes.moments_lib.Turn(jnp.eye(3), jnp.eye(3), jnp.int32(1))
  one = jax.tree.map(lambda x: x[0], memory)
  assert refreshes.lazy().after(one, (turn,)).interval == 2**30


def test_bad_arguments():
  with pytest.raises(ValueError, match="unknown similarity 'subspce'"):
    refreshes.lazy(similarity='subspce')
  with pytest.raises(ValueError, match='window=0'):
    refreshes.lazy(window=0)

  def no_basis(*args):
    return projectors.svd(*args)._replace(basis=None)

  tx = optim.low_rank(optax.identity(), 2, refresh='lazy', projector=no_basis)
  with pytest.raises(
    ValueError, match=r"moments='keep' with refresh='lazy' needs"
  ):
    tx.init(tree(0)['tall'])


@pytest.mark.parametrize('shape', [(4, 6), (6, 4), (5, 5), (2, 4, 6), (1, 3)])
def test_both_sides_against_float64(shape):
  """GaLore with two factors: R = U^T G V, Adam, U N V^T."""
  # At a refresh R is diagonal but for rounding, of which Adam would make ones.
  eps = 1e-3
  tx = optim.galore(
    0.1, rank=2, update_interval=3, side='both', eps=eps, axes=last_two
  )
  draw = np.random.default_rng(0)
  params = {'w': jnp.zeros(shape)}
  state, update = tx.init(params), jax.jit(tx.update)
  layers = shape[0] if len(shape) > 2 else 1
  rank = min(2, *shape[-2:])
  m, v = np.zeros((2, layers, rank, rank))
  for t in range(1, 8):
    g = draw.normal(size=shape)
    updates, state = update({'w': jnp.asarray(g, jnp.float32)}, state)
    g = g.reshape(layers, *shape[-2:])
    if t % 3 == 1:
      u, _, vh = np.linalg.svd(g, full_matrices=False)
      u, w = u[:, :, :rank], vh[:, :rank]
      u = u * signs(u, -2)
      w = w * signs(w, -1)
    r = u.mT @ g @ w.mT
    m = 0.9 * m + 0.1 * r
    v = 0.999 * v + 0.001 * r * r
    rate = 0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    want = -rate * 0.25 * u @ (m / (np.sqrt(v) + eps)) @ w
    np.testing.assert_allclose(updates['w'], want.reshape(shape), atol=2e-5)
  assert state[0].inner.mu['w'].shape == (*shape[:-2], rank, rank)


def signs(basis, axis):
  at = np.expand_dims(np.abs(basis).argmax(axis), axis)
  return np.sign(np.take_along_axis(basis, at, axis))


@pytest.mark.parametrize('moments', ['rotate', 'ldadam'])
def test_both_sides_turned_do_not_depend_on_signs(moments):
  runs = []
  for projector in ('svd', flipping_svd):
    tx = optim.low_rank(
      optim.scale_by_adam_hf(),
      2,
      2,
      side='both',
      projector=projector,
      moments=moments,
    )
    state = tx.init(tree(0)['tall'])
    for step in range(8):
      updates, state = tx.update(tree(step)['tall'], state)
    runs.append(updates)
  np.testing.assert_allclose(*runs, atol=1e-6)


@pytest.mark.parametrize(
  'residual', ['fira', 'channel', 'tensor', 'sign', 'sgd']
)
@pytest.mark.parametrize('projector', ['svd', 'random', 'coordinates'])
def test_both_sides_with_every_part(residual, projector):
  """A factor a matrix where each channel has one otherwise."""
  tx = optim.low_rank(
    optim.scale_by_adam_hf(),
    2,
    side='both',
    residual=residual,
    projector=projector,
    axes=last_two,
    refresh='staggered',
  )
  updates, _ = tx.update(tree(0), tx.init(tree(0)))
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
  assert jax.tree.map(jnp.shape, updates) == SHAPES
  if residual in ('channel', 'tensor'):
    g, u = tree(0)['stack'], updates['stack']
    factor = (u / g)[:, :1, :1]
    np.testing.assert_allclose(u, g * factor, rtol=1e-5)
