"""Which combination of parts is best for its bytes: how `frugal` was chosen.

    python research/studies/search.py runs/benchmark | tee search.log

In the first study's four trials on the packed workload: first every change of
one part of studies/methods.Parts; then the parts that ended lower than the
first combination, put together from the best one on, each kept if it ends lower
still. Only what holds at most a tenth of Adam's state for the linears of the
layers may win. The winner and the first combination then get the other studies,
from which each takes its best choice, and are judged beside tuned AdamW on
seeds that nothing was chosen by (`studies/harness.py`).
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable

import jax

from frugax.models import llama
from frugax.optim import state as state_lib
from frugax.train import optimizer as fx_optimizer
from studies import harness, sweep
from studies.methods import CHANGES, METHODS, Parts
from studies.recipes import orders
from studies.workloads import WORKLOADS

LIMIT = 0.1
WORKLOAD = 'packed'
FOUND = 'search.json'  # the combinations that were tried, in WORKDIR


def share(run: sweep.Run) -> float:
  """State of the layers' linears over that of Adam in float32 for them."""
  config = run.config()
  fields = config.model.to_dict()
  model = llama.Llama(llama.config(fields.pop('size'), **fields))
  shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  tx, _ = fx_optimizer.make_optimizer(config, shapes, model.axes())
  own, _ = state_lib.parameter_bytes(tx, shapes)
  held = adam = 0
  for (path, x), size in zip(
    jax.tree.leaves_with_path(shapes), jax.tree.leaves(own), strict=True
  ):
    names = [key.key for key in path]
    if 'layers' in names and names[-1] == 'kernel':
      held += size
      adam += 8 * x.size
  return held / adam


def with_candidates(workdir: pathlib.Path, **arguments) -> harness.Benchmark:
  """The benchmark with all combinations that the search has tried there."""
  path = workdir / FOUND
  tried = json.loads(path.read_text()) if path.exists() else []
  of = {p.name: p.method() for p in (Parts(**fields) for fields in tried)}
  return harness.Benchmark(workdir, **arguments, methods=METHODS | of)


def together(a: Parts, b: Parts) -> Parts:
  """a with all that b changes of the first combination.

  Examples:
    >>> together(Parts(every=1), Parts(residual='fira')).name
    'ours every=1 residual=fira'
  """
  first, own = dataclasses.asdict(Parts()), dataclasses.asdict(b)
  return dataclasses.replace(
    a, **{k: v for k, v in own.items() if v != first[k]}
  )


class Search:
  """Tries combinations; keeps what was tried in WORKDIR."""

  def __init__(self, args):
    self.bench = with_candidates(
      args.workdir,
      data_dir=args.data_dir,
      jobs=args.jobs,
      train=not args.report,
    )
    self._path = args.workdir / FOUND
    self.loss: dict[Parts, float] = {}
    self.share: dict[Parts, float] = {}

  def tries(self, parts: Iterable[Parts]) -> None:
    """Trains the first study of each, and takes its least final loss."""
    parts = [p for p in dict.fromkeys(parts) if p not in self.loss]
    self.bench.methods |= {p.name: p.method() for p in parts}
    self.bench.get(WORKLOAD, [p.name for p in parts], studies=[0])
    steps = WORKLOADS[WORKLOAD].steps
    for p in parts:
      trials = self.bench.study(WORKLOAD, p.name, 0)
      key = self.bench.study_keys(WORKLOAD, p.name, 0)[0]
      self.share[p] = share(self.bench.run(key))
      self.loss[p] = math.inf  # so far: not all trials are there
      if len(trials) == harness.TRIALS:
        self.loss[p] = min(r.final(steps) for r in trials)
    if self.bench.train:
      sweep.write_json(self._path, [dataclasses.asdict(p) for p in self.loss])

  def allowed(self) -> list[Parts]:
    """Those that hold little enough, the best first."""
    small = [p for p, held in self.share.items() if held <= LIMIT]
    return sorted(small, key=self.loss.get)

  def run(self) -> Parts:
    """The winner."""
    first = Parts()
    self.tries([first, *CHANGES])
    better = [p for p in self.allowed() if self.loss[p] < self.loss[first]]
    best = better[0] if better else first
    for change in better[1:]:
      combined = together(best, change)
      if combined.valid:
        self.tries([combined])
        if combined == self.allowed()[0]:
          best = combined
    return self.allowed()[0]


def main():
  args = sweep.parser(__doc__).parse_args()
  search = Search(args)
  best = search.run()
  bench = search.bench
  print('\n'.join(bench.origins()))
  print(f'\n{"first study":52}{"loss":>9}{"of Adam":>9}')
  for p in sorted(search.loss, key=search.loss.get):
    over = ' more than a tenth' if search.share[p] > LIMIT else ''
    print(f'{p.name:52}{search.loss[p]:9.4f}{search.share[p]:9.1%}{over}')
  names = list(dict.fromkeys([best.name, Parts().name, harness.BASE]))
  bench.get(WORKLOAD, names)
  bench.judge(WORKLOAD, names)
  base = bench.finals(WORKLOAD, harness.BASE)
  print()
  for name in names[:-1]:
    finals = bench.finals(WORKLOAD, name)
    if not (finals.size and base.size):
      print(f'{name}: runs that judge it are missing')
      continue
    mean, half = orders.difference(finals, base)
    print(
      f'{name}: {mean:+.4f} +- {half:.4f} nats a token over tuned'
      f' {harness.BASE}, {len(harness.FRESH)} seeds'
    )


if __name__ == '__main__':
  main()
