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

import argparse
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from frugax import kernels
from frugax.plan import topologies

TOKENS, VOCABULARY, WIDTH = 8192, 256000, 2304
TPUS = {
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
  'tpu7x': 'tpu7x:2x2x1',
}
KERNELS = dict.fromkeys(TPUS, 'mosaic') | {'h200': 'triton'}


def naive(x, w, labels, layout):
  w = w if layout == 'NN' else w.T
  z = jnp.matmul(x, w, preferred_element_type=jnp.float32)
  at = jnp.take_along_axis(z, labels[:, None], 1)[:, 0]
  return jax.nn.logsumexp(z, axis=1) - at


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
  named = {chip: TPUS.get(chip, chip) for chip in parser.parse_args().chips}
  for chip, topology in list(named.items()):
    try:
      topologies.prepare(topology)
    except ValueError as error:
      print(f'{chip:8}{error}')
      del named[chip]
  for chip, topology in named.items():
    device = topologies.devices(topology)[0]
    losses = {'naive': naive} | {
      name: functools.partial(kernels.linear_cross_entropy, implementation=name)
      for name in ('xla', *([KERNELS[chip]] if chip in KERNELS else []))
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
