"""The layer-wise step against the ordinary one, in all that runs ask of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import lowbit
from frugax.train import step


def _batch(config, seed):
  shape = (config.batch_size, config.data.sequence_length)
  draw = np.random.default_rng(seed)
  tokens = draw.integers(0, 264, shape, np.int32)
  labels = np.roll(tokens, -1, 1)
  labels[draw.random(shape) < 0.2] = -1
  return {
    'tokens': tokens,
    'labels': labels,
    'segment_ids': np.ones_like(tokens),
    'positions': np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
  }


@pytest.fixture(name='config')
def _config(make_config):
  """A run on one device of three layers; what it does is felt: clip, decay."""

  def make(name='adamw', matmul='f32', **overrides):
    values = {
      'mesh': 'data=1',
      'model__n_layers': 3,
      'data__sequence_length': 16,
      'clip_norm': 0.05,
      'steps': 50,
      # At their own rates of up to 0.05 some tell a last bit after 50 steps.
      'optimizer__learning_rate': 1e-3,
    }
    if name in _RANKS:
      values |= {'optimizer__rank': _RANKS[name]}
      values |= {'optimizer__update_interval': 1 if name == 'ldadam' else 7}
    arguments = f'size=tiny,opt={name},matmul={matmul}'
    return make_config(arguments, **values | overrides)

  return make


_RANKS = dict.fromkeys(
  ('galore', 'q_galore', 'coap', 'fira', 'apollo', 'flora', 'ldadam', 'snsm'), 8
)


def _train(config, steps, state=None, devices=1):
  program = step.build(config, jax.devices()[:devices])
  rows = []
  with jax.set_mesh(program.layout.mesh):
    if state is None:
      state = program.init(jax.random.PRNGKey(0))
    else:
      state = jax.device_put(state, program.shardings)
    for _ in range(steps):
      batch = _batch(config, int(state.step))
      state, metrics = program.train_step(state, program.put(batch))
      rows.append(metrics)
  return jax.device_get(state), jax.device_get(rows)


def _assert_equal(got, want, atol=1e-6, state_rtol=1e-4):
  """States of the same structure, and metrics by step.

  Sums in another order change a gradient by some 2^-24 of the largest number
  of its array, and a basis that is found from it by that over the gap between
  singular values: 2e-5 at most was seen. A wrong update is off by far more.
  """
  (state, rows), (want_state, want_rows) = got, want
  assert jax.tree.structure(state) == jax.tree.structure(want_state)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=atol),
    lowbit.load_weights(state.params),
    lowbit.load_weights(want_state.params),
  )
  for row, want_row in zip(rows, want_rows, strict=True):
    assert row.keys() == want_row.keys()
    for name in row:
      np.testing.assert_allclose(
        row[name], want_row[name], rtol=1e-5, err_msg=name
      )
  for a, b in zip(*map(_integers, (state, want_state)), strict=True):
    assert a == b  # counters and keys tick once a step
  pairs = zip(
    jax.tree.leaves_with_path(state.opt_state),
    jax.tree.leaves(want_state.opt_state),
    strict=True,
  )
  for (path, a), b in pairs:
    where = jax.tree_util.keystr(path)
    if a.dtype in (np.int8, np.uint8):
      assert np.mean(a != b) < 0.01, where  # codes, which a last bit may turn
    elif not jnp.issubdtype(a.dtype, jnp.floating):
      np.testing.assert_array_equal(a, b, where)
    else:
      a, b = (np.asarray(x, np.float64) for x in (a, b))
      bound = state_rtol * np.max(np.abs(b), initial=0)
      np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=where)


def _integers(state):
  return [
    x.tolist()
    for x in jax.tree.leaves(state)
    if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
  ]


@pytest.mark.parametrize(
  'name',
  [
    *('galore', 'adamw', 'lion'),
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in (
        *(
          'stable_spam',
          'coap',
          'fira',
          'apollo',
          'flora',
          'ldadam',
          'snsm',
        ),
        *('adam_sn', 'spam', 'sgd_sai', 'lamb'),
      )
    ),
  ],
)
def test_equals_the_ordinary_step(name, config):
  """To 1e-6 over 50 steps, the global norm being clipped."""
  want = _train(config(name), 50)
  got = _train(config(name, step='layerwise'), 50)
  clipped = [row['grad_norm'] > 0.05 for row in want[1]]
  assert np.mean(clipped) > 0.9
  # ldadam finds each of its 50 bases from the one before: 1.8e-4 was seen.
  _assert_equal(got, want, state_rtol=1e-3 if name == 'ldadam' else 1e-4)


@pytest.mark.slow
def test_equals_the_ordinary_step_until_a_last_bit_turns_a_code(config):
  """In q_galore's rounded state, which is 2e-4 off after 50 steps."""
  want = _train(config('q_galore'), 5)
  _assert_equal(_train(config('q_galore', step='layerwise'), 5), want)


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    {'optimizer__refresh': 'staggered'},
    {'optimizer__state_codec': 'dynamic8', 'clip_norm': 0.0},
    {'accumulation': 4},
    {'model__tie_embeddings': True},
    {'z_loss': 0.1, 'skip_nonfinite': True},
    {'model__remat': 'inputs'},
  ],
  ids=lambda options: next(iter(options)),
)
def test_equals_the_ordinary_step_with(options, config):
  want = _train(config('galore', **options), 20)
  got = _train(config('galore', step='layerwise', **options), 20)
  # A rounded state turns a last bit into a code's step.
  _assert_equal(got, want, 1e-6 if 'clip_norm' not in options else 1e-4)


