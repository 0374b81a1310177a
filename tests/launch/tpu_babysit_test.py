"""launch/tpu_babysit.sh, with TPUs that are taken away."""

import contextlib
import shlex
import subprocess
import time

import pytest

from . import fake
from .tpu_vm_test import RUN, flag, runs


@contextlib.contextmanager
def babysitter(launcher, *options):
  """The script, running; it must have ended when the block does."""
  process = subprocess.Popen(
    launcher.command('tpu_babysit.sh', *RUN, '--spot', *options),
    cwd=launcher.folder,
    env=launcher.environ,
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  )
  try:
    yield process
  finally:
    process.kill()
    process.stderr.close()


def wait_until(condition):
  """Waits for something that happens in other processes."""
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.1)


def steps(launcher):
  """The calls that create and delete."""
  calls = [c[4] for c in launcher.calls('gcloud')]
  return [c for c in calls if c in ('create', 'delete')]


@pytest.fixture
def preempt(launcher, monkeypatch):
  """Takes the TPU away: its hosts are gone, its name stays."""
  monkeypatch.setattr(fake, '_FAKE', launcher.folder)

  def now():
    (launcher.folder / 'state').write_text('PREEMPTED')
    fake.preempt()

  return now


@pytest.mark.slow
def test_a_preempted_run_goes_on(launcher, preempt):
  with babysitter(launcher) as process:
    wait_until(lambda: len(runs(launcher)) == 2)
    preempt()
    wait_until(lambda: len(runs(launcher)) == 4)
    (launcher.folder / 'steps').write_text('0')
    assert process.wait(60) == 0
    told = process.stderr.read()
  assert steps(launcher) == ['create', 'delete', 'create', 'delete']
  # In the same folder, with the same arguments.
  assert len({tuple(run['argv'][3:]) for run in runs(launcher)}) == 1
  workdirs = {flag(run['argv'], 'workdir')[-30:] for run in runs(launcher)}
  assert len(workdirs) == 1
  assert 'the TPU is PREEMPTED' in told and 'all steps are done' in told


@pytest.mark.slow
@pytest.mark.parametrize(
  ('status', 'gives', 'message'),
  [(1, 1, 'failed with status 1'), (2, 2, 'failed with status 2')],
)
def test_a_run_that_fails_is_not_started_again(
  launcher, status, gives, message
):
  (launcher.folder / 'steps').write_text(str(status))
  with babysitter(launcher) as process:
    assert process.wait(60) == gives
    told = process.stderr.read()
  assert message in told
  # The reason is shown before it is deleted.
  for host in range(2):
    assert f'] host {host} ends with {status}\n' in told
  assert steps(launcher) == ['create', 'delete']
  assert len(runs(launcher)) == 2


@pytest.mark.slow
def test_a_killed_run_is_started_again_and_given_up(launcher):
  """137 is what a host gives that the kernel, or another host, has killed."""
  (launcher.folder / 'steps').write_text('137')
  with babysitter(launcher, '--restarts=3', '--keep') as process:
    assert process.wait(90) == 3
    told = process.stderr.read()
  assert 'giving up after 3 failures in a row' in told
  assert 'the TPU is still there, and costs until you delete it' in told
  script, *arguments = shlex.split(told.split('until you delete it:')[1])
  assert script.endswith('/launch/tpu_vm.sh')
  assert arguments[:2] == ['down', '--topology=v5e:4x4']
  assert steps(launcher) == ['create']
  assert len(runs(launcher)) == 6  # the first start and two more, on two hosts


@pytest.mark.slow
def test_a_run_stopped_by_its_user_stays_stopped(launcher):
  with babysitter(launcher) as process:
    wait_until(lambda: len(runs(launcher)) == 2)
    assert launcher.run('tpu_vm.sh', 'stop', *RUN).returncode == 0
    assert process.wait(60) == 143
    assert 'was stopped, and has saved' in process.stderr.read()


@pytest.mark.slow
def test_the_same_command_starts_a_kept_run_again(launcher):
  """What an earlier babysitter, or another run, left there is not the end."""
  more = [(), (), ('--config.steps=9',)]
  for i, (status, options) in enumerate(zip((1, 0, 0), more, strict=True)):
    (launcher.folder / 'steps').write_text(str(status))
    with babysitter(launcher, '--keep', *options) as process:
      assert process.wait(60) == status
      told = process.stderr.read()
    assert len(runs(launcher)) == 2 * (i + 1)
    assert 'the TPU is still there, and costs until you delete it' in told
  # The last one again: there is nothing to do.
  with babysitter(launcher, '--keep', *more[-1]) as process:
    assert process.wait(60) == 0
  assert len(runs(launcher)) == 6
  assert steps(launcher) == ['create']


