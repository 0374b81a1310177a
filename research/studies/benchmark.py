"""What each optimizer takes to the same loss, and where it ends.

    python research/studies/workloads.py --data_dir=data
    python research/studies/benchmark.py runs/benchmark | tee benchmark.log

The rules are told in studies/harness.py, what each method tries in
studies/methods.py, models and data in studies/workloads.py: LLaMA with three
layers of dimension 64 (0.2 M parameters, bytes) on the standard library's
source, 500 steps of 4 x 128, in two forms: files, packed; and, for some
methods, blocks of lines, one a row and padded. Two runs at a time, each on a
core of its own. Not run by us yet: --workloads=10m, and 60m and 130m on C4, on
one GPU with --jobs=1.

WORKDIR gets one folder a run and benchmark.json. Interrupted, the same command
goes on; runs that benchmark.json tells of, with the same config, are not
trained again: copy the one in studies/logs there to report on it or to add to
it. --report trains nothing.
"""

from collections.abc import Sequence

from frugax import names
from frugax.report import scoring
from studies import harness, seeds, sweep
from studies.methods import METHODS
from studies.recipes import orders
from studies.workloads import WORKLOADS

# What is also trained on padded documents.
PADDED = ('adamw', 'galore', 'apollo', 'snsm', 'stable_spam', 'muon')
_NEVER = 'never'


def to_target(
  bench: harness.Benchmark, workload: str, methods: Sequence[str]
) -> str:
  """What each method took to the target, with the range of its studies.

  Args:
    bench: has all trials of the methods.
    workload: its name.
    methods: a row each.
  """
  own = WORKLOADS[workload]
  lines = [
    f'{workload}: target {bench.target(workload):.4f} nats a token,'
    f' {harness.STUDIES} studies of {harness.TRIALS} trials, {own.steps} steps'
    f' of {own.batch} x {own.length}',
    f'{"":18}{"steps":>21}{"tokens":>9}{"slots":>9}{"FLOPs":>9}'
    f'{"seconds":>22}{"state":>9}{"of Adam":>8}{"step":>9}',
  ]
  for name in methods:
    took = {a: bench.took(workload, name, a) for a in harness.AXES}
    middle = {a: scoring.of_workload(t) for a, t in took.items()}
    record = bench.study(workload, name, 0)[0]
    lines.append(
      f'{name:18}{_ranged(took["steps"], 0):>21}'
      f'{_short(middle["tokens"]):>9}{_short(middle["slots"]):>9}'
      f'{_short(middle["flops"]):>9}'
      f'{_ranged(took["seconds"], 1):>22}'
      f'{_short(record.state_bytes):>9}'
      f'{record.state_bytes / record.adam_bytes:8.1%}'
      f'{_short(bench.bytes_of_step(workload, name)):>9}'
    )
  *_, share = scoring.median_interval(range(harness.STUDIES))
  lines.append(
    'each axis: the median of the studies; in brackets the least and the'
    ' greatest, between which\nthe median of all studies would be with'
    f' {share:.0%}; state, step: bytes of the optimizer, and of all that the'
    ' compiled\nstep takes on a CPU'
  )
  return '\n'.join(lines)


def losses(
  bench: harness.Benchmark, workload: str, methods: Sequence[str]
) -> str:
  """Where the best choice of each method ends, and what that is to AdamW."""
  base = bench.finals(workload, harness.BASE)
  steps = WORKLOADS[workload].steps
  lines = [
    f'{workload}: final validation loss, nats a token, of the best of'
    f' {harness.STUDIES * harness.TRIALS} choices, {len(harness.FRESH)} other'
    ' seeds',
    f'{"":18}{"loss":>8}{"+-":>8}{"- adamw":>9}{"+-":>8}{"published":>11}'
    f'{"diverged":>10}  rate, b2',
  ]
  for name in methods:
    finals = bench.finals(workload, name)
    if not finals.size:
      continue
    loss, own = seeds.interval(finals)
    mean, half = orders.difference(finals, base)
    tried = list(bench.trials(workload, name))
    lost = sum(end == float('inf') for end, _ in tried)
    chosen = bench.best(workload, name)
    rates = [key[2] for _, key in tried]
    edge = ' (the edge)' * (chosen[0] in (min(rates), max(rates)))
    lines.append(
      f'{name:18}{loss:8.4f}{own:8.4f}{mean:+9.4f}{half:8.4f}'
      f'{harness.as_published(loss):11.4f}'
      f'{f"{lost} of {len(tried)}":>10}'
      f'  {chosen[0]:g}{edge}, {chosen[1] or "-"}'
    )
  lines.append(
    '+-: half of the 95 % interval of the mean; - adamw: at equal seed, after'
    f' {steps} steps; published:\nas the harness of the papers prints the loss'
    f' where it has {harness.PUBLISHED_N} batches; diverged: of the trials'
  )
  return '\n'.join(lines)


def scores(
  bench: harness.Benchmark, workloads: Sequence[str], methods: Sequence[str]
) -> str:
  """AlgoPerf's scores over the workloads, an axis a column."""
  found = {}
  for axis in ('steps', 'tokens', 'seconds'):
    taken = {
      w: {
        name: scoring.of_workload(bench.took(w, name, axis)) for name in methods
      }
      for w in workloads
    }
    ratios = scoring.ratios(taken)
    found[axis] = {n: scoring.benchmark_score(r) for n, r in ratios.items()}
  order = sorted(methods, key=lambda n: -found['steps'][n])
  lines = [f'{"":18}' + ''.join(f'{axis:>9}' for axis in found)]
  for name in order:
    lines.append(
      f'{name:18}' + ''.join(f'{of[name]:9.3f}' for of in found.values())
    )
  lines.append(
    f'1: first on each of {", ".join(workloads)}; 0: never there, or beyond'
    f' {scoring.R_MAX:g} times the first. (Slots and FLOPs score as steps do.)'
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
  return _NEVER if value == float('inf') else f'{value:.{digits}f}'


def _short(value):
  if value == float('inf'):
    return _NEVER
  if value != value:
    return '-'
  for unit, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if value >= unit:
      return f'{value / unit:.2f}{name}'
  return f'{value:.0f}'


def main():
  parser = sweep.parser(__doc__)
  parser.add_argument('--workloads', default=','.join(harness.DEFAULT))
  parser.add_argument(
    '--methods', help='; all, and some of them where documents are padded'
  )
  args = parser.parse_args()
  workloads = args.workloads.split(',')
  given = args.methods.split(',') if args.methods else []
  for kind, valid, chosen in (
    ('workload', WORKLOADS, workloads),
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
    bench.judge(workload, methods)
  print('\n'.join(bench.origins()), end='\n\n')
  for workload, methods in of.items():
    whole = [m for m in methods if bench.whole(workload, m)]
    if missing := [m for m in methods if m not in whole]:
      print(f'{workload}: NOT COMPLETE, left out: {", ".join(missing)}\n')
      of[workload] = whole
    if not bench.judges(workload):
      continue
    print(to_target(bench, workload, whole), end='\n\n')
    print(losses(bench, workload, whole), end='\n\n')
  everywhere = [m for m in METHODS if all(m in of[w] for w in workloads)]
  if all(map(bench.judges, workloads)):
    print(scores(bench, workloads, everywhere))


if __name__ == '__main__':
  main()
