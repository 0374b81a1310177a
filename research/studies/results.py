"""RESULTS.md, from the logs that ship.

    python research/studies/results.py

Nothing in RESULTS.md is written by hand: tables, verdicts and what did not work
are read from studies/logs, which is a WORKDIR of studies/benchmark.py and
studies/claims without the runs' folders. Each table names the command that
makes its logs.
"""

import argparse
import json
import math
import pathlib

from studies import benchmark, harness, pareto, sweep
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
    logs: has benchmark.json, bytes.json, claims.json and pareto.png.
  """
  bench = harness.Benchmark(logs, train=False)
  found = json.loads((logs / 'claims.json').read_text())
  parts = [
    '# Results',
    f'Made by `python research/studies/results.py` from `{_SHIPPED}`; not'
    ' edited by hand. What is equal between rows, how hyper-parameters are'
    ' tried and what counts is told in `research/studies/harness.py`. Seeds are'
    ' 0, 1 and 2, one a study.',
    *_benchmark(bench),
    *_pareto(bench),
    *_claims(found),
    '## What did not work',
    *_failures(bench, found),
  ]
  return '\n\n'.join(parts) + '\n'


def _benchmark(bench):
  parts = [
    '## What does each optimizer take to the same loss?',
    _command('python research/studies/benchmark.py runs/benchmark'),
    'Runs: ' + '; '.join(bench.origins()) + '.',
  ]
  whole = {
    w: [m for m in METHODS if bench.whole(w, m)] for w in harness.DEFAULT
  }
  for workload, methods in whole.items():
    parts.append(_block(benchmark.to_target(bench, workload, methods)))
  parts.append('## What is the loss at equal tokens?')
  for workload, methods in whole.items():
    parts.append(_block(benchmark.losses(bench, workload, methods)))
  everywhere = [m for m in METHODS if all(m in own for own in whole.values())]
  parts += [
    '## Who is best over workloads?',
    "AlgoPerf's score of each axis: the area under the performance profile.",
    _block(benchmark.scores(bench, list(whole), everywhere)),
  ]
  return parts


def _pareto(bench):
  return [
    '## What does a byte of state buy?',
    _command(f'python research/studies/pareto.py {_SHIPPED}'),
    f'![Loss against bytes of optimizer state]({_SHIPPED}/pareto.png)',
    _block(pareto.table(pareto.points(bench, 'packed'))),
  ]


def _claims(found):
  parts = [
    "## Do the papers' claims hold here?",
    _command('python -m studies.claims runs/benchmark'),
    f'`--only NAME` tells of one. Verdicts: {claim.HOLDS}, {claim.PART},'
    f' {claim.NOT}, and {claim.OPEN}, where the 95 % interval lies on both'
    ' sides.',
    '| claim | name | verdict |\n|---|---|---|\n'
    + '\n'.join(
      f'| {one.title} | `{name}` | {found[name]["verdict"]} |'
      for name, one in ALL.items()
      if name in found
    ),
  ]
  for name, one in ALL.items():
    if name in found:
      finding = claim.Finding(found[name]['verdict'], found[name]['lines'])
      parts.append(
        _block(
          f'{claim.told(one, finding)}\n  of:      {found[name]["origin"]}'
        )
      )
  return parts


def _failures(bench, found):
  lines = [
    f'- Claim `{name}`: {one.title}: {found[name]["verdict"]}.'
    for name, one in ALL.items()
    if name in found and found[name]['verdict'] in (claim.NOT, claim.OPEN)
  ]
  base = bench.finals('packed', harness.BASE)
  steps = harness.WORKLOADS['packed'].steps
  for name in METHODS:
    if name == harness.BASE or not bench.whole('packed', name):
      continue
    mean, half = orders.difference(bench.finals('packed', name), base)
    if mean - half > 0:
      lines.append(
        f'- `{name}` ends {mean:.4f} +- {half:.4f} nats a token above tuned'
        ' AdamW on `packed`.'
      )
    trials = [
      r for s in range(harness.STUDIES) for r in bench.study('packed', name, s)
    ]
    if lost := sum(math.isinf(r.final(steps)) for r in trials):
      lines.append(
        f'- `{name}`: {lost} of {len(trials)} trials on `packed` diverged.'
      )
  if missing := [name for name in ALL if name not in found]:
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
