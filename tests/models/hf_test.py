"""Hugging Face folders: layout, streaming, shardings, refusals."""

import json
import tracemalloc

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from frugax.models import llama
from frugax.models.llama import hf
from frugax.models.llama import model as llama_model

CONFIG = llama.LlamaConfig(
  vocab_size=48,
  dim=32,
  n_layers=4,
  n_heads=4,
  n_kv_heads=2,
  ffn=24,
  rope_theta=5000.0,
  norm_eps=1e-5,
  max_positions=128,
)


def random_params(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    llama_model.shapes(config),
  )


def assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def edit_config(folder, **changes):
  file = folder / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, **changes):
  file = folder / 'model.safetensors'
  tensors = dict(safetensors.numpy.load_file(file))
  for name, tensor in changes.items():
    tensors[name] = tensor
  kept = {name: x for name, x in tensors.items() if x is not None}
  safetensors.numpy.save_file(kept, file)


@pytest.fixture
def folder(tmp_path):
  llama.to_hf(tmp_path / 'model', CONFIG, random_params(CONFIG))
  return tmp_path / 'model'


def test_layout_is_the_one_of_hugging_face(folder):
  params = random_params(CONFIG)
  stored = safetensors.numpy.load_file(folder / 'model.safetensors')
  layers = params['layers']
  # Ours by explicit indices: there, every matrix is (out, in).
  for layer in range(4):
    prefix = f'model.layers.{layer}.'
    for name, heads in (('q', 4), ('k', 2), ('v', 2)):
      matrix = stored.pop(f'{prefix}self_attn.{name}_proj.weight')
      assert matrix.shape == (heads * 8, 32)
      for head, k in np.ndindex(heads, 8):
        np.testing.assert_array_equal(
          matrix[head * 8 + k],
          layers['attn'][name]['kernel'][layer, :, head, k],
        )
    matrix = stored.pop(f'{prefix}self_attn.o_proj.weight')
    for head, k in np.ndindex(4, 8):
      np.testing.assert_array_equal(
        matrix[:, head * 8 + k], layers['attn']['o']['kernel'][layer, head, k]
      )
    for name in ('gate', 'up', 'down'):
      np.testing.assert_array_equal(
        stored.pop(f'{prefix}mlp.{name}_proj.weight'),
        layers['mlp'][name]['kernel'][layer].T,
      )
    for name, theirs in (
      ('attn_norm', 'input_layernorm'),
      ('mlp_norm', 'post_attention_layernorm'),
    ):
      np.testing.assert_array_equal(
        stored.pop(f'{prefix}{theirs}.weight'), layers[name]['scale'][layer]
      )
  for name, value in (
    ('model.embed_tokens.weight', params['embed']['embedding']),
    ('model.norm.weight', params['final_norm']['scale']),
    ('lm_head.weight', params['lm_head']['kernel'].T),
  ):
    np.testing.assert_array_equal(stored.pop(name), value)
  assert not stored


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
  head_dim=st.sampled_from([2, 6, 8]),
  dim=st.integers(1, 9),
  ffn=st.integers(1, 9),
  layers=st.integers(1, 3),
  tied=st.booleans(),
  dtype=st.sampled_from(['float32', 'bfloat16', 'float16']),
  shard_bytes=st.sampled_from([1, 300, 10**9]),
)
def test_round_trip_keeps_every_bit(
  tmp_path_factory, heads, head_dim, dim, ffn, layers, tied, dtype, shard_bytes
):
  config = llama.LlamaConfig(
    vocab_size=5,
    dim=dim,
    n_layers=layers,
    n_heads=heads[0],
    n_kv_heads=heads[1],
    # Left out where it follows from the others, as from_hf does.
    head_dim=None if dim == heads[0] * head_dim else head_dim,
    ffn=ffn,
    tie_embeddings=tied,
    param_dtype=dtype,
  )
  folder = tmp_path_factory.mktemp('hf') / 'new' / 'model'
  params = random_params(config)
  llama.to_hf(folder, config, params, max_shard_bytes=shard_bytes)
  read, copy = llama.from_hf(folder)
  assert read == config
  assert_same_bits(copy, params)
  # Writing what was read gives the same files.
  again = folder.parent / 'again'
  llama.to_hf(again, read, copy, max_shard_bytes=shard_bytes)
  files = sorted(file.name for file in folder.iterdir())
  assert files == sorted(file.name for file in again.iterdir())
  for file in files:
    assert (folder / file).read_bytes() == (again / file).read_bytes()


def test_shards_respect_the_limit_and_the_index(tmp_path):
  limit = 10_000
  llama.to_hf(
    tmp_path / 'm', CONFIG, random_params(CONFIG), max_shard_bytes=limit
  )
  index = json.loads((tmp_path / 'm/model.safetensors.index.json').read_text())
  files = sorted((tmp_path / 'm').glob('*.safetensors'))
  n = len(files)
  assert n > 3
  names = [f'model-{i:05d}-of-{n:05d}.safetensors' for i in range(1, n + 1)]
  assert [file.name for file in files] == names
  total = 0
  for file in files:
    tensors = safetensors.numpy.load_file(file)
    size = sum(x.nbytes for x in tensors.values())
    assert 0 < size <= limit
    total += size
    assert all(index['weight_map'].pop(name) == file.name for name in tensors)
  assert not index['weight_map']
  assert index['metadata'] == {'total_size': total}


