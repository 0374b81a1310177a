"""What chips have and how fast they are at best: public figures."""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as JAX counts them; of tpu7x it is half a chip.

  Attributes:
    name: its name in a topology.
    memory: bytes that programs can have of its memory; 0 if it is not known.
    flops: kind of operands (bfloat16, float32, int8, int4, float8) -> peak
      operations per second of matrix products, a multiply and an add being two.
    bandwidth: bytes per second from its memory.
    link: bytes per second that it sends to its neighbours along one axis of
      the mesh, while it receives as many.
  """

  name: str
  memory: int
  flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
  bandwidth: float = 0.0
  link: float = 0.0


def _tpu(name, gib, bf16, int8, int4, float8, bandwidth, link):
  # Default precision: a float32 product is one of bfloat16.
  flops = {'bfloat16': bf16, 'float32': bf16}
  flops |= {'int8': int8 or bf16, 'int4': int4 or bf16, 'float8': float8}
  return Chip(name, int(gib * GIB), flops, bandwidth, link)


# Memory of TPUs: what their compiler says is available ('exceeds available
# HBM'), libtpu 0.0.42. Rates: cloud.google.com/tpu/docs, system architecture of
# each generation, and for few bits jax.experimental.pallas.tpu.TpuInfo. A link
# is both directions of one axis of the torus, as in
# https://jax-ml.github.io/scaling-book/tpus (2025): 2 x 4.5e10 on v4 and v5e,
# 2 x 9e10 on v5p and v6e; of tpu7x a sixth of a chip's 1.2e12.
# GPUs: nvidia.com/en-us/data-center/h100 and h200 (SXM, dense, float32 as
# TF32); NVLink 900e9 both ways together.
_HOPPER = {
  'bfloat16': 989e12,
  'float32': 494e12,
  'int8': 1979e12,
  'int4': 1979e12,  # computed as int8
  'float8': 1979e12,
}
CHIPS = {
  chip.name: chip
  for chip in (
    _tpu('v4', 30.75, 275e12, 0, 0, 275e12, 1228e9, 9e10),
    _tpu('v5e', 15.75, 197e12, 394e12, 788e12, 197e12, 819e9, 9e10),
    _tpu('v5p', 95.74, 459e12, 918e12, 1836e12, 459e12, 2765e9, 1.8e11),
    _tpu('v6e', 31.25, 918e12, 1836e12, 3672e12, 918e12, 1640e9, 1.8e11),
    _tpu('tpu7x', 94.75, 1153e12, 0, 2307e12, 2307e12, 3690e9, 2e11),
    Chip('h100', 85_520_809_984, _HOPPER, 3.35e12, 4.5e11),
    Chip('h200', 150_754_820_096, _HOPPER, 4.8e12, 4.5e11),
  )
}
