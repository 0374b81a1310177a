"""Collectives that carry few bits, for parameters sharded within shard_map."""

from frugax.kernels.collectives.api import (
  all_gather,
  gather_codes,
  reduce_scatter,
)

__all__ = ['all_gather', 'gather_codes', 'reduce_scatter']
