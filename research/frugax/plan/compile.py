"""The training step of a config, compiled for a topology, and what it needs."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from frugax import optim
from frugax.models import llama
from frugax.plan import buffers, chips, cost, hlo, topologies
from frugax.train import processes, step

BATCH = ('tokens', 'labels', 'segment_ids', 'positions')

# What a config says of a run but not of its program.
_BESIDE = ('seed', 'compat_eval', 'data', 'eval', 'checkpoint', 'log')

_COMPILERS = (
  *('jax', 'jaxlib', 'libtpu', 'jax-cuda12-pjrt', 'jax-cuda13-pjrt'),
)
# What traces the program beside them, and settings of JAX that change it.
_LIBRARIES = ('flax', 'ml-dtypes', 'optax')
_SETTINGS = (
  *('jax_default_matmul_precision', 'jax_default_prng_impl'),
  *('jax_enable_x64', 'jax_threefry_partitionable'),
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a training step needs of each device, and costs on it.

  All bytes are those of one device. `arguments`, `peak` and what else the
  compiler says are exact; `state` is counted on the state's tree and shardings,
  without what the layouts of a chip pad; how temporaries are told apart is said
  in `buffers.Temporaries`.

  Attributes:
    topology: its name.
    devices: how many.
    mesh: the sizes of its axes.
    batch: sequences a step, and their length.
    capacity: bytes that a program can have on a device.
    state: bytes of the arguments by category: 'weights', 'optimizer moments',
      'optimizer projector' and so on, the codes and scales of what is stored in
      few bits apart, 'batch and counters'.
    gradients: bytes of a gradient of every weight, in the weights' dtype, which
      the step may or may not hold at once.
    adamw: what optax.adamw would need for the same weights on the same mesh, if
      these, gradients and moments were of the config's dtype, and in float32:
      dtype -> bytes of 'weights', 'gradients' and 'state'; empty if it is the
      optimizer.
    arguments: bytes of state and batch, padding included; None, as what
      follows, if the compiler refused the program.
    outputs: bytes of what is given beside the state, which is updated in place.
    code: bytes of the program itself.
    peak: what `memory_analysis` tells: of live memory the most at one time, on
      TPUs that in VMEM too, on CPUs without temporaries.
    temporaries: see `buffers.Temporaries`; a dict of its fields.
    needed: bytes that the program takes: arguments, temporaries, outputs, code;
      or, if it was refused, what the compiler says it needs.
    refused: the compiler's message, if the program does not fit.
    flops, bytes: of a step on a device, see `cost.Cost`.
    collectives: kind -> count, bytes, sent.
    seconds: see `cost.roofline`: estimates.
    dear: flops, bytes and seconds of a step that takes the dearest branches
      (finds subspaces anew), and how many loops in these, whose length depends
      on the data, are counted once.
    unknown: loops and kernels that could not be counted.
    versions: of what compiled it.
    compile_seconds: how long that took.
  """

  topology: str
  devices: int
  mesh: dict[str, int]
  batch: tuple[int, int]
  capacity: int
  state: dict[str, int]
  gradients: int
  adamw: dict[str, dict[str, int]]
  arguments: int | None = None
  outputs: int | None = None
  code: int | None = None
  peak: int | None = None
  temporaries: dict[str, Any] | None = None
  needed: int | None = None
  refused: str | None = None
  flops: dict[str, float] | None = None
  bytes: float | None = None
  collectives: dict[str, dict[str, float]] | None = None
  seconds: dict[str, float] | None = None
  dear: dict[str, Any] | None = None
  unknown: dict[str, int] | None = None
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  compile_seconds: float = 0.0

  @property
  def fits(self) -> bool:
    """Whether the program can run on the devices."""
    return self.refused is None and self.needed <= self.capacity

  def to_dict(self) -> dict[str, Any]:
    """As JSON would have it, `fits` included."""
    return json.loads(
      json.dumps({**dataclasses.asdict(self), 'fits': self.fits})
    )

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> 'Plan':
    """The inverse of `to_dict`."""
    fields = {k: v for k, v in fields.items() if k != 'fits'}
    return cls(**{**fields, 'batch': tuple(fields['batch'])})


