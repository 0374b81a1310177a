"""launch/local.sh: the trainer on this machine."""

import json
import os
import signal
import subprocess
import time

import pytest

from .conftest import AWKWARD

_RUN = ('--workdir=runs/a b', '--config=configs/llama.py:size=tiny', *AWKWARD)


def _arguments(calls):
  return [c for c in calls if 'frugax.train' in c]


def test_arguments_arrive(launcher):
  (launcher.folder / 'steps').write_text('0')
  python = str(launcher.folder / 'bin' / 'python')
  planned = launcher.dry_run('local.sh', *_RUN, PYTHON=python)
  assert planned == [[python, '-m', 'frugax.train', *_RUN]]
  done = launcher.run('local.sh', *_RUN, PYTHON=python)
  assert done.returncode == 0, done.stderr
  assert _arguments(launcher.calls('python')) == [['python', *planned[0][1:]]]


@pytest.mark.parametrize(
  ('arguments', 'builds'),
  [
    (['--config=configs/llama.py'], True),
    (['--config', 'configs/llama.py:size=60m'], True),
    (['--config=configs/llama.py:data=stdlib,size=60m'], True),
    (['--config=configs/llama.py:size=60m,data=c4'], False),
    (['--config', 'configs/llama.py:data=c4'], False),
    (['--config=configs/llama.py', '--config.data.name=lm1b'], False),
    (['--config=configs/llama.py', '--config.data.data_dir=/data'], False),
    (['--', '--config=configs/llama.py'], True),
    (['--config=configs/llama.py', '--config.data.name=stdlib'], True),
    (['--config=configs/llama.py', '--config.data.name', 'stdlib'], True),
    (['--config=configs/llama.py', '--config.data.name', 'lm1b'], False),
    (
      ['--config=configs/llama.py:data=c4', '--config.data.name=stdlib'],
      True,
    ),
  ],
)
def test_the_default_data_set_is_built(launcher, arguments, builds):
  planned = (
    launcher.dry_run('local.sh', '--workdir=a', *arguments)
    if ('--' not in arguments)
    else [
      line.split()
      for line in launcher.run(
        'local.sh', '--workdir=a', '--dry-run', *arguments
      ).stdout.splitlines()
    ]
  )
  assert ('frugax.train.corpus' in planned[0]) == builds
  assert len(planned) == 1 + builds


@pytest.mark.parametrize('status', [0, 1, 2, 134])
def test_the_status_is_that_of_the_trainer(launcher, status):
  (launcher.folder / 'steps').write_text(str(status))
  python = str(launcher.folder / 'bin' / 'python')
  done = launcher.run('local.sh', *_RUN, PYTHON=python)
  assert done.returncode == status


@pytest.mark.parametrize('status', [0, 143])
def test_metrics_that_are_not_yet_written_do_no_harm(launcher, status):
  """What hands them to a bucket looks for them before the first step."""
  process = subprocess.Popen(
    launcher.command('local.sh', *_RUN),
    cwd=launcher.folder,
    env=launcher.environ
    | {
      'PYTHON': str(launcher.folder / 'bin' / 'python'),
      'FRUGAX_SYNC': '0.05',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'a step\n'
  time.sleep(0.5)
  if status:
    process.send_signal(signal.SIGTERM)
  else:
    (launcher.folder / 'steps').write_text('0')
  told = process.communicate(timeout=60)[1]
  assert process.returncode == status
  assert told == ''


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_is_told_from_a_finished_one(launcher, number):
  """Both exit with 0, and a summary may be there from before."""
  workdir = launcher.folder / 'runs' / 'a b'
  workdir.mkdir(parents=True)
  (workdir / 'summary.json').write_text('{"steps": 1}')
  process = subprocess.Popen(
    launcher.command('local.sh', *_RUN),
    cwd=launcher.folder,
    env=launcher.environ | {'PYTHON': str(launcher.folder / 'bin' / 'python')},
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert process.stdout.readline() == 'a step\n'
  process.send_signal(number)
  assert process.wait(20) == 143
  assert process.stdout.read() == 'stopped\n'
  process.stdout.close()
  (run,) = (workdir / 'runs.jsonl').read_text().splitlines()
  assert json.loads(run)['argv'][2] == '--workdir=runs/a b'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config=a.py'], '--workdir is missing: the folder of the run'),
    (['--workdir=a'], 'no config: add --config=configs/llama.py'),
    (['--workdir='], '--workdir is empty'),
    (['--workdir=a', '--config'], '--config needs a value'),
    (['--workdir=a', '--', '--workdir=b', '--config=c'], 'give --workdir=b'),
  ],
)
def test_wrong_options(launcher, arguments, message):
  done = launcher.run('local.sh', *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_before_it_trains_does_not_train(
  launcher, number
):
  """While the data set is built, which takes the signal as any program."""
  python = launcher.folder / 'bin' / 'python'
  real = python.read_text().removeprefix('#!/bin/sh\n')
  began = launcher.folder / 'began'
  python.write_text(
    '#!/bin/sh\n'
    f'case "$*" in *train.corpus*) touch "{began}"; exec sleep 60 ;; esac\n'
    f'{real}'
  )
  process = subprocess.Popen(
    launcher.command('local.sh', '--workdir=a', '--config=configs/llama.py'),
    cwd=launcher.folder,
    env=launcher.environ | {'PYTHON': str(python)},
    stdout=subprocess.DEVNULL,
    start_new_session=True,
  )
  end = time.monotonic() + 60
  while not began.exists() and time.monotonic() < end:
    time.sleep(0.05)
  os.killpg(process.pid, number)
  assert process.wait(20) == 143
  assert _arguments(launcher.calls('python')) == []
