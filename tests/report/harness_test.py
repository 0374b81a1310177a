"""How research/studies/harness.py tries, keeps and judges."""

import json
import math
import pathlib
import random
import re
import statistics

import jax
import numpy as np
import pytest

from frugax import report
from frugax.report import scoring
from frugax.train import phases
from studies import benchmark, harness, sweep, workloads
from studies.claims import claim
from studies.methods import CHANGES, METHODS, WIDTH, Parts
from studies.workloads import WORKLOADS

_TRIED = METHODS | {p.name: p.method() for p in (Parts(), *CHANGES)}
_ALL = range(harness.STUDIES * harness.TRIALS)
_STEPS = WORKLOADS['packed'].steps


@pytest.mark.parametrize('name', METHODS)
def test_trials_fill_the_same_width(name):
  """Each method has as many tries, as far apart, as the baseline."""
  method = METHODS[name]
  choices = [harness.choice(method, n) for n in _ALL]
  rates = [rate for rate, _ in choices]
  low, high = method.range()
  assert high / low == pytest.approx(WIDTH)
  assert low <= min(rates) < 1.3 * low and 0.7 * high < max(rates) <= high
  assert len(set(rates)) == len(rates)
  for study in range(harness.STUDIES):  # none is confined to one end
    own = rates[study * harness.TRIALS :][: harness.TRIALS]
    assert min(own) < method.rate * 1.01 and max(own) > method.rate * 0.99
  if method.decay:
    left = [1 - b2 for _, b2 in choices]
    assert 0.001 <= min(left) < 0.002 and 0.05 < max(left) <= 0.1


@pytest.mark.parametrize('name', _TRIED)
def test_every_method_can_run(name):
  """Whatever is wrong with a config is found before a run is compiled."""
  method = _TRIED[name]
  key = ('packed', name, *harness.choice(method, 3), 1)
  run = harness.make_run(key, method, 'data')
  config = run.config()
  assert config.data.seed == config.seed == 1
  assert config.optimizer.learning_rate == key[2]
  if method.decay:
    assert config.optimizer[method.decay] == key[3]
  program = phases.Phases(config, jax.devices()[:1]).low
  assert program.model.config.dim == WORKLOADS['packed'].dim


def test_every_workload_has_a_config():
  for name, workload in WORKLOADS.items():
    key = (name, 'adamw', 1e-3, 0.99, 0)
    config = harness.make_run(key, METHODS['adamw'], 'data').config()
    assert config.steps == workload.steps
    assert config.data.mode == workload.mode
    if workload.target:
      target = WORKLOADS[workload.target]
      assert target.steps == workload.steps * 3 // 4
      assert target.data == workload.data and target.size == workload.size


def test_blocks_are_short_and_there_are_many():
  texts = [d['text'] for d in workloads.blocks(validation=True)]
  sizes = [len(text.encode()) for text in texts]
  length = WORKLOADS['padded'].length
  assert statistics.mean(size < length for size in sizes) > 0.4  # are padded
  assert sum(min(size, length) for size in sizes) > 100_000


def _record(key, losses, *, seconds=1.0, state=100, bench):
  """A row of benchmark.json whose evaluations have these losses."""
  n = len(losses)
  steps = WORKLOADS[key[0]].steps
  at = [steps * (i + 1) / n for i in range(n)]
  return {
    **dict(zip(harness.FIELDS, key, strict=True)),
    'origin': 'a commit',
    'eval_step': at,
    'eval_loss': losses,
    'digest': bench.run(key).name.rsplit('-', 1)[-1],
    'eval_tokens': [x * 7 for x in at],
    'eval_seconds': [x * seconds for x in at],
    'flops_per_token': 6.0,
    'state_bytes': state,
    'adam_bytes': 400,
  }


def _keys(bench, name, workload='packed'):
  for study in range(harness.STUDIES):
    yield from bench.study_keys(workload, name, study)


def _write(folder, rows):
  (folder / 'benchmark.json').write_text(json.dumps(rows))
  return harness.Benchmark(folder, train=False)


