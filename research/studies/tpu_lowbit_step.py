"""What a training step in few bits sends and multiplies on 16 TPU chips.

    python research/studies/tpu_lowbit_step.py
    python research/studies/tpu_lowbit_step.py int8 int4    # only these

Needs the TPU's compiler, `pip install 'frugax[tpu]'`, and no TPU: the training
step of LLaMA-1b (AdamW, remat 'full', 32 sequences of 1024) is compiled for 16
described devices, its weights cut over all of them (fsdp=16), and the program
is read. A variant takes one to three minutes on two cores.

The first table has what the layers' linears send, in one layer: arrays and
their bytes, once forward and once backward, where remat rounds and gathers
the weights again. Some gradients of weights are reduced and scattered one
chunk at a time while they are computed ('product, permute'); these count with
the whole array. Of arrays of fewer bytes than 1 % of the largest (scales, keys)
there is the sum alone. The second has how many products there are, forward and
backward, of which operands, XLA's and those of kernels, one of which multiplies
all weights of the same activations; one of bf16 by s8 rounds these, too. These
are static counts: nothing was run.
"""

import os

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU

import argparse
import collections
import importlib.metadata
import json
import pathlib
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from frugax import config as fx_config
from frugax.plan import cost, hlo
from frugax.train import metrics, step

_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'
_PLACE = re.compile(r'op_name="([^"]*?/(\w+)\.linears/[^"]*)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_KERNEL = 'custom_call_target="tpu_custom_call"'

LARGE = {
  'batch_size': 32,
  'data.sequence_length': 1024,
  'model.remat': 'full',
}
# Rows of 128 and of a few layers: what a test compiles in seconds.
SMALL = {
  'batch_size': 16,
  'data.sequence_length': 128,
  'model.n_layers': 2,
  'model.dim': 256,
  'model.ffn': 512,
  'model.vocab_size': 512,
  'model.n_heads': 4,
  'model.n_kv_heads': 4,
}


class Variant(NamedTuple):
  """A recipe, the devices it is compiled for, and their mesh."""

  matmul: str
  topology: str = 'v5e:4x4'
  mesh: str = 'fsdp=16'


VARIANTS = {
  'bf16': Variant('bf16'),
  'int8': Variant('int8'),
  'int4': Variant('int4'),
  'tpu7x bf16': Variant('bf16', 'tpu7x:2x2x2'),
  'tpu7x fp8': Variant('fp8', 'tpu7x:2x2x2'),
}


class Sent(NamedTuple):
  """A collective in a layer's linears.

  Attributes:
    operation: its name.
    path: 'attn' or 'mlp'.
    backward: whether it is in the backward pass.
    dtype: of the array that it gives.
    shape: likewise; of a product that is scattered while it is computed, of a
      chip's part.
  """

  operation: str
  path: str
  backward: bool
  dtype: str
  shape: tuple[int, ...]

  @property
  def size(self) -> float:
    """Bytes."""
    return hlo.Shape(self.dtype, self.shape).nbytes


def compiled(variant: Variant, size: str, **fields) -> hlo.Module:
  """The optimized program of a training step."""
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=variant.topology
  ).devices
  fields = {'mesh': variant.mesh, 'model.dtype': 'bfloat16', **fields}
  argv = [
    f'--config={_CONFIG}:size={size},opt=adamw,matmul={variant.matmul}',
    '--workdir=unused',
    *(f'--config.{name}={value}' for name, value in fields.items()),
  ]
  config = fx_config.parse_command_line(argv, 'test')[0]
  program = step.build(config, devices)
  shape = (config.batch_size, config.data.sequence_length)
  ids = jax.ShapeDtypeStruct(
    shape,
    jnp.int32,
    sharding=program.layout.sharding(('batch', 'sequence'), shape),
  )
  names = ('tokens', 'labels', 'segment_ids', 'positions')
  # Not under the mesh: its devices can compute nothing, not even a key.
  state = program.abstract_state()
  with jax.set_mesh(program.layout.mesh):
    lowered = program.train_step.lower(state, dict.fromkeys(names, ids))
    return hlo.parse(lowered.compile().as_text())


def _place(instruction):
  """('attn', whether it is backward) of an operation of linears, else None."""
  match = _PLACE.search(instruction.attributes)
  return match and (match[2], 'transpose(' in match[1])


