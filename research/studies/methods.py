"""The optimizers that the benchmark judges, and what of each it tries.

Each has its learning rate and, if it has a second moment, that one's decay
tried, from ranges of equal width: a factor of 16 in the rate, about the rate
that its paper takes or a multiple that is known from shorter comparisons
(low_rank/compare.log), and b2 from 0.9 to 0.999. All else is the paper's.
Subspaces have a fourth of the model dimension. What papers do every 200 of
10,000 steps is done as often in the run, every fiftieth part of it; LDAdam and
our own follow the gradient as often as they say.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

WIDTH = 16.0  # the greatest learning rate that is tried over the least
DECAYS = (0.1, 0.001)  # 1 - b2
_NONE: Mapping[str, Any] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Method:
  """What one row of a table trains with.

  Attributes:
    optimizer: the name in the config.
    rate: the middle of the learning rates to try, in the logarithm.
    decay: whether b2 is tried, too.
    arguments: of the optimizer, beside those, of the steps of a run and the
      model's dimension.
    values: of the config, beside the optimizer's.
    projector: whether the paper's needs singular vectors.
    paper: whose method; '' is ours.
  """

  optimizer: str
  rate: float
  decay: bool = True
  arguments: Callable[[int, int], Mapping[str, Any]] = lambda steps, dim: _NONE
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  paper: str = ''

  def range(self) -> tuple[float, float]:
    """The least and the greatest learning rate.

    Examples:
      >>> Method('adamw', 2e-3).range()
      (0.0005, 0.008)
    """
    return self.rate / WIDTH**0.5, self.rate * WIDTH**0.5


def _low_rank(**more):
  def arguments(steps, dim):
    return {'rank': dim // 4, 'update_interval': max(steps // 50, 1), **more}

  return arguments


def _spam(steps, dim):
  # Of 20,000 steps the paper resets every 500, of which 150 are warm-up.
  interval = max(steps // 5, 10)
  return {'reset_interval': interval, 'warmup_steps': 3 * interval // 10}


def _stable_spam(steps, dim):
  return {'reset_interval': max(steps // 5, 10), 'total_steps': steps}


# They clip by themselves.
_UNCLIPPED = types.MappingProxyType({'clip_norm': 0.0})

METHODS = {
  'adamw': Method('adamw', 2e-3, paper='Kingma and Ba, arXiv 1412.6980'),
  'adamw_bf16': Method(
    'adamw',
    2e-3,
    # To nearest, as in the published tables.
    arguments=lambda steps, dim: {'state_codec': 'bf16'},
    paper='as in the tables of GaLore and those after it',
  ),
  'adamw_8bit': Method(
    'adamw',
    2e-3,
    arguments=lambda steps, dim: {
      'state_codec': 'dynamic8',
      'state_min_size': 256,
    },
    paper='Dettmers et al., 2110.02861',
  ),
  # As Hugging Face's default and the papers have it, which the others tune.
  'adamw_999': Method(
    'adamw',
    2e-3,
    decay=False,
    arguments=lambda steps, dim: {'b2': 0.999},
    paper='Kingma and Ba, arXiv 1412.6980',
  ),
  'adamw_bf16_999': Method(
    'adamw',
    2e-3,
    decay=False,
    arguments=lambda steps, dim: {'b2': 0.999, 'state_codec': 'bf16'},
    paper='as in the tables of GaLore and those after it',
  ),
  'galore': Method(
    'galore',
    1e-2,
    arguments=_low_rank(scale=0.25, projector='svd'),
    paper='Zhao et al., 2403.03507',
  ),
  'q_galore': Method(
    'q_galore',
    1e-2,
    arguments=_low_rank(scale=0.25, projector='svd'),
    paper='Zhang et al., 2407.08296',
  ),
  'coap': Method(
    'coap',
    1e-2,
    # Decomposes as often as the others: every fifth of its refreshes.
    arguments=lambda steps, dim: {
      'rank': dim // 4,
      'update_interval': max(steps // 250, 1),
      'scale': 0.25,
    },
    paper='Xiao et al., 2412.00071',
  ),
  'fira': Method(
    'fira',
    1e-2,
    arguments=_low_rank(scale=0.25, projector='svd'),
    paper='Chen et al., 2410.01623',
  ),
  'apollo': Method(
    'apollo', 1e-2, arguments=_low_rank(), paper='Zhu et al., 2412.05270'
  ),
  'apollo_mini': Method(
    'apollo_mini',
    1e-2,
    arguments=lambda steps, dim: {
      'update_interval': max(steps // 50, 1),
      'scale': dim / 4,
    },
    paper='Zhu et al., 2412.05270',
  ),
  'ldadam': Method(
    'ldadam',
    4e-3,
    arguments=lambda steps, dim: {'rank': dim // 4},
    paper='Robert et al., 2410.16103',
  ),
  'adam_sn': Method('adam_sn', 5e-2, paper='Nguyen and Nguyen, 2411.07120'),
  'snsm': Method(
    'snsm',
    5e-2,
    arguments=_low_rank(projector='svd'),
    paper='Nguyen and Nguyen, 2411.07120',
  ),
  'spam': Method(
    'spam',
    2e-3,
    arguments=_spam,
    values=_UNCLIPPED,
    paper='Huang et al., 2501.06842',
  ),
  'stable_spam': Method(
    'stable_spam',
    2e-3,
    arguments=_stable_spam,
    values=_UNCLIPPED,
    paper='Huang et al., 2502.17055',
  ),
  'lisa': Method('lisa', 2e-3, paper='Pan et al., 2403.17919'),
  'sgd_sai': Method(
    'sgd_sai', 1e-1, decay=False, paper='Xu et al., 2412.11768'
  ),
  'muon': Method('muon', 1e-2, decay=False, paper='Jordan et al., 2024'),
}


def _ours(optimizer, rate, every=5, **more):
  """A combination of parts, whose subspaces turn every few steps."""

  def arguments(steps, dim):
    return {
      'rank': dim // 4,
      'update_interval': every,
      'projector': 'sketch',
      **more,
    }

  return Method(optimizer, rate, arguments=arguments)


# The moments of a model as small as the benchmark's are coded as well.
_8BIT = {
  'state_codec': 'dynamic8',
  'state_min_size': 256,
  'projector_dtype': 'int8',
}
_BASE = {'moments': 'ldadam', 'scale': 0.25, **_8BIT}

# What is searched for a recipe of our own: from galore with a sketch every five
# steps, moments that turn with it and eight bits, one part changed at a time.
CANDIDATES = {
  'ours': _ours('galore', 1e-2, **_BASE),
  # projector
  'ours_random': _ours('galore', 1e-2, **_BASE | {'projector': 'random'}),
  'ours_sketch2': _ours('galore', 1e-2, **_BASE | {'projector': 'sketch2'}),
  # refresh
  'ours_1': _ours('galore', 1e-2, every=1, **_BASE),
  'ours_20': _ours('galore', 1e-2, every=20, **_BASE),
  'ours_staggered': _ours('galore', 1e-2, **_BASE | {'refresh': 'staggered'}),
  # moments
  'ours_keep': _ours('galore', 1e-2, **_BASE | {'moments': 'keep'}),
  'ours_rotate': _ours('galore', 1e-2, **_BASE | {'moments': 'rotate'}),
  # residual
  'ours_fira': _ours('fira', 1e-2, **_BASE),
  'ours_channel': _ours('apollo', 1e-2, **_BASE | {'scale': 1.0}),
  'ours_tensor': _ours(
    'apollo', 1e-2, **_BASE | {'scale': 1.0, 'residual': 'tensor'}
  ),
  # second moment
  'ours_subset': _ours('snsm', 5e-2, moments='rotate', **_8BIT),
  # codec
  'ours_f32': _ours('galore', 1e-2, moments='ldadam', scale=0.25),
  'ours_4bit': _ours(
    'galore',
    1e-2,
    **_BASE | {'state_codec': 'dynamic4', 'projector_dtype': 'int4'},
  ),
}
