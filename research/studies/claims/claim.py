"""What a paper claims, and whether runs of our own bear it out.

Each file of this folder is a claim and a command:

    python research/studies/claims/galore.py runs/benchmark

prints what the paper says, our setting, our result with an interval, and a
verdict; runs that are missing are trained first, into WORKDIR, and those of the
benchmark are shared. Verdicts are by the whole 95 % interval over three studies
(as `studies/harness.py` has them), never by a mean alone.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from frugax.models import llama
from studies import harness
from studies.recipes import orders, recipes

HOLDS, PART = 'holds', 'holds in part'
NOT, OPEN = 'does not hold here', 'not decided here'
# Nats a token within which two losses are told the same: half of what the
# smallest published difference that these papers speak of comes to.
SAME = orders.EQUAL


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

  def finals(self, method: str, workload: str = 'packed') -> np.ndarray:
    """The final losses of the studies, each by its best trial.

    Raises:
      Missing: a trial is not there and may not be trained.
    """
    self.bench.get(workload, [method])
    if not self.bench.whole(workload, method):
      raise Missing(f'{workload}: trials of {method} are missing')
    return np.array(self.bench.finals(workload, method))

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
  own = harness.WORKLOADS[workload]
  model = llama.config(own.size, **own.model)
  return (
    f'LLaMA of {model.n_layers} layers of dimension {model.dim} on bytes of'
    f' source code, {own.steps} steps of {own.batch} x {own.length}'
    f' (workload {workload}); {harness.STUDIES} studies, each with the best of'
    f' {harness.TRIALS} quasi-random choices of rate and b2'
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
  lab: Lab, right: tuple[str, str], left: tuple[str, str], bound: float
) -> tuple[str, str]:
  """Compares the final losses of two methods, each (method, workload).

  Returns:
    The verdict on right - left <= bound, and the line that says so.
  """
  losses = [lab.finals(*right), lab.finals(*left)]
  mean, half = orders.difference(*losses)
  verdict = at_most(mean, half, bound)
  names = [
    method if workload == 'packed' else f'{method} ({workload})'
    for method, workload in (right, left)
  ]
  return verdict, (
    f'{names[0]} {losses[0].mean():.4f}, {names[1]} {losses[1].mean():.4f}:'
    f' {mean:+.4f} +- {half:.4f} nats a token, at most {bound:+.3f}: {verdict}'
  )


def order(
  lab: Lab,
  links: Sequence[orders.Link],
  optimizers: Sequence[str] = recipes.OPTIMIZERS,
) -> Finding:
  """What the recipe study tells of an order of losses.

  Raises:
    Missing: runs that are not there and may not be trained.
  """
  names = dict.fromkeys(
    [recipes.BASE, *(x for link in links for x in (link.left, link.right))]
  )
  steps = recipes.SIZES['tiny'].steps
  args = lab.arguments(size='tiny', steps=steps)
  *_, table = recipes.collect(args, tuple(names), optimizers)
  verdicts, lines = [], []
  for optimizer in optimizers:
    for judgement, line in table.judged(links, optimizer):
      if judgement == 'missing':
        raise Missing(f'runs of studies/recipes are missing: {line}')
      verdicts.append(_JUDGED[judgement])
      lines.append(f'{optimizer:12} {line}')
  return Finding(all_of(verdicts), lines)


_JUDGED = {'holds': HOLDS, 'contradicted': NOT, 'undecided': OPEN}

RECIPES_SETTING = (
  'LLaMA tiny, 200 steps of 2 x 128, the rate at which bf16 is best, three'
  ' seeds (studies/recipes); A ~ B: within'
  f' {SAME} nats, A < B: by the whole interval'
)


def told(claim: Claim, finding: Finding) -> str:
  """The claim and what came of it, as text."""
  return '\n'.join(
    [
      claim.title,
      f'  paper:   {claim.says} ({claim.paper})',
      f'  setting: {claim.setting}',
      *(f'  result:  {line}' for line in finding.lines),
      f'  verdict: {finding.verdict}',
    ]
  )


def parser(description: str) -> argparse.ArgumentParser:
  """The arguments that all claims share."""
  made = argparse.ArgumentParser(description=description)
  made.add_argument('workdir', type=pathlib.Path)
  made.add_argument('--data_dir', default='data')
  made.add_argument(
    '--jobs', type=int, default=2, help='runs at a time, each on its own cores'
  )
  made.add_argument(
    '--report', action='store_true', help='train nothing, tell what is there'
  )
  return made


def lab_of(args: argparse.Namespace) -> Lab:
  """The lab of parsed arguments."""
  return Lab(args.workdir, args.data_dir, args.jobs, not args.report)


def main(claim: Claim) -> None:
  """The command of a claim."""
  args = parser(claim.title).parse_args()
  print(told(claim, claim.judge(lab_of(args))))
