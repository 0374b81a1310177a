"""Names to transformations: where they are found and what they are given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.models import llama
from frugax.train import optimizer


@pytest.fixture(scope='module')
def model():
  return llama.Llama(llama.config('tiny', n_layers=2, dim=32, ffn=44))


def _build(model, config):
  shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  return optimizer.make_optimizer(config, shapes, model.axes())


@functools.cache
def _params_and_grads(model):
  params = model.init(jax.random.PRNGKey(0))
  grads = jax.tree.map(
    lambda p: jax.random.normal(jax.random.PRNGKey(p.size), p.shape), params
  )
  return params, grads


def _one_update(model, tx):
  params, grads = _params_and_grads(model)
  updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
  return params, grads, updates


@pytest.mark.parametrize(
  'name',
  ['galore', 'adamw', 'lion', 'adafactor', 'lamb', 'rmsprop', 'sgd', 'muon']
  + ['dadapt_adamw', 'prodigy', 'adam_sn', 'snsm', 'sgd_sai', 'grad_norm_lorp'],
)
def test_any_optimizer_by_name(name, model, make_config):
  config = make_config(f'size=tiny,opt={name}', schedule__warmup_steps=0)
  tx, _ = _build(model, config)
  params, _, updates = _one_update(model, tx)
  assert jax.tree.structure(params) == jax.tree.structure(updates)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_only_the_projected_leaves_are_small(model, make_config):
  config = make_config(optimizer__rank=4)
  tx, _ = _build(model, config)
  params = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  inner = jax.eval_shape(tx.init, params)[0].inner
  assert inner.mu['layers']['attn']['q']['kernel'].shape == (2, 4, 32)
  assert inner.mu['layers']['mlp']['down']['kernel'].shape == (2, 44, 4)
  for name in ('embed', 'lm_head', 'final_norm'):
    shapes = jax.tree.map(jnp.shape, (inner.mu[name], params[name]))
    assert shapes[0] == shapes[1]
  # The same as by hand.
  whole = optim.matrix_axes(model.axes(), whole=('vocab',))
  hand = optim.galore(1e-2, rank=4, update_interval=3, axes=whole)
  assert (
    optim.state_bytes(hand, params)['moments']
    == (optim.state_bytes(tx, params)['moments'])
  )


@pytest.mark.parametrize('name', ['adam_sn', 'adagrad_sn', 'snsm'])
def test_subset_norm_is_for_all_linear_layers_and_the_head(
  name, model, make_config
):
  tx, _ = _build(model, make_config(f'size=tiny,opt={name}'))
  params = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  nu = optax.tree.get(jax.eval_shape(tx.init, params), 'nu')
  assert nu['lm_head']['kernel'].shape == (320,)
  assert nu['layers']['mlp']['down']['kernel'].shape == (2, 44)
  assert nu['embed']['embedding'].shape == (320, 32)


def test_weight_decay_leaves_the_norms_alone(model, make_config):
  config = make_config(
    'size=tiny,opt=adamw', optimizer__weight_decay=0.5, schedule__warmup_steps=0
  )
  _, _, decayed = _one_update(model, _build(model, config)[0])
  config.optimizer.weight_decay = 0.0
  _, _, plain = _one_update(model, _build(model, config)[0])
  changed = jax.tree.map(
    lambda a, b: bool(jnp.any(jnp.abs(a - b) > 1e-9)), decayed, plain
  )
  norms = (changed['layers']['attn_norm'], changed['final_norm'])
  assert not any(jax.tree.leaves(norms))
  assert changed['lm_head']['kernel'] and changed['embed']['embedding']


def test_groups_have_their_own_optimizer_and_rate(model, make_config):
  config = make_config(
    'size=tiny,opt=sgd',
    optimizer__learning_rate=1.0,
    schedule__name='constant',
    schedule__warmup_steps=0,
    groups__head__match='lm_head',
    groups__head__learning_rate=0.25,
    groups__norms__match='norm',
    groups__norms__name='lion',
    groups__norms__learning_rate=0.5,
  )
  _, grads, updates = _one_update(model, _build(model, config)[0])
  want = jax.tree.map(lambda g: -g, grads)
  want['lm_head'] = jax.tree.map(lambda g: -0.25 * g, grads['lm_head'])
  norms = [('final_norm',), ('layers', 'attn_norm'), ('layers', 'mlp_norm')]
  for path in norms:
    target, source = want, grads
    for name in path[:-1]:
      target, source = target[name], source[name]
    target[path[-1]] = jax.tree.map(
      lambda g: -0.5 * jnp.sign(g), source[path[-1]]
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-2),
    updates,
    want,
  )


def test_a_group_of_the_main_optimizer_inherits_its_arguments(
  model, make_config
):
  config = make_config(
    optimizer__rank=4, groups__mlp__match='mlp/', groups__mlp__rank=2
  )
  tx, _ = _build(model, config)
  params = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  state = jax.eval_shape(tx.init, params).inner_states
  mu = state['mlp'].inner_state[0].inner.mu
  assert mu['layers']['mlp']['down']['kernel'].shape == (2, 44, 2)
  mu = state[''].inner_state[0].inner.mu
  assert mu['layers']['attn']['q']['kernel'].shape == (2, 4, 32)
  assert isinstance(mu['layers']['mlp'], dict)
  kernel = mu['layers']['mlp']['down']['kernel']
  assert isinstance(kernel, optax.MaskedNode)


@pytest.mark.parametrize(
  ('name', 'want'),
  [
    ('constant', [0.0, 1.0, 2.0, 2.0, 2.0]),
    ('linear', [0.0, 1.0, 2.0, 1.1, 0.2]),
    ('cosine', [0.0, 1.0, 2.0, 1.1, 0.2]),
  ],
)
def test_schedules(name, want):
  config = {'name': name, 'warmup_steps': 10, 'final_fraction': 0.1}
  schedule = optimizer.make_schedule(config, 2.0, 110)
  got = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
  ('config', 'want'),
  [
    (
      {'name': 'wsd', 'warmup_steps': 10, 'decay_steps': 20},
      {0: 0, 5: 1, 10: 2, 80: 2, 90: 1.1, 100: 0.2},
    ),
    ({'name': 'wsd', 'decay': 'sqrt'}, {90: 2, 92.5: 1.1, 100: 0.2}),
    (
      {'name': 'infinite', 'warmup_steps': 10},
      {5: 1, 10: 2, 25: 1.25, 40: 0.5, 100: 0.5, 10**6: 0.5},
    ),
    (
      {
        'name': 'infinite',
        'warmup_steps': 10,
        'cooldown_steps': 20,
        'constant_fraction': 0.5,
        'anneal_steps': 30,
        'cooldown': 'inverse_sqrt',
      },
      {10: 2, 30: 1, 70: 1, 85: 0.1**0.5 * 1.0 * 0.2**0.5, 100: 0.02},
    ),
    (
      {'name': 'rewarm', 'begin': 40, 'warmup_steps': 20},
      {39: 0.2, 50: 1.1, 60: 2, 80: 1.1, 100: 0.2},
    ),
  ],
)
def test_schedules_of_open_runs(config, want):
  schedule = optimizer.make_schedule(config, 2.0, 100)
  got = {step: float(schedule(step)) for step in want}
  np.testing.assert_allclose([*got.values()], [*want.values()], rtol=1e-5)


@pytest.mark.parametrize('name', optimizer.SCHEDULES)
def test_schedules_of_runs_that_are_all_warm_up(name):
  schedule = optimizer.make_schedule({'name': name, 'warmup_steps': 8}, 2.0, 4)
  start = 0.2 if name == 'rewarm' else 0.0
  np.testing.assert_allclose(float(schedule(4)), start + (2 - start) / 2)


def test_more_steps_change_the_last_phase_only():
  short, long = (
    optimizer.make_schedule({'name': 'wsd', 'decay_steps': 20}, 1.0, steps)
    for steps in (100, 200)
  )
  assert all(float(short(step)) == float(long(step)) for step in range(81))
  assert float(short(90)) < float(long(90))


def test_layers_of_stacked_vectors_are_told_apart(model, make_config):
  """What measures whole arrays measures each layer's norm scale by itself."""
  tx, _ = _build(model, make_config('size=tiny,opt=sgd_sai'))
  params = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  ratios = jax.eval_shape(tx.init, params)[0].gsnr
  shapes = jax.tree.map(jnp.shape, ratios)
  layers = jax.tree.leaves(shapes['layers'], is_leaf=lambda x: x == (2,))
  assert set(layers) == {(2,)}
  assert all(x == () for x in jax.tree.leaves(shapes['embed']))


@pytest.mark.parametrize('name', ['adamw', 'lion', 'galore'])
def test_any_state_is_kept_in_the_codec_that_is_named(name, model, make_config):
  def sizes(**codec):
    config = make_config(f'size=tiny,opt={name}', **codec)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    return optim.state_bytes(_build(model, config)[0], shapes)['total']

  codec = {'optimizer__state_codec': 'dynamic8'}
  assert sizes(**codec) < 0.7 * sizes()
  assert sizes(**codec, optimizer__state_min_size=1) < sizes(**codec)
  none = sizes(**codec, optimizer__state_min_size=2**20)
  assert none == pytest.approx(sizes(), rel=1e-3)


def test_an_unknown_codec_is_refused(model, make_config):
  config = make_config('size=tiny,opt=adamw', optimizer__state_codec='dynamic9')
  with pytest.raises(ValueError, match="'dynamic9': did you mean 'dynamic8'"):
    _build(model, config)
