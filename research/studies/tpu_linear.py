"""What rounding costs beside the products of a linear layer, on one TPU v5e.

    python research/studies/tpu_linear.py
    python research/studies/tpu_linear.py int8 b1.58     # only these recipes

Needs the TPU's compiler, `pip install 'frugax[tpu]'`, and no TPU: forward and
backward of one linear layer (4096 tokens, 4096 x 4096, bfloat16) are compiled,
the forward product by the kernel that rounds activations ('fused') and by one
of codes, which XLA rounds to before ('apart'). Printed are XLA's own
estimates of cycles for all that is no kernel, and the bytes that the program
moves. 'full' computes the layer again in the backward pass, as remat='full'
does. Kernels have no such estimate: `make bench-kernels` counts theirs. These
are estimates: nothing was run. A line takes a minute on two cores.
"""

import os

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU

import argparse
import importlib.metadata
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from frugax import lowbit
from frugax.kernels import blocks
from frugax.plan import cost, hlo
from frugax.train import metrics

_SIZE = 4096
_DIMS = (((1,), (0,)), ((), ()))
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def compiled(recipe: str, remat: str, how: str) -> hlo.Module:
  """Both passes of a layer for one chip."""
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x2'
  ).devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ('x',))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  dot = lowbit.dot_general(lowbit.recipe(recipe), jax.random.key(0))

  def layer(x, w):
    return dot(x, w, _DIMS)

  if remat == 'full':
    layer = jax.checkpoint(layer)

  def both(x, w, g):
    y, back = jax.vjp(layer, x, w)
    return y, *back(g)

  matrix = jax.ShapeDtypeStruct((_SIZE, _SIZE), jnp.bfloat16, sharding=whole)
  fuses = blocks.fuses if how == 'fused' else lambda *_: False
  with jax.set_mesh(mesh), mock.patch.object(blocks, 'fuses', fuses):
    lowered = jax.jit(both).lower(*[matrix] * 3)
    return hlo.parse(lowered.compile().as_text())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('recipes', nargs='*', default=['int8', 'int4'])
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, libtpu {importlib.metadata.version("libtpu")}, v5e'
  )
  print('estimates of the compiler, nothing was run: cycles without kernels')
  for recipe in parser.parse_args().recipes:
    for remat in ('full', 'none'):
      for how in ('fused', 'apart'):
        module = compiled(recipe, remat, how)
        entry = module.computations[module.entry].instructions
        found = (_CYCLES.search(i.attributes) for i in entry)
        cycles = sum(int(match[1]) for match in found if match)
        kernels = [i.name for i in entry if 'quantize' in i.name]
        size = cost.count(module).bytes / 2**20
        print(
          f'{recipe:6s}remat={remat:6s}{how:6s}'
          f'{cycles:12,} cycles{size:9.1f} MiB   {", ".join(kernels)}',
          flush=True,
        )


if __name__ == '__main__':
  main()
