"""LISA: what rests does not move and has no state; what trains is Adam."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.models import llama

L, ACTIVE, EVERY = 6, 2, 3


def tree(seed, layers=L):
  rng = np.random.default_rng(seed)
  return {
    'layers': {
      'w': jnp.asarray(rng.normal(size=(layers, 3, 5)), jnp.float32),
      'norm': jnp.asarray(rng.normal(size=(layers, 3)), jnp.float32),
    },
    'head': jnp.asarray(rng.normal(size=(3, 7)), jnp.float32),
  }


def make(**arguments):
  return optim.lisa(1e-2, ACTIVE, EVERY, **arguments)


def steps(tx, n, state=None, params=None, start=0):
  """Parameters, state and active layers after each step."""
  params = tree(0) if params is None else params
  state = tx.init(params) if state is None else state
  update = jax.jit(tx.update)
  for i in range(start, start + n):
    updates, state = update(tree(i + 1), state, params)
    params = optax.apply_updates(params, updates)
    yield params, state, state[0].layers.tolist()


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_layers_that_rest_do_not_move_and_all_else_does(weight_decay):
  before = tree(0)
  for params, _, active in steps(make(weight_decay=weight_decay), 7):
    for name in ('w', 'norm'):
      new, old = params['layers'][name], before['layers'][name]
      moved = np.asarray((new != old).any(tuple(range(1, new.ndim))))
      assert np.flatnonzero(moved).tolist() == active
    assert (params['head'] != before['head']).all()
    before = params


def test_draws_last_an_interval_and_are_of_different_layers():
  drawn = [active for *_, active in steps(make(), 5 * EVERY)]
  intervals = [drawn[i : i + EVERY] for i in range(0, len(drawn), EVERY)]
  assert all(len({tuple(a) for a in i}) == 1 for i in intervals)
  assert all(len(set(a)) == ACTIVE for a in drawn)
  assert len({tuple(i[0]) for i in intervals}) > 1
  other = [active for *_, active in steps(make(key=1), 5 * EVERY)]
  assert other != drawn


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_what_trains_is_adam_from_the_draw_on(weight_decay):
  """Adam on the drawn layers, from 0 at each draw; on the rest, going on."""
  adam = optax.adamw(1e-2, weight_decay=weight_decay)
  want, rest = tree(0), adam.init(tree(0)['head'])
  for i, (params, _, active) in enumerate(
    steps(make(weight_decay=weight_decay), 7)
  ):
    index = jnp.array(active)
    g = tree(i + 1)
    layers = jax.tree.map(lambda x: x[index], want['layers'])  # noqa: B023
    if i % EVERY == 0:
      state = adam.init(layers)
    updates, state = adam.update(
      jax.tree.map(lambda x: x[index], g['layers']),  # noqa: B023
      state,
      layers,
    )
    want['layers'] = jax.tree.map(
      lambda x, u: x.at[index].add(u),  # noqa: B023
      want['layers'],
      updates,
    )
    updates, rest = adam.update(g['head'], rest, want['head'])
    want['head'] += updates
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      params,
      want,
    )


def test_state_is_the_active_share_of_adams_to_the_byte():
  """On LLaMA-1b: 2 of 24 layers, and all of embedding, head and norm."""
  model = llama.Llama(llama.config('1b'))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  tx = optim.lisa(1e-3, active=2, stacked=model.axes())
  got = optim.state_bytes(tx, shapes)['moments']
  layers = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes['layers']))
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert got == 8 * (layers * 2 // 24 + total - layers)
  by_path = optim.state_bytes(optim.lisa(1e-3, active=2), shapes)
  assert by_path['moments'] == got


def test_resumed_between_two_draws_it_goes_on_identically():
  tx = make(weight_decay=0.1)
  *_, (want, want_state, _) = steps(tx, 10)
  for stop in (EVERY - 1, EVERY, EVERY + 1):
    *_, (params, state, _) = steps(tx, stop)
    saved = [np.array(x) for x in jax.tree.leaves((params, state))]
    params, state = jax.tree.unflatten(
      jax.tree.structure((params, state)), [jnp.asarray(x) for x in saved]
    )
    *_, (params, state, _) = steps(tx, 10 - stop, state, params, stop)
    jax.tree.map(
      np.testing.assert_array_equal, (params, state), (want, want_state)
    )


def test_all_pairs_of_layers_are_drawn_equally_often():
  """Chi-square of the 15 pairs of 6 layers, in 3000 draws."""
  tx = optim.sample_layers(optax.sgd(1.0), ACTIVE, every=1)
  params = {'layers': jnp.zeros((L, 1))}

  def step(state, _):
    _, state = tx.update(params, state)
    return state, state.layers

  _, drawn = jax.jit(lambda state: jax.lax.scan(step, state, length=3000))(
    tx.init(params)
  )
  counts = collections.Counter(map(tuple, np.asarray(drawn).tolist()))
  assert len(counts) == 15
  expected = 3000 / 15
  chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
  # Of 14 degrees of freedom: more than 42.6 has a probability of 1e-4.
  assert chi_square < 42.6


def test_the_draw_is_the_same_on_any_mesh():
  mesh = jax.make_mesh(
    (8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec
  params = {'layers': jnp.ones((L, 16))}
  sharding = jax.sharding.NamedSharding(mesh, spec(None, 'fsdp'))
  tx = make()
  put = jax.device_put(params, sharding)
  updates, state = jax.jit(tx.update)(put, jax.jit(tx.init)(put), put)
  want, want_state = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(state[0].layers, want_state[0].layers)
  np.testing.assert_allclose(updates['layers'], want['layers'], rtol=1e-6)
  shardings = optim.state_shardings(tx, params, {'layers': sharding})
  assert shardings[0].inner.mu['layers'].spec == sharding.spec


def test_logical_names_say_what_is_stacked():
  names = {
    'layers': {'w': ('layers', 'embed', 'mlp'), 'norm': ('layers', 'norm')},
    'head': ('embed', 'vocab'),
  }
  flags = {'layers': {'w': True, 'norm': True}, 'head': False}
  runs = [
    [params for params, *_ in steps(make(stacked=stacked), 2)][-1]
    for stacked in (None, names, flags, lambda tree: flags)
  ]
  for other in runs[1:]:
    jax.tree.map(np.testing.assert_array_equal, runs[0], other)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'active': 0}, 'active=0'),
    ({'active': 7}, 'active=7 of 6 layers'),
    ({'update_interval': 0}, 'every=0'),
    ({'stacked': {'layers': True}}, 'same structure'),
    ({'stacked': lambda p: jax.tree.map(lambda _: True, p)}, 'head'),
    ({'stacked': lambda p: jax.tree.map(lambda _: False, p)}, 'found {}'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    optim.lisa(1e-2, **{'active': 2} | arguments).init(tree(0))
