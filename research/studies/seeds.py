"""What three seeds tell."""

import math

import numpy as np

SEEDS = (0, 1, 2)
# Student's t for a two-sided 95 % interval of three values' mean.
T_95 = 4.303


def interval(differences: np.ndarray) -> tuple[float, float]:
  """Mean of three values and the half width of its 95 % interval."""
  if len(differences) != len(SEEDS):
    raise ValueError(f'{len(differences)} values: the interval is that of 3')
  half = T_95 * differences.std(ddof=1) / math.sqrt(len(SEEDS))
  return differences.mean(), half