@pytest.mark.slow
def test_the_run_of_another_is_left_alone(launcher):
  assert launcher.run('tpu_vm.sh', 'up', *RUN).returncode == 0
  assert launcher.run('tpu_vm.sh', 'run', '--detach', *RUN).returncode == 0
  with babysitter(launcher, '--config.steps=9') as process:
    assert process.wait(60) == 2
    assert 'with another workdir or config' in process.stderr.read()
  assert steps(launcher) == ['create']
  assert launcher.run('tpu_vm.sh', 'stop', *RUN).returncode == 0


@pytest.mark.slow
def test_giving_up_deletes_the_tpu(launcher):
  (launcher.folder / 'steps').write_text('137')
  with babysitter(launcher, '--restarts=2') as process:
    assert process.wait(90) == 3
  assert steps(launcher) == ['create', 'delete']


@pytest.mark.slow
def test_a_tpu_that_does_not_answer_is_created_anew(launcher):
  (launcher.folder / 'state').write_text('READY')
  (launcher.folder / 'fail').write_text('ssh\n' * 5)
  (launcher.folder / 'steps').write_text('0')
  with babysitter(launcher) as process:
    assert process.wait(60) == 0
    told = process.stderr.read()
  assert told.count('the TPU is there but does not answer') == 5
  assert steps(launcher) == ['delete', 'create', 'delete']


def test_no_capacity_is_waited_for_with_an_end(launcher):
  (launcher.folder / 'fail').write_text('create\n' * 9)
  with babysitter(launcher, '--restarts=4') as process:
    assert process.wait(60) == 3
    told = process.stderr.read()
  assert told.count('there is no TPU to be had') == 4
  assert steps(launcher) == ['create'] * 4


def test_no_answer_deletes_nothing(launcher):
  """A laptop without network must not take its TPU for gone."""
  (launcher.folder / 'state').write_text('READY')
  (launcher.folder / 'fail').write_text('describe\n' * 9)
  with babysitter(launcher, '--restarts=2') as process:
    assert process.wait(60) == 3
    told = process.stderr.read()
  assert 'Google Cloud does not answer' in told
  assert 'the TPU may still be there, and costs until you delete it' in told
  assert steps(launcher) == []


def test_a_state_that_is_not_known_deletes_nothing(launcher):
  """TPUs have had new ones: what HIDDEN holds may come back."""
  (launcher.folder / 'state').write_text('HIDDEN')
  with babysitter(launcher, '--restarts=3') as process:
    assert process.wait(60) == 3
    told = process.stderr.read()
  assert told.count('the TPU is HIDDEN, which says nothing') == 3
  assert 'the TPU may still be there, and costs until you delete it' in told
  assert steps(launcher) == []


@pytest.mark.slow
@pytest.mark.parametrize('state', ['TERMINATED', 'FAILED', 'SUSPENDED'])
def test_a_tpu_that_is_gone_is_created_anew(launcher, state):
  (launcher.folder / 'state').write_text(f'REIMAGING\n{state}')
  (launcher.folder / 'steps').write_text('0')
  with babysitter(launcher) as process:
    assert process.wait(60) == 0
    told = process.stderr.read()
  assert 'the TPU is REIMAGING\n' in told
  assert f'the TPU is {state}: deleting it' in told
  assert steps(launcher) == ['delete', 'create', 'delete']


def test_the_plan(launcher):
  planned = launcher.dry_run('tpu_babysit.sh', *RUN, '--spot', '--keep')
  alone = [
    *launcher.dry_run('tpu_vm.sh', 'report', *RUN, '--spot'),
    *launcher.dry_run('tpu_vm.sh', 'up', *RUN, '--spot'),
    *launcher.dry_run('tpu_vm.sh', 'run', '--detach', *RUN, '--spot'),
    *launcher.dry_run('tpu_vm.sh', 'report', *RUN, '--spot'),
  ]
  assert planned == alone


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--restarts=0'], "restarts '0' is not valid"),
    (['--detach'], '--detach: leave it out'),
    (['--zone=here'], "zone 'here' is not valid"),
  ],
)
def test_wrong_options(launcher, options, message):
  done = launcher.run('tpu_babysit.sh', *RUN, *options)
  assert done.returncode == 2
  assert message in done.stderr
  assert launcher.calls() == []


def test_a_missing_config_is_one_error_at_once(launcher):
  done = launcher.run('tpu_babysit.sh', *RUN[:3])
  assert done.returncode == 2
  assert done.stderr.startswith('error: no config: add --config=')
  assert len(done.stderr.splitlines()) == 1
  assert launcher.calls() == []