def sent(module: hlo.Module) -> list[Sent]:
  """The collectives of linears in a program, each once."""
  found = {}
  for computation in module.computations.values():
    for i in computation.instructions:
      operation = i.opcode.removesuffix('-start')
      if operation not in cost.COLLECTIVES:
        continue
      place = _place(i)
      if 'op_name=' not in i.attributes:  # several as one: of the first operand
        place = _place(computation.by_name[i.operands[0]])
      if not place:
        continue
      # One that runs beside others is written once for each of them.
      beside = _CHAIN.search(i.attributes)
      name, arrays = f'chain {beside[1]}' if beside else i.name, i.shapes
      if operation == 'collective-permute':
        # One of a first round is before the loop.
        if 'windowed' not in computation.name:
          continue
        operation, arrays = 'product, permute', arrays[:1]
        name = f'{computation.name} {arrays}'
      found[name] = [Sent(operation, *place, a.dtype, a.dims) for a in arrays]
  return [one for each in found.values() for one in each]


def products(module: hlo.Module) -> collections.Counter:
  """How many products of linears have (backward?, kernel?, dtype, dtype)."""
  found = collections.Counter()
  for computation in module.computations.values():
    for i in computation.instructions:
      place, kernel = _place(i), _KERNEL in i.attributes
      if place and (kernel or i.opcode in ('convolution', 'dot')):
        pair = (computation.by_name[n].shapes[0].dtype for n in i.operands[:2])
        found[place[1], kernel, *pair] += 1
  return found


def codes(module: hlo.Module) -> collections.Counter:
  """How many arrays of codes XLA writes: (backward?, dtype, shape)."""
  inside = {
    name
    for computation in module.computations.values()
    for i in computation.instructions
    if i.opcode == 'fusion'
    for name in i.called('calls')
  }
  found = collections.Counter()
  for computation in module.computations.values():
    for i in computation.instructions:
      if computation.name in inside or i.opcode not in ('fusion', 'convert'):
        continue
      backward = 'transpose(' in i.attributes
      for s in i.shapes:
        if s.dtype in ('s4', 's8'):
          found[backward, s.dtype, s.dims] += 1
  return found


def show(name: str, variant: Variant) -> None:
  """Compiles a variant and prints its tables."""
  start = time.monotonic()
  module = compiled(variant, '1b', **LARGE)
  seconds = time.monotonic() - start
  print(f'\n{name}: {variant.topology}, {variant.mesh}, {seconds:.0f} s')
  groups, small = collections.defaultdict(list), 0.0
  all_sent = sent(module)
  floor = max(s.size for s in all_sent) / 100
  for s in all_sent:
    if s.size < floor:
      small += s.size
    else:
      groups[s.backward, s.operation, s.dtype].append(s)
  for (backward, operation, dtype), found in sorted(groups.items()):
    total = sum(s.size for s in found)
    if operation == 'product, permute':
      total *= 16
    where = 'backward' if backward else 'forward'
    print(
      f'  {where:9s}{operation:17s}{dtype:10s}{len(found):4d} arrays'
      f'{total / 2**20:9.2f} MiB'
    )
  print(f'  all else {small / 2**20:.2f} MiB')
  for (backward, kernel, *pair), n in sorted(products(module).items()):
    where = 'backward' if backward else 'forward'
    what = 'kernels' if kernel else 'products'
    print(f'  {where:9s}{n:4d} {what} of {" by ".join(pair)}', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('variants', nargs='*', help=', '.join(VARIANTS))
  parser.add_argument(
    '--small',
    metavar='MATMUL,TOPOLOGY,MESH',
    help='print what was read of this, of a small model, as JSON',
  )
  arguments = parser.parse_args()
  if arguments.small:
    variant = Variant(*arguments.small.split(',', 2))
    module = compiled(variant, 'tiny', **SMALL)
    found = {'sent': sent(module)}
    for read in (products, codes):
      counts = read(module).items()
      found[read.__name__] = [[*key, n] for key, n in counts]
    print(json.dumps(found))
    return
  for variant in arguments.variants:
    if variant not in VARIANTS:
      raise SystemExit(f'no variant {variant!r}: {", ".join(VARIANTS)}')
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, libtpu {importlib.metadata.version("libtpu")},'
    ' LLaMA-1b',
    flush=True,
  )
  for name in arguments.variants or VARIANTS:
    show(name, VARIANTS[name])


if __name__ == '__main__':
  main()
