"""How research/studies/harness.py tries, keeps and judges."""

import json
import math
import pathlib
import random

import jax
import numpy as np
import pytest

from frugax import config as fx_config
from frugax import report
from frugax.report import scoring
from frugax.train import phases
from studies import benchmark, harness
from studies.methods import CANDIDATES, METHODS, WIDTH

_TRIED = METHODS | CANDIDATES

_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'
_ALL = range(harness.STUDIES * harness.TRIALS)


@pytest.mark.parametrize('name', _TRIED)
def test_trials_fill_the_same_width(name):
  """Each method has as many tries, as far apart, as the baseline."""
  method = _TRIED[name]
  choices = [harness.trial(method, n) for n in _ALL]
  rates = [c['learning_rate'] for c in choices]
  low, high = method.range()
  assert high / low == pytest.approx(WIDTH)
  assert low <= min(rates) < 1.3 * low and 0.7 * high < max(rates) <= high
  assert len(set(rates)) == len(rates)
  for study in range(harness.STUDIES):  # none is confined to one end
    own = rates[study * harness.TRIALS :][: harness.TRIALS]
    assert min(own) < method.rate * 1.01 and max(own) > method.rate * 0.99
  if method.decay:
    left = [1 - c['b2'] for c in choices]
    assert 0.001 <= min(left) < 0.002 and 0.05 < max(left) <= 0.1


@pytest.mark.parametrize('name', _TRIED)
def test_every_method_can_run(name):
  """Whatever is wrong with a config is found before a run is compiled."""
  workload = harness.WORKLOADS['packed']
  run = harness.run(
    'x', workload, _TRIED[name], harness.trial(_TRIED[name], 3), 1, 'data'
  )
  config = fx_config.load(f'{_CONFIG}:{run.arguments}')
  for key, value in run.values.items():
    fx_config.override(config, key, str(value))
  assert config.data.seed == config.seed == 1
  program = phases.Phases(config, jax.devices()[:1]).low
  assert program.model.config.dim == workload.dim


def _records(losses, *, steps, seconds=1.0, state=100):
  """A record whose evaluations have these losses."""
  n = len(losses)
  at = [steps * (i + 1) / n for i in range(n)]
  return {
    'origin': 'a commit',
    'eval_step': at,
    'eval_loss': losses,
    'eval_compat': [x * 0.9 for x in losses],
    'eval_tokens': [x * 7 for x in at],
    'eval_seconds': [x * seconds for x in at],
    'flops_per_token': 6.0,
    'state_bytes': state,
    'adam_bytes': 400,
  }


def _bench(folder, of, workload='packed'):
  """A benchmark that finds records; of: method, study, trial -> record."""
  rows = [
    {'workload': workload, 'method': m, 'study': s, 'trial': t, **record}
    for (m, s, t), record in of.items()
  ]
  (folder / 'benchmark.json').write_text(json.dumps(rows))
  return harness.Benchmark(folder, train=False)


def test_scores_equal_the_rules_taken_literally(tmp_path):
  """On random logs: the harness beside loops over the records."""
  rng = random.Random(3)
  steps, slots = harness.WORKLOADS['packed'].steps, 4 * 128
  of = {}
  for name in ('adamw', 'galore', 'muon'):
    for study in range(harness.STUDIES):
      for n in range(harness.TRIALS):
        losses = [rng.uniform(1, 3) for _ in range(20)]
        cut = 20 if rng.random() < 0.8 else rng.randrange(20)  # it diverged
        record = _records(losses, steps=steps, seconds=rng.uniform(0.1, 9))
        for key in record:
          if key.startswith('eval_'):
            record[key] = record[key][:cut]
        of[name, study, n] = record
  bench = _bench(tmp_path, of)

  ends = []
  for study in range(harness.STUDIES):
    ends.append(
      min(
        of['adamw', study, n]['eval_loss'][19]
        for n in range(harness.TRIALS)
        if len(of['adamw', study, n]['eval_loss']) == 20
      )
    )
  target = sorted(ends)[1]
  assert bench.target('packed') == target
  for name in ('adamw', 'galore', 'muon'):
    for axis, value in {
      'steps': lambda r, i: r['eval_step'][i],
      'tokens': lambda r, i: r['eval_tokens'][i],
      'slots': lambda r, i: r['eval_step'][i] * slots,
      'flops': lambda r, i: r['eval_step'][i] * slots * 6.0,
      'seconds': lambda r, i: r['eval_seconds'][i],
    }.items():
      want = []
      for study in range(harness.STUDIES):
        best = math.inf
        for n in range(harness.TRIALS):
          record = of[name, study, n]
          for i, loss in enumerate(record['eval_loss']):
            if loss <= target:
              best = min(best, value(record, i))
        want.append(best)
      assert bench.took('packed', name, axis) == pytest.approx(want)
  # AdamW itself gets there in two of three studies, at the latest at the end.
  assert scoring.of_workload(bench.took('packed', 'adamw', 'steps')) <= steps


