"""Remat policies: the same gradients, other memory."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.models import llama
from frugax.plan import environment


def grad(remat, batch, dot_general=jax.lax.dot_general):
  config = llama.LlamaConfig(
    vocab_size=32,
    dim=32,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    ffn=88,
    init_std=0.2,
    remat=remat,
  )
  model = llama.Llama(config, dot_general=dot_general)
  params = jax.eval_shape(model.init, jax.random.key(0))

  def loss(params, tokens):
    logits = model.apply(params, tokens, segment_ids=tokens // 16)
    logprobs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logprobs, tokens[..., None], -1))

  tokens = jax.ShapeDtypeStruct(batch, jnp.int32)
  return model, jax.jit(jax.grad(loss)).lower(params, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def int8_dot(lhs, rhs, dimension_numbers, precision):
  lhs, rhs = (jnp.round(x * 16).astype(jnp.int8) for x in (lhs, rhs))
  out = jax.lax.dot_general(
    lhs, rhs, dimension_numbers, precision, preferred_element_type=jnp.int32
  )
  return out.astype(jnp.float32) / 256


def int8_forward(lhs, rhs, dimension_numbers, precision):
  return int8_dot(lhs, rhs, dimension_numbers, precision), (lhs, rhs)


def int8_backward(dimension_numbers, precision, saved, cotangent):
  def plain(lhs, rhs):
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision)

  return jax.vjp(plain, *saved)[1](cotangent)


int8_dot.defvjp(int8_forward, int8_backward)


def int8_dot_general(lhs, rhs, dimension_numbers, precision=None):
  return int8_dot(lhs, rhs, dimension_numbers, precision)


@functools.cache
def temporary_bytes(remat, dot_general=jax.lax.dot_general):
  _, lowered = grad(remat, (4, 256), dot_general)
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_policy():
  tokens = np.random.default_rng(0).integers(0, 32, (2, 24), np.int32)
  want = None
  for remat in llama.REMAT:
    model, lowered = grad(remat, tokens.shape)
    params = jax.jit(model.init)(jax.random.key(0))
    got = lowered.compile()(params, tokens)
    want = want or got
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


def test_memory_is_in_the_order_of_what_is_kept():
  order = ('full', 'linears', 'dots', 'none')
  sizes = [temporary_bytes(remat) for remat in order]
  assert sizes == sorted(set(sizes)), dict(zip(order, sizes, strict=True))
  assert sizes[0] < sizes[-1] / 2
  assert sizes[0] < temporary_bytes('inputs') < sizes[-1]


def test_linears_are_kept_whatever_computes_them():
  # For the plain dot_general, the two policies keep the same arrays.
  assert temporary_bytes('linears') == pytest.approx(
    temporary_bytes('dots_no_batch'), rel=0.02
  )

  # A low-bit one, with a gradient of its own, is not computed twice either.
  def count(remat):
    _, lowered = grad(remat, (2, 24), int8_dot_general)
    return lowered.as_text().count('xi8>')

  assert count('linears') == count('none') < count('full')


@pytest.mark.parametrize(('remat', 'there'), [('offload', 1), ('linears', 0)])
def test_offload_is_asked_for_in_the_program(remat, there):
  """CPUs ignore it: they have no other memory."""
  model = llama.Llama(llama.config('tiny', remat=remat))
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  jaxpr = jax.make_jaxpr(jax.grad(lambda p, t: model.apply(p, t).sum()))
  assert ('<host>' in str(jaxpr(params, tokens))) == there


OFFLOAD = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from frugax.models import llama

topology = topologies.get_topology_desc(
  platform='tpu', topology_name='v5e:2x2'
)
mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ('x',))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
for remat in ('linears', 'offload'):
  model = llama.Llama(
    llama.config('tiny', remat=remat, n_layers=12, dim=256, dtype='bfloat16')
  )
  params, tokens = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    (
      jax.eval_shape(model.init, jax.random.key(0)),
      jax.ShapeDtypeStruct((2, 2048), jnp.int32),
    ),
  )
  loss = lambda p, t: model.apply(p, t, labels=t)[0].sum()
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
  memory = compiled.memory_analysis()
  print(
    memory.temp_size_in_bytes,
    memory.host_temp_size_in_bytes,
    'S(5)' in compiled.as_text(),
  )
"""


@pytest.mark.slow
@pytest.mark.libtpu
def test_offload_moves_the_linears_to_the_host_of_a_tpu():
  """By its compiler, which calls pinned host memory S(5)."""
  done = subprocess.run(
    [sys.executable, '-c', OFFLOAD],
    env=os.environ | environment.TPU,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  kept, offloaded = (line.split() for line in done.stdout.splitlines())
  # q, k, v, o, gate and up, in bfloat16; what down gives is only added.
  numbers = 256 + 2 * 128 + 256 + 2 * 352
  linears = 12 * 2 * 2048 * numbers * 2
  assert kept[1:] == ['0', 'False'] and offloaded[2] == 'True'
  assert int(offloaded[1]) == linears
  assert int(kept[0]) - int(offloaded[0]) > 0.5 * linears
