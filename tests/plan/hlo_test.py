# ruff: noqa: E501 (HLO has long lines)
"""Reading HLO: small texts whose counts are known."""

import jax
import jax.numpy as jnp
import pytest

from frugax.plan import buffers, cost, hlo

# A loop as in a program for TPUs, which does not say how often it runs: over
# `layers`, which an outer loop hands on, inside of one of three rounds.
LOOPS = """
HloModule jit_f

%inner_condition (p: (s32[], s32[], f32[4,8])) -> pred[] {
  %p = (s32[]{:T(128)}, s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%inner_body (q: (s32[], s32[], f32[4,8])) -> (s32[], s32[], f32[4,8]) {
  %q = (s32[], s32[], f32[4,8]{1,0:S(1)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  %x = f32[4,8]{1,0:S(1)} get-tuple-element(%q), index=2
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0:S(1)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  ROOT %t = (s32[], s32[], f32[4,8]{1,0:S(1)}) tuple(%next, %m, %y)
}

%outer_condition (p2: (s32[], s32[], f32[4,8])) -> pred[] {
  %p2 = (s32[], s32[], f32[4,8]{1,0}) parameter(0)
  %i2 = s32[] get-tuple-element(%p2), index=0
  %three = s32[] constant(3)
  ROOT %lt2 = pred[] compare(%i2, %three), direction=LT
}

%outer_body (q2: (s32[], s32[], f32[4,8])) -> (s32[], s32[], f32[4,8]) {
  %q2 = (s32[], s32[], f32[4,8]{1,0}) parameter(0)
  %j2 = s32[] get-tuple-element(%q2), index=0
  %layers = s32[] get-tuple-element(%q2), index=1
  %x2 = f32[4,8]{1,0} get-tuple-element(%q2), index=2
  %zero2 = s32[] constant(0)
  %start2 = (s32[], s32[], f32[4,8]{1,0}) tuple(%zero2, %layers, %x2)
  %inner = (s32[], s32[], f32[4,8]{1,0}) while(%start2), condition=%inner_condition, body=%inner_body
  %y2 = f32[4,8]{1,0} get-tuple-element(%inner), index=2
  %one2 = s32[] constant(1)
  %next2 = s32[] add(%j2, %one2)
  ROOT %t2 = (s32[], s32[], f32[4,8]{1,0}) tuple(%next2, %layers, %y2)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %five = s32[] constant(5)
  %c = s32[] copy(%five)
  %start = (s32[], s32[], f32[4,8]{1,0}) tuple(%zero, %c, %a)
  %outer = (s32[], s32[], f32[4,8]{1,0}) while(%start), condition=%outer_condition, body=%outer_body
  ROOT %r = f32[4,8]{1,0} get-tuple-element(%outer), index=2
}
"""

COLLECTIVES = """
%start (p: bf16[1,128]) -> (bf16[1,128], bf16[4,128]) {
  %p = bf16[1,128]{1,0} parameter(0)
  %g = bf16[4,128]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %s = (bf16[1,128]{1,0}, bf16[4,128]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%done (p1: bf16[1,128]) -> bf16[4,128] {
  %p1 = bf16[1,128]{1,0} parameter(0)
  %g1 = bf16[4,128]{1,0} all-gather(%p1), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %d = bf16[4,128]{1,0} custom-call(%g1), custom_call_target="AsyncCollectiveDone"
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %ab = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[1,128], y: f32[64]) -> f32[64] {
  %x = bf16[1,128]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %f = (bf16[1,128]{1,0}, bf16[4,128]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %h = bf16[4,128]{1,0} fusion(%x), kind=kCustom, calls=%done
  %ar = f32[64]{0} all-reduce(%y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  %rs = f32[16]{0} reduce-scatter(%y), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%sum
  %ps = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %pd = f32[64]{0} collective-permute-done(%ps)
}
"""


def _count(text):
  return cost.count(hlo.parse(text))


def test_loops_that_do_not_say_how_often_they_run():
  found = _count(LOOPS)
  assert found.flops == {'float32': 3 * 5 * 2 * 4 * 8 * 8}
  assert found.unknown_loops == 0


