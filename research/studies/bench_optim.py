"""What an optimizer's step costs over the work that its method cannot avoid.

    make bench

A step is update and apply, jitted and donated, on the parameters of LLaMA-60m
in float32 and at rank 128; the refresh of the subspaces is not among the timed
steps. The floor of a method is a program written by hand, timed in the same
run, that does only its matmuls (project, project back) and Adam on what is
left. Steps of the two alternate, in an order drawn anew for every pair; the
figures are medians. The second table compares one refresh by the sketch and by
the singular value decomposition of a 2048 x 5461 gradient, rank 512.
"""

import argparse
import dataclasses
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import optim
from frugax.models import llama
from frugax.optim import axes as axes_lib
from frugax.optim import linalg, projection, projectors
from frugax.train import metrics

_B1, _B2, _EPS, _LR, _SCALE = 0.9, 0.999, 1e-6, 1e-2, 0.25


@dataclasses.dataclass(frozen=True)
class Method:
  """The matmuls that a method cannot do without.

  Attributes:
    rank: of the subspaces.
    back: whether the update is mapped back; else it is the gradient, scaled.
    turns: whether the subspace follows gradient and momentum at every step,
      and what it misses is kept for the next, which takes the momentum back
      from the old basis and twice from the new one.
  """

  rank: int = 128
  back: bool = True
  turns: bool = False


# Those of frugax.optim that are not in this table are not timed.
METHODS = {
  'galore': Method(),
  'q_galore': Method(),
  'coap': Method(),
  'fira': Method(),
  'flora': Method(),
  'apollo': Method(back=False),
  'apollo_mini': Method(rank=1, back=False),
  'ldadam': Method(turns=True),
  'subspace_momentum': Method(),
  'snsm': Method(),
}


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


def floor_of(method, axes):
  """The step by hand: its initial state and the step itself."""

  def leaf_axes(params):
    return jax.tree.structure(params).flatten_up_to(axes)

  def init(params):
    def one(x, spec):
      if spec is None:
        return {'mu': jnp.zeros_like(x), 'nu': jnp.zeros_like(x)}
      *batch, m, n = axes_lib.matrix_shape(x.shape, spec)
      size = (m, method.rank) if m <= n else (method.rank, n)
      p = jax.random.normal(jax.random.key(2), (*batch, *size)) / size[0] ** 0.5
      small = (*batch, method.rank, n) if m <= n else (*batch, m, method.rank)
      state = {'p': p, 'mu': jnp.zeros(small), 'nu': jnp.zeros(small)}
      if method.turns:
        state['e'] = jnp.zeros((*batch, m, n))
      return state if method.back else state | {'norm': jnp.ones(batch)}

    leaves = jax.tree.leaves(params)
    states = map(one, leaves, leaf_axes(params))
    return jnp.zeros([], jnp.int32), list(states)

  def step(carry, grads):
    params, (count, states) = carry
    count += 1
    t = count.astype(jnp.float32)
    lr = _LR * jnp.sqrt(1 - _B2**t) / (1 - _B1**t)
    new_params, new_states = [], []
    leaves, treedef = jax.tree.flatten(params)
    for w, g, state, spec in zip(
      leaves, jax.tree.leaves(grads), states, leaf_axes(params), strict=True
    ):
      new = {}
      if spec is not None:
        g = axes_lib.as_matrix(g, spec)
        p = state['p']
        rows = g.shape[-2] <= g.shape[-1]
        if method.turns:
          g, p, state, missed = _turn(g, p, state, rows)
        new['p'] = p
        full, g = g, (p.mT @ g if rows else g @ p.mT)
        if method.turns:
          kept = g + 9 * state['mu']
          new['e'] = full + missed - (p @ kept if rows else kept @ p)
      new['mu'] = _B1 * state['mu'] + (1 - _B1) * g
      new['nu'] = _B2 * state['nu'] + (1 - _B2) * g * g
      u = new['mu'] / (jnp.sqrt(new['nu']) + _EPS)
      if spec is not None and method.back:
        u = _SCALE * (p @ u if rows else u @ p)
      elif spec is not None:
        u, new['norm'] = _scaled(full, g, u, state['norm'], method, rows)
      if spec is not None:
        u = axes_lib.from_matrix(u, spec, w.shape)
      new_params.append(w - lr * u)
      new_states.append(new)
    return treedef.unflatten(new_params), (count, new_states)

  return init, step


