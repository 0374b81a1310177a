"""Bytes of optimizer state, and the shardings derived from the parameters'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim
from frugax.optim import state as state_lib


@pytest.mark.parametrize(
  ('shape', 'param_shape', 'want'),
  [
    # A rank takes the place of one side.
    ((4, 16), (64, 16), [(), (1,)]),
    ((64, 4), (64, 16), [(0,), ()]),
    ((3, 4, 16), (3, 64, 16), [(0,), (), (2,)]),
    ((4, 64), (64, 64), [(), (1,)]),
    ((64, 4), (64, 64), [(0,), ()]),
    # Attention kernels whose heads were flattened, square as a matrix.
    ((2, 4, 32), (2, 32, 8, 4), [(0,), (), (2, 3)]),
    ((2, 32, 5), (2, 32, 8, 4), [(0,), (1,), ()]),
    ((2, 5, 32), (2, 8, 4, 32), [(0,), (), (3,)]),
    ((2, 32, 5), (2, 8, 4, 32), [(0,), (1, 2), ()]),
    # Factored moments, scalars, the transposed factor of another library.
    ((64,), (64, 16), [(0,)]),
    ((16,), (64, 16), [(1,)]),
    ((3, 16), (3, 64, 16), [(0,), (2,)]),
    ((), (64, 16), []),
    ((1,), (64, 16), [()]),
    ((16, 4), (64, 16), [(1,), ()]),
  ],
)
def test_axes_stem_from_parameter_axes(shape, param_shape, want):
  ranges = state_lib._align(shape, param_shape)
  assert [tuple(range(*r)) for r in ranges] == want


def mesh():
  return jax.make_mesh(
    (2, 4), ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


PARAMS = {
  'wq': jax.ShapeDtypeStruct((3, 32, 8, 4), jnp.float32),
  'wo': jax.ShapeDtypeStruct((3, 8, 4, 32), jnp.float32),
  'norm': jax.ShapeDtypeStruct((32,), jnp.float32),
}
SPECS = {
  'wq': P(None, 'fsdp', 'tensor'),
  'wo': P(None, 'tensor', None, 'fsdp'),
  'norm': P('fsdp'),
}
AXES = {
  'wq': optim.MatrixAxes((1,), (2, 3)),
  'wo': optim.MatrixAxes((1, 2), (3,)),
  'norm': None,
}


def specs(tx_or_state):
  shardings = {k: NamedSharding(mesh(), spec) for k, spec in SPECS.items()}
  tree = optim.state_shardings(tx_or_state, PARAMS, shardings)
  return jax.tree.map(lambda s: s.spec, tree)


def test_low_rank_state_is_sharded_like_its_parameter():
  tx = optim.low_rank(optax.scale_by_adam(), rank=5, axes=AXES)
  state = specs(tx)
  # The heads axis keeps its mesh axis after flattening with head_dim.
  mu = {
    'norm': P('fsdp'),
    'wq': P(None, None, 'tensor'),
    'wo': P(None, None, 'fsdp'),
  }
  assert state.inner.mu == state.inner.nu == mu
  projectors = {'wq': P(None, 'fsdp'), 'wo': P(None, 'tensor')}
  assert {k: state.projectors[k] for k in projectors} == projectors
  assert state.count == state.inner.count == P()
  assert specs(jax.eval_shape(tx.init, PARAMS)) == state


def test_an_axis_that_does_not_divide_is_replicated():
  params = {'w': jax.ShapeDtypeStruct((6, 8), jnp.float32)}
  shardings = {'w': NamedSharding(mesh(), P('tensor', 'fsdp'))}
  state = {'w': jnp.zeros((6, 3)), 'x': {'w': jnp.zeros((3, 8))}}
  tree = optim.state_shardings(state, params, shardings)
  assert tree['w'].spec == P()
  assert tree['x']['w'].spec == P(None, 'fsdp')


def wrapped(name):
  tx = optim.low_rank(optax.scale_by_adam(), rank=5, axes=AXES)
  label = {'wq': 'norm', 'wo': 'norm', 'norm': 'other'}
  return {
    'chain': lambda: optax.chain(optax.clip_by_global_norm(1.0), tx),
    'masked': lambda: optax.masked(tx, {'wq': True, 'wo': True, 'norm': False}),
    'MultiSteps': lambda: optax.MultiSteps(tx, 2),
    'partition': lambda: optax.partition(
      {'norm': tx, 'other': optax.adam(0.1)}, label
    ),
    'inject_hyperparams': lambda: optax.inject_hyperparams(
      optim.galore, static_args=('rank', 'update_interval')
    )(0.1, rank=5, axes=AXES),
  }[name]()


@pytest.mark.parametrize(
  'name', ['chain', 'masked', 'MultiSteps', 'partition', 'inject_hyperparams']
)
def test_wrappers_do_not_hide_the_parameter(name):
  """A partition's label that is also a parameter's name misleads nobody."""
  found = {}
  for path, spec in jax.tree.leaves_with_path(
    specs(wrapped(name)), is_leaf=lambda x: isinstance(x, P)
  ):
    text = jax.tree_util.keystr(path)
    for field in ('mu', 'projectors'):
      if f'.{field}' in text and 'wq' in text:
        found[field] = spec
    if 'count' in text or 'hyperparams' in text:
      assert spec == P()
    if 'acc_grads' in text and 'wo' in text:
      assert spec == SPECS['wo']
  assert found == {'mu': P(None, None, 'tensor'), 'projectors': P(None, 'fsdp')}


def test_init_allocates_on_the_mesh():
  params = {'w': jnp.ones((8, 64))}
  shardings = {'w': NamedSharding(mesh(), P(None, ('fsdp', 'tensor')))}
  tx = optim.galore(0.1, rank=2)
  want = optim.state_shardings(tx, params, shardings)
  state = jax.jit(tx.init, out_shardings=want)(params)
  assert state[0].inner.mu['w'].addressable_shards[0].data.shape == (2, 8)


@pytest.mark.parametrize(
  ('params', 'shardings', 'message'),
  [
    ({}, {}, 'empty tree'),
    ({'w': jnp.zeros(2)}, {'w': P()}, 'NamedSharding leaves'),
    ({'w': jnp.zeros(2)}, {}, 'same structure'),
  ],
)
def test_bad_shardings(params, shardings, message):
  with pytest.raises(ValueError, match=message):
    optim.state_shardings(optax.adam(0.1), params, shardings)


def test_bytes_of_galore_are_the_formula():
  """A stack of 3 kernels 32 x 48, a square one and a vector, in bfloat16."""
  params = {
    'stack': jax.ShapeDtypeStruct((3, 32, 48), jnp.bfloat16),
    'square': jax.ShapeDtypeStruct((32, 32), jnp.bfloat16),
    'norm': jax.ShapeDtypeStruct((32,), jnp.bfloat16),
  }
  axes = {
    'stack': optim.MatrixAxes((1,), (2,)),
    'square': optim.MatrixAxes((0,), (1,)),
    'norm': None,
  }
  tx = optim.galore(0.1, rank=4, axes=axes, state_dtype=jnp.float32)
  projector = 2 * (3 * 32 * 4 + 32 * 4)
  moments = 2 * 4 * (3 * 4 * 48 + 4 * 32 + 32)
  assert optim.state_bytes(tx, params) == {
    'projector': projector,
    'moments': moments,
    'gradients': 0,
    'counters': 2 * 4,
    'other': 0,
    'total': projector + moments + 8,
  }


@pytest.mark.parametrize(
  ('tx', 'want'),
  [
    (optax.sgd(0.1), {'total': 0}),
    (optax.adam(0.1), {'moments': 2 * 4 * 24, 'counters': 4, 'projector': 0}),
    (optax.adafactor(0.1, min_dim_size_to_factor=1), {'projector': 0}),
    (optax.contrib.galore(0.1, rank=2), {'projector': 4 * 6 * 2}),
    (
      optim.low_rank(optax.identity(), rank=2, projector='random'),
      {'projector': 2 * 4, 'moments': 0, 'counters': 4},
    ),
    (
      optax.MultiSteps(optax.sgd(0.1), 2),
      {'gradients': 4 * 24, 'counters': 8},
    ),
    (
      optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
      {'other': 4, 'counters': 4},
    ),
    (optax.adam(0.1, mu_dtype=jnp.int4), {'moments': 5 * 24}),
  ],
)
def test_bytes_of_any_transformation(tx, want):
  params = {'w': jnp.ones((6, 4))}
  got = optim.state_bytes(tx, params)
  assert {k: got[k] for k in want} == want
  state = tx.init(params)
  assert got['total'] == sum(
    np.asarray(x).nbytes for x in jax.tree.leaves(state)
  )
  assert got['total'] == sum(v for k, v in got.items() if k != 'total')
