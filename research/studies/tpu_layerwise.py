r"""What the layer-wise step saves, compiled for TPU chips.

    python research/studies/tpu_layerwise.py
    python research/studies/tpu_layerwise.py 7b     # rows with this in them

Needs the TPU's compiler, `pip install 'frugax[tpu]'`, and no TPU: the whole
training step of a config is compiled for one described chip, and its memory is
read from the program (`memory_analysis`). Nothing is run. Micro-batches of one
sequence of 2048 tokens, one of them where no number is given, bfloat16 matmuls,
a remat of every layer. A row of 1b takes half a minute on two cores, one of 7b
three. `peak` is of live memory the most at one time, the host's counted, too.

- LLaMA-1b with AdamW, weights and moments in float32, on one v5p chip (95 GiB):
  by how many of the gradients' bytes the layer-wise step lowers the peak, with
  the norm of each layer clipped (one backward pass) and with the global norm
  (two).
  With the optimizer's state in the host's memory, too.
- LLaMA-7b with q_galore of rank 1024 and weights stored in int8, on one v5e
  chip (16 GiB), as this trains it:
    python -m frugax.train --workdir=runs/7b \
      --config=configs/llama.py:size=7b,opt=q_galore,matmul=w8,data=c4 \
      --config.step=layerwise --config.layerwise.clip=layer \
      --config.model.param_dtype=bfloat16 --config.batch_size=1 \
      --config.data.sequence_length=2048 --config.eval.batch_size=1
  With 1, 4 and 16 micro-batches, the inputs of the layers kept on the device
  and in the host's memory.
- What accumulators of gradients would take on the device instead, counted on
  the shapes of the same model.
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
from frugax.plan import buffers
from frugax.plan import compile as fx_compile
from frugax.train import step

_GIB = 2**30
_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'
_ADAM = 'size=1b,opt=adamw,data=c4'
_QGALORE = 'size=7b,opt=q_galore,matmul=w8,data=c4'
_BF16 = {'model.param_dtype': 'bfloat16'}
_LAYER = {'step': 'layerwise', 'layerwise.clip': 'layer'}
_STATE = {'opt_state': 'pinned_host'}

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
  '1b adamw ordinary, state in pinned_host': ('v5p:2x2x1', _ADAM, _STATE),
  '1b adamw layer-wise, state in pinned_host': (
    'v5p:2x2x1',
    _ADAM,
    _LAYER | _STATE,
  ),
}
for _count in (1, 4, 16):
  for _memory in ('device', 'pinned_host'):
    if (_count, _memory) == (1, 'device'):
      continue  # is above
    _micros = {
      'batch_size': _count,
      'accumulation': _count,
      'layerwise.inputs': _memory,
    }
    ROWS |= {
      f'1b adamw {_count} inputs on {_memory}': (
        'v5p:2x2x1',
        _ADAM,
        _LAYER | _micros,
      ),
      f'7b q_galore w8 {_count} inputs on {_memory}': (
        'v5e:2x2',
        _QGALORE,
        _LAYER | _BF16 | _micros,
      ),
    }


def parse(arguments, overrides):
  """The config of a row."""
  values = {'batch_size': 1, 'data.sequence_length': 2048} | overrides
  argv = [f'--config={_CONFIG}:{arguments}', '--workdir=unused']
  argv += [f'--config.{k}={v}' for k, v in values.items()]
  return fx_config.parse_command_line(argv, 'study')[0]


def build(topology, config):
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices[:1]
  return step.build(config, devices)


def compiled(topology, arguments, overrides):
  """The step, and the bytes of the gradients that the optimizer sees."""
  config = parse(arguments, overrides)
  program = build(topology, config)
  batch = fx_compile.abstract_batch(config, program)
  gradients = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(program.shapes)
  )
  state = program.abstract_state()
  with jax.set_mesh(program.layout.mesh):
    return program.train_step.lower(state, batch).compile(), gradients


def accumulators():
  """What would be added up over micro-batches instead, and its GiB.

  Those of a low-rank method have the shapes of its first moments. The codes of
  8 bits have a scale in float32 for 256 of them.
  """
  config = parse(_QGALORE.replace('q_galore', 'galore'), _BF16)
  program = build('v5e:2x2', config)
  whole = sum(x.size for x in jax.tree.leaves(program.shapes))
  small = sum(
    x.size
    for path, x in jax.tree.leaves_with_path(program.abstract_state().opt_state)
    if any(getattr(key, 'name', '') == 'mu' for key in path)
  )
  rank = config.optimizer.rank
  return {
    f'7b rank {rank}, float32': 4 * small / _GIB,
    f'7b rank {rank}, bfloat16': 2 * small / _GIB,
    '7b whole, bfloat16': 2 * whole / _GIB,
    '7b whole, 8 bits': (1 + 4 / 256) * whole / _GIB,
  }


def main(wanted):
  rows = {}
  print(
    f'{"GiB":42}{"state":>8}{"temp":>8}{"host":>8}{"peak":>8}{"saved":>8}'
    '  of gradients'
  )
  named = [name for name in ROWS if name in wanted]
  for name in named or ROWS:
    if not named and not all(word in name for word in wanted):
      continue
    row = ROWS[name]
    begin = time.time()
    try:
      program, gradients = compiled(*row)
    except jax.errors.JaxRuntimeError as e:
      need = buffers.needed(str(e))
      if not need:
        raise
      need, has = (x / _GIB for x in need)
      print(f'{name:42}does not fit: needs {need:.2f} of {has:.2f}', flush=True)
      continue
    memory = program.memory_analysis()
    peak = memory.peak_memory_in_bytes
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    rows[name] = peak
    line = f'{name:42}' + ''.join(
      f'{x / _GIB:8.2f}'
      for x in (
        *(memory.argument_size_in_bytes, memory.temp_size_in_bytes),
        *(host, peak),
      )
    )
    ordinary = rows.get('1b adamw ordinary')
    if ordinary and name.startswith('1b') and peak != ordinary:
      saved = ordinary - peak
      line += f'{saved / _GIB:8.2f}  {saved / gradients:.1%}'
    print(f'{line}   [compiled in {time.time() - begin:.0f} s]', flush=True)
  if not wanted or 'accumulators' in wanted:
    for name, size in accumulators().items():
      print(f'accumulators {name:25}{size:8.2f}')


if __name__ == '__main__':
  main(sys.argv[1:])
