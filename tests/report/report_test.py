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
  'mfu': 0.4149,
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
      'time': '12.0 s',
      'train loss': '3.5000',
      'eval loss': '3.0000',
      'bits/byte': '4.3281',
      'tokens/s': '12,346',
      'MFU': '41.5%',
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
    'train_loss': 3.5,
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
  assert row['MFU'] == '-'


def test_a_run_in_progress_shows_what_it_knew_at_its_start(tmp_path):
  rows = ({'step': s, 'loss': 9 - s, 'mfu': s / 10} for s in (1, 2, 4))
  folder = _write(tmp_path, rows, config={'steps': 1200}, tail='{"step": 5, "l')
  facts = {k: SUMMARY[k] for k in ('parameters', 'optimizer_state_bytes')}
  (folder / 'info.json').write_text(json.dumps(facts))
  (row,) = _cells([report.read_run(folder)])
  assert row['steps'] == '4 of 1,200'
  assert (row['params'], row['state bytes']) == ('1.58M', '4.10M')
  assert (row['MFU'], row['train loss']) == ('20.0%', '5.0000')
  assert row['eval loss'] == row['time'] == '-'


def test_the_training_loss_is_that_of_the_last_50th(tmp_path):
  rows = [{'step': s, 'loss': float(s)} for s in range(1, 201)]
  run = report.read_run(_write(tmp_path, rows))
  assert run.summary['train_loss'] == np.mean([196, 197, 198, 199, 200])
  rows[-1]['loss'] = 'nan'
  run = report.read_run(_write(tmp_path, rows))
  assert math.isnan(run.summary['train_loss'])


def test_a_summary_with_nulls_is_shown_with_dashes(tmp_path):
  summary = SUMMARY | {'eval_loss': None, 'adam_state_bytes': None}
  (row,) = _cells([report.read_run(_write(tmp_path, summary=summary))])
  assert row['eval loss'] == row["of Adam's"] == '-'
  assert row['steps'] == '3'


def test_a_run_resumed_past_its_summary_shows_where_it_is_now(tmp_path):
  rows = (*ROWS, {'step': 4, 'loss': 2.0, 'tokens': 400, 'seconds': 14.0})
  facts = {'parameters': SUMMARY['parameters']}
  (_write(tmp_path, rows, SUMMARY) / 'info.json').write_text(json.dumps(facts))
  run = report.read_run(tmp_path)
  assert (run.summary['steps'], run.summary['tokens']) == (4, 400)
  assert run.summary['parameters'] == SUMMARY['parameters']


@pytest.mark.parametrize('steps', [2, 1000])
def test_what_another_run_left_in_the_folder_is_not_this_ones(tmp_path, steps):
  """Its checkpoints were removed, and its command given with another rate."""
  rows = [row for row in ROWS if 'loss' in row]
  old = SUMMARY | {'steps': steps, 'eval_loss': 1.5, 'train_loss': 1.25}
  run = report.read_run(_write(tmp_path, rows, old, {'steps': 1000}))
  (row,) = _cells([run])
  assert (row['steps'], row['train loss']) == ('3 of 1,000', '3.5000')
  assert row['eval loss'] == row['bits/byte'] == '-'
  assert row['tokens/s'] == '75'


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


@pytest.mark.parametrize('tail', ['{', '{"step": 4, "loss": 1', '{"step":'])
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
  run = report.read_run(_write(tmp_path, tail=tail))
  assert run.train['step'][-1] == 3
  assert run.skipped == ()


BROKEN = (
  ('{"step": 1, "lo', 'not JSON'),
  ('\x00\x00\x00', 'not JSON'),
  ('\udcff{"step": 1}', 'not JSON'),
  ('[' * 100_000, 'not JSON'),
  ('{"loss": 5.0}', 'not an object with a step'),
  ('{"step": null, "loss": 5.0}', 'not an object with a step'),
  ('[1, 2]', 'not an object with a step'),
  ('{"step": NaN, "loss": 5.0}', 'step is nan, not a number of steps'),
  ('{"step": 1, "loss": "low"}', "loss is 'low', not a number"),
  ('{"step": 1, "loss": [5.0]}', 'loss is [5.0], not a number'),
  ('{"step": 1, "loss": 1' + 400 * '0' + '}', 'loss is 1000'),
)


