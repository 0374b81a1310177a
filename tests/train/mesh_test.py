"""Meshes from one field, shardings from names, equal losses on all of them."""

import itertools
import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from frugax.train import data, mesh, step, tokenizer

SHAPES_OF_8 = [
  sizes
  for sizes in itertools.product((1, 2, 4, 8), repeat=4)
  if np.prod(sizes) == 8
]


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('fdsp=8', "unknown mesh axis 'fdsp': did you mean 'fsdp'?"),
    ('fsdp=3', "mesh 'fsdp=3' needs 3 devices, but there are 8"),
    ('fsdp=3,data=-1', 'needs a multiple of 3 devices, but there are 8'),
    ('fsdp=-1,data=-1', 'more than one axis of size -1'),
    ('fsdp=0', "'fsdp=0' of 'fsdp=0' is not name=size"),
    ('fsdp', 'is not name=size'),
    ('fsdp=two', 'is not name=size'),
  ],
)
def test_bad_specs_name_the_way_out(spec, message):
  with pytest.raises(ValueError) as e:
    mesh.parse_mesh(spec, 8)
  assert message in str(e.value)


def test_axes_that_do_not_divide_are_left_out():
  layout = mesh.make_layout('data=2,fsdp=2,tensor=2')
  assert layout.spec(('batch', 'sequence'), (8, 5)) == P(('data', 'fsdp'), None)
  assert layout.spec(('batch', 'sequence'), (2, 5)) == P('data', None)
  assert layout.spec(('embed', 'mlp'), (128, 5461)) == P('fsdp', None)
  # An axis cuts one dimension only.
  assert layout.spec(('embed', 'embed'), (4, 4)) == P('fsdp', None)


def test_uneven_batches_are_refused(make_config):
  with pytest.raises(
    ValueError, match=r'micro-batch.*does not divide over the 8'
  ):
    step.build(make_config(batch_size=16, accumulation=4))
  with pytest.raises(ValueError, match='sequence_length 30 does not divide'):
    step.build(make_config(mesh='context=8', data__sequence_length=30))


def _losses(config, devices, steps=3):
  program = step.build(config, devices)
  tok = tokenizer.tokenizer('bytes')
  batches = data.train_batches(config.data, tok, batch_size=config.batch_size)
  with jax.set_mesh(program.layout.mesh):
    state = program.init(jax.random.PRNGKey(0))
    losses = []
    for _ in range(steps):
      state, metrics = program.train_step(state, program.put(next(batches)))
      losses.append(float(metrics['loss']))
  batches.close()
  return np.array(losses), state, program


@pytest.fixture(scope='module')
def one_device_losses():
  return {}


@pytest.mark.parametrize('sizes', SHAPES_OF_8, ids=str)
def test_every_mesh_of_8_gives_the_losses_of_one_device(
  sizes, make_config, one_device_losses
):
  kw = {'schedule__warmup_steps': 0, 'accumulation': 1}
  if not one_device_losses:
    config = make_config(mesh='data=1', **kw)
    one_device_losses[0] = _losses(config, jax.devices()[:1])[0]
  spec = ','.join(f'{a}={n}' for a, n in zip(mesh.AXES, sizes, strict=True))
  losses, state, program = _losses(make_config(mesh=spec, **kw), None)
  np.testing.assert_allclose(losses, one_device_losses[0], rtol=1e-5)
  assert losses[-1] < losses[0]  # it trains
  # What the shardings promise is what the step returns.
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
    state,
    program.shardings,
  )


def test_parameters_and_state_are_cut(make_config):
  config = make_config(mesh='fsdp=4,tensor=2')
  _, state, _ = _losses(config, None, steps=1)
  q = state.params['layers']['attn']['q']['kernel']
  assert q.addressable_shards[0].data.size * 8 == q.size
  total = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
  here = sum(
    x.addressable_shards[0].data.nbytes
    for x in jax.tree.leaves(state.opt_state)
  )
  assert here < total / 4


def test_activations_are_cut(make_config):
  """Without constraints XLA keeps them whole, in three times the memory."""
  config = make_config(
    'size=tiny,opt=sgd', mesh='fsdp=8', batch_size=64, model__vocab_size=2000
  )

  def temporary_bytes(program):
    shape = (config.batch_size, config.data.sequence_length)
    batch = {
      name: jax.ShapeDtypeStruct(
        shape,
        np.int32,
        sharding=program.layout.sharding(('batch', 'sequence'), shape),
      )
      for name in ('tokens', 'labels', 'segment_ids', 'positions')
    }
    with jax.set_mesh(program.layout.mesh):
      compiled = program.train_step.lower(program.abstract_state(), batch)
    return compiled.compile().memory_analysis().temp_size_in_bytes

  cut = temporary_bytes(step.build(config))
  with mock.patch.object(mesh.Layout, 'constrain', lambda self, x, names: x):
    whole = temporary_bytes(step.build(config))
  assert cut < 0.5 * whole


def test_rows_are_shared_out_by_the_mesh():
  """Processes whose devices hold the same rows load the same rows."""

  def share(spec, n_processes, index):
    devices = [
      types.SimpleNamespace(process_index=i * n_processes // 8, id=i)
      for i in range(8)
    ]
    sizes = mesh.parse_mesh(spec, 8)
    grid = types.SimpleNamespace(
      shape=sizes,
      devices=np.array(devices).reshape(tuple(sizes.values())),
    )
    with mock.patch.object(jax, 'process_index', lambda: index):
      return mesh.Layout(grid, mesh.RULES).share()

  assert [share('fsdp=8', 4, i) for i in range(4)] == [(i, 4) for i in range(4)]
  assert [share('data=2,tensor=4', 2, i) for i in range(2)] == [(0, 2), (1, 2)]
  assert [share('data=2,tensor=4', 4, i) for i in range(4)] == [
    *((0, 2), (0, 2), (1, 2), (1, 2))
  ]
  assert [share('tensor=8', 4, i) for i in range(4)] == [(0, 1)] * 4
  assert mesh.make_layout('fsdp=8').share() == (0, 1)
