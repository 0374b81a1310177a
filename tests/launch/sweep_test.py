"""launch/sweep.py: a command for each point."""

import doctest
import importlib.util
import json
import re
import shlex
import subprocess
import sys

import pytest

from .conftest import AWKWARD, ROOT, words

_PATH = ROOT / 'launch' / 'sweep.py'
_spec = importlib.util.spec_from_file_location('frugax_launch_sweep', _PATH)
sweep = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweep)

THREE = """
def sweep():
  for rank in (8, 16, 32):
    yield {'config': 'configs/llama.py:size=tiny', 'optimizer.rank': rank}
"""


def run(launcher, step, text, *arguments, **environ):
  """Runs the script on a sweep; the folder of its points is sweep/."""
  (launcher.folder / 'file.py').write_text(text)
  return subprocess.run(
    [
      *(sys.executable, _PATH, step, 'file.py'),
      *('--workdir=sweep', *arguments),
    ],
    cwd=launcher.folder,
    env=launcher.environ
    | {'PYTHON': str(launcher.folder / 'bin' / 'python')}
    | environ,
    capture_output=True,
    text=True,
    check=False,
  )


def trained(launcher):
  """The folders of the points that were trained, in order."""
  calls = [c for c in launcher.calls('python') if 'frugax.train' in c]
  return [next(a for a in c if a.startswith('--workdir='))[10:] for c in calls]


def test_examples():
  assert doctest.testmod(sweep).failed == 0
  assert doctest.testmod(sweep).attempted >= 2


def test_prints_one_line_a_point(launcher):
  done = run(launcher, 'print', THREE)
  local = str(ROOT / 'launch' / 'local.sh')
  assert [words(line) for line in done.stdout.splitlines()] == [
    [
      local,
      f'--workdir=sweep/tiny,rank={rank}',
      '--config=configs/llama.py:size=tiny',
      f'--config.optimizer.rank={rank}',
    ]
    for rank in (8, 16, 32)
  ]
  assert launcher.calls() == []
  assert run(launcher, 'run', THREE, '--dry-run').stdout == done.stdout


def test_runs_what_is_left(launcher):
  (launcher.folder / 'steps').write_text('0')
  first = run(launcher, 'run', THREE)
  assert first.returncode == 0, first.stderr
  folders = [f'sweep/tiny,rank={rank}' for rank in (8, 16, 32)]
  assert trained(launcher) == folders
  # Nothing is done twice; a new point is, and one that asks for more steps.
  assert run(launcher, 'run', THREE).returncode == 0
  assert trained(launcher) == folders
  done = run(launcher, 'run', THREE.replace('32', '64'))
  assert '1 of 3 points are left' in done.stderr
  assert trained(launcher)[3:] == ['sweep/tiny,rank=64']
  longer = THREE.replace('rank}', "rank, 'steps': 2, 'name': f'r{rank}'}")
  assert run(launcher, 'run', longer).returncode == 0
  assert len(trained(launcher)) == 7
  assert len(run(launcher, 'print', longer).stdout.splitlines()) == 3


def test_a_failed_point_is_told_and_run_again(launcher):
  (launcher.folder / 'steps').write_text('1')
  done = run(launcher, 'run', THREE, '--jobs=3')
  assert done.returncode == 1
  assert '3 points have failed' in done.stderr
  (launcher.folder / 'steps').write_text('0')
  assert run(launcher, 'run', THREE).returncode == 0
  assert len(trained(launcher)) == 6


def test_awkward_values_arrive(launcher):
  key, value = AWKWARD[0].removeprefix('--config.').split('=', 1)
  text = f"""
def sweep():
  yield {{'config': 'configs/llama.py', {key!r}: {value!r},
         'model.matmul_rules': [['mlp/down', 'int8']], 'compat_eval': True}}
"""
  (launcher.folder / 'steps').write_text('0')
  (line,) = run(launcher, 'print', text).stdout.splitlines()
  assert run(launcher, 'run', text).returncode == 0
  call = next(c for c in launcher.calls('python') if 'frugax.train' in c)
  assert call[5:] == [*AWKWARD[:2], '--config.compat_eval=true']
  assert words(line)[1:] == call[3:]


