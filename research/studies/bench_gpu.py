"""What of few bits an H100 or H200 computes, checked and timed.

    python research/studies/bench_gpu.py          # with such a GPU
    python research/studies/bench_gpu.py --tiny   # anywhere, of no meaning

Products of codes with their scales, the codes themselves, linear layers that
round their bfloat16 operands, and the loss without logits. bench_gpu.log has
what was seen. Required at 8192^3, of the time of XLA's bfloat16 product: int8
and 8-bit floats at most 1/1.5, a layer forward 1/1.3, forward and backward
1/1.25.

Each way of computing one thing is called in an order drawn anew for each round;
a ratio is that of the medians of one run, the first way's over each other's.
The products of a layer are compared with those of the same layer in bfloat16.
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
CODES = [
  ('int8', 'int8', 'triton'),
  ('int8', 'int8', 'mosaic_gpu'),
  ('float8_e4m3fn', 'float8_e4m3fn', 'mosaic_gpu'),
  ('float8_e5m2', 'float8_e4m3fn', 'mosaic_gpu'),
]
RECIPES = ('int8', 'fp8')
PARTS = ('products', 'layers', 'codes', 'loss')
# Format, whether of the transpose, whether stochastic.
ROUNDED = [
  ('int8', False, False),
  ('int8', False, True),
  ('int8', True, False),
  ('int8', True, True),
  ('fp8_e4m3', False, False),
  ('fp8_e4m3', True, False),
]
# Tokens, of the vocabulary, and elements of each: LLaMA-7b's head.
HEAD = (8192, 32000, 4096)


def operands(m, n, k):
  a, b = jax.random.key(0), jax.random.key(1)
  return jax.random.normal(a, (m, k)), jax.random.normal(b, (n, k))


def codes(x, dtype):
  """As a recipe would have rounded it, but for the scale."""
  if dtype == 'int8':
    return jnp.clip(jnp.round(x * 32), -127, 127).astype(jnp.int8)
  return x.astype(dtype)


@jax.jit
def widened(x):
  """Exactly; on its own, as XLA takes a product of these for one of codes."""
  return x.astype(jnp.bfloat16)


@jax.jit
def expected(a, b, rows, columns):
  y = jax.lax.dot_general(
    a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )
  return y * rows[:, None] * columns


def products(shape, interpret):
  """Name, function, arguments and the largest difference from the truth."""
  x, w = operands(*shape)
  scales = jnp.full(shape[0], 2.0**-10), jnp.linspace(0.5, 2, shape[1])
  wide = [v.astype(jnp.bfloat16) for v in (x, w)]
  yield 'bfloat16, XLA', jax.jit(lambda a, b: a @ b.T), wide
  for left, right, name in CODES:
    if left != right and jax.__version_info__ < (0, 11):
      continue
    product = functools.partial(
      kernels.quantized_matmul,
      layout='NT',
      dtype=jnp.bfloat16,
      implementation=name,
      interpret=interpret,
    )
    a, b = codes(x, left), codes(w, right)
    fn = jax.jit(product)
    off = difference(
      fn(a, b, *scales), expected(widened(a), widened(b), *scales)
    )
    both = left if left == right else f'{left} x {right}'
    print(f'{shape} {both}, {name}: off by {off:.1e} of the largest')
    # A rounding to bfloat16, and some 14 bits of sums of 8-bit floats.
    assert off <= 2.0**-8 + 2.0**-12, name
    yield f'{both}, {name}', fn, (a, b, *scales)


def rounded(shape, interpret):
  """The codes of a matrix whose scales are known."""
  x = operands(shape[0], 1, shape[2])[0].astype(jnp.bfloat16)
  key = jax.random.key(5)
  for format, turned, stochastic in ROUNDED:
    rows = x.shape[1 if turned else 0]
    steps = jnp.full((rows, 1), 2.0**-5)
    what = ' of the transpose' * turned + ', stochastic' * stochastic
    found = []
    for name in ('xla', 'triton'):
      fn = functools.partial(
        kernels.encode,
        format=format,
        turned=turned,
        key=key if stochastic else None,
        implementation=name,
        interpret=interpret and name == 'triton',
      )
      found.append((f'{format}{what}, {name}', jax.jit(fn), (x, steps)))
    one, other = (fn(*arguments) for _, fn, arguments in found)
    assert (one.astype('f') == other.astype('f')).all(), what
    yield found


def losses(size, interpret):
  """Forward and backward."""
  n, vocabulary, d = size
  x, w = (v.astype(jnp.bfloat16) for v in operands(n, vocabulary, d))
  w = w / d**0.5
  labels = jnp.arange(n) * 7919 % vocabulary
  for name in ('xla', 'triton'):

    def total(x, w, name=name):
      return kernels.linear_cross_entropy(
        x,
        w,
        labels,
        layout='NT',
        implementation=name,
        interpret=interpret and name == 'triton',
      ).mean()

    yield f'loss, {name}', jax.jit(jax.value_and_grad(total, (0, 1))), (x, w)


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
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--calls', type=int, default=10)
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
  args = parser.parse_args()
  shapes = [(40, 130, 200)] if args.tiny else SHAPES
  rounds, calls = (1, 1) if args.tiny else (args.rounds, args.calls)
  rows = []

  def timed(shape, what, found):
    seconds = medians([each[1:] for each in found], rounds, calls)
    size = ' x '.join(map(str, shape))
    for (name, *_), s in zip(found, seconds, strict=True):
      rows.append(
        f'{size} | {what} | {name} | {1e3 * s:.3f} | {seconds[0] / s:.2f}'
      )
      print(rows[-1], flush=True)

  for shape in shapes:
    if 'products' in args.parts:
      timed(shape, 'product', list(products(shape, args.tiny)))
    if 'layers' in args.parts:
      x, w = (v.astype(jnp.bfloat16) for v in operands(*shape))
      for backward in (False, True):
        what = 'layer, forward and backward' if backward else 'layer, forward'
        found = [(name, fn, (x, w)) for name, fn in linears(backward)]
        timed(shape, what, found)
  if 'codes' in args.parts:
    for pair in rounded(shapes[0], args.tiny):
      timed((shapes[0][0], shapes[0][2]), 'codes', pair)
  if 'loss' in args.parts:
    head = (40, 130, 64) if args.tiny else HEAD
    timed(head, 'forward and backward', list(losses(head, args.tiny)))
  print(f'\n{jax.devices()[0].device_kind}, jax {jax.__version__}')
  print('| rows, columns, contracted | what | how | ms | speed-up |')
  print('| --- | --- | --- | --- | --- |')
  for row in rows:
    print(f'| {row} |')


if __name__ == '__main__':
  main()
