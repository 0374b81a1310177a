"""Kernels compiled for an H200 that is not there, and what their PTX says.

`make test-gpu` installs the compilers, of which `make test` has none.
"""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda12_plugin') is None,
  reason='no compiler for GPUs: make test-gpu installs jax-cuda12-plugin',
)


VERSION = tuple(map(int, jax.__version__.split('.')[:2]))
LAYOUTS = ('NN', 'NT', 'TN')
SIZES = ('', ' odd', ' tiny')
UNLIKE = VERSION >= (0, 11)  # products of two kinds of 8-bit floats


@functools.cache
def compiled():
  """What `gpu.py` prints, for each program."""
  script = pathlib.Path(__file__).with_name('gpu.py')
  done = subprocess.run(
    [sys.executable, str(script)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return {r['name']: r for r in map(json.loads, done.stdout.splitlines())}


def operands(name):
  """As in {'s8.s8'}: wgmma is what only Hopper has, and at its full rate."""
  kernels = compiled()[name]['instructions']
  found = {i for instructions in kernels.values() for i in instructions}
  assert all(i.startswith('wgmma.') for i in found), (name, found)
  return {'.'.join(i.split('.')[-2:]) for i in found}


def test_every_kernel_compiles():
  rows = compiled()
  assert len(rows) > 50
  assert {n: r['error'] for n, r in rows.items() if 'error' in r} == {}


needs_ptx_of_triton = pytest.mark.skipif(
  VERSION >= (0, 11),
  reason='the XLA of jax 0.11 dumps no PTX of Triton kernels',
)


@needs_ptx_of_triton
def test_integers_are_multiplied_as_int8():
  names = [n for n in compiled() if n.startswith(('int8', 'int4'))]
  assert {n.split()[1] for n in names} > {'NN', 'NT', 'TN', 'stack', 'linear'}
  assert {n: operands(n) for n in names} == {n: {'s8.s8'} for n in names}


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_mosaic_gpu_multiplies_integers_as_int8(kind):
  names = [n for n in compiled() if n.startswith(kind) and 'mosaic' in n]
  assert len(names) == 9
  assert {n: operands(n) for n in names} == {n: {'s8.s8'} for n in names}


def test_parts_of_a_result_go_to_different_places():
  """By rows and columns of tiles, and within: none is taken for the only one.

  Where a result has one tile of columns, its axis is left out, and what lies
  beyond its end would be written there, too.
  """
  names = [n for n in compiled() if n.endswith(' mosaic_gpu')]
  assert len(names) == 4 * 9 + UNLIKE * 9
  stores = {n: compiled()[n]['stores'] for n in names}
  assert stores == {n: ['4'] for n in names}


@pytest.mark.parametrize('kind', ['e4m3', 'e5m2', *['e5m2 x e4m3'] * UNLIKE])
def test_8_bit_floats_are_multiplied_as_they_are(kind):
  """And not as float16, which Triton would have made of them."""
  names = [f'{kind} {n}{odd} mosaic_gpu' for n in LAYOUTS for odd in SIZES]
  names += [f'{kind} stack'] if kind == 'e4m3' else []
  a, b = (kind.split(' x ') * 2)[:2]
  expected = {f'{a}.{b}'}
  assert {n: operands(n) for n in names} == {n: expected for n in names}


def test_a_layer_multiplies_8_bit_floats():
  """Of two kinds in its backward pass; XLA those that the kernel has not."""
  assert operands('fp8 linear') == {
    'e4m3.e4m3',
    'e5m2.e4m3' if UNLIKE else 'bf16.bf16',
  }


@needs_ptx_of_triton
def test_integers_become_bfloat16_beside_it():
  names = [n for n in compiled() if n.startswith('bf16')]
  assert {n: operands(n) for n in names} == {n: {'bf16.bf16'} for n in names}


@needs_ptx_of_triton
@pytest.mark.parametrize('layout', ['NN', 'NT'])
def test_the_loss_multiplies_bfloat16_as_it_is(layout):
  """In each of its kernels: none has its product from float32."""
  for which in ('', ' odd', ' gemma', ' filtered'):
    name = f'loss {layout}{which}'
    found = compiled()[name]['instructions']
    for step in ('', '_dz', '_dx', '_dw'):
      assert found[f'linear_cross_entropy{step}'], (name, step)
    assert operands(name) == {'bf16.bf16'}, name


@pytest.mark.parametrize('layout', ['NN', 'NT'])
def test_the_loss_has_no_logits_in_memory(layout):
  """At the shapes of Gemma-2 2B's head, where they are 8.4 GB in float32.

  But gradients of 3 2^23 at a time, and x's gradient in float32 and bfloat16.
  """
  most = 2 * 3 * 2**23 + (4 + 2) * 8192 * 2304 + 2**20
  assert compiled()[f'loss {layout} gemma']['temporaries'] <= most


@needs_ptx_of_triton
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_rotations_are_multiplied_in_bfloat16(dtype):
  """Those of float32, too, in three parts."""
  names = [n for n in compiled() if n.startswith(f'copies of {dtype}')]
  assert len(names) == 4
  for name in names:
    found = compiled()[name]['instructions']
    assert found['hadamard_quantize'] and found['hadamard_quantize_scales']
    assert operands(name) == {'bf16.bf16'}, name
