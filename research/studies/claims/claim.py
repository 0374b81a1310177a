"""What a paper claims, and whether runs of our own bear it out.

Each file of this folder is a claim and a command:

    python research/studies/claims/galore.py runs/benchmark

prints what the paper says, our setting, our result with an interval, and a
verdict; runs that are missing are trained first, into WORKDIR, and those of the
benchmark are shared. Where losses are compared, the verdict is by the whole
95 % interval of eight seeds that no choice was made by (`studies/harness.py`),
never by a mean alone; what else counts stands in the setting.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np

from frugax.models import llama
from studies import harness, sweep
from studies.recipes import orders, recipes
from studies.workloads import WORKLOADS

HOLDS, PART = 'holds', 'holds in part'
NOT, OPEN = 'does not hold here', 'not decided here'
# The share of a loss within which two are told the same. The smallest published
# difference that these papers call one is 1.2 % (4 bits of weights, QuEST).
SAME = 0.005


@dataclasses.dataclass(frozen=True)
class Finding:
  """What came of a claim: a verdict, and the lines that bear it."""

  verdict: str
  lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of a paper.

  Attributes:
    title: a few words.
    paper: authors, arXiv number, year.
    says: what it claims, with its figures.
    setting: how it is tried here, and what differs.
    judge: finds out.
  """

  title: str
  paper: str
  says: str
  setting: str
  judge: Callable[['Lab'], Finding]


