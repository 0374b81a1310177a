"""Our optimizers' steps against those of the PyTorch packages.

    make bench-peers

The tensors are LLaMA-60m's in float32, the threads all cores, the ranks those
of bench_optim.py. Steps of the two alternate, in an order drawn anew for every
pair, in one run; refreshes of the subspaces are not among the timed steps. The
figures are medians. The packages apply to one tensor a layer, ours to stacks.

8-bit Adam, `quantize_state` of optax's, is timed in two formats against the
AdamW8bit of torchao and of bitsandbytes, all without decay; torchao compiles
its step. A peer that does not run here, or only without compilation, has a line
that says why. `state` is what the optimizer holds after the first step.

Loss: three least-squares problems (peers_problem.py) at once, both from the
same weights, a rank of a fourth of the shorter side and an interval beyond the
run, by an SVD where the method has one: the loss after 200 steps, and the
largest relative difference of the two on the way. Random projections and 8-bit
codes are each package's own.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import optim
from frugax.optim import axes as axes_lib
from studies import bench_optim, floors, peers_problem

_GALORE = {'update_proj_gap': 200, 'scale': 0.25}
_APOLLO = {
  'proj': 'random',
  'scale_type': 'channel',
  'scale': 1.0,
  'update_proj_gap': 200,
  'proj_type': 'std',
}
# Alias, package, class, the projected group's arguments, all groups'.
PEERS = (
  ('galore', 'galore_torch', 'GaLoreAdamW', _GALORE | {'proj_type': 'std'}, {}),
  ('apollo', 'apollo_torch', 'APOLLOAdamW', _APOLLO, {}),
  (
    'apollo_mini',
    'apollo_torch',
    'APOLLOAdamW',
    _APOLLO | {'scale': 128.0, 'scale_type': 'tensor'},
    {},
  ),
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
  *(
    (alias, package, 'AdamW8bit', {}, {'weight_decay': 0.0})
    for package in ('torchao.optim', 'bitsandbytes.optim')
    for alias in ('adam dynamic8', 'adam linear8')
  ),
)


def ours(alias, axes):
  """Our side of a row."""
  if alias in bench_optim.BESIDE_ADAMW:
    return bench_optim.BESIDE_ADAMW[alias](axes)
  return bench_optim.ours(alias, axes)


# Of the small problem, in the papers' orientation.
_RANK = min(min(shape) for shape in peers_problem.SHAPES) // 4
_MINI = 16.0  # the scale of apollo_mini, for widths of 64


def losses(alias):
  """Ours on the small problem."""
  small = bench_optim.BESIDE_ADAMW.get(alias)
  if small:
    tx = small(None)
  else:
    make = getattr(optim, alias)
    rank = {'scale': _MINI} if alias == 'apollo_mini' else {'rank': _RANK}
    tx = make(floors.LR, update_interval=10**6, **rank)
  problem = peers_problem.regressions()

  def loss_of(params):
    return sum(
      jnp.mean((r.inputs @ w - r.labels) ** 2)
      for w, r in zip(params, problem, strict=True)
    )

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = [jnp.asarray(r.weight.T) for r in problem]
  state, found = tx.init(params), []
  for i in range(peers_problem.STEPS + 1):
    params, state, loss = step(params, state)
    if i % peers_problem.EVERY == 0:
      found.append(float(loss))
  return np.array(found)


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
  """A function that does one step of the job elsewhere: its seconds.

  And what the job says of itself, see peers_torch.py.
  """
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

    def ask(line):
      process.stdin.write(line + '\n')
      answer = process.stdout.readline()
      if not answer:
        raise RuntimeError(f'{job["name"]} ended: its error is above')
      return json.loads(answer)

    said = ask(json.dumps(job))
    yield lambda: ask('step'), said
    process.stdin.close()


def _small(group):
  """A group's arguments for the small problem."""
  if 'rank' not in group:
    return group
  own = {'scale': _MINI} if group['rank'] == 1 else {'rank': _RANK}
  return group | own | {'update_proj_gap': 10**6}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--python', required=True, help="the packages' Python")
  parser.add_argument('--pairs', type=int, default=20)
  parser.add_argument('--only', nargs='*', help='names of aliases')
  args = parser.parse_args()
  params, grads, axes = bench_optim.parameters()
  matrices, others = shapes_of(params, axes)
  rows = []
  for alias, package, name, group, arguments in PEERS:
    if args.only and alias not in args.only:
      continue
    if alias in floors.METHODS:
      group = group | {'rank': floors.METHODS[alias].rank}
    job = {
      'package': package,
      'name': name,
      'group': group,
      'arguments': arguments,
      'rate': floors.LR,
      'small': _small(group),
      'matrices': matrices,
      'others': others,
      'threads': os.cpu_count(),
    }
    who = f'{package}.{name}'
    with peer(args.python, job) as (theirs, said):
      if 'error' in said:
        rows.append(
          f'{alias:14} {"":9}  {who:28} does not run: {said["error"]}'
        )
        print(rows[-1], flush=True)
        continue
      tx = ours(alias, axes)
      state = optim.state_bytes(tx, params)['total']
      own, other = losses(alias), np.array(said['losses'])
      a, b = bench_optim.alternate(
        [
          bench_optim.stepper(bench_optim.step_of(tx), tx.init, params, grads),
          theirs,
        ],
        args.pairs,
      )
    rows.append(
      f'{alias:14} {a * 1e3:6.1f} ms  {who:28} {b * 1e3:6.1f} ms {a / b:6.3f}'
      f'{state / 1e6:9.1f}{said["bytes"] / 1e6:8.1f}{own[-1]:10.5f}'
      f'{other[-1]:9.5f}{np.max(abs(own - other) / other):9.1e}'
      + (f'  not compiled: {said["eager"]}' if said['eager'] else '')
    )
    print(f'{alias} / {who}: {a / b:.3f}', flush=True)
  print(
    f'{"":14} {"ours":>9}  {"peer":28} {"theirs":>9} {"ratio":>6}'
    f'{"state, MB":>17}{"loss":>19}{"apart":>9}'
  )
  print('\n'.join(rows))


if __name__ == '__main__':
  main()
