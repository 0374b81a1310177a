"""How research/studies/recipes judges losses."""

import itertools
import re

import numpy as np
import pytest

from frugax import lowbit
from studies.recipes import orders
from studies.recipes import recipes as study
from studies.recipes.orders import Link

_NOISE = np.array([-0.001, 0.0, 0.001])
_SEEDS = np.array([2.0, 2.1, 2.3])


def table(means):
  """Losses of the seeds, which differ by far more than the recipes do."""
  return study.Table(
    {(name, 'adamw'): _SEEDS + mean + _NOISE for name, mean in means.items()}
    | {(study.BASE, 'adamw'): _SEEDS}
  )


def test_every_family_of_recipes_is_there():
  def family(name):
    name = {'int4_sim': 'stable_spam_int4', 'fp4_sim': 'stable_spam_fp4'}.get(
      name, name
    )
    if re.fullmatch(r'(masked_)?e\dm\d', name):
      return re.sub(r'\d', '', name)
    name = re.sub(r'_(weights|plain|sparse|nearest|median|fp6)$', '', name)
    return re.sub(r'^(quest|halo)[\d.]*(_fp8)?', r'\1', name)

  there = {family(name) for name in study.RECIPES}
  assert {family(name) for name in lowbit.RECIPES} - there == {'none'}
  assert set(study.RECIPES) <= set(lowbit.RECIPES)


@pytest.mark.parametrize(
  ('relation', 'mean', 'half', 'judgement'),
  [
    ('<', 0.03, 0.02, 'holds'),
    ('<', 0.01, 0.02, 'undecided'),
    ('<', -0.01, 0.02, 'undecided'),
    ('<', -0.03, 0.02, 'contradicted'),
    ('<', np.inf, 0.0, 'holds'),
    ('<', -np.inf, 0.0, 'contradicted'),
    ('<', np.nan, 0.0, 'undecided'),
    ('~', 0.005, 0.01, 'holds'),
    ('~', -0.005, 0.01, 'holds'),
    ('~', 0.015, 0.01, 'undecided'),
    ('~', 0.05, 0.01, 'contradicted'),
    ('~', -0.05, 0.01, 'contradicted'),
    ('~', np.inf, 0.0, 'contradicted'),
  ],
)
def test_a_link(relation, mean, half, judgement):
  assert Link('a', 'b', relation).judge(mean, half) == judgement


def test_seeds_are_paired_and_a_diverged_run_is_worst():
  mean, half = orders.difference(_SEEDS + 0.1 + _NOISE, _SEEDS)
  assert mean == pytest.approx(0.1)
  assert half == pytest.approx(4.302653 * 0.001 / np.sqrt(3))
  lost = np.array([2.0, np.inf, 2.3])
  assert orders.difference(lost, _SEEDS)[0] == np.inf
  assert orders.difference(_SEEDS, lost)[0] == -np.inf
  assert np.isnan(orders.difference(lost, lost)[0])


def test_the_order_of_the_scaling_law():
  of = orders.law(study.RECIPES)
  assert list(of) == [4, 5, 6, 8]
  # What its paper says of 4 and 8 bits.
  assert of[4] == ['e2m1', 'e1m2', 'e3m0']
  assert of[8][0] == 'e4m3'
  links = [str(link) for link in orders.law_links(study.RECIPES)]
  assert {'e2m1 < e1m2', 'e4m3 < e3m2', 'e2m2 < e2m1'} <= set(links)
  names = [name for own in of.values() for name in own]
  assert len(names) == len(set(names))
  assert len(links) == len(names) - 1


def test_what_is_said_of_quest():
  published = {'quest8': 0, 'quest4_weights': 0.04, 'quest4': 0.06}
  whole = table({**published, 'quest4_plain': 0.1})
  first, *links = whole.chain('QuEST', study.QUEST, 'adamw')
  assert first == 'QuEST, adamw: holds: 4 of 4 links, 0 contradicted'
  assert all(line.endswith('holds') for line in links)
  other = table({**published, 'quest4_plain': 0.05})
  first, *links = other.chain('QuEST', study.QUEST, 'adamw')
  assert 'holds in part: 3 of 4 links, 1 contradicted' in first
  assert links[-1].endswith('contradicted')
  part = table(published)
  first, *links = part.chain('QuEST', study.QUEST, 'adamw')
  assert 'not complete: 3 of 4 links, 0 contradicted, 1 missing' in first


def test_the_pairs_of_formats():
  names = sorted(
    itertools.chain(*orders.law(study.RECIPES).values()),
    key=orders.resolution,
    reverse=True,
  )
  means = {name: 0.1 * i for i, name in enumerate(names)}
  count = len(names) * (len(names) - 1) // 2
  said = table(means).pairs('adamw')
  assert f'{count} have means' in said
  assert f'{count} are shown, 0 contradicted' in said
  said = table({name: -mean for name, mean in means.items()}).pairs('adamw')
  assert f'0 are shown, {count} contradicted' in said


def test_a_table_of_what_is_there():
  lines = '\n'.join(table({'quest8': 0.01}).rows())
  assert '+0.0100  0.0025 worse' in lines
  assert lines.count('not all seeds yet') == 2 * len(study.RECIPES) - 2
