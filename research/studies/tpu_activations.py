"""What low-bit residuals save of the activations of a step on 16 TPU chips.

    python research/studies/tpu_activations.py
    python research/studies/tpu_activations.py 'inputs bf16' 'inputs coat'

Needs the TPU's compiler, `pip install 'frugax[tpu]'`, and no TPU: the training
step of LLaMA-1b (AdamW, bfloat16 products, float32 parameters cut over fsdp=16)
is compiled for a described v5e:4x4, and its memory is read. No number here is
measured on a chip. A variant takes one to four minutes on two cores.

The batch is fixed, 96 sequences of 256 tokens, so 1536 tokens a chip. A variant
is a remat policy and what it is compared with: a recipe of the linears, and
what norms and SwiGLU keep (`model.activations`), 'as is' for their inputs in
bfloat16. Under the policy 'inputs' linears, norms, SwiGLU and attention keep
what they are given, once, and nothing else but the weights in bfloat16; under
'none' nothing is recomputed, so that attention's probabilities stay in float32
and bfloat16 and its mask as booleans. The table has, in MiB on each chip,

- all temporaries, and the program's peak, with the arguments,
- the layers' activations: what the compiler's buffer assignment keeps in
  temporary HBM with a leading axis of layers, and which is no kernel's. The
  rest of the temporaries has the gradients, the weights in bfloat16, the logits
  and what one layer needs while it is computed,
- bytes of the activations for each token and layer,
- how many times less the activations and all temporaries are than bfloat16's.

`--list` prints each variant's activations, which arrays and how many.
"""

import os

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU | {
  # It would return programs without compiling, and so without dumps.
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
}

import argparse
import collections
import dataclasses
import math
import pathlib
import re
import tempfile
import time

import jax
import numpy as np
from jax.experimental import topologies

from frugax import config as fx_config
from frugax.models import llama
from frugax.train import metrics, step

