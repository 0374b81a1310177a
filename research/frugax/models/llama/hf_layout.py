"""How Hugging Face names, shapes and describes what is in a LLaMA."""

import dataclasses
import math
import pathlib

import jax

from frugax.models.llama.config import LlamaConfig

DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one parameter of ours is stored in the files.

  Attributes:
    name: the tensor; `{}` stands for the layer, of which ours has them all.
    n_in: how many of a kernel's axes, less the layers, are inputs. Kernels are
      stored as (out, in) matrices; 0 marks what is stored as it is.
  """

  name: str
  n_in: int = 0

  @property
  def stacked(self) -> bool:
    return '{}' in self.name

  def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the files, of one layer if stacked."""
    shape = shape[1:] if self.stacked else shape
    if not self.n_in:
      return shape
    return math.prod(shape[self.n_in :]), math.prod(shape[: self.n_in])

  def tensors(self, shape: tuple[int, ...]) -> list[str]:
    """The names of the tensors that a parameter of this shape is made of."""
    layers = range(shape[0]) if self.stacked else [0]
    return [self.name.format(layer) for layer in layers]


_LAYER = 'model.layers.{}.'

ENTRIES = {
  'embed/embedding': Entry('model.embed_tokens.weight'),
  'layers/attn_norm/scale': Entry(_LAYER + 'input_layernorm.weight'),
  'layers/attn/q/kernel': Entry(_LAYER + 'self_attn.q_proj.weight', 1),
  'layers/attn/k/kernel': Entry(_LAYER + 'self_attn.k_proj.weight', 1),
  'layers/attn/v/kernel': Entry(_LAYER + 'self_attn.v_proj.weight', 1),
  'layers/attn/o/kernel': Entry(_LAYER + 'self_attn.o_proj.weight', 2),
  'layers/mlp_norm/scale': Entry(_LAYER + 'post_attention_layernorm.weight'),
  'layers/mlp/gate/kernel': Entry(_LAYER + 'mlp.gate_proj.weight', 1),
  'layers/mlp/up/kernel': Entry(_LAYER + 'mlp.up_proj.weight', 1),
  'layers/mlp/down/kernel': Entry(_LAYER + 'mlp.down_proj.weight', 1),
  'final_norm/scale': Entry('model.norm.weight'),
  'lm_head/kernel': Entry('lm_head.weight', 1),
}


def flat(tree) -> dict:
  """Leaves of a nested dict by 'path/like/this', in the order of jax.tree."""
  return {
    jax.tree_util.keystr(keys, simple=True, separator='/'): leaf
    for keys, leaf in jax.tree.leaves_with_path(tree)
  }


def fields_from_json(file: pathlib.Path, given: dict) -> dict:
  """Fields of `LlamaConfig` from the contents of a `config.json`.

  Args:
    file: where it was read, for errors.
    given: its contents.

  Returns:
    Keyword arguments of `LlamaConfig`.

  Raises:
    ValueError: a size is missing, or it describes what `Llama` is not.
  """
  _refuse_unlike_ours(file, given)

  def size(name):
    if given.get(name) is None:
      raise ValueError(f'{file} does not give {name}.')
    return given[name]

  heads = size('num_attention_heads')
  fields = dict(
    vocab_size=size('vocab_size'),
    dim=size('hidden_size'),
    n_layers=size('num_hidden_layers'),
    n_heads=heads,
    n_kv_heads=given.get('num_key_value_heads') or heads,
    ffn=size('intermediate_size'),
    rope_theta=_rope(given).get('rope_theta', 10000.0),
    norm_eps=given.get('rms_norm_eps', 1e-6),
    tie_embeddings=given.get('tie_word_embeddings', False),
    init_std=given.get('initializer_range', 0.02),
    max_positions=given.get('max_position_embeddings', 2048),
  )
  head_dim = given.get('head_dim')
  if head_dim and head_dim * heads != fields['dim']:
    fields['head_dim'] = head_dim
  return fields


def _rope(given):
  """Rotary's settings: rope_parameters since transformers 5, two keys before.

  Only what is set: a null stands for the default, as an absent key does.
  """
  rope = {'rope_theta': given.get('rope_theta')}
  rope |= given.get('rope_scaling') or {}
  rope |= given.get('rope_parameters') or {}
  return {key: value for key, value in rope.items() if value is not None}


def _refuse_unlike_ours(file, given):
  rope = _rope(given)
  for key, value, ours in (
    ('model_type', given.get('model_type'), 'llama'),
    ('hidden_act', given.get('hidden_act', 'silu'), 'silu'),
    ('attention_bias', given.get('attention_bias', False), False),
    ('mlp_bias', given.get('mlp_bias', False), False),
    ('rope_scaling', rope.get('rope_type', rope.get('type')), 'default'),
    ('partial_rotary_factor', rope.get('partial_rotary_factor', 1.0), 1.0),
    ('quantization_config', given.get('quantization_config'), None),
  ):
    if value != ours and not (key == 'rope_scaling' and value is None):
      raise ValueError(
        f'{file} has {key} {value!r}: only {ours!r} can be represented.'
      )


def config_to_json(config: LlamaConfig) -> dict:
  """The contents of a `config.json`."""
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': config.vocab_size,
    'hidden_size': config.dim,
    'intermediate_size': config.ffn,
    'num_hidden_layers': config.n_layers,
    'num_attention_heads': config.n_heads,
    'num_key_value_heads': config.n_kv_heads,
    'head_dim': config.d_head,
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope_theta,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std,
    'max_position_embeddings': config.max_positions,
    'torch_dtype': config.param_dtype,
  }
