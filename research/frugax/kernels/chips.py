"""For which chip a computation is traced, and what computes it there."""

import functools
import logging

import jax
from jax.experimental.pallas import tpu as pltpu

from frugax import names

IMPLEMENTATIONS = ('mosaic', 'xla')

# What each chip multiplies faster, or in fewer bytes, than as bfloat16. 'mixed'
# is bfloat16 times integers. v5e, v5p and v6e widen 8-bit floats to bfloat16;
# tpu7x computes int8 by way of bfloat16, and int4 and float4 as 8-bit floats.
NATIVE = {
  'v4': (),
  'v5e': ('int8', 'int4', 'mixed'),
  'v5p': ('int8', 'int4', 'mixed'),
  'v6e': ('int8', 'int4', 'mixed'),
  'tpu7x': ('int4', 'float8', 'float4', 'mixed'),
}
# What Mosaic compiles, fast or not.
COMPILES = {
  'v4': ('mixed',),
  'v5e': ('int8', 'int4', 'float8', 'mixed'),
  'v5p': ('int8', 'int4', 'float8', 'mixed'),
  'v6e': ('int8', 'int4', 'float8', 'mixed'),
  'tpu7x': ('int8', 'int4', 'float8', 'float4', 'mixed'),
}


def current() -> str | None:
  """The TPU that is traced for, a name in `NATIVE`; None if it is none.

  It is that of the mesh under `jax.set_mesh`, which may consist of devices that
  are only described (`jax.experimental.topologies`), else the default device.
  """
  if not pltpu.is_tpu_device():
    return None
  version = str(pltpu.get_tpu_info().chip_version)
  name = f'tpu{version}' if version[0] != 'v' else version
  return name if name in NATIVE else None


def gains(kind: str) -> bool:
  """Whether a kernel multiplies this kind faster than XLA, and can run here.

  It cannot where XLA would have to cut it over several devices, which it does
  not know how to: on a mesh of several, or without one where there are several,
  unless it is traced inside `jax.shard_map` over all of the mesh's axes.
  """
  chip = current()
  return chip is not None and kind in NATIVE[chip] and uncut()


def uncut() -> bool:
  """Whether what is traced runs on one device, or on a device's own part."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count() == 1
  manual = jax.sharding.AxisType.Manual
  return mesh.size == 1 or all(t == manual for t in mesh.axis_types)


def choose(
  op: str, kind: str, implementation: str | None, interpret: bool
) -> str:
  """Which implementation computes an operation.

  Args:
    op: its name, for messages.
    kind: what it multiplies, as in `NATIVE`.
    implementation: what the caller asks for; None for the best there is.
    interpret: whether Mosaic's kernel shall run as plain JAX.

  Returns:
    A name in `IMPLEMENTATIONS`.

  Raises:
    ValueError: an unknown implementation, or one that does not run here.

  Examples:
    >>> choose('quantized_matmul', 'int8', 'mosaic', interpret=True)
    'mosaic'
    >>> choose('quantized_matmul', 'int8', 'mosiac', interpret=False)
    Traceback (most recent call last):
    ...
    ValueError: unknown implementation 'mosiac': did you mean 'mosaic'? ...
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise names.unknown('implementation', implementation, IMPLEMENTATIONS)
  if interpret:
    if implementation == 'xla':
      raise ValueError(
        "interpret=True with implementation='xla': only a kernel can be "
        "interpreted; give implementation='mosaic' or interpret=False"
      )
    return 'mosaic'
  chip = current()
  if implementation is None:
    if gains(kind):
      return 'mosaic'
    where = chip or 'this platform'
    if chip and kind in NATIVE[chip]:
      where = 'several devices outside of jax.shard_map'
    _say_so(op, kind, where)
    return 'xla'
  if implementation == 'mosaic':
    if chip is None:
      raise ValueError(
        f"{op}: implementation='mosaic' needs a TPU: give interpret=True to "
        'run it elsewhere, or trace it under jax.set_mesh with the devices of '
        'a topology to compile for one'
      )
    if kind not in COMPILES[chip]:
      raise ValueError(
        f"{op}: implementation='mosaic' has no {kind} products for {chip}, "
        f"but {', '.join(COMPILES[chip])}: give implementation='xla'"
      )
  return implementation


@functools.cache
def _say_so(op, kind, where):
  """Once for each of its arguments."""
  logging.getLogger('frugax').warning(
    '%s: %s products are left to XLA on %s', op, kind, where
  )