def abstract_batch(config, program: step.Program) -> dict[str, Any]:
  """The batch of a config's step, as shapes with shardings."""
  shape = (config.batch_size, config.data.sequence_length)
  sharding = program.layout.sharding(('batch', 'sequence'), shape)
  ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
  return dict.fromkeys(BATCH, ids)


def plan(
  config,
  topology: str,
  cache: str | None = None,
  tell: Callable[[str], None] = lambda _: None,
) -> Plan:
  """Compiles the training step of a config for a topology.

  Args:
    config: a run's config.
    topology: as in `topologies.check`; call `topologies.prepare` before JAX
      computes anything.
    cache: a folder in which results are kept; None for none.
    tell: gets a line when something begins that takes long.

  Returns:
    The plan. A program that the compiler refuses for its memory has one, too.

  Raises:
    ValueError: a config that cannot run, or no such topology.
  """
  key = fingerprint(config, topology)
  path = os.path.join(cache, f'{key}.json') if cache else None
  if path and os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      return Plan.from_dict(json.load(f))
  devices = topologies.devices(topology)
  program = step.build(config, devices)
  state, batch = program.abstract_state(), abstract_batch(config, program)
  known = {
    'topology': topology,
    'devices': len(devices),
    'mesh': dict(program.layout.mesh.shape),
    'batch': (config.batch_size, config.data.sequence_length),
    'capacity': topologies.capacity(topology),
    **_sizes(program, state, batch),
    'adamw': {} if config.optimizer.name == 'adamw' else adamw(program),
    'versions': _versions(),
  }
  tell(
    f'compiling {config.model.size}, {config.optimizer.name}, batch'
    f' {config.batch_size} x {config.data.sequence_length}, for {topology}'
    f' ({program.layout})'
  )
  start = time.monotonic()
  found = _compile(program, state, batch, topology)
  known['compile_seconds'] = round(time.monotonic() - start, 1)
  result = Plan(**known, **found)
  # Through JSON, so that it is the same whether it was kept or not.
  result = Plan.from_dict(result.to_dict())
  if path:
    os.makedirs(cache, exist_ok=True)
    with tempfile.NamedTemporaryFile(
      'w', dir=cache, suffix='.tmp', delete=False, encoding='utf-8'
    ) as f:
      json.dump(result.to_dict(), f, indent=1)
    os.replace(f.name, path)
  return result


def fingerprint(config, topology: str) -> str:
  """A hash of all that determines a plan.

  Args:
    config: of the run; its seed, data set, evaluation, checkpoints and logs do
      not count.
    topology: its name.

  Returns:
    A hexadecimal number.
  """
  fields = {k: v for k, v in config.to_dict().items() if k not in _BESIDE}
  fields['sequence_length'] = config.data.sequence_length
  for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS'):
    fields[name] = os.environ.get(name, '')
  fields |= {'topology': topology, 'capacity': topologies.capacity(topology)}
  fields |= _versions((*_COMPILERS, *_LIBRARIES))
  fields |= {name: getattr(jax.config, name) for name in _SETTINGS}
  fields['code'] = processes.code_hash()
  text = json.dumps(fields, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def _versions(packages=_COMPILERS):
  found = {}
  for name in packages:
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return found


def on_device(x) -> int:
  """Bytes of a device's part of an abstract array, without padding.

  None of one in its host's memory, but on CPUs, which have no other.
  """
  sharding = x.sharding
  platform = sharding.mesh.devices.flat[0].platform
  if sharding.memory_kind == 'pinned_host' and platform != 'cpu':
    return 0
  shape = sharding.shard_shape(x.shape)
  return math.prod(shape) * x.dtype.itemsize


def _coded(path):
  """What a leaf is of an array in few bits, in words: ', codes' or ''."""
  name = getattr(path[-1], 'name', None) if path else None
  return {
    'codes': ', codes',
    'data': ', codes',
    'scales': ', scales',
    'zeros': ', scales',
    'powers': ', scales',
  }.get(name, '')


def _sizes(program, state, batch):
  """Bytes on a device that are known before anything is compiled."""
  found = collections.Counter()
  for path, leaf in jax.tree.leaves_with_path(state.params):
    found['weights' + _coded(path)] += on_device(leaf)
  named = optim.state_categories(state.opt_state, program.shapes)
  leaves = jax.tree.leaves_with_path(state.opt_state)
  for (path, leaf), category in zip(leaves, named, strict=True):
    found[f'optimizer {category}{_coded(path)}'] += on_device(leaf)
  rest = (state.step, state.key, state.skipped, batch)
  found['batch and counters'] = sum(map(on_device, jax.tree.leaves(rest)))
  shardings = program.layout.tree(program.model.axes(), program.shapes)
  gradients = _total(program.shapes, shardings)
  return {'state': dict(found), 'gradients': gradients}


def adamw(program: step.Program) -> dict[str, dict[str, int]]:
  """What AdamW would need of each device, whatever the program's optimizer.

  Args:
    program: a run's.

  Returns:
    As `Plan.adamw`.
  """
  shardings = program.layout.tree(program.model.axes(), program.shapes)
  found, own = {}, np.dtype(program.model.config.param_dtype).name
  for dtype in dict.fromkeys((own, 'float32')):

    def in_dtype(x, dtype=dtype):
      return jax.ShapeDtypeStruct(x.shape, dtype)

    shapes = jax.tree.map(in_dtype, program.shapes)
    state = jax.eval_shape(optax.adamw(0.0).init, shapes)
    of_state = optim.state_shardings(state, shapes, shardings)
    weights = _total(shapes, shardings)
    found[dtype] = {
      'weights': weights,
      'gradients': weights,
      'state': _total(state, of_state),
    }
  return found


def _total(shapes, shardings):
  """Bytes of a device's part of a tree of shapes."""
  return sum(
    on_device(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s))
    for x, s in zip(
      jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
    )
  )


