"""Remat policies: the same gradients, other memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.models import llama


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
