"""Our optimizers' steps against those of PyTorch packages and optax.contrib.

    make bench-peers

The tensors are LLaMA-60m's in float32, the threads all cores, the ranks those
of bench_optim.py. Steps of the two alternate, in an order drawn anew for every
pair, in one run; refreshes of the subspaces are not among the timed steps. The
figures are medians. PyTorch's apply to one tensor a layer, and so does galore
of optax.contrib; ours and muon apply to stacks. optax.contrib runs in this
process, jitted with parameters and state donated, as ours.

PyTorch's run with OMP_WAIT_POLICY=passive, so that their threads sleep while
they wait: by default they spin, also while it is our turn, and take the cores
from our step. A thread that sleeps has to be woken for its next loop, which
their times contain.

8-bit Adam, `quantize_state` of optax's, is timed in two formats against the
AdamW8bit of torchao and of bitsandbytes, all without decay. `compiled` says
how many graphs of its step a peer compiles: none is eager PyTorch, which is how
all of them but torchao's are written. Where a peer tries to and runs eagerly
instead, the line below its own says why; where it does not run at all, its own
does. `state` is what the optimizer holds after the first step.

Of our optimizers optax.contrib has galore, which projects the longer side of a
matrix: `galore long` is ours with `side='long'`. Its muon is the only one, so
`muon dynamic8` is that within `quantize_state`, against it in float32.

Loss: three least-squares problems (peers_problem.py) at once, both from the
same weights, rank 16, a fourth of the shorter side of all three, and an
interval beyond the run, by an SVD where the method has one: the loss after 200
steps, and the largest relative difference of the two on the way. Random
projections and 8-bit codes are each package's own. The APOLLO of
pytorch_optimizer scales the projected gradient and maps that back, where the
method scales the gradient itself, so it ends elsewhere.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import optim
from frugax.optim import axes as axes_lib
from frugax.train import metrics
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


# Theirs in this process, by the name in optax.contrib.
OPTAX = (
  ('galore', 'galore'),
  ('galore long', 'galore'),
  ('muon dynamic8', 'muon'),
)
# More steps would reach the second refresh, the 200th step.
_PAIRS = 190


def muon(axes):
  """optax's, of what has axes; of all matrices if there are none."""
  numbers = jax.tree.map(
    lambda a: optax.contrib.MuonDimensionNumbers(a.rows, a.cols), axes
  )
  return optax.contrib.muon(floors.LR, muon_weight_dimension_numbers=numbers)


# Ours that have no rank.
_FULL = bench_optim.BESIDE_ADAMW | {
  'muon dynamic8': lambda axes: optim.quantize_state(muon(axes), 'dynamic8')
}


def ours(alias, axes):
  """Our side of a row."""
  if alias in _FULL:
    return _FULL[alias](axes)
  if alias == 'galore long':
    return optim.galore(floors.LR, axes=axes, side='long', projector='sketch')
  return bench_optim.ours(alias, axes)


# Of the small problem, in the papers' orientation.
_RANK = min(min(shape) for shape in peers_problem.SHAPES) // 4
_MINI = 16.0  # the scale of apollo_mini, for widths of 64


def ours_small(alias):
  """Our side of a row on the small problem."""
  if alias in _FULL:
    return _FULL[alias](None)
  name, *side = alias.split()
  arguments = {'side': side[0]} if side else {}
  arguments |= {'scale': _MINI} if name == 'apollo_mini' else {'rank': _RANK}
  return getattr(optim, name)(floors.LR, update_interval=10**6, **arguments)


def losses(tx):
  """Of an optax optimizer on the small problem."""
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


class Peer(NamedTuple):
  """The other side of a row.

  Attributes:
    said: what it says of itself, see peers_torch.py.
    timed: does one step and returns its seconds.
  """

  said: dict[str, Any]
  timed: Callable[[], float]


@contextlib.contextmanager
def in_torch(python, job):
  """The peer of a job, in a process of its own."""
  script = pathlib.Path(__file__).with_name('peers_torch.py')
  with subprocess.Popen(
    [python, script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    bufsize=1,
    env=os.environ | {'OMP_WAIT_POLICY': 'passive'},
  ) as process:

    def ask(line):
      answer = None
      with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line + '\n')
        answer = process.stdout.readline()
      if not answer:
        with contextlib.suppress(BrokenPipeError):
          process.stdin.close()
        sys.exit(f'{job["package"]}.{job["name"]} ended: its error is above')
      return json.loads(answer)

    yield Peer(ask(json.dumps(job)), lambda: ask('step'))


