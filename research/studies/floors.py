"""The work that a method cannot avoid: its step, written by hand.

A floor does only the method's matmuls (project, project back) and, on what is
left, Adam, or what the method has in its place: 8-bit codes for Q-GaLore,
Adafactor for Flora, a turn of the subspace and an error for LDAdam, norms for
APOLLO. Nothing is checked, configured, refreshed or stored by name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from frugax.optim import axes as axes_lib
from frugax.optim import linalg
from frugax.quant import codecs

B1, B2, EPS, LR, SCALE = 0.9, 0.999, 1e-6, 1e-2, 0.25
_CODED = 4096  # Smaller arrays are left in float32, as by quantize_state.


@dataclasses.dataclass(frozen=True)
class Method:
  """What a method cannot do without.

  Attributes:
    rank: of the subspaces.
    step: `(method, g, state, rows) -> (update, state)` of one leaf; rows says
      whether its rows are projected, and is None if it is left whole.
    extra: `(batch, m, n) -> state` of a matrix, beside basis and moments.
    codec: how moments are stored.
    finish: `(update, weights) -> update`, before the learning rate.
  """

  rank: int = 128
  step: Callable[..., Any] = lambda *args: galore(*args)
  extra: Callable[..., Any] = lambda *shape: {}
  codec: str = 'f32'
  finish: Callable[..., Any] = lambda u, w: u

  def store(self, mu, nu):
    """Moments as they are kept."""
    mu, nu = (
      codecs.encode(x, codecs.Codec(self.codec, signed=signed))
      if x.size >= _CODED
      else x
      for x, signed in ((mu, True), (nu, False))
    )
    return {'mu': mu, 'nu': nu}


def adam(method, g, state):
  """Adam without its corrections of bias, which are in the learning rate."""
  mu = B1 * codecs.decode(state['mu']) + (1 - B1) * g
  nu = B2 * codecs.decode(state['nu']) + (1 - B2) * g * g
  return mu / (jnp.sqrt(nu) + EPS), method.store(mu, nu)


def project(p, g, rows):
  return p.mT @ g if rows else g @ p.mT


def back(p, r, rows):
  return p @ r if rows else r @ p


def galore(method, g, state, rows):
  """Project, Adam, project back."""
  if rows is None:
    return adam(method, g, state)
  u, new = adam(method, project(state['p'], g, rows), state)
  return SCALE * back(state['p'], u, rows), new | {'p': state['p']}


def apollo(method, g, state, rows):
  """The gradient scaled by a ratio of small norms, growing slowly."""
  if rows is None:
    return adam(method, g, state)
  small = project(state['p'], g, rows)
  update, new = adam(method, small, state)
  axis = (-2, -1) if method.rank == 1 else -2 if rows else -1
  of_update, of_small, of_g = (
    jnp.sum(x * x, axis, keepdims=True) for x in (update, small, g)
  )
  ratio = jnp.sqrt(of_update / of_small)
  norm = jnp.sqrt(jnp.sum(ratio * ratio * of_g, (-2, -1)))
  factor = jnp.minimum(1.0, 1.01 * state['norm'] / norm)
  new |= {'p': state['p'], 'norm': norm * factor}
  return g * (ratio * factor[..., None, None]), new


def ldadam(method, g, state, rows):
  """A basis that follows gradient and momentum, and what it misses is kept."""
  if rows is None:
    return adam(method, g, state)
  if not rows:
    turned = {k: x.mT for k, x in state.items()}
    u, new = ldadam(method, g.mT, turned, True)
    return u.mT, {k: x.mT for k, x in new.items()}
  g = g + state['e']
  p, mu = state['p'], state['mu']
  start = 0.9 * mu.mT + 0.1 * (g.mT @ p)  # p has orthonormal columns.
  basis = linalg.orthonormal(0.9 * p @ (mu @ start) + 0.1 * (g @ start))
  c = basis.mT @ p
  turned = c @ mu
  nu = jnp.abs((c * c) @ (state['nu'] - mu * mu) + turned * turned)
  small = basis.mT @ g
  u, new = adam(method, small, {'mu': turned, 'nu': nu})
  new['e'] = g + 9 * (p @ mu) - basis @ (small + 9 * turned)
  return SCALE * (basis @ u), new | {'p': basis}


def flora(method, g, state, rows):
  """Adafactor, its momentum in the subspace."""
  if rows is None:
    nu = B2 * state['nu'] + (1 - B2) * g * g
    mu = B1 * state['mu'] + (1 - B1) * g / (jnp.sqrt(nu) + EPS)
    return mu, method.store(mu, nu)
  v, w = (
    B2 * state[name] + (1 - B2) * (g * g).mean(axis)
    for name, axis in (('v', -1), ('w', -2))
  )
  g *= jnp.sqrt(v.mean(-1))[..., None, None]
  g = g * (jax.lax.rsqrt(v)[..., None] * jax.lax.rsqrt(w)[..., None, :])
  old = B1 * state['mu']
  new = {'mu': old + (1 - B1) * project(state['p'], g, rows), 'v': v, 'w': w}
  u = (1 - B1) * g + back(state['p'], old, rows)
  return u, new | {'p': state['p'], 'nu': state['nu']}


def relative(u, w):
  """A step clipped, and relative to the weights."""

  def rms(x):
    axis = (-2, -1) if x.ndim > 1 else -1
    return jnp.sqrt((x * x).mean(axis, keepdims=True))

  return u * (rms(w) / jnp.maximum(rms(u), 1))


_APOLLO = {
  'step': apollo,
  'extra': lambda batch, m, n: {'norm': jnp.ones(batch)},
}
# Those of frugax.optim that are not in this table are not timed.
METHODS = {
  'galore': Method(),
  'q_galore': Method(codec='dynamic8'),
  'coap': Method(),
  'fira': Method(),
  'flora': Method(
    step=flora,
    extra=lambda batch, m, n: {
      'nu': (),  # factored
      'v': jnp.ones((*batch, m)),
      'w': jnp.ones((*batch, n)),
    },
    finish=relative,
  ),
  'apollo': Method(**_APOLLO),
  'apollo_mini': Method(rank=1, **_APOLLO),
  'ldadam': Method(
    step=ldadam, extra=lambda batch, m, n: {'e': jnp.zeros((*batch, m, n))}
  ),
  'subspace_momentum': Method(),
  'snsm': Method(),
}


def floor_of(method: Method, axes: Any):
  """The step by hand: its initial state and the step itself.

  Args:
    method: what it cannot do without.
    axes: the parameters' matrix axes, as from `frugax.optim.matrix_axes`.

  Returns:
    `init(params) -> state` and `step((params, state), grads)`, which returns
    the new pair.
  """

  def leaf_axes(params):
    return jax.tree.structure(params).flatten_up_to(axes)

  def moments(shape):
    # XLA would fold the codes of zeros while it compiles.
    zeros = jax.lax.optimization_barrier(jnp.zeros(shape))
    return method.store(zeros, zeros)

  def init(params):
    def one(x, spec):
      if spec is None:
        return moments(x.shape)
      *batch, m, n = axes_lib.matrix_shape(x.shape, spec)
      rows = m <= n
      size = (m, method.rank) if rows else (method.rank, n)
      p = jax.random.normal(jax.random.key(2), (*batch, *size))
      small = (*batch, method.rank, n) if rows else (*batch, m, method.rank)
      state = {'p': p / (m if rows else method.rank) ** 0.5, **moments(small)}
      return state | method.extra(batch, m, n)

    leaves = jax.tree.leaves(params)
    states = map(one, leaves, leaf_axes(params))
    return jnp.zeros([], jnp.int32), list(states)

  def step(carry, grads):
    params, (count, states) = carry
    count += 1
    t = count.astype(jnp.float32)
    lr = LR * jnp.sqrt(1 - B2**t) / (1 - B1**t)
    new_params, new_states = [], []
    leaves, treedef = jax.tree.flatten(params)
    for w, g, state, spec in zip(
      leaves, jax.tree.leaves(grads), states, leaf_axes(params), strict=True
    ):
      matrix, rows = w, None
      if spec is not None:
        g, matrix = axes_lib.as_matrix(g, spec), axes_lib.as_matrix(w, spec)
        rows = g.shape[-2] <= g.shape[-1]
      u, new = method.step(method, g, state, rows)
      u = method.finish(u, matrix)
      if spec is not None:
        u = axes_lib.from_matrix(u, spec, w.shape)
      new_params.append(w - lr * u)
      new_states.append(new)
    return treedef.unflatten(new_params), (count, new_states)

  return init, step