class Lab:
  """Where claims get their runs.

  Args:
    workdir: of the benchmark.
    data_dir: where the corpus is.
    jobs: runs at a time.
    train: whether to train what is missing.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    data_dir: str = 'data',
    jobs: int = 2,
    train: bool = True,
  ):
    self.workdir, self.data_dir = workdir, data_dir
    self.jobs, self.train = jobs, train
    self.bench = harness.Benchmark(workdir, data_dir, jobs, train)
    self.origins: list[str] = []  # of what was asked for so far

  def finals(
    self,
    method: str,
    workload: str = 'packed',
    chosen: harness.Choice | None = None,
  ) -> np.ndarray:
    """The final losses of the best choice, or one that is given, by fresh seed.

    Raises:
      Missing: a run is not there and may not be trained.
    """
    if not chosen:
      self.bench.get(workload, [method])
    self.bench.judge(workload, [method], chosen)
    found = self.bench.finals(workload, method, chosen)
    if not found.size:
      raise Missing(f'{workload}: runs of {method} are missing')
    self.origins += self.bench.origins_of(workload, method, chosen)
    return found

  def measured(self, name: str, measure: Callable[[], list]) -> list:
    """What was measured once, from WORKDIR/measured.json, else now.

    Raises:
      Missing: it was not, and may not be.
    """
    path = self.workdir / 'measured.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
      if not self.train:
        raise Missing(f'{name} was not measured')
      known[name] = {'values': measure(), 'origin': sweep.here()}
      sweep.write_json(path, known)
    self.origins.append(f'measured by {known[name]["origin"]}')
    return known[name]['values']

  def arguments(self, **more) -> argparse.Namespace:
    """As the commands of other studies parse them."""
    return argparse.Namespace(
      workdir=self.workdir,
      data_dir=self.data_dir,
      jobs=self.jobs,
      report=not self.train,
      **more,
    )


class Missing(RuntimeError):
  """Runs that a claim needs are not there."""


def setting(workload: str) -> str:
  """One line on a workload, and how methods are tuned on it."""
  own = WORKLOADS[workload]
  model = llama.config(own.size, **own.model)
  return (
    f'LLaMA of {model.n_layers} layers of dimension {model.dim} on bytes of'
    f' source code, {own.steps} steps of {own.batch} x {own.length}'
    f' (workload {workload}); the best of {harness.STUDIES * harness.TRIALS}'
    f' quasi-random choices of rate and b2, judged on {len(harness.FRESH)}'
    ' other seeds'
  )


def at_most(mean: float, half: float, bound: float) -> str:
  """Whether a difference is no more than a bound, by its interval.

  Examples:
    >>> at_most(-0.1, 0.05, 0.0), at_most(0.1, 0.05, 0.0), at_most(0.0, 1, 0.1)
    ('holds', 'does not hold here', 'not decided here')
  """
  if math.isnan(mean):
    return OPEN
  if mean + half <= bound:
    return HOLDS
  return NOT if mean - half > bound else OPEN


def all_of(verdicts: Sequence[str]) -> str:
  """The verdict on a claim of several parts.

  A part that holds beside one that does not is a claim that holds in part.

  Examples:
    >>> all_of(['holds', 'holds']), all_of(['holds', 'not decided here'])
    ('holds', 'holds in part')
    >>> all_of(['does not hold here', 'not decided here'])
    'does not hold here'
  """
  if all(v == HOLDS for v in verdicts):
    return HOLDS
  if HOLDS in verdicts:
    return PART
  return NOT if NOT in verdicts else OPEN


def versus(
  lab: Lab, right: tuple[str, str], left: tuple[str, str], share: float
) -> tuple[str, str]:
  """Compares the final losses of two methods, each (method, workload).

  Args:
    lab: where the runs come from.
    right: what the claim is about.
    left: what it is compared with.
    share: how much higher right may end, of left's loss.

  Returns:
    The verdict on right - left <= share * left, and the line that says so.
  """
  losses = [lab.finals(*right), lab.finals(*left)]
  mean, half = orders.difference(*losses)
  bound = share * losses[1].mean()
  verdict = at_most(mean, half, bound)
  names = [
    method if workload == 'packed' else f'{method} ({workload})'
    for method, workload in (right, left)
  ]
  return verdict, (
    f'{names[0]} {losses[0].mean():.4f}, {names[1]} {losses[1].mean():.4f}:'
    f' {mean:+.4f} +- {half:.4f} nats a token, at most {bound:+.4f}: {verdict}'
  )


def order(lab: Lab, links: Sequence[orders.Link]) -> Finding:
  """What the recipe study tells of an order of losses, with AdamW.

  Of several links one would be shown by chance sooner than one alone: their
  intervals are so much wider that all hold together with 95 % (Bonferroni).

  Raises:
    Missing: runs that are not there and may not be trained.
  """
  names = dict.fromkeys(
    [recipes.BASE, *(x for link in links for x in (link.left, link.right))]
  )
  args = lab.arguments(size='tiny', steps=recipes.SIZES['tiny'].steps)
  results, _, keys, table = recipes.collect(args, tuple(names), ('adamw',))
  lab.origins += results.origins(k for k in keys if k in results.of)
  judged = table.judged(links, 'adamw', 1 - 0.05 / len(links))
  if missing := [line for judgement, line in judged if judgement == 'missing']:
    raise Missing(f'runs of studies/recipes are missing: {missing[0]}')
  return Finding(
    all_of([_JUDGED[judgement] for judgement, _ in judged]),
    [line for _, line in judged],
  )


_JUDGED = {'holds': HOLDS, 'contradicted': NOT, 'undecided': OPEN}

RECIPES_SETTING = (
  'LLaMA tiny, 200 steps of 2 x 128, AdamW at the rate at which bf16 is best,'
  f' three seeds (studies/recipes); A ~ B: within {orders.EQUAL} nats, A < B:'
  ' by the whole interval, those of all links together being 95 %'
)


def told(claim: Claim, lab: Lab) -> tuple[str, str]:
  """Judges a claim.

  Returns:
    The verdict, and all there is to say as text.

  Raises:
    Missing: runs that are not there and may not be trained.
  """
  lab.origins.clear()
  finding = claim.judge(lab)
  return finding.verdict, '\n'.join(
    [
      claim.title,
      f'  paper:   {claim.says} ({claim.paper})',
      f'  setting: {claim.setting}',
      *(f'  result:  {line}' for line in finding.lines),
      *(f'  of:      {line}' for line in dict.fromkeys(lab.origins)),
      f'  verdict: {finding.verdict}',
    ]
  )


def lab_of(args: argparse.Namespace) -> Lab:
  """The lab of parsed arguments."""
  return Lab(args.workdir, args.data_dir, args.jobs, not args.report)


def main(claim: Claim) -> None:
  """The command of a claim."""
  args = sweep.parser(claim.title).parse_args()
  try:
    print(told(claim, lab_of(args))[1])
  except Missing as missing:
    sys.exit(f'{claim.title}: not told: {missing}')