def in_optax(name, params, grads, axes):
  """The peer of this name in optax.contrib, in this process."""
  if name == 'galore':
    tx, view = bench_optim.optax_galore(params, axes)
    # As the papers' orientation, for squares to be projected as ours are.
    small = optax.contrib.galore(
      floors.LR,
      _RANK,
      update_proj_gap=10**6,
      scale=0.25,
      weight_dimension_numbers=optax.contrib.GaLoreDimensionNumbers(1, 0),
    )
  else:
    tx, view, small = muon(axes), lambda tree: tree, muon(None)
  params, grads = view(params), view(grads)
  said = {
    'compiled': 'jit',
    'eager': None,
    'bytes': optim.state_bytes(tx, params)['total'],
    'losses': losses(small),
    'versions': {'optax': optax.__version__},
  }
  step = bench_optim.step_of(tx)
  return Peer(said, bench_optim.stepper(step, tx.init, params, grads))


def _small(group):
  """A group's arguments for the small problem."""
  if 'rank' not in group:
    return group
  own = {'scale': _MINI} if group['rank'] == 1 else {'rank': _RANK}
  return group | own | {'update_proj_gap': 10**6}


def jobs(wanted, params, axes):
  """Alias, name and job of the rows in PyTorch."""
  matrices, others = shapes_of(params, axes)
  for alias, package, name, group, arguments in PEERS:
    if alias not in wanted:
      continue
    if alias in floors.METHODS:
      group = group | {'rank': floors.METHODS[alias].rank}
    yield (
      alias,
      f'{package}.{name}',
      {
        'package': package,
        'name': name,
        'group': group,
        'arguments': arguments,
        'rate': floors.LR,
        'small': _small(group),
        'matrices': matrices,
        'others': others,
        'threads': os.cpu_count(),
      },
    )


def compare(alias, who, peer, tensors, pairs):
  """The lines of a row."""
  said, (params, grads, axes) = peer.said, tensors
  if 'error' in said:
    return [f'{alias:14} {"":9}  {who:28} does not run: {said["error"]}']
  tx = ours(alias, axes)
  state = optim.state_bytes(tx, params)['total']
  own, other = losses(ours_small(alias)), np.array(said['losses'])
  step = bench_optim.step_of(tx)
  a, b = bench_optim.alternate(
    [bench_optim.stepper(step, tx.init, params, grads), peer.timed], pairs
  )
  lines = [
    f'{alias:14} {a * 1e3:6.1f} ms  {who:28} {b * 1e3:6.1f} ms {a / b:6.3f}'
    f'{state / 1e6:9.1f}{said["bytes"] / 1e6:8.1f}{own[-1]:10.5f}'
    f'{other[-1]:9.5f}{np.max(abs(own - other) / other):9.1e}'
    f'{said["compiled"]:>10}'
  ]
  if said['eager']:
    lines.append(f'{"":26}^ eager, it did not compile: {said["eager"]}')
  return lines


def parse(argv):
  """Of the command line, checked."""
  aliases = list(dict.fromkeys(alias for alias, *_ in (*PEERS, *OPTAX)))
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--python', required=True, help="the packages' Python")
  parser.add_argument(
    '--pairs', type=int, default=20, help='steps of each of the two'
  )
  parser.add_argument(
    '--only', nargs='+', default=aliases, metavar='NAME', help='rows of these'
  )
  args = parser.parse_args(argv)
  for name in args.only:
    if name not in aliases:
      parser.error(f'--only {name!r}: choose from {", ".join(aliases)}')
  if not 0 < args.pairs <= _PAIRS:
    parser.error(f'--pairs {args.pairs}: choose from 1 to {_PAIRS}')
  if not shutil.which(args.python):
    parser.error(
      f'--python {args.python!r} is no program; make bench-peers installs'
      ' one, .venv-peers/bin/python'
    )
  return args


def main(argv=None):
  args = parse(argv)
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, {info["hardware"]["device_kind"]},'
    f' {os.cpu_count()} threads, --pairs {args.pairs}'
  )
  tensors = params, grads, axes = bench_optim.parameters()
  rows, versions = [], {}

  def add(alias, who, peer):
    versions.update(peer.said.get('versions', {}))
    rows.extend(compare(alias, who, peer, tensors, args.pairs))
    print(f'{alias} / {who}: done', flush=True)

  for alias, who, job in jobs(args.only, params, axes):
    with in_torch(args.python, job) as peer:
      add(alias, who, peer)
  for alias, name in OPTAX:
    if alias in args.only:
      peer = in_optax(name, params, grads, axes)
      add(alias, f'optax.contrib.{name}', peer)
  print(', '.join(f'{name} {found}' for name, found in versions.items()))
  print(
    f'{"":14} {"ours":>9}  {"peer":28} {"theirs":>9} {"ratio":>6}'
    f'{"state, MB":>17}{"loss":>19}{"apart":>9}{"compiled":>10}'
  )
  print('\n'.join(rows))


if __name__ == '__main__':
  main()
