"""Named sizes, their exact parameter counts, and refusals."""

import dataclasses

import jax.numpy as jnp
import pytest

from frugax.models import llama


# 58.07, 134.11, 367.97, 1339.08 and 6738.42 M are the counts published for the
# C4 benchmark; 3b, 13b and 70b those of OpenLLaMA, LLaMA and LLaMA 2.
@pytest.mark.parametrize(
  'size, count',
  [
    ('60m', 58_073_600),
    ('130m', 134_105_856),
    ('350m', 367_969_280),
    ('1b', 1_339_082_752),
    ('3b', 3_426_473_600),
    ('7b', 6_738_415_616),
    ('13b', 13_015_864_320),
    ('70b', 68_976_648_192),
  ],
)
def test_published_parameter_counts(size, count):
  assert llama.param_count(llama.config(size)) == count


def test_sizes_of_our_own():
  tiny = llama.config('tiny')
  assert 1e6 < llama.param_count(tiny) < 2e6
  assert tiny.vocab_size >= 256 and tiny.n_kv_heads < tiny.n_heads
  ten = llama.config('10m')
  layers = llama.param_count(ten) - (2 * ten.vocab_size + 1) * ten.dim
  assert 9e6 < layers < 11e6


def test_tied_model_has_no_head():
  tied = llama.config('60m', tie_embeddings=True)
  assert llama.param_count(tied) == 58_073_600 - 32000 * 512


@pytest.mark.parametrize('tied', [False, True])
def test_flops_count_every_matmul(tied):
  config = llama.LlamaConfig(
    vocab_size=11,
    dim=8,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn=5,
    tie_embeddings=tied,
  )
  qkvo = 8 * 8 + 2 * (8 * 4) + 8 * 8
  mlp = 3 * 8 * 5
  forward = 2 * (3 * (qkvo + mlp) + 8 * 11)
  attention = 3 * 2 * (2 * 8 * 7)  # scores and weighted sum over 7 tokens
  assert llama.flops_per_token(config, 7) == 3 * (forward + attention)


def test_head_dim_follows_dim_or_is_given():
  config = llama.config('tiny')
  assert config.d_head == 32
  assert dataclasses.replace(config, dim=256).d_head == 64
  assert dataclasses.replace(config, head_dim=6).d_head == 6


def test_dtypes_by_name_or_by_type():
  config = llama.config('tiny', dtype=jnp.bfloat16, param_dtype='float16')
  assert (config.dtype, config.param_dtype) == ('bfloat16', 'float16')
  assert config == llama.config('tiny', dtype='bfloat16', param_dtype='float16')


@pytest.mark.parametrize(
  'overrides, message',
  [
    (dict(n_kv_heads=3), 'n_heads=4 is not divisible by n_kv_heads=3'),
    (dict(n_heads=3, n_kv_heads=3), 'dim=128 is not divisible by n_heads=3'),
    (dict(head_dim=5), 'width 5 is odd'),
    (dict(n_layers=0), 'n_layers=0 must be a positive integer'),
    (dict(ffn=-1), 'ffn=-1 must be a positive integer'),
    (dict(head_dim=0), 'head_dim=0 must be a positive integer'),
    (dict(vocab_size=3.0), 'vocab_size=3.0 must be a positive integer'),
    (dict(n_layers=True), 'n_layers=True must be a positive integer'),
    (dict(norm_eps=0.0), 'norm_eps=0.0 must be a positive number'),
    (dict(remat='dot'), "unknown remat policy 'dot': did you mean 'dots'"),
    (dict(dtype='bf16'), "unknown dtype 'bf16'"),
    (dict(param_dtype='int8'), "unknown param_dtype 'int8'"),
    (dict(n_layer=2), "unknown LLaMA field 'n_layer': did you mean 'n_layers'"),
  ],
)
def test_refusals(overrides, message):
  with pytest.raises(ValueError, match=message):
    llama.config('tiny', **overrides)


def test_unknown_size():
  with pytest.raises(
    ValueError, match="unknown size '70B': did you mean '70b'"
  ):
    llama.config('70B')
