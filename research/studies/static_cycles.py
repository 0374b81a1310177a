"""Cycles of a jitted function on a TPU that is not there, counted statically.

Needs the TPU's compiler, libtpu 0.0.51 with jax 0.10.2 (`make bench-kernels`
installs them), and no TPU. 0.0.42.1 has no count for tpu7x, and takes tens of
GB for long kernels. The count is that of the compiler's own schedule: loops are
followed, and nothing waits for memory longer than the schedule says. It is an
estimate, good for ranking kernels of one chip, never a measured time: for a
bfloat16 product of 8192^3 on v5e it is 4 % below the time that JAX's tutorial
on Pallas reports, for blocks of 128 it is 39 % above.

The compiler's flag is not documented. It ends the process on XLA's own products
of few bits, on some fusions of XLA's around a kernel and on some 4-bit kernels
for tpu7x, so measure each function in a process of its own. Import this before
jax.
"""

import os
import tempfile

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU | {
  'LIBTPU_INIT_ARGS': '--xla_jf_dump_static_llo_profile_to='
  + tempfile.mkdtemp(prefix='static_cycles_'),
}

import atexit
import pathlib
import re
import shutil

import jax
import numpy as np
from jax.experimental import topologies

_DUMP = os.environ['LIBTPU_INIT_ARGS'].split('=')[1]
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
TOPOLOGIES = {
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  'tpu7x': 'tpu7x:2x2x1',
}
# Nominal, of one core; tpu7x's is not published.
CLOCK_HZ = {'v5e': 1.5e9, 'v5p': 1.75e9, 'v6e': 1.75e9, 'tpu7x': 2.0e9}
_OP = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')


def cycles(fn, chip: str, *operands) -> dict[str, int]:
  """Estimated cycles of each operation of a function's program.

  Args:
    fn: takes the operands.
    chip: a name in `TOPOLOGIES`, of which one device is compiled for.
    *operands: (shape, dtype) of each.

  Returns:
    Cycles by the name of the operation in the optimized program.
  """
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=TOPOLOGIES[chip]
  )
  mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ('x',))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arrays = [jax.ShapeDtypeStruct(s, d, sharding=whole) for s, d in operands]
  for path in pathlib.Path(_DUMP).iterdir():
    path.unlink()
  with jax.set_mesh(mesh):
    jax.jit(fn).lower(*arrays).compile()
  found = {}
  for path in pathlib.Path(_DUMP).iterdir():
    for name, count in _OP.findall(path.read_text()):
      found[name] = max(found.get(name, 0), int(count))
  return found
