"""One benchmark for every optimizer: what each takes to the same loss.

AlgoPerf's rules (arXiv 2306.07179) for language models, on five axes at once:
steps, tokens, model FLOPs, bytes of the optimizer's state and of the step,
training seconds. A *study* is a handful of trials with one seed, each with
hyper-parameters from a quasi-random sequence; the three studies of a method on
a workload continue the sequence. A study scores what the trial that took least
needed to the target, each axis for itself; their median is the method's, and
what never got there took infinitely much. The target is what AdamW with state
in float32 reaches: the median over its studies of the least final loss. AdamW
is tuned as all others are, by as many trials over its rate and b2
(`studies/methods.py`).

What is equal: model, data and their order (by seed), batch, warm-up over a
tenth of the steps and cosine to a tenth, no weight decay, clipping at norm 1
but for those that clip by themselves. Losses are means over all tokens of the
validation set that are no padding; the value that the published harness prints
(the sum of the batches' means over their number plus one) is kept beside.
Tokens are counted without padding (tokens) and with it (slots); model FLOPs are
those of the slots. Seconds are of training, compilation counted (nothing that
was compiled before is used), evaluation not.

`studies/benchmark.py` is the command; claims take the same runs.
"""

import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import qmc

from frugax import report
from frugax.models import llama
from frugax.report import scoring
from studies import sweep
from studies.methods import CANDIDATES, DECAYS, METHODS, Method

STUDIES, TRIALS = 3, 4
BASE = 'adamw'
FIELDS = ('workload', 'method', 'study', 'trial')
AXES = ('steps', 'tokens', 'slots', 'flops', 'seconds')


@dataclasses.dataclass(frozen=True)
class Workload:
  """A model on data, and how long it is trained.

  Attributes:
    steps: of a run; a twentieth of them from one evaluation to the next.
    batch: sequences of a step.
    length: tokens of a sequence.
    mode: of the data: packed, or c4_protocol, where each sequence is one
      document, cut or padded.
    size: the model, of configs/llama.py.
    matmul: how its layers multiply, likewise.
    model: fields of the model that are otherwise.
    eval_tokens: of one evaluation.
  """

  steps: int
  batch: int
  length: int
  mode: str = 'packed'
  size: str = 'tiny'
  matmul: str = 'f32'
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  eval_tokens: int = 10_000

  @property
  def dim(self) -> int:
    """The model's dimension."""
    return llama.config(self.size, **self.model).dim

  @property
  def slots(self) -> int:
    """Tokens of a step, padding counted."""
    return self.batch * self.length


# A model of a sixth of `tiny`, so that a run gets beyond the unigrams.
_SMALL = types.MappingProxyType(
  {'dim': 64, 'ffn': 176, 'n_layers': 3, 'n_heads': 4, 'n_kv_heads': 4}
)
_WIDE = types.MappingProxyType(
  {'dim': 128, 'ffn': 352, 'n_layers': 3, 'n_heads': 4, 'n_kv_heads': 4}
)
_PACKED = Workload(600, 4, 128, model=_SMALL)
_HALF = dataclasses.replace(_PACKED, steps=300)
_INT4 = 'stable_spam_int4'
WORKLOADS = {
  'packed': _PACKED,
  'padded': dataclasses.replace(_PACKED, mode='c4_protocol'),
  'half': _HALF,
  'int4': dataclasses.replace(_PACKED, matmul=_INT4),
  'int4_half': dataclasses.replace(_HALF, matmul=_INT4),
  'ternary': dataclasses.replace(_PACKED, matmul='b1.58'),
  'ternary_wide': dataclasses.replace(_PACKED, matmul='b1.58', model=_WIDE),
  '10m': Workload(2000, 64, 256, size='10m', matmul='bf16'),
  '60m': Workload(4000, 128, 256, size='60m', matmul='bf16'),
}
DEFAULT = ('packed', 'padded')


