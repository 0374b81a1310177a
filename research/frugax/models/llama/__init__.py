"""LLaMA: configuration, the model, its cost, and Hugging Face folders."""

from frugax.models.llama.config import REMAT, LlamaConfig, config
from frugax.models.llama.cost import flops_per_token, param_count
from frugax.models.llama.hf import from_hf, read_config, to_hf
from frugax.models.llama.linears import rounding_keys
from frugax.models.llama.model import Llama

__all__ = [
  'REMAT',
  'Llama',
  'LlamaConfig',
  'config',
  'flops_per_token',
  'from_hf',
  'param_count',
  'read_config',
  'rounding_keys',
  'to_hf',
]