@contextlib.contextmanager
def _no_executable_cache():
  """It would return programs without compiling, and so without dumps."""
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # whether there is one was looked up once
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


def _compile(program, state, batch, topology):
  """What the compiler says, as fields of a `Plan`."""
  with jax.set_mesh(program.layout.mesh):
    lowered = program.train_step.lower(state, batch)
  with tempfile.TemporaryDirectory() as dump, _no_executable_cache():
    options = {'xla_dump_to': dump, 'xla_dump_hlo_as_text': True}
    try:
      compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
      message = str(error).split('\n\n')[0]
      found = buffers.needed(message)
      if found is None:
        raise
      return {'refused': message, 'needed': found[0]}
    (path,) = pathlib.Path(dump).glob('*train_step*buffer-assignment.txt')
    assignment = path.read_text()
  memory, text = compiled.memory_analysis(), compiled.as_text()
  layers = program.model.config.n_layers
  exempt = sum(program.model.config.matmul_exempt)
  temporaries = buffers.temporaries(
    assignment,
    {layers, layers - exempt},
    {
      math.prod(x.sharding.shard_shape(x.shape))
      for x in jax.tree.leaves(state.params)
      if x.ndim > 1
    },
  )
  arguments = memory.argument_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  code = memory.generated_code_size_in_bytes
  return {
    'arguments': arguments,
    'outputs': outputs,
    'code': code,
    'peak': memory.peak_memory_in_bytes,
    'temporaries': temporaries._asdict(),
    'needed': arguments + temporaries.total + outputs + code,
    **_cost(hlo.parse(text), topology),
  }


def _cost(module, topology):
  chip = chips.CHIPS.get(topologies.check(topology), chips.Chip('cpu', 0))
  plain, dear = cost.count(module), cost.count(module, dear=True)
  return {
    'flops': dict(plain.flops),
    'bytes': plain.bytes,
    'collectives': {
      kind: dataclasses.asdict(c) for kind, c in plain.collectives.items()
    },
    'seconds': cost.roofline(plain, chip),
    'dear': {
      'flops': dict(dear.flops),
      'bytes': dear.bytes,
      'seconds': cost.roofline(dear, chip),
      'unknown': dear.unknown_loops - plain.unknown_loops,
    },
    'unknown': {
      'loops': plain.unknown_loops,
      'kernels': plain.unknown_kernels,
    },
  }


def model_flops(config, devices: int) -> float:
  """FLOPs of a step for each device, as `llama.flops_per_token` counts."""
  fields = config.model.to_dict()
  model = llama.config(fields.pop('size'), **fields)
  length = config.data.sequence_length
  tokens = config.batch_size * length / devices
  return tokens * llama.flops_per_token(model, length)