@dataclasses.dataclass(frozen=True)
class Record(sweep.Result):
  """What remains of a run.

  Attributes:
    eval_compat: the validation loss as the published harness prints it.
    eval_tokens: trained on before each evaluation, padding not counted.
    eval_seconds: of training before each evaluation.
    flops_per_token: the model's.
    state_bytes: the optimizer's.
    adam_bytes: what Adam would hold, in the weights' dtype.
  """

  eval_compat: list[float]
  eval_tokens: list[float]
  eval_seconds: list[float]
  flops_per_token: float
  state_bytes: int
  adam_bytes: int

  @classmethod
  def of_run(cls, run: report.Run) -> 'Record':
    rows = [
      dict(zip(run.eval, row, strict=True))
      for row in zip(*run.eval.values(), strict=True)
    ]
    rows = [row for row in rows if math.isfinite(row['eval_loss'])]

    def column(name, digits):
      return [round(float(row[name]), digits) for row in rows]

    return cls(
      origin=sweep.origin([run]),
      eval_step=column('step', 0),
      eval_loss=column('eval_loss', 5),
      eval_compat=column('eval_loss_compat', 5),
      eval_tokens=column('tokens', 0),
      eval_seconds=column('seconds', 2),
      flops_per_token=run.summary['flops_per_token'],
      state_bytes=int(run.summary['optimizer_state_bytes']),
      adam_bytes=int(run.summary['adam_state_bytes']),
    )

  def evaluations(self, slots: int) -> list[dict[str, float]]:
    """As `frugax.report.scoring` takes them.

    Args:
      slots: tokens of a step, padding counted.
    """
    return [
      {
        'steps': step,
        'tokens': tokens,
        'slots': step * slots,
        'flops': step * slots * self.flops_per_token,
        'seconds': seconds,
        'eval_loss': loss,
      }
      for step, tokens, seconds, loss in zip(
        self.eval_step,
        self.eval_tokens,
        self.eval_seconds,
        self.eval_loss,
        strict=True,
      )
    ]

  def final(self, steps: int) -> float:
    """The loss after so many steps, inf if it did not get there."""
    there = self.eval_step and self.eval_step[-1] == steps
    return self.eval_loss[-1] if there else math.inf


def trial(method: Method, n: int) -> dict[str, float]:
  """The n-th choice of a method's hyper-parameters.

  Points of Halton's sequence, which fill the range evenly however many are
  taken; the first of all, a corner, is left out.

  Examples:
    >>> trial(METHODS['adamw'], 0)
    {'learning_rate': 0.002, 'b2': 0.9784...}
    >>> [trial(METHODS['muon'], n)['learning_rate'] for n in range(3)]
    [0.01, 0.005, 0.02]
  """
  sequence = qmc.Halton(2, scramble=False).fast_forward(n + 1)
  x, y = sequence.random(1)[0]
  low, high = method.range()
  rate = low * (high / low) ** x
  chosen = {'learning_rate': float(f'{rate:.4g}')}
  if method.decay:
    left = DECAYS[0] * (DECAYS[1] / DECAYS[0]) ** y
    chosen['b2'] = float(f'{1 - left:.5g}')
  return chosen


def run(
  name: str,
  workload: Workload,
  method: Method,
  choice: Mapping[str, float],
  seed: int,
  data_dir: str,
) -> sweep.Run:
  """The run of a trial."""
  optimizer = {
    'weight_decay': 0.0,
    **method.arguments(workload.steps, workload.dim),
    **choice,
  }
  values = {
    'steps': workload.steps,
    'seed': seed,
    'batch_size': workload.batch,
    'clip_norm': 1.0,
    'compat_eval': True,
    'schedule.warmup_steps': workload.steps // 10,
    'data.data_dir': data_dir,
    'data.sequence_length': workload.length,
    'data.mode': workload.mode,
    'data.seed': seed,
    'eval.every': workload.steps // 20,
    'eval.batch_size': workload.batch * 8,
    'eval.tokens': workload.eval_tokens,
    'checkpoint.every': 0,
    'log.every': workload.steps // 20,
    'log.tensorboard': False,
    **method.values,
    **{f'model.{k}': v for k, v in workload.model.items()},
    **{f'optimizer.{k}': v for k, v in optimizer.items()},
  }
  arguments = (
    f'size={workload.size},data=stdlib,matmul={workload.matmul},'
    f'opt={method.optimizer}'
  )
  return sweep.Run(name, arguments, values)


