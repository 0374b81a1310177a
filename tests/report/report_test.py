"""Reports of hand-made runs: what is read, shown, drawn and refused."""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from frugax import report
from frugax.report import curves

ROWS = (
  {'step': 1, 'loss': 5.5, 'tokens': 100, 'seconds': 9.0},
  {
    'step': 2,
    'loss': 4.5,
    'tokens': 200,
    'seconds': 10.0,
    'tokens_per_second': 100.0,
    'step_seconds': 1.0,
  },
  {'step': 2, 'eval_loss': 4.25, 'tokens': 200, 'seconds': 10.0},
  {
    'step': 3,
    'loss': 3.5,
    'tokens': 300,
    'seconds': 12.0,
    'tokens_per_second': 50.0,
    'step_seconds': 2.0,
  },
  {
    'step': 3,
    'eval_loss': 3.0,
    'bits_per_byte': 4.3281,
    'tokens': 300,
    'seconds': 12.0,
  },
)
SUMMARY = {
  'steps': 3,
  'tokens': 300,
  'seconds': 12.0,
  'eval_loss': 3.0,
  'bits_per_byte': 4.3281,
  'tokens_per_second': 12345.6,
  'step_seconds': 0.0081,
  'parameters': 1_575_936,
  'optimizer': 'galore',
  'optimizer_state_bytes': 4_100_000,
  'adam_state_bytes': 12_607_488,
  'hardware': {'platform': 'cpu', 'devices': 8},
  'commit': None,
}


def _write(folder, rows=ROWS, summary=None, config=None, tail=''):
  folder.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(row) + '\n' for row in rows) + tail
  (folder / 'metrics.jsonl').write_text(text)
  if summary is not None:
    (folder / 'summary.json').write_text(json.dumps(summary))
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))
  return folder


def _cells(runs):
  """The table as one dict a row; columns are two or more spaces apart."""
  header, *rows = [
    [cell.strip() for cell in line.replace('  ', '\t').split('\t') if cell]
    for line in report.table(runs).splitlines()
  ]
  return [dict(zip(header, row, strict=True)) for row in rows]


def _main(*arguments, cwd, **environment):
  return subprocess.run(
    [sys.executable, '-m', 'frugax.report', *map(str, arguments)],
    cwd=cwd,
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )


def _is_png(path):
  return path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


def test_rows_become_columns(tmp_path):
  run = report.read_run(_write(tmp_path, config={'steps': 3}))
  np.testing.assert_array_equal(run.train['step'], [1, 2, 3])
  np.testing.assert_array_equal(run.train['loss'], [5.5, 4.5, 3.5])
  np.testing.assert_array_equal(run.train['step_seconds'], [math.nan, 1, 2])
  np.testing.assert_array_equal(run.eval['step'], [2, 3])
  np.testing.assert_array_equal(run.eval['eval_loss'], [4.25, 3.0])
  assert 'eval_loss' not in run.train
  assert run.config == {'steps': 3}


def test_the_table_of_a_finished_run(tmp_path):
  run = report.read_run(_write(tmp_path / 'tiny', summary=SUMMARY))
  assert _cells([run]) == [
    {
      'run': 'tiny',
      'optimizer': 'galore',
      'params': '1.58M',
      'steps': '3',
      'tokens': '300',
      'eval loss': '3.0000',
      'bits/byte': '4.3281',
      'tokens/s': '12,346',
      'state bytes': '4.10M',
      "of Adam's": '32.5 %',
    }
  ]


def test_a_run_without_summary_is_read_from_its_rows(tmp_path):
  config = {'optimizer': {'name': 'fira', 'rank': 4}}
  run = report.read_run(_write(tmp_path / 'killed', config=config))
  assert run.summary == {
    'steps': 3,
    'tokens': 300,
    'seconds': 12.0,
    'eval_loss': 3.0,
    'bits_per_byte': 4.3281,
    'tokens_per_second': 75.0,
    'step_seconds': 1.5,
    'optimizer': 'fira',
  }
  (row,) = _cells([run])
  assert row['optimizer'] == 'fira'
  assert row['tokens/s'] == '75'
  assert row['params'] == row['state bytes'] == row["of Adam's"] == '-'


def test_a_summary_with_nulls_is_shown_with_dashes(tmp_path):
  summary = SUMMARY | {'eval_loss': None, 'adam_state_bytes': None}
  (row,) = _cells([report.read_run(_write(tmp_path, summary=summary))])
  assert row['eval loss'] == row["of Adam's"] == '-'
  assert row['steps'] == '3'


