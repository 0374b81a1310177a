"""The planner against the step that a run compiles, and its command line."""

import dataclasses
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from importlib import metadata

import jax
import numpy as np
import pytest

from frugax import config as fx_config
from frugax.models import llama
from frugax.plan import __main__ as command
from frugax.plan import compile as fx_compile
from frugax.plan import search, table, topologies
from frugax.train import step

_TINY = {
  'model.n_layers': 3,
  'model.dim': 32,
  'model.ffn': 44,
  'model.vocab_size': 64,
  'data.sequence_length': 16,
  'batch_size': 8,
}
_GALORE = {'optimizer.rank': 8, 'optimizer.projector': 'random'}


def _arguments(arguments, **overrides):
  return [
    f'--config=configs/llama.py:size=tiny,{arguments}',
    *(f'--config.{k}={v}' for k, v in {**_TINY, **overrides}.items()),
  ]


def _config(arguments='opt=adamw', **overrides):
  argv = [*_arguments(arguments, **overrides), '--workdir=unused']
  return fx_config.parse_command_line(argv, 'test')[0]


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('plans'))


@pytest.fixture(scope='module')
def galore(cache):
  """A config, and its plan for eight devices."""
  config = _config('opt=galore', mesh='fsdp=4,tensor=2', **_GALORE)
  return config, fx_compile.plan(config, 'cpu:8', cache)


@pytest.fixture(scope='module')
def layerwise(cache):
  """A config of the layer-wise step, and its plan for one device."""
  fields = {'step': 'layerwise', 'layerwise.clip': 'layer'}
  config = _config('opt=adamw,matmul=w8', **fields, mesh='data=1')
  return config, fx_compile.plan(config, 'cpu:1', cache)


@pytest.mark.parametrize(
  'which', ['galore', pytest.param('layerwise', marks=pytest.mark.slow)]
)
def test_the_plan_is_what_the_run_compiles(which, request):
  config, plan = request.getfixturevalue(which)
  program = step.build(config, jax.devices()[: plan.devices])
  state = program.init(jax.random.PRNGKey(0))
  ids = np.zeros((config.batch_size, 16), np.int32)
  batch = program.put(dict.fromkeys(fx_compile.BATCH, ids))
  with jax.set_mesh(program.layout.mesh):
    compiled = program.train_step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  assert plan.arguments == memory.argument_size_in_bytes
  assert plan.peak == memory.peak_memory_in_bytes
  assert plan.temporaries['total'] == memory.temp_size_in_bytes
  # What it says of the state is what lies there.
  devices = jax.tree.map(lambda x: x.addressable_shards[0].data.nbytes, state)
  assert sum(jax.tree.leaves(devices)) + sum(
    x.addressable_shards[0].data.nbytes for x in batch.values()
  ) == sum(plan.state.values())


def test_the_parts_add_up(galore):
  _, plan = galore
  t = plan.temporaries
  assert t['total'] == t['activations'] + t['gradients'] + t['rest']
  parts = (plan.arguments, t['total'], plan.outputs, plan.code)
  assert plan.needed == sum(parts)
  assert plan.arguments == sum(plan.state.values())  # CPUs do not pad
  assert plan.fits == (plan.needed <= plan.capacity)


def test_what_adamw_would_need(galore):
  """Weights, gradients and state of a run with it, as they lie there."""
  _, plan = galore
  program = step.build(_config('opt=adamw', mesh='fsdp=4,tensor=2'))
  state = program.init(jax.random.PRNGKey(0))

  def held(tree):
    arrays = jax.tree.map(lambda x: x.addressable_shards[0].data.nbytes, tree)
    return sum(jax.tree.leaves(arrays))

  found = plan.adamw['float32']
  assert found['weights'] == found['gradients'] == held(state.params)
  # The run's schedule counts steps as well.
  assert held(state.opt_state) - found['state'] in (0, 4)
  half = _config('opt=galore', **_GALORE, **{'model.param_dtype': 'bfloat16'})
  needed = fx_compile.adamw(step.build(half, jax.devices()[:1]))
  assert [*needed] == ['bfloat16', 'float32']
  for name in ('weights', 'gradients'):
    assert 2 * needed['bfloat16'][name] == needed['float32'][name]


def test_the_layers_keep_activations(galore):
  config, plan = galore
  # At least the input of each layer, of a device's two rows of 16 tokens.
  assert plan.temporaries['activations'] >= 4 * 3 * 2 * 16 * 32
  more = search.changed(config, model__n_layers=6)
  assert fx_compile.fingerprint(more, 'cpu:8') != fx_compile.fingerprint(
    config, 'cpu:8'
  )


def test_a_kept_plan_is_the_same(galore, cache, monkeypatch):
  config, plan = galore
  monkeypatch.setattr(fx_compile, '_compile', None)  # not to be called
  again = search.changed(config, seed=1, log__every=7)  # beside the program
  assert fx_compile.plan(again, 'cpu:8', cache) == plan
  with pytest.raises(TypeError):
    fx_compile.plan(search.changed(config, clip_norm=0.5), 'cpu:8', cache)