def test_tables_by_hand(tmp_path):
  steps = harness.WORKLOADS['packed'].steps
  ends = {
    'adamw': [2.0, 2.1, 2.2],
    'galore': [1.9, 2.0, 2.1],
    'muon': [2.5, 2.5, 2.5],
  }
  of = {}
  for name, own in ends.items():
    for study, end in enumerate(own):
      for n in range(harness.TRIALS):
        worse = 0.5 * (n != study)  # another trial is the best of each study
        losses = [3.0, end + worse + 0.05, end + worse, end + worse]
        state = {'adamw': 400, 'galore': 100, 'muon': 200}[name]
        of[name, study, n] = _records(losses, steps=steps, state=state)
  (tmp_path / 'bytes.json').write_text('{"packed/adamw": 5000}')
  bench = _bench(tmp_path, of)
  assert bench.target('packed') == 2.1
  assert bench.took('packed', 'adamw', 'steps') == [300, 450, math.inf]
  assert bench.took('packed', 'galore', 'steps') == [300, 300, 450]
  assert bench.took('packed', 'muon', 'steps') == [math.inf] * 3
  assert bench.best('packed', 'muon', 1) == harness.trial(
    METHODS['muon'], harness.TRIALS + 1
  )
  text = benchmark.to_target(bench, 'packed', ends)
  rows = {line.split()[0]: line.split() for line in text.splitlines()}
  assert rows['adamw'][1:4] == ['450', '[300,', 'never]']
  assert rows['galore'][1:4] == ['300', '[300,', '450]']
  assert rows['galore'][-2:] == ['25.0%', '-']
  assert rows['adamw'][-1] == '5.00k'
  assert rows['muon'][1] == 'never'
  rows = {
    line.split()[0]: line.split()
    for line in benchmark.losses(bench, 'packed', ends).splitlines()
  }
  assert rows['galore'][1:4] == ['2.0000', '-0.1000', '0.0000']
  assert rows['muon'][1:3] == ['2.5000', '+0.4000']
  text = benchmark.scores(bench, ['packed'], list(ends))
  scores = {line.split()[0]: line.split()[1] for line in text.splitlines()[1:]}
  # galore first; adamw took 1.5 times as much: 1 - 0.5 / 3; muon never.
  assert scores['galore'] == '1.000' and scores['adamw'] == '0.833'
  assert scores['muon'] == '0.000'


def test_a_record_keeps_what_was_finite():
  nan = math.nan
  run = report.Run(
    pathlib.Path('x'),
    {},
    {
      'step': np.array([30.0, 60.0]),
      'eval_loss': np.array([3.0, nan]),
      'eval_loss_compat': np.array([2.7, nan]),
      'tokens': np.array([100.0, 200.0]),
      'seconds': np.array([1.5, 2.0]),
    },
    {},
    {
      'flops_per_token': 6,
      'optimizer_state_bytes': 10.0,
      'adam_state_bytes': 40.0,
    },
  )
  record = harness.Record.of_run(run)
  assert record.eval_loss == [3.0] and record.eval_seconds == [1.5]
  assert record.final(60) == math.inf and record.final(30) == 3.0
  (one,) = record.evaluations(slots=64)
  assert one['slots'] == 30 * 64 and one['flops'] == 30 * 64 * 6
