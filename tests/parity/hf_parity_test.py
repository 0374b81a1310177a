"""Our LLaMA against the one of Hugging Face transformers, both ways.

Needs torch and transformers, which the other tests do without: `make parity`.
"""

import jax
import numpy as np
import pytest

from frugax.models import llama

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
safetensors_numpy = pytest.importorskip('safetensors.numpy')

MODELS = {
  'multi-head': dict(),
  'multi-head, tied': dict(tie_word_embeddings=True),
  'grouped, odd ffn': dict(num_key_value_heads=2, intermediate_size=173),
  'multi-query, tied': dict(num_key_value_heads=1, tie_word_embeddings=True),
  'wide heads, base': dict(head_dim=24, rope_theta=500000.0),
  'eps': dict(rms_norm_eps=1e-2, num_key_value_heads=2),
}


def theirs(**changes):
  settings = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    # Wide enough that every layer matters to the logits.
    initializer_range=0.15,
  )
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**settings | changes)
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name:
        parameter.add_(0.3 * torch.randn_like(parameter))
  return model


@pytest.mark.parametrize('changes', MODELS.values(), ids=MODELS)
def test_logits(tmp_path, changes):
  reference = theirs(**changes)
  reference.save_pretrained(tmp_path)
  config, params = llama.from_hf(tmp_path)
  tokens = np.random.default_rng(0).integers(0, 97, (2, 300))
  with torch.no_grad():
    want = reference(torch.from_numpy(tokens)).logits.numpy()
  got = np.asarray(llama.Llama(config).apply(params, tokens))
  assert np.abs(want).max() > 1
  print(f'{changes}: max difference {np.abs(got - want).max():.2e}')
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('max_shard_bytes', [5 * 10**9, 100_000])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('changes', MODELS.values(), ids=MODELS)
def test_round_trip(tmp_path, changes, dtype, max_shard_bytes):
  reference = theirs(**changes).to(getattr(torch, dtype))
  reference.save_pretrained(tmp_path / 'theirs', max_shard_size='100KB')
  config, params = llama.from_hf(tmp_path / 'theirs')
  assert config.param_dtype == dtype
  ours = tmp_path / 'ours'
  llama.to_hf(ours, config, params, max_shard_bytes=max_shard_bytes)
  stored = [
    {
      name: (str(x.dtype), x.shape, x.tobytes())
      for file in folder.glob('*.safetensors')
      for name, x in safetensors_numpy.load_file(file).items()
    }
    for folder in (tmp_path / 'theirs', ours)
  ]
  assert stored[0] == stored[1]

  loaded = transformers.LlamaForCausalLM.from_pretrained(ours, dtype='auto')
  want, got = reference.state_dict(), loaded.state_dict()
  assert want.keys() == got.keys()
  for name, tensor in want.items():
    assert got[name].dtype == tensor.dtype
    assert torch.equal(got[name], tensor), name
  for name in (
    'rms_norm_eps',
    'rope_parameters',
    'tie_word_embeddings',
    'head_dim',
    'max_position_embeddings',
    'initializer_range',
  ):
    assert getattr(loaded.config, name) == getattr(reference.config, name)


def test_a_model_of_ours_has_its_logits_there(tmp_path):
  config = llama.config('tiny', n_layers=2, init_std=0.1)
  model = llama.Llama(config)
  params = model.init(jax.random.key(0))
  llama.to_hf(tmp_path / 'ours', config, params)
  loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'ours')
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64))
  with torch.no_grad():
    want = loaded(torch.from_numpy(tokens)).logits.numpy()
  np.testing.assert_allclose(
    model.apply(params, tokens), want, rtol=0, atol=1e-4
  )
