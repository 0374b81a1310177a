"""Projectors: how bases are stored, coordinates, power steps."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim, quant
from frugax.optim import projection, projectors


def normal(shape, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def last_two(params):
  axes = optim.MatrixAxes((-2,), (-1,))
  return jax.tree.map(lambda p: axes if p.ndim > 1 else None, params)


def context(i=0):
  return projection.Context(jax.random.key(i), i)


def refreshed(name, g, rank, side='short', dtype=jnp.float32):
  build = projectors.PROJECTORS.get(name, name)
  projector = build(g.shape, rank, side, dtype)
  return projector, projector.refresh(g, projector.init(), context())


@pytest.mark.parametrize('name', projectors.PROJECTORS)
@pytest.mark.parametrize('side', projection.SIDES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int4'])
def test_project_and_back_are_the_basis(name, side, dtype):
  """R = B^T G and B R, or from the right, whatever the basis is stored in."""
  g = normal((2, 6, 10))
  projector, state = refreshed(name, g, 4, side, dtype)
  empty = jax.tree.map(lambda x: (x.shape, x.dtype), projector.init())
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == empty
  basis = np.asarray(projector.basis(state), np.float64)
  assert projector.basis(state).dtype == jnp.float32
  rows = projection.projects_rows(6, 10, side)
  assert basis.shape == ((2, 6, 4) if rows else (2, 10, 4))
  g64 = np.asarray(g, np.float64)
  small = basis.swapaxes(1, 2) @ g64 if rows else g64 @ basis
  back = basis @ small if rows else small @ basis.swapaxes(1, 2)
  got = projector.project(g, state)
  np.testing.assert_allclose(got, small, atol=3e-2 if dtype[0] == 'b' else 1e-5)
  got = projector.back(jnp.asarray(small, jnp.float32), state)
  np.testing.assert_allclose(got, back, atol=3e-2 if dtype[0] == 'b' else 1e-5)


@pytest.mark.parametrize('name', ['svd', 'sketch', 'sketch2', 'coordinates'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, 'int4', jnp.int4])
def test_a_stack_has_the_bases_of_its_layers(name, dtype):
  """An odd number of elements a layer: no block or byte holds two of them."""
  g = normal((3, 7, 11))
  projector, state = refreshed(name, g, 5, dtype=dtype)
  basis = projector.basis(state)
  for i in range(3):
    one, alone = refreshed(name, g[i], 5, dtype=dtype)
    np.testing.assert_allclose(one.basis(alone), basis[i], atol=1e-6)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_int4_is_near_and_small(side):
  g = normal((3, 64, 96))
  projector, state = refreshed('svd', g, 16, side, 'int4')
  exact, full = refreshed('svd', g, 16, side)
  long = 64 if side == 'left' else 96
  assert isinstance(state, quant.QTensor)
  assert state.nbytes == 3 * long * 16 * (1 / 2 + 4 / 256)
  want = exact.basis(full)
  error = projector.basis(state) - want
  # Half of 15 steps over the range of a block of 256 entries.
  assert jnp.abs(error).max() <= (want.max() - want.min()) / 30 * (1 + 2**-7)


@pytest.mark.parametrize('projector', ['svd', 'coordinates', 'random'])
def test_int4_reaches_the_projector_through_low_rank(projector):
  tx = optim.low_rank(
    optax.trace(0.9),
    2,
    projector=projector,
    projector_dtype='int4',
    axes=last_two,
  )
  g = normal((2, 8, 24))
  state = tx.init(g)
  stored = isinstance(state.projectors, quant.QTensor)
  assert stored == (projector == 'svd')
  update = jax.jit(tx.update, donate_argnums=1)
  u, new = update(g, state)
  assert jax.tree.structure(new) == jax.tree.structure(tx.init(g))
  inside = jnp.vdot(u, g) / jnp.linalg.norm(u) / jnp.linalg.norm(g)
  assert 0.3 < inside < 1


def test_int4_survives_saving_leaf_by_leaf():
  tx = optim.galore(0.1, rank=2, projector_dtype='int4', axes=last_two)
  params = {'w': normal((2, 8, 24))}
  _, state = tx.update(params, tx.init(params), params)
  leaves, treedef = jax.tree.flatten(state)
  again = treedef.unflatten([jnp.asarray(np.array(x)) for x in leaves])
  want, _ = tx.update(params, state, params)
  got, _ = tx.update(params, again, params)
  np.testing.assert_array_equal(got['w'], want['w'])


def test_int4_is_sharded_with_the_side_it_spans():
  mesh = jax.make_mesh(
    (8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  params = {'in': normal((2, 64, 96)), 'out': normal((2, 96, 64), 1)}
  shardings = {
    'in': NamedSharding(mesh, P(None, 'fsdp')),
    'out': NamedSharding(mesh, P(None, None, 'fsdp')),
  }
  tx = optim.galore(
    0.1, rank=8, projector_dtype='int4', projector='sketch', axes=last_two
  )
  of_state = optim.state_shardings(tx, params, shardings)
  put = jax.device_put(params, shardings)
  state = jax.jit(tx.init, out_shardings=of_state)(put)
  # 64 * 8 codes a layer: 32 bytes a device; two blocks do not divide by 8.
  for name in params:
    packed = state[0].projectors[name]
    assert packed.data.addressable_shards[0].data.shape == (2, 32)
    assert packed.scales.sharding.spec == P(None)
  update = jax.jit(tx.update, out_shardings=(shardings, of_state))
  got, _ = update(put, state, put)
  want, _ = jax.jit(tx.update)(params, tx.init(params), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want
  )


@pytest.mark.parametrize('dtype', ['int32', 'int16', bool])
def test_projectors_have_no_such_dtype(dtype):
  with pytest.raises(ValueError, match=r'stored as .* int4, int8'):
    projectors.svd((4, 4), 2, 'short', dtype)


@settings(deadline=None, max_examples=15)
@given(
  shape=st.sampled_from([(1, 1), (1, 7), (5, 3), (3, 8, 5), (2, 2, 4, 6)]),
  rank=st.integers(1, 9),
  side=st.sampled_from(projection.SIDES),
)
def test_coordinates_keep_the_rows_of_largest_norm(shape, rank, side):
  g = normal(shape)
  projector, state = refreshed('coordinates', g, rank, side)
  rows = projection.projects_rows(*shape[-2:], side)
  rank = min(rank, *shape[-2:])
  lines = np.asarray(g if rows else g.mT)
  kept = np.asarray(projector.back(projector.project(g, state), state))
  kept = kept if rows else kept.swapaxes(-1, -2)
  norms = np.linalg.norm(lines, axis=-1)
  least = np.sort(norms, axis=-1)[..., -rank][..., None]
  np.testing.assert_array_equal(kept, lines * (norms >= least)[..., None])


def test_coordinates_of_tiny_gradients():
  """Squares of these vanish in float32."""
  g = 1e-25 * normal((6, 4)).at[4].mul(50)
  _, state = refreshed('coordinates', g, 1, 'left')
  assert state.tolist() == [4]


def test_random_coordinates_are_drawn_from_the_stored_key():
  g = normal((2, 9, 5))
  projector, state = refreshed('random_coordinates', g, 3, 'left')
  assert state.shape == (2,)
  basis = np.asarray(projector.basis(state))
  np.testing.assert_array_equal(basis[0], basis[1])
  np.testing.assert_array_equal(basis[0].T @ basis[0], np.eye(3))
  seen = np.zeros(9)
  for i in range(200):
    p = projector.basis(projector.refresh(g, state, context(i)))
    seen += np.asarray(p[0].sum(-1))
  # Each of 9 rows is one of 3 in a third of 200 draws, deviation 6.7.
  assert (np.abs(seen - 200 / 3) < 30).all()


def test_a_second_power_step_is_closer_to_the_best_subspace():
  g = normal((40, 50)) * (jnp.arange(1, 41) ** -0.5)[:, None]
  best = (np.linalg.svd(np.asarray(g), compute_uv=False)[:8] ** 2).sum()
  one, two = (
    float(jnp.sum(p.project(g, state) ** 2)) / best
    for p, state in (refreshed(name, g, 8) for name in ('sketch', 'sketch2'))
  )
  assert one < two <= 1 + 1e-5
  assert 1 - two < 0.7 * (1 - one)


def test_a_sketch_stays_orthonormal_where_cholesky_would_fail():
  """Singular values over eight orders; the second step sees their squares."""
  left, right = (np.linalg.qr(normal((30, 30), i))[0] for i in (1, 2))
  g = jnp.asarray((left * np.logspace(0, -8, 30)) @ right.T, jnp.float32)
  for name in ('sketch', 'sketch2'):
    projector, state = refreshed(name, g, 20)
    basis = projector.basis(state)
    np.testing.assert_allclose(basis.T @ basis, np.eye(20), atol=1e-5)


@pytest.mark.parametrize('spec', [P(None, 'x'), P(None, None, 'x')])
@pytest.mark.parametrize(
  'name', ['svd', 'sketch', 'sketch2', 'correlation_aware', 'coordinates']
)
def test_a_sharded_refresh_gathers_nothing_larger_than_a_basis(name, spec):
  """But that of the SVD, which shows that the test would see it."""
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  shape, rank = (3, 64, 96), 4
  g = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  projector = projectors.PROJECTORS[name](shape, rank, 'short', g.dtype)

  def refresh(g):
    old = projector.init()
    moment = projector.project(g, old)
    return projector.refresh(g, old, context(1)._replace(moment=moment))

  sizes = []
  for line in jax.jit(refresh).lower(g).compile().as_text().splitlines():
    if match := re.search(r' = (.*) (all-gather|all-to-all|all-reduce)', line):
      for dimensions in re.findall(r'\[([\d,]*)\]', match[1]):
        sizes.append(math.prod(int(n) for n in dimensions.split(',') if n))
  assert (max(sizes) >= 64 * 96) == (name == 'svd')  # a whole layer
  assert max(sizes) <= 3 * 96 * rank or name == 'svd'
