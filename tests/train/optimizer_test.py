"""Names to transformations: where they are found and what they are given."""

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


def _one_update(model, tx):
  params = model.init(jax.random.PRNGKey(0))
  grads = jax.tree.map(
    lambda p: jax.random.normal(jax.random.PRNGKey(p.size), p.shape), params
  )
  updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
  return params, grads, updates


@pytest.mark.parametrize(
  'name',
  ['galore', 'adamw', 'lion', 'adafactor', 'lamb', 'rmsprop', 'sgd', 'muon']
  + ['dadapt_adamw', 'prodigy'],
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