def test_a_loop_that_is_unrolled_in_part():
  twice = LOOPS.replace('%one = s32[] constant(1)', '%one = s32[] constant(2)')
  assert _count(twice).flops == {'float32': 3 * 3 * 2 * 4 * 8 * 8}
  # Two rounds' counters, one after the other.
  chain = LOOPS.replace(
    '%next = s32[] add(%j, %one)',
    '%mid = s32[] add(%j, %one)\n  %next = s32[] add(%one, %mid)',
  )
  assert _count(chain).flops == {'float32': 3 * 3 * 2 * 4 * 8 * 8}


def test_a_loop_of_unknown_length_counts_once_and_is_told():
  unknown = LOOPS.replace('%c = s32[] copy(%five)', '%c = s32[] negate(%five)')
  found = _count(unknown)
  assert found.flops == {'float32': 3 * 2 * 4 * 8 * 8}
  assert found.unknown_loops == 1


def test_collectives_and_what_a_device_sends_of_each():
  found = _count(COLLECTIVES).collectives
  assert {k: (c.count, c.bytes, c.sent) for k, c in found.items()} == {
    'all-gather': (1, 1024, 768),  # written twice, run once
    'all-reduce': (1, 256, 2 * 192),
    'reduce-scatter': (1, 256, 192),
    'collective-permute': (1, 256, 256),
  }


# A gather that begins before a loop, goes on in its rounds and ends after it,
# and one of the loop's own: as TPU programs have them beside windowed products.
BESIDE = """
%body (q: (s32[], bf16[1,128])) -> (s32[], bf16[1,128]) {
  %q = (s32[], bf16[1,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %x1 = bf16[1,128]{1,0} get-tuple-element(%q), index=1
  %h1 = bf16[4,128]{1,0} fusion(%x1), kind=kCustom, calls=%done
  %own = bf16[4,128]{1,0} all-gather(%x1), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="4"}
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  ROOT %t = (s32[], bf16[1,128]{1,0}) tuple(%next, %x1)
}

%condition (p2: (s32[], bf16[1,128])) -> pred[] {
  %p2 = (s32[], bf16[1,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p2), index=0
  %eight = s32[] constant(8)
  ROOT %lt = pred[] compare(%i, %eight), direction=LT
}

ENTRY %main (x: bf16[1,128]) -> bf16[4,128] {
  %x = bf16[1,128]{1,0} parameter(0)
  %f = (bf16[1,128]{1,0}, bf16[4,128]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %zero = s32[] constant(0)
  %first = (s32[], bf16[1,128]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[1,128]{1,0}) while(%first), condition=%condition, body=%body
  ROOT %h = bf16[4,128]{1,0} fusion(%x), kind=kCustom, calls=%done
}
"""


def test_a_collective_that_runs_beside_a_loop_is_run_once():
  text = COLLECTIVES.split('%sum')[0] + BESIDE
  gathers = _count(text).collectives['all-gather']
  assert (gathers.count, gathers.bytes) == (1 + 8, (1 + 8) * 1024)


def test_what_lies_in_other_memory_is_no_traffic():
  text = """
ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %b = f32[256]{0:T(256)S(1)} negate(%a)
  ROOT %c = f32[256]{0} negate(%b)
}
"""
  assert _count(text).bytes == 2 * 1024


def _conditional(dear):
  text = """
%cheap (p: f32[8,8]) -> f32[8,8] {
  ROOT %p = f32[8,8]{1,0} parameter(0)
}

%costly (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (i: s32[], x: f32[8,8]) -> f32[8,8] {
  %i = s32[] parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%i, %x, %x), branch_computations={%cheap, %costly}
}
"""
  return cost.count(hlo.parse(text), dear=dear).total_flops


def test_the_cheapest_and_the_dearest_branch():
  assert (_conditional(False), _conditional(True)) == (0, 2 * 8**3)