def test_through_another_launcher(launcher):
  options = ('--', '--topology=v5e:2x2', '--zone=us-west4-a')
  script = [str(ROOT / 'launch' / 'tpu_vm.sh'), 'up']
  through = f'--launcher={shlex.join(script)}'
  done = run(launcher, 'print', THREE, through, *options)
  for line in done.stdout.splitlines():
    argv = words(line)
    assert argv[:4] == [*script, *options[1:]]
  slurm = shlex.quote(str(ROOT / 'launch' / 'slurm.sbatch'))
  done = run(launcher, 'run', THREE, f'--launcher={slurm}', '--', '--nodes=2')
  assert done.returncode == 0, done.stderr
  submitted = launcher.calls('sbatch')
  assert len(submitted) == 3
  names = {a for c in submitted for a in c if a.startswith('--job-name=')}
  assert len(names) == 3  # jobs of one name would wait for each other


@pytest.mark.parametrize(
  'step', [['print'], ['run', '--dry-run'], ['run'], ['table']]
)
def test_every_step_sees_what_is_in_the_bucket_now(
  launcher, monkeypatch, capsys, step
):
  """Also that a run was deleted there."""
  folder = launcher.folder / '.cache/sweeps/my-bucket/rank'
  old, new = (folder / f'tiny,rank={rank}' for rank in (8, 16))
  old.mkdir(parents=True)
  (old / 'summary.json').write_text('{"steps": 1}')
  calls = []

  def copy(command, **_):
    calls.append(command)
    if '--delete-unmatched-destination-objects' in command:
      (old / 'summary.json').unlink()
    new.mkdir()
    (new / 'summary.json').write_text('{"steps": 1}')
    return subprocess.CompletedProcess(command, 0, '', '')

  started = []
  monkeypatch.setattr(sweep.subprocess, 'run', copy)
  monkeypatch.setattr(
    sweep.subprocess, 'call', lambda c: started.append(sweep.line(c)) or 0
  )
  monkeypatch.setattr(sweep, '_CACHE', launcher.folder / '.cache/sweeps')
  file = launcher.folder / 'file.py'
  file.write_text(THREE)
  sweep.main([step[0], str(file), '--workdir=gs://my-bucket/rank', *step[1:]])
  (command,) = calls
  assert command[-2:] == ('gs://my-bucket/rank', str(folder))
  if step != ['table']:
    lines = started or capsys.readouterr().out.splitlines()
    assert [re.search(r'rank=(\d+)', x)[1] for x in lines] == ['8', '32']


def _last_words(folder, monkeypatch, stderr):
  """The sweep's copy of a bucket of which gcloud says nothing but this."""

  def copy(command, **_):
    return subprocess.CompletedProcess(command, 1, '', stderr)

  monkeypatch.setattr(sweep.subprocess, 'run', copy)
  monkeypatch.setattr(sweep, '_ROOT', folder)
  return sweep._local('gs://my-bucket/rank')


def test_a_bucket_without_the_folder_has_no_point(launcher, monkeypatch):
  folder = launcher.folder / '.cache/sweeps/my-bucket/rank'
  folder.mkdir(parents=True)
  (folder / 'summary.json').write_text('{}')
  none = (
    'ERROR: (gcloud.storage.rsync) Did not find existing container at:'
    ' gs://my-bucket/rank\n'
  )
  assert not _last_words(launcher.folder, monkeypatch, none).exists()
  gone = 'ERROR: (gcloud.storage.rsync) gs://my-bucket not found: 404.\n'
  with pytest.raises(ValueError, match='cannot read gs://my-bucket/rank: ERR'):
    _last_words(launcher.folder, monkeypatch, gone)


