"""The optimizers that the benchmark judges, and what of each it tries.

Each has its learning rate and, if it has a second moment, that one's decay
tried, from ranges of equal width: a factor of 16 in the rate, and b2 from 0.9
to 0.999. The middle of the rates is the best that shorter runs found
(low_rank/compare.log, stability/stability.log), for apollo_mini twice and for
sgd_sai less than half of it, as their first ranges were too low and too high.
For most it is a few times what their papers take at 60M and more.
`studies/benchmark.py` marks a best choice that lies at the edge.

All else is the paper's: ranks are a fourth of the model's dimension. But in
runs of less than 5,000 steps subspaces are found anew every 40 steps, where
papers have 100 to 200 of 10,000 and more: 40 steps are several memories of b1,
and a run has a dozen refreshes; COAP's sketch comes every 8, its decomposition
every 40. There, too, SPAM and Stable-SPAM reset their moments every fifth of a
run (papers: every twentieth to fortieth), as a shorter interval is none beside
b2. LISA trains one of three layers at a time, and two of more; plain Adam
trains embedding and head. `adamw_bf16` has its moments rounded to nearest in
bfloat16, once a step, and weights in float32; in the papers' code weights are
bfloat16, too, and V is rounded twice.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from studies.workloads import Workload

WIDTH = 16.0  # the greatest learning rate that is tried over the least
DECAYS = (0.1, 0.001)  # 1 - b2
INTERVAL = 40  # steps from one refresh of the subspaces to the next
LONG = 5_000  # steps of a run that has the papers' intervals
REFRESHES = 50  # of a run of `OFTEN`, as in papers' at 60M
# The moments of a model as small as the benchmark's are coded as well.
_SMALLEST = 256


@dataclasses.dataclass(frozen=True)
class Method:
  """What one row of a table trains with.

  Attributes:
    optimizer: the name in the config.
    rate: the middle of the learning rates to try, in the logarithm.
    decay: the argument that is the second moment's decay; '' has none.
    arguments: of the optimizer, beside those.
    clip_norm: of the gradient; 0 for those that clip by themselves.
    paper: whose method; '' is ours.
  """

  optimizer: str
  rate: float
  decay: str = 'b2'
  arguments: Callable[[Workload], Mapping[str, Any]] = lambda workload: {}
  clip_norm: float = 1.0
  paper: str = ''

  def range(self) -> tuple[float, float]:
    """The least and the greatest learning rate.

    Examples:
      >>> Method('adamw', 2e-3).range()
      (0.0005, 0.008)
    """
    return self.rate / WIDTH**0.5, self.rate * WIDTH**0.5


def _always(**arguments):
  return lambda workload: arguments


def _short(workload, **arguments):
  """Arguments of runs that are too short for the authors' defaults."""
  return arguments if workload.steps < LONG else {}


def _low_rank(interval=INTERVAL, **more):
  return lambda w: {
    'rank': w.dim // 4,
    **_short(w, update_interval=interval),
    **more,
  }


