"""What an optimizer's step costs over the work that its method cannot avoid.

    make bench

A step is update and apply, jitted and donated, on the parameters of LLaMA-60m
in float32 and at rank 128; the refresh of the subspaces is not among the timed
steps. The floor of a method is a program written by hand, timed in the same
run, that does only its matmuls (project, project back) and Adam on what is
left: see floors.py. Others are timed beside optax.adamw. Steps of the two
alternate, in an order drawn anew for every pair; the figures are medians. The
second table compares one refresh by the sketch and by the singular value
decomposition of a 2048 x 5461 gradient, rank 512.
"""

import argparse
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import optim
from frugax.models import llama
from frugax.optim import axes as axes_lib
from frugax.optim import projection, projectors
from frugax.train import metrics
from studies import floors

# Timed beside optax.adamw: name and a function from the axes.
BESIDE_ADAMW = {
  'adam_sn': lambda axes: optim.adam_sn(floors.LR, axes=axes),
  'stable_spam': lambda axes: optim.stable_spam(floors.LR, axes=axes),
  'adam linear8': lambda axes: adam_in('linear8'),
  'adam dynamic8': lambda axes: adam_in('dynamic8'),
}


def adam_in(codec):
  """Adam with its moments in few bits."""
  return optax.chain(
    optim.quantize_state(optax.scale_by_adam(), codec),
    optax.scale_by_learning_rate(floors.LR),
  )


def parameters():
  """LLaMA-60m: parameters, gradients and what is projected."""
  model = llama.Llama(llama.config('60m'))
  params = model.init(jax.random.key(0))
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  grads = treedef.unflatten(
    1e-3 * jax.random.normal(k, x.shape)
    for k, x in zip(keys, leaves, strict=True)
  )
  return params, grads, optim.matrix_axes(model.axes(), whole=('vocab',))


def step_of(tx):
  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def stepper(step, init, params, grads):
  """A function that does one step on a copy of params: its seconds."""
  own = jax.tree.map(jnp.copy, params)
  carry = own, jax.jit(init)(own)
  step = jax.jit(step, donate_argnums=0)

  def timed():
    nonlocal carry
    start = time.perf_counter()
    carry = jax.block_until_ready(step(carry, grads))
    return time.perf_counter() - start

  return timed


def alternate(steppers, pairs):
  """Median seconds of functions that return seconds, called in turn."""
  for timed in steppers * 3:  # compile, refresh, and warm up
    timed()
  seconds = np.zeros((pairs, len(steppers)))
  order = np.random.default_rng(0)
  for i in range(pairs):
    for j in order.permutation(len(steppers)):
      seconds[i, j] = steppers[j]()
  return np.median(seconds, axis=0)


def ours(name, axes):
  """The alias at the rank of its floor, its refresh by the sketch if it can."""
  make, method = getattr(optim, name), floors.METHODS[name]
  arguments = {'rank': method.rank, 'axes': axes, 'projector': 'sketch'}
  valid = inspect.signature(make).parameters
  if method.step is floors.apollo:
    del arguments['projector']  # APOLLO's is random.
  return make(floors.LR, **{k: v for k, v in arguments.items() if k in valid})


def optax_galore(params, axes):
  """optax's and the view it takes of a tree: it has no batch axes."""

  def matrices(tree):
    leaves = jax.tree.leaves(tree)
    specs = jax.tree.structure(tree).flatten_up_to(axes)
    whole = [x for x, spec in zip(leaves, specs, strict=True) if spec is None]
    apart = [
      layer
      for x, spec in zip(leaves, specs, strict=True)
      if spec is not None
      for layer in axes_lib.as_matrix(x, spec)
    ]
    return {'whole': whole, 'apart': apart}

  numbers = {
    'whole': [None for _ in matrices(params)['whole']],
    'apart': [
      optax.contrib.GaLoreDimensionNumbers() for _ in matrices(params)['apart']
    ],
  }
  tx = optax.contrib.galore(
    floors.LR, rank=128, weight_dimension_numbers=numbers
  )
  return tx, matrices


