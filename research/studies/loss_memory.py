"""What memory the loss and its gradients need beside operands and results.

    python research/studies/loss_memory.py
    python research/studies/loss_memory.py cpu v5e h200    # only these

At the shapes of Gemma-2 2B's head: 8192 tokens, 256000 tokens of vocabulary,
width 2304, bfloat16, forward and backward. Programs are compiled, by the
compilers of TPUs (`pip install 'frugax[tpu]'`) and of GPUs, if they are
installed (`make test-gpu` makes an environment that has them), for described
chips; nothing is run. `naive` is a loss from float32 logits, where it compiles;
the results are the loss and both gradients, 1.217 GB.
"""

import os
import sysconfig

# Before jax: libtpu is asked for a chip it does not have, and to write no logs.
os.environ |= {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_LOG_DIR': 'disabled',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
  # There is no GPU to time alternatives on. The assembler is in a package.
  'XLA_FLAGS': '--xla_gpu_autotune_level=0',
  'PATH': sysconfig.get_path('purelib')
  + f'/nvidia/cuda_nvcc/bin{os.pathsep}{os.environ["PATH"]}',
}

import argparse
import contextlib
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from frugax import kernels

TOKENS, VOCABULARY, WIDTH = 8192, 256000, 2304
TPUS = {
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  'tpu7x': 'tpu7x:2x2x1',
}
TARGET = pathlib.Path(__file__).parents[2] / 'tests' / 'kernels' / 'h200.txtpb'


def naive(x, w, labels, layout):
  w = w if layout == 'NN' else w.T
  z = jnp.matmul(x, w, preferred_element_type=jnp.float32)
  at = jnp.take_along_axis(z, labels[:, None], 1)[:, 0]
  return jax.nn.logsumexp(z, axis=1) - at


def device_of(chip):
  if chip == 'cpu':
    return jax.devices()[0]
  if chip in TPUS:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=TPUS[chip]
    ).devices[0]
  return topologies.get_topology_desc(
    platform='cuda', target_config=TARGET.read_text(), topology='1x1x1'
  ).devices[0]


def memory(device, loss, layout):
  mesh = jax.sharding.Mesh(np.array([device]), ('x',))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  w = (WIDTH, VOCABULARY) if layout == 'NN' else (VOCABULARY, WIDTH)
  operands = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    for shape, dtype in (
      ((TOKENS, WIDTH), jnp.bfloat16),
      (w, jnp.bfloat16),
      ((TOKENS,), jnp.int32),
    )
  ]

  def total(x, w, labels):
    return loss(x, w, labels, layout=layout).sum()

  step = jax.jit(jax.value_and_grad(total, (0, 1)))
  with (
    contextlib.nullcontext() if device.platform == 'cpu' else jax.set_mesh(mesh)
  ):
    return step.lower(*operands).compile().memory_analysis()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('chips', nargs='*', default=['cpu', *TPUS, 'h200'])
  print(f'jax {jax.__version__}; GB of temporaries, compiled, not run')
  print(f'{"chip":8}{"loss":10}{"w (D, V)":>10}{"w (V, D)":>10}')
  for chip in parser.parse_args().chips:
    try:
      device = device_of(chip)
    except Exception as error:
      print(f'{chip:8}no compiler: {str(error).splitlines()[0][:60]}')
      continue
    losses = {'naive': naive} | {
      name: functools.partial(kernels.linear_cross_entropy, implementation=name)
      for name in ('xla', 'mosaic')
      if name == 'xla' or chip in TPUS
    }
    for name, loss in losses.items():
      row = ''
      for layout in ('NN', 'NT'):
        try:
          size = memory(device, loss, layout).temp_size_in_bytes
          row += f'{size / 1e9:10.3f}'
        except jax.errors.JaxRuntimeError as error:
          if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
          row += f'{"too much":>10}'
      print(f'{chip:8}{name:10}{row}', flush=True)


if __name__ == '__main__':
  main()
