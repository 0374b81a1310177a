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
it. --report trains nothing. The target's own trials, AdamW's, are always
trained; a workload without a target has its losses alone told.
"""

from collections.abc import Iterator, Mapping, Sequence

from frugax import names
from frugax.report import scoring
from studies import harness, seeds, sweep
from studies.methods import METHODS
from studies.recipes import orders
from studies.workloads import WORKLOADS

# What is also trained on padded documents.
PADDED = ('adamw', 'galore', 'apollo', 'snsm', 'stable_spam', 'muon')
_NEVER = 'never'
_TAUS = (1, 1.25, 1.5, 2, 4)  # of the performance profile


def keys(
  bench: harness.Benchmark, workload: str, methods: Sequence[str]
) -> Iterator[sweep.Key]:
  """Of all runs that the tables of a workload are made of."""
  if target := WORKLOADS[workload].target:
    yield from bench.ran(target, harness.BASE)[0]
  for name in dict.fromkeys([*methods, harness.BASE]):
    for own in bench.ran(workload, name):
      yield from own


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
    f' of {own.batch} x {own.length}, seeds 0 to {harness.STUDIES - 1}',
    f'{"":18}{"steps":>21}{"tokens":>9}{"slots":>9}{"FLOPs":>9}'
    f'{"seconds":>22}{"state":>9}{"of Adam":>8}{"step":>9}  commit',
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
      f'  {bench.commits(bench.ran(workload, name)[0])}'
    )
  lines.append(
    f'each axis: the median of the {harness.STUDIES} studies; in brackets the'
    ' least and the greatest of them; state, step:\nbytes of the optimizer, and'
    ' of all that the compiled step takes on a CPU'
  )
  return '\n'.join(lines)


def losses(
  bench: harness.Benchmark, workload: str, methods: Sequence[str]
) -> str:
  """Where the best choice of each method ends, and what that is to AdamW.

  Args:
    bench: has all trials of the methods; the foot names those that lack runs
      that judge their choice.
    workload: its name.
    methods: a row each.
  """
  base = bench.finals(workload, harness.BASE)
  steps = WORKLOADS[workload].steps
  lines = [
    f'{workload}: final validation loss, nats a token, of the best of'
    f' {harness.STUDIES * harness.TRIALS} choices, {len(harness.FRESH)} other'
    f' seeds, {harness.FRESH[0]} to {harness.FRESH[-1]}',
    f'{"":18}{"loss":>8}{"+-":>8}{"- adamw":>9}{"+-":>8}{"published":>11}'
    f'{"diverged":>10}  {"rate, b2":42}commits',
  ]
  studies, unjudged = [], []  # whose trial was chosen; of whom none is judged
  for name in methods:
    finals = bench.finals(workload, name)
    if not finals.size:
      unjudged.append(name)
      continue
    loss, own = seeds.interval(finals)
    over = f'{"-":>9}{"-":>8}'
    if base.size:
      mean, half = orders.difference(finals, base)
      over = f'{mean:+9.4f}{half:8.4f}'
    tried = list(bench.trials(workload, name))
    lost = sum(end == float('inf') for end, _ in tried)
    studies.append(min(tried)[1][-1])
    rate, b2 = bench.best(workload, name)
    marks = [f' ({m})' * bool(m) for m in bench.edges(workload, name)]
    chosen = f'{rate:g}{marks[0]}, {b2 or "-"}{marks[1]}'
    commits = map(bench.commits, bench.ran(workload, name))
    lines.append(
      f'{name:18}{loss:8.4f}{own:8.4f}{over}'
      f'{harness.as_published(loss):11.4f}'
      f'{f"{lost} of {len(tried)}":>10}'
      f'  {chosen:42}{"/".join(commits)}'
    )
  foot = []
  if unjudged:
    foot = [f'runs that judge a choice are missing of: {", ".join(unjudged)}']
  if not studies:
    return '\n'.join([lines[0], *foot])
  first = max(studies, key=studies.count)
  most = studies.count(first)
  lines.append(
    '+-: half of the 95 % interval of the mean; - adamw: at equal seed, after'
    f' {steps} steps; published: as the\nharness of the papers prints the loss'
    f' where it has {harness.PUBLISHED_N} batches; diverged: of the trials;'
    f' edge: among the\n{harness.OUTERMOST} lowest or highest of its kind that'
    ' were tried, so that a better one may lie beyond; commits: of the\n'
    'trials/of the runs that judge. Each choice was tried with one seed, its'
    " study's, so that choices are compared\nacross seeds:"
    f' {most} of {len(studies)} best ones are of the study of seed {first}'
    + f', so that its {harness.TRIALS} trials nearly alone decide'
    * (most > 0.75 * len(studies))
  )
  return '\n'.join([*lines, *foot])


def scores(
  bench: harness.Benchmark, workloads: Sequence[str], methods: Sequence[str]
) -> str:
  """AlgoPerf's scores and performance profiles over the workloads.

  Args:
    bench: has all trials of the methods.
    workloads: their names; of each can be told what a method took.
    methods: a row each.
  """
  found, ratios = {}, {}
  for axis in ('steps', 'tokens', 'seconds'):
    taken = {
      w: {
        name: scoring.of_workload(bench.took(w, name, axis)) for name in methods
      }
      for w in workloads
    }
    ratios[axis] = scoring.ratios(taken)
    found[axis] = {
      n: scoring.benchmark_score(r) for n, r in ratios[axis].items()
    }
  order = sorted(methods, key=lambda n: -found['steps'][n])
  profiled = ('steps', 'seconds')
  taus = ''.join(f'{tau:>6g}' for tau in _TAUS)
  lines = [
    f'{"":18}{"score":27}'
    + '   '.join(['', *(f'{f"profile, {a}":{len(taus)}}' for a in profiled)]),
    f'{"":18}'
    + ''.join(f'{axis:>9}' for axis in found)
    + f'   {taus}' * len(profiled),
  ]
  for name in order:
    line = f'{name:18}' + ''.join(f'{of[name]:9.3f}' for of in found.values())
    for axis in profiled:
      shares = (scoring.profile(ratios[axis][name], tau) for tau in _TAUS)
      line += '   ' + ''.join(f'{share:6.2f}' for share in shares)
    lines.append(line)
  lines.append(
    f'score: 1: first on each of {", ".join(workloads)}; 0: never there, or'
    f' beyond {scoring.R_MAX:g} times the first; the area under the\nprofile,'
    ' which is the share of workloads on which a method took at most so many'
    ' times what the first took.\n(Slots and FLOPs are as steps.)'
  )
  if len(workloads) == 1:
    lines.append(
      'With one workload the score is a plain ratio:'
      f' ({scoring.R_MAX:g} - taken / what the first took) /'
      f' {scoring.R_MAX - 1:g}; a profile is 0 or 1.'
    )
  return '\n'.join(line.rstrip() for line in lines)


def tables(
  bench: harness.Benchmark, of: Mapping[str, Sequence[str]]
) -> Iterator[str]:
  """All there is to tell; a line says why where a table is not there.

  Args:
    bench: trains nothing here but compiles steps, if it may.
    of: workload -> methods.
  """
  told = {}
  for workload, methods in of.items():
    whole = [m for m in methods if bench.whole(workload, m)]
    if missing := [m for m in methods if m not in whole]:
      yield f'{workload}: NOT COMPLETE, left out: {", ".join(missing)}'
    if why := bench.untold(workload):
      yield f'{workload}: no table of what each took to the target: {why}'
    else:
      told[workload] = whole
    if whole:
      yield '\n'.join(bench.origins(keys(bench, workload, whole)))
      if not why:
        yield to_target(bench, workload, whole)
      yield losses(bench, workload, whole)
  everywhere = [
    m
    for m in METHODS
    if len(told) == len(of) and all(m in own for own in told.values())
  ]
  if everywhere:
    yield scores(bench, list(of), everywhere)
  else:
    yield 'no scores: no method is judged on every workload'


def _ranged(values, digits):
  middle = scoring.of_workload(values)
  return (
    f'{_number(middle, digits)} [{_number(min(values), digits)},'
    f' {_number(max(values), digits)}]'
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
    bench.get_target(workload)
    bench.get(workload, methods)
    bench.judge(workload, methods)
  print('\n\n'.join(tables(bench, of)))


if __name__ == '__main__':
  main()
