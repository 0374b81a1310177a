"""Arrays in the memory of the host: moved there and back, on CPUs and TPUs."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.plan import environment
from frugax.train import memory, step


@pytest.mark.parametrize('kind', memory.KINDS)
def test_stacks_hold_what_is_put(kind):
  where = memory.Memory(kind)
  xs = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)

  @jax.jit
  def there_and_back(xs):
    stack = where.empty((3, 5, 7), xs.dtype)
    stack = jax.lax.fori_loop(
      0, 3, lambda i, stack: where.put(stack, i, xs[i]), stack
    )
    return jnp.stack([where.get(stack, i) for i in (2, 0, 1)])

  np.testing.assert_array_equal(there_and_back(xs), xs[[2, 0, 1]])


def test_devices_without_that_memory_are_refused():
  device = types.SimpleNamespace(
    device_kind='abacus',
    addressable_memories=lambda: [types.SimpleNamespace(kind='device')],
  )
  with pytest.raises(
    ValueError, match=r"inputs='pinned_host'.*abacus.*\['device'\].*'device'"
  ):
    memory.check('inputs', 'pinned_host', [device])


def _batch(program, config, rng):
  shape = (config.batch_size, config.data.sequence_length)
  tokens = rng.integers(0, 264, shape, np.int32)
  return program.put(
    {
      'tokens': tokens,
      'labels': np.roll(tokens, -1, 1),
      'segment_ids': np.ones_like(tokens),
      'positions': np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    }
  )


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('adamw', {'step': 'layerwise', 'mesh': 'data=1'}),
    pytest.param(
      'q_galore',
      {'step': 'layerwise', 'layerwise__clip': 'layer'},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'adamw',
      {'step': 'layerwise', 'skip_nonfinite': True},
      marks=pytest.mark.slow,
    ),
    pytest.param('galore', {'skip_nonfinite': True}, marks=pytest.mark.slow),
  ],
)
def test_the_state_is_in_the_hosts_memory_and_has_the_same_bits(
  name, options, make_config
):
  def train(where):
    values = {'mesh': 'fsdp=4,tensor=2', 'opt_state': where} | options
    config = make_config(f'size=tiny,opt={name}', **values)
    one = config.mesh == 'data=1'
    program = step.build(config, jax.devices()[: 1 if one else 8])
    rng, rows = np.random.default_rng(0), []
    with jax.set_mesh(program.layout.mesh):
      state = program.init(jax.random.PRNGKey(0))
      kinds = [x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state)]
      for _ in range(4):
        batch = _batch(program, config, rng)
        state, metrics = program.train_step(state, batch)
        rows.append(metrics)
    after = [x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state)]
    assert after == kinds
    return jax.device_get((state, rows)), kinds

  want, _ = train('device')
  got, kinds = train('pinned_host')
  jax.tree.map(np.testing.assert_array_equal, got, want)
  large = [x.nbytes >= 4096 for x in jax.tree.leaves(got[0].opt_state)]
  assert any(large) and large == [kind == 'pinned_host' for kind in kinds]


COMPILE = """
import re, sys
from jax.experimental import topologies
import jax
from frugax import config as fx_config
from frugax.plan import compile
from frugax.train import step

devices = topologies.get_topology_desc(
  platform='tpu', topology_name='v5e:2x2'
).devices[:2]
for count in (2, 6):
  argv = [*sys.argv[1:], f'--config.accumulation={count}']
  argv += [f'--config.batch_size={2 * count}']
  config = fx_config.parse_command_line(argv, 'test')[0]
  program = step.build(config, devices)
  batch = compile.abstract_batch(config, program)
  state = program.abstract_state()
  with jax.set_mesh(program.layout.mesh):
    compiled = program.train_step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  # Its name of the host's memory is S(5).
  name = rf'bf16\\[(?:{5 * count}|{count}),1,512,256\\]{{[^}}]*}}'
  stacks = re.findall(name, compiled.as_text())
  assert stacks
  print(
    memory.host_temp_size_in_bytes,
    memory.host_argument_size_in_bytes,
    len([x for x in stacks if 'S(5)' not in x]),
  )
"""


@pytest.mark.slow
@pytest.mark.libtpu
def test_what_a_tpu_holds_does_not_grow_with_the_micro_batches(command_line):
  """By its compiler: inputs of layers and Adam's state are in the host."""
  argv = command_line(
    'unused',
    'size=tiny,opt=adamw',
    **{'step': 'layerwise', 'layerwise.inputs': 'pinned_host'},
    **{'opt_state': 'pinned_host', 'mesh': 'fsdp=2', 'model.n_layers': 4},
    **{'model.dim': 256, 'data.sequence_length': 512},
    **{'model.ffn': 512, 'model.dtype': 'bfloat16'},
  )
  done = subprocess.run(
    [sys.executable, '-c', COMPILE, *argv],
    env=os.environ | environment.TPU,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  few, many = (map(int, line.split()) for line in done.stdout.splitlines())
  inputs, state, there = few
  more_inputs, more_state, more_there = many
  assert state == more_state > 4 * 8 * 256 * 512 * 3 / 2
  # Of each micro-batch the five inputs and one gradient.
  assert more_inputs - inputs >= 4 * 6 * 512 * 256 * 2
  assert there == more_there == 0