def refreshes():
  """Seconds of a refresh and the captured energies of two, by projector."""
  m, n, rank = 2048, 5461, 512
  draw = np.random.default_rng(0)
  # Singular values as in a gradient: a power law, no gap at the rank.
  spectrum = np.arange(1, m + 1) ** -0.8
  left, right = (
    np.linalg.qr(draw.normal(size=(size, m)).astype(np.float32))[0]
    for size in (m, n)
  )
  g = jnp.asarray((left * spectrum) @ right.T, jnp.float32)
  turned = g + 0.1 * jnp.linalg.norm(g) * jnp.asarray(
    draw.normal(size=(m, n)) / (m * n) ** 0.5, jnp.float32
  )

  def run(name, gradients):
    """Seconds and captured energy of one refresh after the other."""
    p = projectors.PROJECTORS[name](g.shape, rank, 'short', g.dtype)

    def refresh(g, state, count):
      return p.refresh(
        g, state, projection.Context(jax.random.key(count), count)
      )

    state = p.init()
    compiled = jax.jit(refresh).lower(g, state, 0).compile()
    seconds, energies = [], []
    for count, gradient in enumerate(gradients):
      start = time.perf_counter()
      state = jax.block_until_ready(compiled(gradient, state, count))
      seconds.append(time.perf_counter() - start)
      energies.append(float(jnp.sum(jnp.square(p.project(gradient, state)))))
    return min(seconds), np.array(energies)

  svd, best = run('svd', [turned])
  best = np.array([np.square(spectrum[:rank]).sum(), *best])
  rows = [('svd', svd, [1.0, 1.0])]
  for name in ('sketch', 'sketch2'):
    seconds, energies = run(name, [g, turned])
    rows.append((name, seconds, energies / best))
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--pairs', type=int, default=30)
  parser.add_argument('--only', nargs='*', help='names of the first column')
  args = parser.parse_args()
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, {info["hardware"]["device_kind"]}'
  )
  params, grads, axes = parameters()

  def floor_run(method):
    init, step = floors.floor_of(method, axes)
    return stepper(step, init, params, grads)

  def beside(name, tx, other):
    runs = [stepper(step_of(tx), tx.init, params, grads), other]
    rows.append((name, *alternate(runs, args.pairs)))
    print(f'{name}: {rows[-1][1] / rows[-1][2]:.3f}', flush=True)

  def wanted(names):
    return [n for n in names if not args.only or n in args.only]

  rows = []
  print('over its floor')
  for name in wanted(floors.METHODS):
    beside(name, ours(name, axes), floor_run(floors.METHODS[name]))
  print('over optax.adamw')
  for name in wanted(BESIDE_ADAMW):
    adamw = optax.adamw(floors.LR)
    other = stepper(step_of(adamw), adamw.init, params, grads)
    beside(name, BESIDE_ADAMW[name](axes), other)
  if not args.only:
    tx, apart = optax_galore(params, axes)
    runs = [
      stepper(step_of(tx), tx.init, apart(params), apart(grads)),
      floor_run(floors.METHODS['galore']),
    ]
    rows.append(('optax.contrib.galore', *alternate(runs, args.pairs)))
    print('refresh of 2048 x 5461, rank 512', flush=True)
    print(
      f'{"projector":12} {"seconds":>8} {"of svd":>7}'
      '  energy, first  energy, next (1: the best subspace)'
    )
    table = refreshes()
    for name, seconds, (first, following) in table:
      print(
        f'{name:12} {seconds:8.2f} {seconds / table[0][1]:7.3f}'
        f'  {first:13.4f}  {following:12.4f}'
      )
  print(f'{"step":20} {"median":>9} {"other":>9} {"ratio":>7}')
  for name, seconds, other in rows:
    print(
      f'{name:20} {seconds * 1e3:6.1f} ms {other * 1e3:6.1f} ms'
      f' {seconds / other:7.3f}'
    )


if __name__ == '__main__':
  main()
