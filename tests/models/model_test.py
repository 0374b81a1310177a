"""The forward pass against float64 twins, and the structure of the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.models import llama, losses
from frugax.models.llama import model as llama_model

CONFIG = llama.LlamaConfig(
  vocab_size=23,
  dim=32,
  n_layers=3,
  n_heads=4,
  n_kv_heads=2,
  ffn=37,
  # Far from the default, so that layers and norms matter to the logits.
  init_std=0.2,
  norm_eps=1e-3,
  rope_theta=100.0,
)


@functools.cache
def build(**overrides):
  config = dataclasses.replace(CONFIG, **overrides)
  model = llama.Llama(config)
  params = jax.jit(model.init)(jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 100))

  def jitter(path, x):
    if path[-1].key != 'scale':
      return x
    return (x + 0.3 * jax.random.normal(next(keys), x.shape)).astype(x.dtype)

  return model, jax.tree.map_with_path(jitter, params)


def tokens(batch=2, length=12, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, CONFIG.vocab_size, (batch, length)))


def twin_rotate(x, position, theta):
  """One head at one position, as multiplication by a complex number."""
  half = len(x) // 2
  angle = position * theta ** (-2 * np.arange(half) / len(x))
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag])


def twin_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def twin(config, params, row, segments=None, positions=None):
  """Logits of one row in float64, by loops over heads and positions."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  length = len(row)
  segments = np.zeros(length) if segments is None else segments
  positions = np.arange(length) if positions is None else positions
  group = config.n_heads // config.n_kv_heads
  turn = functools.partial(twin_rotate, theta=config.rope_theta)
  x = p['embed']['embedding'][row]
  for i in range(config.n_layers):
    layer = jax.tree.map(lambda w, i=i: w[i], p['layers'])
    y = twin_norm(x, layer['attn_norm']['scale'], config.norm_eps)
    w = {name: kernel['kernel'] for name, kernel in layer['attn'].items()}
    out = np.zeros_like(x)
    for head in range(config.n_heads):
      q = y @ w['q'][:, head]
      k = y @ w['k'][:, head // group]
      v = y @ w['v'][:, head // group]
      q = [turn(*pair) for pair in zip(q, positions, strict=True)]
      k = [turn(*pair) for pair in zip(k, positions, strict=True)]
      for t in range(length):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        score = np.array([q[t] @ k[s] for s in seen]) / np.sqrt(len(q[t]))
        weight = np.exp(score - score.max())
        out[t] += (weight / weight.sum()) @ v[seen] @ w['o'][head]
    x = x + out
    y = twin_norm(x, layer['mlp_norm']['scale'], config.norm_eps)
    w = {name: kernel['kernel'] for name, kernel in layer['mlp'].items()}
    gate = y @ w['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (y @ w['up'])) @ w['down']
  x = twin_norm(x, p['final_norm']['scale'], config.norm_eps)
  if config.tie_embeddings:
    return x @ p['embed']['embedding'].T
  return x @ p['lm_head']['kernel']


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    dict(n_kv_heads=4),
    dict(n_kv_heads=1, tie_embeddings=True),
    dict(head_dim=6),
  ],
  ids=str,
)
def test_forward_is_the_float64_twin(overrides):
  model, params = build(**overrides)
  batch = tokens()
  segments = np.array([[0] * 5 + [1] * 7, [3] * 12])
  positions = np.array([[*range(5), *range(7)], [*range(40, 52)]])
  got = model.apply(
    params, batch, segment_ids=jnp.asarray(segments), positions=positions
  )
  want = [
    twin(model.config, params, *row)
    for row in zip(np.asarray(batch), segments, positions, strict=True)
  ]
  assert np.abs(want).max() > 1  # or else 1e-5 would say little
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
  plain = model.apply(params, batch)
  want = [twin(model.config, params, row) for row in np.asarray(batch)]
  np.testing.assert_allclose(plain, want, atol=1e-5, rtol=1e-5)


def test_rotary_is_the_float64_twin_far_out():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2], [500, 1000, 4095]])
  got = llama_model.rotate(x, jnp.asarray(positions), 10000.0)
  want = np.zeros(x.shape)
  for b, t, h in np.ndindex(2, 3, 4):
    want[b, t, h] = twin_rotate(x[b, t, h].astype(float), positions[b, t], 1e4)
  # A float32 angle near 4096 is known to 2^-12, 2.4e-4.
  np.testing.assert_allclose(got[0], want[0], atol=1e-6)
  np.testing.assert_allclose(got[1], want[1], atol=1e-3)


def test_no_token_changes_a_logit_before_it():
  model, params = build()
  batch = tokens()
  before = model.apply(params, batch)
  for t in (1, 6, 11):
    changed = batch.at[:, t].set((batch[:, t] + 1) % CONFIG.vocab_size)
    after = model.apply(params, changed)
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert not np.allclose(after[:, t:], before[:, t:], atol=1e-3)


