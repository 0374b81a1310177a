"""The overlap of subspaces, as the optimizers' states hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim

RANK = 3
SHAPES = {'tall': (9, 4), 'wide': (2, 5, 8), 'bias': (4,)}
AXES = {
  'tall': optim.MatrixAxes((0,), (1,)),
  'wide': optim.MatrixAxes((1,), (2,)),
  'bias': None,
}


def _tree(seed):
  draw = np.random.default_rng(seed)
  return {
    k: jnp.asarray(draw.normal(size=shape), jnp.float32)
    for k, shape in SHAPES.items()
  }


def _states(seeds=(1, 2), **options):
  """The states of an optimizer after a refresh from each of these gradients."""
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optim.low_rank(
      optax.scale_by_adam(),
      rank=RANK,
      update_interval=1,
      axes=AXES,
      **options,
    ),
  )
  states = [tx.init(_tree(0))]
  for seed in seeds:
    states.append(tx.update(_tree(seed), states[-1], _tree(0))[1])
  return states


def _expected(old, new, side, stacked=False):
  """From the cosines of the angles between the two best subspaces."""
  if stacked:
    return [_expected(*pair, side) for pair in zip(old, new, strict=True)]
  pair = [x if side == 'left' else x.T for x in (old, new)]
  a, b = (np.linalg.svd(x)[0][:, :RANK] for x in pair)
  return np.mean(np.square(np.linalg.svd(a.T @ b)[1]))


@pytest.mark.parametrize('side', ['left', 'right'])
def test_it_is_that_of_the_gradients_best_subspaces(side):
  _, one, two = _states(side=side)
  found = optim.subspace_overlap(one, two)
  assert [*found] == ['tall', 'wide']
  old, new = (jax.tree.map(np.asarray, _tree(seed)) for seed in (1, 2))
  for name, stacked in (('tall', False), ('wide', True)):
    np.testing.assert_allclose(
      found[name],
      _expected(old[name], new[name], side, stacked),
      atol=1e-4,
    )


@pytest.mark.parametrize(
  ('projector', 'dtype', 'atol'),
  [('sketch2', None, 1e-5), ('correlation_aware', None, 1e-5),
   ('svd', 'bfloat16', 1e-5), ('svd', 'int4', 1e-5)],
)  # fmt: skip
@pytest.mark.parametrize('side', ['short', 'long'])
def test_a_subspace_is_all_in_itself(projector, dtype, atol, side):
  _, state = _states(
    (1,), projector=projector, projector_dtype=dtype, side=side
  )
  for share in optim.subspace_overlap(state, state).values():
    np.testing.assert_allclose(share, 1, atol=atol)


def test_few_bits_hardly_turn_a_subspace():
  exact = _states((1, 2))
  rounded = _states((1, 2), projector_dtype='int8')
  a, b = (optim.subspace_overlap(*states[1:]) for states in (exact, rounded))
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=0.02)


def test_both_sides_have_an_overlap_each():
  states = _states(side='both')
  found = optim.subspace_overlap(states[1], states[2])
  assert [*found] == ['tall/0', 'tall/1', 'wide/0', 'wide/1']
  left = optim.subspace_overlap(*_states(side='left')[1:])
  np.testing.assert_allclose(found['tall/0'], left['tall'], atol=1e-5)


def test_there_is_none_before_there_is_a_subspace():
  start, one, _ = _states()
  found = optim.subspace_overlap(start, one)
  assert np.isnan(found['tall']) and np.isnan(found['wide']).all()


def test_it_is_found_in_groups_of_parameters():
  tx = optax.partition(
    {'low': optim.galore(1e-3, rank=2, axes=AXES), 'sgd': optax.sgd(1e-3)},
    {'tall': 'low', 'wide': 'low', 'bias': 'sgd'},
  )
  _, state = tx.update(_tree(1), tx.init(_tree(0)), _tree(0))
  found = optim.subspace_overlap(state, state)
  assert {name.split('/')[-1] for name in found} == {'tall', 'wide'}


def test_states_without_bases_are_refused():
  adam = optax.adam(1e-3).init(_tree(0))
  with pytest.raises(ValueError, match='no subspaces'):
    optim.subspace_overlap(adam, adam)
  for projector in ('random', 'coordinates'):
    _, state = _states((1,), projector=projector)
    with pytest.raises(ValueError, match='projector of tall stores no basis'):
      optim.subspace_overlap(state, state)
  _, state = _states((1,))
  _, other = _states((1,), side='long')
  with pytest.raises(ValueError, match='two different optimizers'):
    optim.subspace_overlap(state, other)
