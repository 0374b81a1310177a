"""Transformations taken apart: what may be, what may not, and what it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim.separate import NotSeparable, Separate

_PARTS = {'head': ('head',), 'layers': ('layers',)}


def _tree(seed=0):
  draw = np.random.default_rng(seed)
  shapes = {'layers': {'w': (3, 4, 6), 'b': (3, 4)}, 'head': {'w': (4, 6)}}
  return jax.tree.map(
    lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _axes(params):
  axes = optim.MatrixAxes((-2,), (-1,))
  return {
    'layers': {'w': axes, 'b': ('layers', 'norm')},
    'head': {'w': axes},
  }


@pytest.mark.parametrize(
  ('tx', 'message'),
  [
    (optax.clip_by_global_norm(1.0), r'head/w depends on layers/'),
    (optax.scale_by_trust_ratio(), 'layers/b sums over all layers'),
    (optax.apply_if_finite(optax.sgd(1.0), 3), 'depends on'),
    (optax.contrib.dog(1.0), 'depends on'),
    (optim.lisa(1.0, active=1), 'no state'),
    # All in one state of bits: its blocks hold several layers.
    (
      optim.quantize_state(optax.trace(0.9), 'linear8', min_size=10, axes=None),
      'which that of all|is no stack',
    ),
  ],
)
def test_what_needs_all_layers_at_once_is_refused(tx, message):
  with pytest.raises(NotSeparable, match=message):
    Separate(tx, _tree(), _PARTS)


def test_a_chain_is_refused_for_one_of_its_links():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))
  with pytest.raises(NotSeparable, match='depends on'):
    Separate(tx, _tree(), _PARTS)
  group = {'layers': 'a', 'head': 'b'}
  # Clipped by groups, of which each is one part: the layers are still mixed.
  tx = optax.partition({'a': tx, 'b': optax.sgd(1.0)}, group)
  with pytest.raises(NotSeparable, match='sums over all layers'):
    Separate(tx, _tree(), _PARTS)


@pytest.mark.parametrize(
  'tx',
  [
    pytest.param(
      optim.stable_spam(0.1, reset_interval=2, total_steps=4, axes=_axes),
      marks=pytest.mark.slow,
    ),
    optim.spam(0.1, threshold=2.0, reset_interval=2, warmup_steps=1),
    optim.galore(
      0.1, rank=2, update_interval=3, refresh='staggered', axes=_axes
    ),
    optax.partition(
      {'a': optim.apollo(0.1, rank=2, axes=None), 'b': optax.adam(0.1)},
      {'layers': {'w': 'b', 'b': 'b'}, 'head': 'a'},
    ),
  ],
  ids=['stable_spam', 'spam', 'staggered', 'partition'],
)
def test_parts_are_the_whole(tx):
  """Updates, moments, counters and counts of what happened."""
  params = _tree()
  separate = Separate(tx, params, _PARTS)
  update = jax.jit(tx.update)

  @jax.jit
  def apart(grads, state, params):
    old = dict(enumerate(separate.flatten(state)))
    new, found, added = dict(old), {}, []
    head = {i: old[i] for i in separate.indices['head']}
    found, leaves = separate.update('head', grads, head, params)
    added.append(leaves)
    new |= leaves
    stacks, rows = {i: old[i] for i in separate.axes}, []
    for i in range(3):
      own = {k: old[k] for k in separate.indices['layers']}
      own |= separate.layer(stacks, i)

      def cut(tree, i=i):
        return {'layers': jax.tree.map(lambda x: x[i : i + 1], tree['layers'])}

      row, leaves = separate.update('layers', cut(grads), own, cut(params))
      stacks = separate.put(stacks, leaves, i)
      added.append(leaves)
      rows.append(row['layers'])
    new |= {k: x for k, x in leaves.items() if k not in head} | stacks
    for k in separate.counted:
      new[k] = separate.add(old[k], sum(leaves[k] for leaves in added))
    found['layers'] = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
    return found, separate.unflatten([new[k] for k in range(len(new))])

  want = got = tx.init(params)
  for seed in range(1, 6):
    want_updates, want = update(_tree(seed), want, params)
    updates, got = apart(_tree(seed), got, params)
    for a, b in (updates, want_updates), (got, want):
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), a, b
      )
