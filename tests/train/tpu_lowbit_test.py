"""What training steps in few bits send and multiply, from the TPU's compiler.

Of a small model; research/studies/tpu_lowbit_step.py shows LLaMA-1b.
"""

import collections
import functools
import json
import math
import pathlib
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
  (sys.platform, platform.machine()) != ('linux', 'x86_64'),
  reason='libtpu exists for Linux on x86-64 alone',
)
_STUDY = pathlib.Path(__file__).parents[2] / 'research' / 'studies'
# Bytes or two codes a byte: a weight has 64 Ki numbers and more, over `tensor`.
_WEIGHT = 256 * 256 // 2
VARIANTS = {
  'int4': 'int4,v5e:4x4,fsdp=4,tensor=4',
  'fp8': 'fp8,tpu7x:2x2x2,fsdp=16',
}


@functools.cache
def read(recipe):
  script = _STUDY / 'tpu_lowbit_step.py'
  done = subprocess.run(
    [sys.executable, str(script), f'--small={VARIANTS[recipe]}'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


def gathers(recipe, tensor):
  """Number of all-gathers of weights by (backward, dtype)."""
  found = collections.Counter()
  for operation, _, backward, dtype, shape in read(recipe)['sent']:
    if operation == 'all-gather' and math.prod(shape) * tensor >= _WEIGHT:
      found[backward, dtype] += 1
  return found


def test_weights_are_gathered_as_codes():
  """Seven of a layer: in 4 bits as bytes of two, and backward in 8 bits."""
  assert gathers('int4', 4) == {(False, 'u8'): 7, (True, 's8'): 7}
  assert gathers('fp8', 1) == {(False, 'f8e4m3fn'): 7, (True, 'f8e4m3fn'): 7}


@pytest.mark.parametrize(
  ('recipe', 'native'),
  [('int4', {'s8', 's4'}), ('fp8', {'f8e4m3fn', 'f8e5m2'})],
)
def test_no_operand_of_a_product_is_widened(recipe, native):
  products = read(recipe)['products']
  assert {backward for backward, *_ in products} == {False, True}
  for _, left, right, _ in products:
    assert {left, right} <= native
