"""Subset-norm against the authors' code, float64 twins and its own sizes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim
from frugax.models import llama

LAST_TWO = optim.MatrixAxes((-2,), (-1,))


@pytest.mark.parametrize('shape', ['6x4', '4x6'])
@pytest.mark.parametrize('make', [optim.adam_sn, optim.adamw_sn])
def test_follows_the_reference(make, shape, trace, golden):
  got = trace(make(0.01), shape)
  np.testing.assert_allclose(got, golden[f'adam_sn {shape}'], atol=2e-5, rtol=0)


def size_of(numel, subset):
  """Entries of a subset: the largest divisor not above what was asked for."""
  asked = subset if subset > 0 else int(numel**0.5 / -subset)
  return max(
    k for k in range(1, numel + 1) if numel % k == 0 and k <= max(1, asked)
  )


def spread(squares, subset):
  """The sum of a subset, at each entry of an (in, out) matrix."""
  if subset == 'heuristic':
    axis = 0 if squares.shape[1] >= squares.shape[0] else 1
    return np.broadcast_to(squares.sum(axis, keepdims=True), squares.shape)
  size = size_of(squares.size, subset)
  turned = squares.T.reshape(-1, size)
  sums = np.broadcast_to(turned.sum(1, keepdims=True), turned.shape)
  return sums.reshape(squares.shape[::-1]).T


def adam_sn_in_float64(grads, subset, b1=0.9, b2=0.999, mean=False):
  """Updates, without learning rate, of a batch of (in, out) matrices."""
  updates = np.zeros(grads.shape)
  for index in np.ndindex(grads.shape[1:-2]):
    mu = nu = 0.0
    for k, g in enumerate(np.array(grads, np.float64)):
      g = g[index]
      new = spread(g * g, subset)
      if mean:
        new = new / spread(np.ones_like(g), subset)
      mu = b1 * mu + (1 - b1) * g
      nu = nu + new if b2 == 1 else b2 * nu + (1 - b2) * new
      step = (1 if b2 == 1 else np.sqrt(1 - b2 ** (k + 1))) / (
        1 - b1 ** (k + 1)
      )
      updates[(k, *index)] = step * mu / (np.sqrt(nu) + 1e-6)
  return updates


def updates_of(tx, grads):
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  found = []
  for g in grads:
    updates, state = update(g, state)
    found.append(updates)
  return np.array(found), state


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  ('subset', 'reduction'),
  [
    ('heuristic', 'sum'),
    ('heuristic', 'mean'),
    (8, 'sum'),
    (3, 'mean'),
    (1000, 'sum'),
    (-2, 'sum'),
  ],
)
@pytest.mark.parametrize(
  'shape', [(6, 4), (4, 6), (6, 6), (2, 7, 5), (2, 3, 8, 2), (1, 5), (1, 1)]
)
def test_equals_a_float64_twin(shape, subset, reduction):
  grads = normal(5, *shape)
  tx = optim.scale_by_adam_sn(
    subset=subset, reduction=reduction, axes=lambda p: LAST_TWO
  )
  got, state = updates_of(tx, grads)
  want = adam_sn_in_float64(grads, subset, mean=reduction == 'mean')
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=2e-5)
  m, n = shape[-2:]
  count = (
    max(m, n) if subset == 'heuristic' else m * n // size_of(m * n, subset)
  )
  assert state[0].nu.size == math.prod(shape[:-2]) * count


@settings(max_examples=15, deadline=None)
@given(
  m=st.integers(1, 40),
  n=st.integers(1, 40),
  subset=st.integers(-5, 60).filter(bool) | st.just('heuristic'),
)
def test_any_shape_and_any_subset(m, n, subset):
  grads = normal(2, m, n)
  tx = optim.scale_by_adam_sn(subset=subset)
  state = tx.init(grads[0])
  updates, state = tx.update(grads[0], state)
  updates, _ = tx.update(grads[1], state)
  want = adam_sn_in_float64(grads, subset)[1]
  np.testing.assert_allclose(updates, want, atol=1e-5, rtol=5e-5)


@pytest.mark.parametrize('shape', [(24, 8192), (5, 9001), (2, 16, 8200)])
def test_long_rows(shape):
  """They are summed in another way on CPUs."""
  grads = normal(2, *shape)
  got, _ = updates_of(optim.scale_by_adam_sn(axes=lambda p: LAST_TWO), grads)
  np.testing.assert_allclose(
    got, adam_sn_in_float64(grads, 'heuristic'), atol=1e-5, rtol=2e-5
  )


def test_what_is_left_whole_has_plain_adam():
  grads = {'b': normal(3, 7), 'w': normal(3, 4, 5)}
  axes = {'b': None, 'w': None}
  got, want = optim.scale_by_adam_sn(axes=axes), optim.scale_by_adam_hf()
  first = jax.tree.map(lambda g: g[0], grads)
  states = got.init(first), want.init(first)
  for k in range(3):
    g = jax.tree.map(lambda g, k=k: g[k], grads)
    ours, theirs = got.update(g, states[0]), want.update(g, states[1])
    states = ours[1], theirs[1]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      ours[0],
      theirs[0],
    )


def test_adagrad_accumulates_and_has_no_bias_correction():
  grads = normal(4, 3, 5)
  got, state = updates_of(optim.adagrad_sn(1.0), grads)
  total, mu = np.cumsum(np.square(grads).sum(1), axis=0), 0.0
  for k, g in enumerate(np.array(grads)):
    mu = 0.9 * mu + 0.1 * g
    want = -mu / (np.sqrt(total[k]) + 1e-6)
    np.testing.assert_allclose(got[k], want, rtol=1e-5)
  np.testing.assert_allclose(state[0].nu, total[-1], rtol=1e-6)


def test_without_momentum_there_is_no_first_moment():
  params = {'w': jnp.zeros((64, 32)), 'b': jnp.zeros(32)}
  for tx in (optim.adagrad_sn(1.0, b1=0.0), optim.adam_sn(1.0, b1=0)):
    assert optim.state_bytes(tx, params)['moments'] == 4 * (64 + 32)
  got, _ = updates_of(optim.scale_by_adam_sn(b1=0.0), normal(3, 4, 6))
  want = adam_sn_in_float64(normal(3, 4, 6), 'heuristic', b1=0.0)
  np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize('traced', [False, True])
def test_a_second_decay_of_one_accumulates(traced):
  grads = normal(4, 5, 3)
  make = optim.adam_sn
  if traced:
    static = ('subset', 'reduction', 'weight_decay')
    make = optax.inject_hyperparams(make, static_args=static)
  got, _ = updates_of(make(learning_rate=1.0, b2=1.0), grads)
  want = adam_sn_in_float64(grads, 'heuristic', b2=1)
  np.testing.assert_allclose(got, -want, atol=1e-6, rtol=2e-5)


def test_decay_acts_after_the_step_and_only_where_it_should():
  params = {'w': normal(4, 3), 'v': normal(4, 3)}
  mask = {'w': True, 'v': False}
  tx = optim.adamw_sn(0.1, weight_decay=0.5, mask=mask)
  plain = optim.adam_sn(0.1)
  got, _ = tx.update(params, tx.init(params), params)
  want, _ = plain.update(params, plain.init(params))
  np.testing.assert_allclose(got['v'], want['v'], rtol=1e-6)
  decayed = want['w'] - 0.05 * (params['w'] + want['w'])
  np.testing.assert_allclose(got['w'], decayed, rtol=1e-5)


@pytest.mark.parametrize('subset', ['heuristics', 0, 2.5, None])
def test_bad_subsets_say_so(subset):
  with pytest.raises(ValueError, match='heuristic'):
    optim.adam_sn(1.0, subset=subset)


def test_traced_subsets_and_bad_reductions_say_so():
  make = optax.inject_hyperparams(optim.adam_sn, static_args=('reduction',))
  with pytest.raises(ValueError, match='static_args'):
    make(learning_rate=1.0, subset=4).init(jnp.ones((2, 2)))
  with pytest.raises(ValueError, match='mean'):
    optim.adam_sn(1.0, reduction='means')


# hidden, ffn, layers of the C4 benchmark's models; vocabulary 32000.
MODELS = {
  '60m': (512, 1376, 8),
  '130m': (768, 2048, 12),
  '350m': (1024, 2736, 24),
  '1b': (2048, 5461, 24),
  '7b': (4096, 11008, 32),
}


def linear_axes(model):
  """All linear layers and the head, but not the embedding."""
  axes = model.axes()
  return optim.matrix_axes(axes) | {
    'embed': jax.tree.map(
      lambda _: None, axes['embed'], is_leaf=lambda x: isinstance(x, tuple)
    )
  }


@pytest.mark.parametrize(
  ('size', 'gigabytes'),
  [*zip(MODELS, [0.149, 0.318, 0.802, 2.811, 13.743], strict=True)],
)
def test_bytes(size, gigabytes):
  d, f, layers = MODELS[size]
  model = llama.Llama(llama.config(size, param_dtype='bfloat16'))
  params = jax.eval_shape(model.init, jax.random.key(0))
  tx = optim.adam_sn(1e-2, axes=linear_axes(model))
  got = optim.state_bytes(tx, params)
  matrices = layers * ([(d, d)] * 4 + [(d, f)] * 3) + [(d, 32000)]
  whole = 32000 * d + d * (2 * layers + 1)
  want = sum(m * n + max(m, n) for m, n in matrices) + 2 * whole
  assert got['moments'] == 2 * want
  assert got['total'] == got['moments'] + 4
  assert abs(got['total'] / 1e9 - gigabytes) < 6e-4


@pytest.mark.parametrize('spec', [P('fsdp'), P(None, 'fsdp')])
@pytest.mark.parametrize(
  ('shape', 'subset'),
  [((64, 128), 'heuristic'), ((64, 8192), 'heuristic'), ((64, 128), 8)],
)
def test_sharded_sums_are_small_reductions(shape, subset, spec):
  """Nothing the size of the gradient is gathered."""
  mesh = jax.make_mesh(
    (8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = NamedSharding(mesh, spec)
  tx = optim.adam_sn(0.1, subset=subset)
  g = jax.device_put(normal(*shape), sharding)
  of_state = optim.state_shardings(tx, g, sharding)
  state = jax.jit(tx.init, out_shardings=of_state)(g)
  compiled = (
    jax.jit(tx.update, out_shardings=(sharding, of_state))
    .lower(g, state)
    .compile()
  )
  want, _ = tx.update(normal(*shape), tx.init(normal(*shape)))
  np.testing.assert_allclose(compiled(g, state)[0], want, rtol=2e-5, atol=1e-7)
  for line in compiled.as_text().splitlines():
    if match := re.search(
      r' = (.*) (all-gather|all-to-all|all-reduce|collective)', line
    ):
      sizes = re.findall(r'f32\[([\d,]+)\]', match[1])
      largest = max(math.prod(map(int, s.split(','))) for s in sizes)
      assert largest <= g.size // (8 if subset == 8 else min(shape)), line
