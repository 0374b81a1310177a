"""Kernels compiled for TPUs by their compiler, and what the machine code says.

The compiler comes with libtpu, which the project's `dev` extra installs where
it exists, on Linux on x86-64.
"""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

CHIPS = ('v5e', 'v5p', 'v6e', 'tpu7x')
FP8 = {'f8e4m3', 'f8e4m3fn'}

pytestmark = pytest.mark.libtpu


@functools.cache
def compiled(chip):
  """What the matrix unit multiplies, for each kernel."""
  script = pathlib.Path(__file__).with_name('tpu.py')
  done = subprocess.run(
    [sys.executable, str(script), chip], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return {r['name']: r for r in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize('chip', CHIPS)
def test_every_kernel_compiles(chip):
  rows = compiled(chip)
  assert len(rows) > 30
  assert {n: r['error'] for n, r in rows.items() if 'error' in r} == {}


@pytest.mark.parametrize('chip', CHIPS)
def test_the_loss_is_multiplied_in_bfloat16(chip):
  assert set(compiled(chip)['loss bfloat16']['pushes']) == {'bf16'}


@pytest.mark.parametrize('chip', ['v5e', 'v5p', 'v6e'])
def test_integers_are_multiplied_as_they_are(chip):
  for name, row in compiled(chip).items():
    pushes = set(row['pushes'])
    if 'bf16 x' in name:
      assert pushes == {'bf16'}, name
    elif 'int8' in name or 'fold' in name:
      assert pushes == {'s8'}, name
    elif 'int4' in name:
      assert pushes == {'s4'}, name
    elif 'rise' in name:  # and the rotation
      assert pushes == {'bf16', 's4' if 'rise4' in name else 's8'}, name


def test_8_bit_floats_are_multiplied_as_they_are_on_tpu7x():
  for name, row in compiled('tpu7x').items():
    pushes = set(row['pushes'])
    if name.startswith(
      ('int4', 'e4m3', 'e2m1', 'fused int4', 'fused fp8_e4m3')
    ):
      assert pushes and pushes <= FP8, name
    elif name.startswith('e5m2'):
      assert 'f8e5m2' in pushes and pushes <= {*FP8, 'f8e5m2'}, name
