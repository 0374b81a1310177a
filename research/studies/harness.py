"""One benchmark for every optimizer: what each takes to the same loss.

AlgoPerf's rules (arXiv 2306.07179) for language models. A *study* is a handful
of trials with one seed, each with hyper-parameters from a quasi-random
sequence; the three studies of a method on a workload continue the sequence. A
study scores what the trial that took least needed to the target, each axis for
itself: steps, tokens, model FLOPs, training seconds, beside the bytes of the
optimizer's state and of the step. Their median is the method's, and what never
got there took infinitely much. The target is what AdamW with state in float32
reaches in three quarters of the steps, on a schedule of its own, tuned alike:
the median over its studies of the least final loss.

For the loss at equal tokens the choice that ended lowest of all trials is
trained anew with eight seeds that no choice was made by, and judged on the
whole validation set. Each choice is tried with one seed alone, its study's:
choices of different studies are compared across seeds, and mostly one of the
study wins whose seed is the easiest, so that hardly more than its four trials
decide. That is so for all methods alike.

What is equal: model, data and their order (by seed), batch, warm-up over a
tenth of the steps and cosine to a tenth, no weight decay, clipping at norm 1
but for those that clip by themselves. AdamW is tuned as all others are, by as
many trials over its rate and b2 (`studies/methods.py`). Losses are means over
all tokens of the validation set that are no padding. Tokens are counted without
padding (tokens) and with it (slots); model FLOPs are those of the slots: steps,
slots and FLOPs are multiples of each other for all methods on a workload.
Seconds are of training, compilation of the step counted (each trial has one of
its own, as rate and b2 are constants in it), evaluation not. Every run has one
core, but all with --jobs=1.

`studies/benchmark.py` is the command; claims take the same runs.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import qmc

from frugax import report
from frugax.report import scoring
from studies import sweep
from studies.methods import DECAYS, METHODS, Method
from studies.workloads import WORKLOADS

STUDIES, TRIALS = 3, 4
FRESH = tuple(range(STUDIES, STUDIES + 8))  # seeds of runs that judge a choice
BASE = 'adamw'
FIELDS = ('workload', 'method', 'learning_rate', 'b2', 'seed')
AXES = ('steps', 'tokens', 'slots', 'flops', 'seconds')
DEFAULT = ('packed', 'padded')
# The published 60M script has so many batches of validation: what it prints is
# the mean loss times N / (N + 1).
PUBLISHED_N = 201
Choice = tuple[float, float | None]  # learning rate and b2
OUTERMOST = 2  # values on a side that are its edge, of those tried
_COMMIT = re.compile(r'commit ([0-9a-f]{7})[0-9a-f]*( \(changed\))?')


def as_published(loss: float) -> float:
  """What the harness of GaLore's code prints of a mean loss at 60M.

  Examples:
    >>> round(as_published(3.55), 4)
    3.5324
  """
  return loss * PUBLISHED_N / (PUBLISHED_N + 1)


@dataclasses.dataclass(frozen=True)
class Record(sweep.Result):
  """What remains of a run.

  Attributes:
    digest: of its whole config, see `digest`.
    eval_tokens: trained on before each evaluation, padding not counted.
    eval_seconds: of training before each evaluation.
    flops_per_token: the model's.
    state_bytes: the optimizer's.
    adam_bytes: what Adam would hold, in the weights' dtype.
  """

  digest: str
  eval_tokens: list[float]
  eval_seconds: list[float]
  flops_per_token: float
  state_bytes: int
  adam_bytes: int

  @classmethod
  def of_run(cls, run: report.Run) -> 'Record':
    finite = np.isfinite(run.eval.get('eval_loss', np.zeros(0)))

    def column(name, digits):
      values = run.eval.get(name, np.zeros(0))[finite]
      return [round(float(value), digits) for value in values]

    return cls(
      origin=sweep.origin([run]),
      eval_step=column('step', 0),
      eval_loss=column('eval_loss', 5),
      digest=run.path.name.rsplit('-', 1)[-1],
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


def choice(method: Method, n: int) -> Choice:
  """The n-th choice of a method's hyper-parameters.

  Points of Halton's sequence, which fill the range evenly however many are
  taken; the first of all, a corner, is left out.

  Examples:
    >>> choice(METHODS['adamw'], 0)
    (0.002, 0.97846)
    >>> [choice(METHODS['sgd_sai'], n) for n in range(2)]
    [(0.04, None), (0.02, None)]
  """
  sequence = qmc.Halton(2, scramble=False).fast_forward(n + 1)
  x, y = sequence.random(1)[0]
  low, high = method.range()
  rate = float(f'{low * (high / low) ** x:.4g}')
  if not method.decay:
    return rate, None
  return rate, float(f'{1 - DECAYS[0] * (DECAYS[1] / DECAYS[0]) ** y:.5g}')


def edges(
  tried: Iterable[Choice], chosen: Choice, outermost: int = OUTERMOST
) -> tuple[str, ...]:
  """Where a choice lies at the edge of what was tried, so of each number.

  Args:
    tried: all choices, the chosen one among them.
    chosen: the one to tell of.
    outermost: so many values on a side are its edge.

  Returns:
    'low edge', 'high edge' or '', for the learning rate and for b2.

  Examples:
    >>> tried = [(0.1 * n, None) for n in range(1, 7)]
    >>> edges(tried, tried[1]), edges(tried, tried[2]), edges(tried, tried[5])
    (('low edge', ''), ('', ''), ('high edge', ''))
  """
  found = []
  for value, all_of_it in zip(chosen, zip(*tried, strict=True), strict=True):
    values = sorted({v for v in all_of_it if v is not None})
    low, high = values[:outermost], values[-outermost:]
    found.append('low edge' * (value in low) or 'high edge' * (value in high))
  return tuple(found)


def make_run(key: sweep.Key, method: Method, data_dir: str) -> sweep.Run:
  """The run of a key; its name ends in a digest of all that it is."""
  name, label, rate, b2, seed = key
  workload = WORKLOADS[name]
  optimizer = {
    'weight_decay': 0.0,
    **method.arguments(workload),
    'learning_rate': rate,
  }
  if b2 is not None:
    optimizer[method.decay] = b2
  once = seed in FRESH  # it is judged by its end alone
  every = 0 if once else workload.steps // 20
  values = {
    'steps': workload.steps,
    'seed': seed,
    'batch_size': workload.batch,
    'clip_norm': method.clip_norm,
    'schedule.warmup_steps': workload.steps // 10,
    'data.name': workload.data,
    'data.sequence_length': workload.length,
    'data.mode': workload.mode,
    'data.seed': seed,
    'eval.every': every,
    'eval.batch_size': workload.batch * 8,
    'eval.tokens': workload.last_tokens if once else workload.eval_tokens,
    'checkpoint.every': 0,
    'log.every': max(workload.steps // 20, 1),
    'log.tensorboard': False,
    **{f'model.{k}': v for k, v in workload.model.items()},
    **{f'optimizer.{k}': v for k, v in optimizer.items()},
  }
  data = 'c4' if workload.data.startswith('c4') else 'stdlib'
  arguments = (
    f'size={workload.size},data={data},matmul={workload.matmul},'
    f'opt={method.optimizer}'
  )
  text = json.dumps([arguments, values], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  return sweep.Run(
    f'{name}/{label.replace(" ", "_")}-{seed}-{digest}',
    arguments,
    values | {'data.data_dir': data_dir},
  )


class Benchmark:
  """The runs of methods on workloads.

  Args:
    workdir: of the runs and the file of their records.
    data_dir: where the data sets are.
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
    methods: Mapping[str, Method] | None = None,
  ):
    self.methods = dict(METHODS if methods is None else methods)
    self.train = train
    self._workdir, self._data_dir = workdir, data_dir
    self._results = sweep.Results(
      workdir / 'benchmark.json',
      FIELDS,
      self.run,
      sweep.Sweep(workdir, jobs),
      kind=Record,
    )

  def run(self, key: sweep.Key) -> sweep.Run:
    """The run of a key."""
    return make_run(key, self.methods[key[1]], self._data_dir)

  def record(self, key: sweep.Key) -> Record | None:
    """What is known of a run; nothing if it had another config."""
    return self._results.of[key] if self._results.known(key) else None

  def study_keys(
    self, workload: str, method: str, study: int
  ) -> list[sweep.Key]:
    """The keys of a study's trials."""
    return [
      (workload, method, *choice(self.methods[method], n), study)
      for n in range(study * TRIALS, (study + 1) * TRIALS)
    ]

  def get(
    self,
    workload: str,
    methods: Iterable[str],
    studies: Sequence[int] = range(STUDIES),
  ) -> None:
    """Trains what is missing of the trials."""
    methods = list(methods)
    wanted = [
      key
      for study in studies
      for name in methods
      for key in self.study_keys(workload, name, study)
    ]
    self._results.get(wanted, train=self.train)

  def get_target(self, workload: str) -> None:
    """Likewise of the trials that set the target, where there is one."""
    if target := WORKLOADS[workload].target:
      self.get(target, [BASE])

  def study(self, workload: str, method: str, study: int) -> list[Record]:
    """The trials of a study that are there."""
    found = map(self.record, self.study_keys(workload, method, study))
    return [record for record in found if record]

  def whole(self, workload: str, method: str) -> bool:
    """Whether no trial is missing."""
    return all(
      len(self.study(workload, method, s)) == TRIALS for s in range(STUDIES)
    )

  def trials(
    self, workload: str, method: str
  ) -> Iterator[tuple[float, sweep.Key]]:
    """Final loss and key of all trials that are there."""
    steps = WORKLOADS[workload].steps
    for study in range(STUDIES):
      for key in self.study_keys(workload, method, study):
        if record := self.record(key):
          yield record.final(steps), key

  def target(self, workload: str) -> float:
    """The loss to be reached."""
    trials = list(self.trials(WORKLOADS[workload].target, BASE))
    return statistics.median(
      min(loss for loss, key in trials if key[-1] == study)
      for study in range(STUDIES)
    )

  def untold(self, workload: str) -> str:
    """Why it cannot be told what a method took to the target; '' if it can."""
    target = WORKLOADS[workload].target
    if not target:
      return f'{workload} has no target'
    if not self.whole(target, BASE):
      return f'runs of {BASE} on {target}, which set the target, are missing'
    if not math.isfinite(loss := self.target(workload)):
      return (
        f'the target, what {BASE} reaches on {target}, is {loss}: in most'
        ' studies all trials diverged'
      )
    return ''

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

  def best(self, workload: str, method: str) -> Choice:
    """The choice that ended lowest of all trials."""
    _, key = min(self.trials(workload, method))
    return key[2], key[3]

  def _fresh_keys(self, workload, method, chosen):
    return [(workload, method, *chosen, seed) for seed in FRESH]

  def judge(
    self, workload: str, methods: Iterable[str], chosen: Choice | None = None
  ) -> None:
    """Trains the best choice, or one that is given, with fresh seeds."""
    own = [
      self._fresh_keys(workload, name, chosen or self.best(workload, name))
      for name in methods
      if chosen or self.whole(workload, name)
    ]
    # Seed by seed, so that two runs at a time are of two methods.
    by_seed = [k for keys in zip(*own, strict=True) for k in keys]
    self._results.get(by_seed, train=self.train)

  def finals(
    self, workload: str, method: str, chosen: Choice | None = None
  ) -> np.ndarray:
    """Final losses of the fresh seeds; empty if one is missing."""
    if not chosen and not self.whole(workload, method):
      return np.zeros(0)
    chosen = chosen or self.best(workload, method)
    found = map(self.record, self._fresh_keys(workload, method, chosen))
    found = [record for record in found if record]
    if len(found) < len(FRESH):
      return np.zeros(0)
    return np.array([r.final(WORKLOADS[workload].steps) for r in found])

  def edges(self, workload: str, method: str) -> tuple[str, ...]:
    """Where the best choice lies at the edge of those tried, see `edges`."""
    tried = [key[2:4] for _, key in self.trials(workload, method)]
    return edges(tried, self.best(workload, method))

  def ran(
    self, workload: str, method: str, chosen: Choice | None = None
  ) -> tuple[list[sweep.Key], list[sweep.Key]]:
    """The trials that are there, and the runs that judge the best of them.

    A choice that is given has no trials.
    """
    trials = []
    if not chosen:
      trials = [key for _, key in self.trials(workload, method)]
      if not trials:
        return [], []
      chosen = self.best(workload, method)
    own = self._fresh_keys(workload, method, chosen)
    return trials, [key for key in own if self.record(key)]

  def origins(self, keys: Iterable[sweep.Key]) -> list[str]:
    """Which code ran how many of the runs on what."""
    return self._results.origins(keys)

  def commits(self, keys: Iterable[sweep.Key]) -> str:
    """The commits of runs, shortened; + is one with changes, ? unknown."""
    found = [_COMMIT.search(self._results.of[key].origin) for key in keys]
    names = [m[1] + '+' * bool(m[2]) if m else '?' for m in found]
    return ','.join(dict.fromkeys(names)) or '-'

  def bytes_of_step(self, workload: str, method: str) -> float:
    """What the compiled step takes, its state and batch included, on a CPU.

    Compiled in a process of its own and kept in WORKDIR/bytes.json; NaN if it
    is not there and nothing may be trained.
    """
    key = self.study_keys(workload, method, 0)[0]
    run = self.run(key)
    path = self._workdir / 'bytes.json'
    known = sweep.read_json(path, {})
    if run.name not in known:
      if not self.train:
        return math.nan
      config, _, *overrides = run.command(self._workdir)[3:]
      plan = subprocess.run(
        [
          *(sys.executable, '-m', 'frugax.plan', '--topology=cpu', '--json'),
          *('--no_cache', config, *overrides),
        ],
        stdout=subprocess.PIPE,
        check=True,
      )
      known[run.name] = json.loads(plan.stdout)['needed']
      sweep.write_json(path, dict(sorted(known.items())))
    return known[run.name]