# As the TPU's compiler writes products over two axes, and with batch axes.
@pytest.mark.parametrize(
  ('shapes', 'attributes', 'flops'),
  [
    (
      ('bf16[2,256,512]', 'bf16[512,1376,1]', 'bf16[2,256,1376]'),
      'window={size=1}, dim_labels=0bf_io0->0bf',
      2 * 2 * 256 * 512 * 1376,
    ),
    (
      ('bf16[2,256,512,1]', 'bf16[512,8,64,1]', 'bf16[2,256,8,64]'),
      'window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1},'
      ' dim_labels=0bf1_i1o0->0b1f',
      2 * 2 * 256 * 512 * 8 * 64,
    ),
    (
      ('bf16[2,8,256,64]', 'bf16[2,8,256,64]', 'f32[2,8,256,256]'),
      'window={size=2x8 stride=1x7 lhs_dilate=2x8}, dim_labels=01bf_01oi->01bf',
      2 * 2 * 8 * 256 * 256 * 64,
    ),
  ],
)
def test_products_that_are_written_as_convolutions(shapes, attributes, flops):
  left, right, out = shapes
  text = (
    f'ENTRY %main (a: {left}, b: {right}) -> {out} {{\n'
    f'  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n'
    f'  ROOT %c = {out} convolution(%a, %b), {attributes}\n}}\n'
  )
  assert _count(text).total_flops == flops


def test_kernels_count_as_they_estimate_themselves():
  config = '{"custom_call_config":{"body":"x","cost_estimate":%s}}'
  text = """
ENTRY %%main (a: s8[64,64]) -> s32[64,64] {
  %%a = s8[64,64]{1,0} parameter(0)
  ROOT %%k = s32[64,64]{1,0} custom-call(%%a, %%a), custom_call_target="tpu_custom_call", backend_config=%s
}
"""
  estimate = '{"flops":"524288","transcendentals":"0","bytes_accessed":"9"}'
  found = _count(text % (config % estimate))
  assert found.flops == {'int8': 524288}
  assert found.unknown_kernels == 0
  assert _count(text % '{}').unknown_kernels == 1


def test_kernels_that_round_have_the_rate_of_what_they_multiply():
  text = """
ENTRY %main (x: bf16[64,64], w: s8[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %w = s8[64,64]{1,0} parameter(1)
  ROOT %quantize_matmul_int8_NT.1 = bf16[64,64]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"524288"}}}
}
"""
  assert _count(text).flops == {'int8': 524288}


def test_products_in_the_libraries_of_gpus():
  text = """
ENTRY %main (a: bf16[32,64], b: bf16[64,16]) -> bf16[32,16] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[64,16]{1,0} parameter(1)
  %g = (bf16[32,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %r = bf16[32,16]{1,0} get-tuple-element(%g), index=0
}
"""
  assert _count(text).flops == {'bfloat16': 2 * 32 * 16 * 64}


def test_a_compiled_loop():
  """CPU programs say how often a loop runs; what it slices is read in slices."""
  n, layers = 64, 12
  weights = jnp.zeros((layers, n, n))

  def f(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  text = jax.jit(f).lower(weights[0], weights).compile().as_text()
  found = _count(text)
  assert found.flops == {'float32': layers * 2 * n**3}
  assert found.unknown_loops == 0
  # Weights, once each, and in each round what goes in and comes out, not more
  # than a few times.
  one = 4 * n**2
  assert layers * 3 * one <= found.bytes <= layers * 8 * one


def test_a_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('nothing')


REFUSALS = {
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for'
  ' HLO temporaries (29.94G) exceeds available HBM (15.75G).': (29.94, 15.75),
  'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.89G of'
  ' 15.75G hbm. Exceeded hbm capacity by 1.14G.': (16.89, 15.75),
}


@pytest.mark.parametrize('message', REFUSALS)
def test_what_a_refusal_says(message):
  expected = tuple(int(gib * 2**30) for gib in REFUSALS[message])
  assert buffers.needed(message) == expected


def test_other_errors_are_no_refusals():
  assert buffers.needed('INTERNAL: Mosaic failed to compile') is None


def test_temporaries_by_shape_add_up():
  text = """
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:
 value: <1 p @0> (size=4096,offset=0): f32[1024]{0}
allocation 3: size 99, color 1, preallocated-temp:
 value: <2 v @0> (size=99,offset=0): f32[2,9]{1,0:S(1)}
allocation 4: size 10000, preallocated-temp:
 value: <3 stack @0> (size=800,offset=0): bf16[2,200]{1,0}
 value: <4 again @0> (size=800,offset=0): f32[200]{0}
 value: <5 gradient @0> (size=6400,offset=400): f32[2,10,80]{2,1,0}
 value: <6 logits @0> (size=2000,offset=7000): f32[500]{0}
"""
  found = buffers.temporaries(text, layers=[2], parameters=[1600])
  assert found[:4] == (10000, 800, 6000, 3200)
  assert found.largest[0] == ('f32[2,10,80]', 6400)