_MIB = 2**20
_TOPOLOGY, _CHIPS = 'v5e:4x4', 16
_BATCH, _LENGTH = 96, 256
_TOKENS = _BATCH * _LENGTH // _CHIPS
_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'
_VALUE = re.compile(
  r'^ value: .*\(size=(\d+),offset=(\d+)\): (\w+)\[([\d,]*)\]'
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """What stays for the backward pass, and in how many bits.

  Attributes:
    remat: the policy.
    matmul: recipe of the linears.
    activations: what norms and SwiGLU keep; 'recipe' is what the recipe says.
  """

  remat: str
  matmul: str
  activations: str = 'recipe'


def _variants():
  kept = {
    'bf16': ('bf16',),
    'int8, norms as is': ('int8',),
    'int8': ('int8', 'int8'),
    'coat': ('coat',),
    'quest4': ('quest4', 'int4'),
    'nvfp4': ('nvfp4', 'int4'),
  }
  for remat, names in (
    ('inputs', kept),
    ('none', ('bf16', 'int8')),
    ('full', ('bf16', 'int8')),
  ):
    yield from ((f'{remat} {n}', Variant(remat, *kept[n])) for n in names)


VARIANTS: dict[str, Variant] = dict(_variants())


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on a chip."""

  temporaries: int
  peak: int
  activations: int
  arrays: dict[str, int]  # 'bf16[24,6,256,2048]' -> how many of them


def stacks(
  assignment: str, layers: int, kernels: set[int]
) -> tuple[int, dict[str, int]]:
  """Activations that temporary HBM holds of all layers.

  Args:
    assignment: the text of the compiler's buffer assignment.
    layers: the leading axis.
    kernels: the number of entries of each kernel's part on a chip; arrays of so
      many are gradients, or weights in another dtype.

  Returns:
    Bytes, padding included, and how many there are of each array.
  """
  places, counts = {}, False
  for line in assignment.splitlines():
    if line.startswith('allocation '):
      # Other memories than HBM have colors.
      counts = 'preallocated-temp' in line and ' color ' not in line
    elif counts and (match := _VALUE.search(line)):
      size, offset, dtype, shape = match.groups()
      dims = tuple(int(d) for d in shape.split(',') if d)
      if dims[:1] == (layers,) and math.prod(dims) not in kernels:
        # Values at one place are one array at several moments, or others at
        # the same moment, the bits of which they are.
        places.setdefault((int(offset), int(size)), f'{dtype}[{shape}]')
  arrays = collections.Counter(places.values())
  return sum(size for _, size in places), dict(arrays)


def compile_step(variant: Variant, size: str) -> Memory:
  """Compiles the training step and reads what it keeps."""
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=_TOPOLOGY
  ).devices
  config, _ = fx_config.parse_command_line(
    [
      f'--config={_CONFIG}:size={size},opt=adamw,data=c4,'
      f'matmul={variant.matmul}',
      '--workdir=unused',
      '--config.mesh=fsdp=-1',
      f'--config.batch_size={_BATCH}',
      f'--config.data.sequence_length={_LENGTH}',
      f'--config.model.remat={variant.remat}',
      f'--config.model.activations={variant.activations}',
    ],
    'tpu_activations',
  )
  program = step.build(config, devices)
  shape = (_BATCH, _LENGTH)
  rows = program.layout.sharding(('batch', 'sequence'), shape)
  batch = {
    name: jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)
    for name in ('tokens', 'labels', 'segment_ids', 'positions')
  }
  state = program.abstract_state()
  with jax.set_mesh(program.layout.mesh):
    lowered = program.train_step.lower(state, batch)
  with tempfile.TemporaryDirectory() as dump:
    compiled = lowered.compile(
      {'xla_dump_to': dump, 'xla_dump_hlo_as_text': True}
    )
    (path,) = pathlib.Path(dump).glob(
      '*jit_train_step*optimizations-buffer-assignment.txt'
    )
    assignment = path.read_text()
  kernels = {
    math.prod(p.sharding.shard_shape(p.shape))
    for p in jax.tree.leaves(state.params['layers'])
    if p.ndim > 2
  }
  memory = compiled.memory_analysis()
  return Memory(
    memory.temp_size_in_bytes,
    memory.peak_memory_in_bytes,
    *stacks(assignment, program.model.config.n_layers, kernels),
  )


def main(names: list[str], size: str, show: bool) -> None:
  info, layers = metrics.run_info(), llama.config(size).n_layers
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, LLaMA-{size}, {_TOKENS} tokens a chip, compiled for'
    f' {_TOPOLOGY}'
  )
  print(
    f'{"variant":27s}{"temp":>8s}{"peak":>8s}{"activ.":>8s}{"B/token":>9s}'
    f'{"activ. less":>13s}{"temp less":>11s}{"s":>6s}'
  )
  found: dict[str, Memory] = {}
  for name in names:
    start = time.monotonic()
    found[name] = m = compile_step(VARIANTS[name], size)
    plain = found.get(f'{VARIANTS[name].remat} bf16')
    less = ' ' * 24
    if plain:
      less = (
        f'{plain.activations / m.activations:12.2f}x'
        f'{plain.temporaries / m.temporaries:10.2f}x'
      )
    print(
      f'{name:27s}{m.temporaries / _MIB:8.0f}{m.peak / _MIB:8.0f}'
      f'{m.activations / _MIB:8.0f}{m.activations / _TOKENS / layers:9.0f}'
      f'{less}{time.monotonic() - start:6.0f}',
      flush=True,
    )
    if show:
      for array, n in m.arrays.items():
        print(f'    {n} x {array}')
  judge(found)


def judge(found: dict[str, Memory]) -> None:
  """One line a claim, on the variants that were compiled."""
  for name in ('int8', 'coat', 'quest4', 'nvfp4'):
    for remat in ('inputs', 'none'):
      plain, m, eight = (
        found.get(f'{remat} {n}') for n in ('bf16', name, 'int8')
      )
      if not (plain and m and eight):
        continue
      less = plain.activations / m.activations
      bar = 1.5
      if name in ('quest4', 'nvfp4'):  # more than in 8 bits
        bar = plain.activations / eight.activations
      verdict = 'yes' if less > bar else 'no'
      print(
        f"remat '{remat}', {name}: activations {less:.2f} times less; at least"
        f' {bar:.2f}: {verdict}'
      )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('variants', nargs='*', help=', '.join(VARIANTS))
  parser.add_argument('--size', default='1b', help='of the LLaMA')
  parser.add_argument('--list', action='store_true')
  arguments = parser.parse_args()
  for variant in arguments.variants:
    if variant not in VARIANTS:
      raise SystemExit(f'no variant {variant!r}: {", ".join(VARIANTS)}')
  main(arguments.variants or list(VARIANTS), arguments.size, arguments.list)