def test_packed_documents_are_separate_documents():
  model, params = build()
  lengths = (3, 5, 4)
  row = tokens(batch=1)
  segments = jnp.repeat(jnp.array([7, 0, 2]), jnp.array(lengths))[None]
  restart = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
  alone = jnp.concatenate(
    [model.apply(params, row[:, s == segments[0]]) for s in (7, 0, 2)], axis=1
  )
  for positions in (None, restart):
    packed = model.apply(params, row, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(packed, alone, atol=1e-5, rtol=1e-5)
  leaky = model.apply(params, row)
  assert not np.allclose(leaky[:, 3:], alone[:, 3:], atol=1e-2)


def test_grouped_query_is_multi_head_with_repeated_heads():
  grouped, params = build()
  multi = llama.Llama(dataclasses.replace(CONFIG, n_kv_heads=4))
  attn = dict(params['layers']['attn'])
  for name in 'kv':
    attn[name] = {'kernel': jnp.repeat(attn[name]['kernel'], 2, axis=2)}
  repeated = params | {'layers': params['layers'] | {'attn': attn}}
  np.testing.assert_allclose(
    grouped.apply(params, tokens()),
    multi.apply(repeated, tokens()),
    atol=1e-5,
    rtol=1e-5,
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_walking_the_layers_is_apply(dtype):
  model, params = build(dtype=dtype)
  segments = jnp.array([[0] * 5 + [1] * 7] * 2)

  @jax.jit
  def walk(params, batch):
    x = model.embed(params, batch)
    for i in range(model.config.n_layers):
      layer = jax.tree.map(lambda p, i=i: p[i], params['layers'])
      x = model.block(layer, x, segment_ids=segments)
    return model.head(params, x)

  want = model.apply(params, tokens(), segment_ids=segments)
  tolerance = 1e-5 if dtype == 'float32' else 0.05
  np.testing.assert_allclose(walk(params, tokens()), want, atol=tolerance)


@pytest.mark.parametrize('tied', [False, True])
def test_axes_name_every_axis(tied):
  model, params = build(tie_embeddings=tied)
  is_names = lambda x: isinstance(x, tuple)  # noqa: E731
  axes = model.axes()
  structure = jax.tree.structure(axes, is_leaf=is_names)
  assert structure == jax.tree.structure(params)
  assert ('lm_head' in params) == (not tied)
  config = model.config
  sizes = {
    'layers': {config.n_layers},
    'embed': {config.dim},
    'norm': {config.dim},
    'heads': {config.n_heads},
    'kv_heads': {config.n_kv_heads},
    'head_dim': {config.d_head},
    'mlp': {config.ffn},
    'vocab': {config.vocab_size},
  }
  leaves = jax.tree.leaves(axes, is_leaf=is_names)
  for names, leaf in zip(leaves, jax.tree.leaves(params), strict=True):
    assert len(names) == leaf.ndim
    for name, size in zip(names, leaf.shape, strict=True):
      assert size in sizes[name]


def test_init_statistics_and_layers_differ():
  model = llama.Llama(llama.config('tiny'))
  params = jax.jit(model.init)(jax.random.key(3))
  for path, x in jax.tree.leaves_with_path(params):
    if path[-1].key == 'scale':
      np.testing.assert_array_equal(x, 1)
    else:
      # 8192 or more draws: the deviation's own deviation is below 0.8 %.
      np.testing.assert_allclose(np.std(x), 0.02, rtol=0.04)
      np.testing.assert_allclose(np.mean(x), 0, atol=1e-3)
  kernel = np.asarray(params['layers']['attn']['q']['kernel'])
  assert len({layer.tobytes() for layer in kernel}) == 6
  other = jax.jit(model.init)(jax.random.key(4))
  assert not np.array_equal(kernel, other['layers']['attn']['q']['kernel'])


def test_bfloat16_init_is_the_float32_one_rounded():
  wide = jax.jit(llama.Llama(CONFIG).init)(jax.random.key(0))
  narrow = llama.Llama(dataclasses.replace(CONFIG, param_dtype='bfloat16'))
  narrow = jax.jit(narrow.init)(jax.random.key(0))
  for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
    assert b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a.astype(jnp.bfloat16), b)


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_bfloat16_compute_stays_near_and_gives_float32_logits(param_dtype):
  model, params = build(dtype='bfloat16', param_dtype=param_dtype)
  batch = tokens()
  logits = model.apply(params, batch)
  assert logits.dtype == jnp.float32
  want = [twin(model.config, params, row) for row in np.asarray(batch)]
  error = np.abs(logits - np.array(want)).mean() / np.abs(want).mean()
  assert 1e-4 < error < 0.05  # rounded to 8 bits, but no more than that

  def loss(params):
    return jnp.mean(model.apply(params, batch) ** 2)

  grads = jax.jit(jax.grad(loss))(params)
  for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
    assert g.dtype == p.dtype and np.isfinite(np.float32(g)).all()
    assert np.any(np.float32(g))


def test_dot_general_computes_the_linears_alone():
  seen = []

  def record(lhs, rhs, dimension_numbers, *args, **kwargs):
    seen.append((lhs.shape, rhs.shape))
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)

  plain, params = build()
  model = llama.Llama(CONFIG, dot_general=record)
  assert jax.tree.map(jnp.shape, model.init(jax.random.key(0))) == jax.tree.map(
    jnp.shape, params
  )
  assert not seen
  want = plain.apply(params, tokens())
  np.testing.assert_array_equal(model.apply(params, tokens()), want)
  d, ffn = CONFIG.dim, CONFIG.ffn
  assert sorted(shape for _, shape in seen) == sorted(
    [(d, 4, 8), (d, 2, 8), (d, 2, 8), (4, 8, d), (d, ffn), (d, ffn), (ffn, d)]
  )
  # The body of the scan is traced once, and a second call traces nothing.
  model.apply(params, tokens(seed=5))
  assert len(seen) == 7


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_gradient_traces_a_layer_once(remat):
  traces = []

  def constrain(x, names):
    if names[-1] == 'act_mlp':
      traces.append(x.shape)
    return x

  model = llama.Llama(
    dataclasses.replace(CONFIG, remat=remat), constrain=constrain
  )
  _, params = build()

  @jax.jit
  def grad(params, batch):
    return jax.grad(lambda p: model.apply(p, batch).sum())(params)

  grad(params, tokens())
  grad(params, tokens(seed=1))
  assert len(traces) == 1


