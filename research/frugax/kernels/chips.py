"""For which chip a computation is traced, and what computes it there."""

import functools
import logging
import re

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.extend import backend

from frugax import names

KERNELS = ('mosaic', 'triton', 'mosaic_gpu')

# What each chip multiplies faster, or in fewer bytes, than as bfloat16. 'mixed'
# is bfloat16 times integers. v5e, v5p and v6e widen 8-bit floats to bfloat16;
# tpu7x computes int8 by way of bfloat16, and int4 and float4 as 8-bit floats;
# Hopper (H100, H200) computes int4 as int8. 'bfloat16' itself is here where a
# kernel saves its results from memory, as that of the loss does.
NATIVE = {
  'v4': (),
  'v5e': ('int8', 'int4', 'mixed', 'bfloat16'),
  'v5p': ('int8', 'int4', 'mixed', 'bfloat16'),
  'v6e': ('int8', 'int4', 'mixed', 'bfloat16'),
  'tpu7x': ('int4', 'float8', 'float4', 'mixed', 'bfloat16'),
  'hopper': ('int8', 'int4', 'float8', 'bfloat16'),
}
_MOSAIC = ('int8', 'int4', 'float8', 'mixed', 'bfloat16', 'float32')
# What kernels compile for a chip, fast or not. The first that can is taken.
COMPILES = {
  'v4': {'mosaic': ('mixed',)},
  'v5e': {'mosaic': _MOSAIC},
  'v5p': {'mosaic': _MOSAIC},
  'v6e': {'mosaic': _MOSAIC},
  'tpu7x': {'mosaic': (*_MOSAIC, 'float4')},
  'hopper': {
    'mosaic_gpu': ('int8', 'int4', 'float8'),
    'triton': ('int8', 'int4', 'mixed', 'bfloat16', 'float32'),
  },
}
_NEEDS = {
  'mosaic': 'a TPU',
  'triton': 'a GPU of the Hopper kind (H100, H200)',
  'mosaic_gpu': 'a GPU of the Hopper kind (H100, H200)',
}
# A device that is only described has a name and no compute capability.
_HOPPER = re.compile(r'\bG?H(100|200|800|20)\b')


def current() -> str | None:
  """The chip that is traced for, a name in `NATIVE`; None if it is none.

  It is that of the mesh under `jax.set_mesh`, which may consist of devices that
  are only described (`jax.experimental.topologies`), else the default device.
  """
  return tpu() or ('hopper' if _hopper() else None)


def tpu() -> str | None:
  """As `current`, of TPUs alone."""
  if not pltpu.is_tpu_device():
    return None
  version = str(pltpu.get_tpu_info().chip_version)
  name = f'tpu{version}' if version[0] != 'v' else version
  return name if name in NATIVE else None


def _hopper():
  described = jax.sharding.get_abstract_mesh().abstract_device
  if described is not None:
    name = described.device_kind
    return described.platform == 'gpu' and bool(_HOPPER.search(name))
  device = backend.get_default_device()
  return getattr(device, 'compute_capability', None) == '9.0'


def halves() -> bool:
  """Whether the vector unit of the chip calculates with integers of 16 bits."""
  return tpu() in ('v6e', 'tpu7x')


def gains(kind: str) -> bool:
  """Whether a kernel multiplies this kind faster than XLA, and can run here.

  It cannot where XLA would have to cut it over several devices, which it does
  not know how to: on a mesh of several, or without one where there are several,
  unless it is traced inside `jax.shard_map` over all of the mesh's axes, as
  `frugax.lowbit` does where it is told how arrays are cut. Elsewhere XLA
  multiplies the codes: on TPUs int8 and 8-bit floats as they are, int4 as int8.
  (`custom_partitioning` would tell XLA how, but when the compiler of TPUs
  works for described devices it does not find what that calls.)
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


def takes(op: str, kind: str) -> bool:
  """As `gains`; where no kernel does, it is said that XLA multiplies instead.

  Args:
    op: the operation's name, for the message.
    kind: what it multiplies, as in `NATIVE`.
  """
  if gains(kind):
    return True
  say_so(op, kind, here(kind in NATIVE.get(current(), ())))
  return False


def asked(
  op: str,
  implementation: str | None,
  interpret: bool,
  kernels: tuple[str, ...] = KERNELS,
) -> str | None:
  """The implementation that is asked for, if it can be had here.

  Args:
    op: the operation's name, for messages.
    implementation: as the caller gave it.
    interpret: whether the kernel shall run as plain JAX.
    kernels: what the operation has beside 'xla'; the first is interpreted if no
      other is asked for.

  Returns:
    A name; None for the best there is.

  Raises:
    ValueError: an unknown implementation, or one that does not run here.

  Examples:
    >>> asked('encode', None, True, ('triton',))
    'triton'
    >>> asked('quantized_matmul', 'mosiac', False)
    Traceback (most recent call last):
    ...
    ValueError: unknown implementation 'mosiac': did you mean 'mosaic'? ...
  """
  if implementation not in (None, *kernels, 'xla'):
    raise names.unknown('implementation', implementation, (*kernels, 'xla'))
  if interpret and implementation == 'xla':
    raise ValueError(
      "interpret=True with implementation='xla': only a kernel can be "
      f'interpreted; give implementation={kernels[0]!r} or interpret=False'
    )
  if interpret:
    return implementation or kernels[0]
  if implementation not in (None, 'xla', *COMPILES.get(current(), ())):
    raise ValueError(
      f'{op}: implementation={implementation!r} needs '
      f'{_NEEDS[implementation]}: give interpret=True to run it elsewhere, '
      'or trace it under jax.set_mesh with the devices of a topology to '
      'compile for one'
    )
  return implementation


def choose(
  op: str, kind: str, implementation: str | None, interpret: bool
) -> str:
  """Which implementation computes products.

  Args:
    op: the operation's name, for messages.
    kind: what it multiplies, as in `NATIVE`.
    implementation: what the caller asks for; None for the best there is.
    interpret: whether the kernel shall run as plain JAX, that of TPUs if no
      other is asked for.

  Returns:
    A name in `KERNELS`, or 'xla'.

  Raises:
    ValueError: an unknown implementation, or one that does not run here.

  Examples:
    >>> choose('quantized_matmul', 'int8', 'triton', interpret=True)
    'triton'
  """
  chip = current()
  implementation = asked(op, implementation, interpret)
  if implementation is None:
    if not takes(op, kind):
      return 'xla'
    kernels = COMPILES[chip].items()
    return next(name for name, kinds in kernels if kind in kinds)
  if interpret:
    chip = 'tpu7x' if implementation == 'mosaic' else 'hopper'
  if implementation != 'xla':
    kinds = COMPILES[chip][implementation]
    if kind not in kinds:
      raise ValueError(
        f'{op}: implementation={implementation!r} has no {kind} products for '
        f"{chip}, but {', '.join(kinds)}: give implementation='xla'"
      )
  return implementation


def here(kernel: bool) -> str:
  """Where XLA computes in place of a kernel, in words.

  Args:
    kernel: whether the chip has one that is faster.
  """
  if kernel and not uncut():
    return 'several devices outside of jax.shard_map'
  return current() or 'this platform'


@functools.cache
def say_so(op: str, kind: str, where: str, what: str = 'products') -> None:
  """That XLA computes it, once for each of these arguments."""
  logging.getLogger('frugax').warning(
    '%s: %s %s are left to XLA on %s', op, kind, what, where
  )