def _scaled(g, small, update, norm, method, rows):
  """The gradient scaled by the ratio of the small norms, growing slowly."""
  axis = (-2, -1) if method.rank == 1 else -2 if rows else -1
  of_update, of_small, of_g = (
    jnp.sum(x * x, axis, keepdims=True) for x in (update, small, g)
  )
  ratio = jnp.sqrt(of_update / of_small)
  new = jnp.sqrt(jnp.sum(ratio * ratio * of_g, (-2, -1)))
  factor = jnp.minimum(1.0, 1.01 * norm / new)
  return g * (ratio * factor[..., None, None]), new * factor


def _turn(g, p, state, rows):
  """Gradient with error, new basis and moments in it, momentum taken back."""
  if not rows:
    turned = _turn(g.mT, p.mT, {k: x.mT for k, x in state.items()}, True)
    return jax.tree.map(lambda x: x.mT, turned)
  g = g + state['e']
  start = 0.9 * state['mu'].mT + 0.1 * (g.mT @ p)  # p has orthonormal columns.
  new = linalg.orthonormal(0.9 * p @ (state['mu'] @ start) + 0.1 * (g @ start))
  c = new.mT @ p
  mu, variance = c @ state['mu'], state['nu'] - state['mu'] * state['mu']
  nu = jnp.abs((c * c) @ variance + mu * mu)
  return g, new, {'mu': mu, 'nu': nu}, 9 * (p @ state['mu'])


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
  make, method = getattr(optim, name), METHODS[name]
  arguments = {'rank': method.rank, 'axes': axes, 'projector': 'sketch'}
  valid = inspect.signature(make).parameters
  if not method.back:
    del arguments['projector']  # APOLLO's is random.
  return make(_LR, **{k: v for k, v in arguments.items() if k in valid})


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
  tx = optax.contrib.galore(_LR, rank=128, weight_dimension_numbers=numbers)
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
  parser.add_argument('--only', nargs='*', help='names of aliases')
  args = parser.parse_args()
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, {info["hardware"]["device_kind"]}'
  )
  params, grads, axes = parameters()

  def run_of(name):
    tx = ours(name, axes)
    return stepper(step_of(tx), tx.init, params, grads)

  def floor_run(method):
    init, step = floor_of(method, axes)
    return stepper(step, init, params, grads)

  rows = []
  for name in [n for n in METHODS if callable(getattr(optim, n, None))]:
    if not args.only or name in args.only:
      runs = [run_of(name), floor_run(METHODS[name])]
      rows.append((name, *alternate(runs, args.pairs)))
      print(f'{name}: {rows[-1][1] / rows[-1][2]:.3f} x its floor', flush=True)
  if not args.only:
    adamw, (tx, apart) = optax.adamw(_LR), optax_galore(params, axes)
    others = alternate(
      [
        stepper(step_of(adamw), adamw.init, params, grads),
        stepper(step_of(tx), tx.init, apart(params), apart(grads)),
        floor_run(METHODS['galore']),
      ],
      args.pairs,
    )
    rows.append(('optax.adamw', others[0], others[2]))
    rows.append(('optax.contrib.galore', others[1], others[2]))
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
  print(f'{"step":20} {"median":>9} {"floor":>9} {"ratio":>7}')
  for name, seconds, floor in rows:
    print(
      f'{name:20} {seconds * 1e3:6.1f} ms {floor * 1e3:6.1f} ms'
      f' {seconds / floor:7.3f}'
    )


if __name__ == '__main__':
  main()