RULES = {
  'everything': dict(
    embed='a', heads='b', kv_heads='b', head_dim='c', mlp='b', vocab='c'
  ),
  'layers': dict(layers='a', embed='b', mlp='c', norm='c'),
  'one axis in eight': dict(embed=('a', 'b', 'c')),
  'inner': dict(head_dim=('a', 'b'), vocab=('a', 'b', 'c'), mlp=('b', 'c')),
  'replicated': {},
}


def make_shardings(config, rules, axis_type=jax.sharding.AxisType.Auto):
  mesh = jax.make_mesh((2, 2, 2), ('a', 'b', 'c'), axis_types=(axis_type,) * 3)
  return jax.tree.map(
    lambda names: NamedSharding(mesh, PartitionSpec(*map(rules.get, names))),
    llama.Llama(config).axes(),
    is_leaf=lambda x: isinstance(x, tuple),
  )


@pytest.mark.parametrize('axis_type', ['Auto', 'Explicit'])
@pytest.mark.parametrize('rules', RULES.values(), ids=RULES)
def test_sharded_is_unsharded(folder, tmp_path, rules, axis_type):
  axis_type = getattr(jax.sharding.AxisType, axis_type)
  shardings = make_shardings(CONFIG, rules, axis_type)
  config, params = llama.from_hf(folder, shardings=shardings)
  assert_same_bits(params, random_params(CONFIG))
  for x, sharding in zip(
    jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True
  ):
    assert x.sharding == sharding
  llama.to_hf(tmp_path / 'again', config, params)
  for file in folder.iterdir():
    assert file.read_bytes() == (tmp_path / 'again' / file.name).read_bytes()


def test_each_device_reads_its_part_once(folder, monkeypatch):
  reads = []

  class Slice:
    def __init__(self, inner):
      self.inner = inner
      self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

    def __getitem__(self, index):
      part = self.inner[index]
      reads.append(part.size)
      return part

  open_all = hf._open
  monkeypatch.setattr(
    hf,
    '_open',
    lambda *args: {k: Slice(v) for k, v in open_all(*args).items()},
  )
  rules = dict(embed=('a', 'b', 'c'), norm=('a', 'b', 'c'))
  llama.from_hf(folder, shardings=make_shardings(CONFIG, rules))
  assert sum(reads) == llama.param_count(CONFIG)
  assert max(reads) == 48 * 32 // 8


def test_reading_holds_one_parameter_beyond_the_result(tmp_path):
  config = llama.config('tiny', n_layers=8, ffn=512, vocab_size=512)
  llama.to_hf(tmp_path / 'm', config, random_params(config))
  size = 4 * llama.param_count(config)
  largest = 4 * 8 * 128 * 512
  tracemalloc.start()
  try:
    _, params = llama.from_hf(tmp_path / 'm')
    # Arrays of numpy alone: jax keeps copies of its own, or none.
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < size + largest
  assert_same_bits(params, random_params(config))


def test_conversion_on_the_way_in(folder):
  config, params = llama.from_hf(
    folder, param_dtype='bfloat16', dtype='bfloat16', remat='full'
  )
  assert (config.param_dtype, config.dtype) == ('bfloat16', 'bfloat16')
  assert config.remat == 'full'
  want = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16), random_params(CONFIG)
  )
  assert_same_bits(params, want)


def test_mixed_dtypes_ask_for_a_choice(folder):
  wide = {'model.norm.weight': np.ones(32, np.float16)}
  edit_tensors(folder, **wide)
  with pytest.raises(ValueError, match=r'F16, F32.*param_dtype='):
    llama.from_hf(folder)
  _, params = llama.from_hf(folder, param_dtype='float32')
  assert params['final_norm']['scale'].dtype == jnp.float32


@pytest.mark.parametrize(
  'changes',
  [
    {'rope_theta': None, 'rope_parameters': {'rope_theta': 5000.0}},
    {
      'rope_theta': None,
      'rope_parameters': {'rope_theta': 5000.0, 'rope_type': 'default'},
    },
    {'rope_scaling': None, 'pretraining_tp': 1},
  ],
)
def test_config_of_older_and_newer_transformers(folder, changes):
  edit_config(folder, **changes)
  assert llama.read_config(folder) == CONFIG


