"""Orders of losses as papers state them, and whether three seeds show them."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from studies import seeds

EQUAL = 0.02  # nats


def difference(
  right: Sequence[float], left: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
  """Mean and half width of right - left; a loss of inf is beyond any other."""
  right, left = np.asarray(right), np.asarray(left)
  lost = [bool(np.isinf(x).any()) for x in (right, left)]
  if any(lost):
    return {(1, 0): math.inf, (0, 1): -math.inf}.get((*lost,), math.nan), 0.0
  return seeds.interval(right - left, confidence)


@dataclasses.dataclass(frozen=True)
class Link:
  """What a paper says of two losses: left '<' right, or left '~' right."""

  left: str
  right: str
  relation: str = '<'

  def __str__(self):
    return f'{self.left} {self.relation} {self.right}'

  def judge(self, mean: float, half: float) -> str:
    """Of right's loss less left's."""
    low, high = mean - half, mean + half
    if self.relation == '~':
      holds = low >= -EQUAL and high <= EQUAL
      contradicted = low > EQUAL or high < -EQUAL
    else:
      holds, contradicted = low > 0, high < 0
    if holds:
      return 'holds'
    return 'contradicted' if contradicted else 'undecided'


def resolution(name: str) -> float:
  """What the loss that a format costs is divided by, in the scaling law.

  Examples:
    >>> resolution('e2m1') > resolution('e1m2') > resolution('e3m0')
    True
  """
  exponent, mantissa = map(int, re.fullmatch(r'e(\d)m(\d)', name).groups())
  return (exponent + 0.5) ** 3.1926 * (mantissa + 0.5) ** 2.9543


def law(names: Iterable[str]) -> dict[int, list[str]]:
  """The formats of the law among names, by their bits, the best first."""
  formats = [n for n in names if re.fullmatch(r'e\dm\d', n)]
  of = {}
  for name in sorted(formats, key=resolution, reverse=True):
    of.setdefault(1 + int(name[1]) + int(name[3]), []).append(name)
  return dict(sorted(of.items()))


def law_links(names: Iterable[str]) -> tuple[Link, ...]:
  """Within each width, and from the best of one to the best of the next."""
  of = law(names).values()
  within = [Link(*ab) for own in of for ab in itertools.pairwise(own)]
  best = [own[0] for own in of]
  return (*within, *(Link(b, a) for a, b in itertools.pairwise(best)))


def verdict(judgements: Sequence[str]) -> str:
  """Of a chain of links.

  Examples:
    >>> verdict(['holds', 'undecided'])
    'holds in part: 1 of 2 links, 0 contradicted'
  """
  held, against = (judgements.count(x) for x in ('holds', 'contradicted'))
  counts = f'{held} of {len(judgements)} links, {against} contradicted'
  if missing := judgements.count('missing'):
    return f'not complete: {counts}, {missing} missing'
  if held == len(judgements):
    return f'holds: {counts}'
  if held:
    return f'holds in part: {counts}'
  return f'{"does not hold" if against else "undecided"}: {counts}'
