"""low_rank: shapes, projectors, inner transformations, errors."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import projection, projectors


def last_two(params):
  """Every array's last two axes are its matrix, all others its batch."""
  axes = optim.MatrixAxes((-2,), (-1,))
  return jax.tree.map(lambda p: axes if p.ndim > 1 else None, params)


def normal(shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def low_rank_matrix(m, n, rank, seed=0):
  return normal((m, rank), seed) @ normal((rank, n), seed + 1)


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 13])


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(
  batch=st.lists(st.integers(1, 3), max_size=2),
  m=SIZES,
  n=SIZES,
  rank=st.integers(1, 9),
  side=st.sampled_from(projection.SIDES),
  projector=st.sampled_from(['svd', 'sketch']),
)
def test_any_shape_is_projected_orthogonally(
  batch, m, n, rank, side, projector
):
  """With the identity inside, the update is P P^T G (or G P^T P)."""
  g = normal((*batch, m, n))
  r = min(rank, m, n)
  rows = {'short': m <= n, 'long': m > n, 'left': True, 'right': False}[side]
  tx = optim.low_rank(
    optax.trace(0.5), rank, side=side, projector=projector, axes=last_two
  )
  state = tx.init(g)
  shapes = jax.tree.map(jnp.shape, state)
  u, state = tx.update(g, state)
  assert jax.tree.map(jnp.shape, state) == shapes
  assert state.inner.trace.shape == (*batch, *((r, n) if rows else (m, r)))
  p = np.asarray(state.projectors, np.float64)
  assert p.shape == (*batch, *((m, r) if rows else (r, n)))
  p = p if rows else np.swapaxes(p, -1, -2)
  eye = np.broadcast_to(np.eye(r), (*batch, r, r))
  np.testing.assert_allclose(np.swapaxes(p, -1, -2) @ p, eye, atol=2e-5)
  g = np.asarray(g, np.float64)
  onto = p @ np.swapaxes(p, -1, -2)
  np.testing.assert_allclose(u, onto @ g if rows else g @ onto, atol=1e-4)
  if r == (m if rows else n):
    np.testing.assert_allclose(u, g, atol=1e-4)


def energy(basis, g):
  return np.linalg.norm(np.asarray(basis).T @ np.asarray(g)) ** 2


def refresh(projector, g, rank, times=1, state=None, key=0):
  p = projector(g.shape, rank, 'left', jnp.float32)
  state = p.init() if state is None else state
  for i in range(times):
    context = projection.Context(jax.random.fold_in(jax.random.key(key), i))
    state = p.refresh(g, state, context)
  return state


def test_svd_is_the_optimal_subspace():
  g = normal((12, 20))
  values = np.linalg.svd(np.asarray(g), compute_uv=False)
  got = energy(refresh(projectors.svd, g, 5), g)
  np.testing.assert_allclose(got, (values[:5] ** 2).sum(), rtol=1e-5)


def test_svd_is_in_float32_and_its_signs_are_fixed():
  g = normal((12, 20), dtype=jnp.bfloat16)
  basis = np.asarray(refresh(projectors.svd, g, 5))
  np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)
  peaks = basis[np.abs(basis).argmax(0), range(5)]
  assert (peaks > 0).all()
  same = refresh(projectors.svd, g[:, ::-1], 5)
  np.testing.assert_allclose(same, basis, atol=1e-4)


def test_sketch_finds_an_exactly_low_rank_matrix_at_once():
  g = low_rank_matrix(30, 40, 4)
  got = energy(refresh(projectors.sketch, g, 4), g)
  np.testing.assert_allclose(got, np.linalg.norm(g) ** 2, rtol=1e-5)


def test_sketch_warms_up_to_the_optimal_subspace():
  """A slow spectrum: one step is far, eight from one another's start near."""
  g = normal((60, 60)) * jnp.arange(1, 61) ** -0.5
  values = np.linalg.svd(np.asarray(g), compute_uv=False)
  best = (values[:10] ** 2).sum()
  cold, warm = (
    energy(refresh(projectors.sketch, g, 10, times), g) / best
    for times in (1, 8)
  )
  assert cold < 0.95 < 0.97 < warm <= 1 + 1e-5


def test_sketch_finds_directions_orthogonal_to_its_old_basis():
  e = jnp.eye(8)
  old = refresh(projectors.sketch, e[:, :2] @ normal((2, 9)), 2)
  g = e[:, 4:6] @ normal((2, 9), 3)
  assert energy(old, g) < 1e-8
  got = energy(refresh(projectors.sketch, g, 2, state=old), g)
  np.testing.assert_allclose(got, np.linalg.norm(g) ** 2, rtol=1e-3)


