"""Rotated and rounded copies of an array, from one read of it."""

import dataclasses

import jax
import jax.numpy as jnp

from frugax.kernels import chips, counter
from frugax.kernels.hadamard_quantize import reference, steps, tpu, triton
from frugax.kernels.hadamard_quantize.options import Copy, Rounded


def hadamard_quantize(
  x: jax.Array,
  rows: Copy | str | None = 'int8',
  columns: Copy | str | None = None,
  *,
  key: jax.Array | None = None,
  signs: jax.Array | None = None,
  start: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0, 0),
  width: int | None = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> tuple[Rounded | None, Rounded | None]:
  r"""Rotate by a Hadamard matrix and round, by rows and by columns.

  With :math:`H` the rotation of `frugax.quant.hadamard` along an axis, in
  blocks of up to 128, and Q the rounding to a format,

  .. math::
    y = H x, \qquad q_{ij} = Q(y_{ij} / s_i), \qquad p_{ij} = Q(y_{ij} / t_j)

  The copy by rows, q, is what a forward product multiplies, whose sum is along
  the features; that by columns, p, is what the gradient of the weights
  multiplies, whose sum is along the tokens. Each has a rotation of its own:
  after one along the features both operands of a forward product are in the
  same basis, and after one along the tokens those of a weight gradient.

  A scale of columns depends on all tokens that share it, so they are all
  gathered before the first code can be written. The kernel goes over them
  twice. If they fit into VMEM (bfloat16 of 4096 x 4096 does, on all chips),
  they stay there and x is read from memory once; else it is read twice.
  `Scaling((1, n))` gives each n tokens scales of their own, which always
  fit if n is small: groups of 512 do not slow down a product. On Hopper there
  are two kernels, one for the statistics and one for the codes, of both copies
  each: the second reads x from the cache if it fits there (50 MB).

  Random bits are those of `frugax.quant.random_bits` for the index of the
  element in the whole array: the same for any block size, on any chip, and on
  any mesh if each shard says where it starts. Rotations and statistics are
  those of the array that is given. A code differs from one implementation to
  another only where rounding in the sum of a rotation, or of a statistic,
  decides to which side a number falls.

  Where x is NaN, so are the scales of all that is rotated and scaled with it;
  infinities are clipped to 2^100 before a rotation and saturate without one.
  What is zero stays zero, but for mid-rise numbers, which have none.

  Args:
    x: (..., features), floating-point; the axes before the last are tokens.
      Computed in float32.
    rows: how the copy with a scale a row is rounded: a `Copy`, the name of a
      format, or None for no such copy.
    columns: likewise, with a scale a column.
    key: a typed key, if a copy is rounded stochastically. That by columns takes
      `jax.random.fold_in(key, 1)`.
    signs: a typed key for the signs of rotations that have them.
    start: token and feature at which x starts in the whole array; may be
      traced, as from `jax.lax.axis_index`.
    width: features of the whole array; None is those of x.
    implementation: 'mosaic' (a TPU kernel), 'triton' (kernels for Hopper GPUs),
      'xla', or None for the kernel on TPUs, for those on Hopper (on one device
      or within `jax.shard_map`, and where groups are multiples of 16 tokens, or
      of 128 with a rotation along them), and XLA elsewhere, which a warning of
      the logger 'frugax' says once.
    interpret: run the kernel as plain JAX, on any platform, that of TPUs if no
      other is asked for.

  Returns:
    The copies by rows and by columns, or None for what was not asked for.

  Raises:
    ValueError: an unknown name, a missing key, an array that is empty or not
      floating-point, or what the kernel does not do.

  Examples:
    >>> x = jnp.zeros((2, 128)).at[0, 5].set(64.)
    >>> rows, columns = hadamard_quantize(x, 'int8', 'int4')
    >>> print(rows.codes[:, :7], rows.scales.round(3))
    [[ 127 -127  127 -127 -127  127 -127]
     [   0    0    0    0    0    0    0]] [[0.045]
     [0.   ]]
    >>> columns.codes.dtype.name, columns.scales.shape
    ('int4', (1, 128))

  References:
    Panferov et al., `QuEST: Stable Training of LLMs with 1-Bit Weights and
    Activations <https://arxiv.org/abs/2502.05003>`_, 2025

    Ashkboos et al., `HALO: Hadamard-Assisted Lower-Precision Optimization for
    LLMs <https://arxiv.org/abs/2501.02625>`_, 2025

    NVIDIA, `Pretraining Large Language Models with NVFP4
    <https://arxiv.org/abs/2509.25149>`_, 2025 (a rotation along the tokens)
  """
  rows = Copy(rows) if isinstance(rows, str) else rows
  columns = Copy(columns) if isinstance(columns, str) else columns
  copies = [c for c in (rows, columns) if c]
  _check(x, rows, copies, key, signs)
  shape = x.shape
  if x.dtype != jnp.bfloat16:
    x = x.astype(jnp.float32)
  x = x.reshape(-1, shape[-1])
  flips = _signs(x.shape, copies, signs, start)
  words = _words(copies, key, start, width or shape[-1])
  which = _choose(implementation, interpret, len(x), rows, columns)
  if which == 'xla':
    found = _by_reference(x, rows, columns, flips, words)
  else:
    kernel = tpu if which == 'mosaic' else triton
    found = kernel.copies_of(x, rows, columns, flips, words, interpret)
  by_rows, by_columns = (c and _shaped(c, shape) for c in found)
  return by_rows and _by_rows(by_rows, shape), by_columns