def test_scores_equal_the_rules_taken_literally(tmp_path):
  """On random logs: the harness beside loops over the rows."""
  rng = random.Random(3)
  slots = 4 * 128
  empty = harness.Benchmark(tmp_path, train=False)
  rows = []
  for workload, name in (
    ('packed_short', 'adamw'),
    *(('packed', name) for name in ('adamw', 'galore', 'muon')),
  ):
    for key in _keys(empty, name, workload):
      losses = [rng.uniform(1, 3) for _ in range(20)]
      row = _record(key, losses, seconds=rng.uniform(0.1, 9), bench=empty)
      cut = 20 if rng.random() < 0.8 else rng.randrange(20)  # it diverged
      rows.append(
        row | {k: v[:cut] for k, v in row.items() if k.startswith('eval_')}
      )
  bench = _write(tmp_path, rows)

  def of(workload, name, study):
    return [
      row
      for row in rows
      if (row['workload'], row['method'], row['seed'])
      == (workload, name, study)
    ]

  ends = []
  for study in range(harness.STUDIES):
    whole = [
      row['eval_loss'][19]
      for row in of('packed_short', 'adamw', study)
      if len(row['eval_loss']) == 20
    ]
    ends.append(min(whole, default=math.inf))
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
        for row in of('packed', name, study):
          for i, loss in enumerate(row['eval_loss']):
            if loss <= target:
              best = min(best, value(row, i))
        want.append(best)
      assert bench.took('packed', name, axis) == pytest.approx(want)
      assert scoring.of_workload(want) == sorted(want)[1]


def _three(folder, monkeypatch):
  """AdamW, galore, which is better, and muon, which gets nowhere."""
  monkeypatch.setattr(harness, 'FRESH', (3, 4))
  empty = harness.Benchmark(folder, train=False)
  rows = []
  for key in _keys(empty, 'adamw', 'packed_short'):
    rows.append(_record(key, [3.0, 2.1 + 0.1 * (key[-1] - 1)], bench=empty))
  for name, end, state in (
    ('adamw', 2.0, 400),
    ('galore', 1.9, 100),
    ('muon', 2.5, 200),
  ):
    for i, key in enumerate(_keys(empty, name)):
      study, n = divmod(i, harness.TRIALS)
      own = end + 0.1 * study + 0.5 * (n != study)
      losses = [3.0, own + 0.15, own, own]
      rows.append(_record(key, losses, state=state, bench=empty))
    # The best of all trials is the first of the first study.
    for seed in harness.FRESH:
      key = ('packed', name, *harness.choice(METHODS[name], 0), seed)
      rows.append(_record(key, [end + 0.01 * seed], bench=empty))
  name = empty.run(empty.study_keys('packed', 'adamw', 0)[0]).name
  (folder / 'bytes.json').write_text(json.dumps({name: 5000}))
  return _write(folder, rows)


def test_tables_by_hand(tmp_path, monkeypatch):
  bench = _three(tmp_path, monkeypatch)
  step = _STEPS / 4
  assert bench.target('packed') == 2.1
  assert bench.took('packed', 'adamw', 'steps') == [
    3 * step,
    3 * step,
    math.inf,
  ]
  assert bench.took('packed', 'galore', 'steps') == [
    2 * step,
    3 * step,
    3 * step,
  ]
  assert bench.took('packed', 'muon', 'steps') == [math.inf] * 3
  assert bench.best('packed', 'muon') == harness.choice(METHODS['muon'], 0)
  assert bench.finals('packed', 'galore').tolist() == [1.93, 1.94]
  names = ('adamw', 'galore', 'muon')

  def rows(text):
    return {line.split()[0]: line.split() for line in text.splitlines() if line}

  found = rows(benchmark.to_target(bench, 'packed', names))
  assert found['adamw'][1:4] == ['375', '[375,', 'never]']
  assert found['galore'][1:4] == ['375', '[250,', '375]']
  assert found['galore'][-3:] == ['25.0%', '-', '?']
  assert found['adamw'][-2] == '5.00k' and found['muon'][1] == 'never'
  found = rows(benchmark.losses(bench, 'packed', names))
  assert found['galore'][1] == '1.9350'
  assert found['galore'][3:5] == ['-0.1000', '0.0000']
  assert found['muon'][3] == '+0.5000'
  assert found['adamw'][5] == f'{2.035 * 201 / 202:.4f}'
  found = rows(benchmark.scores(bench, ['packed'], names))
  assert [found[n][1] for n in names] == ['1.000', '1.000', '0.000']
  # By steps, within 1, 1.25, ... times the first; then by seconds.
  assert found['adamw'][4:] == ['1.00'] * 10
  assert found['muon'][4:] == ['0.00'] * 10
  assert 'plain ratio' in benchmark.scores(bench, ['packed'], names)
  two = benchmark.scores(bench, ['packed', 'packed'], names)
  assert 'plain ratio' not in two


