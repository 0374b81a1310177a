"""How research/studies/claims judge, and what RESULTS.md makes of it."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import figure

from studies import harness, pareto, results, search, seeds
from studies.claims import (
  claim,
  coap,
  fira,
  galore,
  q_galore,
  stable_spam_rates,
  subset_norm,
  svd,
)
from studies.claims.__main__ import ALL
from studies.methods import METHODS, OFTEN, Parts
from studies.recipes.orders import Link
from studies.workloads import WORKLOADS


def _lab(folder, ends, parts=()):
  """Runs that ended so; ends: (workload, method) -> loss of each fresh seed."""
  methods = METHODS | OFTEN | {p.name: p.method() for p in parts}
  empty = harness.Benchmark(folder, train=False, methods=methods)
  rows = []

  def add(key, loss):
    steps = WORKLOADS[key[0]].steps
    rows.append(
      {
        **dict(zip(harness.FIELDS, key, strict=True)),
        'origin': f'the commit of {key[1]}',
        'eval_step': [steps / 2, steps],
        'eval_loss': [3.0, loss],
        'digest': empty.run(key).name.rsplit('-', 1)[-1],
        'eval_tokens': [10, 20],
        'eval_seconds': [1.0, 2.0],
        'flops_per_token': 6,
        'state_bytes': 100,
        'adam_bytes': 400,
      }
    )

  for (workload, name), finals in ends.items():
    for study in range(harness.STUDIES):
      for n, key in enumerate(empty.study_keys(workload, name, study)):
        add(key, 2.5 + 0.1 * n + study)  # the first of all is the best
    chosen = harness.choice(methods[name], 0)
    for seed, loss in zip(harness.FRESH, finals, strict=True):
      add((workload, name, *chosen, seed), loss)
  (folder / 'benchmark.json').write_text(json.dumps(rows))
  return claim.Lab(folder, train=False)


_ADAM = np.linspace(2.0, 2.7, len(harness.FRESH))
_RUNS = harness.STUDIES * harness.TRIALS + len(harness.FRESH)
_WOBBLE = np.resize([-1.0, 1.0], len(harness.FRESH))


@pytest.mark.parametrize(
  ('over', 'verdict'),
  [
    (0.001 * _WOBBLE, claim.HOLDS),
    (-0.3 + 0.01 * _WOBBLE, claim.HOLDS),  # better is as good
    (0.2 + 0.01 * _WOBBLE, claim.NOT),
    (0.2 * _WOBBLE, claim.OPEN),
    (np.where(_WOBBLE > 0, np.inf, 0), claim.NOT),  # seeds diverged
  ],
)
def test_as_good_as_adam(over, verdict, tmp_path):
  lab = _lab(
    tmp_path,
    {('packed', 'adamw'): _ADAM, ('packed', 'galore'): _ADAM + over},
  )
  found, text = claim.told(galore.CLAIM, lab)
  assert found.verdict == verdict
  for said in (
    *('34.88 against 34.06', '500 steps of 4 x 128', '+-', verdict),
    *(f'{_RUNS} runs of the commit of {n}' for n in ('galore', 'adamw')),
  ):
    assert said in text


def test_runs_are_counted_once_each(tmp_path):
  """Of two methods of one commit, one of them asked for twice."""
  lab = _lab(tmp_path, {('packed', n): _ADAM for n in ('galore', 'fira')})
  for key, record in lab.bench._results.of.items():
    lab.bench._results.of[key] = dataclasses.replace(record, origin='one')
  for name in ('galore', 'fira', 'galore'):
    lab.finals(name)
  assert lab.origins() == [f'{2 * _RUNS} runs of one']


def test_a_part_of_a_claim(tmp_path):
  lab = _lab(
    tmp_path,
    {
      ('packed', 'adamw'): _ADAM,
      ('half', 'adam_sn'): _ADAM + 0.3,
      ('half', 'snsm'): _ADAM - 0.3,
    },
  )
  finding = subset_norm.judge(lab)
  assert finding.verdict == claim.PART
  (_, one), (_, other) = finding.parts
  assert '+0.3000' in one and '-0.3000' in other


def test_what_is_missing_is_named(tmp_path):
  lab = _lab(tmp_path, {('packed', 'fira'): _ADAM})
  with pytest.raises(claim.Missing, match='packed: runs of galore'):
    fira.judge(lab)
  with pytest.raises(claim.Missing, match='svd was not measured'):
    svd.judge(lab)
  with pytest.raises(claim.Missing, match='studies/recipes'):
    claim.order(lab, [Link('bf16', 'quest8', '~')])
  with pytest.raises(claim.Missing, match='72 runs are missing'):
    stable_spam_rates.judge(lab)


def _measured(folder, name, values):
  text = json.dumps({name: {'values': values, 'origin': 'here'}})
  (folder / 'measured.json').write_text(text)


@pytest.mark.parametrize(
  ('sketch', 'energy', 'verdict'),
  [
    ([0.4, 0.45, 0.49], 0.99, claim.HOLDS),
    ([0.4, 0.45, 0.6], 0.99, claim.OPEN),  # not every time
    ([0.6, 0.7, 0.8], 0.99, claim.NOT),  # whatever its energy
    ([0.4, 0.45, 0.49], 0.9, claim.PART),
    ([0.6, 0.7, 0.8], 0.9, claim.NOT),
  ],
)
def test_every_measurement_counts(sketch, energy, verdict, tmp_path):
  lab = _lab(tmp_path, {})
  _measured(tmp_path, 'svd', [[10.0, s, energy] for s in sketch])
  assert svd.judge(lab).verdict == verdict


@pytest.mark.parametrize(
  ('low', 'high', 'verdict'),
  [
    (1.00, 1.01, claim.HOLDS),
    (1.00, 1.05, claim.PART),  # as good, its time not decided
    (1.03, 1.05, claim.PART),
  ],
)
def test_the_time_is_judged_by_its_interval(low, high, verdict, tmp_path):
  same = {('packed', n): _ADAM for n in ('adamw', 'coap')}
  lab = _lab(tmp_path, same)
  _measured(tmp_path, 'coap', [(low + high) / 2, low, high])
  assert coap.judge(lab).verdict == verdict


@pytest.mark.parametrize(
  ('lost', 'diverged', 'verdict'),
  [
    ({'stable_spam': 3.0}, {'stable_spam': 3.0}, claim.HOLDS),
    ({'adamw': 0.1, 'spam': 0.3}, {}, claim.PART),  # lost later, not diverged
    ({'adamw': 0.1}, {}, claim.NOT),  # one part of four
    ({'adamw': 0.001, 'spam': 0.001}, {'stable_spam': 3.0}, claim.HOLDS),
    ({}, {}, claim.NOT),
  ],
)
def test_rates_at_which_seeds_are_lost(lost, diverged, verdict, tmp_path):
  study = stable_spam_rates.stability
  _measured(tmp_path, 'entropy', [3.0])
  folder = tmp_path / 'tiny-fp4_sim-200'
  folder.mkdir()

  def loss(name, rate):
    if rate >= diverged.get(name, 1.0):
      return 6.0
    return 3.5 if rate >= lost.get(name, 1.0) else 2.5

  rows = [
    {
      'optimizer': name,
      'learning_rate': rate,
      'seed': seed,
      'origin': 'a commit',
      'eval_step': [200.0],
      'eval_loss': [loss(name, rate) if seed == 1 else 2.5],
    }
    for name in ('adamw', 'spam', 'stable_spam')
    for rate in (study.learning_rate(name, f) for f in study.FACTORS)
    for seed in seeds.SEEDS
  ]
  (folder / 'stability.json').write_text(json.dumps(rows))
  lab = _lab(tmp_path, {})
  assert stable_spam_rates.judge(lab).verdict == verdict
  (tmp_path / 'measured.json').unlink()
  with pytest.raises(claim.Missing, match='entropy was not measured'):
    stable_spam_rates.judge(lab)


def test_refreshes_are_counted_in_runs_whose_loss_is_judged(tmp_path):
  names = ('galore', 'q_galore')
  ends = {('packed', n): _ADAM for n in names}
  _measured(tmp_path, 'q_galore', [0.7, 0.65, 0.8])
  lab = _lab(tmp_path, ends)
  with pytest.raises(claim.Missing, match='q_galore_often'):
    q_galore.judge(lab)
  ends |= {('packed', f'{n}_often'): _ADAM for n in names}
  lab = _lab(tmp_path, ends)
  seldom, often, fewer = q_galore.judge(lab).parts
  assert [v for v, _ in (seldom, often, fewer)] == [claim.HOLDS] * 3
  assert 'q_galore_often' in often[1]
  run = lab.bench.run(('packed', 'q_galore_often', 0.02, 0.99, 3))
  assert run.values['optimizer.update_interval'] == 10


def test_each_claim_is_a_command():
  folder = results.LOGS.parent / 'claims'
  files = {f.stem for f in folder.glob('[a-z]*.py')} - {'claim'}
  assert files == set(ALL)
  script = folder / 'galore.py'
  told = subprocess.run(
    [sys.executable, script, '--help'], capture_output=True, text=True
  )
  assert told.returncode == 0 and 'workdir' in told.stdout, told.stderr


def test_results_say_what_did_not_work(tmp_path):
  ends = {
    (w, m): _ADAM + over
    for w in harness.DEFAULT
    for m, over in (('adamw', 0.0), ('galore', 0.5), ('muon', -0.5))
  }
  ends |= {(f'{w}_short', 'adamw'): _ADAM for w in harness.DEFAULT}
  lab = _lab(tmp_path, ends)
  text = results.text(tmp_path)
  assert (
    '- Claim `galore`, does not hold here: galore 2.' in text
    and 'the commit of muon' in text
  )
  assert '`galore` ends 0.5000 +- 0.0000 nats a token above tuned' in text
  assert '`muon` ends' not in text and 'Not tried yet: `q_galore`' in text
  assert results.text(tmp_path) == text
  own = pareto.points(lab.bench, 'packed')
  assert [p.name for p in pareto.front(own)] == ['muon']
  pareto.picture(tmp_path / 'pareto.png', own, 'a title')
  assert (tmp_path / 'pareto.png').stat().st_size > 10_000


def test_names_in_the_picture_stay_inside_its_frame(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    figure.Figure, 'savefig', lambda self, p: drawn.append(self)
  )
  own = [
    pareto.Point(name, size, 2.0, 0.1)
    for name, size in (('q_galore', 10), ('apollo', 90), ('stable_spam', 100))
  ]
  pareto.picture(tmp_path / 'pareto.png', own, 'a title')
  (fig,) = drawn
  fig.draw_without_rendering()
  (ax,) = fig.axes
  assert len(ax.texts) == len(own)
  for text in ax.texts:
    box = text.get_window_extent()
    assert ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1, text


def test_results_tell_of_workloads_that_were_not_run(tmp_path):
  _lab(tmp_path, {('packed', 'adamw'): _ADAM, ('packed_short', 'adamw'): _ADAM})
  (tmp_path / 'notes.txt').write_text('Beside other work.')
  text = results.text(tmp_path)
  assert 'Beside other work.' in text
  assert 'packed: target' in text
  assert 'Workload `padded`: not told: runs of adamw on padded_short' in text
  assert 'The search was not run yet' in text


def test_shipped_results_are_made_of_shipped_logs_alone(tmp_path, monkeypatch):
  """As in a clone that has no data sets."""
  monkeypatch.chdir(tmp_path)
  assert results.text(results.LOGS) == results.PATH.read_text()


def test_the_recipe_that_the_search_found(tmp_path, monkeypatch):
  small, large = search.FRUGAL, Parts(codec='f32')
  ends = {('packed', 'adamw'): _ADAM, ('packed', small.name): _ADAM - 0.25}
  _lab(tmp_path, ends, (small,))
  rows = [vars(p) for p in (large, small)]
  (tmp_path / search.FOUND).write_text(json.dumps(rows))
  text = results.text(tmp_path)
  for said in (
    *('`frugal`: of 2 combinations', '-0.2500 +- 0.0000 nats a token over'),
    *("8.2% of Adam's in float32", "16.3% of Adam's in bfloat16"),
    *('It is lower.', 'Judged at 0.2 M parameters and 256,000 tokens only'),
    *('not at any larger size', 'the commit of adamw', '25.0% in float32'),
  ):
    assert said in text
  assert small.name not in text.partition('What does a byte')[2]
  rows = json.loads((tmp_path / 'benchmark.json').read_text())
  lost = ('adamw', harness.FRESH[0])
  rows = [r for r in rows if (r['method'], r['seed']) != lost]
  (tmp_path / 'benchmark.json').write_text(json.dumps(rows))
  assert 'Not judged yet: ours' in results.text(tmp_path)
  # What is better but holds more than a tenth does not win.
  monkeypatch.setattr(search, 'first_loss', lambda bench, p: float(p == small))
  bench = search.with_candidates(tmp_path, train=False)
  assert search.winner(bench, [small, large]) == small
  assert search.winner(bench, [large]) is None


def test_the_search_marks_choices_at_the_edge(tmp_path):
  _lab(tmp_path, {('packed', 'ours'): _ADAM}, (Parts(),))
  (tmp_path / search.FOUND).write_text(json.dumps([vars(Parts())]))

  def row(share):
    bench = search.with_candidates(tmp_path, train=False)
    return search.row(bench, Parts(), share)

  first = row(0.3)
  assert '  0.02, 0.97846' in first and 'more than a tenth' in first
  # Let the last trial of the study be the best: the lowest rate of four.
  path = tmp_path / 'benchmark.json'
  rows = json.loads(path.read_text())
  rows[harness.TRIALS - 1]['eval_loss'] = [3.0, 1.0]
  path.write_text(json.dumps(rows))
  assert '  0.007071 (low edge), 0.98708' in row(0.05)
  rows.pop(0)
  path.write_text(json.dumps(rows))
  assert row(0.05).split()[1:] == ['inf', '5.0%', '-', '-']
  assert (
    search.winner(search.with_candidates(tmp_path, train=False), [Parts()])
    is None
  )


class _Args:
  data_dir, jobs, report = 'data', 1, True

  def __init__(self, workdir):
    self.workdir = workdir


def test_the_search_puts_together_what_helped(tmp_path, monkeypatch):
  """By losses that are a sum over the parts."""
  gain = {'every': 0.1, 'residual': 0.2, 'projector': -0.3}

  def loss(parts):
    changed = {k for k, v in vars(parts).items() if v != vars(Parts())[k]}
    return 2.5 - sum(gain.get(k, -0.1) for k in changed)

  own = search.Search(_Args(tmp_path))
  monkeypatch.setattr(search, 'share', lambda run: 0.09)

  def tries(parts):
    for p in parts:
      own.loss[p], own.share[p] = loss(p), 0.09
    # Too large, and so not chosen, however good.
    own.share[Parts(codec='f32')] = 0.3
    own.loss[Parts(codec='f32')] = 1.0

  monkeypatch.setattr(own, 'tries', tries)
  best = own.run()
  assert best.every in (1, 20) and best.residual != 'drop'
  assert best.codec == 'dynamic8' and best.projector == 'sketch'
  assert all(p.valid for p in own.loss)


def test_shares_of_the_candidates(tmp_path):
  tried = (Parts(), Parts(codec='f32'), Parts(codec='dynamic4'))
  methods = METHODS | {p.name: p.method() for p in tried}
  bench = harness.Benchmark(tmp_path, train=False, methods=methods)
  shares = {
    name: search.share(bench.run(bench.study_keys('packed', name, 0)[0]))
    for name in ('adamw', 'adamw_8bit', *(p.name for p in tried))
  }
  assert shares['adamw'] == 1.0 and 0.25 < shares['adamw_8bit'] < 0.26
  # A fourth of the moments in a byte each, and the projector in one.
  limit = search.LIMIT
  assert 0.06 < shares['ours'] <= limit < shares['ours codec=f32']
  assert shares['ours codec=dynamic4'] < shares['ours']