def test_config_with_little_in_it(folder):
  given = json.loads((folder / 'config.json').read_text())
  for name in ('num_key_value_heads', 'head_dim', 'rope_theta', 'hidden_act'):
    del given[name]
  (folder / 'config.json').write_text(json.dumps(given))
  config = llama.read_config(folder)
  assert (config.n_kv_heads, config.d_head, config.rope_theta) == (4, 8, 1e4)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model_type': 'mistral'}, "model_type 'mistral': only 'llama'"),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu': only 'silu'"),
    ({'attention_bias': True}, 'attention_bias True'),
    ({'mlp_bias': True}, 'mlp_bias True'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "'linear'"),
    ({'rope_scaling': {'rope_type': 'llama3'}}, "rope_scaling 'llama3'"),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_scaling 'yarn'"),
    (
      {'rope_parameters': {'partial_rotary_factor': 0.5}},
      'partial_rotary_factor 0.5',
    ),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'hidden_size': None}, 'does not give hidden_size'),
    (
      {'intermediate_size': 20},
      r'down_proj.weight has shape \(32, 24\); by config.json it is \(32, 20\)',
    ),
    ({'num_hidden_layers': 5}, 'has no tensor model.layers.4'),
    ({'num_hidden_layers': 3}, '9 tensors that are not in the model'),
    ({'num_key_value_heads': 3}, 'not divisible by n_kv_heads=3'),
  ],
)
def test_configs_that_cannot_be_represented(folder, changes, message):
  edit_config(folder, **changes)
  with pytest.raises(ValueError, match=message):
    llama.from_hf(folder)


def test_tensors_that_cannot_be_represented(folder):
  edit_tensors(folder, **{'model.norm.weight': None})
  with pytest.raises(ValueError, match=r'has no tensor model.norm.weight'):
    llama.from_hf(folder)
  edit_tensors(folder, **{'model.norm.weight': np.ones(32, np.int8)})
  with pytest.raises(
    ValueError, match=r'model.norm.weight is I8; valid are F32'
  ):
    llama.from_hf(folder, param_dtype='float32')
  bias = 'model.layers.0.self_attn.q_proj.bias'
  edit_tensors(
    folder,
    **{'model.norm.weight': np.ones(32, np.float32)},
    **{bias: np.ones(32, np.float32)},
  )
  with pytest.raises(ValueError, match=f'such as {bias}'):
    llama.from_hf(folder)


def test_leftovers_of_older_files_are_passed_over(folder):
  inv_freq = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  edit_tensors(folder, **{inv_freq: np.ones(4, np.float16)})
  edit_config(folder, tie_word_embeddings=True)
  config, params = llama.from_hf(folder)
  assert config.tie_embeddings and 'lm_head' not in params


def test_folders_that_are_none(tmp_path, folder):
  with pytest.raises(ValueError, match='not a Hugging Face folder'):
    llama.from_hf(tmp_path / 'nowhere')
  file = folder / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(ValueError, match=r'model.safetensors is damaged'):
    llama.from_hf(folder)
  safetensors.numpy.save_file({}, file)
  with pytest.raises(ValueError, match='holds no tensors'):
    llama.from_hf(folder)
  file.unlink()
  with pytest.raises(ValueError, match=r'neither model.safetensors nor'):
    llama.from_hf(folder)
  (folder / 'pytorch_model.bin').touch()
  with pytest.raises(ValueError, match=r'\.bin pickles.*save_pretrained'):
    llama.from_hf(folder)


def test_missing_shard(tmp_path):
  params = random_params(CONFIG)
  llama.to_hf(tmp_path / 'm', CONFIG, params, max_shard_bytes=10_000)
  next((tmp_path / 'm').glob('model-00002-of-*')).unlink()
  with pytest.raises(
    ValueError, match=r'model-00002-of-\d+.safetensors is mis'
  ):
    llama.from_hf(tmp_path / 'm')


def test_shardings_of_another_model(folder):
  shardings = make_shardings(CONFIG, {})
  del shardings['lm_head']
  with pytest.raises(ValueError, match='they differ at lm_head/kernel'):
    llama.from_hf(folder, shardings=shardings)


def test_unknown_override(folder):
  with pytest.raises(ValueError, match="unknown LLaMA field 'rematt'"):
    llama.from_hf(folder, rematt='full')


def test_writing_refuses_what_does_not_fit(folder, tmp_path):
  params = random_params(CONFIG)
  with pytest.raises(ValueError, match='exists and is not empty'):
    llama.to_hf(folder, CONFIG, params)
  new = tmp_path / 'new'
  with pytest.raises(ValueError, match='differ at lm_head/kernel'):
    llama.to_hf(new, CONFIG, {k: params[k] for k in params if k != 'lm_head'})
  narrow = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
  with pytest.raises(ValueError, match=r'is bfloat16.*makes it float32'):
    llama.to_hf(new, CONFIG, narrow)
  assert not new.exists()


def test_a_crash_leaves_nothing(tmp_path, monkeypatch):
  def fail(file, value):
    raise OSError('disk full')

  monkeypatch.setattr(hf, '_write_json', fail)
  with pytest.raises(OSError, match='disk full'):
    llama.to_hf(tmp_path / 'm', CONFIG, random_params(CONFIG))
  assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(tmp_path):
  (tmp_path / 'm').mkdir()
  llama.to_hf(tmp_path / 'm', CONFIG, random_params(CONFIG))
  assert_same_bits(llama.from_hf(tmp_path / 'm')[1], random_params(CONFIG))
