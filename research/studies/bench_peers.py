"""Our optimizers' steps against those of the PyTorch packages.

    make bench-peers

The tensors are LLaMA-60m's in float32, the threads all cores, the ranks those
of bench_optim.py. Steps of the two alternate, in an order drawn anew for every
pair, in one run; refreshes of the subspaces are not among the timed steps. The
figures are medians. The packages apply to one tensor a layer, ours to stacks.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess

import bench_optim
import jax
import numpy as np

from frugax.optim import axes as axes_lib

_GALORE = {'update_proj_gap': 200, 'scale': 0.25}
# Alias, package, class, the projected group's arguments, all groups'.
PEERS = (
  ('galore', 'galore_torch', 'GaLoreAdamW', _GALORE | {'proj_type': 'std'}, {}),
  (
    'galore',
    'pytorch_optimizer',
    'GaLore',
    _GALORE | {'projection_type': 'std'},
    {},
  ),
  (
    'fira',
    'pytorch_optimizer',
    'Fira',
    _GALORE | {'projection_type': 'std'},
    {},
  ),
  (
    'apollo',
    'pytorch_optimizer',
    'APOLLO',
    {'update_proj_gap': 200, 'scale': 1.0, 'projection_type': 'std'},
    {'scale_type': 'channel'},
  ),
  (
    'apollo_mini',
    'pytorch_optimizer',
    'APOLLO',
    {'update_proj_gap': 200, 'scale': 128.0, 'projection_type': 'std'},
    {'scale_type': 'tensor'},
  ),
)


def shapes_of(params, axes):
  """Shapes of the projected matrices, one a layer in (out, in), and others."""
  matrices, others = [], []
  specs = jax.tree.structure(params).flatten_up_to(axes)
  for x, spec in zip(jax.tree.leaves(params), specs, strict=True):
    if spec is None:
      others.append(x.shape)
      continue
    *batch, m, n = axes_lib.matrix_shape(x.shape, spec)
    matrices += [(n, m)] * int(np.prod(batch))
  return matrices, others


@contextlib.contextmanager
def peer(python, job):
  """A function that does one step of the job elsewhere: its seconds."""
  script = pathlib.Path(__file__).with_name('peers_torch.py')
  # Threads that spin while they wait would take the cores from ours.
  environment = os.environ | {'OMP_WAIT_POLICY': 'passive'}
  with subprocess.Popen(
    [python, script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    bufsize=1,
    env=environment,
  ) as process:
    process.stdin.write(json.dumps(job) + '\n')

    def step():
      process.stdin.write('step\n')
      answer = process.stdout.readline()
      if not answer:
        raise RuntimeError(f'{job["name"]} ended: its error is above')
      return float(answer)

    yield step
    process.stdin.close()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--python', required=True, help="the packages' Python")
  parser.add_argument('--pairs', type=int, default=20)
  args = parser.parse_args()
  params, grads, axes = bench_optim.parameters()
  matrices, others = shapes_of(params, axes)
  rows = []
  for alias, package, name, group, arguments in PEERS:
    job = {
      'package': package,
      'name': name,
      'group': group | {'rank': bench_optim.METHODS[alias].rank},
      'arguments': arguments,
      'matrices': matrices,
      'others': others,
      'threads': os.cpu_count(),
    }
    tx = bench_optim.ours(alias, axes)
    ours = bench_optim.stepper(bench_optim.step_of(tx), tx.init, params, grads)
    with peer(args.python, job) as theirs:
      a, b = bench_optim.alternate([ours, theirs], args.pairs)
    rows.append((alias, f'{package}.{name}', a, b))
    print(f'{alias} / {package}.{name}: {a / b:.3f}', flush=True)
  print(f'{"alias":12} {"ours":>9}  {"peer":26} {"theirs":>9} {"ratio":>6}')
  for alias, name, a, b in rows:
    print(
      f'{alias:12} {a * 1e3:6.1f} ms  {name:26} {b * 1e3:6.1f} ms {a / b:6.3f}'
    )


if __name__ == '__main__':
  main()
