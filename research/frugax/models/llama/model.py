"""LLaMA in linen, behind a facade on plain nested dicts."""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from frugax import kernels, lowbit
from frugax.models import losses
from frugax.models.llama import linears
from frugax.models.llama.axes import axes
from frugax.models.llama.config import LlamaConfig
from frugax.models.llama.inputs import check
from frugax.models.llama.linears import Linears, rounding_key
from frugax.models.llama.remat import POLICIES
from frugax.models.llama.rotary import rotate

Params = dict


def _operation(function, key=None):
  del key
  return lambda inputs, others=(): function(*inputs, *others)


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32.

  References:
    Zhang and Sennrich, RMSNorm, https://arxiv.org/abs/1910.07467, 2019.
  """

  config: LlamaConfig
  operation: Callable = _operation  # of inputs, and of others that stay exact

  @nn.compact
  def __call__(self, x):
    config = self.config
    scale = self.param(
      'scale', nn.initializers.ones, x.shape[-1:], jnp.dtype(config.param_dtype)
    )

    def normalize(x, scale):
      x = x.astype(jnp.float32)
      x *= lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
      return (x * scale.astype(jnp.float32)).astype(config.dtype)

    return self.operation(normalize, rounding_key(self))((x,), (scale,))


class Attention(Linears):
  """Causal grouped-query attention with rotary positions."""

  @nn.compact
  def __call__(self, x_BxTxD, segment_ids_BxT, positions):
    config, constrain = self.config, self.constrain
    head_names = ('batch', 'sequence', 'act_heads', 'head_dim')
    kv_names = ('batch', 'kv_sequence', 'act_kv_heads', 'head_dim')
    heads = (config.n_heads, config.d_head)
    kv_heads = (config.n_kv_heads, config.d_head)
    q, k, v = self.linears(x_BxTxD, {'q': heads, 'k': kv_heads, 'v': kv_heads})
    q = constrain(rotate(q, positions, config.rope_theta), head_names)
    k = constrain(rotate(k, positions, config.rope_theta), kv_names)
    v = constrain(v, kv_names)
    mask = None
    if segment_ids_BxT is not None:
      mask = segment_ids_BxT[:, None, :, None] == segment_ids_BxT[:, None, None]
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    if config.remat == 'inputs':
      attend = jax.checkpoint(attend, prevent_cse=False)
    y = attend(q, k, v, mask=mask)
    y = constrain(y, head_names)
    return self.linears(y, {'o': (config.dim,)}, axes=2)[0]


class Mlp(Linears):
  """SwiGLU: `down(silu(gate(x)) * up(x))`."""

  operation: Callable = _operation

  @nn.compact
  def __call__(self, x_BxTxD):
    ffn = (self.config.ffn,)
    gate, up = self.linears(x_BxTxD, {'gate': ffn, 'up': ffn})
    gated = self.operation(lambda g, u: nn.silu(g) * u, rounding_key(self))
    hidden = gated((gate, up))
    hidden = self.constrain(hidden, ('batch', 'sequence', 'act_mlp'))
    return self.linears(hidden, {'down': (self.config.dim,)})[0]


class Block(nn.Module):
  """One layer: attention and MLP, each on a norm and added to the stream."""

  config: LlamaConfig
  product: Callable = linears.plain  # of the paths of linears of one input
  constrain: Callable = linears.identity
  operation: Callable = _operation  # (function, key) -> what norms, SwiGLU call

  @nn.compact
  def __call__(self, x_BxTxD, segment_ids_BxT, positions):
    shared = (self.config, self.product, self.constrain)
    stream = ('batch', 'sequence', 'act_embed')
    y = RMSNorm(self.config, self.operation, name='attn_norm')(x_BxTxD)
    y = Attention(*shared, name='attn')(y, segment_ids_BxT, positions)
    x_BxTxD = self.constrain(x_BxTxD + y, stream)
    y = RMSNorm(self.config, self.operation, name='mlp_norm')(x_BxTxD)
    y = Mlp(*shared, self.operation, name='mlp')(y)
    return self.constrain(x_BxTxD + y, stream)


class Llama:
  """A LLaMA on plain nested dicts: `init`, `apply`, `axes`; and in steps.

    x_0 = embedding[tokens];  x_{l+1} = block_l(x_l);  logits = head(norm(x_L))

  Parameters are one nested dict; the layers are stacked along a leading axis
  and walked by `lax.scan`, so that compile time does not grow with depth:

    embed/embedding                (V, D)
    layers/attn_norm/scale         (L, D)
    layers/attn/{q,k,v}/kernel     (L, D, heads, d_head)
    layers/attn/o/kernel           (L, heads, d_head, D)
    layers/mlp_norm/scale          (L, D)
    layers/mlp/{gate,up}/kernel    (L, D, ffn)
    layers/mlp/down/kernel         (L, ffn, D)
    final_norm/scale               (D,)
    lm_head/kernel                 (D, V), absent where the embedding is tied

  `apply` is `embed`, `block` for each layer and `head` or `head_losses`; a
  caller who must see every layer (to update one at a time inside the backward
  pass, say) walks them himself. `config.remat` acts in `apply` alone, but for
  'inputs', which is a property of the norms, SwiGLU and attention.

  Args:
    config: the shape.
    dot_general: computes the seven linears of a layer, with the signature of
      `jax.lax.dot_general`; None is what the config says of each (`matmul`,
      `matmul_rules`, `matmul_exempt`). The head and the embedding stay out of
      it.
    wrap: called with the path of a linear that a recipe computes, 'attn/q' or
      'lm_head', and with its dot_general; returns the one to be used. Without
      it, those of one input and one recipe (q, k and v; gate and up) round and
      keep it together, see `frugax.lowbit.dot_generals`.
    constrain: called as `constrain(x, names)` on activations, and on the
      embedding before its look-up; returns `x` with a sharding. The model
      knows names, not meshes: 'batch', 'sequence', 'kv_sequence', 'act_embed',
      'act_heads', 'act_kv_heads', 'head_dim', 'act_mlp', 'act_vocab'.
    layout: the mesh, and what its rules make of names, for linears that a
      recipe computes: their weights' axes are named as in `axes`.
    cross_entropy: called as `frugax.kernels.linear_cross_entropy` is.

  Examples:
    >>> from frugax.models import llama
    >>> model = llama.Llama(llama.config('tiny', n_layers=2))
    >>> params = model.init(jax.random.key(0))
    >>> params['layers']['attn']['q']['kernel'].shape
    (2, 128, 4, 32)
    >>> tokens = jnp.arange(8).reshape(1, 8)
    >>> logits = model.apply(params, tokens)
    >>> logits.shape, logits.dtype
    ((1, 8, 320), dtype('float32'))

    The same, layer by layer:

    >>> x = model.embed(params, tokens)
    >>> for i in range(2):
    ...   layer = jax.tree.map(lambda p: p[i], params['layers'])
    ...   x = model.block(layer, x)
    >>> bool(jnp.allclose(model.head(params, x), logits, atol=1e-5))
    True

  References:
    Touvron et al., LLaMA, https://arxiv.org/abs/2302.13971, 2023.
  """

  def __init__(
    self,
    config: LlamaConfig,
    *,
    dot_general: Callable | None = None,
    wrap: Callable | None = None,
    constrain: Callable = linears.identity,
    layout: lowbit.Layout | None = None,
    cross_entropy: Callable = kernels.linear_cross_entropy,
  ):
    product = linears.by_recipe(config, dot_general, wrap, layout)
    self.config = config
    self._constrain = constrain

    def operation(flow, function, key=None):
      if config.remat == 'inputs' and flow == lowbit.Flow():
        function = jax.checkpoint(function, prevent_cse=False)
      return lowbit.keep_in_few_bits(function, flow, key)

    few = functools.partial(operation, lowbit.flow(config.flow))
    self._block = Block(config, product, constrain, few)
    self._exempt = (0, 0) if dot_general else config.matmul_exempt
    as_it_is = functools.partial(operation, lowbit.Flow())
    self._exempt_block = Block(config, linears.plain, constrain, as_it_is)
    self._head = linears.head(config, wrap, layout)
    exact = lowbit.recipe(config.matmul_head) == lowbit.recipe('none')
    self._cross_entropy = cross_entropy if exact and wrap is None else None
    self._norm = RMSNorm(config)
    # Once, here: without it, every eager call would compile the scan anew.
    self._jitted = jax.jit(self._forward)

  def init(self, key: jax.Array) -> Params:
    """Fresh parameters: normal(0, init_std); ones for the norms.

    Args:
      key: a random key. The values depend on it and on the shapes alone, not
        on sharding; in bfloat16 they are the float32 values rounded.

    Returns:
      The nested dict described in the class, in `config.param_dtype`, the
      weights that the recipes store in few bits as QTensors. Under
      `jax.jit` with `out_shardings` each device makes its own part.
    """
    config = self.config
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    normal = linears.normal(config.init_std)
    dtype = jnp.dtype(config.param_dtype)
    x = jnp.zeros((1, 1, config.dim), config.dtype)
    # Shapes do not depend on dot_general, so a plain block stands in: an
    # injected one need not support vmap.
    block = Block(config)

    def init_layer(key):
      return block.init(key, x, None, jnp.arange(1))['params']

    params = {
      'embed': {
        'embedding': normal(embed_key, (config.vocab_size, config.dim), dtype)
      },
      'layers': jax.vmap(init_layer)(
        jax.random.split(layers_key, config.n_layers)
      ),
      'final_norm': {'scale': jnp.ones((config.dim,), dtype)},
    }
    if not config.tie_embeddings:
      shape = (config.dim, config.vocab_size)
      params['lm_head'] = {'kernel': normal(head_key, shape, dtype)}
    params['layers'] = lowbit.store_weights(
      params['layers'], config.stored_format, batch_axes=1
    )
    return params

  def apply(
    self,
    params: Params,
    tokens_BxT: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    key: jax.Array | None = None,
    labels: jax.Array | None = None,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The logits of the next token at every position, or losses.

    Args:
      params: as from `init`.
      tokens_BxT: integers in [0, vocab_size). Beyond it the embedding is NaN,
        and so is the loss: check the data before.
      segment_ids: integers, (B, T): a token attends only to earlier tokens of
        its own segment (packed documents). None: the row is one document.
      positions: integers, (B, T), for rotary. None: 0 to T-1, which also serves
        packed documents, as attention sees differences of positions alone.
      key: for what the recipes round at random, a new one in each step. None:
        random bits follow from the arrays (`frugax.lowbit.dot_general`).
      labels: integers, (B, T): the next tokens, -1 where there is none.

    Returns:
      float32 logits, (B, T, vocab_size). With labels cross entropy in nats and
      log-partitions, (B, T), both 0 where the label is -1, see `head_losses`.

    Raises:
      ValueError: tokens are not integers of rank 2, or the other two do not
        have their shape.
    """
    check(tokens_BxT, segment_ids, positions)
    inputs = params, jnp.asarray(tokens_BxT), segment_ids, positions
    return self._jitted(*inputs, key, labels)

  def _forward(self, params, tokens_BxT, segment_ids, positions, key, labels):
    def walk(x_BxTxD, layers, index):
      def layer(x_BxTxD, layer):
        layer_params, layer_key = layer
        x_BxTxD = self.block(
          layer_params,
          x_BxTxD,
          segment_ids=segment_ids,
          positions=positions,
          index=index,
          key=layer_key,
        )
        return x_BxTxD, None

      if self.config.remat in POLICIES:
        # A scan's body cannot be merged with its forward: no need to forbid it.
        policy = POLICIES[self.config.remat]
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
      return lax.scan(layer, x_BxTxD, layers)[0]

    x_BxTxD = self.embed(params, tokens_BxT)
    layer_keys, head_key = linears.rounding_keys(self.config, key)
    layers = params['layers'], layer_keys
    for start, stop, index in self.segments():
      part = jax.tree.map(lambda p: p[start:stop], layers)  # noqa: B023
      x_BxTxD = walk(x_BxTxD, part, index)
    if labels is not None:
      return self.head_losses(params, x_BxTxD, labels, head_key)
    return self.head(params, x_BxTxD, head_key)

  def segments(self) -> list[tuple[int, int, int | None]]:
    """Runs of layers that compute alike: first, end and `index` of `block`."""
    first, last = self._exempt
    ends = (0, first, self.config.n_layers - last, self.config.n_layers)
    if first >= ends[2]:  # all of them
      ends = (0, ends[-1])
    pairs = [(i, j) for i, j in itertools.pairwise(ends) if i < j]
    return [(i, j, i if self._exempt != (0, 0) else None) for i, j in pairs]

  def embed(self, params: Params, tokens_BxT: jax.Array) -> jax.Array:
    """The residual stream before the first layer, (B, T, dim)."""
    check(tokens_BxT)
    # Rows sharded along their width do not reshard to a sharded batch: XLA
    # would replicate the whole residual stream. Gather the table instead.
    table = self._constrain(
      params['embed']['embedding'], ('act_vocab', 'act_embed')
    )
    x = jnp.take(table, tokens_BxT, axis=0).astype(self.config.dtype)
    return self._constrain(x, ('batch', 'sequence', 'act_embed'))

  def block(
    self,
    layer_params: Params,
    x_BxTxD: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    index: int | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """One layer, without remat of the layer as a whole.

    Args:
      layer_params: `params['layers']` at one index of the leading axis.
      x_BxTxD: the residual stream.
      segment_ids: as in `apply`.
      positions: as in `apply`.
      index: which layer it is, for `config.matmul_exempt`; None for one that is
        not exempt.
      key: of this layer, out of `llama.rounding_keys`; None as in `apply`.

    Returns:
      The residual stream after the layer.
    """
    if positions is None:
      positions = jnp.arange(x_BxTxD.shape[1])
    variables = {'params': lowbit.load_weights(layer_params)}
    first, last = self._exempt
    inner = range(first, self.config.n_layers - last)
    exempt = index is not None and index not in inner
    block = self._exempt_block if exempt else self._block
    rngs = None if key is None else {linears.ROUNDING: key}
    return block.apply(variables, x_BxTxD, segment_ids, positions, rngs=rngs)

  def head(
    self, params: Params, x_BxTxD: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    """Final norm and projection to the vocabulary: float32, (B, T, V)."""
    x, kernel, layout = self._head_operands(params, x_BxTxD)
    logits = self._head(key)(
      x,
      kernel,
      (((2,), (0 if layout == 'NN' else 1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return self._constrain(logits, ('batch', 'sequence', 'act_vocab'))

  def head_losses(
    self,
    params: Params,
    x_BxTxD: jax.Array,
    labels_BxT: jax.Array,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """What `apply` gives for labels, of the stream after the last layer.

    Never are all logits in memory, but with a recipe for the head or a wrap.
    """
    if self._cross_entropy is None:
      logits = self.head(params, x_BxTxD, key)
      return losses.token_losses(logits, labels_BxT)[:2]
    x, kernel, layout = self._head_operands(params, x_BxTxD)
    return self._cross_entropy(
      x, kernel, labels_BxT, layout=layout, return_lse=True
    )

  def _head_operands(self, params, x_BxTxD):
    """Normed x, the head's weights in its dtype, and their layout."""
    x = self._norm.apply({'params': params['final_norm']}, x_BxTxD)
    if self.config.tie_embeddings:
      return x, params['embed']['embedding'].astype(x.dtype), 'NT'
    return x, params['lm_head']['kernel'].astype(x.dtype), 'NN'

  def axes(self) -> Params:
    """The logical axis names of every parameter.

    Returns:
      The structure of `init`; leaves are tuples, one name an axis, out of
      'layers', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'vocab' and
      'norm'. A trainer maps them to mesh axes; an optimizer reads from them
      which axes of a kernel form its matrix.

    Examples:
      >>> from frugax.models import llama
      >>> llama.Llama(llama.config('tiny')).axes()['layers']['mlp']['down']
      {'kernel': ('layers', 'mlp', 'embed')}
    """

    return axes(self.config)


def shapes(config: LlamaConfig) -> Params:
  """The parameters of `Llama(config)` as shapes and dtypes, unallocated.

  All as arrays, those that are stored in few bits as well.
  """
  params = jax.eval_shape(Llama(config).init, jax.random.key(0))
  return jax.eval_shape(lowbit.load_weights, params)
