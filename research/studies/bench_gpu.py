"""Products of few bits on an H100 or H200, checked and timed.

    python research/studies/bench_gpu.py          # with such a GPU
    python research/studies/bench_gpu.py --tiny   # anywhere, of no meaning

No figures have been recorded yet: there was no GPU at hand. What is to be seen:
int8 and 8-bit floats at 8192^3 in at most 1/1.5 of the time of XLA's bfloat16
product, a linear layer that rounds its bfloat16 operands in 1/1.3 forward and
1/1.25 forward and backward.

Each way of computing a product is called in an order drawn anew for each round;
a ratio is that of the medians of one run, bfloat16 by XLA over it. The products
of a layer are compared with those of the same layer in bfloat16.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from frugax import kernels, lowbit

# Rows, columns and contracted elements: a cube, and LLaMA-7b's linears.
SHAPES = [
  (8192, 8192, 8192),
  (8192, 4096, 4096),
  (8192, 11008, 4096),
  (8192, 4096, 11008),
]
CODES = [('int8', 'triton'), ('int8', 'mosaic_gpu')] + [
  (dtype, 'mosaic_gpu') for dtype in ('float8_e4m3fn', 'float8_e5m2')
]
RECIPES = ('int8', 'fp8')


def operands(m, n, k):
  a, b = jax.random.key(0), jax.random.key(1)
  return jax.random.normal(a, (m, k)), jax.random.normal(b, (n, k))


def codes(x, dtype):
  """As a recipe would have rounded it, but for the scale."""
  if dtype == 'int8':
    return jnp.clip(jnp.round(x * 32), -127, 127).astype(jnp.int8)
  return x.astype(dtype)


def products(shape, interpret):
  """Functions and arguments: XLA's bfloat16, and the kernels."""
  x, w = operands(*shape)
  scales = jnp.full(shape[0], 2.0**-10), jnp.ones(shape[1])
  wide = [v.astype(jnp.bfloat16) for v in (x, w)]
  yield 'bfloat16, XLA', jax.jit(lambda a, b: a @ b.T), wide, None
  for dtype, name in CODES:
    product = functools.partial(
      kernels.quantized_matmul, layout='NT', dtype=jnp.bfloat16
    )
    arguments = [*(codes(v, dtype) for v in (x, w)), *scales]
    kernel = functools.partial(
      product, implementation=name, interpret=interpret
    )
    twin = jax.jit(functools.partial(product, implementation='xla'))
    yield f'{dtype}, {name}', jax.jit(kernel), arguments, twin


def linears(backward):
  """A layer's product, from bfloat16, by recipe."""
  dims = (((1,), (1,)), ((), ()))

  def run(dot, x, w):
    if not backward:
      return dot(x, w, dims)
    y, pull = jax.vjp(lambda x, w: dot(x, w, dims), x, w)
    return pull(y)

  yield 'bfloat16, XLA', jax.jit(functools.partial(run, jax.lax.dot_general))
  for name in RECIPES:
    dot = lowbit.dot_general(lowbit.recipe(name))
    yield f'recipe {name}', jax.jit(functools.partial(run, dot))


def difference(got, want):
  """The largest, over the largest magnitude."""
  got, want = (v.astype(jnp.float32) for v in (got, want))
  return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def medians(runs, rounds, calls):
  """Seconds of a call of each."""
  times = [[] for _ in runs]
  draw = np.random.default_rng(0)
  for fn, arguments in runs:
    jax.block_until_ready(fn(*arguments))
  for _ in range(rounds):
    for i in draw.permutation(len(runs)):
      fn, arguments = runs[i]
      start = time.perf_counter()
      for _ in range(calls):
        out = fn(*arguments)
      jax.block_until_ready(out)
      times[i].append((time.perf_counter() - start) / calls)
  return np.median(times, axis=1)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--calls', type=int, default=10)
  parser.add_argument('--tiny', action='store_true')
  args = parser.parse_args()
  shapes = [(40, 130, 200)] if args.tiny else SHAPES
  rounds, calls = (1, 1) if args.tiny else (args.rounds, args.calls)
  rows = []
  for shape in shapes:
    found = list(products(shape, args.tiny))
    for name, fn, arguments, twin in found:
      if twin is not None:
        off = difference(fn(*arguments), twin(*arguments))
        print(f'{shape} {name}: off by {off:.1e} of the largest')
        # A rounding to bfloat16, and the 14 bits of sums of 8-bit floats.
        assert off <= (0 if name.startswith('int8') else 2.0**-7), name
    runs = [(fn, arguments) for _, fn, arguments, _ in found]
    seconds = medians(runs, rounds, calls)
    rows += [
      (shape, 'product', r[0], s, seconds[0] / s)
      for r, s in zip(found, seconds, strict=True)
    ]
    x, w = (v.astype(jnp.bfloat16) for v in operands(*shape))
    for backward in (False, True):
      found = list(linears(backward))
      seconds = medians([(fn, (x, w)) for _, fn in found], rounds, calls)
      what = 'forward and backward' if backward else 'forward'
      rows += [
        (shape, what, r[0], s, seconds[0] / s)
        for r, s in zip(found, seconds, strict=True)
      ]
  print(f'\n{jax.devices()[0].device_kind}, jax {jax.__version__}')
  print('| rows, columns, contracted | what | how | ms | speed-up |')
  print('| --- | --- | --- | --- | --- |')
  for shape, what, how, s, ratio in rows:
    size = ' x '.join(map(str, shape))
    print(f'| {size} | {what} | {how} | {1e3 * s:.3f} | {ratio:.2f} |')


if __name__ == '__main__':
  main()
