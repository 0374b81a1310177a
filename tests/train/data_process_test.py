"""Batches in a process of their own: how it and its workers end."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from frugax.train import data, tokenizer

if __name__ == '__main__':
  cfg = data.DataConfig(name='words', data_dir=sys.argv[1],
                        num_workers=int(sys.argv[2]))
  batches = data.train_batches(cfg, tokenizer.tokenizer('bytes'), batch_size=2)
  next(batches)
  print('ready', flush=True)
  time.sleep(float(sys.argv[3]))
"""


def test_a_script_that_just_ends_is_quiet(data_dir, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(SCRIPT)
  result = subprocess.run(
    [sys.executable, script, data_dir, '0', '0'], capture_output=True, text=True
  )
  assert (result.returncode, result.stdout) == (0, 'ready\n')
  assert result.stderr == ''


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='reads /proc')
def test_workers_end_with_a_killed_parent_and_ignore_its_signals(
  data_dir, tmp_path
):
  def workers():
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
      try:
        with open(f'/proc/{pid}/environ', 'rb') as f:
          mine = str(tmp_path).encode() in f.read()
        with open(f'/proc/{pid}/cmdline', 'rb') as f:
          if mine and b'spawn_main' in f.read():
            found.append(int(pid))
      except OSError:
        continue  # gone meanwhile
    return found

  script = tmp_path / 'script.py'
  script.write_text(SCRIPT)
  parent = subprocess.Popen(
    [sys.executable, script, data_dir, '2', '60'],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env={**os.environ, 'FRUGAX_TEST': str(tmp_path)},
  )
  assert parent.stdout.readline() == b'ready\n'
  assert len(workers()) == 2
  for pid in workers():
    os.kill(pid, signal.SIGTERM)
  time.sleep(0.3)
  assert len(workers()) == 2
  parent.kill()
  parent.wait()
  parent.stdout.close()
  deadline = time.monotonic() + 20
  while workers() and time.monotonic() < deadline:
    time.sleep(0.1)
  assert workers() == []