def test_sketch_is_continuous_and_scale_free():
  """The same gradient again hardly turns the basis, whatever its signs are."""
  g = low_rank_matrix(20, 30, 3) + 1e-3 * normal((20, 30), 5)
  first = refresh(projectors.sketch, g, 3, times=6)
  for signs in ([1, 1, 1], [-1, 1, -1], [-1, -1, -1]):
    old = first * jnp.array(signs, jnp.float32)
    again = refresh(projectors.sketch, g, 3, state=old, key=1)
    # Orthogonal iteration still sharpens single vectors within the subspace.
    assert (np.diag(np.asarray(old.T @ again)) > 0.9).all()
  tiny = refresh(projectors.sketch, g * 2.0**-60, 3, times=6)
  np.testing.assert_array_equal(tiny, first)


@pytest.mark.parametrize('name', ['svd', 'sketch'])
def test_zero_gradient_still_gives_a_basis(name):
  basis = refresh(projectors.PROJECTORS[name], jnp.zeros((2, 6, 5)), 3)
  got = jnp.swapaxes(basis, -1, -2) @ basis
  np.testing.assert_allclose(
    got, np.broadcast_to(np.eye(3), got.shape), atol=1e-5
  )


def test_random_is_unbiased_and_stores_a_key_only():
  g = normal((5, 6))

  def update(seed):
    tx = optim.low_rank(optax.identity(), 4, projector='random', key=seed)
    return tx.update(g, tx.init(g))

  updates, state = jax.jit(jax.vmap(update))(jnp.arange(400))
  assert state.projectors.shape == (400, 2)
  # Var of an entry of P P^T G is at most 2 |G column|^2 / r; five sigma.
  bound = 5 * np.sqrt(2 * (np.asarray(g) ** 2).sum(0) / 4 / 400)
  assert (np.abs(updates.mean(0) - g) < bound).all()


def test_keys_differ_by_leaf_and_refresh_and_agree_in_a_stack():
  g = normal((4, 6))
  tree = {'a': jnp.stack([g, g]), 'b': jnp.stack([g, g])}
  tx = optim.low_rank(optax.identity(), 2, 2, projector='random', axes=last_two)
  state, seen = tx.init(tree), []
  for _ in range(4):
    u, state = tx.update(tree, state)
    np.testing.assert_array_equal(u['a'][0], u['a'][1])
    assert np.abs(u['a'] - u['b']).max() > 1e-2
    seen.append(np.asarray(u['a']))
  np.testing.assert_array_equal(seen[0], seen[1])
  np.testing.assert_array_equal(seen[2], seen[3])
  assert np.abs(seen[1] - seen[2]).max() > 1e-2


@pytest.mark.parametrize(
  'key',
  [7, jax.random.PRNGKey(7), jax.random.key(7), jax.random.key(7, impl='rbg')],
)
def test_any_kind_of_key(key):
  g = normal((4, 6))
  tx = optim.low_rank(optax.identity(), 2, projector='random', key=key)
  u, _ = jax.jit(tx.update)(g, tx.init(g))
  other = optim.low_rank(optax.identity(), 2, projector='random', key=8)
  assert np.abs(u - other.update(g, other.init(g))[0]).max() > 1e-3


def test_refreshes_at_0_n_2n_only():
  """The basis is the one of the gradients 0 and 3, in both of two leaves."""
  tree = {'a': jnp.ones((4, 5)), 'b': jnp.ones((6, 3))}
  tx = optim.low_rank(optax.identity(), 1, update_interval=3)
  state, update, bases = tx.init(tree), jax.jit(tx.update), []
  for seed in range(6):
    grads = jax.tree.map(lambda x: normal(x.shape, seed), tree)  # noqa: B023
    _, state = update(grads, state)
    bases.append(state.projectors)
  for k in ('a', 'b'):
    p = [np.asarray(b[k]) for b in bases]
    np.testing.assert_array_equal(p[0], p[2])
    np.testing.assert_array_equal(p[3], p[5])
    assert np.abs(p[2] - p[3]).max() > 1e-3
  want = np.linalg.svd(np.asarray(normal((4, 5), 3)))[0][:, 0]
  np.testing.assert_allclose(abs(want @ bases[3]['a'][:, 0]), 1, rtol=1e-5)


