"""What research/studies/stability calls diverged."""

import pytest

from studies import sweep
from studies.stability import stability as study

_STEPS = [20.0, 40.0, 60.0]


def result(*losses):
  return sweep.Result('a commit', _STEPS[: len(losses)], list(losses))


@pytest.mark.parametrize(
  ('losses', 'fate'),
  [
    ((3.0, 2.8, 2.5), ''),
    ((3.0, 4.5, 2.9), ''),  # a spike that it came back from
    ((3.0, 2.3, 2.9), study.DIVERGED),
    ((6.5, 5.9, 5.8), study.DIVERGED),  # above ln(320)
    ((3.0, 2.8), study.DIVERGED),  # its loss was not finite then
    ((), study.DIVERGED),
    ((5.0, 3.4, 3.2), study.NOTHING),
    ((5.0, 3.4, 3.1), ''),
  ],
)
def test_fates(losses, fate):
  assert study.fate(result(*losses), 60, entropy=3.18) == fate


def grid(of):
  """A grid of good runs but for those of `of`: (optimizer, factor, seed)."""
  return study.Grid(
    {
      (name, study.learning_rate(name, factor), seed): of.get(
        (name, factor, seed), result(3.0, 2.7, 2.5 + factor / 1e4)
      )
      for name in study.RATES
      for factor in study.FACTORS
      for seed in study.SEEDS
    },
    steps=60,
    entropy=3.18,
  )


def test_the_rates_at_which_seeds_are_lost():
  lost = {('adamw', 30, 1): result(3.0), ('adamw', 10, 0): result(5, 4, 3.2)}
  lost |= {('adamw', 100, seed): result(3.0, 3.0, 9.0) for seed in study.SEEDS}
  lost[('adamw', 1, 2)] = result(3.0, 2.9, 2.8)
  found = grid(lost)
  assert found.first('adamw', (study.DIVERGED,), 1) == '0.03'
  assert found.first('adamw', (study.DIVERGED,), 3) == '0.1'
  both = (study.DIVERGED, study.NOTHING)
  assert found.first('adamw', both, 1) == '0.01'
  assert found.first('spam', both, 1) == 'none'
  assert found.best('adamw') == 3
  assert found.mean('adamw', 30) == pytest.approx(2.503)
  text = study.tables(found)
  assert '1d' in text and '1n' in text and '3d' in text


def test_steps_to_a_loss():
  assert study.steps_to(result(3.0, 2.8, 2.4), 2.6) == pytest.approx(50)
  assert study.steps_to(result(3.0, 2.8, 2.4), 3.1) == 20
  assert study.steps_to(result(3.0, 2.8, 2.4), 2.3) != 20
