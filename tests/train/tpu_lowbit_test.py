"""What training steps in few bits send and multiply, from the TPU's compiler.

Of a small model; research/studies/tpu_lowbit_step.py shows LLaMA-1b.
"""

import collections
import functools
import json
import math
import pathlib
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.libtpu]
_STUDY = pathlib.Path(__file__).parents[2] / 'research' / 'studies'
# Bytes or two codes a byte: a weight has 64 Ki numbers and more, over `tensor`.
_WEIGHT = 256 * 256 // 2
_TOKENS = 16 * 128
VARIANTS = {
  'int4': 'int4,v5e:2x2,fsdp=2,tensor=2',
  'int8': 'int8,v5e:2x2,fsdp=4',
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
  assert gathers('int4', 2) == {(False, 'u8'): 7, (True, 's8'): 7}
  assert gathers('int8', 1) == {(False, 's8'): 7, (True, 's8'): 7}
  assert gathers('fp8', 1) == {(False, 'f8e4m3fn'): 7, (True, 'f8e4m3fn'): 7}


@pytest.mark.parametrize(
  ('recipe', 'forward', 'backward'),
  [
    # o and down, whose rows are cut over `tensor`, XLA rounds before.
    ('int4', {('bf16', 's4'): 2, ('s4', 's4'): 2}, ('s8', 's8')),
    ('int8', {('bf16', 's8'): 4}, ('s8', 's8')),
    ('fp8', {('f8e4m3fn', 'f8e4m3fn'): 4}, ('f8e4m3fn', 'f8e5m2')),
  ],
)
def test_kernels_multiply_codes_on_meshes(recipe, forward, backward):
  """No other product is left, and weights and gradients are never widened.

  Forward q, k and v are one, gate and up are another. Kernels that read
  activations in bfloat16 round them.
  """
  found = collections.Counter()
  for is_backward, kernel, left, right, count in read(recipe)['products']:
    found[is_backward, kernel, *sorted((left, right))] += count
  want = {(False, True, *pair): n for pair, n in forward.items()}
  assert found == want | {(True, True, *backward): 14}


@pytest.mark.parametrize(
  ('recipe', 'sequences', 'rounded'), [('int4', 8, 2), ('int8', 4, 0)]
)
def test_what_kernels_round_xla_does_not(recipe, sequences, rounded):
  """Activations by rows: (sequences, tokens, columns) on each chip."""
  found = [
    n
    for backward, _, shape, n in read(recipe)['codes']
    if not backward and len(shape) == 3 and shape[:2] == [sequences, 128]
  ]
  assert sum(found) == rounded


@pytest.mark.parametrize('recipe', VARIANTS)
def test_sums_over_devices_are_sent_in_the_layers_dtype(recipe):
  """Those of weights' gradients to where the weights lie."""
  scattered = collections.Counter()
  for operation, _, backward, dtype, shape in read(recipe)['sent']:
    if operation == 'reduce-scatter':
      scattered[backward, dtype] += 1
    elif operation != 'all-gather' and dtype in ('s32', 'f32'):  # of scales
      assert math.prod(shape) <= _TOKENS, (operation, dtype, shape)
  assert scattered == {(True, 'bf16'): 7}
