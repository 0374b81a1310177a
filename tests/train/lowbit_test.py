"""Low-bit models on eight devices: the same training as on one."""

import json
import sys

import jax
import numpy as np
import pytest

from frugax import lowbit, quant
from frugax.lowbit import keys
from frugax.train import loop, mesh, signals, step


def _batch(config):
  shape = (config.batch_size, config.data.sequence_length)
  tokens = np.random.default_rng(0).integers(0, 264, shape, np.int32)
  return {
    'tokens': tokens,
    'labels': np.roll(tokens, -1, 1),
    'segment_ids': np.ones_like(tokens),
    'positions': np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
  }


def _train(config, devices=None, steps=2):
  program = step.build(config, devices)
  batch, rows = _batch(config), []
  with jax.set_mesh(program.layout.mesh):
    state = program.init(jax.random.PRNGKey(0))
    for _ in range(steps):
      state, metrics = program.train_step(state, program.put(batch))
      rows.append({k: float(v) for k, v in jax.device_get(metrics).items()})
  return rows, state, program


@pytest.mark.slow
@pytest.mark.parametrize('matmul', ['coat', 'w8'])
def test_sharded_equals_one_device(matmul, make_config):
  """Rows, weights, and what the linears round, cut over fsdp and tensor."""
  kw = {'schedule__warmup_steps': 0, 'data__sequence_length': 16}
  arguments = f'size=tiny,opt=adamw,matmul={matmul}'
  want, one, _ = _train(
    make_config(arguments, mesh='data=1', **kw), jax.devices()[:1]
  )
  got, state, program = _train(
    make_config(arguments, mesh='fsdp=4,tensor=2', **kw)
  )
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
    state,
    program.shardings,
  )
  # A sum in another order rounds a few numbers to their other neighbour.
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-4)
  assert want[1]['loss'] < want[0]['loss']
  if matmul == 'coat':
    plain, _, _ = _train(
      make_config('size=tiny,opt=adamw', mesh='data=1', **kw),
      jax.devices()[:1],
      steps=1,
    )
    # Rounding is felt, and more than the mesh is.
    assert abs(plain[0]['grad_norm'] / want[0]['grad_norm'] - 1) > 3e-4
    return
  gate = state.params['layers']['mlp']['gate']['kernel']
  assert isinstance(gate, quant.QTensor)
  # Codes are cut over all devices, 32 x 44 of them in each of 2 layers.
  assert gate.data.addressable_shards[0].data.size == 2 * 32 * 44 // 8
  for a, b in zip(
    jax.tree.leaves(lowbit.load_weights(jax.device_get(state.params))),
    jax.tree.leaves(lowbit.load_weights(jax.device_get(one.params))),
    strict=True,
  ):
    error = np.abs(np.asarray(a) - np.asarray(b))
    assert np.mean(error > 1e-6) < 0.02
    assert error.max() < np.ptp(np.asarray(b)) / 100


@pytest.mark.slow
def test_random_bits_are_those_of_one_device(make_config):
  """In the gradients, too: losses hide them. With layers computed again."""
  kw = {'accumulation': 2, 'data__sequence_length': 16}
  kw['model__dtype'] = 'float32'  # in which sums over devices travel

  def first(mesh, remat, devices=None):
    fields = {'mesh': mesh, 'model__remat': remat, **kw}
    config = make_config('size=tiny,opt=adamw,matmul=int8', **fields)
    rows, state, _ = _train(config, devices, steps=1)
    moments = jax.tree.leaves(jax.device_get(state.opt_state))
    return rows[0], [x for x in moments if getattr(x, 'ndim', 0) > 2]

  want, moments = first('data=1', 'none', jax.devices()[:1])
  got, others = first('fsdp=4,tensor=2', 'full')
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-5)
  np.testing.assert_allclose(got['grad_norm'], want['grad_norm'], rtol=1e-4)
  errors = [
    np.linalg.norm(a - b) / np.linalg.norm(a)
    for a, b in zip(moments, others, strict=True)
  ]
  # What crosses an edge moves others after it; other bits would move 2e-2.
  assert np.mean(errors) < 7e-3


@pytest.mark.parametrize('matmul', ['int8', 'jetfire', 'mxfp4', 'nvfp4'])
def test_all_random_bits_come_from_the_step(matmul, make_config, monkeypatch):
  def refuse(x):
    raise AssertionError(f'a key from the bits of {x}')

  monkeypatch.setattr(keys, 'content_key', refuse)
  flow = sys.modules['frugax.lowbit.flow']  # not the function of that name
  monkeypatch.setattr(flow, 'content_key', refuse)
  config = make_config(
    f'size=tiny,opt=adamw,matmul={matmul}',
    mesh='data=1',
    model__matmul_head=matmul,
    accumulation=2,
  )
  program = step.build(config, jax.devices()[:1])
  program.train_step.trace(program.abstract_state(), _batch(config))
  # Without a key, as in evaluation, there is no other source.
  with pytest.raises(AssertionError, match='a key from the bits'):
    jax.eval_shape(
      jax.grad(
        lambda p: program.model.apply(p, _batch(config)['tokens']).sum()
      ),
      program.abstract_state().params,
    )


def test_codes_are_gathered_along_embed_alone():
  layout = mesh.make_layout('fsdp=4,tensor=2')
  names = ('mlp', 'embed', None)
  x = np.arange(6 * 8 * 2, dtype=np.int8).reshape(6, 8, 2)
  cut = jax.device_put(x, layout.sharding(names, x.shape))
  y = jax.jit(lambda x: layout.gather(x, names))(cut)
  np.testing.assert_array_equal(y, x)
  assert y.dtype == np.int8
  assert y.addressable_shards[0].data.shape == (3, 8, 2)


@pytest.mark.slow
def test_int8_weights_resume_bit_for_bit(make_config, tmp_path, monkeypatch):
  """Q-GaLore whole: its optimizer, and weights with no copy in more bits."""
  config = make_config(
    'size=tiny,opt=q_galore,matmul=w8',
    mesh='data=1',
    steps=3,
    optimizer__rank=4,
    optimizer__update_interval=2,
  )
  assert config.rounding == 'stochastic'
  devices = jax.devices()[:1]
  for folder, stops in (('whole', [None]), ('parts', [2, None])):
    for stop in stops:
      monkeypatch.setattr(
        signals.StopSignal, 'requested', lambda _, done, n=stop: done == n
      )
      loop.train(config, tmp_path / folder, devices=devices)
  whole, parts = (
    [json.loads(line) for line in (tmp_path / f / 'metrics.jsonl').open()]
    for f in ('whole', 'parts')
  )
  assert len(whole) == len(parts)
  for a, b in zip(whole, parts, strict=True):
    for key in ('step', 'loss', 'eval_loss', 'grad_norm', 'param_norm'):
      assert a.get(key) == b.get(key)