def test_the_decomposition_is_under_one_cond():
  """Not run at every step, not one cond a leaf, none under a vmap."""
  tree = {'a': jnp.ones((3, 4, 5)), 'b': jnp.ones((6, 3)), 'c': jnp.ones(3)}
  tx = optim.low_rank(optax.identity(), 1, axes=last_two)
  jaxpr = jax.make_jaxpr(tx.update)(tree, tx.init(tree))
  conds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'cond']
  # Others choose by platform, when the program is compiled.
  (cond,) = [eqn for eqn in conds if 'svd[' in str(eqn.params['branches'])]
  branches = sorted(str(b).count('= svd[') for b in cond.params['branches'])
  assert branches[0] == 0
  assert branches[1] == str(jaxpr).count('= svd[')
  # Of those one a leaf is compiled: the stack loops over its layers.
  text = jax.jit(tx.update).lower(tree, tx.init(tree)).as_text()
  assert text.count('custom_call @lapack_sgesdd') == 2


def test_inner_sees_one_tree_and_projected_parameters():
  seen = {}

  def update(updates, state, params=None, **extra):
    seen.update(updates=updates, params=params, extra=extra)
    return jax.tree.map(jnp.add, updates, params), state

  inner = optax.GradientTransformationExtraArgs(
    lambda params: seen.update(init=params) or optax.EmptyState(), update
  )
  params = {'w': normal((4, 6)), 'b': normal((3,), 1)}
  grads = {'w': normal((4, 6), 2), 'b': normal((3,), 3)}
  tx = optim.low_rank(inner, rank=2, scale=0.5)
  state = tx.init(params)
  np.testing.assert_array_equal(seen['init']['w'], np.zeros((2, 6)))
  np.testing.assert_array_equal(seen['init']['b'], params['b'])
  updates, state = tx.update(grads, state, params, value=3.0)
  p = np.asarray(state.projectors['w'])
  np.testing.assert_allclose(seen['updates']['w'], p.T @ grads['w'], atol=1e-6)
  np.testing.assert_allclose(seen['params']['w'], p.T @ params['w'], atol=1e-6)
  assert seen['extra'] == {'value': 3.0}
  whole = grads['w'] + params['w']
  np.testing.assert_allclose(updates['w'], 0.5 * p @ (p.T @ whole), atol=1e-5)
  # The scale is for projected leaves only.
  np.testing.assert_allclose(updates['b'], grads['b'] + params['b'], atol=1e-6)


def test_parameters_are_needed_only_if_inner_needs_them():
  g = {'w': normal((4, 6))}
  tx = optim.low_rank(optax.scale_by_adam(), rank=2)
  tx.update(g, tx.init(g))
  tx = optim.low_rank(optax.adamw(0.1), rank=2)
  with pytest.raises(ValueError, match='params'):
    tx.update(g, tx.init(g))


@pytest.mark.parametrize(
  'inner',
  [
    optax.adamw(0.1, weight_decay=0.3),
    optax.lamb(0.1),
    optax.adafactor(0.1, min_dim_size_to_factor=1),
    optax.lion(0.1),
    optax.contrib.muon(0.1),
    optax.contrib.schedule_free_adamw(0.1),
  ],
)
def test_full_rank_equals_the_transformation_in_the_turned_basis(inner):
  """Its trajectory is inner's own on P^T W, turned back by P."""
  w, p = normal((4, 6)), np.linalg.qr(np.asarray(normal((4, 4), 1)))[0]
  projector = projection.from_basis(lambda g, old, rank, key: jnp.asarray(p))
  tx = optim.low_rank(inner, rank=4, projector=projector)
  # The first subspace appears with the first gradient, so inner.init sees
  # zeros: start both there.
  state, twin = tx.init(w), inner.init(jnp.zeros((4, 6)))
  for seed in range(3):
    g = normal((4, 6), seed + 2)
    got, state = tx.update(g, state, w)
    want, twin = inner.update(jnp.asarray(p.T) @ g, twin, jnp.asarray(p.T) @ w)
    np.testing.assert_allclose(got, p @ want, atol=2e-5)


def test_reset_starts_inner_anew_at_each_refresh():
  grads = [
    {'w': normal((4, 6), seed), 'b': normal((3,), seed)} for seed in range(5)
  ]
  tx = optim.low_rank(
    optax.scale_by_adam(), 2, update_interval=3, moments='reset'
  )
  state, update = tx.init(grads[0]), jax.jit(tx.update)
  for g in grads:
    updates, state = update(g, state)
  fresh = tx.init(grads[0])
  for g in grads[3:]:
    want, fresh = update(g, fresh)
  assert state.inner.count == fresh.inner.count == 2
  jax.tree.map(np.testing.assert_array_equal, updates, want)


