"""The shape of a LLaMA, and the named sizes."""

import dataclasses
import numbers
import re

import jax.numpy as jnp

from frugax import lowbit, names

DTYPES = ('float32', 'bfloat16', 'float16')

# What the backward pass of a layer finds in memory; all else is recomputed.
REMAT = (
  'none',
  'inputs',
  'full',
  'dots',
  'dots_no_batch',
  'linears',
  'offload',
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Everything that determines a LLaMA's parameters and its forward pass.

  A layer holds `2 * dim * d_head * (n_heads + n_kv_heads) + 3 * dim * ffn`
  weights and two norms; the model adds `vocab_size * dim` for the embedding,
  the same for the head unless it is tied, and one norm.

  Attributes:
    vocab_size: number of token ids, 0 to `vocab_size - 1`.
    dim: width of the residual stream.
    n_layers: number of transformer blocks.
    n_heads: number of query heads.
    n_kv_heads: number of key and value heads; each serves
      `n_heads / n_kv_heads` query heads. Equal to `n_heads` is multi-head
      attention, less is grouped-query attention, 1 is multi-query attention.
    ffn: width of the SwiGLU hidden layer; any number, odd ones included.
    head_dim: width of one head; None is `dim / n_heads`. Read `d_head`.
    rope_theta: base of the rotary angles.
    norm_eps: added to the mean square inside RMSNorm.
    tie_embeddings: the head uses the embedding's matrix.
    init_std: standard deviation of every kernel and embedding at `init`.
    dtype: of the computation: 'float32', 'bfloat16' or 'float16' (or the jax
      dtype of that name). Norms, softmax, rotary and logits stay in float32.
    param_dtype: of the parameters, same names.
    remat: what a layer keeps for its backward pass; the rest is recomputed:
      'none' recomputes nothing; 'inputs' keeps what linears, norms, SwiGLU and
      attention are given, in the bits that `matmul` and `activations` say, and
      recomputes what lies inside them: norms, SwiGLU and attention's scores,
      but no linear; 'full' keeps the layer's input alone; 'dots' keeps the
      results of matmuls; 'dots_no_batch' those of matmuls without batch axes,
      so the linears but not the attention scores; 'linears' the outputs of the
      linears whatever `dot_general` computes them, and in its dtype; 'offload'
      these in the pinned memory of the host, and on the device the layers'
      inputs alone. Low-bit recipes save memory under 'none' and 'inputs'. The
      layer-wise step keeps the layers' inputs in any case: there 'none' and
      'full' are the same, 'inputs' acts within the layer that is computed
      again, and the others, which would change nothing, are refused.
    matmul: low-bit recipe of the seven linears of a layer, a name that
      `frugax.lowbit.recipe` knows; 'none' computes them in `dtype`.
    matmul_rules: (regular expression, recipe) pairs: a linear has the recipe of
      the first that is found in its path, 'attn/q' to 'mlp/down', and else
      `matmul`.
    matmul_exempt: how many of the first and of the last layers are computed in
      `dtype` whatever the recipe; both ends of many published recipes are.
    matmul_head: recipe of the head.
    activations: what norms and the activation function keep for their backward
      pass, a name in `frugax.lowbit.FLOWS`; 'recipe' is what `matmul` says.
    max_positions: context length written into a Hugging Face `config.json`;
      the model itself has no limit.

  Raises:
    ValueError: a size is not a positive integer, heads do not divide, a head is
      of odd width, a float is not positive, or a name is unknown.

  Examples:
    >>> c = LlamaConfig(vocab_size=320, dim=64, n_layers=2, n_heads=4,
    ...                 n_kv_heads=2, ffn=176)
    >>> c.d_head
    16
    >>> LlamaConfig(vocab_size=320, dim=64, n_layers=2, n_heads=4, n_kv_heads=3,
    ...             ffn=176)
    Traceback (most recent call last):
    ...
    ValueError: n_heads=4 is not divisible by n_kv_heads=3: ...

  References:
    Touvron et al., LLaMA, https://arxiv.org/abs/2302.13971, 2023.
    Ainslie et al., GQA, https://arxiv.org/abs/2305.13245, 2023.
    Shazeer, GLU variants improve transformer,
      https://arxiv.org/abs/2002.05202, 2020.
    Korthikanti et al., Reducing activation recomputation in large transformer
      models, https://arxiv.org/abs/2205.05198, 2022 (remat='inputs').
  """

  vocab_size: int
  dim: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  ffn: int
  head_dim: int | None = None
  rope_theta: float = 10000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  init_std: float = 0.02
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: str = 'none'
  matmul: str = 'none'
  matmul_rules: tuple[tuple[str, str], ...] = ()
  matmul_exempt: tuple[int, int] = (0, 0)
  matmul_head: str = 'none'
  activations: str = 'recipe'
  max_positions: int = 2048

  def __post_init__(self):
    for name in _INTEGERS:
      _check_positive(name, getattr(self, name), numbers.Integral)
    for name in ('rope_theta', 'norm_eps', 'init_std'):
      _check_positive(name, getattr(self, name), numbers.Real)
    for name in ('dtype', 'param_dtype'):
      object.__setattr__(self, name, _dtype_name(name, getattr(self, name)))
    if self.remat not in REMAT:
      raise names.unknown('remat policy', self.remat, REMAT)
    self._check_matmul()
    if self.n_heads % self.n_kv_heads:
      raise ValueError(
        f'n_heads={self.n_heads} is not divisible by n_kv_heads='
        f'{self.n_kv_heads}: set n_kv_heads to a divisor of n_heads, or to '
        f'{self.n_heads} for multi-head attention.'
      )
    if self.head_dim is not None:
      _check_positive('head_dim', self.head_dim, numbers.Integral)
    elif self.dim % self.n_heads:
      raise ValueError(
        f'dim={self.dim} is not divisible by n_heads={self.n_heads}: change '
        'one of them, or set head_dim.'
      )
    if self.d_head % 2:
      raise ValueError(
        f'a head of width {self.d_head} is odd, but rotary embedding turns '
        'pairs: choose dim, n_heads or head_dim so that it is even.'
      )

  def _check_matmul(self):
    rules = tuple(tuple(rule) for rule in self.matmul_rules)
    if any(len(rule) != 2 for rule in rules):
      raise ValueError(
        f'matmul_rules={self.matmul_rules!r}: give pairs of a regular '
        "expression and a recipe, as in (('mlp/down', 'int8'),)"
      )
    exempt = tuple(self.matmul_exempt)
    if len(exempt) != 2 or min(exempt) < 0:
      raise ValueError(
        f'matmul_exempt={self.matmul_exempt!r}: give two numbers of layers, '
        'at the beginning and at the end'
      )
    object.__setattr__(self, 'matmul_rules', rules)
    object.__setattr__(self, 'matmul_exempt', exempt)
    for pattern, _ in rules:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f'matmul_rules: {pattern!r} is no regular expression: {error}'
        ) from error
    for name in (self.matmul, self.matmul_head, *(name for _, name in rules)):
      lowbit.recipe(name)  # raises where there is none
    lowbit.flow(self.flow)  # as well
    if lowbit.recipe(self.matmul_head).weights != 'none':
      raise ValueError(
        f'matmul_head={self.matmul_head!r} stores weights in few bits, which '
        'the head cannot do: give it another recipe'
      )

  def recipe_of(self, path: str) -> str:
    """The name of the recipe of a linear, by its path ('mlp/down')."""
    for pattern, name in self.matmul_rules:
      if re.search(pattern, path):
        return name
    return self.matmul

  def stored_format(self, path: str) -> str:
    """How a parameter of the layers is stored ('mlp/down/kernel')."""
    linear, _, leaf = path.rpartition('/')
    if leaf != 'kernel':
      return 'none'
    return lowbit.recipe(self.recipe_of(linear)).weights

  @property
  def flow(self) -> str:
    """The name of what norms and the activation function do."""
    if self.activations != 'recipe':
      return self.activations
    return lowbit.recipe(self.matmul).flow

  @property
  def d_head(self) -> int:
    """Width of one head: `head_dim`, or `dim / n_heads` where that is None."""
    return self.head_dim or self.dim // self.n_heads


_INTEGERS = (
  'vocab_size',
  'dim',
  'n_layers',
  'n_heads',
  'n_kv_heads',
  'ffn',
  'max_positions',
)


def _check_positive(name, value, kind):
  # bool is an Integral: n_layers=True is a slip, not one layer.
  if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
    noun = 'integer' if kind is numbers.Integral else 'number'
    raise ValueError(f'{name}={value!r} must be a positive {noun}.')


def _dtype_name(field, value) -> str:
  try:
    name = jnp.dtype(value).name
  except TypeError:
    name = value
  if name not in DTYPES:
    raise names.unknown(field, name, DTYPES)
  return name


def _mha(dim, ffn, heads, layers, vocab_size=32000):
  return dict(
    vocab_size=vocab_size,
    dim=dim,
    ffn=ffn,
    n_heads=heads,
    n_kv_heads=heads,
    n_layers=layers,
  )


_SIZES = {
  'tiny': {**_mha(128, 352, 4, 6, vocab_size=320), 'n_kv_heads': 2},
  '10m': _mha(256, 688, 4, 12),
  '60m': _mha(512, 1376, 8, 8),
  '130m': _mha(768, 2048, 12, 12),
  '350m': _mha(1024, 2736, 16, 24),
  '1b': _mha(2048, 5461, 32, 24),
  '3b': _mha(3200, 8640, 32, 26),
  '7b': _mha(4096, 11008, 32, 32),
  '13b': _mha(5120, 13824, 40, 40),
  '70b': {**_mha(8192, 28672, 64, 80), 'n_kv_heads': 8},
}


def config(size: str, **overrides) -> LlamaConfig:
  """The configuration of a named size.

  '60m' to '7b' are the models of the GaLore paper's C4 benchmark, which later
  low-memory optimizers report on; '3b' is OpenLLaMA's, '13b' LLaMA's and '70b'
  LLaMA 2's. These names count every parameter. 'tiny' (1.2 M) reads bytes: 256
  of them and room for special tokens. '10m' has its 10 M in the layers, where
  low-rank and low-bit methods act; the embedding and the head add 16.4 M at a
  vocabulary of 32000, and 0.2 M at one of 320.

  Args:
    size: 'tiny', '10m', '60m', '130m', '350m', '1b', '3b', '7b', '13b', '70b'.
    **overrides: fields of `LlamaConfig` to set otherwise.

  Returns:
    A `LlamaConfig`.

  Raises:
    ValueError: unknown size or field, or a combination that is not valid.

  Examples:
    >>> config('1b').ffn
    5461
    >>> config('60m', dtype='bfloat16', remat='full').remat
    'full'
    >>> config('60mb')
    Traceback (most recent call last):
    ...
    ValueError: unknown size '60mb': did you mean '60m'? ...

  References:
    Zhao et al., GaLore, https://arxiv.org/abs/2403.03507, 2024.
    Geng and Liu, OpenLLaMA,
      https://github.com/openlm-research/open_llama, 2023.
    Touvron et al., Llama 2, https://arxiv.org/abs/2307.09288, 2023.
  """
  if size not in _SIZES:
    raise names.unknown('size', size, _SIZES)
  fields = [field.name for field in dataclasses.fields(LlamaConfig)]
  for name in overrides:
    if name not in fields:
      raise names.unknown('LLaMA field', name, fields)
  return LlamaConfig(**(_SIZES[size] | overrides))
