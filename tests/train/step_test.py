"""The step against hand-made gradients, in float64 where it counts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax.models import losses
from frugax.train import loop, step


class Bigram:
  """logits[t] = w[token[t]]; token 7 makes them not a number."""

  def init(self, key):
    return {'w': jax.random.normal(key, (8, 8))}

  def apply(self, params, tokens, *, segment_ids, positions, key):
    del segment_ids, positions
    logits = params['w'][tokens]
    return logits * jnp.where(tokens == 7, jnp.nan, 1)[..., None]


def _batch(rows=8, length=6, seed=0, pad=0.4):
  draw = np.random.default_rng(seed)
  tokens = draw.integers(0, 7, (rows, length)).astype(np.int32)
  labels = draw.integers(0, 8, (rows, length)).astype(np.int32)
  # Rows with very different numbers of tokens that count.
  labels[draw.random((rows, length)) < pad * 2 * draw.random((rows, 1))] = -1
  ones = np.ones_like(tokens)
  return dict(tokens=tokens, labels=labels, segment_ids=ones, positions=ones)


def _truth(w, batch, z_loss=0.0):
  """Loss and gradient in float64 numpy."""
  w = np.asarray(w, np.float64)
  total, grad, n = 0.0, np.zeros_like(w), (batch['labels'] >= 0).sum()
  for t, y in zip(batch['tokens'].flat, batch['labels'].flat, strict=True):
    if y < 0:
      continue
    lse = np.log(np.exp(w[t]).sum())
    p = np.exp(w[t] - lse)
    total += lse - w[t, y]
    grad[t] += p * (1 + 2 * z_loss * lse)
    grad[t, y] -= 1
  return total / n, grad / n


def _run(batch, lr=1.0, steps=1, tx=None, model=None, **kw):
  model = model or Bigram()
  tx = tx or optax.sgd(lr)
  state = step.init_state(model, tx, jax.random.PRNGKey(1))
  w = np.asarray(state.params['w'])
  run = jax.jit(step.make_train_step(model, tx, **kw))
  for _ in range(steps):
    state, metrics = run(state, batch)
  return w, state, metrics


@pytest.mark.parametrize('accumulation', [1, 2, 4, 8])
def test_gradient_is_token_weighted_and_exact(accumulation):
  batch = _batch()
  w, state, metrics = _run(batch, accumulation=accumulation)
  loss, grad = _truth(w, batch)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(w - state.params['w'], grad, atol=3e-7)
  assert int(metrics['tokens']) == (batch['labels'] >= 0).sum()
  np.testing.assert_allclose(
    metrics['grad_norm'], np.linalg.norm(grad), rtol=1e-5
  )


def test_z_loss_adds_its_gradient_but_not_to_the_logged_loss():
  batch = _batch()
  w, state, metrics = _run(batch, z_loss=0.1)
  loss, grad = _truth(w, batch, z_loss=0.1)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(w - state.params['w'], grad, atol=5e-7)


def test_clipping_bounds_the_global_norm():
  batch = _batch()
  w, state, metrics = _run(batch, clip_norm=0.01)
  _, grad = _truth(w, batch)
  want = grad * 0.01 / np.linalg.norm(grad)
  np.testing.assert_allclose(w - state.params['w'], want, atol=2e-7)
  np.testing.assert_allclose(metrics['update_norm'], 0.01, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['grad_norm'], np.linalg.norm(grad), rtol=1e-5
  )
  w, state, _ = _run(batch, clip_norm=1e6)
  np.testing.assert_allclose(w - state.params['w'], grad, atol=3e-7)


def test_batch_without_tokens_changes_nothing():
  batch = _batch()
  batch['labels'][:] = -1
  w, state, metrics = _run(batch)
  assert float(metrics['loss']) == 0 and int(metrics['tokens']) == 0
  np.testing.assert_array_equal(w, state.params['w'])


def test_nonfinite_step_is_skipped_and_counted():
  bad = _batch()
  bad['tokens'][0, 0], bad['labels'][0, 0] = 7, 3
  tx = optax.adam(0.1)
  w, state, metrics = _run(bad, tx=tx, steps=3, skip_nonfinite=True)
  assert int(state.skipped) == 3 and int(state.step) == 3
  assert not np.isfinite(metrics['loss'])
  np.testing.assert_array_equal(w, state.params['w'])
  np.testing.assert_array_equal(state.opt_state[0].mu['w'], 0)
  assert int(state.opt_state[0].count) == 0
  # Without the option the parameters are lost.
  _, state, _ = _run(bad, tx=tx)
  assert not np.isfinite(state.params['w']).all()


def test_bfloat16_parameters_can_be_rounded_stochastically():
  """Steps far below the spacing: to nearest, no weight ever moves."""

  class Half(Bigram):
    def init(self, key):
      return {'w': jnp.ones((8, 8), jnp.bfloat16)}

  def moved(**kw):
    w, state, _ = _run(_batch(), lr=0.02, steps=200, model=Half(), **kw)
    return np.asarray(state.params['w'], np.float32) - np.float32(w)

  assert (moved() == 0).all()
  _, grad = _truth(np.ones((8, 8)), _batch())
  assert np.abs(0.02 * grad).max() < 2**-9
  drift = moved(rounding='stochastic')
  # The losses are nearly those at the start all along.
  assert np.corrcoef(drift.ravel(), -grad.ravel())[0, 1] > 0.8
  np.testing.assert_array_equal(drift, moved(rounding='stochastic'))
  with pytest.raises(ValueError, match="unknown rounding 'up'"):
    moved(rounding='up')


def test_bfloat16_parameters_accumulate_in_float32():
  class HalfBigram(Bigram):
    def init(self, key):
      return {'w': super().init(key)['w'].astype(jnp.bfloat16)}

    def apply(self, params, tokens, **kw):
      return super().apply({'w': params['w'].astype(jnp.float32)}, tokens, **kw)

  seen = {}

  def update(updates, state, params=None):
    del params
    seen['gradient'] = np.asarray(updates['w'], np.float32)
    return updates, state

  model, batch = HalfBigram(), _batch(rows=256)
  tx = optax.GradientTransformation(lambda params: (), update)
  state = step.init_state(model, tx, jax.random.PRNGKey(1))
  _, truth = _truth(state.params['w'].astype(jnp.float32), batch)
  step.make_train_step(model, tx, accumulation=256)(state, batch)
  # Each micro-batch's gradient is rounded, which averages out, and the sum
  # once: half an ulp. Sums in bfloat16 would stall ten times further off.
  assert seen['gradient'].dtype == np.float32
  np.testing.assert_allclose(seen['gradient'], truth, rtol=2**-7, atol=2e-4)


def test_norms_of_bfloat16_trees_are_float32():
  tree = {f'{i}': jnp.full(1000, 1.0, jnp.bfloat16) for i in range(100)}
  norm = step._norm(tree)
  assert norm.dtype == jnp.float32
  np.testing.assert_allclose(norm, 1e5**0.5, rtol=1e-6)


def test_losses_against_float64():
  draw = np.random.default_rng(0)
  logits = draw.normal(size=(3, 5, 11)) * 5
  labels = draw.integers(-1, 11, (3, 5))
  nll, lse, counts = losses.token_losses(
    jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
  )
  want = np.log(np.exp(logits).sum(-1))
  at = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
  mask = labels >= 0
  np.testing.assert_array_equal(counts, mask)
  np.testing.assert_allclose(nll, np.where(mask, want - at, 0), atol=2e-6)
  np.testing.assert_allclose(lse, np.where(mask, want, 0), rtol=1e-6)


def test_eval_step_sums(make_config):
  batch = _batch()
  params = Bigram().init(jax.random.PRNGKey(0))
  size = jnp.array([0, 1, 1, 1, 2, 1, 1, 1])
  sums = jax.jit(step.make_eval_step(Bigram(), size))(params, batch)
  counted = batch['labels'][batch['labels'] >= 0]
  loss, _ = _truth(params['w'], batch)
  np.testing.assert_allclose(sums['loss'], loss * len(counted), rtol=1e-6)
  assert int(sums['tokens']) == len(counted)
  assert int(sums['bytes']) == np.asarray(size)[counted].sum()


def test_counts_of_the_optimizer_reach_the_metric_file(make_config, tmp_path):
  config = make_config(
    'size=tiny,opt=stable_spam',
    mesh='data=1',
    optimizer__reset_interval=2,
    optimizer__algorithm='paper',
  )
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  text = (tmp_path / 'metrics.jsonl').read_text()
  rows = [row for row in map(json.loads, text.splitlines()) if 'loss' in row]
  assert [row['reset_count'] for row in rows] == [0, 1, 1, 2, 2, 3]
  for name in ('clip_count', 'damp_count'):
    counts = [row[name] for row in rows]
    assert counts == sorted(counts)
    assert counts[-1] > 0


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'steps': 0}, 'steps must be 1 or more, got 0'),
    ({'accumulation': 3}, 'accumulation 3 does not divide batch_size 8'),
    ({'clip_norm': -1}, 'clip_norm must be 0 (off) or more'),
    ({'filter_eps': -1e-4}, 'filter_eps must be 0 (off) or more'),
    (
      {'filter_eps': 1e-4, 'model__matmul_head': 'int8'},
      "filter_eps with model.matmul_head='int8'",
    ),
    ({'model__size': 'tinny'}, "did you mean 'tiny'?"),
    ({'model__n_layer': 3}, "did you mean 'n_layers'?"),
    ({'model__remat': 'all'}, "'all'"),
    ({'optimizer__name': 'galor'}, "did you mean 'galore'?"),
    ({'optimizer__rnk': 3}, "did you mean 'rank'?"),
    ({'schedule__name': 'cosin'}, "did you mean 'cosine'?"),
    ({'schedule__warmup': 3}, "did you mean 'warmup_steps'?"),
    ({'projected': 'attention/'}, 'matches no parameter; there are: embed/'),
    ({'decayed': '('}, 'is no regular expression'),
    ({'groups__head__name': 'adamw'}, 'groups.head has no `match`'),
    ({'optimizer__eps': 'small'}, 'optimizer galore cannot run with'),
    ({'optimizer__state_dtype': 'bf17'}, 'optimizer galore cannot run with'),
    (
      {'schedule__warmup_steps': -5},
      'warmup_steps must be an int of 0 or more',
    ),
  ],
)
def test_bad_configs_fail_before_compilation(overrides, message, make_config):
  with pytest.raises(ValueError) as e:
    step.build(make_config(mesh='data=-1', **overrides))
  assert message in str(e.value)


def test_the_loss_has_the_filter_of_the_config(make_config):
  def branches(**options):
    config = make_config(mesh='data=1', **options)
    program = step.build(config, jax.devices()[:1])
    state = jax.eval_shape(program.init, jax.random.PRNGKey(0))
    batch = {k: jnp.ones((8, 16), jnp.int32) for k in _batch()}
    with jax.set_mesh(program.layout.mesh):
      traced = program.train_step.trace(state, batch)
    return str(traced.jaxpr).count('cond[')

  # That of the activations before the head, and none of the head's own.
  assert branches(filter_eps=1e-4) == branches() + 1


def test_state_is_donated(make_config):
  config = make_config(mesh='data=1')
  program = step.build(config, jax.devices()[:1])
  state = program.init(jax.random.PRNGKey(0))
  shape = (config.batch_size, config.data.sequence_length)
  batch = {k: np.ones(shape, np.int32) for k in _batch()}
  old = jax.tree.leaves((state.params, state.opt_state))
  with jax.set_mesh(program.layout.mesh):
    program.train_step(state, program.put(batch))
  assert all(x.is_deleted() for x in old)