@pytest.mark.parametrize(('line', 'reason'), BROKEN)
def test_a_broken_line_is_left_out_and_told_of(tmp_path, line, reason):
  folder = _write(tmp_path, ROWS[:1])
  with (folder / 'metrics.jsonl').open('ab') as f:
    f.write(line.encode(errors='surrogateescape') + b'\n')
    f.write(b'{"step": 5, "loss": 1.0}\n')
  run = report.read_run(folder)
  np.testing.assert_array_equal(run.train['step'], [1, 5])
  np.testing.assert_array_equal(run.train['loss'], [5.5, 1.0])
  (told,) = run.skipped
  assert told.startswith(f'metrics.jsonl, line 2: {reason}')


def test_broken_lines_are_counted_below_the_table(tmp_path):
  lines = [line for line, _ in BROKEN[4:9]]
  paths = [
    _write(tmp_path / 'a', tail='\n'.join([*lines, 'oops', '{"st'])),
    _write(tmp_path / 'b'),
    _write(tmp_path / 'c', tail='oops\n{"step": 9, "loss": 2.0}\n'),
  ]
  runs = [report.read_run(path) for path in paths]
  assert report.table(runs).splitlines()[4:] == [
    'a: 6 broken left out, first metrics.jsonl, line 6: not an object with a'
    ' step: b\'{"loss": 5.0}\'',
    "c: 1 broken left out, first metrics.jsonl, line 6: not JSON: b'oops'",
  ]
  found = json.loads(report.to_json(runs))['runs']
  assert [len(run['skipped']) for run in found] == [6, 0, 1]


@pytest.mark.parametrize('name', ['summary', 'config', 'info'])
@pytest.mark.parametrize('text', ['{"steps": ', '[3]'])
def test_a_broken_file_of_facts_is_left_out_and_told_of(tmp_path, name, text):
  (_write(tmp_path) / f'{name}.json').write_text(text)
  run = report.read_run(tmp_path)
  (told,) = run.skipped
  assert told.startswith(f'{name}.json: ')
  assert run.summary['steps'] == 3


def test_a_summary_with_words_for_numbers_is_left_out(tmp_path):
  folder = _write(tmp_path, summary=SUMMARY | {'tokens': 'many'})
  run = report.read_run(folder)
  assert run.skipped == ("summary.json: tokens is 'many', not a number",)
  assert run.summary['tokens'] == 300
  assert 'parameters' not in run.summary


def test_missing_runs_are_named(tmp_path):
  with pytest.raises(ValueError, match='runs/none: no such folder'):
    report.read_run('runs/none')
  with pytest.raises(ValueError, match=r'has no metrics\.jsonl'):
    report.read_run(tmp_path)
  (tmp_path / 'metrics.jsonl').touch()
  with pytest.raises(ValueError, match=r'no row with a loss or eval_loss$'):
    report.read_run(tmp_path)
  (tmp_path / 'metrics.jsonl').write_text('oops\noops\n')
  with pytest.raises(ValueError, match=r'eval_loss \(2 broken lines\)'):
    report.read_run(tmp_path)
  with pytest.raises(ValueError, match='gs://runs/a is no folder: mount'):
    report.read_run('gs://runs/a')


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


@pytest.mark.parametrize(
  ('seconds', 'label', 'last'),
  [(100, 'seconds', 100), (180, 'minutes', 3), (86400, 'hours', 24)],
)
def test_time_is_in_a_unit_that_suits_it(tmp_path, seconds, label, last):
  rows = ({'step': s, 'loss': 1.0, 'seconds': s * seconds} for s in (0.5, 1))
  run = report.read_run(_write(tmp_path, rows))
  (ax,) = report.figure([run], 'seconds').axes
  assert ax.get_xlabel() == f'training time in {label}, without evaluation'
  assert ax.lines[0].get_xdata()[-1] == last


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