def _choose(implementation, interpret, tokens, rows, columns):
  op = 'hadamard_quantize'
  found = chips.asked(op, implementation, interpret, ('mosaic', 'triton'))
  if found is not None:
    return found
  if chips.tpu():
    return 'mosaic'
  hopper = chips.current() == 'hopper'
  refusal = triton.refusal(tokens, rows, columns) if hopper else None
  if hopper and chips.uncut() and not refusal:
    return 'triton'
  kind = ' and '.join(dict.fromkeys(c.format for c in (rows, columns) if c))
  what = f'copies ({refusal})' if refusal else 'copies'
  chips.say_so(op, kind, chips.here(hopper), what)
  return 'xla'


def _check(x, rows, copies, key, signs):
  if not copies:
    raise ValueError('rows=None and columns=None: ask for one of them')
  if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim or not x.size:
    raise ValueError(
      f'hadamard_quantize takes floating-point arrays of (..., features), not '
      f'{x.dtype}{x.shape}'
    )
  if rows and rows.scaling.tile[1] is not None:
    raise ValueError(
      f'rows with tile={rows.scaling.tile}: groups are for columns; give '
      'tile=(1, None), or see frugax.quant.quantize_tiles'
    )
  if key is None and any(c.stochastic for c in copies):
    raise ValueError('stochastic rounding: give a key (jax.random.key(seed))')
  if signs is None and any(c.signs and c.along != 'none' for c in copies):
    raise ValueError('a rotation with signs: give signs=jax.random.key(seed)')


def _signs(shape, copies, key, start):
  """-1 and 1 for the elements of each axis that is rotated with signs."""
  found = {}
  for axis, along in enumerate(('tokens', 'features')):
    if any(c.signs and c.along == along for c in copies):
      place = jnp.arange(shape[axis], dtype=jnp.uint32)
      place = place + jnp.asarray(start[axis]).astype(jnp.uint32)
      bit = counter.bits(*counter.words(key), place) >> 31
      found[along] = 1 - 2 * bit.astype(jnp.float32)
  return found


def _words(copies, key, start, width):
  if not any(c.stochastic for c in copies):
    return None
  first, second = (counter.words(k) for k in (key, jax.random.fold_in(key, 1)))
  place = [jnp.asarray(n).astype(jnp.uint32) for n in (*start, width)]
  return jnp.stack([*first, *second, *place])


def _by_reference(x, rows, columns, flips, words):
  found = []
  for copy, by_rows in ((rows, True), (columns, False)):
    if copy is None:
      found.append(None)
      continue
    signs = flips.get(copy.along) if copy.signs else None
    random = None
    if copy.stochastic:
      random = steps.bits(words, 0 if by_rows else 2, x.shape)
    found.append(reference.copy_of(x, copy, by_rows, signs, random))
  return found


def _shaped(copy: Rounded, shape):
  """Of all tokens, in the axes that they had."""
  mask = copy.mask
  return dataclasses.replace(
    copy,
    codes=copy.codes.reshape(shape),
    mask=None if mask is None else mask.reshape(*shape[:-1], mask.shape[-1]),
  )


def _by_rows(copy: Rounded, shape):
  """Scales and sums of rows, too."""
  sums, rows = copy.sums, (*shape[:-1], 1)
  return dataclasses.replace(
    copy,
    scales=copy.scales.reshape(rows),
    sums=None if sums is None else sums.reshape(rows),
  )
