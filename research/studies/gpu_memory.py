"""What a training step takes of a GPU's memory, and what was said before.

    python research/studies/gpu_memory.py          # with a GPU
    python research/studies/gpu_memory.py --tiny   # anywhere, without a measure

LLaMA-60m, 128 x 256 tokens, by two optimizers. The step is compiled for the GPU
at hand; what its compiler says it needs (as `frugax.plan` does) is compared
with the largest sum of allocations of a process that makes a state and takes
three steps with it. Each has a process of its own, whose memory nothing else
has used. Random tokens: the same shapes as real ones.
"""

import argparse
import json
import subprocess
import sys

import jax
import numpy as np

from frugax.config import load
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


def config_of(name, tiny):
  arguments, fields = CONFIGS[name]
  if tiny:
    arguments = arguments.replace('60m', 'tiny')
  config = load(f'configs/llama.py:{arguments}')
  with config.unlocked():
    config.update_from_flattened_dict(fields)
    config.batch_size = 8 if tiny else 128
  return config


def measure(name, tiny):
  """Bytes that the compiler says, and that were in use at most."""
  config = config_of(name, tiny)
  device = jax.devices()[0]
  program = step.build(config, [device])
  batch = planning.abstract_batch(config, program)
  with jax.set_mesh(program.layout.mesh):
    compiled = program.train_step.lower(
      program.abstract_state(), batch
    ).compile()
    memory = compiled.memory_analysis()
    state = program.init(jax.random.PRNGKey(0))
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
    loss = float(metrics['loss'])
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  stats = device.memory_stats() or {}
  return {
    'name': name,
    'arguments': memory.argument_size_in_bytes,
    'needed': memory.argument_size_in_bytes + memory.temp_size_in_bytes + new,
    'peak': memory.peak_memory_in_bytes,
    'measured': stats.get('peak_bytes_in_use'),
    'loss': loss,
    'device': device.device_kind,
    'jax': jax.__version__,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--only', choices=list(CONFIGS))
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
    rows.append(json.loads(done.stdout.splitlines()[-1]))
  print(f'{rows[0]["device"]}, jax {rows[0]["jax"]}; MiB')
  print(
    '| optimizer | arguments | needed | peak by the compiler | measured | |'
  )
  print('| --- | --- | --- | --- | --- | --- |')
  for row in rows:
    sizes = [row[key] for key in ('arguments', 'needed', 'peak', 'measured')]
    shown = [f'{x / 2**20:.1f}' if x else 'none' for x in sizes]
    off = f'{sizes[3] / sizes[2] - 1:+.1%}' if sizes[3] else ''
    print(f'| {row["name"]} | {" | ".join(shown)} | {off} |')


if __name__ == '__main__':
  main()