@pytest.mark.slow
def test_bfloat16_weights_are_rounded_by_the_same_random_bits(config):
  """Without a clip, whose factor may differ in its last bit."""
  bf16 = {'model__param_dtype': 'bfloat16', 'rounding': 'stochastic'}
  bf16 |= {'clip_norm': 0.0}
  want, _ = _train(config('adamw', **bf16), 20)
  got, _ = _train(config('adamw', step='layerwise', **bf16), 20)
  differ = [
    np.mean(a != b)
    for a, b in zip(
      *map(jax.tree.leaves, (got.params, want.params)), strict=True
    )
  ]
  assert max(differ) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
  ('devices', 'options'),
  [
    (1, {'accumulation': 2}),
    (1, {'layerwise__clip': 'layer'}),
    (8, {'mesh': 'fsdp=2,tensor=4', 'accumulation': 4}),
  ],
  ids=['micro-batches', 'one', 'sharded'],
)
def test_the_memory_of_the_inputs_changes_no_bit(devices, options, config):
  """Nor when it changes between two resumes."""
  options |= {'name': 'galore', 'step': 'layerwise'}
  on_device = config(**options)
  in_host = config(**options, layerwise__inputs='pinned_host')
  want = _train(on_device, 4, devices=devices)
  half, rows = _train(in_host, 2, devices=devices)
  got, more = _train(in_host, 2, half, devices=devices)
  jax.tree.map(np.testing.assert_array_equal, (got, rows + more), want)
  half, _ = _train(on_device, 2, devices=devices)
  got, _ = _train(in_host, 2, half, devices=devices)
  jax.tree.map(np.testing.assert_array_equal, got, want[0])


@pytest.mark.slow
def test_low_bit_products_round_by_the_same_keys(config):
  """A last bit of a gradient may turn a code of it; another key turns many.

  The ordinary step adds up in another order, so a gradient that is rounded at
  random may differ by a code here and there, of tens of thousands.
  """
  sgd = {'name': 'sgd', 'matmul': 'int8', 'clip_norm': 0.0, 'accumulation': 2}
  sgd |= {'optimizer__learning_rate': 1.0, 'schedule__warmup_steps': 0}
  ordinary, layerwise = config(**sgd), config(**sgd, step='layerwise')
  begin, _ = _train(ordinary, 0)
  want, rows = _train(ordinary, 1, begin)
  got, got_rows = _train(layerwise, 1, begin)
  other, _ = _train(layerwise, 1, begin._replace(key=begin.key + 1))
  # Forward products round to nearest.
  np.testing.assert_allclose(got_rows[0]['loss'], rows[0]['loss'], rtol=1e-6)

  def distance(state):
    """Of two gradients of the layers' kernels, by the length of one."""
    kernels = [
      [x['layers'][k] for x in (state.params, want.params, begin.params)]
      for k in ('attn', 'mlp')
    ]
    pairs = [
      (a - b, b - c)
      for trees in kernels
      for a, b, c in zip(*map(jax.tree.leaves, trees), strict=True)
    ]
    apart, length = (
      sum(np.sum(np.square(x)) for x in arrays)
      for arrays in zip(*pairs, strict=True)
    )
    return np.sqrt(apart / length)

  assert distance(got) < 0.01 * distance(other)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'matmul'), [('adamw', 'f32'), ('galore', 'f32'), ('adamw', 'w8')]
)
def test_sharded_equals_one_device(name, matmul, config):
  want = _train(config(name, matmul), 10)
  mesh = {'mesh': 'fsdp=4,tensor=2', 'step': 'layerwise'}
  got = _train(config(name, matmul, **mesh), 10, devices=8)
  _assert_equal(got, want, 1e-5)


