"""Meshes from one field, shardings from names, equal losses on all of them."""

import itertools
import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from frugax import kernels
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


def _losses(config, devices, steps=3, state=None):
  """Losses, last state and program; from this state, or a fresh one."""
  program = step.build(config, devices)
  tok = tokenizer.tokenizer('bytes')
  batches = data.train_batches(config.data, tok, batch_size=config.batch_size)
  with jax.set_mesh(program.layout.mesh):
    if state is None:
      state = program.init(jax.random.PRNGKey(0))
    else:
      state = jax.device_put(state, program.shardings)
    losses = []
    for _ in range(steps):
      state, metrics = program.train_step(state, program.put(next(batches)))
      losses.append(float(metrics['loss']))
  batches.close()
  return np.array(losses), state, program


@pytest.fixture(scope='module')
def on_one_device():
  """Of each optimizer: the state at the start, and the losses from there."""
  return {}


# All meshes with an optimizer that is quick to compile, some with one whose
# projections are cut over the mesh, too.
_SOME = [(1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 2, 2)]


@pytest.mark.parametrize(
  ('opt', 'sizes'),
  [
    pytest.param('adamw', sizes, marks=() if 8 in sizes else pytest.mark.slow)
    for sizes in SHAPES_OF_8
  ]
  + [('galore', sizes) for sizes in _SOME],
  ids=str,
)
def test_every_mesh_of_8_gives_the_losses_of_one_device(
  opt, sizes, make_config, on_one_device
):
  arguments = f'size=tiny,opt={opt}'
  kw = {'schedule__warmup_steps': 0, 'accumulation': 1}
  if opt == 'adamw':
    kw['model__vocab_size'] = 323  # which no axis divides
  if opt not in on_one_device:
    config = make_config(arguments, mesh='data=1', **kw)
    one = jax.devices()[:1]
    start = jax.device_get(step.build(config, one).init(jax.random.PRNGKey(0)))
    on_one_device[opt] = start, _losses(config, one)[0]
  start, want = on_one_device[opt]
  spec = ','.join(f'{a}={n}' for a, n in zip(mesh.AXES, sizes, strict=True))
  config = make_config(arguments, mesh=spec, **kw)
  losses, state, program = _losses(config, None, state=start)
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  assert losses[-1] < losses[0]  # it trains
  # What the shardings promise is what the step returns.
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
    state,
    program.shardings,
  )


def test_parameters_and_state_are_cut(make_config):
  config = make_config(mesh='fsdp=4,tensor=2')
  _, state, program = _losses(config, None, steps=1)
  # Born cut, with the numbers of one device.
  fresh = program.init(jax.random.PRNGKey(0))
  one = step.build(make_config(mesh='data=1'), jax.devices()[:1])
  jax.tree.map(
    np.testing.assert_array_equal, fresh, one.init(jax.random.PRNGKey(0))
  )
  q = state.params['layers']['attn']['q']['kernel']
  assert q.addressable_shards[0].data.size * 8 == q.size
  total = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
  here = sum(
    x.addressable_shards[0].data.nbytes
    for x in jax.tree.leaves(state.opt_state)
  )
  assert here < total / 4


def test_activations_are_cut(make_config):
  """Without the layout XLA keeps them whole, in three times the memory."""
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
  with mock.patch.multiple(
    mesh.Layout,
    constrain=lambda self, x, names: x,
    cross_entropy=lambda self, *operands, **options: (
      kernels.linear_cross_entropy(*operands, **options)
    ),
  ):
    whole = temporary_bytes(step.build(config))
  assert cut < 0.5 * whole


class Device(types.SimpleNamespace):
  """A device of a machine that is not there."""

  __hash__ = object.__hash__


def tpus(hosts, height=4, width=4, kind='TPU v5 lite', slice_index=0):
  """The chips of a described slice: a grid, each host with a 2 x 2 part."""
  found = [
    Device(
      id=slice_index * height * width + y * width + x,
      process_index=slice_index * hosts + y // 2 * (width // 2) + x // 2,
      slice_index=slice_index,
      coords=(x, y, 0),
      core_on_chip=0,
      platform='tpu',
      device_kind=kind,
    )
    for y in range(height)
    for x in range(width)
  ]
  return sorted(found, key=lambda device: (device.process_index, device.id))


def described(spec, devices):
  """The layout over such devices, of which jax could make no mesh."""
  sizes = mesh.parse_mesh(spec, len(devices))
  grid = mesh._arrange(tuple(sizes.values()), devices)
  return mesh.Layout(types.SimpleNamespace(shape=sizes, devices=grid), {})


def shares(layout):
  """Of each process (index, count) and its parts."""
  found = []
  for i in sorted({d.process_index for d in layout.mesh.devices.flat}):
    with mock.patch.object(jax, 'process_index', lambda i=i: i):
      found.append((layout.share(), layout.parts()))
  return found


