"""RESULTS.md, from the logs that ship.

    python research/studies/results.py

Nothing in RESULTS.md is written by hand but the notes (logs/notes.txt): tables,
verdicts and what did not work are read from studies/logs, which is a WORKDIR of
studies/benchmark.py, studies/search.py and studies/claims without the runs'
folders. Each table names the command that makes its logs, and no data set is
needed.
"""

import argparse
import math
import pathlib
import textwrap

from studies import benchmark, harness, pareto, search, sweep
from studies.claims import claim
from studies.claims.__main__ import ALL
from studies.methods import METHODS
from studies.recipes import orders
from studies.workloads import WORKLOADS

LOGS = pathlib.Path(__file__).parent / 'logs'
PATH = sweep.ROOT / 'RESULTS.md'
_SHIPPED = 'research/studies/logs'
_WORKDIR = 'runs/benchmark'
# All that the numbers are made by, the logs that ship taken along and back.
_COMMANDS = f"""\
python research/studies/workloads.py --data_dir=data
mkdir -p {_WORKDIR} && cp -r {_SHIPPED}/. {_WORKDIR}
python research/studies/benchmark.py {_WORKDIR}
python research/studies/search.py {_WORKDIR}
python -m studies.claims {_WORKDIR}
(cd {_WORKDIR} && tar cf - *.json */*.json) | tar xf - -C {_SHIPPED}
python research/studies/pareto.py {_SHIPPED}
python research/studies/results.py"""


def text(logs: pathlib.Path) -> str:
  """All of it, in Markdown.

  Args:
    logs: has benchmark.json, bytes.json, search.json, measured.json, and the
      files of the studies that claims look at; notes.txt, if there is anything
      to say of how they were made.
  """
  bench = search.with_candidates(logs, train=False)
  findings, claims = _claims(claim.Lab(logs, train=False))
  parts = [
    '# Results',
    f'Made by `python research/studies/results.py` from `{_SHIPPED}`; not'
    ' edited by hand, but the notes. What is equal between rows, how'
    ' hyper-parameters are tried and what counts is told in'
    ' `research/studies/harness.py`. Trials have seeds 0 to'
    f' {harness.STUDIES - 1}, one a study; what judges a choice has seeds'
    f' {harness.FRESH[0]} to {harness.FRESH[-1]}. A row names the commits that'
    ' ran it, shortened: + is one with changes, ? unknown.',
    'All of it anew, from the root of a clone. A run is trained again only if'
    f' its folder is not in `{_WORKDIR}` and the logs that are copied there do'
    ' not tell of it; leave the copy out to train all:',
    _command(_COMMANDS),
    *_benchmark(bench),
    *_notes(logs),
    *_recipe(bench, logs),
    *_pareto(bench),
    *claims,
    '## What did not work?',
    *_failures(bench, findings),
  ]
  return '\n\n'.join(parts) + '\n'


def _benchmark(bench):
  whole = {
    w: [m for m in METHODS if bench.whole(w, m)]
    for w in harness.DEFAULT
    if not bench.untold(w)
  }
  everywhere = [
    m for m in METHODS if whole and all(m in own for own in whole.values())
  ]
  return [
    '## What does each optimizer take to the same loss?',
    _command(f'python research/studies/benchmark.py {_WORKDIR}'),
    *(
      f'Workload `{w}`: not told: {bench.untold(w)}.'
      for w in harness.DEFAULT
      if w not in whole
    ),
    *(
      f'Runs of the tables on `{w}`: '
      + '; '.join(bench.origins(benchmark.keys(bench, w, own)))
      + '.'
      for w, own in whole.items()
    ),
    *(_block(benchmark.to_target(bench, w, own)) for w, own in whole.items()),
    '## What is the loss at equal tokens?',
    *(_block(benchmark.losses(bench, w, own)) for w, own in whole.items()),
    '## Who is best over workloads?',
    "AlgoPerf's score of each axis: the area under the performance profile.",
    _block(benchmark.scores(bench, [*whole], everywhere))
    if everywhere
    else 'Not told yet.',
  ]


def _notes(logs):
  """What whoever ran it has to say."""
  path = logs / 'notes.txt'
  return [path.read_text().strip()] if path.exists() else []