def _spam(workload):
  interval = max(workload.steps // 5, 10)  # of which 3/10 are warm-up
  return _short(
    workload, reset_interval=interval, warmup_steps=3 * interval // 10
  )


def _stable_spam(workload):
  # The paper's decays for 16 bits and for 4.
  sixteen = {'gamma1': 0.85, 'gamma2': 0.99999}
  return {
    **_short(workload, reset_interval=max(workload.steps // 5, 10)),
    'total_steps': workload.steps,
    **(sixteen if workload.matmul in ('f32', 'bf16') else {}),
  }


_KINGMA = 'Kingma and Ba, arXiv 1412.6980'
_NGUYEN = 'Nguyen and Nguyen, 2411.07120'
_ZHU = 'Zhu et al., 2412.05270'
_TABLES = 'as in the tables of GaLore and those after it'
_CODED = {'state_codec': 'dynamic8', 'state_min_size': _SMALLEST}

METHODS = {
  'adamw': Method('adamw', 2e-3, paper=_KINGMA),
  'adamw_bf16': Method(
    'adamw', 2e-3, arguments=_always(state_codec='bf16'), paper=_TABLES
  ),
  'adamw_8bit': Method(
    'adamw',
    2e-3,
    arguments=_always(**_CODED),
    paper='Dettmers et al., 2110.02861',
  ),
  'galore': Method(
    'galore',
    2e-2,
    arguments=_low_rank(scale=0.25, projector='svd'),
    paper='Zhao et al., 2403.03507',
  ),
  'q_galore': Method(
    'q_galore',
    2e-2,
    arguments=_low_rank(scale=0.25, projector='svd', min_size=_SMALLEST),
    paper='Zhang et al., 2407.08296',
  ),
  'coap': Method(
    'coap',
    2e-2,
    arguments=_low_rank(INTERVAL // 5, scale=0.25),
    paper='Xiao et al., 2412.00071',
  ),
  'fira': Method(
    'fira',
    1e-2,
    arguments=_low_rank(scale=0.25, projector='svd'),
    paper='Chen et al., 2410.01623',
  ),
  'apollo': Method('apollo', 1e-2, arguments=_low_rank(), paper=_ZHU),
  'apollo_mini': Method(
    'apollo_mini',
    8e-3,
    arguments=lambda w: {
      **_short(w, update_interval=INTERVAL),
      'scale': w.dim / 4,
    },
    paper=_ZHU,
  ),
  'ldadam': Method(
    'ldadam',
    8e-3,
    arguments=lambda w: {'rank': w.dim // 4},
    paper='Robert et al., 2410.16103',
  ),
  'adam_sn': Method('adam_sn', 2e-2, paper=_NGUYEN),
  'snsm': Method(
    'snsm', 1e-2, arguments=_low_rank(projector='svd'), paper=_NGUYEN
  ),
  'spam': Method(
    'spam',
    2e-3,
    arguments=_spam,
    clip_norm=0.0,
    paper='Huang et al., 2501.06842',
  ),
  'stable_spam': Method(
    'stable_spam',
    2e-3,
    arguments=_stable_spam,
    clip_norm=0.0,
    paper='Huang et al., 2502.17055',
  ),
  'lisa': Method(
    'lisa',
    2e-3,
    arguments=lambda w: {'active': 1 if w.layers <= 3 else 2},
    paper='Pan et al., 2403.17919',
  ),
  'sgd_sai': Method('sgd_sai', 4e-2, decay='', paper='Xu et al., 2412.11768'),
  'muon': Method('muon', 1e-2, decay='adam_b2', paper='Jordan et al., 2024'),
}


# With subspaces found anew as often as in the papers' runs, for the claim that
# most of that can be left out.
OFTEN = {
  f'{name}_often': dataclasses.replace(
    METHODS[name],
    arguments=lambda w, name=name: {
      **METHODS[name].arguments(w),
      'update_interval': w.steps // REFRESHES,
    },
  )
  for name in ('galore', 'q_galore')
}


@dataclasses.dataclass(frozen=True)
class Parts:
  """A combination of parts, all of which `low_rank` and its like put together.

  Attributes:
    projector: 'sketch', 'sketch2' or 'random'; no SVD.
    every: steps from one refresh to the next.
    refresh: 'together' or 'staggered'.
    moments: what becomes of them at a refresh.
    residual: of the gradient outside of the subspace: 'drop', 'fira', 'channel'
      or 'tensor'.
    second: 'adam', or 'subset': one a row or column, outside of the subspace.
    codec: of the moments: 'f32', 'dynamic8' or 'dynamic4'.
  """

  projector: str = 'sketch'
  every: int = 5
  refresh: str = 'together'
  moments: str = 'ldadam'
  residual: str = 'drop'
  second: str = 'adam'
  codec: str = 'dynamic8'

  @property
  def name(self) -> str:
    """What differs from the defaults.

    Examples:
      >>> Parts().name, Parts(every=1, residual='fira').name
      ('ours', 'ours every=1 residual=fira')
    """
    own, first = dataclasses.asdict(self), dataclasses.asdict(Parts())
    return ' '.join(
      ['ours', *(f'{k}={v}' for k, v in own.items() if v != first[k])]
    )

  @property
  def valid(self) -> bool:
    """Whether its parts go together, and each has an effect."""
    if self.second == 'subset':
      return self.residual == 'drop' and self.moments != 'ldadam'
    if self.projector == 'random':  # has no basis to turn
      return self.moments == 'keep'
    return self.refresh == 'together' or self.residual in ('drop', 'fira')

  def method(self) -> Method:
    """The combination as the benchmark takes it."""
    bits = {'f32': None, 'dynamic8': 'int8', 'dynamic4': 'int4'}[self.codec]
    more = {'projector': self.projector, 'moments': self.moments}
    if bits:
      more |= {
        'state_codec': self.codec,
        'state_min_size': _SMALLEST,
        'projector_dtype': bits,
      }
    if self.second == 'subset':
      optimizer, rate = 'snsm', 1e-2
    elif self.residual in ('channel', 'tensor'):
      optimizer, rate = 'apollo', 1e-2
      more |= {'scale': 1.0, 'residual': self.residual}
    else:
      optimizer, rate = {'drop': ('galore', 2e-2), 'fira': ('fira', 1e-2)}[
        self.residual
      ]
      more |= {'scale': 0.25}
    if optimizer != 'apollo':
      more |= {'refresh': self.refresh}
    return Method(optimizer, rate, arguments=_low_rank(self.every, **more))


# One part changed at a time.
CHANGES = (
  Parts(projector='random', moments='keep'),  # turns only bases
  Parts(projector='sketch2'),
  Parts(every=1),
  Parts(every=20),
  Parts(every=20, refresh='staggered'),
  Parts(moments='keep'),
  Parts(moments='rotate'),
  Parts(residual='fira'),
  Parts(residual='channel'),
  Parts(residual='tensor'),
  Parts(second='subset', moments='rotate'),  # has no ldadam's
  Parts(codec='f32'),
  Parts(codec='dynamic4'),
)
