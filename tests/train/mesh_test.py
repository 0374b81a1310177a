"""Meshes from one field, shardings from names, equal losses on all of them."""

import itertools

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
