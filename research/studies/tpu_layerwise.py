"""What the layer-wise step saves, compiled for TPU chips.

    python research/studies/tpu_layerwise.py
    python research/studies/tpu_layerwise.py 7b     # rows with this in them

Needs the TPU's compiler, `pip install 'frugax[tpu]'`, and no TPU: the whole
training step of a config is compiled for one described chip, and its memory is
read from the program (`memory_analysis`). Nothing is run. One sequence of 2048
tokens, bfloat16 matmuls, a remat of every layer. A row of
1b takes half a minute on two cores, one of 7b three.

- LLaMA-1b with AdamW, weights and moments in float32, on one v5p chip (95 GiB):
  by how many of the gradients' bytes the layer-wise step lowers the peak, with
  the norm of each layer clipped (one backward pass) and with the global norm
  (two).
- LLaMA-7b with q_galore of rank 1024 and weights stored in int8, on one v5e
  chip (16 GiB), as configs/llama.py:size=7b,opt=q_galore,matmul=w8,data=c4
  with `--config.step=layerwise` trains it.
"""

import os

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU

import pathlib
import sys
import time

import jax
from jax.experimental import topologies

from frugax import config as fx_config
from frugax.train import step

_GIB = 2**30
_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'
_ADAM = 'size=1b,opt=adamw,data=c4'
_QGALORE = 'size=7b,opt=q_galore,matmul=w8,data=c4'
_BF16 = {'model.param_dtype': 'bfloat16'}
_LAYER = {'step': 'layerwise', 'layerwise.clip': 'layer'}

# name: topology, arguments, overrides
ROWS = {
  '1b adamw ordinary': ('v5p:2x2x1', _ADAM, {}),
  '1b adamw layer-wise': ('v5p:2x2x1', _ADAM, _LAYER),
  '1b adamw layer-wise global': ('v5p:2x2x1', _ADAM, {'step': 'layerwise'}),
  '7b q_galore w8 layer-wise': ('v5e:2x2', _QGALORE, _LAYER | _BF16),
  '7b q_galore w8 layer-wise global': (
    'v5e:2x2',
    _QGALORE,
    {'step': 'layerwise'} | _BF16,
  ),
}


def compiled(topology, arguments, overrides):
  """The step, and the bytes of the gradients that the optimizer sees."""
  values = {'batch_size': 1, 'data.sequence_length': 2048} | overrides
  argv = [f'--config={_CONFIG}:{arguments}', '--workdir=unused']
  argv += [f'--config.{k}={v}' for k, v in values.items()]
  config = fx_config.parse_command_line(argv, 'study')[0]
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices[:1]
  program = step.build(config, devices)
  shape = (1, 2048)
  sharding = program.layout.sharding(('batch', 'sequence'), shape)
  batch = {
    name: jax.ShapeDtypeStruct(shape, 'int32', sharding=sharding)
    for name in ('tokens', 'labels', 'segment_ids', 'positions')
  }
  gradients = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(program.shapes)
  )
  state = program.abstract_state()
  with jax.set_mesh(program.layout.mesh):
    return program.train_step.lower(state, batch).compile(), gradients


def main(wanted):
  rows = {}
  print(
    f'{"GiB":34}{"state":>8}{"temp":>8}{"peak":>8}{"saved":>8}  of gradients'
  )
  named = [name for name in ROWS if name in wanted]
  for name in named or ROWS:
    if not named and not all(word in name for word in wanted):
      continue
    row = ROWS[name]
    begin = time.time()
    program, gradients = compiled(*row)
    memory = program.memory_analysis()
    peak = memory.peak_memory_in_bytes
    rows[name] = peak
    line = f'{name:34}{memory.argument_size_in_bytes / _GIB:8.2f}'
    line += f'{memory.temp_size_in_bytes / _GIB:8.2f}{peak / _GIB:8.2f}'
    ordinary = rows.get('1b adamw ordinary')
    if ordinary and name.startswith('1b') and peak != ordinary:
      saved = ordinary - peak
      line += f'{saved / _GIB:8.2f}  {saved / gradients:.1%}'
    print(f'{line}   [compiled in {time.time() - begin:.0f} s]', flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