def test_reset_keeps_the_dtypes_of_the_state():
  params, grads = normal((4, 6)), normal((4, 6), dtype=jnp.bfloat16)
  tx = optim.low_rank(optax.scale_by_adam(), 2, moments='reset')
  state = tx.init(params)
  dtypes = jax.tree.map(lambda x: x.dtype, state)
  updates, state = tx.update(grads, state)
  assert jax.tree.map(lambda x: x.dtype, state) == dtypes
  assert updates.dtype == jnp.bfloat16


def test_projector_dtype():
  g = normal((4, 6))
  for dtype in (None, jnp.bfloat16):
    tx = optim.low_rank(optax.identity(), 2, projector_dtype=dtype)
    updates, state = tx.update(g, tx.init(g))
    assert state.projectors.dtype == (dtype or jnp.float32)
    assert updates.dtype == jnp.float32


def test_tree_map_params_sees_through():
  params = {'w': jnp.ones((4, 6)), 'b': jnp.ones(3)}
  tx = optim.low_rank(optax.scale_by_adam(), 2)
  state = optax.tree_map_params(tx, lambda x: x + 1, tx.init(params))
  np.testing.assert_array_equal(state.inner.mu['w'], np.ones((2, 6)))
  np.testing.assert_array_equal(state.projectors['w'], np.ones((4, 2)))
  assert state.count == 0


def test_tree_without_matrices():
  params = {'b': jnp.ones(3), 'none': jnp.zeros((0, 4))}
  tx = optim.low_rank(optax.scale(2.0), 2)
  updates, _ = jax.jit(tx.update)(params, tx.init(params))
  np.testing.assert_array_equal(updates['b'], 2 * np.ones(3))


def test_a_rank_can_be_a_share_of_each_shorter_side():
  params = {
    'a': jnp.ones((8, 12)),
    'b': jnp.ones((2, 16, 11)),
    'c': jnp.ones(3),
  }
  params['thin'] = jnp.ones((20, 3))
  tx = optim.low_rank(optax.trace(0.5), 0.25, axes=last_two)
  trace = tx.init(params).inner.trace
  assert jax.tree.map(jnp.shape, trace) == {
    'a': (2, 12),
    'b': (2, 16, 2),
    'c': (3,),
    'thin': (20, 1),
  }


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'rank': 1.0}, 'rank=1.0: .* at least 1 or a share between 0 and 1'),
    ({'rank': 0}, 'rank=0: give an int of at least 1'),
    ({'rank': -3}, 'rank=-3'),
    ({'rank': 2.5}, 'rank=2.5'),
    ({'rank': jnp.float32(3)}, 'rank is fixed.*static_args'),
    ({'update_interval': 0}, 'update_interval=0'),
    ({'side': 'shrt'}, "unknown side 'shrt': did you mean 'short'"),
    ({'side': 'bot'}, "unknown side 'bot': did you mean 'both'"),
    ({'refresh': 'lasy'}, "unknown refresh schedule 'lasy'.*'lazy'"),
    (
      {'refresh': 'staggered', 'moments': 'reset'},
      "moments='reset' .* refresh='staggered'.*'zero'",
    ),
    ({'projector': 'svdd'}, "unknown projector 'svdd': did you mean 'svd'"),
    ({'moments': 'kep'}, "unknown moments policy 'kep': did you mean 'keep'"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    optim.low_rank(optax.identity(), **arguments)


def test_leaves_must_be_floating():
  tx = optim.low_rank(optax.identity(), 2)
  for dtype in (jnp.int32, jnp.complex64):
    with pytest.raises(ValueError, match=r'a/n is .*optax.masked'):
      tx.init({'a': {'n': jnp.ones((4, 6), dtype)}})
  state = tx.init({'n': jnp.ones((4, 6))})
  with pytest.raises(ValueError, match='n is int32'):
    tx.update({'n': jnp.ones((4, 6), jnp.int32)}, state)


def test_leaves_of_more_axes_need_a_spec():
  params = {'layers': {'wq': jnp.ones((2, 4, 2, 2))}}
  message = re.escape('layers/wq has 4 axes, (2, 4, 2, 2)')
  with pytest.raises(ValueError, match=message):
    optim.galore(0.1).init(params)
