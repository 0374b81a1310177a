"""A problem that both sides of bench_peers.py minimise: numpy alone."""

from typing import NamedTuple

import numpy as np

SHAPES = ((96, 64), (64, 160), (64, 64))  # (out, in); one rank for all
ROWS, STEPS, EVERY = 256, 200, 20


class Regression(NamedTuple):
  """Least squares: weight (out, in), inputs (rows, in), labels (rows, out)."""

  weight: np.ndarray
  inputs: np.ndarray
  labels: np.ndarray


def regressions() -> list[Regression]:
  """One for each shape, float32: directions of unequal weight, and noise."""
  draw = np.random.default_rng(0)
  found = []
  for out, width in SHAPES:
    weight = 0.02 * draw.normal(size=(out, width))
    inputs = draw.normal(size=(ROWS, width)) * np.arange(1, width + 1) ** -0.5
    truth = draw.normal(size=(out, width)) / width**0.5
    labels = inputs @ truth.T + 0.01 * draw.normal(size=(ROWS, out))
    found.append(
      Regression(*(x.astype(np.float32) for x in (weight, inputs, labels)))
    )
  return found
