"""`encode` for GPUs, by Triton."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from frugax.kernels import blocks as tables
from frugax.kernels import counter, products
from frugax.kernels.codes import coded, nearest
from frugax.quant import Element


class _Plan(NamedTuple):
  """All that is static.

  Attributes:
    size: of x.
    blocks: of x that a program has.
    turned: whether codes are written as the transpose.
    each: whether a row of the codes has a step of its own.
    element: the format.
  """

  size: tuple[int, int]
  blocks: tables.EncodeBlocks
  turned: bool
  each: bool
  element: Element


def encode(
  x: jax.Array,
  steps: jax.Array,
  element: Element,
  turned: bool,
  words: jax.Array | None,
  interpret: bool = False,
) -> jax.Array:
  """See `frugax.kernels.encode`.

  Args:
    x: (rows, columns).
    steps: (rows of the codes, 1) or (1, 1).
    element: the format.
    turned: whether the codes are those of the transpose.
    words: uint32, (2,), from `counter.words`; None rounds to nearest.
    interpret: run as plain JAX.

  Returns:
    The codes.
  """
  plan = _Plan(
    x.shape, tables.gpu_encode(turned), turned, steps.shape[0] > 1, element
  )
  rows, columns = plan.blocks[:2]
  counts = pl.cdiv(x.shape[0], rows), pl.cdiv(x.shape[1], columns)
  inverse = (1 / steps).reshape(-1)
  if not plan.each:
    spec = pl.BlockSpec((1,), lambda i, j: (0,))
  elif turned:
    inverse = products.pad(inverse, 0, counts[1] * columns)
    spec = pl.BlockSpec((columns,), lambda i, j: (j,))
  else:
    inverse = products.pad(inverse, 0, counts[0] * rows)
    spec = pl.BlockSpec((rows,), lambda i, j: (i,))
  given = [x, inverse]
  specs = [pl.BlockSpec((rows, columns), lambda i, j: (i, j)), spec]
  if words is not None:
    given.append(words)
    specs.append(pl.BlockSpec(words.shape, lambda i, j: (0,)))
  out = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
  if turned:
    out = pl.BlockSpec((columns, rows), lambda i, j: (j, i))
  codes = jax.ShapeDtypeStruct(
    x.shape[::-1] if turned else x.shape,
    element.dtype,
    manual_axis_type=jax.typeof(x).manual_axis_type,
  )
  return pl.pallas_call(
    functools.partial(_kernel, plan),
    grid=counts,
    in_specs=specs,
    out_specs=out,
    out_shape=codes,
    cost_estimate=products.rounding_cost(x.size, 1, 0, [*given, codes]),
    compiler_params=pltriton.CompilerParams(
      num_warps=plan.blocks.warps, num_stages=1
    ),
    interpret=interpret,
    name='encode_turned' if turned else 'encode',
  )(*given)


def _kernel(plan, x, inverse, *refs):
  *words, out = refs
  inside, places = None, []
  for axis, (size, block) in enumerate(
    zip(plan.size, plan.blocks[:2], strict=True)
  ):
    index = jax.lax.broadcasted_iota(jnp.int32, plan.blocks[:2], axis)
    index = pl.program_id(axis) * block + index
    places.append(index.astype(jnp.uint32))
    if size % block:
      within = index < size
      inside = within if inside is None else inside & within
  t = x[...] if inside is None else pltriton.load(x, mask=inside, other=0.0)
  factor = inverse[...]
  factor = jnp.expand_dims(factor, 0 if plan.turned else 1)
  t = t.astype(jnp.float32) * factor
  random = None
  if words:
    major, minor = places[::-1] if plan.turned else places
    index = major * jnp.uint32(plan.size[0 if plan.turned else 1]) + minor
    random = counter.bits(words[0][0], words[0][1], index)
  y = coded(plan.element, t, random, nearest)
  if y.dtype == jnp.float32:
    y = y.astype(jnp.int32)
  y = y.astype(out.dtype)
  if plan.turned:
    y = y.T
    inside = None if inside is None else inside.T
  pltriton.store(out, y, mask=inside)
