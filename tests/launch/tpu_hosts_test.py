"""What the hosts of a TPU keep between two runs, and what they refuse."""

import pytest

from .tpu_vm_test import RUN, SECRET, TPU, runs


@pytest.mark.slow
def test_a_log_outlives_the_next_start(launcher):
  assert launcher.run('tpu_vm.sh', 'up', *RUN).returncode == 0
  for status in (1, 2):
    (launcher.folder / 'steps').write_text(str(status))
    done = launcher.run('tpu_vm.sh', 'run', *RUN, WANDB_API_KEY=SECRET)
    assert done.returncode == status
    # What is followed begins with the run's own start.
    assert done.stdout == f'a step\nhost 0 ends with {status}\n'
  done = launcher.run('tpu_vm.sh', 'last', *RUN)
  assert done.returncode == 0
  said = [line.partition('] ')[2] for line in done.stdout.splitlines()]
  assert said == [
    *('a step', 'host 0 ends with 1', 'a step', 'host 0 ends with 2'),
    *('a step', 'host 1 ends with 1', 'a step', 'host 1 ends with 2'),
  ]
  # Nor does a secret, once it is not handed on any more.
  assert launcher.run('tpu_vm.sh', 'run', *RUN).returncode == 2
  keys = [run['environ']['WANDB_API_KEY'] for run in runs(launcher)]
  assert keys == [*[SECRET] * 4, None, None]


@pytest.mark.slow
def test_a_workdir_that_would_go_with_the_tpu_is_refused(launcher):
  (launcher.folder / 'steps').write_text('0')
  config = RUN[3:]
  disk = launcher.folder / 'disk' / 'run'
  own = (*TPU, f'--workdir={disk}', *config)
  done = launcher.run('tpu_vm.sh', 'all', *own)
  assert done.returncode == 3
  assert f'error: the workdir {disk} is on this host' in done.stderr
  assert 'give gs://BUCKET/DIR, or a folder of a disk that all' in done.stderr
  assert not disk.exists()
  shared = launcher.folder / 'shared' / 'runs' / '1b'
  shared.parent.mkdir(parents=True)
  done = launcher.run('tpu_vm.sh', 'run', *TPU, f'--workdir={shared}', *config)
  assert done.returncode == 0, done.stderr
  assert (shared / 'summary.json').exists()