def test_rows_are_shared_out_by_the_mesh():
  """Processes whose devices hold the same rows load the same rows."""

  def share(spec, n_processes):
    devices = [
      Device(process_index=i * n_processes // 8, id=i, platform='cpu')
      for i in range(8)
    ]
    for device in devices:
      device.device_kind = 'cpu'
    return [which for which, _ in shares(described(spec, devices))]

  assert share('fsdp=8', 4) == [(i, 4) for i in range(4)]
  assert share('data=2,tensor=4', 2) == [(0, 2), (1, 2)]
  assert share('data=2,tensor=4', 4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
  assert share('tensor=8', 4) == [(0, 1)] * 4
  assert mesh.make_layout('fsdp=8').share() == (0, 1)
  assert mesh.make_layout('fsdp=4,tensor=2').parts() == [0, 1, 2, 3]


def test_a_tpus_mesh_scatters_the_parts_of_a_process():
  """jax winds an axis through a v5e-16; each host still has its own share."""
  wound = shares(described('fsdp=-1', tpus(4)))
  assert [which for which, _ in wound] == [(i, 4) for i in range(4)]
  assert wound[0][1] == [0, 1, 6, 15]
  assert sorted(p for _, parts in wound for p in parts) == list(range(16))
  # A process has the same share, so the same rows, on other meshes.
  for spec in ('data=4,fsdp=4', 'fsdp=8,tensor=2', 'data=2,fsdp=4,context=2'):
    other = shares(described(spec, tpus(4)))
    assert [which for which, _ in other] == [(i, 4) for i in range(4)], spec
  # Two hosts of tensor parallelism: the same rows for both.
  assert shares(described('fsdp=4,tensor=4', tpus(4))) == [
    *[((0, 2), [0, 1])] * 2,
    *[((1, 2), [2, 3])] * 2,
  ]


def test_shares_merge_where_processes_meet_and_must_be_equal():
  def layout(*processes):
    devices = np.array([Device(process_index=i) for i in processes])
    grid = types.SimpleNamespace(
      shape={'data': 1, 'fsdp': 4}, devices=devices.reshape(1, 4, -1)
    )
    return mesh.Layout(grid, {})

  # A chain: 0 and 1 meet in part 1, 1 and 2 in part 2.
  assert shares(layout(0, 0, 0, 1, 1, 2, 2, 2)) == [
    ((0, 1), [0, 1, 2, 3]) for _ in range(3)
  ]
  # Shares are numbered by their processes, not by their parts.
  assert shares(layout(1, 1, 0, 0)) == [((0, 2), [2, 3]), ((1, 2), [0, 1])]
  with mock.patch.object(mesh.Layout, '__str__', lambda self: 'M'):
    with pytest.raises(ValueError, match=r'hold \[1, 3\] of the 4 parts'):
      shares(layout(0, 0, 0, 1))
    with pytest.raises(ValueError, match='process 0 has no device'):
      layout(1, 1, 1, 1).share()


@pytest.mark.parametrize(
  'spec', ['fsdp=16', 'data=2,fsdp=8', 'fsdp=8,tensor=2', 'fsdp=4,tensor=4']
)
def test_every_row_of_every_process_gets_to_one_part(spec):
  layout, length = described(spec, tpus(4)), 3
  n_parts = layout.mesh.shape['data'] * layout.mesh.shape['fsdp']
  size = 2  # rows of a part
  batch = np.full((n_parts * size, length), -1)
  for i in range(4):
    with mock.patch.object(jax, 'process_index', lambda i=i: i):
      (index, count), parts = layout.share(), layout.parts()
      n = n_parts * size // count
      rows = index * n + np.arange(n)[:, None] + np.zeros((n, length), int)
      program = types.SimpleNamespace(
        layout=types.SimpleNamespace(
          share=layout.share, parts=layout.parts, sharding=lambda *_: None
        )
      )
      with mock.patch.object(
        jax, 'make_array_from_callback', lambda shape, _, part: (shape, part)
      ):
        shape, part = step.Program.put(program, {'tokens': rows})['tokens']
    assert shape == batch.shape
    for p in parts:
      at = slice(p * size, (p + 1) * size)
      new = part((at, slice(1, None)))
      # Who shares a part has the same rows for it.
      assert (batch[at, 1:] == -1).all() or (batch[at, 1:] == new).all()
      batch[at, 1:] = new
  assert sorted(batch[:, 1]) == list(range(n_parts * size))


def test_axes_smaller_than_those_of_the_machine():
  """jax.make_mesh refuses this on a v6e, whose grid is 4 x 4."""
  layout = described('fsdp=8,tensor=2', tpus(4, kind='TPU v6 lite'))
  for pair in layout.mesh.devices.reshape(8, 2):
    a, b = (np.array(d.coords) for d in pair)
    assert np.abs(a - b).sum() == 1  # neighbours


def test_outer_axes_span_slices():
  devices = tpus(4) + tpus(4, slice_index=1)
  for spec, first in [
    ('data=2,fsdp=-1', 16),
    ('fsdp=-1', 16),
    ('fsdp=2,tensor=-1', 16),
  ]:
    grid = described(spec, devices).mesh.devices.reshape(-1)
    assert {d.slice_index for d in grid[:first]} == {0}, spec
  with pytest.raises(ValueError, match='the 3 slices do not divide'):
    described(
      'fsdp=16',
      [
        *tpus(1, 2, 2),
        *tpus(1, 2, 2, slice_index=1),
        *tpus(2, 2, 4, slice_index=2),
      ],
    )
