"""What an optimizer's part of a step gathers and holds on 16 TPU chips.

    python research/studies/tpu_optimizer.py
    python research/studies/tpu_optimizer.py keep int4    # only these

Needs the TPU's compiler, `pip install 'frugax[tpu]'`, and no TPU: update and
apply of LLaMA-1b, parameters and state donated, are compiled for a described
v5e:4x4 with the parameters cut over fsdp=16, and the program is read. A variant
takes one to four minutes on two cores.

GaLore's rank is 512; embedding and head are left whole. The gradients are
donated, too, and the updates returned: in a training step they are temporaries,
whose place the updates take before they are added. The table has, in MiB on
each chip,

- the arguments: parameters, gradients and state,
- all temporaries together,
- the largest of them: of all values that the compiler's buffer assignment keeps
  in temporary HBM. What it moves to the 128 MiB of VMEM beside does not count,
- the largest collective, which counts with the array that each chip gets or
  gives, and that array's entries over those of the largest layer's factor R
  (rank x n) and of its gradient G.

The SVD is not among the variants: it gathers each layer's gradient
(tests/optim/collectives_test.py), and its program for a TPU was still compiling
after half an hour on a busy machine.
"""

import os

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU

import argparse
import dataclasses
import math
import pathlib
import re
import tempfile
import time

import jax
import optax
from jax.experimental import topologies

from frugax import optim
from frugax.models import llama
from frugax.train import mesh as fx_mesh
from frugax.train import metrics

_MIB = 2**20
_TOPOLOGY, _CHIPS, _RANK = 'v5e:4x4', 16, 512
_LAYERS, _DIM, _FFN = 24, 2048, 5461
_BITS = {'f32': 32, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'pred': 8}
_BITS |= {'s8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's4': 4, 'u4': 4, 's64': 64}
_COLLECTIVE = re.compile(
  r' = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
  r'ragged-all-to-all|collective-permute|collective-broadcast)(?:-start)?\('
)
_VALUE = re.compile(r'^ value: .*\(size=(\d+),offset=\d+\): (\w+)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Variant:
  """An optimizer.

  Attributes:
    dtype: of parameters, gradients and state.
    options: for `frugax.optim.galore`; None for optax.adam, which has neither
      subspaces nor collectives.
  """

  dtype: str = 'float32'
  options: dict | None = dataclasses.field(default_factory=dict)


_ROTATE = {'moments': 'rotate'}
_STAGGERED = {'refresh': 'staggered'}
VARIANTS = {
  'adam': Variant(options=None),
  'keep': Variant(),
  'rotate': Variant(options=_ROTATE),
  'staggered': Variant(options=_STAGGERED),
  'rotate, staggered': Variant(options=_ROTATE | _STAGGERED),
  'bf16 keep': Variant('bfloat16'),
  'bf16 rotate': Variant('bfloat16', _ROTATE),
  'bf16 staggered': Variant('bfloat16', _STAGGERED),
  'bf16 rotate, staggered': Variant('bfloat16', _ROTATE | _STAGGERED),
  'int4': Variant(options={'projector_dtype': 'int4'}),
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """A communication: bytes and entries of the array, operation, array."""

  size: float
  entries: int
  op: str
  array: str


@dataclasses.dataclass(frozen=True)
class Temporary:
  """A value that lies in temporary memory: bytes, entries, array."""

  size: int
  entries: int
  array: str


@dataclasses.dataclass(frozen=True)
class Found:
  """What was read of a variant's program.

  Attributes:
    temporaries: bytes of all of them.
    temporary: the largest.
    of_factor: entries of the largest collective, as a share of one layer's R.
  """

  temporaries: int
  temporary: Temporary
  of_factor: float


def _entries(shape: str) -> int:
  return math.prod(int(d) for d in shape.split(',') if d)


def largest_temporary(assignment: str) -> Temporary:
  """The largest value in temporary HBM, from a buffer assignment's text."""
  found, counts = Temporary(0, 0, 'none'), False
  for line in assignment.splitlines():
    if line.startswith('allocation '):
      # Other memories than HBM have colors.
      counts = 'preallocated-temp' in line and ' color ' not in line
    elif counts and (match := _VALUE.search(line)):
      size, array, shape = match.groups()
      if int(size) > found.size:
        found = Temporary(int(size), _entries(shape), f'{array}[{shape}]')
  return found


def collectives(text: str) -> list[Collective]:
  """All of an optimized program, bodies of loops included, largest first."""
  found = set()
  for line in text.splitlines():
    if match := _COLLECTIVE.search(line):
      arrays = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', match[1])
      for dtype, shape in arrays:
        n = _entries(shape)
        size = n * _BITS[dtype] / 8
        found.add(Collective(size, n, match[2], f'{dtype}[{shape}]'))
  return sorted(found, key=lambda c: c.size, reverse=True)


def compile_update(variant: Variant):
  """Compiles update and apply.

  Returns:
    The program, its buffer assignment, the parameters' shapes, the model's dim.
  """
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=_TOPOLOGY
  ).devices
  layout = fx_mesh.make_layout('fsdp=-1', devices)
  model = llama.Llama(llama.config('1b', param_dtype=variant.dtype))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shardings = layout.tree(model.axes(), shapes)
  axes = optim.matrix_axes(model.axes())
  axes['embed']['embedding'] = axes['lm_head']['kernel'] = None
  if variant.options is None:
    tx = optax.adam(1e-3)
  else:
    options = {'projector': 'sketch', 'update_interval': 200}
    tx = optim.galore(1e-3, rank=_RANK, axes=axes, **options | variant.options)
  of_state = optim.state_shardings(tx, shapes, shardings)

  def abstract(tree, shardings):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      shardings,
    )

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, updates

  params = abstract(shapes, shardings)
  state = abstract(jax.eval_shape(tx.init, shapes), of_state)
  lowered = jax.jit(
    step,
    donate_argnums=(0, 1, 2),
    out_shardings=(shardings, of_state, shardings),
  ).lower(params, state, params)
  with tempfile.TemporaryDirectory() as dump:
    compiled = lowered.compile(
      {'xla_dump_to': dump, 'xla_dump_hlo_as_text': True}
    )
    (path,) = pathlib.Path(dump).glob('*jit_step*-buffer-assignment.txt')
    assignment = path.read_text()
  return compiled, assignment, shapes, model.config.dim


def read(name: str, variant: Variant) -> Found:
  """Compiles a variant and prints its row."""
  start = time.monotonic()
  compiled, assignment, shapes, dim = compile_update(variant)
  memory = compiled.memory_analysis()
  temporary = largest_temporary(assignment)
  communicated = collectives(compiled.as_text())
  largest = communicated[0] if communicated else Collective(0, 0, 'none', '')
  # One side of each matrix is the model's, and never the longer one.
  gradient = max(
    math.prod(x.shape[1:]) for x in jax.tree.leaves(shapes) if x.ndim > 2
  )
  factor = gradient // dim * _RANK
  print(
    f'{name:23s}{memory.argument_size_in_bytes / _MIB:8.1f}'
    f'{memory.temp_size_in_bytes / _MIB:8.1f}'
    f'{temporary.size / _MIB:8.2f}  {temporary.array:18s}'
    f'{largest.size / _MIB:8.2f}  {largest.op:10s} {largest.array:18s}'
    f'{largest.entries / factor:6.3f}{largest.entries / gradient:7.3f}'
    f'{time.monotonic() - start:6.0f}',
    flush=True,
  )
  return Found(memory.temp_size_in_bytes, temporary, largest.entries / factor)


def main(names: list[str]) -> None:
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, LLaMA-1b, rank {_RANK}, compiled for {_TOPOLOGY}'
  )
  print(
    f'{"variant":23s}{"args":>8s}{"temp":>8s}{"largest":>8s}  {"array":18s}'
    f'{"collect.":>8s}  {"operation":10s} {"array":18s}{"of R":>6s}{"of G":>7s}'
    f'{"s":>6s}'
  )
  found = {name: read(name, VARIANTS[name]) for name in names}
  judge(found)


