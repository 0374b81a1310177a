"""Ctrl-C, as a terminal gives it: to launch/local.sh and to its trainer."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from running import rows, wait_for_step

_LOCAL = pathlib.Path(__file__).parents[2] / 'launch' / 'local.sh'


@contextlib.contextmanager
def _running(argv, log):
  with log.open('a') as f:
    process = subprocess.Popen(
      ['bash', _LOCAL, *argv],
      env=os.environ | {'PYTHON': sys.executable},
      stdout=f,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
  try:
    yield process
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_ctrl_c_saves_and_the_same_command_goes_on(command_line, tmp_path):
  run, log = tmp_path / 'run', tmp_path / 'log'
  argv = command_line(run, 'size=tiny,opt=adamw', mesh='fsdp=8', steps=100_000)
  with _running(argv, log) as process:
    wait_for_step(run, 10, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 143
  last = max(rows(run))
  assert f'stopped by a signal; saved at step {last}.' in log.read_text()
  assert not (run / 'summary.json').exists()
  with _running([*argv, f'--config.steps={last + 5}'], log) as process:
    assert process.wait(timeout=300) == 0
  assert f'resuming from the checkpoint at step {last}\n' in log.read_text()
  assert list(rows(run)) == list(range(1, last + 6))


def _trains(shell):
  """Whether the trainer is among the children of a shell."""
  children = pathlib.Path(f'/proc/{shell}/task/{shell}/children').read_text()
  for pid in children.split():
    with contextlib.suppress(OSError):
      command = pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
      if b'frugax.train\0' in command:
        return True
  return False


def test_ctrl_c_while_the_trainer_starts_ends_it(command_line, tmp_path):
  """Before it asks for the signal, which a shell's children ignore."""
  run, log = tmp_path / 'run', tmp_path / 'log'
  argv = command_line(run, 'size=tiny,opt=adamw', mesh='fsdp=8', steps=100_000)
  with _running(argv, log) as process:
    end = time.monotonic() + 60
    while not _trains(process.pid):
      assert time.monotonic() < end, log.read_text()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 143
  assert not (run / 'metrics.jsonl').exists()