@pytest.mark.parametrize(
  ('package', 'matters'),
  [('jaxlib', True), ('optax', True), ('flax', True), ('tqdm', False)],
)
def test_a_plan_is_kept_until_what_makes_it_changes(
  package, matters, monkeypatch
):
  before = fx_compile.fingerprint(_config(), 'cpu:1')
  version = metadata.version

  def newer(name):
    return '99.0' if name == package else version(name)

  monkeypatch.setattr(metadata, 'version', newer)
  assert (fx_compile.fingerprint(_config(), 'cpu:1') != before) == matters


def test_a_plan_is_kept_by_the_settings_of_jax():
  before = fx_compile.fingerprint(_config(), 'cpu:1')
  with jax.default_matmul_precision('highest'):
    assert fx_compile.fingerprint(_config(), 'cpu:1') != before


def test_products_are_those_of_the_model():
  """6 N and attention, for each token, with the layers in a loop."""
  config = _config()
  plan = fx_compile.plan(config, 'cpu:1')
  model = llama.config(**config.model.to_dict())
  tokens = config.batch_size * 16
  expected = llama.flops_per_token(model, 16) * tokens
  assert fx_compile.model_flops(config, 1) == expected
  # Of so small a vocabulary, the logits are there for the backward pass.
  assert sum(plan.flops.values()) == expected
  assert plan.unknown == {'loops': 0, 'kernels': 0}


@pytest.mark.libtpu
def test_a_plan_for_tpus(tpu_plan):
  plan, config = tpu_plan
  assert plan['devices'] == 4
  assert plan['fits']
  assert plan['capacity'] == int(15.75 * 2**30)
  assert plan['arguments'] >= sum(plan['state'].values())
  assert plan['arguments'] < plan['peak']
  model = llama.config(**config.model.to_dict())
  tokens = config.batch_size * 128 / 4
  expected = llama.flops_per_token(model, 128) * tokens
  # The loss multiplies by the head once or twice more.
  head = 2 * tokens * model.dim * model.vocab_size
  found = sum(plan['flops'].values())
  assert expected + 0.99 * head <= found <= expected + 2.01 * head
  assert plan['unknown'] == {'loops': 0, 'kernels': 0}
  assert plan['collectives']['all-gather']['count'] >= 7 * 3
  assert plan['seconds']['step'] == max(plan['seconds'].values())


@pytest.fixture(scope='module')
def tpu_plan(tmp_path_factory):
  """In a process of its own, which libtpu may end."""
  overrides = {
    'data.sequence_length': 128,
    'model.dim': 128,
    'model.n_heads': 2,
    'model.n_kv_heads': 2,
    'model.ffn': 256,
    'model.vocab_size': 512,
    'model.dtype': 'bfloat16',
  }
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'frugax.plan', '--topology=v5e:2x2', '--json'),
      *_arguments('opt=adamw', **overrides),
      '--no_cache',
    ],
    capture_output=True,
    text=True,
    env=os.environ | {'XLA_FLAGS': ''},
  )
  assert done.returncode == 0, done.stderr
  assert 'compiling tiny' in done.stderr
  return json.loads(done.stdout), _config(**overrides)


def _run(capsys, *argv):
  level = logging.getLogger('frugax').level
  status = command.main([*argv])
  assert logging.getLogger('frugax').level == level
  return status, *capsys.readouterr()


def test_the_command_prints_only_json(capsys, galore, cache):
  _, plan = galore
  status, out, err = _run(
    capsys,
    *_arguments('opt=galore', mesh='fsdp=4,tensor=2', **_GALORE),
    *('--topology=cpu:8', '--json', f'--cache_dir={cache}'),
  )
  assert status == 0 and err == ''  # nothing was compiled
  assert fx_compile.Plan.from_dict(json.loads(out)) == plan


def test_the_command_prints_a_table(capsys, galore, cache):
  status, out, _ = _run(
    capsys,
    *_arguments('opt=galore', mesh='fsdp=4,tensor=2', **_GALORE),
    *('--topology=cpu:8', f'--cache_dir={cache}'),
  )
  assert status == 0
  _, plan = galore
  texts = ('optimizer moments', 'fits: ', 'adamw in float32 would hold ')
  for text in (*texts, table.size(plan.needed)):
    assert text in out
  dear = {**plan.dear, 'bytes': 2 * plan.bytes, 'unknown': 7}
  text = table.one(dataclasses.replace(plan, dear=dear))
  assert '(7 loops of unknown length in them count once)' in text


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--topology=v5e:3x3'], "unknown topology 'v5e:3x3': did you mean 'v5e:"),
    (['--topology=v7e:2x2'], 'Valid: '),
    (['--topology=cpu:0'], 'give 1 or more'),
    (['--topology=cpu:99'], 'device_count=99'),
    (['--topology=cpu:8', '--config.batch_size=4'], 'use a multiple of 8'),
    (['--topology=cpu:8', '--config.bach_size=4'], "'batch_size'"),
    (['--topology=cpu:8', '--bach=4'], 'unknown argument'),
    (['--topology=cpu:8', '--compare', 'opt'], 'name=value'),
    (['--topology=cpu:8', '--compare', 'opt=adamq'], 'adam'),
    (
      ['--topology=cpu:8', '--search=batch', '--compare', 'opt=adamw'],
      'not both',
    ),
  ],
)
def test_errors_are_one_line(capsys, argv, message):
  jax.devices()  # or the number of the CPU's could still be chosen
  status, out, err = _run(capsys, *_arguments('opt=adamw'), *argv, '--no_cache')
  assert status == 2
  assert message in err and err.startswith('error: ')
  assert len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize(
  ('name', 'module', 'extra'),
  [('v5e:2x2', 'libtpu', 'tpu'), ('h200', 'jax_plugins', 'cuda')],
)
def test_a_missing_compiler_names_its_extra(monkeypatch, name, module, extra):
  find = importlib.util.find_spec

  def without(wanted):
    if wanted.startswith(f'{module}.'):  # below a package that is not there
      raise ModuleNotFoundError(wanted)
    return None if wanted == module else find(wanted)

  monkeypatch.setattr('importlib.util.find_spec', without)
  with pytest.raises(ValueError, match=rf'frugax\[{extra}\]'):
    topologies.check(name)


