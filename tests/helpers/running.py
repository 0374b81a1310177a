"""Runs as processes of their own, and what they wrote."""

import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

EXACT = ('loss', 'grad_norm', 'update_norm', 'param_norm', 'learning_rate')


def rows(workdir, key='loss'):
  """The rows of metrics.jsonl that have `key`, by step."""
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  found = [json.loads(line) for line in text.splitlines()]
  return {row['step']: row for row in found if key in row}


def assert_same_steps(got, want):
  """Bit for bit."""
  assert list(got) == list(want)
  for n in want:
    for key in (*EXACT, 'tokens'):
      assert got[n][key] == want[n][key], (n, key)


def start(argv, n_devices, log, more=(), within=list):
  """A run on so many CPU devices, which writes to the file `log`."""
  count = '--xla_force_host_platform_device_count='
  flags = re.sub(rf'{count}\d+', f'{count}{n_devices}', os.environ['XLA_FLAGS'])
  return subprocess.Popen(
    within([sys.executable, '-m', 'frugax.train', *argv]),
    env={**os.environ, 'XLA_FLAGS': flags, **dict(more)},
    stdout=log,
    stderr=subprocess.STDOUT,
  )


def free_port():
  """One of this machine that nobody listens at."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def start_together(
  argvs, n_devices, logs, host='localhost', within=lambda i, argv: argv
):
  """A run in several processes.

  Args:
    argvs: of each.
    n_devices: that each has.
    logs: a folder; process i writes to logs / str(i).
    host: the address of the first.
    within: (i, command line) -> the one that is run.
  """
  port = free_port()
  processes = []
  logs.mkdir(parents=True)
  for i, argv in enumerate(argvs):
    join = {
      'JAX_COORDINATOR_ADDRESS': f'{host}:{port}',
      'JAX_NUM_PROCESSES': str(len(argvs)),
      'JAX_PROCESS_ID': str(i),
    }
    with open(logs / str(i), 'w', encoding='utf-8') as log:
      own = functools.partial(within, i)
      processes.append(start(argv, n_devices, log, join, own))
  return processes


def texts(logs):
  """What the processes of `start_together` told."""
  return [p.read_text() for p in sorted(logs.iterdir())]


def wait_for_step(workdir, step, process):
  """Until that step is logged."""
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and process.poll() is None:
    try:
      if max(rows(workdir), default=0) >= step:
        return
    except (FileNotFoundError, json.JSONDecodeError):
      pass  # not yet there, or a line half written
    time.sleep(0.02)
  pytest.fail(f'no step {step}; exit code {process.poll()}')
