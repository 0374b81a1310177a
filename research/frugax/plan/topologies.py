"""Devices by name, described or here: 'v5e:4x4', 'h100:8', 'cpu:8'."""

import contextlib
import importlib.util
import math
import os
import re
import sysconfig

import jax
from jax.experimental import topologies

from frugax import names
from frugax.plan import chips, environment

# The slices that are rented, and single chips.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBE = (
  *('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8'),
  *('8x8x8', '8x8x12', '8x8x16', '8x16x16', '16x16x16'),
)
TPUS = {'v4': _CUBE, 'v5e': _FLAT, 'v5p': _CUBE, 'v6e': _FLAT, 'tpu7x': _CUBE}
GPUS = ('h100', 'h200')
_COUNTED = re.compile(r'(cpu|h100|h200)(?::(\d+)(?:x(\d+))?)?$')

# What the GPU's compiler asks about a GPU. Both have these numbers in common.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def valid() -> list[str]:
  """The names of topologies that `devices` knows."""
  tpus = [
    f'{chip}:{shape}' for chip, shapes in TPUS.items() for shape in shapes
  ]
  return [*tpus, *GPUS, 'h100:8', 'h200:8', 'h100:2x8', 'cpu', 'cpu:8']


def check(name: str) -> str:
  """The chip of a topology, for which there is a compiler here.

  Args:
    name: 'CHIP:SHAPE' for TPUs; 'h100', 'h200' or 'cpu', then ':DEVICES' or,
      for GPUs, ':HOSTSxDEVICES'.

  Returns:
    The chip's name, as in `chips.CHIPS`, or 'cpu'.

  Raises:
    ValueError: no such topology, with the nearest that there is; or a compiler
      that is not installed, with the extra that installs it.

  Examples:
    >>> check('cpu:8')
    'cpu'
    >>> check('v5e:16x61')
    Traceback (most recent call last):
    ...
    ValueError: unknown topology 'v5e:16x61': did you mean 'v5e:16x16'? ...
  """
  counted = _COUNTED.match(name)
  if counted is None and name not in valid():
    raise names.unknown('topology', name, valid())
  chip = name.split(':')[0]
  if counted and 0 in (int(n) for n in counted.groups()[1:] if n):
    raise ValueError(f'topology {name!r} has no device: give 1 or more')
  if chip in TPUS and not importlib.util.find_spec('libtpu'):
    raise ValueError(
      f"topology {name!r} needs the TPU's compiler, which is not installed: "
      "pip install 'frugax[tpu]' (no TPU is needed)"
    )
  if chip in GPUS and not _has_gpu_compiler():
    raise ValueError(
      f"topology {name!r} needs the GPU's compiler, which is not installed: "
      "pip install 'frugax[cuda]' (no GPU is needed)"
    )
  return chip


def _has_gpu_compiler():
  # Below a package that is not there find_spec raises.
  return importlib.util.find_spec('jax_plugins') and any(
    importlib.util.find_spec(f'jax_plugins.xla_cuda{v}') for v in (12, 13)
  )


def prepare(name: str) -> None:
  """Sets the environment that the compiler of a topology wants, for good.

  JAX itself is put on the CPU, whatever the machine has. To be called before
  JAX computes anything: drivers read the environment once.

  Args:
    name: of the topology, which is checked.
  """
  chip = check(name)
  if chip in TPUS:
    os.environ.update(environment.TPU)
  elif chip in GPUS:
    os.environ.update(environment.GPU)
    flags = os.environ.get('XLA_FLAGS', '')
    if environment.GPU_FLAGS not in flags:
      os.environ['XLA_FLAGS'] = f'{flags} {environment.GPU_FLAGS}'.strip()
    # The assembler, as its package leaves it.
    nvcc = f'{sysconfig.get_path("purelib")}/nvidia/cuda_nvcc/bin'
    os.environ['PATH'] += os.pathsep + nvcc
  jax.config.update('jax_platforms', 'cpu')
  if chip == 'cpu' and _count(name) > 1:
    # Where JAX has its devices already, `devices` counts them.
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', _count(name))


def devices(name: str) -> list[jax.Device]:
  """The devices of a topology.

  Args:
    name: as in `check`.

  Returns:
    The devices, of which a mesh can be made to compile for.

  Raises:
    ValueError: as in `check`, and where the CPU has fewer devices.
  """
  chip = check(name)
  if chip == 'cpu':
    count, here = _count(name), jax.devices('cpu')
    if count > len(here):
      raise ValueError(
        f'topology {name!r}: JAX runs with {len(here)} CPU devices; set '
        f'XLA_FLAGS=--xla_force_host_platform_device_count={count}'
      )
    return here[:count]
  if chip in GPUS:
    hosts, count = _hosts(name)
    described = topologies.get_topology_desc(
      platform='cuda',
      target_config=_HOPPER.format(
        name=chip.upper(),
        memory=chips.CHIPS[chip].memory,
        bandwidth=chips.CHIPS[chip].bandwidth,
      ),
      topology=f'1x{hosts}x{count}',
    )
    return list(described.devices)
  for variable, value in environment.TPU.items():
    os.environ.setdefault(variable, value)
  shape = [int(n) for n in name.split(':')[1].split('x')]
  options = {}
  if math.prod(shape) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  if chip == 'v4':  # both cores of a chip as one device, as in training
    options['chip_config_name'] = 'megacore'
  described = topologies.get_topology_desc(
    platform='tpu', topology_name=name, **options
  )
  return list(described.devices)


def _hosts(name):
  """Hosts and devices of each, of 'h100:2x8' or 'cpu:8'."""
  first, second = _COUNTED.match(name).groups()[1:]
  return (int(first), int(second)) if second else (1, int(first or 1))


def _count(name):
  return math.prod(_hosts(name))


def capacity(name: str) -> int:
  """Bytes that a program can have on each device of a topology.

  Of a GPU it is the share that JAX takes at its start, 3/4 unless
  XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; of a CPU the memory of this
  machine by the number of its devices.

  Args:
    name: as in `check`.

  Returns:
    The number of bytes.
  """
  chip = check(name)
  if chip == 'cpu':
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return memory // _count(name)
  memory = chips.CHIPS[chip].memory
  if chip in GPUS:
    fraction = os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.75')
    return int(memory * float(fraction))
  return memory