@pytest.mark.parametrize(
  ('best', 'marks'),
  [
    # The rates of all trials: x is 1/2, 1/4, 3/4, 1/8, ... of the width.
    (0, ('', '')),
    (7, ('low edge', 'high edge')),
    (6, ('high edge', '')),
    (10, ('high edge', '')),  # the second highest
    (2, ('', 'low edge')),  # the second lowest b2
  ],
)
def test_a_choice_at_the_edge_is_marked(best, marks, tmp_path, monkeypatch):
  monkeypatch.setattr(harness, 'FRESH', (3, 4))
  empty = harness.Benchmark(tmp_path, train=False)
  rows = [
    _record(key, [3.0, 2.0 - (i == best)], bench=empty)
    for i, key in enumerate(_keys(empty, 'adamw'))
  ]
  chosen = harness.choice(METHODS['adamw'], best)
  for seed in harness.FRESH:
    key = ('packed', 'adamw', *chosen, seed)
    rows.append(_record(key, [1.0 + seed], bench=empty))
  bench = _write(tmp_path, rows)
  assert bench.edges('packed', 'adamw') == marks
  want = ', '.join(
    f'{x:g}' + f' ({mark})' * bool(mark)
    for x, mark in zip(chosen, marks, strict=True)
  )
  text = benchmark.losses(bench, 'packed', ['adamw'])
  assert f'  {want} ' in text
  assert f'1 of 1 best ones are of the study of seed {best // 4}' in text


def test_rows_name_the_commits_of_their_own_runs(tmp_path, monkeypatch):
  _three(tmp_path, monkeypatch)
  rows = json.loads((tmp_path / 'benchmark.json').read_text())
  for row in rows:
    judges, dirty = row['seed'] in harness.FRESH, row['method'] == 'muon'
    commit = ('b' if judges else 'a') * 12 + ' (changed)' * dirty
    row['origin'] = f'commit {commit}, jax 0.10.2, cpu, 2 cores'
  other = [
    row | {'workload': 'half', 'origin': f'commit {"c" * 12}, jax'}
    for row in rows
  ]
  bench = _write(tmp_path, rows + other)
  names = ('galore', 'muon')
  found = benchmark.to_target(bench, 'packed', names).splitlines()
  assert found[2].endswith('  aaaaaaa') and found[3].endswith('  aaaaaaa+')
  found = benchmark.losses(bench, 'packed', names).splitlines()
  assert found[2].endswith('  aaaaaaa/bbbbbbb')
  assert found[3].endswith('  aaaaaaa+/bbbbbbb+')
  # Of AdamW and what sets the target too, and of no other workload.
  trials = harness.STUDIES * harness.TRIALS
  assert bench.origins(benchmark.keys(bench, 'packed', names))[:2] == [
    f'{3 * trials} runs of commit aaaaaaaaaaaa, jax 0.10.2, cpu, 2 cores',
    '4 runs of commit bbbbbbbbbbbb, jax 0.10.2, cpu, 2 cores',
  ]


def _without(folder, lost):
  rows = json.loads((folder / 'benchmark.json').read_text())
  return _write(folder, [row for row in rows if not lost(row)])


def test_what_is_missing_is_told_in_a_line(tmp_path, monkeypatch):
  bench = _three(tmp_path, monkeypatch)
  text = '\n'.join(benchmark.tables(bench, {'packed': ['adamw', 'galore']}))
  assert 'target 2.1000' in text and '2 other seeds' in text
  assert 'no scores' not in text
  text = '\n'.join(benchmark.tables(bench, {'half': ['adamw']}))
  assert 'half: no table of what each took to the target: half has no' in text
  assert 'no scores' in text
  # A run that judges AdamW is lost: nothing is compared with it.
  of_adamw = ('packed', 'adamw', harness.FRESH[0])
  bench = _without(
    tmp_path,
    lambda row: (row['workload'], row['method'], row['seed']) == of_adamw,
  )
  text = benchmark.losses(bench, 'packed', ['adamw', 'galore'])
  row = next(x for x in text.splitlines() if x.startswith('galore')).split()
  assert row[1] == '1.9350' and row[3:5] == ['-', '-']
  assert 'runs that judge a choice are missing of: adamw' in text
  text = benchmark.losses(bench, 'packed', ['adamw'])
  assert len(text.splitlines()) == 2
  # So is one that sets the target.
  bench = _without(tmp_path, lambda row: row['workload'] == 'packed_short')
  text = '\n'.join(benchmark.tables(bench, {'packed': ['galore']}))
  assert 'adamw on packed_short, which set the target, are missing' in text
  assert '1.9350' in text  # which needs no target


def test_a_target_that_was_never_reached_judges_nothing(tmp_path, monkeypatch):
  _three(tmp_path, monkeypatch)
  rows = json.loads((tmp_path / 'benchmark.json').read_text())
  for row in rows:
    if row['workload'] == 'packed_short' and row['seed'] < 2:  # diverged
      row['eval_step'], row['eval_loss'] = [1], [3.0]
      row['eval_tokens'], row['eval_seconds'] = [1], [1.0]
  bench = _write(tmp_path, rows)
  assert bench.target('packed') == math.inf
  assert 'is inf: in most studies all trials' in bench.untold('packed')
  (why,) = (
    text
    for text in benchmark.tables(bench, {'packed': ['galore']})
    if 'no table' in text
  )
  assert why.endswith(bench.untold('packed'))


