"""Moment policies: against numpy, the signs of vectors, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim, quant
from frugax.optim import linalg, moments, projection, projectors


def last_two(params):
  axes = optim.MatrixAxes((-2,), (-1,))
  return jax.tree.map(lambda p: axes if p.ndim > 1 else None, params)


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthonormal(m, r, seed):
  return np.linalg.qr(normal((m, r), seed))[0]


def given(bases):
  """A projector whose basis at each refresh is given, for the row side."""
  bases = jnp.asarray(np.stack(bases))
  return projection.from_context(
    lambda g, old, rank, context: jnp.broadcast_to(
      bases[context.count], old.shape
    )
  )


def state_after(shape, bases, policy):
  """The inner state after one step in each basis; all gradients random."""
  tx = optim.low_rank(
    optim.scale_by_adam_hf(),
    bases[0].shape[1],
    1,
    projector=given(bases),
    moments=policy,
    axes=last_two,
  )
  state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
  for k in range(len(bases)):
    _, state = update(jnp.asarray(normal(shape, k)), state)
  return state.inner


def twin(shape, bases, policy):
  """The same in numpy for one matrix, its short side projected."""
  turned = shape[0] > shape[1]
  mu = nu = 0.0
  for k, p in enumerate(bases):
    g = normal(shape, k).astype(np.float64)
    r = p.T @ (g.T if turned else g)
    if k:
      mu, nu = policy(mu, nu, p.T.astype(np.float64) @ bases[k - 1], k)
    mu = 0.9 * mu + 0.1 * r
    nu = 0.999 * nu + 0.001 * r**2
  return (mu.T, nu.T) if turned else (mu, nu)


def ldadam_twin(mu, nu, c, t):
  m, v = mu / (1 - 0.9**t), nu / (1 - 0.999**t)
  v = (c * c) @ (v - m * m) + (c @ m) ** 2
  return c @ mu, np.abs((1 - 0.999**t) * v)


TWINS = {
  'keep': lambda mu, nu, c, t: (mu, nu),
  'zero': lambda mu, nu, c, t: (0 * mu, 0 * nu),
  'sign': lambda mu, nu, c, t: (np.sign(np.diag(c))[:, None] * mu, nu),
  'rotate': lambda mu, nu, c, t: (c @ mu, (c * c) @ nu),
  'ldadam': ldadam_twin,
}


@pytest.mark.parametrize('shape', [(5, 7), (7, 5)])
@pytest.mark.parametrize('name', TWINS)
def test_policies_equal_their_formulas(name, shape):
  bases = [orthonormal(5, 2, seed) for seed in range(4)]
  state = state_after(shape, bases, name)
  mu, nu = twin(shape, bases, TWINS[name])
  np.testing.assert_allclose(state.mu, mu, atol=1e-6)
  np.testing.assert_allclose(state.nu, nu, atol=1e-6)
  assert (np.asarray(state.nu) >= 0).all()
  assert state.count == 4


def test_a_stack_turns_each_matrix():
  bases = [orthonormal(5, 2, seed) for seed in range(3)]
  state = state_after((3, 5, 7), bases, 'rotate')
  c = bases[2].T @ bases[1]
  before = state_after((3, 5, 7), bases[:2], 'rotate')
  r = bases[2].T @ normal((3, 5, 7), 2)
  np.testing.assert_allclose(
    state.mu, 0.9 * (c @ before.mu) + 0.1 * r, atol=1e-6
  )


def test_a_function_is_a_policy():
  def halve(first, second, turn):
    assert turn.matrix.shape == (2, 2)
    return [m / 2 for m in first], [v / 4 for v in second]

  bases = [orthonormal(5, 2, seed) for seed in range(3)]
  state = state_after((5, 7), bases, halve)
  mu, nu = twin((5, 7), bases, lambda mu, nu, c, t: (mu / 2, nu / 4))
  np.testing.assert_allclose(state.mu, mu, atol=1e-6)
  np.testing.assert_allclose(state.nu, nu, atol=1e-6)


def flipped(flips):
  """The SVD projector with the signs of its vectors flipped at each refresh."""
  flips = jnp.asarray(flips, jnp.float32)

  def find(g, old, rank, context):
    basis = linalg.left_vectors(g)[..., :rank]
    return basis * flips[context.count]

  return projection.from_context(find)


@pytest.mark.parametrize(
  'make', [optim.galore, optim.fira, optim.subspace_momentum]
)
@pytest.mark.parametrize('policy', ['rotate', 'ldadam', 'sign', 'keep'])
def test_signs_of_singular_vectors(policy, make):
  """Only 'keep' depends on them. ('sign' aligns them with the old ones.)"""
  params = {'w': jnp.zeros((6, 8)), 'tall': jnp.zeros((2, 9, 5))}
  rng = np.random.default_rng(0)
  base = jax.tree.map(lambda p: rng.normal(size=p.shape), params)

  def run(flips):
    tx = make(
      0.1,
      rank=3,
      update_interval=2,
      projector=flipped(flips),
      moments=policy,
      axes=last_two,
    )
    noise = np.random.default_rng(1)
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for _ in range(8):
      grads = jax.tree.map(
        lambda x: jnp.asarray(
          x + 0.3 * noise.normal(size=x.shape), jnp.float32
        ),
        base,
      )
      updates, state = update(grads, state)
      seen.append(updates)
    return seen

  plain = run(np.ones((4, 3)))
  other = run([[1, -1, 1], [-1, -1, 1], [1, 1, -1], [-1, 1, 1]])
  worst = max(
    float(jnp.abs(a - b).max())
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True)
  )
  assert (worst < 1e-6) == (policy != 'keep'), worst


def test_only_a_refresh_pays_and_only_moments_go_through_it():
  params = {'w': jnp.zeros((6, 8)), 'whole': jnp.zeros((1000,))}
  tx = optim.galore(0.1, rank=3, moments='rotate')
  jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params))
  (cond,) = [e for e in jaxpr.eqns if e.primitive.name == 'cond']
  shapes = [v.aval.shape for v in cond.outvars]
  # The basis, and the two moments of the matrix.
  assert sorted(shapes) == [(3, 8), (3, 8), (6, 3)]
  skip, _ = sorted(cond.params['branches'], key=lambda b: len(b.eqns))
  assert not skip.eqns


@pytest.mark.parametrize(
  'inner',
  [
    optax.scale_by_adam(),
    optax.scale_by_lion(),
    optax.trace(0.9),
    optax.scale_by_amsgrad(),
    optax.scale_by_rss(),
    optax.scale_by_rms(),
    optax.scale_by_novograd(),
    optax.masked(optax.scale_by_adam(), {'w': True, 'b': False}),
    optax.chain(optax.clip(1.0), optax.ema(0.9)),
    optax.contrib.scale_by_ademamix(0.9, 0.999, 0.99, 2.0),
    optax.partition(
      {'mu': optax.scale_by_adam(), 'x': optax.sgd(0.1)},
      {'w': 'mu', 'b': 'x'},
    ),
  ],
)
def test_usual_inner_states_are_understood(inner):
  """Of w every leaf of the small shape turns, of b nothing does."""
  params = {'w': jnp.zeros((4, 6)), 'b': jnp.zeros(3)}
  grads = {'w': jnp.asarray(normal((4, 6))), 'b': jnp.ones(3)}
  bases = [np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[:, ::-1]]
  tx = optim.low_rank(
    inner, 4, 1, projector=given(bases), moments='rotate', axes=None
  )
  _, state = tx.update(grads, tx.init(params), params)
  # A zero update in a reversed basis: moments decay, and are reversed.
  keep = optim.low_rank(inner, 4, 1, projector=given(bases))
  zero = jax.tree.map(jnp.zeros_like, grads)
  _, turned = tx.update(zero, state, params)
  _, kept = keep.update(zero, state, params)
  found = 0
  for a, b in zip(
    jax.tree.leaves(turned.inner), jax.tree.leaves(kept.inner), strict=True
  ):
    reverses = a.shape == (4, 6)
    found += reverses
    np.testing.assert_allclose(a, b[::-1] if reverses else b, atol=1e-6)
  assert found


@pytest.mark.parametrize(
  ('inner', 'leaf'),
  [
    (optax.scale_by_rprop(0.1), 'step_sizes/w'),
    (optax.contrib.schedule_free_adamw(0.1), 'z/w'),
    (optax.scale_by_factored_rms(min_dim_size_to_factor=1), 'v_row/w'),
  ],
)
def test_what_a_policy_does_not_know_is_refused(inner, leaf):
  params = {'w': jnp.zeros((4, 6))}
  tx = optim.low_rank(inner, 2, moments='rotate')
  with pytest.raises(ValueError, match=leaf) as error:
    tx.init(params)
  assert 'Moments(' in str(error.value)
  field = leaf.split('/')[0]
  for policy in ('keep', 'reset'):
    optim.low_rank(inner, 2, moments=policy).init(params)
  if field == 'z':
    known = optim.Moments('rotate', first=('z', 'mu'))
    optim.low_rank(inner, 2, moments=known).init(params)
    left = optim.Moments('rotate', keep=('z',))
    optim.low_rank(inner, 2, moments=left).init(params)


@pytest.mark.parametrize('shape', [(8, 512), (3, 8, 512), (3, 8, 511)])
@pytest.mark.parametrize('codec', ['dynamic8', 'dynamic4', 'fp8_e4m3'])
def test_codes_turn_with_a_basis_as_what_they_stand_for(codec, shape):
  draw = np.random.default_rng(0)
  m = jnp.asarray(draw.normal(size=shape), jnp.float32)
  codes = [
    quant.encode(m, quant.Codec(codec), len(shape) - 2),
    quant.encode(m**2, quant.Codec(codec, signed=False), len(shape) - 2),
  ]
  bases = [
    jnp.asarray(np.linalg.qr(draw.normal(size=(16, 8)))[0], jnp.float32)
    for _ in range(2)
  ]
  turn = moments.Turn(*bases, jnp.asarray(1))
  policy = moments.by_name('rotate')
  group = moments.Group(0, [0], [1])
  got = moments.turn(policy, [group], dict(enumerate(codes)), (turn,))
  first, second = moments.rotate(*([quant.decode(x)] for x in codes), turn)
  for k, want in enumerate((*first, *second)):
    assert got[k].codec == codes[k].codec
    assert got[k].merged == codes[k].merged
    again = quant.encode(want, codes[k].codec, len(shape) - 2)
    np.testing.assert_array_equal(quant.decode(got[k]), quant.decode(again))


def test_ldadam_needs_one_first_moment():
  tx = optim.low_rank(optax.scale_by_rms(), 2, moments='ldadam')
  g = jnp.ones((4, 6))
  with pytest.raises(ValueError, match='found 0 first moments'):
    tx.update(g, tx.init(g))


def test_a_projector_without_a_basis_is_refused():
  def build(shape, rank, side, dtype):
    return projectors.svd(shape, rank, side, dtype)._replace(basis=None)

  g = jnp.ones((4, 6))
  tx = optim.low_rank(optax.trace(0.9), 2, projector=build, moments='rotate')
  with pytest.raises(ValueError, match=r"Projector.basis.*'rotate'"):
    tx.init(g)
  optim.low_rank(optax.trace(0.9), 2, projector=build).init(g)


@pytest.mark.parametrize('projector', ['svd', 'random'])
def test_no_turn_before_the_first_basis(projector):
  """An accumulator that starts above zero keeps its start."""
  inner = optax.scale_by_rss(initial_accumulator_value=0.5)
  g = jnp.zeros((4, 6))
  tx = optim.low_rank(inner, 2, moments='rotate', projector=projector)
  state = tx.init(g)
  start = jax.tree.map(lambda x: x + 0.5, state.inner)
  _, state = tx.update(g, state._replace(inner=start))
  np.testing.assert_array_equal(
    state.inner.sum_of_squares, start.sum_of_squares
  )


def test_random_projections_turn_by_drawing_both():
  """Flora's transfer: down by the new projection what the old one took up."""
  g = jnp.asarray(normal((4, 6)))
  tx = optim.low_rank(
    optax.ema(0.5, debias=False), 2, 1, projector='random', moments='rotate'
  )
  random = projectors.random((4, 6), 2, 'short', jnp.float32)
  _, first = tx.update(g, tx.init(g))
  _, second = tx.update(g, first)
  old, new = (np.asarray(random.basis(s.projectors)) for s in (first, second))
  want = 0.5 * new.T @ (old @ first.inner.ema) + 0.5 * new.T @ g
  np.testing.assert_allclose(second.inner.ema, want, atol=1e-5)


def test_adam_passes_its_own_decays_to_ldadam():
  policy = moments.for_adam(optim.Moments('ldadam', keep=('x',)), 0.5, 0.5)
  assert policy.keep == ('x',)
  turn = moments.Turn(jnp.eye(1), jnp.eye(1), jnp.int32(1))
  # Bias-corrected by one half: V - M^2 = 4 - 4 is left, plus M^2.
  (m,), (v,) = policy.turns([jnp.ones((1, 1))], [2 * jnp.ones((1, 1))], turn)
  assert (m, v) == (1.0, 2.0)
  assert moments.for_adam('rotate', 0.5, 0.5) == 'rotate'
