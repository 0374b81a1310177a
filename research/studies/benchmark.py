"""What each optimizer takes to the same loss, and what it scores.

    python -m frugax.train.corpus --data_dir=data
    python research/studies/benchmark.py runs/benchmark | tee benchmark.log

The rules are told in studies/harness.py, what each method tries in
studies/methods.py. LLaMA with three layers of dimension 64 (0.2 M parameters,
bytes) on the standard library's source, 600 steps of 4 x 128, in two forms:
packed, and, for some methods, each sequence a document, cut or padded. Two runs
at a time, each on a core of its own. Not run by us yet: --workloads=10m and
--workloads=60m, on one GPU with --jobs=1.

WORKDIR gets one folder a run and benchmark.json. Interrupted, the same command
goes on; runs that benchmark.json tells of are not trained again: copy the one
beside this file there to report on it or to add to it. --report trains nothing.
Two runs of the command give the same tables but for the seconds.
"""

import argparse
import math
import pathlib
import statistics
from collections.abc import Sequence

from frugax import names
from frugax.report import scoring
from studies import harness
from studies.methods import METHODS
from studies.recipes import orders

# What is also trained on padded documents.
PADDED = (
  *('adamw', 'adamw_bf16', 'galore', 'fira', 'apollo', 'ldadam', 'snsm'),
  *('stable_spam', 'muon'),
)
_NEVER = 'never'


def to_target(
  bench: harness.Benchmark,
  workload: str,
  methods: Sequence[str],
) -> str:
  """What each method took to the target, with the range of its studies.

  Args:
    bench: has all trials of the methods.
    workload: its name.
    methods: a row each.
  """
  own = harness.WORKLOADS[workload]
  lines = [
    f'{workload}: target {bench.target(workload):.4f} nats a token,'
    f' {harness.STUDIES} studies of {harness.TRIALS} trials, {own.steps} steps'
    f' of {own.batch} x {own.length}',
    f'{"":14}{"steps":>17}{"tokens":>9}{"slots":>9}{"FLOPs":>9}'
    f'{"seconds":>20}{"state":>9}{"of Adam":>8}{"step":>9}',
  ]
  for name in methods:
    took = {a: bench.took(workload, name, a) for a in harness.AXES}
    middle = {a: scoring.of_workload(t) for a, t in took.items()}
    record = bench.study(workload, name, 0)[0]
    lines.append(
      f'{name:14}{_ranged(took["steps"], 0):>17}'
      f'{_short(middle["tokens"]):>9}{_short(middle["slots"]):>9}'
      f'{_short(middle["flops"]):>9}'
      f'{_ranged(took["seconds"], 1):>20}'
      f'{_short(record.state_bytes):>9}'
      f'{record.state_bytes / record.adam_bytes:8.1%}'
      f'{_short(bench.bytes_of_step(workload, name)):>9}'
    )
  *_, share = scoring.median_interval(range(harness.STUDIES))
  lines.append(
    'each axis: the median of the studies; in brackets the least and the'
    ' greatest, between which\nthe median of all studies would be with'
    f' {share:.0%}; state, step: bytes of the'
    ' optimizer and of all that the compiled step takes on a CPU'
  )
  return '\n'.join(lines)


def losses(
  bench: harness.Benchmark, workload: str, methods: Sequence[str]
) -> str:
  """The least final losses of the studies, and what they are beside AdamW's."""
  base = bench.finals(workload, harness.BASE)
  steps = harness.WORKLOADS[workload].steps
  lines = [
    f'{workload}: final validation loss, nats a token',
    f'{"":14}{"loss":>8}{"- adamw":>9}{"+-":>8}{"harness":>9}'
    f'{"diverged":>10}  best choices',
  ]
  for name in methods:
    finals = bench.finals(workload, name)
    mean, half = orders.difference(finals, base)
    trials = [
      r for s in range(harness.STUDIES) for r in bench.study(workload, name, s)
    ]
    lost = sum(math.isinf(r.final(steps)) for r in trials)
    best = min(trials, key=lambda r: r.final(steps))
    choices = [
      ' '.join(f'{value:g}' for value in bench.best(workload, name, s).values())
      for s in range(harness.STUDIES)
    ]
    compat = best.eval_compat[-1] if best.eval_compat else math.nan
    lines.append(
      f'{name:14}{statistics.mean(finals):8.4f}{mean:+9.4f}{half:8.4f}'
      f'{compat:9.4f}{f"{lost} of {len(trials)}":>10}  {"; ".join(choices)}'
    )
  lines.append(
    'loss: mean of the studies, each with its best trial; - adamw, +-: at equal'
    ' seed, half of the\n95 % interval; harness: of the best trial, as the'
    ' published code prints it; choices: rate and b2'
  )
  return '\n'.join(lines)