def _recipe(bench, logs):
  """The winner of the search, and what it was judged at."""
  head = [
    '## Which recipe do we recommend?',
    _command(f'python research/studies/search.py {_WORKDIR}'),
  ]
  best = search.winner(bench, search.tried(logs))
  if best is None:
    return [*head, 'The search was not run yet.']
  name = search.label(best.name)
  try:
    mean, half = search.over_base(bench, best.name)
  except LookupError as missing:
    return [*head, f'Not judged yet: {missing}.']
  key = bench.study_keys(search.WORKLOAD, best.name, 0)[0]
  run, record = bench.run(key), bench.record(key)
  share = search.share(run)
  million = search.parameters(run) / 1e6
  edges = [
    f'of `{search.label(n)}` its {where}'
    for n in (best.name, harness.BASE)
    for where in _edges(bench, search.WORKLOAD, n)
  ]
  size = WORKLOADS[search.WORKLOAD]
  return [
    *head,
    f'`{name}`: of {len(search.tried(logs))} combinations that the search tried'
    f" the best one whose state for the layers' linears is at most"
    f" a tenth of Adam's in float32 (`{best.name}`).",
    f"- State for the linears: {share:.1%} of Adam's in float32, which is"
    f" {2 * share:.1%} of Adam's in bfloat16; of all parameters, embedding and"
    f' head included, {record.state_bytes / record.adam_bytes:.1%} in'
    ' float32.\n'
    f'- Final loss: {mean:+.4f} +- {half:.4f} nats a token over AdamW that was'
    f' tuned alike, {len(harness.FRESH)} seeds. '
    + ('It is lower.' if mean + half < 0 else 'It is not shown to be lower.')
    + (f' At the edge of what was tried: {"; ".join(edges)}.' if edges else '')
    + f'\n- Judged at {million:.1f} M parameters and'
    f' {size.steps * size.slots:,} tokens only (workload'
    f' `{search.WORKLOAD}`), not at any larger size: whether it holds there is'
    ' not known, and so it is no default.',
    'Runs: '
    + '; '.join(
      bench.origins(
        key
        for n in (best.name, harness.BASE)
        for own in bench.ran(search.WORKLOAD, n)
        for key in own
      )
    )
    + '.',
  ]


def _pareto(bench):
  return [
    '## What does a byte of state buy?',
    _command(f'python research/studies/pareto.py {_SHIPPED}'),
    '`frugal` is the recipe above, `ours` the combination that its search'
    ' began with; a star is on the front, where no other has both fewer bytes'
    ' and a lower loss.',
    f'![Loss against bytes of optimizer state]({_SHIPPED}/pareto.png)',
    _block(pareto.table(pareto.points(bench, 'packed'))),
  ]


def _claims(lab):
  """What was found by name, and the section; what is missing has none."""
  findings, texts, rows = {}, [], []
  for name, one in ALL.items():
    try:
      findings[name], told = claim.told(one, lab)
    except claim.Missing:
      continue
    rows.append(f'| {one.title} | `{name}` | {findings[name].verdict} |')
    texts.append(_block(told))
  return findings, [
    "## Do the papers' claims hold here?",
    _command(f'python -m studies.claims {_WORKDIR}'),
    f'`--only NAME` tells of one. Verdicts: {claim.HOLDS}, {claim.PART},'
    f' {claim.NOT}, and {claim.OPEN}, where the interval lies on both sides.',
    '\n'.join(['| claim | name | verdict |', '|---|---|---|', *rows]),
    *texts,
  ]


def _failures(bench, findings):
  lines = [
    f'- Claim `{name}`, {finding.verdict}: {line}.'
    for name, finding in findings.items()
    for verdict, line in finding.parts
    if verdict != claim.HOLDS
  ]
  base = bench.finals('packed', harness.BASE)
  for name in METHODS:
    finals = bench.finals('packed', name)
    if name == harness.BASE or not (finals.size and base.size):
      continue
    mean, half = orders.difference(finals, base)
    if mean - half > 0:
      edges = _edges(bench, 'packed', name)
      but = f'; its {" and its ".join(edges)} of those tried' if edges else ''
      lines.append(
        f'- `{name}` ends {mean:.4f} +- {half:.4f} nats a token above tuned'
        f' AdamW on `packed`{but}.'
      )
    ends = [end for end, _ in bench.trials('packed', name)]
    if lost := sum(map(math.isinf, ends)):
      lines.append(
        f'- `{name}`: {lost} of {len(ends)} trials on `packed` diverged.'
      )
  if missing := [name for name in ALL if name not in findings]:
    lines.append(f'- Not tried yet: {", ".join(f"`{n}`" for n in missing)}.')
  return ['\n'.join(lines)]


def _edges(bench, workload, name):
  """What of the best choice lies at the edge, and at which."""
  marks = zip(('rate', 'b2'), bench.edges(workload, name), strict=True)
  return [f'{what} is at the {edge}' for what, edge in marks if edge]


def _command(lines):
  return textwrap.indent(lines, '    ')


def _block(lines):
  return f'```text\n{lines}\n```'


def main():
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
  PATH.write_text(text(LOGS))


if __name__ == '__main__':
  main()
