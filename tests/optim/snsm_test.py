"""SNSM against the authors' code, a float64 twin and its own size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.models import llama


def test_follows_the_reference(trace, golden):
  """Until the second refresh nothing depends on signs."""
  tx = optim.snsm(0.01, rank=2, update_interval=5)
  got = trace(tx, '6x4')[:4]
  np.testing.assert_allclose(got, golden['snsm 6x4'][:4], atol=2e-5, rtol=0)


def test_follows_the_reference_to_the_end_with_its_signs(
  trace, golden, with_signs
):
  """Its stale momentum, its lost gradients and its steps of refresh."""
  projector = with_signs([[1, 1], [1, -1], [-1, 1]])
  tx = optim.snsm(0.01, rank=2, update_interval=5, projector=projector)
  got = trace(tx, '6x4')
  np.testing.assert_allclose(got, golden['snsm 6x4'], atol=2e-5, rtol=0)


def snsm_in_float64(w, grads, lr, rank, interval, moments, decay):
  """A batch of (in, out) kernels, one by one, in numpy."""
  w = np.array(w, np.float64)
  for index in np.ndindex(w.shape[:-2]):
    mu = nu = 0.0
    p = None
    for k, g in enumerate(grads):
      g, t = np.array(g[index], np.float64), k + 1
      turned = g.shape[0] > g.shape[1]
      g = g.T if turned else g
      due = t % interval == 0 if moments == 'stale' else k % interval == 0
      if due or k == 0:
        old = p
        p = np.linalg.svd(g)[0][:, :rank]
        p = p * np.sign(p[np.abs(p).argmax(0), range(p.shape[1])])
        if k and moments != 'stale':
          mu = p.T @ old @ mu if moments == 'rotate' else 0.0
      r = p.T @ g
      mu = 0.9 * mu + 0.1 * r
      nu = 0.999 * nu + 0.001 * np.sum(g * g, axis=0)
      step = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
      u = step * (p @ mu + g - p @ r) / (np.sqrt(nu) + 1e-6)
      w[index] -= lr * (u.T if turned else u)
      w[index] -= lr * decay * w[index]
      if due and k and moments == 'stale':
        mu = 0.0
  return w


@pytest.mark.parametrize('moments', ['stale', 'zero', 'rotate'])
@pytest.mark.parametrize('shape', [(3, 7, 5), (2, 2, 4, 9), (6, 6), (2, 5)])
def test_equals_a_float64_twin(shape, moments):
  rng = np.random.default_rng(0)
  w = rng.normal(size=shape).astype(np.float32)
  grads = rng.normal(size=(8, *shape)).astype(np.float32)
  tx = optim.snsm(
    0.05,
    rank=2,
    update_interval=3,
    moments=moments,
    weight_decay=0.1,
    axes=lambda p: optim.MatrixAxes((-2,), (-1,)),
  )
  params, update = jnp.asarray(w), jax.jit(tx.update)
  state = tx.init(params)
  for g in grads:
    updates, state = update(jnp.asarray(g), state, params)
    params = optax.apply_updates(params, updates)
  want = snsm_in_float64(w, grads, 0.05, 2, 3, moments, 0.1)
  np.testing.assert_allclose(params, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize('moments', ['stale', 'zero'])
def test_what_is_left_whole_has_plain_adam_across_refreshes(moments):
  g = {'w': jnp.eye(4, 6), 'b': jnp.arange(3.0)}
  tx = optim.snsm(0.1, rank=2, update_interval=2, moments=moments)
  adam = optax.chain(optim.scale_by_adam_hf(), optim.step_and_decay(0.1))
  state, want_state = tx.init(g), adam.init(g)
  for _ in range(5):
    updates, state = tx.update(g, state)
    want, want_state = adam.update(g, want_state)
    np.testing.assert_allclose(updates['b'], want['b'], rtol=1e-6)


def test_momentum_starts_anew_after_a_refresh():
  """Counted from 1, at multiples of the interval, but not at the first."""
  g = jnp.eye(4, 6)
  tx = optim.snsm(0.1, rank=2, update_interval=3)
  state, empty = tx.init(g), []
  for _ in range(7):
    _, state = tx.update(g, state)
    empty.append(not state[0].inner.inner.mu.any())
  assert empty == [False, False, True, False, False, True, False]


def test_other_schedules_and_projectors():
  g = {'w': jnp.eye(4, 6), 'stack': jnp.ones((3, 5, 4))}
  axes = {
    'w': optim.MatrixAxes((0,), (1,)),
    'stack': optim.MatrixAxes((1,), (2,)),
  }
  tx = optim.snsm(
    0.1,
    rank=2,
    update_interval=2,
    moments='zero',
    refresh='staggered',
    projector='sketch',
    subset=4,
    axes=axes,
  )
  state, update = tx.init(g), jax.jit(tx.update)
  for _ in range(4):
    updates, state = update(g, state)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
  with pytest.raises(ValueError, match='staggered'):
    optim.snsm(0.1, refresh='staggered')


# hidden, ffn, layers of the C4 benchmark's models; vocabulary 32000.
MODELS = {
  '60m': (512, 1376, 8),
  '130m': (768, 2048, 12),
  '350m': (1024, 2736, 24),
  '1b': (2048, 5461, 24),
  '7b': (4096, 11008, 32),
}
RANKS = {'60m': 128, '130m': 256, '350m': 256, '1b': 512, '7b': 1024}


def abstract(size):
  """The parameters of a model, and their axes: linear layers and the head."""
  model = llama.Llama(llama.config(size, param_dtype='bfloat16'))
  axes = model.axes()
  embed = jax.tree.map(
    lambda _: None, axes['embed'], is_leaf=lambda x: isinstance(x, tuple)
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  return params, optim.matrix_axes(axes) | {'embed': embed}


@pytest.mark.parametrize(
  ('size', 'gigabytes'),
  [*zip(MODELS, [0.094, 0.205, 0.388, 1.255, 5.720], strict=True)],
)
def test_bytes(size, gigabytes):
  d, f, layers = MODELS[size]
  params, axes = abstract(size)
  tx = optim.snsm(1e-2, rank=RANKS[size], axes=axes)
  got = optim.state_bytes(tx, params)
  matrices = layers * ([(d, d)] * 4 + [(d, f)] * 3) + [(d, 32000)]
  whole = 32000 * d + d * (2 * layers + 1)
  rank = RANKS[size]
  assert got['projector'] == 2 * sum(rank * m for m, _ in matrices)
  moments = sum((rank + 1) * n for _, n in matrices) + 2 * whole
  assert got['moments'] == 2 * moments
  assert got['total'] == got['projector'] + got['moments'] + 2 * 4
  assert abs(got['total'] / 1e9 - gigabytes) < 6e-4


def test_at_most_a_fifth_of_adam_on_the_linear_layers_of_1b():
  params, axes = abstract('1b')
  linear = {k: params['layers'][k] for k in ('attn', 'mlp')}
  axes = {k: axes['layers'][k] for k in ('attn', 'mlp')}
  sizes = [
    optim.state_bytes(tx, linear)['total']
    for tx in (optim.snsm(1e-2, rank=512, axes=axes), optax.adam(1e-2))
  ]
  assert sizes[1] > 4e9
  assert sizes[0] <= 0.2 * sizes[1]
