"""The codes of a matrix whose scales are known, or of its transpose."""

import jax
import jax.numpy as jnp

from frugax import names
from frugax.kernels import chips, counter
from frugax.kernels.codes import FORMATS
from frugax.kernels.encode import reference, triton
from frugax.quant import element


def encode(
  x: jax.Array,
  steps: jax.Array,
  format: str = 'int8',
  *,
  turned: bool = False,
  key: jax.Array | None = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Round to codes that are multiplied, from one read of the matrix.

  The codes are those of `frugax.quant.quantize_tiles` with the same scales and
  key, of x or of its transpose, but that the kernel multiplies by 1 / step
  where that divides: where x / step is half-way between two numbers to within a
  last bit, it may take the other one.

  `implementation=None` takes the kernel on Hopper (H100, H200), on one device
  or within `jax.shard_map`, else XLA, which a warning of the logger 'frugax'
  says once. XLA takes an H200 1.2 to 1.5 times as long, and two to three times
  for transposes of 8-bit floats or with random bits (`studies/bench_gpu.log`).

  Args:
    x: (rows, columns), bfloat16 or float32.
    steps: float32, of each row of the codes, (rows, 1), or with `turned`
      (columns, 1); or (1, 1).
    format: one whose codes are numbers that a chip multiplies: 'int2' to
      'int8', 'ternary', 'rise1' to 'rise8', 'fp8_e4m3' or 'fp8_e5m2'.
    turned: whether the codes are those of the transpose, (columns, rows).
    key: a typed key, for stochastic rounding; None rounds to nearest. The bits
      depend on a code's index alone, which ends at 2^32.
    implementation: 'triton' (Hopper), 'xla', or None.
    interpret: run the kernel as plain JAX, on any platform.

  Returns:
    (rows, columns) or (columns, rows), int8 or an 8-bit float.

  Raises:
    ValueError: an unknown format, shapes or dtypes that do not fit, or an
      implementation that is unknown or does not run here.

  Examples:
    >>> x = jnp.array([[1., 2.6, -9.], [254., 127., 0.]])
    >>> print(encode(x, jnp.array([[1.], [2.]])))
    [[  1   3  -9]
     [127  64   0]]
    >>> print(encode(x, jnp.array([[1.]]), 'int2', turned=True))
    [[ 1  1]
     [ 1  1]
     [-1  0]]
  """
  if format not in FORMATS:
    raise names.unknown('format', format, FORMATS)
  if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float32) or not x.size:
    raise ValueError(
      f'x of {x.dtype}{x.shape}: give a matrix of bfloat16 or float32'
    )
  rows = x.shape[1 if turned else 0]
  if steps.shape not in ((rows, 1), (1, 1)) or steps.dtype != jnp.float32:
    raise ValueError(
      f'steps of {steps.dtype}{steps.shape} for {rows} rows of codes: give '
      f'float32 of ({rows}, 1) or (1, 1)'
    )
  if key is not None and x.size > 2**32:
    raise ValueError(
      f'{x.size} elements with a key: random bits repeat after 2^32; give '
      'parts, or see frugax.quant.quantize_tiles'
    )
  which = chips.asked('encode', implementation, interpret, ('triton',))
  if which is None:
    which = 'triton' if gains() else 'xla'
    if which == 'xla':
      where = chips.here(chips.current() == 'hopper')
      chips.say_so('encode', format, where, 'codes')
  if which == 'xla':
    return reference.encode(x, steps, element(format), turned, key)
  words = None if key is None else jnp.stack(counter.words(key))
  return triton.encode(x, steps, element(format), turned, words, interpret)


def gains() -> bool:
  """Whether the kernel runs here and is faster than XLA."""
  return chips.current() == 'hopper' and chips.uncut()
