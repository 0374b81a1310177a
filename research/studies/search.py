"""Which combination of parts is best for its bytes: how `frugal` was chosen.

    python research/studies/search.py runs/benchmark | tee search.log

In the first study's four trials on the packed workload: first every change of
one part of studies/methods.Parts; then the parts that ended lower than the
first combination, put together from the best one on, each kept if it ends lower
still. Only what holds at most a tenth of Adam's state in float32 for the
linears of the layers may win. The winner and the first combination then get the
other studies, from which each takes its best choice, and are judged beside
tuned AdamW on seeds that nothing was chosen by (`studies/harness.py`).
"""

import dataclasses
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
# What won, and is `frugax.optim.frugal` since.
FRUGAL = Parts(projector='sketch2', moments='rotate', residual='fira')


def _built(run):
  config = run.config()
  fields = config.model.to_dict()
  model = llama.Llama(llama.config(fields.pop('size'), **fields))
  return config, model, jax.eval_shape(model.init, jax.random.PRNGKey(0))


def parameters(run: sweep.Run) -> int:
  """How many the model of a run has."""
  return sum(x.size for x in jax.tree.leaves(_built(run)[2]))


def share(run: sweep.Run) -> float:
  """State of the layers' linears over that of Adam in float32 for them."""
  config, model, shapes = _built(run)
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


def tried(workdir: pathlib.Path) -> list[Parts]:
  """All combinations that the search has tried there."""
  return [Parts(**row) for row in sweep.read_json(workdir / FOUND, [])]


def with_candidates(workdir: pathlib.Path, **arguments) -> harness.Benchmark:
  """The benchmark with them."""
  of = {p.name: p.method() for p in tried(workdir)}
  return harness.Benchmark(workdir, **arguments, methods=METHODS | of)


def label(name: str) -> str:
  """What a method is called in tables.

  Examples:
    >>> label(FRUGAL.name), label('ours'), label('adamw')
    ('frugal', 'ours', 'adamw')
  """
  return 'frugal' if name == FRUGAL.name else name


def first_loss(bench: harness.Benchmark, parts: Parts) -> float:
  """The least final loss of the first study; inf if a trial is missing."""
  trials = bench.study(WORKLOAD, parts.name, 0)
  if len(trials) < harness.TRIALS:
    return math.inf
  return min(r.final(WORKLOADS[WORKLOAD].steps) for r in trials)


def first_share(bench: harness.Benchmark, parts: Parts) -> float:
  """What `share` is of a combination."""
  return share(bench.run(bench.study_keys(WORKLOAD, parts.name, 0)[0]))


def winner(
  bench: harness.Benchmark, candidates: Iterable[Parts]
) -> Parts | None:
  """Whose first study ended lowest, of those that hold little enough.

  Args:
    bench: has their trials.
    candidates: any number; of those without a trial none wins.
  """
  for p in sorted(candidates, key=lambda p: first_loss(bench, p)):
    if math.isfinite(first_loss(bench, p)) and first_share(bench, p) <= LIMIT:
      return p
  return None


def over_base(bench: harness.Benchmark, name: str) -> tuple[float, float]:
  """Final loss less that of tuned AdamW, and half of its 95 % interval.

  Raises:
    LookupError: runs that judge them are missing.
  """
  finals, base = (bench.finals(WORKLOAD, n) for n in (name, harness.BASE))
  if not (finals.size and base.size):
    raise LookupError(f'{name}: runs that judge it are missing')
  return orders.difference(finals, base)


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
    for p in parts:
      self.share[p] = first_share(self.bench, p)
      self.loss[p] = first_loss(self.bench, p)
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


def row(bench: harness.Benchmark, parts: Parts, share: float) -> str:
  """What a combination's first study tells.

  Args:
    bench: has its trials; `-` stands for what one lacks.
    parts: the combination.
    share: of Adam's state, see `share`.
  """
  keys = bench.study_keys(WORKLOAD, parts.name, 0)
  choices = {k[2:4]: bench.record(k) for k in keys}
  loss, best, commits = first_loss(bench, parts), '-', '-'
  if math.isfinite(loss):
    steps = WORKLOADS[WORKLOAD].steps
    chosen = min(choices, key=lambda c: choices[c].final(steps))
    marks = harness.edges(choices, chosen, outermost=1)
    best = ', '.join(
      f'{value:g}{f" ({mark})" * bool(mark)}'
      for value, mark in zip(chosen, marks, strict=True)
    )
    commits = bench.commits(keys)
  over = ' more than a tenth' if share > LIMIT else ''
  return f'{parts.name:52}{loss:9.4f}{share:9.1%}  {best:42}{commits}{over}'


def told(bench: harness.Benchmark, parts: Parts) -> str:
  """How a combination that was judged compares with tuned AdamW."""
  try:
    mean, half = over_base(bench, parts.name)
  except LookupError as missing:
    return str(missing)
  trials, judging = bench.ran(WORKLOAD, parts.name)
  name = f'{parts.name} (frugal)' if parts == FRUGAL else parts.name
  return (
    f'{name}: {mean:+.4f} +- {half:.4f} nats a token over tuned'
    f' {harness.BASE}, {len(harness.FRESH)} seeds, {harness.FRESH[0]} to'
    f' {harness.FRESH[-1]}; commits {bench.commits(trials)} (trials),'
    f' {bench.commits(judging)}'
  )


def main():
  args = sweep.parser(__doc__).parse_args()
  search = Search(args)
  best = search.run()
  bench = search.bench
  judged = list(dict.fromkeys([best, Parts()]))
  names = [*(p.name for p in judged), harness.BASE]
  bench.get(WORKLOAD, names)
  bench.judge(WORKLOAD, names)
  keys = [
    key
    for name in dict.fromkeys([*(p.name for p in search.loss), harness.BASE])
    for own in bench.ran(WORKLOAD, name)
    for key in own
  ]
  print('\n'.join(bench.origins(keys)))
  print(
    f'\n{f"first study, {harness.TRIALS} trials, seed 0":52}{"loss":>9}'
    f'{"of Adam":>9}  {"rate, b2":42}commit'
  )
  for p in sorted(search.loss, key=search.loss.get):
    print(row(bench, p, search.share[p]))
  print(
    'of Adam: state of the linears over that of Adam in float32; edge: the'
    f' lowest or highest of the {harness.TRIALS}\n'
  )
  for p in judged:
    print(told(bench, p))


if __name__ == '__main__':
  main()