@pytest.mark.slow
def test_a_run_may_change_its_step_and_goes_on_bit_for_bit(config):
  layerwise = config('q_galore', 'w8', step='layerwise')
  want, _ = _train(layerwise, 6)
  half, _ = _train(layerwise, 3)
  got, rows = _train(layerwise, 3, half)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  # The ordinary step goes on as this one.
  ordinary = _train(config('q_galore', 'w8'), 3, half)
  _assert_equal(ordinary, (want, rows))


@pytest.mark.slow
def test_each_part_is_clipped_on_its_own(config):
  """Updates of SGD are the gradients: their norms are at most clip_norm."""
  sgd = {'optimizer__learning_rate': 1.0, 'schedule__warmup_steps': 0}
  options = {'clip_norm': 0.01, 'layerwise__clip': 'layer', 'step': 'layerwise'}
  config_ = config('sgd', **sgd, **options)
  before, _ = _train(config_, 0)
  after, rows = _train(config_, 1)
  moved = jax.tree.map(lambda a, b: a - b, after.params, before.params)

  def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))

  layers = [
    norm(jax.tree.map(lambda x: x[i], moved['layers']))  # noqa: B023
    for i in range(3)
  ]
  head = norm({k: moved[k] for k in ('final_norm', 'lm_head')})
  np.testing.assert_allclose([*layers, head, norm(moved['embed'])], 0.01, 1e-3)
  np.testing.assert_allclose(rows[0]['update_norm'], 0.01 * 5**0.5, rtol=1e-3)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(config):
  on = {'skip_nonfinite': True, 'step': 'layerwise'}
  program = step.build(config('galore', **on), jax.devices()[:1])
  batch = _batch(config('galore'), 0)
  with jax.set_mesh(program.layout.mesh):
    state = program.init(jax.random.PRNGKey(0))
    state, _ = program.train_step(state, program.put(batch))
    want = jax.device_get(state)
    bad = batch['tokens'].copy()
    bad[0, 0] = 10_000  # beyond the vocabulary its embedding is NaN
    state, metrics = program.train_step(
      state, program.put(batch | {'tokens': bad})
    )
  assert not np.isfinite(metrics['loss']) and metrics['update_norm'] == 0
  assert int(state.skipped) == 1 and int(state.step) == 2
  got = jax.device_get((state.params, state.opt_state))
  jax.tree.map(
    np.testing.assert_array_equal, got, (want.params, want.opt_state)
  )
  np.testing.assert_allclose(
    metrics['param_norm'],
    np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(want.params))),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'name': 'lisa'}, 'cannot run optimizer lisa.*layers are drawn'),
    ({'name': 'adafactor'}, 'adafactor.*sums over all layers of layers/'),
    ({'name': 'prodigy'}, 'prodigy.*depends on'),
    (
      {'name': 'noisy_sgd', 'optimizer__key': 0},
      'noisy_sgd.*draws random numbers of the shape .* for all layers',
    ),
    ({'layerwise__inputs': 'host'}, "layerwise.inputs 'host'.*pinned_host"),
    ({'step': 'layers'}, "step 'layers'.*layerwise"),
    ({'layerwise__clip': 'layers'}, "clip 'layers'.*layer"),
    ({'model__remat': 'offload'}, "remat='offload' changes nothing.*use full"),
    ({'model__remat': 'dots'}, "remat='dots' changes nothing.*use full"),
    ({'layerwise__clip': 'layer', 'skip_nonfinite': True}, "clip='global'"),
  ],
)
def test_refuses_early(options, message, config):
  with pytest.raises(ValueError, match=message):
    step.build(config(**{'step': 'layerwise'} | options), jax.devices()[:1])
