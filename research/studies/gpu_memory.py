"""What a training step takes of a GPU's memory, and what the planner says.

    python research/studies/gpu_memory.py          # with a GPU
    python research/studies/gpu_memory.py --tiny   # anywhere, without a measure

LLaMA-60m, 128 x 256 tokens, by two optimizers. Of each, by processes of their
own, whose memory nothing else has used:

- planned: the peak that `python -m frugax.plan` says, which compiles for a
  described GPU of the kind at hand (an H100 or H200, or `--topology`), and so
  without choosing among kernels by timing them;
- compiled: what `memory_analysis` says of the run's own program, compiled for
  the GPU itself;
- measured: the most bytes that were in use when the step had been compiled
  (kernels are timed then), when a state had been made, and after three steps.

A measure is the largest since the process began. If it does not rise in the
steps they took no more than what came before, and it is only a bound of what
they took. Random tokens: the same shapes as real ones.
"""

import argparse
import json
import subprocess
import sys

import jax
import numpy as np

from frugax import config as fx_config
from frugax.plan import compile as planning
from frugax.train import step

CONFIGS = {
  'adamw': ('size=60m,opt=adamw,data=c4', {}),
  'q_galore, layer-wise, int8 weights': (
    'size=60m,opt=q_galore,matmul=w8,data=c4',
    {
      'step': 'layerwise',
      'layerwise.clip': 'layer',
      'model.param_dtype': 'bfloat16',
      'optimizer.projector': 'sketch',
    },
  ),
}
MEASURES = ('after compiling', 'after init', 'after steps')


def arguments(name, tiny):
  """A config and its changes, as on a command line."""
  file, fields = CONFIGS[name]
  if tiny:
    file = file.replace('60m', 'tiny')
  fields = fields | {'batch_size': 8 if tiny else 128, 'mesh': 'data=1'}
  return f'configs/llama.py:{file}', [
    f'--config.{key}={value}' for key, value in fields.items()
  ]


def topology_of(kind):
  """The planner's name of a kind of device."""
  for name in ('cpu', 'h100', 'h200'):
    if name in kind.lower():
      return 'cpu:1' if name == 'cpu' else name
  raise ValueError(
    f'no topology describes a {kind!r}: give --topology, one that is like it'
  )


def planned(name, tiny, topology):
  """The plan of `python -m frugax.plan`, as a dict."""
  file, changes = arguments(name, tiny)
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'frugax.plan', f'--config={file}', *changes),
      *(f'--topology={topology}', '--json', '--no_cache'),
    ],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def measure(name, tiny):
  """Bytes that the run's program needs, and that were in use at most."""
  file, changes = arguments(name, tiny)
  config = fx_config.load(file)
  fx_config.override_all(config, changes)
  device = jax.devices()[0]
  program = step.build(config, [device])
  batch = planning.abstract_batch(config, program)
  used = {}

  def note(what, arrays):
    jax.block_until_ready(arrays)
    stats = device.memory_stats() or {}
    used[what] = stats.get('peak_bytes_in_use')

  with jax.set_mesh(program.layout.mesh):
    compiled = program.train_step.lower(
      program.abstract_state(), batch
    ).compile()
    note('after compiling', ())
    memory = compiled.memory_analysis()
    state = program.init(jax.random.PRNGKey(0))
    note('after init', state)
    rng = np.random.default_rng(0)
    shape = batch['tokens'].shape
    values = {
      'tokens': rng.integers(
        0, program.model.config.vocab_size, shape, np.int32
      ),
      'segment_ids': np.ones(shape, np.int32),
      'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }
    values['labels'] = np.roll(values['tokens'], -1, 1)
    for _ in range(3):
      state, metrics = compiled(state, program.put(values))
    note('after steps', (state, metrics))
  return {
    'peak': memory.peak_memory_in_bytes,
    **used,
    'loss': float(metrics['loss']),
    'device': device.device_kind,
    'jax': jax.__version__,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--topology', help='instead of that of the GPU at hand')
  parser.add_argument('--only', choices=list(CONFIGS), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.only:
    print(json.dumps(measure(args.only, args.tiny)))
    return
  rows = []
  for name in CONFIGS:
    command = [sys.executable, __file__, '--only', name]
    command += ['--tiny'] * args.tiny
    done = subprocess.run(
      command, stdout=subprocess.PIPE, text=True, check=True
    )
    row = json.loads(done.stdout.splitlines()[-1])
    topology = args.topology or topology_of(row['device'])
    plan = planned(name, args.tiny, topology)
    rows.append(row | {'name': name, 'planned': plan['peak']})
  print(f'{rows[0]["device"]}, jax {rows[0]["jax"]}, plan of {topology}; MiB')
  print(
    f'| optimizer | planned | compiled | {" | ".join(MEASURES)} |'
    ' measured / planned |'
  )
  print('| --- ' * 7 + '|')
  for row in rows:
    sizes = [row[key] for key in ('planned', 'peak', *MEASURES)]
    shown = [f'{x / 2**20:.1f}' if x else 'none' for x in sizes]
    shown.append(f'{sizes[-1] / sizes[0]:.3f}' if sizes[-1] else 'none')
    print(f'| {row["name"]} | {" | ".join(shown)} |')


if __name__ == '__main__':
  main()
