"""`linear_cross_entropy` for TPUs, by Mosaic: logits live in VMEM alone."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from frugax.kernels import blocks as tables
from frugax.kernels import products
from frugax.kernels.linear_cross_entropy import reference

_LANES = 128
# Of logits that are not there: finite, so that differences of them are, too.
_NONE = -1e30


def forward(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  axis: int,
  softcap: float | None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As `reference.forward`, of x (N, D) and labels (N,).

  The grid runs over rows and, faster, over the vocabulary. Each lane has a
  largest logit and a sum of its own, which are brought together at the end: no
  step compares lanes.
  """
  n, d, vocabulary = *x.shape, w.shape[axis]
  blocks = tables.cross_entropy(d, x.dtype.itemsize)
  (bm, i_count), (bn, j_count) = (
    products.fit(size, block)
    for size, block in zip((n, vocabulary), blocks, strict=True)
  )
  row = pl.BlockSpec((bm, 1), lambda i, j: (i, 0))
  out = jax.ShapeDtypeStruct((n, 1), jnp.float32)
  lse, at = pl.pallas_call(
    functools.partial(_forward, axis, softcap, vocabulary),
    grid=(i_count, j_count),
    in_specs=[
      pl.BlockSpec((bm, d), lambda i, j: (i, 0)),
      _of_weights(axis, d, bn, lambda i, j: j),
      row,
    ],
    out_specs=[row, row],
    out_shape=[out, out],
    scratch_shapes=[pltpu.VMEM((bm, _LANES), jnp.float32)] * 3,
    compiler_params=_params(),
    cost_estimate=products.cost(n, vocabulary, d, [x, w], n * vocabulary),
    interpret=interpret,
    name='linear_cross_entropy',
  )(x, w, labels[:, None])
  return lse[:, 0], at[:, 0]


def _forward(axis, softcap, vocabulary, x, w, labels, lse, at, *scratch):
  j, last = pl.program_id(1), pl.num_programs(1) - 1
  bn = w.shape[axis]
  top, total, hit = scratch

  @pl.when(j == 0)
  def _():
    top[...] = jnp.full_like(top, _NONE)
    total[...] = jnp.zeros_like(total)
    hit[...] = jnp.zeros_like(hit)

  z = reference.logits(x[...], w[...], axis, softcap)
  column = j * bn + lax.broadcasted_iota(jnp.int32, z.shape, 1)
  if vocabulary % bn:
    z = jnp.where(column < vocabulary, z, _NONE)
  at_label = jnp.where(column == labels[...], z, 0.0)
  lanes = [slice(k, k + _LANES) for k in range(0, bn, _LANES)]
  old = top[...]
  new = functools.reduce(jnp.maximum, [z[:, k] for k in lanes], old)
  total[...] = sum(
    (jnp.exp(z[:, k] - new) for k in lanes), total[...] * jnp.exp(old - new)
  )
  hit[...] = sum((at_label[:, k] for k in lanes), hit[...])
  top[...] = new

  @pl.when(j == last)
  def _():
    most = jnp.max(top[...], 1, keepdims=True)
    sums = jnp.sum(total[...] * jnp.exp(top[...] - most), 1, keepdims=True)
    lse[...] = most + jnp.log(sums)
    at[...] = jnp.sum(hit[...], 1, keepdims=True)


def backward(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  lse: jax.Array,
  g_lse: jax.Array,
  g_at: jax.Array,
  axis: int,
  softcap: float | None,
  filters: tuple[float | None, float | None] = (None, None),
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As `reference.backward`, of x (N, D) and rows of N numbers.

  Two kernels, each of which computes the logits anew: one sums the gradient of
  a block of x over the vocabulary, the other that of a block of w over rows,
  both in float32 in VMEM.
  """
  n, d, vocabulary = *x.shape, w.shape[axis]
  blocks = tables.cross_entropy(d, x.dtype.itemsize, backward=True)
  (bm, i_count), (bn, j_count) = (
    products.fit(size, block)
    for size, block in zip((n, vocabulary), blocks, strict=True)
  )
  # Rows beyond the last one would be summed into the gradient of w.
  x = products.pad(x, 0, bm * i_count)
  columns = [
    products.pad(a[:, None], 0, bm * i_count)
    for a in (labels, lse, g_lse, g_at)
  ]
  shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), w
  dims = (bm, d), (d, bn) if axis else (bn, d)
  grads = []
  for of, (shape, block) in enumerate(zip(shapes, dims, strict=True)):
    # The axis that is summed over runs fastest.
    rows = (lambda i, j: i) if of == 0 else (lambda j, i: i)
    cols = (lambda i, j: j) if of == 0 else (lambda j, i: j)

    def along(own, a):
      return pl.BlockSpec((bm, a), lambda *at: (own(*at), 0))

    specs = [along(rows, d), _of_weights(axis, d, bn, cols)]
    grads.append(
      pl.pallas_call(
        functools.partial(
          _backward, of, axis, softcap, filters[of], vocabulary
        ),
        grid=(i_count, j_count) if of == 0 else (j_count, i_count),
        in_specs=[*specs, *(along(rows, 1) for _ in columns)],
        out_specs=specs[of],
        out_shape=jax.ShapeDtypeStruct(shape.shape, shape.dtype),
        scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
        compiler_params=_params(),
        cost_estimate=products.cost(
          2 * n, vocabulary, d, [x, w, shape], n * vocabulary
        ),
        interpret=interpret,
        name=f'linear_cross_entropy_d{"xw"[of]}',
      )(x, w, *columns)
    )
  return grads[0][:n], grads[1]


def _backward(of, axis, softcap, eps, vocabulary, x, w, *refs):
  labels, lse, g_lse, g_at, out, sums = refs
  step, last = pl.program_id(1), pl.num_programs(1) - 1
  j = pl.program_id(1 - of)
  bn = w.shape[axis]

  @pl.when(step == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  def add(cut, within=None):
    z = reference.logits(x[...], cut, axis, softcap)
    column = j * bn + lax.broadcasted_iota(jnp.int32, z.shape, 1)
    logits = z, column == labels[...], lse[...], g_lse[...], g_at[...]

    def multiply():
      dz = reference.gradient(*logits, softcap)
      if within is not None:
        dz = jnp.where(column < within, dz, 0)
      dz = dz.astype(x.dtype)
      if of == 0:
        sums[...] += reference.dot(dz, cut, (1,), (axis,))
      else:
        pair = (x[...], dz) if axis else (dz, x[...])
        sums[...] += reference.dot(*pair, (0,), (0,))

    if eps is None:
      multiply()
    else:
      pl.when(reference.peak(*logits) >= eps)(multiply)

  if vocabulary % bn:
    # What lies beyond the end of w may be no number.
    @pl.when(j == vocabulary // bn)
    def _():
      index = lax.broadcasted_iota(jnp.int32, w.shape, axis)
      add(jnp.where(index < vocabulary % bn, w[...], 0), vocabulary)

    @pl.when(j < vocabulary // bn)
    def _():
      add(w[...])
  else:
    add(w[...])

  @pl.when(step == last)
  def _():
    out[...] = sums[...].astype(out.dtype)


def _of_weights(axis, d, bn, which):
  if axis:
    return pl.BlockSpec((d, bn), lambda *at: (0, which(*at)))
  return pl.BlockSpec((bn, d), lambda *at: (which(*at), 0))


def _params():
  return pltpu.CompilerParams(
    dimension_semantics=('parallel', 'arbitrary'),
    vmem_limit_bytes=tables.VMEM_LIMIT,
  )
