"""Optimizers whose state is a fraction of Adam's, as optax transformations."""

from frugax.optim.adam import (
  correct_bias,
  decay_after_step,
  scale_by_adam_hf,
  step_and_decay,
)
from frugax.optim.apollo import apollo, apollo_mini
from frugax.optim.axes import (
  MatrixAxes,
  as_matrix,
  from_matrix,
  matrix_axes,
)
from frugax.optim.coap import coap
from frugax.optim.fira import fira
from frugax.optim.flora import flora
from frugax.optim.galore import galore
from frugax.optim.ldadam import ldadam
from frugax.optim.limits import limit_norm_growth
from frugax.optim.low_rank import LowRankState, low_rank
from frugax.optim.moments import Moments
from frugax.optim.projectors import Projector, from_basis
from frugax.optim.residuals import Residual
from frugax.optim.state import state_bytes, state_shardings
from frugax.optim.subspace import scale_by_momentum, subspace_momentum

__all__ = [
  'LowRankState',
  'MatrixAxes',
  'Moments',
  'Projector',
  'Residual',
  'apollo',
  'apollo_mini',
  'as_matrix',
  'coap',
  'correct_bias',
  'decay_after_step',
  'fira',
  'flora',
  'from_basis',
  'from_matrix',
  'galore',
  'ldadam',
  'limit_norm_growth',
  'low_rank',
  'matrix_axes',
  'scale_by_adam_hf',
  'scale_by_momentum',
  'state_bytes',
  'state_shardings',
  'step_and_decay',
  'subspace_momentum',
]
