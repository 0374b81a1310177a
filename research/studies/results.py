"""RESULTS.md, from the logs that ship.

    python research/studies/results.py

Nothing in RESULTS.md is written by hand: tables, verdicts and what did not work
are read from studies/logs, which is a WORKDIR of studies/benchmark.py,
studies/search.py and studies/claims without the runs' folders. Each table names
the command that makes its logs.
"""

import argparse
import math
import pathlib

from studies import benchmark, harness, pareto, search, sweep
from studies.claims import claim
from studies.claims.__main__ import ALL
from studies.methods import METHODS
from studies.recipes import orders

LOGS = pathlib.Path(__file__).parent / 'logs'
PATH = sweep.ROOT / 'RESULTS.md'
_SHIPPED = 'research/studies/logs'


def text(logs: pathlib.Path) -> str:
  """All of it, in Markdown.

  Args:
    logs: has benchmark.json, bytes.json, search.json, measured.json, and the
      files of the studies that claims look at; notes.txt, if there is anything
      to say of how they were made.
  """
  bench = search.with_candidates(logs, train=False)
  verdicts, claims = _claims(claim.Lab(logs, train=False))
  parts = [
    '# Results',
    f'Made by `python research/studies/results.py` from `{_SHIPPED}`; not'
    ' edited by hand. What is equal between rows, how hyper-parameters are'
    ' tried and what counts is told in `research/studies/harness.py`. Trials'
    f' have seeds 0 to {harness.STUDIES - 1}, one a study; what judges a choice'
    f' has seeds {harness.FRESH[0]} to {harness.FRESH[-1]}.',
    *_benchmark(bench),
    *_notes(logs),
    *_pareto(bench),
    *claims,
    '## What did not work?',
    *_failures(bench, verdicts),
  ]
  return '\n\n'.join(parts) + '\n'


def _benchmark(bench):
  whole = {
    w: [m for m in METHODS if bench.whole(w, m)]
    for w in harness.DEFAULT
    if bench.judges(w)
  }
  everywhere = [m for m in METHODS if all(m in own for own in whole.values())]
  return [
    '## What does each optimizer take to the same loss?',
    _command('python research/studies/benchmark.py runs/benchmark'),
    'Runs: ' + '; '.join(bench.origins()) + '.',
    *(
      f'Workload `{w}`: not run yet.' for w in harness.DEFAULT if w not in whole
    ),
    *(_block(benchmark.to_target(bench, w, own)) for w, own in whole.items()),
    '## What is the loss at equal tokens?',
    *(_block(benchmark.losses(bench, w, own)) for w, own in whole.items()),
    '## Who is best over workloads?',
    "AlgoPerf's score of each axis: the area under the performance profile.",
    _block(benchmark.scores(bench, list(whole), everywhere)),
  ]


def _notes(logs):
  """What whoever ran it has to say."""
  path = logs / 'notes.txt'
  return [path.read_text().strip()] if path.exists() else []


def _pareto(bench):
  return [
    '## What does a byte of state buy?',
    _command(f'python research/studies/pareto.py {_SHIPPED}'),
    f'![Loss against bytes of optimizer state]({_SHIPPED}/pareto.png)',
    _block(pareto.table(pareto.points(bench, 'packed'))),
  ]


def _claims(lab):
  """Verdicts by name, and the section; what is missing has none."""
  verdicts, texts, rows = {}, [], []
  for name, one in ALL.items():
    try:
      verdicts[name], told = claim.told(one, lab)
    except claim.Missing:
      continue
    rows.append(f'| {one.title} | `{name}` | {verdicts[name]} |')
    texts.append(_block(told))
  return verdicts, [
    "## Do the papers' claims hold here?",
    _command('python -m studies.claims runs/benchmark'),
    f'`--only NAME` tells of one. Verdicts: {claim.HOLDS}, {claim.PART},'
    f' {claim.NOT}, and {claim.OPEN}, where the interval lies on both sides.',
    '\n'.join(['| claim | name | verdict |', '|---|---|---|', *rows]),
    *texts,
  ]


def _failures(bench, verdicts):
  lines = [
    f'- Claim `{name}`: {ALL[name].title}: {verdict}.'
    for name, verdict in verdicts.items()
    if verdict in (claim.NOT, claim.OPEN)
  ]
  base = bench.finals('packed', harness.BASE)
  for name in METHODS:
    finals = bench.finals('packed', name)
    if name == harness.BASE or not (finals.size and base.size):
      continue
    mean, half = orders.difference(finals, base)
    if mean - half > 0:
      lines.append(
        f'- `{name}` ends {mean:.4f} +- {half:.4f} nats a token above tuned'
        ' AdamW on `packed`.'
      )
    ends = [end for end, _ in bench.trials('packed', name)]
    if lost := sum(map(math.isinf, ends)):
      lines.append(
        f'- `{name}`: {lost} of {len(ends)} trials on `packed` diverged.'
      )
  if missing := [name for name in ALL if name not in verdicts]:
    lines.append(f'- Not tried yet: {", ".join(f"`{n}`" for n in missing)}.')
  return ['\n'.join(lines)]


def _command(line):
  return f'    {line}'


def _block(lines):
  return f'```text\n{lines}\n```'


def main():
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
  PATH.write_text(text(LOGS))


if __name__ == '__main__':
  main()
