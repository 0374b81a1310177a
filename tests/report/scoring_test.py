"""Scores by hand, and against the rules taken literally on random logs."""

import math
import random

import hypothesis
import hypothesis.strategies as st
import pytest

from frugax.report import scoring


def _trial(*points):
  return [{'steps': s, 'seconds': t, 'eval_loss': x} for s, t, x in points]


def test_to_target_by_hand():
  trial = _trial((1, 9.0, 5.0), (2, 11.0, 2.0), (3, 12.0, 2.5), (4, 20.0, 1.0))
  for target, steps, seconds in (
    (5.0, 1, 9.0),
    (4.9, 2, 11.0),
    (2.0, 2, 11.0),  # at most: the target itself counts
    (1.5, 4, 20.0),
    (0.9, math.inf, math.inf),
  ):
    assert scoring.to_target(trial, target, 'steps') == steps
    assert scoring.to_target(trial, target, 'seconds') == seconds
  assert scoring.to_target([], 9.0, 'steps') == math.inf
  diverged = _trial((1, 1.0, math.nan), (2, 2.0, math.inf))
  assert scoring.to_target(diverged, 9.0, 'steps') == math.inf
  # What is no number is no target, not one that everything reaches.
  for target in (math.inf, math.nan):
    assert scoring.to_target(trial, target, 'steps') == math.inf
    assert scoring.to_target(diverged, target, 'steps') == math.inf


def test_the_trial_is_chosen_by_what_it_took_not_by_its_evaluations():
  few = _trial((100, 50.0, 1.0))  # its first evaluation, and late
  many = _trial((10, 5.0, 3.0), (20, 10.0, 2.0), (30, 15.0, 1.0))
  assert scoring.of_study([few, many], 1.0, 'seconds') == 15.0
  # On another axis another trial may be the best.
  cheap = _trial((40, 12.0, 1.0))
  assert scoring.of_study([many, cheap], 1.0, 'seconds') == 12.0
  assert scoring.of_study([many, cheap], 1.0, 'steps') == 30


def test_the_median_over_studies_counts_misses_as_infinite():
  inf = math.inf
  assert scoring.of_workload([inf, 4.0, 2.0]) == 4.0
  assert scoring.of_workload([inf, inf, 2.0]) == inf
  assert scoring.of_workload([4.0, 2.0]) == 3.0
  assert scoring.of_workload([inf, 4.0, 2.0, 1.0]) == 3.0


def test_profiles_by_hand():
  scores = {
    'a': {'x': 10.0, 'y': 20.0, 'z': math.inf},
    'b': {'x': 30.0, 'y': 10.0, 'z': math.inf},
    'nobody': {'x': math.inf, 'y': math.inf, 'z': math.inf},
  }
  found = scoring.ratios(scores)
  assert found['x'] == {'a': 1.0, 'b': 3.0, 'nobody': math.inf}
  assert found['y'] == {'a': 2.0, 'b': 1.0, 'nobody': math.inf}
  assert [scoring.profile(found['x'], t) for t in (1, 2.9, 3, 99)] == [
    *(1 / 3, 1 / 3, 2 / 3, 2 / 3)
  ]
  # (3 + 1 + 0) / 3 of 3 workloads, (2 + 3 + 0) / 3 of 3.
  assert scoring.benchmark_score(found['x']) == pytest.approx(4 / 9)
  assert scoring.benchmark_score(found['y']) == pytest.approx(5 / 9)
  assert scoring.benchmark_score(found['z']) == 0


def _literally(logs, target, axis):
  """The score of a workload, by going through every evaluation."""
  studies = []
  for trials in logs:
    best = math.inf
    for trial in trials:
      for e in sorted(trial, key=lambda e: e['steps']):
        if e['eval_loss'] <= target:
          best = min(best, e[axis])
          break
    studies.append(best)
  studies.sort()
  middle = len(studies) // 2
  if len(studies) % 2:
    return studies[middle]
  return (studies[middle - 1] + studies[middle]) / 2


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(seed=st.integers(0, 10**9))
def test_scores_equal_brute_force_on_random_logs(seed):
  draw = random.Random(seed)
  losses = (1.0, 2.0, 3.0, 4.0, math.nan, math.inf)
  methods, workloads = 'abc', 'vw'
  scores = {}
  for workload in workloads:
    scores[workload] = {}
    for method in methods:
      logs = [
        [
          [
            # All axes grow along a run.
            {'steps': s, 'seconds': s * rate, 'eval_loss': draw.choice(losses)}
            for s in range(1, draw.randint(2, 6))
          ]
          for rate in (draw.uniform(0.5, 2.0) for _ in range(3))
        ]
        for _ in range(draw.randint(1, 4))
      ]
      for trials in logs:
        for trial in trials:
          draw.shuffle(trial)
      axis, target = draw.choice(('steps', 'seconds')), draw.choice((1.0, 2.5))
      score = scoring.of_workload(
        [scoring.of_study(trials, target, axis) for trials in logs]
      )
      assert score == _literally(logs, target, axis)
      scores[workload][method] = score
  found = scoring.ratios(scores)
  n = 4000
  taus = [1 + 3 * (i + 0.5) / n for i in range(n)]
  for method in methods:
    own = found[method]
    by_hand = [
      sum(
        scores[w][method] < math.inf
        and scores[w][method] <= tau * min(scores[w].values())
        for w in workloads
      )
      / len(workloads)
      for tau in taus
    ]
    area = sum(by_hand) / n
    assert scoring.benchmark_score(own) == pytest.approx(area, abs=1e-3)


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match='at least one trial'):
    scoring.of_study([], 1.0, 'steps')
  with pytest.raises(ValueError, match='at least one study'):
    scoring.of_workload([])
  with pytest.raises(ValueError, match="'w' has no score of 'b'"):
    scoring.ratios({'v': {'a': 1.0, 'b': 1.0}, 'w': {'a': 1.0}})
  with pytest.raises(ValueError, match='score of 0'):
    scoring.ratios({'v': {'a': 0.0}})
  with pytest.raises(ValueError, match='r_max must be above 1, got 1'):
    scoring.benchmark_score({'v': 1.0}, r_max=1)
  with pytest.raises(ValueError, match='at least one workload'):
    scoring.benchmark_score({})
