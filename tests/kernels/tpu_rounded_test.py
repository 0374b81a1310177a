"""Copies and collectives, compiled for TPUs by their compiler.

The compiler comes with libtpu, which the project's `dev` extra installs where
it exists, on Linux on x86-64.
"""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.libtpu


@functools.cache
def compiled(chip):
  script = pathlib.Path(__file__).with_name('tpu_rounded.py')
  done = subprocess.run(
    [sys.executable, str(script), chip], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return {r['name']: r for r in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize('chip', ['v5e', 'v5p', 'v6e', 'tpu7x'])
def test_every_copy_compiles_to_a_kernel(chip):
  rows = compiled(chip)
  assert {n: r['error'] for n, r in rows.items() if 'error' in r} == {}
  kernels = {n for n, r in rows.items() if r['kernel']}
  assert len(kernels) == 4
  assert not any(name.startswith('gather') for name in kernels)


@pytest.mark.parametrize(('format', 'sent'), [('int8', 's8'), ('int4', 's4')])
def test_collectives_of_a_v5e_carry_few_bits(format, sent):
  rows = compiled('v5e')[f'gather {format}']['collectives']
  shapes = {op: [] for op in ('all-gather', 'all-to-all', 'all-reduce')}
  for result, op in rows:
    shapes[op].append(result)
  (gathered,) = shapes['all-gather']
  assert gathered.startswith(f'{sent}[1024,2048]')
  (exchanged,) = shapes['all-to-all']
  assert exchanged.startswith(f'{sent}[4,256,2048]')
  # Of 4 bits two in a byte.
  assert all(('E(4)' in s) == (format == 'int4') for s in (gathered, exchanged))
  assert all(s.startswith('s32[1,2048]') for s in shapes['all-reduce'])
  assert len(shapes['all-reduce']) == 2