def judge(found: dict[str, Found]) -> None:
  """One line a claim, on the variants that were compiled."""
  ours = {k: v for k, v in found.items() if VARIANTS[k].options is not None}
  if not ours:
    return

  def verdict(claim, broken):
    print(f'{claim}: {"no: " + "; ".join(broken) if broken else "yes"}')

  verdict(
    'no collective has more entries than R of one layer',
    [name for name, v in ours.items() if v.of_factor > 1],
  )
  stack = _LAYERS * _FFN * _RANK // _CHIPS
  verdict(
    "no temporary has more entries than a chip's share of the largest stack of"
    f' R ({stack / 1e6:.2f} million)',
    [name for name, v in ours.items() if v.temporary.entries > stack],
  )
  for dtype, item in (('float32', 4), ('bfloat16', 2)):
    of_dtype = [v for k, v in ours.items() if VARIANTS[k].dtype == dtype]
    if of_dtype:
      total = max(v.temporaries for v in of_dtype)
      largest = max(v.temporary.size for v in of_dtype)
      share = _LAYERS * _DIM * _FFN * item / _CHIPS
      print(
        f'{dtype}: all temporaries at most {total / _MIB:.1f} MiB, the largest'
        f" {largest / _MIB:.1f}; a chip's share of the largest stack of"
        f' gradients is {share / _MIB:.0f} MiB'
      )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('variants', nargs='*', help=', '.join(VARIANTS))
  arguments = parser.parse_args()
  for variant in arguments.variants:
    if variant not in VARIANTS:
      raise SystemExit(f'no variant {variant!r}: {", ".join(VARIANTS)}')
  main(arguments.variants or list(VARIANTS))