def test_a_run_resumed_past_its_summary_shows_where_it_is_now(tmp_path):
  rows = (*ROWS, {'step': 4, 'loss': 2.0, 'tokens': 400, 'seconds': 14.0})
  run = report.read_run(_write(tmp_path, rows, SUMMARY))
  assert (run.summary['steps'], run.summary['tokens']) == (4, 400)
  assert run.summary['parameters'] == SUMMARY['parameters']


def test_of_steps_taken_twice_the_last_row_counts(tmp_path):
  rows = (
    *ROWS,
    {'step': 2, 'loss': 4.0, 'tokens': 200},
    {'step': 3, 'loss': 3.25, 'tokens': 300},
    {'step': 3, 'eval_loss': 2.75, 'tokens': 300},
  )
  run = report.read_run(_write(tmp_path, rows))
  np.testing.assert_array_equal(run.train['step'], [1, 2, 3])
  np.testing.assert_array_equal(run.train['loss'], [5.5, 4.0, 3.25])
  np.testing.assert_array_equal(run.eval['eval_loss'], [4.25, 2.75])


@pytest.mark.parametrize('spelling', ['"nan"', 'NaN', '"inf"', '-Infinity'])
def test_non_finite_losses_are_read_and_drawn(tmp_path, spelling):
  tail = f'{{"step": 4, "loss": {spelling}, "tokens": 400}}\n'
  tail += '{"step": 4, "eval_loss": "nan", "tokens": 400}\n'
  run = report.read_run(_write(tmp_path, tail=tail))
  assert run.train['loss'].shape == (4,)
  assert not math.isfinite(run.train['loss'][-1])
  (row,) = _cells([run])
  assert row['eval loss'] == 'nan'
  assert row['steps'] == '4'
  report.plot([run], tmp_path / 'loss.png')
  assert _is_png(tmp_path / 'loss.png')


def test_a_run_of_nothing_but_nan_is_drawn(tmp_path):
  rows = ({'step': s, 'loss': 'nan'} for s in (1, 2))
  run = report.read_run(_write(tmp_path, rows))
  report.plot([run], tmp_path / 'loss.png')
  assert _is_png(tmp_path / 'loss.png')


@pytest.mark.parametrize(
  'tail', ['{', '{"step": 4, "loss": 1', '{"step": 4,\n']
)
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
  run = report.read_run(_write(tmp_path, tail=tail))
  assert run.train['step'][-1] == 3


@pytest.mark.parametrize(
  ('line', 'reason'),
  [
    ('{"step": 1, "lo', 'not JSON'),
    ('{"loss": 5.0}', 'not an object with a step'),
    ('[1, 2]', 'not an object with a step'),
    ('{"step": 1, "loss": "low"}', "loss is 'low', not a number"),
    ('{"step": 1, "loss": [5.0]}', r'loss is \[5.0\], not a number'),
  ],
)
def test_a_broken_line_is_named(tmp_path, line, reason):
  tail = f'{line}\n' + '{"step": 5, "loss": 1.0}\n'
  folder = _write(tmp_path, ROWS[:1], tail=tail)
  with pytest.raises(ValueError, match=rf'metrics\.jsonl, line 2: {reason}'):
    report.read_run(folder)


@pytest.mark.parametrize('name', ['summary.json', 'config.json'])
@pytest.mark.parametrize('text', ['{"steps": ', '[3]'])
def test_a_broken_json_file_is_named(tmp_path, name, text):
  (_write(tmp_path) / name).write_text(text)
  with pytest.raises(ValueError, match=f'{name} is not'):
    report.read_run(tmp_path)


def test_a_summary_with_words_for_numbers_is_refused(tmp_path):
  folder = _write(tmp_path, summary=SUMMARY | {'tokens': 'many'})
  with pytest.raises(ValueError, match=r"summary\.json: tokens is 'many'"):
    report.read_run(folder)


def test_missing_runs_are_named(tmp_path):
  with pytest.raises(ValueError, match='runs/none: no such folder'):
    report.read_run('runs/none')
  with pytest.raises(ValueError, match=r'has no metrics\.jsonl'):
    report.read_run(tmp_path)
  (tmp_path / 'metrics.jsonl').touch()
  with pytest.raises(ValueError, match='no row with a loss or eval_loss yet'):
    report.read_run(tmp_path)