def test_the_target_is_trained_whoever_is_judged(tmp_path, monkeypatch, capsys):
  """By the command; claims about final losses need none."""
  asked = []
  monkeypatch.setattr(
    sweep.Results, 'get', lambda self, keys, train: asked.extend(keys)
  )
  command = ['benchmark.py', str(tmp_path), '--methods=galore']
  monkeypatch.setattr('sys.argv', [*command, '--workloads=packed'])
  benchmark.main()
  of = {(workload, method) for workload, method, *_ in asked}
  assert of == {('packed_short', 'adamw'), ('packed', 'galore')}
  assert 'NOT COMPLETE, left out: galore' in capsys.readouterr().out
  asked.clear()
  with pytest.raises(claim.Missing, match='runs of adamw'):
    claim.Lab(tmp_path).finals('adamw')
  assert {key[0] for key in asked} == {'packed'}


def test_a_run_of_another_config_does_not_count(tmp_path, monkeypatch):
  bench = _three(tmp_path, monkeypatch)
  assert bench.whole('packed', 'galore')
  other = harness.Benchmark(
    tmp_path,
    train=False,
    methods=METHODS | {'galore': METHODS['coap'], 'muon': METHODS['muon']},
  )
  assert other.whole('packed', 'muon') and not other.whole('packed', 'galore')
  assert not other.finals('packed', 'galore').size
  # Where the data lie makes no other run.
  moved = harness.Benchmark(tmp_path, data_dir='elsewhere', train=False)
  assert moved.whole('packed', 'galore')


def test_a_choice_is_judged_by_runs_that_did_not_make_it(tmp_path, monkeypatch):
  bench = _three(tmp_path, monkeypatch)
  made_by = {key[-1] for _, key in bench.trials('packed', 'galore')}
  assert not made_by & set(harness.FRESH)
  key = ('packed', 'galore', *bench.best('packed', 'galore'), 3)
  judging = bench.run(key).config()
  trial = bench.run((*key[:-1], 0)).config()
  assert judging.eval.every == 0 and trial.eval.every == _STEPS // 20
  assert judging.eval.tokens > 10 * trial.eval.tokens
  assert judging.optimizer == trial.optimizer


def test_a_record_keeps_what_was_finite():
  run = report.Run(
    pathlib.Path('runs/packed/adamw-0-abc123'),
    {},
    {
      'step': np.array([30.0, 60.0]),
      'eval_loss': np.array([3.0, math.nan]),
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
  assert record.digest == 'abc123'
  assert record.eval_loss == [3.0] and record.eval_seconds == [1.5]
  assert record.final(60) == math.inf and record.final(30) == 3.0
  (one,) = record.evaluations(slots=64)
  assert one['slots'] == 30 * 64 and one['flops'] == 30 * 64 * 6


def test_a_file_that_cannot_be_written_leaves_the_old_one(
  tmp_path, monkeypatch
):
  """Hours of runs are told of in it."""
  path = tmp_path / 'measured.json'
  sweep.write_json(path, {'hours': 1})

  def cut_short(self, text):
    with open(self, 'w') as f:
      f.write(text[:5])
    raise OSError('the disk is full')

  monkeypatch.setattr(pathlib.Path, 'write_text', cut_short)
  with pytest.raises(OSError, match='full'):
    sweep.write_json(path, {'hours': 2})
  assert json.loads(path.read_text()) == {'hours': 1}


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('[{"workload": "pac', 'cannot be read'),
    ('[{"workload": "packed"}]', 'no Record'),
    ('{"packed": 1}', 'no Record'),
  ],
)
def test_a_file_that_holds_no_records_is_named(text, said, tmp_path):
  path = tmp_path / 'benchmark.json'
  path.write_text(text)
  with pytest.raises(SystemExit, match=f'{re.escape(str(path))}.*{said}'):
    harness.Benchmark(tmp_path, train=False)
  assert path.read_text() == text


@pytest.mark.parametrize('name', [n for n in METHODS if n != 'lisa'])
def test_long_runs_have_the_intervals_of_the_authors(name):
  def given(workload):
    arguments = METHODS[name].arguments(WORKLOADS[workload])
    return {k for k in arguments if k.endswith(('_interval', 'warmup_steps'))}

  assert given('60m') == set()
  assert given('packed') == given('10m')


def test_two_layers_train_where_there_are_more_than_three():
  active = METHODS['lisa'].arguments
  assert [active(WORKLOADS[w])['active'] for w in ('packed', '60m')] == [1, 2]
