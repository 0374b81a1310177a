"""What a paper claims, and whether runs of our own bear it out.

Each file of this folder is a claim and a command:

    python research/studies/claims/galore.py runs/benchmark

prints what the paper says, our setting, our result with an interval, and a
verdict; runs that are missing are trained first, into WORKDIR, and those of the
benchmark are shared. Where losses of optimizers are compared, the verdict is by
the whole 95 % interval of eight seeds that no choice was made by
(`studies/harness.py`); those of low-bit recipes are of three seeds, by which
the rate was chosen. It is never by a mean alone; what else counts stands in the
setting.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from frugax.models import llama
from studies import harness, sweep
from studies.methods import METHODS, OFTEN
from studies.recipes import orders, recipes
from studies.workloads import WORKLOADS

HOLDS, PART = 'holds', 'holds in part'
NOT, OPEN = 'does not hold here', 'not decided here'
# The share of a loss within which two are told the same. The smallest published
# difference that these papers call one is 1.2 % (4 bits of weights, QuEST).
SAME = 0.005


Part = tuple[str, str]  # a verdict, and the line that bears it


@dataclasses.dataclass(frozen=True)
class Finding:
  """What came of a claim: a verdict, and the parts that bear it."""

  verdict: str
  parts: Sequence[Part]


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
    self.bench = harness.Benchmark(
      workdir, data_dir, jobs, train, METHODS | OFTEN
    )
    # Of what was asked for so far.
    self._runs: dict[sweep.Key, str] = {}
    self._measured: list[str] = []

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
    trials, judging = self.bench.ran(workload, method, chosen)
    self.uses({key: self.bench.record(key) for key in (*trials, *judging)})
    return found

  def uses(self, results: Mapping[sweep.Key, sweep.Result]) -> None:
    """Notes what a verdict is by."""
    self._runs |= {key: result.origin for key, result in results.items()}

  def origins(self) -> list[str]:
    """Which code ran how many of the runs on what, and measured what."""
    runs = sweep.counted(self._runs.values())
    return [*runs, *dict.fromkeys(self._measured)]

  def begin(self) -> None:
    """Forgets what was asked for so far."""
    self._runs.clear()
    self._measured.clear()

  def measured(self, name: str, measure: Callable[[], list]) -> list:
    """What was measured once, from WORKDIR/measured.json, else now.

    Raises:
      Missing: it was not, and may not be.
    """
    path = self.workdir / 'measured.json'
    known = sweep.read_json(path, {})
    if name not in known:
      if not self.train:
        raise Missing(f'{name} was not measured')
      known[name] = {'values': measure(), 'origin': sweep.here()}
      sweep.write_json(path, known)
    self._measured.append(f'measured by {known[name]["origin"]}')
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


def all_of(parts: Sequence[Part]) -> Finding:
  """A claim of several parts that weigh the same.

  It holds in part if half of them do.

  Examples:
    >>> yes, no, open = (HOLDS, ''), (NOT, ''), (OPEN, '')
    >>> all_of([yes, yes]).verdict, all_of([yes, open]).verdict
    ('holds', 'holds in part')
    >>> all_of([yes, no, no]).verdict, all_of([yes, open, open]).verdict
    ('does not hold here', 'not decided here')
  """
  verdicts = [verdict for verdict, _ in parts]
  held = verdicts.count(HOLDS)
  if held == len(verdicts):
    return Finding(HOLDS, parts)
  if 2 * held >= len(verdicts):
    return Finding(PART, parts)
  return Finding(NOT if NOT in verdicts else OPEN, parts)


def headed(head: Part, *conditions: Part) -> Finding:
  """A claim that stands or falls with one part, under conditions.

  Examples:
    >>> headed((NOT, 'is slow'), (HOLDS, 'is exact')).verdict
    'does not hold here'
    >>> headed((HOLDS, 'is fast'), (NOT, 'is exact')).verdict
    'holds in part'
  """
  parts = (head, *conditions)
  if head[0] != HOLDS:
    return Finding(head[0], parts)
  kept = all(verdict == HOLDS for verdict, _ in conditions)
  return Finding(HOLDS if kept else PART, parts)


def versus(
  lab: Lab,
  right: tuple[str, str],
  left: tuple[str, str],
  share: float,
  choices: Sequence[harness.Choice | None] = (None, None),
) -> Part:
  """Compares the final losses of two methods, each (method, workload).

  Args:
    lab: where the runs come from.
    right: what the claim is about.
    left: what it is compared with.
    share: how much higher right may end, of left's loss.
    choices: the hyper-parameters of each; None is its best.

  Returns:
    The verdict on right - left <= share * left, and the line that says so.
  """
  losses = [
    lab.finals(*one, chosen)
    for one, chosen in zip((right, left), choices, strict=True)
  ]
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
  lab.uses({key: results.of[key] for key in keys if key in results.of})
  judged = table.judged(links, 'adamw', 1 - 0.05 / len(links))
  if missing := [line for judgement, line in judged if judgement == 'missing']:
    raise Missing(f'runs of studies/recipes are missing: {missing[0]}')
  return all_of([(_JUDGED[judgement], line) for judgement, line in judged])


_JUDGED = {'holds': HOLDS, 'contradicted': NOT, 'undecided': OPEN}

RECIPES_SETTING = (
  'LLaMA tiny, 200 steps of 2 x 128, AdamW at the rate at which bf16 is best,'
  f' three seeds (studies/recipes); A ~ B: within {orders.EQUAL} nats, A < B:'
  ' by the whole interval, those of all links together being 95 %; most are'
  ' wider than a tenth of a nat, so neither equality nor a small cost could be'
  ' shown here'
)


def told(claim: Claim, lab: Lab) -> tuple[Finding, str]:
  """Judges a claim.

  Returns:
    What was found, and all there is to say as text.

  Raises:
    Missing: runs that are not there and may not be trained.
  """
  lab.begin()
  finding = claim.judge(lab)
  return finding, '\n'.join(
    [
      claim.title,
      f'  paper:   {claim.says} ({claim.paper})',
      f'  setting: {claim.setting}',
      *(f'  result:  {line}' for _, line in finding.parts),
      *(f'  of:      {line}' for line in lab.origins()),
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
