"""Time to a target: how much each method took to train to the same loss.

AlgoPerf's rules, for language models and on more axes than time. A *workload*
is a model on a data set with a target loss. A *trial* is one run of a method on
it with one choice of hyper-parameters. A *study* is a handful of trials, and
scores what the best of them took; studies are repeated with other seeds and
other hyper-parameters, and the median of their scores is the method's on that
workload. What never got there took infinitely much.

Everything here is arithmetic on logs. Axes are the names of numbers that grow
along a run: steps, tokens, model FLOPs, training seconds; bytes of state and at
the peak do not grow, and are what a trial that got there had.

References:
  Dahl et al., `Benchmarking Neural Network Training Algorithms
  <https://arxiv.org/abs/2306.07179>`_, 2023
  Dolan and Moré, `Benchmarking optimization software with performance profiles
  <https://arxiv.org/abs/cs/0102001>`_, 2002
"""

import math
import statistics
from collections.abc import Mapping, Sequence

R_MAX = 4.0  # beyond so many times the best a method gets nothing

# Of one evaluation: each axis, and eval_loss.
Evaluation = Mapping[str, float]


def to_target(trial: Sequence[Evaluation], target: float, axis: str) -> float:
  """What a trial took until its loss was at most the target.

  Args:
    trial: its evaluations, in any order.
    target: the loss to be reached; one that is not finite never is.
    axis: what to count.

  Returns:
    The axis at the first evaluation, in its order, that reached the target;
    infinity if none did.

  Examples:
    >>> trial = [{'steps': 10, 'eval_loss': 3.0},
    ...          {'steps': 20, 'eval_loss': 2.0}]
    >>> to_target(trial, 2.5, 'steps'), to_target(trial, 1.0, 'steps')
    (20, inf)
  """
  if not math.isfinite(target):
    return math.inf
  reached = (e[axis] for e in trial if e['eval_loss'] <= target)
  return min(reached, default=math.inf)


def of_study(
  trials: Sequence[Sequence[Evaluation]], target: float, axis: str
) -> float:
  """The least that a trial of the study took, on the axis that is judged.

  AlgoPerf's own code takes the trial that got there in the fewest evaluations,
  which is not the fastest where trials are evaluated at different times.

  Raises:
    ValueError: no trials.

  Examples:
    >>> slow = [{'seconds': 30.0, 'eval_loss': 1.0}]
    >>> fast = [{'seconds': 9.0, 'eval_loss': 2.0},
    ...         {'seconds': 18.0, 'eval_loss': 1.0}]
    >>> of_study([slow, fast], 1.5, 'seconds')
    18.0
  """
  if not trials:
    raise ValueError('a study needs at least one trial')
  return min(to_target(trial, target, axis) for trial in trials)


def of_workload(studies: Sequence[float]) -> float:
  """The median of the studies' scores; half of infinity is infinity.

  Raises:
    ValueError: no studies.

  Examples:
    >>> of_workload([3.0, math.inf, 5.0]), of_workload([3.0, math.inf])
    (5.0, inf)
  """
  if not studies:
    raise ValueError('a workload needs at least one study')
  return statistics.median(studies)


def ratios(
  scores: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
  """What each method took over the best method, on each workload.

  Args:
    scores: workload -> method -> score, infinity for a miss.

  Returns:
    method -> workload -> ratio, 1 or more; infinity for a miss, and on a
    workload that nobody finished.

  Raises:
    ValueError: a workload without the scores of all methods, or a score that is
      not positive.

  Examples:
    >>> ratios({'tiny': {'adamw': 200.0, 'muon': 100.0}})
    {'adamw': {'tiny': 2.0}, 'muon': {'tiny': 1.0}}
  """
  methods = list(dict.fromkeys(m for own in scores.values() for m in own))
  found: dict[str, dict[str, float]] = {method: {} for method in methods}
  for workload, own in scores.items():
    if missing := [m for m in methods if m not in own]:
      raise ValueError(f'workload {workload!r} has no score of {missing[0]!r}')
    best = min(own.values())
    if not best > 0:
      raise ValueError(f'workload {workload!r} has a score of {best}')
    for method in methods:
      miss = math.isinf(own[method])
      found[method][workload] = math.inf if miss else own[method] / best
  return found


def profile(own: Mapping[str, float], tau: float) -> float:
  """The share of workloads on which a method took at most tau times the best.

  Args:
    own: the method's ratio on each workload, of `ratios`.
    tau: 1 or more.

  Examples:
    >>> profile({'a': 1.0, 'b': 2.0}, 1.5), profile({'a': 1.0, 'b': 2.0}, 2.0)
    (0.5, 1.0)
  """
  return sum(ratio <= tau for ratio in own.values()) / len(own)


def benchmark_score(own: Mapping[str, float], r_max: float = R_MAX) -> float:
  r"""The area under a method's profile, from 0 to 1.

  .. math:: B = \frac{1}{r_{max} - 1} \int_1^{r_{max}} \rho(\tau) d\tau

  The profile is a step function, so that each workload adds its share of the
  way from its ratio to r_max.

  Args:
    own: as in `profile`.
    r_max: the ratio beyond which nothing counts.

  Raises:
    ValueError: r_max is not above 1, or there are no workloads.

  Examples:
    >>> benchmark_score({'a': 1.0, 'b': 2.5, 'c': math.inf})
    0.5
  """
  if not r_max > 1:
    raise ValueError(f'r_max must be above 1, got {r_max}')
  if not own:
    raise ValueError('a score needs at least one workload')
  areas = (max(r_max - ratio, 0.0) / (r_max - 1) for ratio in own.values())
  return sum(areas) / len(own)
