"""frugal: what it holds, and that it is what was searched for and judged."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import optim
from frugax.models import llama
from frugax.optim import state as state_lib
from studies import methods, workloads


@pytest.mark.parametrize('size', ['10m', '60m', '350m', '1b', '7b', '70b'])
def test_linears_hold_a_tenth_of_adams_state_at_most(size):
  model = llama.Llama(llama.config(size))
  shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  axes = optim.matrix_axes(model.axes(), whole=('vocab',))
  own, _ = state_lib.parameter_bytes(optim.frugal(1e-2, axes=axes), shapes)
  shares = [
    held / (8 * x.size)
    for (path, x), held in zip(
      jax.tree.leaves_with_path(shapes), jax.tree.leaves(own), strict=True
    )
    if 'layers' in jax.tree_util.keystr(path)
    and 'kernel' in jax.tree_util.keystr(path)
  ]
  assert len(shares) == 7
  assert max(shares) <= 0.1


def test_nothing_is_decomposed():
  params = {'w': jnp.ones((16, 24))}
  tx = optim.frugal(1e-2)
  text = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
  assert 'qr' in text
  assert 'svd' not in text
  assert 'eigh' not in text


def test_is_the_combination_that_the_search_found():
  """Of the benchmark's shapes: a fourth of the model is one of each side."""
  params = {'w': jnp.ones((64, 176)), 'o': jnp.ones((64, 64))}
  found = methods.Parts(
    projector='sketch2', moments='rotate', residual='fira'
  ).method()
  arguments = dict(found.arguments(workloads.WORKLOADS['packed']))
  coded = {
    'codec': arguments.pop('state_codec'),
    'min_size': arguments.pop('state_min_size'),
  }
  make = getattr(optim, found.optimizer)
  want = optim.quantize_state(make(1e-2, b2=0.95, **arguments), **coded)
  got = optim.frugal(1e-2, min_size=coded['min_size'])
  assert (
    coded['codec']
    == inspect.signature(optim.frugal).parameters['codec'].default
  )
  rng = np.random.default_rng(0)
  states = [tx.init(params) for tx in (want, got)]
  for _ in range(7):  # two refreshes
    grads = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape)), params
    )
    updates = []
    for i, tx in enumerate((want, got)):
      found, states[i] = jax.jit(tx.update)(grads, states[i], params)
      updates.append(found)
    jax.tree.map(np.testing.assert_array_equal, *updates)
