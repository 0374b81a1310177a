"""What the compiled step of a sharded low-rank optimizer communicates.

CPUs multiply the matrices of a stack all at once, so here an array may hold the
factors of all layers; TPUs and GPUs take one layer after the other, which
research/studies/tpu_optimizer.py shows from the TPU's own compiler.
"""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim

LAYERS, DIM, FFN, RANK = 3, 64, 96, 8
# Factors of a whole stack are smaller than the gradient of one layer.
FACTORS, GRADIENT = LAYERS * FFN * RANK, DIM * FFN
SHAPES = {
  'in': (LAYERS, DIM, FFN),
  'out': (LAYERS, FFN, DIM),
  'square': (LAYERS, DIM, DIM),
}
SPECS = {
  'fsdp': {
    'in': P(None, ('fsdp', 'tensor')),
    'out': P(None, None, ('fsdp', 'tensor')),
    'square': P(None, None, ('fsdp', 'tensor')),
  },
  'tensor': {
    'in': P(None, None, ('fsdp', 'tensor')),
    'out': P(None, ('fsdp', 'tensor')),
    'square': P(None, None, ('fsdp', 'tensor')),
  },
  'both': {
    'in': P(None, 'fsdp', 'tensor'),
    'out': P(None, 'tensor', 'fsdp'),
    'square': P(None, 'tensor', 'fsdp'),
  },
}


def entries_of_collectives(tx, specs):
  """The entries of each array that the compiled step communicates."""
  mesh = jax.make_mesh(
    (4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2
  )
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
  shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
  of_state = optim.state_shardings(tx, params, shardings)

  def abstract(tree, shardings):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      shardings,
    )

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = abstract(params, shardings)
  state = abstract(jax.eval_shape(tx.init, params), of_state)
  step = jax.jit(
    step, donate_argnums=(0, 1), out_shardings=(shardings, of_state)
  )
  text = step.lower(params, state, params).compile().as_text()
  found = []
  for line in text.splitlines():
    if match := re.search(
      r' = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
      r'collective-permute)(-start)?\(',
      line,
    ):
      for sizes in re.findall(r'\[([\d,]*)\]', match[1]):
        found.append(math.prod(int(n) for n in sizes.split(',') if n))
  return found


def galore(**options):
  axes = optim.MatrixAxes((-2,), (-1,))
  return optim.galore(
    1e-2,
    rank=RANK,
    update_interval=5,
    axes=dict.fromkeys(SHAPES, axes),
    **{'projector': 'sketch', **options},
  )


@pytest.mark.parametrize('specs', SPECS)
@pytest.mark.parametrize('moments', ['keep', 'rotate'])
@pytest.mark.parametrize('refresh', ['together', 'staggered'])
def test_no_collective_is_larger_than_a_stacks_factors(specs, moments, refresh):
  """Of the gradients, bases and moments of steps and refreshes."""
  tx = galore(moments=moments, refresh=refresh)
  found = entries_of_collectives(tx, SPECS[specs])
  assert found
  assert max(found) <= FACTORS < GRADIENT


@pytest.mark.parametrize('specs', SPECS)
def test_nor_is_one_of_frugal(specs):
  """Its bases are codes that lie flat, which all mesh axes cut at once."""
  axes = dict.fromkeys(SHAPES, optim.MatrixAxes((-2,), (-1,)))
  tx = optim.frugal(1e-2, rank=RANK, axes=axes, min_size=0)
  found = entries_of_collectives(tx, SPECS[specs])
  assert found
  assert max(found) <= FACTORS < GRADIENT


@pytest.mark.parametrize('side', ['left', 'right'])
def test_nor_is_one_of_bases_in_blocks(side):
  tx = galore(side=side, projector_dtype='int4')
  found = entries_of_collectives(tx, SPECS['both'])
  assert found
  assert max(found) <= FACTORS < GRADIENT


@pytest.mark.parametrize('specs', SPECS)
def test_the_svd_gathers_a_gradient(specs):
  """It would be seen."""
  found = entries_of_collectives(galore(projector='svd'), SPECS[specs])
  assert max(found) >= GRADIENT