def test_the_command(tmp_path):
  for name in ('a run', 'b'):
    _write(tmp_path / 'runs' / name, summary=SUMMARY)
  done = _main('runs/a run', 'runs/b', cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  runs = [report.read_run(tmp_path / 'runs' / name) for name in ('a run', 'b')]
  assert done.stdout.startswith(report.table(runs) + '\n\n')
  out = tmp_path / 'report'
  assert _is_png(out / 'loss_by_tokens.png')
  assert _is_png(out / 'loss_by_time.png')
  found = json.loads((out / 'report.json').read_text())['runs']
  assert [run['name'] for run in found] == ['a run', 'b']
  assert found[0]['summary'] == SUMMARY | {'train_loss': 3.5}
  assert found[0]['eval']['eval_loss'] == [4.25, 3.0]
  assert found[1]['train']['step_seconds'] == ['nan', 1.0, 2.0]


def test_the_command_for_one_picture(tmp_path):
  _write(tmp_path / 'a')
  done = _main('a', '--curves-only', '--plot=b.png', '--x=tokens', cwd=tmp_path)
  assert (done.returncode, done.stdout) == (0, 'loss curves: b.png\n')
  assert _is_png(tmp_path / 'b.png')
  assert {p.name for p in tmp_path.iterdir()} == {'a', 'b.png'}


@pytest.mark.parametrize('picture', [[], ['b.png']])
def test_the_command_for_scripts(tmp_path, picture):
  _write(tmp_path / 'a')
  plot = [f'--plot={name}' for name in picture]
  done = _main('a', '--json', *plot, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  (run,) = json.loads(done.stdout)['runs']
  assert run['train']['loss'] == [5.5, 4.5, 3.5]
  assert {p.name for p in tmp_path.iterdir()} == {'a', *picture}


def test_an_axis_of_no_picture_is_refused(tmp_path):
  _write(tmp_path / 'a')
  done = _main('a', '--x=tokens', cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, '')
  told = done.stderr.splitlines()[-1]
  assert 'error: --x=tokens without --plot: ' in told
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_runs_that_cannot_be_read_do_not_hide_the_others(tmp_path):
  _write(tmp_path / 'a')
  (tmp_path / 'b').mkdir()
  done = _main('b', 'a', 'c', '--plot=a.png', cwd=tmp_path)
  assert done.returncode == 1
  assert len(done.stdout.split('\n\n')[0].splitlines()) == 2
  first, second = done.stderr.splitlines()
  assert 'b has no metrics.jsonl' in first
  assert 'c: no such folder' in second
  done = _main('b', 'c', cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, '')
  assert {p.name for p in tmp_path.iterdir()} == {'a', 'b', 'a.png'}


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
  _write(tmp_path / 'a', ({'step': 1, 'loss': 2.0},))
  done = _main('a', '--curves-only', cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, '')
  assert len(done.stderr.splitlines()) == 1
  assert "does not record 'tokens'" in done.stderr


def test_a_run_is_read_once_and_left_as_it_is(tmp_path):
  """As on a mounted bucket, where each call is slow and writing forbidden."""
  folder = _write(tmp_path / 'a', summary=SUMMARY, config={'steps': 3})
  (folder / 'info.json').write_text('{}')
  program = (
    'import json, sys\n'
    'from frugax.report import __main__ as command\n'
    'from frugax.report import curves\n'
    'from matplotlib import figure\n'
    'folder, seen = sys.argv[1], []\n'
    'def hook(event, args):\n'
    '  if args and str(args[0]).startswith(folder):\n'
    '    seen.append([event, str(args[0])[len(folder):], args[1].strip("b")])\n'
    'sys.addaudithook(hook)\n'
    'command.main([folder, "--out=out"])\n'
    'print(json.dumps(seen))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program, str(folder)],
    cwd=tmp_path,
    check=True,
    capture_output=True,
    text=True,
  )
  seen = json.loads(done.stdout.splitlines()[-1])
  names = ('metrics.jsonl', 'config.json', 'info.json', 'summary.json')
  assert sorted(seen) == sorted(['open', f'/{name}', 'r'] for name in names)


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
