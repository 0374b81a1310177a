"""What the backward pass finds in memory, and what few bits save of it."""

import math

import jax
import jax.numpy as jnp
import pytest

from frugax.models import llama


def test_inputs_keeps_each_of_them_once():
  """Those of linears, norms, SwiGLU and attention, and the weights."""
  dim, heads, ffn, tokens = 128, [128, 64, 64], 352, (7, 65)
  config = llama.config(
    'tiny', dtype='bfloat16', param_dtype='bfloat16', remat='inputs'
  )
  model = llama.Llama(config)
  layer = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype),
    jax.eval_shape(model.init, jax.random.key(0))['layers'],
  )
  x = jax.ShapeDtypeStruct((*tokens, dim), jnp.bfloat16)
  back = jax.eval_shape(lambda *a: jax.vjp(model.block, *a)[1], layer, x)
  n = math.prod(tokens)
  kept = [a for a in jax.tree.leaves(back) if a.size % n == 0]
  assert {a.dtype.name for a in kept} == {'bfloat16'}
  # The stream before each norm, what the norms give, what o is given; gate, up
  # and what down is given.
  want = sorted([*heads, *[dim] * 5, *[ffn] * 3])
  assert sorted(a.size // n for a in kept) == want


def kept(config, tokens):
  """Bytes that the backward pass of a layer finds beside the weights."""
  model = llama.Llama(config)
  layer = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype),
    jax.eval_shape(model.init, jax.random.key(0))['layers'],
  )
  x = jax.ShapeDtypeStruct((*tokens, config.dim), config.dtype)
  back = jax.eval_shape(lambda *a: jax.vjp(model.block, *a)[1], layer, x)

  def size(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

  return size(back) - size(layer)


@pytest.mark.parametrize(
  ('matmul', 'activations', 'less'),
  [
    ('int8', 'int8', 1.65),
    ('coat', 'recipe', 1.5),
    ('quest4', 'int4', 2.1),
    ('nvfp4', 'int4', 2.15),
  ],
)
def test_few_bits_save_most_of_the_activations(matmul, activations, less):
  """Of LLaMA-1b; the study reads the same figures from a compiled step."""
  tokens, options = (6, 256), dict(dtype='bfloat16', param_dtype='bfloat16')
  plain, few = (
    kept(llama.config('1b', remat='inputs', **options, **fields), tokens)
    for fields in ({}, dict(matmul=matmul, activations=activations))
  )
  assert few < plain / less


@pytest.mark.parametrize('activations', ['none', 'int8'])
def test_a_compiled_step_holds_no_more(activations):
  """In float32: a CPU's compiler makes copies of bfloat16 in more bits."""
  tokens = (64, 128)

  def held(layers):
    config = llama.config(
      'tiny',
      n_layers=layers,
      matmul='int8' if activations == 'int8' else 'none',
      activations=activations,
      remat='inputs',
    )
    model = llama.Llama(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    grad = jax.grad(lambda p, t: jnp.mean(jnp.square(model.apply(p, t))))
    batch = jax.ShapeDtypeStruct(tokens, jnp.int32)
    memory = jax.jit(grad).lower(params, batch).compile().memory_analysis()
    return memory.temp_size_in_bytes, kept(config, tokens)

  (few, each), (many, _) = held(8), held(24)
  assert (many - few) / 16 == pytest.approx(each, rel=0.05)