def scores(
  bench: harness.Benchmark, workloads: Sequence[str], methods: Sequence[str]
) -> str:
  """AlgoPerf's scores over the workloads, an axis a column."""
  found = {}
  for axis in harness.AXES:
    taken = {
      w: {
        name: scoring.of_workload(bench.took(w, name, axis)) for name in methods
      }
      for w in workloads
    }
    ratios = scoring.ratios(taken)
    found[axis] = {n: scoring.benchmark_score(r) for n, r in ratios.items()}
  order = sorted(methods, key=lambda n: -found['steps'][n])
  lines = [f'{"":14}' + ''.join(f'{axis:>9}' for axis in found)]
  for name in order:
    lines.append(
      f'{name:14}' + ''.join(f'{of[name]:9.3f}' for of in found.values())
    )
  lines.append(
    f'1: first on each of {", ".join(workloads)}; 0: never there, or beyond'
    f' {scoring.R_MAX:g} times the first'
  )
  return '\n'.join(lines)


def _ranged(values, digits):
  middle = scoring.of_workload(values)
  low, high, _ = scoring.median_interval(values)
  return (
    f'{_number(middle, digits)} [{_number(low, digits)},'
    f' {_number(high, digits)}]'
  )


def _number(value, digits):
  return _NEVER if math.isinf(value) else f'{value:.{digits}f}'


def _short(value):
  if math.isinf(value):
    return _NEVER
  if math.isnan(value):
    return '-'
  for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if value >= unit:
      return f'{value / unit:.2f}{name}'
  return f'{value:.0f}'


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--workloads', default=','.join(harness.DEFAULT))
  parser.add_argument(
    '--methods', help='; all, and some of them where documents are padded'
  )
  parser.add_argument('--data_dir', default='data')
  parser.add_argument(
    '--jobs', type=int, default=2, help='runs at a time, each on its own cores'
  )
  parser.add_argument(
    '--report', action='store_true', help='train nothing, tell what is there'
  )
  args = parser.parse_args()
  workloads = args.workloads.split(',')
  given = args.methods.split(',') if args.methods else []
  for kind, valid, chosen in (
    ('workload', harness.WORKLOADS, workloads),
    ('method', METHODS, given),
  ):
    for name in chosen:
      if name not in valid:
        parser.error(str(names.unknown(kind, name, valid)))
  bench = harness.Benchmark(
    args.workdir, args.data_dir, args.jobs, train=not args.report
  )
  of = {
    w: given or (PADDED if w == 'padded' else [*METHODS]) for w in workloads
  }
  for workload, methods in of.items():
    bench.get(workload, methods)
  print('\n'.join(bench.origins()), end='\n\n')
  for workload, methods in of.items():
    whole = [m for m in methods if bench.whole(workload, m)]
    if missing := [m for m in methods if m not in whole]:
      print(f'{workload}: NOT COMPLETE, left out: {", ".join(missing)}\n')
      of[workload] = whole
    if harness.BASE not in whole:
      continue
    print(to_target(bench, workload, whole), end='\n\n')
    print(losses(bench, workload, whole), end='\n\n')
  everywhere = [m for m in METHODS if all(m in of[w] for w in workloads)]
  if harness.BASE in everywhere:
    print(scores(bench, workloads, everywhere))


if __name__ == '__main__':
  main()
