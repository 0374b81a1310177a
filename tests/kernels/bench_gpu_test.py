"""The benchmark for GPUs, where there is none: that it runs to its table."""

import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_checks_every_kernel_and_prints_its_table():
  script = _ROOT / 'research' / 'studies' / 'bench_gpu.py'
  done = subprocess.run(
    [sys.executable, str(script), '--tiny'], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  lines = done.stdout.splitlines()
  assert sum('off by' in line for line in lines) == 4
  table = [line for line in lines if line.startswith('| 40 x 130 x 200')]
  assert len(table) == 5 + 2 * 3 and lines[-1] == table[-1]
