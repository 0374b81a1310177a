"""What a few seeds tell."""

import math

import numpy as np
from scipy import stats

SEEDS = (0, 1, 2)


def interval(
  values: np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
  """Mean of values and the half width of its interval, by Student's t.

  Examples:
    >>> mean, half = interval(np.array([1.0, 2.0, 3.0]))
    >>> print(f'{mean} +- {half:.4f}')
    2.0 +- 2.4841
  """
  n = len(values)
  if n < 2:
    raise ValueError(f'{n} values have no interval: give two or more')
  t = stats.t.ppf((1 + confidence) / 2, n - 1)
  return values.mean(), float(t * values.std(ddof=1) / math.sqrt(n))
