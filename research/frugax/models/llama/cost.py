"""What a LLaMA costs: parameters and floating-point operations."""

import math

import jax

from frugax.models.llama import model
from frugax.models.llama.config import LlamaConfig


def param_count(config: LlamaConfig) -> int:
  """The number of parameters, embedding and head included.

  Counted from the shapes that `Llama.init` returns; nothing is allocated.

  Args:
    config: the model.

  Returns:
    The count; a tied head counts once, with the embedding.

  Examples:
    >>> from frugax.models import llama
    >>> llama.param_count(llama.config('60m'))
    58073600
  """
  return sum(
    math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes(config))
  )


def flops_per_token(config: LlamaConfig, sequence_length: int) -> int:
  """Floating-point operations of one training step, per token.

  Model FLOPs, the numerator of model-FLOPs utilisation: the matmuls of one
  forward and one backward pass, a multiply and an add counted as two,

    6 * N + 12 * n_layers * n_heads * d_head * sequence_length

  with N the weights that multiply (linears and head; neither norms nor the
  embedding's look-up). The second term is attention's scores and weighted sum
  over the WHOLE sequence: the half that causality masks is counted, as in
  PaLM's appendix B, so that numbers compare. Recomputation (`remat`) is not
  counted: the same model on the same tokens costs the same.

  Args:
    config: the model.
    sequence_length: tokens in a sequence.

  Returns:
    FLOPs per token; times tokens per second, over the chips' peak, is the
    utilisation.

  Examples:
    >>> from frugax.models import llama
    >>> llama.flops_per_token(llama.config('7b'), 2048) / 1e9
    42.8...

  References:
    Chowdhery et al., PaLM, appendix B, https://arxiv.org/abs/2204.02311, 2022.
  """
  shapes = model.shapes(config)
  if config.tie_embeddings:
    shapes['lm_head'] = {'kernel': shapes['embed']['embedding']}
  weights = sum(
    math.prod(leaf.shape)
    for path, leaf in jax.tree.leaves_with_path(shapes)
    if path[-1].key == 'kernel'
  )
  width = config.n_heads * config.d_head
  return 6 * weights + 12 * config.n_layers * width * sequence_length
