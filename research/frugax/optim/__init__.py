"""Optimizers whose state is a fraction of Adam's, as optax transformations."""

from frugax.optim.adam import (
  decay_after_step,
  scale_by_adam_hf,
  step_and_decay,
)
from frugax.optim.axes import (
  MatrixAxes,
  as_matrix,
  from_matrix,
  matrix_axes,
)
from frugax.optim.galore import galore
from frugax.optim.low_rank import LowRankState, low_rank
from frugax.optim.projectors import Projector, from_basis
from frugax.optim.state import state_bytes, state_shardings

__all__ = [
  'LowRankState',
  'MatrixAxes',
  'Projector',
  'as_matrix',
  'decay_after_step',
  'from_basis',
  'from_matrix',
  'galore',
  'low_rank',
  'matrix_axes',
  'scale_by_adam_hf',
  'state_bytes',
  'state_shardings',
  'step_and_decay',
]
