"""The studies for GPUs, where there is none: that they run to their tables."""

import pathlib
import subprocess
import sys

import jax
import pytest

_ROOT = pathlib.Path(__file__).parents[2]


def lines(study):
  """Of what the study prints."""
  script = _ROOT / 'research' / 'studies' / study
  done = subprocess.run(
    [sys.executable, str(script), '--tiny'],
    capture_output=True,
    text=True,
    cwd=_ROOT,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout.splitlines()


@pytest.mark.slow
def test_the_benchmark_checks_every_kernel_and_prints_its_table():
  found = lines('bench_gpu.py')
  codes = 4 if jax.__version_info__ >= (0, 11) else 3
  assert sum('off by' in line for line in found) == codes
  table = [line for line in found if line.startswith('| 40 x ')]
  # Products, layers both ways, codes, the loss.
  assert len(table) == 1 + codes + 2 * 3 + 2 * 6 + 2
  assert found[-1] == table[-1]


@pytest.mark.slow
def test_memory_is_compared_by_optimizer():
  table = [line for line in lines('gpu_memory.py') if line.startswith('| ')]
  rows = [row.strip('| ').split(' | ') for row in table]
  assert [row[0] for row in rows[2:]] == [
    'adamw',
    'q_galore, layer-wise, int8 weights',
  ]
  assert {len(row) for row in rows} == {7}
  for _, planned, compiled, *measured in rows[2:]:
    # On a CPU both compile the same, and nothing measures what is in use.
    assert float(planned) == float(compiled) > 1
    assert measured == ['none'] * 4