def test_columns_line_up_over_runs(tmp_path):
  runs = [
    report.read_run(_write(tmp_path / 'a', summary=SUMMARY)),
    report.read_run(_write(tmp_path / 'a-much-longer-name')),
  ]
  header, first, second = report.table(runs).splitlines()
  for column, values in {'tokens/s': ('12,346', '75')}.items():
    end = header.index(column) + len(column)
    assert first[:end].endswith(' ' + values[0])
    assert second[:end].endswith(' ' + values[1])
  assert header.index('optimizer') == first.index('galore')
  assert [row['run'] for row in _cells(runs)] == ['a', 'a-much-longer-name']


def test_runs_of_one_name_are_told_apart(tmp_path):
  paths = [tmp_path / seed / 'tiny' for seed in ('s0', 's1')]
  runs = [report.read_run(_write(path)) for path in paths]
  assert [row['run'] for row in _cells(runs)] == ['s0/tiny', 's1/tiny']
  # The same run twice has no name that tells it apart.
  assert {row['run'] for row in _cells([runs[0]] * 2)} == {'tiny'}


@pytest.mark.parametrize('x', ['step', 'tokens', 'seconds'])
@pytest.mark.parametrize('n_runs', [1, 9])
def test_plots(tmp_path, x, n_runs):
  runs = [report.read_run(_write(tmp_path / f'{i}')) for i in range(n_runs)]
  picture = tmp_path / 'new folder' / 'loss.png'
  report.plot(runs, picture, x)
  assert _is_png(picture)


def test_what_cannot_be_plotted_is_said(tmp_path):
  rows = ({'step': 1, 'loss': 2.0}, {'step': 1, 'eval_loss': 2.0})
  run = report.read_run(_write(tmp_path, rows))
  with pytest.raises(ValueError, match=r"metrics\.jsonl .* record 'tokens'"):
    report.plot([run], tmp_path / 'loss.png', 'tokens')
  with pytest.raises(ValueError, match="'steps': did you mean 'step'"):
    report.plot([run], tmp_path / 'loss.png', 'steps')
  with pytest.raises(ValueError, match='not supported'):
    report.plot([run], tmp_path / 'loss.doc')


@pytest.mark.parametrize('width', [1, 3, 5, 21])
def test_smoothing_is_the_mean_of_what_is_near(width):
  values = np.random.default_rng(0).normal(size=12)
  values[[3, 4]] = math.nan
  expected = [
    np.nanmean(values[max(0, i - width // 2) : i + width // 2 + 1])
    if width > 1 or i not in (3, 4)
    else math.nan
    for i in range(12)
  ]
  np.testing.assert_allclose(curves.smooth(values, width), expected)


def test_the_command_for_one_run(tmp_path):
  folder = _write(tmp_path / 'a run', summary=SUMMARY)
  done = _main(folder, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  assert report.table([report.read_run(folder)]) in done.stdout
  assert _is_png(folder / 'loss.png')


def test_the_command_for_several_runs(tmp_path):
  for name in ('a', 'b'):
    _write(tmp_path / name, summary=SUMMARY)
  done = _main('a', 'b', '--x=tokens', cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  assert len(done.stdout.split('\n\n')[0].splitlines()) == 3
  assert _is_png(tmp_path / 'loss.png')
  assert not (tmp_path / 'a' / 'loss.png').exists()


def test_the_command_for_nothing_but_curves(tmp_path):
  _write(tmp_path / 'a')
  done = _main('a', '--curves-only', '--plot=b.png', cwd=tmp_path)
  assert (done.returncode, done.stdout) == (0, 'loss curves: b.png\n')
  assert _is_png(tmp_path / 'b.png')


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
  _write(tmp_path / 'a', ROWS[:1], tail='oops\n{"step": 2, "loss": 1.0}\n')
  for name, words in (('a', 'metrics.jsonl, line 2'), ('b', 'no such folder')):
    done = _main(name, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ''
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


def test_the_command_needs_no_home(tmp_path):
  _write(tmp_path / 'a')
  home = str(tmp_path / 'missing')
  done = _main('a', '--plot=out.png', cwd=tmp_path, HOME=home, MPLCONFIGDIR='')
  assert (done.returncode, done.stderr) == (0, '')
  assert _is_png(tmp_path / 'out.png')
  assert not pathlib.Path(home).exists()


def test_a_report_needs_no_jax(tmp_path):
  program = (
    'import sys\n'
    'sys.modules["jax"] = None\n'
    'from frugax import report\n'
    'run = report.read_run(sys.argv[1])\n'
    'print(report.table([run]))\n'
    'assert "matplotlib" not in sys.modules\n'
    'report.plot([run], sys.argv[1] + "/loss.png")\n'
  )
  folder = str(_write(tmp_path))
  subprocess.run([sys.executable, '-c', program, folder], check=True)