class Benchmark:
  """The trials of methods on workloads.

  Args:
    workdir: of the runs and the file of their records.
    data_dir: where the corpus is.
    jobs: runs at a time.
    train: whether to train what is missing.
    methods: by name.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    data_dir: str = 'data',
    jobs: int = 2,
    train: bool = True,
    methods: Mapping[str, Method] = types.MappingProxyType(
      METHODS | CANDIDATES
    ),
  ):
    self.methods, self._train, self._data_dir = methods, train, data_dir
    self._workdir = workdir
    self._results = sweep.Results(
      workdir / 'benchmark.json',
      FIELDS,
      self.run,
      sweep.Sweep(workdir, jobs, compiled=False),
      kind=Record,
    )

  def run(self, key: sweep.Key) -> sweep.Run:
    """The run of a key (workload, method, study, trial)."""
    workload, name, study, n = key
    method = self.methods[name]
    return run(
      f'{workload}/{name}-{study}-{n}',
      WORKLOADS[workload],
      method,
      trial(method, study * TRIALS + n),
      study,
      self._data_dir,
    )

  def get(
    self,
    workload: str,
    methods: Iterable[str],
    studies: Sequence[int] = range(STUDIES),
  ) -> None:
    """Trains what is missing of the trials of methods."""
    keys = [
      (workload, name, study, n)
      for study in studies
      for name in methods
      for n in range(TRIALS)
    ]
    self._results.get(keys, train=self._train)

  def study(self, workload: str, method: str, study: int) -> list[Record]:
    """The trials of a study that are there."""
    keys = [(workload, method, study, n) for n in range(TRIALS)]
    return [self._results.of[k] for k in keys if k in self._results.of]

  def whole(self, workload: str, method: str) -> bool:
    """Whether no trial is missing."""
    return all(
      len(self.study(workload, method, s)) == TRIALS for s in range(STUDIES)
    )

  def finals(self, workload: str, method: str) -> list[float]:
    """Of each study the least final loss."""
    steps = WORKLOADS[workload].steps
    return [
      min(r.final(steps) for r in self.study(workload, method, s))
      for s in range(STUDIES)
    ]

  def target(self, workload: str) -> float:
    """The loss to be reached."""
    return statistics.median(self.finals(workload, BASE))

  def took(self, workload: str, method: str, axis: str) -> list[float]:
    """What each study scores on an axis."""
    slots = WORKLOADS[workload].slots
    return [
      scoring.of_study(
        [r.evaluations(slots) for r in self.study(workload, method, s)],
        self.target(workload),
        axis,
      )
      for s in range(STUDIES)
    ]

  def best_trial(self, workload: str, method: str, study: int) -> int:
    """The trial that ended lowest."""
    steps = WORKLOADS[workload].steps
    found = self.study(workload, method, study)
    return min(range(len(found)), key=lambda n: found[n].final(steps))

  def best(self, workload: str, method: str, study: int) -> dict[str, float]:
    """Its choice of hyper-parameters."""
    n = self.best_trial(workload, method, study)
    return trial(self.methods[method], study * TRIALS + n)

  def origins(self) -> list[str]:
    """Which code ran how many of the runs on what."""
    return self._results.origins(self._results.of)

  def bytes_of_step(self, workload: str, method: str) -> float:
    """What the compiled step takes, its state and batch included, on a CPU.

    Compiled in a process of its own and kept in WORKDIR/bytes.json; NaN if it
    is not there and nothing may be trained.
    """
    path, name = self._workdir / 'bytes.json', f'{workload}/{method}'
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
      if not self._train:
        return math.nan
      argv = self.run((workload, method, 0, 0)).command(self._workdir)
      config, _, *overrides = argv[3:]
      plan = subprocess.run(
        [
          *(sys.executable, '-m', 'frugax.plan', '--topology=cpu', '--json'),
          *('--no_cache', config, *overrides),
        ],
        stdout=subprocess.PIPE,
        check=True,
      )
      known[name] = json.loads(plan.stdout)['needed']
      path.write_text(json.dumps(known, indent=1, sort_keys=True) + '\n')
    return known[name]
