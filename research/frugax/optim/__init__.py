"""Optimizers whose state is a fraction of Adam's, as optax transformations."""

from frugax.optim.adam import (
  correct_bias,
  decay_after_step,
  scale_by_adam_hf,
  step_and_decay,
)
from frugax.optim.adaptive import adaptive_clip, adaptive_norm
from frugax.optim.apollo import apollo, apollo_mini
from frugax.optim.apply import apply_updates
from frugax.optim.axes import (
  MatrixAxes,
  as_matrix,
  from_matrix,
  matrix_axes,
)
from frugax.optim.coap import coap
from frugax.optim.counts import counts
from frugax.optim.fira import fira
from frugax.optim.flora import flora
from frugax.optim.frugal import frugal
from frugax.optim.galore import galore
from frugax.optim.grad_norm_lorp import grad_norm_lorp, weight_normalized
from frugax.optim.lamb import lamb, scale_by_trust_ratio
from frugax.optim.ldadam import ldadam
from frugax.optim.limits import limit_norm_growth
from frugax.optim.lisa import SampleLayersState, lisa, sample_layers
from frugax.optim.low_rank import LowRankState, low_rank
from frugax.optim.moments import Moments
from frugax.optim.overlap import subspace_overlap
from frugax.optim.projection import Projector, from_basis
from frugax.optim.q_galore import q_galore
from frugax.optim.quantized import QuantizeState, quantize_state
from frugax.optim.reset import reset_moments
from frugax.optim.residuals import Residual
from frugax.optim.schedules import (
  infinite_schedule,
  rewarm_schedule,
  wsd_schedule,
)
from frugax.optim.sgd_sai import scale_by_sai, sgd_sai
from frugax.optim.snsm import snsm
from frugax.optim.spam import spam
from frugax.optim.spikes import clip_spikes
from frugax.optim.stable_spam import stable_spam
from frugax.optim.state import (
  state_bytes,
  state_categories,
  state_shardings,
)
from frugax.optim.subset_norm import (
  adagrad_sn,
  adam_sn,
  adamw_sn,
  scale_by_adam_sn,
  scale_by_subset_norm,
)
from frugax.optim.subspace import scale_by_momentum, subspace_momentum

__all__ = [
  'LowRankState',
  'MatrixAxes',
  'Moments',
  'Projector',
  'QuantizeState',
  'Residual',
  'SampleLayersState',
  'adagrad_sn',
  'adam_sn',
  'adamw_sn',
  'adaptive_clip',
  'adaptive_norm',
  'apollo',
  'apollo_mini',
  'apply_updates',
  'as_matrix',
  'clip_spikes',
  'coap',
  'correct_bias',
  'counts',
  'decay_after_step',
  'fira',
  'flora',
  'from_basis',
  'from_matrix',
  'frugal',
  'galore',
  'grad_norm_lorp',
  'infinite_schedule',
  'lamb',
  'ldadam',
  'limit_norm_growth',
  'lisa',
  'low_rank',
  'matrix_axes',
  'q_galore',
  'quantize_state',
  'reset_moments',
  'rewarm_schedule',
  'sample_layers',
  'scale_by_adam_hf',
  'scale_by_adam_sn',
  'scale_by_momentum',
  'scale_by_sai',
  'scale_by_subset_norm',
  'scale_by_trust_ratio',
  'sgd_sai',
  'snsm',
  'spam',
  'stable_spam',
  'state_bytes',
  'state_categories',
  'state_shardings',
  'step_and_decay',
  'subspace_momentum',
  'subspace_overlap',
  'weight_normalized',
  'wsd_schedule',
]
