"""Compiles copies and collectives for a TPU that is not there: `... v5e`.

A process of its own, as libtpu reads its flags once. Prints one JSON object a
program: the error that the compiler raised, or what it made of collectives.
"""

import os
import sys

from frugax.plan import environment

os.environ |= environment.TPU

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from frugax.kernels import Copy, collectives, hadamard_quantize
from frugax.quant import Scaling

TOPOLOGIES = {
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  'tpu7x': 'tpu7x:2x2x1',
}
QUEST = Scaling(statistic='rms', factor=2.51393, eps=1e-8)
COPIES = {
  'both, odd': ('int8', 'int4', (100, 333)),
  'quest, tokens': (
    Copy('rise4', scaling=QUEST, mask='trust', sums=True),
    Copy(along='tokens', signs=True, stochastic=True, sums=True),
    (300, 261),
  ),
  'groups': (
    Copy('int4', 'tokens', signs=True, stochastic=True),
    Copy('int8', 'none', scaling=Scaling((1, 128)), mask='clip'),
    (256, 256),
  ),
  'fp8': (Copy('fp8_e4m3', signs=True), Copy('fp8_e5m2', 'none'), (64, 256)),
}
_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter)(?:-start)?\('
)


def copies(rows, columns, x):
  return hadamard_quantize(
    x,
    rows,
    columns,
    key=jax.random.key(0),
    signs=jax.random.key(1),
    implementation='mosaic',
  )


def gradient(format, mesh, w):
  """Of a sum over a gathered array: both collectives."""

  def loss(w):
    whole = collectives.all_gather(w, 'x', format, gradient=format)
    return (whole.astype(jnp.float32) ** 2).sum()[None]

  def total(w):
    spec = PartitionSpec('x')
    parts = jax.shard_map(loss, mesh=mesh, in_specs=spec, out_specs=spec)
    return parts(w).sum()

  return jax.grad(total)(w)


def main(chip):
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=TOPOLOGIES[chip]
  )
  devices = np.array(topology.devices)

  def compiled(fn, shape, dtype, mesh, spec):
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
      return jax.jit(fn).lower(x).compile().as_text()

  def report(name, fn, *args):
    row = {'name': name}
    try:
      text = compiled(fn, *args)
      row['kernel'] = 'tpu_custom_call' in text
      row['collectives'] = _COLLECTIVE.findall(text)
    except Exception as error:
      row['error'] = f'{type(error).__name__}: {error}'[:2000]
    print(json.dumps(row), flush=True)

  one = jax.sharding.Mesh(devices[:1], ('x',))
  for name, (rows, columns, shape) in COPIES.items():
    dtype = jnp.float32 if name == 'fp8' else jnp.bfloat16
    fn = functools.partial(copies, rows, columns)
    report(name, fn, shape, dtype, one, PartitionSpec())
  if chip != 'v5e':
    return
  several = jax.sharding.Mesh(devices[:4], ('x',))
  for format in ('int8', 'int4'):
    fn = functools.partial(gradient, format, several)
    where = several, PartitionSpec('x')
    report(f'gather {format}', fn, (1024, 2048), 'bfloat16', *where)


if __name__ == '__main__':
  main(sys.argv[1])