def test_constrain_sees_every_activation_by_name():
  seen = {}

  def constrain(x, names):
    assert x.ndim == len(names)
    seen[names] = x.shape
    return x

  _, params = build()
  llama.Llama(CONFIG, constrain=constrain).apply(params, tokens())
  assert seen == {
    ('act_vocab', 'act_embed'): (23, 32),
    ('batch', 'sequence', 'act_embed'): (2, 12, 32),
    ('batch', 'sequence', 'act_heads', 'head_dim'): (2, 12, 4, 8),
    ('batch', 'kv_sequence', 'act_kv_heads', 'head_dim'): (2, 12, 2, 8),
    ('batch', 'sequence', 'act_mlp'): (2, 12, 37),
    ('batch', 'sequence', 'act_vocab'): (2, 12, 23),
  }


def test_no_mask_is_built_without_segments():
  model, params = build()
  text = jax.jit(model.apply).lower(params, tokens(length=13)).as_text()
  packed = jax.jit(model.apply).lower(
    params, tokens(length=13), segment_ids=jnp.zeros((2, 13), int)
  )
  # Causality compares positions, (13, 13); segments compare (batch, 13, 13).
  assert 'tensor<2x1x13x13xi1>' not in text
  assert 'tensor<2x1x13x13xi1>' in packed.as_text()


def test_bad_inputs_are_refused_before_compilation():
  model, params = build()
  ok = tokens()
  with pytest.raises(ValueError, match='tokens must be integers, not float32'):
    model.apply(params, ok.astype(jnp.float32))
  with pytest.raises(ValueError, match=r'tokens have shape \(12,\)'):
    model.apply(params, ok[0])
  with pytest.raises(ValueError, match=r'segment_ids have shape \(12,\)'):
    model.apply(params, ok, segment_ids=jnp.zeros(12, int))
  with pytest.raises(ValueError, match=r'positions have shape \(2, 11\)'):
    model.apply(params, ok, positions=jnp.zeros((2, 11), int))
  with pytest.raises(ValueError, match='positions must be integers, not bool'):
    model.apply(params, ok, positions=jnp.zeros((2, 12), bool))


@pytest.mark.parametrize('head', ['none', 'int8'])
@pytest.mark.parametrize('tied', [False, True])
def test_losses_are_those_of_the_logits(head, tied):
  """With a recipe they are computed from its logits, in few bits."""
  model = llama.Llama(
    llama.config('tiny', n_layers=1, tie_embeddings=tied, matmul_head=head)
  )
  params = model.init(jax.random.key(0))
  tokens, labels = jax.random.randint(jax.random.key(1), (2, 2, 12), 0, 320)
  labels = labels.at[0, :3].set(-1)
  key = jax.random.key(2)

  def by_logits(params):
    logits = model.apply(params, tokens, key=key)
    found = losses.token_losses(logits, labels)[:2]
    return found[0].sum(), found

  def without(params):
    found = model.apply(params, tokens, key=key, labels=labels)
    return found[0].sum(), found

  (want_grads, want), (grads, got) = (
    jax.jit(jax.grad(f, has_aux=True))(params) for f in (by_logits, without)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
  for a, b in zip(
    jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert not np.any(got[0][0, :3])