def test_results_in_one_table(launcher):
  for rank in (8, 16):
    folder = launcher.folder / 'sweep' / f'tiny,rank={rank}'
    folder.mkdir(parents=True)
    row = {'step': 5, 'loss': 2.5, 'tokens': 64, 'seconds': 1.0}
    (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
  here = {'PYTHONPATH': str(ROOT / 'research'), 'PYTHON': sys.executable}
  done = run(launcher, 'table', THREE, **here)
  assert done.returncode == 0, done.stderr
  assert 'tiny,rank=8 ' in done.stdout and 'tiny,rank=16 ' in done.stdout
  assert 'rank=32' not in done.stdout
  assert (launcher.folder / 'sweep' / 'loss.png').exists()


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'defines no sweep()'),
    ("def sweep(): yield {'optimizer.rank': 8}", 'point 0 of the sweep has no'),
    ('def sweep(): yield 8', "has no 'config'"),
    (
      "def sweep(): yield {'config': 'a', 'optimizer rank': 8}",
      "'optimizer rank' is no field of a config",
    ),
    (
      "def sweep(): yield {'config': 'a', 'name': '../up'}",
      "'../up' is no name for a folder",
    ),
    (
      'def sweep():\n  for _ in range(2): yield {"config": "a", "name": "b"}',
      "points 0 and 1 are both 'b'",
    ),
    ('sweep = 8', 'defines no sweep()'),
    (
      "def sweep(): yield {'config': 'a', 'name': 8}",
      'point 0 of the sweep: 8 is no name for a folder',
    ),
    ("def sweep(): yield {'config': 8}", "'config' is 8; give a text"),
    ("def sweep(): yield {'config': 'a', 8: 1}", '8 is no field of a config'),
    (
      "def sweep(): yield {'config': 'a', 'steps': 'all'}",
      "steps is 'all': give a whole number",
    ),
  ],
)
def test_a_wrong_sweep(launcher, text, message):
  done = run(launcher, 'run', text)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_wrong_options(launcher):
  done = run(launcher, 'prnt', THREE)
  assert done.returncode == 2
  assert "unknown step 'prnt': did you mean 'print'?" in done.stderr
  assert (
    '--jobs=0: give 1 or more' in run(launcher, 'run', THREE, '--jobs=0').stderr
  )
  done = run(launcher, 'run', THREE, '--', '--config.steps=many')
  assert "steps is 'many': give a whole number" in done.stderr
  done = run(launcher, 'table', THREE)
  assert done.returncode == 2 and 'no point of sweep has begun' in done.stderr


@pytest.mark.parametrize('name', ['launch/tpu_wm.sh all', "'", ''])
def test_a_launcher_that_is_not_there(launcher, name):
  done = run(launcher, 'run', THREE, f'--launcher={name}')
  assert done.returncode == 2
  assert f'--launcher={name!r}: there is no such program' in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('place', ['gs://b', 'gs://bucket/../x', 'gs:///x'])
def test_a_folder_that_is_none_of_a_bucket(launcher, place):
  """What is below .cache is deleted where the bucket has it not."""
  done = run(launcher, 'print', THREE, f'--workdir={place}')
  assert done.returncode == 2
  assert f'--workdir={place}: give gs://BUCKET/DIR' in done.stderr
  assert launcher.calls() == []


def test_a_machine_without_gcloud(launcher, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(launcher.folder))
  monkeypatch.setattr(sweep, '_CACHE', launcher.folder / '.cache/sweeps')
  (launcher.folder / 'file.py').write_text(THREE)
  file = str(launcher.folder / 'file.py')
  assert sweep.main(['print', file, '--workdir=gs://my-bucket/rank']) == 2
  told = capsys.readouterr().err
  assert told.startswith('error: cannot read gs://my-bucket/rank: there is no')
  assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
  ('point', 'options', 'summary', 'left'),
  [
    ("'steps': '100'", [], {'steps': 100}, 0),
    ("'steps': '100'", [], {'steps': 99}, 1),
    ("'steps': 100", [], [100], 1),
    ("'steps': 100", [], {'steps': 'all'}, 1),
    ('', [], {'steps': 100}, 0),
    ('', ['--config.steps=100'], {'steps': 100}, 0),
    ('', ['--config.steps=101'], {'steps': 100}, 1),
    ('', ['--config.steps', '101'], {'steps': 100}, 1),
    ('', ['--config.steps=9', '--config.steps=101'], {'steps': 100}, 1),
    ("'steps': 100", ['--config.steps=101'], {'steps': 100}, 0),
  ],
)
def test_what_is_left_is_told_by_the_steps_that_are_asked_for(
  launcher, point, options, summary, left
):
  """Those of the point, which come last, or those after the --."""
  folder = launcher.folder / 'sweep' / 'a'
  folder.mkdir(parents=True)
  (folder / 'summary.json').write_text(json.dumps(summary))
  text = f"def sweep(): yield {{'config': 'x', 'name': 'a', {point}}}"
  done = run(launcher, 'print', text, '--', *options)
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) == left