class _Fake:
  """A planner for a memory that grows with the batch, and counts its calls."""

  def __init__(self, plan, fixed, row, capacity):
    self.plan, self.calls = plan, []
    self.fixed, self.row, self.capacity = fixed, row, capacity

  def __call__(self, config):
    needed = self.fixed + self.row * config.batch_size
    self.calls.append(config.batch_size)
    return dataclasses.replace(self.plan, needed=needed, capacity=self.capacity)


@pytest.mark.parametrize('capacity', [99, 100 + 8, 1000, 7777])
def test_the_largest_batch_is_found(galore, capacity):
  config, plan = galore  # batches are multiples of 4
  fake = _Fake(plan, fixed=100, row=2, capacity=capacity)
  tried, best = search.search('batch', config, 'cpu:8', fake)
  largest = (capacity - 100) // 2 // 4 * 4
  if largest < 4:
    assert best is None
  else:
    # Exact up to a sixteenth; memory that is linear in rows is hit exactly.
    assert best.config.batch_size == largest
  assert len(fake.calls) == len(set(fake.calls)) == len(tried) <= 14


def test_the_cheapest_policy_that_fits(galore):
  config, plan = galore

  def planner(config):
    policy = config.model.remat
    flops = {'none': 1.0, 'full': 3.0}.get(policy, 2.0)
    needed = {'none': 900, 'dots': 500}.get(policy, 700 - 100 * flops)
    return dataclasses.replace(
      plan, needed=int(needed), capacity=600, flops={'float32': flops}
    )

  tried, best = search.search('remat', config, 'cpu:8', planner)
  assert [t.name for t in tried] == [f'remat={p}' for p in llama.REMAT]
  assert best.plan.flops == {'float32': 2.0}
  assert best.plan.needed == 500


def test_policies_of_the_layerwise_step_are_those_that_differ(galore):
  _, plan = galore
  config = _config('opt=sgd', step='layerwise')
  tried, _ = search.search('remat', config, 'cpu:1', lambda _: plan)
  assert [t.name for t in tried] == ['remat=inputs', 'remat=full']

  def program(remat):
    built = step.build(
      search.changed(config, model__remat=remat), jax.devices()[:1]
    )
    batch = fx_compile.abstract_batch(config, built)
    with jax.set_mesh(built.layout.mesh):
      return built.train_step.lower(built.abstract_state(), batch).as_text()

  full = program('full')
  assert program('none') == full != program('inputs')


@pytest.mark.parametrize(
  ('overrides', 'devices', 'message'),
  [
    ({'batch_size': 2}, 8, r'batch_size=2, .*n_kv_heads=2;.*multiple of 4,'),
    (
      {'batch_size': 4, 'accumulation': 2, 'model.n_kv_heads': 1},
      8,
      r'batch_size=4, accumulation=2\).*n_kv_heads=1;.*multiple of 16,',
    ),
    (
      {'model.n_heads': 8, 'model.n_kv_heads': 8, 'batch_size': 1},
      16,
      r'no mesh of 16 .*n_kv_heads=8; use a batch_size .* multiple of 2,',
    ),
  ],
)
def test_a_search_without_a_mesh_says_why(
  overrides, devices, message, monkeypatch
):
  monkeypatch.setattr(topologies, 'devices', lambda _: range(devices))
  config = _config('opt=sgd', **overrides)
  with pytest.raises(ValueError, match=message) as error:
    search.search('mesh', config, 'described', None)
  assert fx_config.is_ours(error.value)
  least = int(re.search(r'multiple of (\d+)', str(error.value))[1])
  assert search.meshes(search.changed(config, batch_size=least), devices)


def test_meshes_are_those_that_can_run():
  config = _config()
  found = search.meshes(config, 8)
  assert 'fsdp=8' in found
  assert 'fsdp=4,tensor=2' in found
  assert 'tensor=8' not in found  # there are two heads of keys
  for spec in found:
    step.build(search.changed(config, mesh=spec), jax.devices()[:8])
