"""Transformations taken apart: what may be, what may not, and what it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim.separate import NotSeparable, Separate

_PARTS = {'head': ('head',), 'layers': ('layers',)}
_ALONE = {'layers': ('layers',)}


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


def _of_each(function):
  """A transformation that applies a function to each leaf."""

  def update(updates, state, params=None):
    del params
    return jax.tree.map(function, updates), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _rows(g):
  return g.reshape(len(g), -1)


def _by_row(g):
  """One layer after the other."""
  return jax.lax.map(lambda x: x / jnp.linalg.norm(x), g)


def _running(g):
  def add(total, x):
    return total + x, total + x

  return jax.lax.scan(add, jnp.zeros_like(g[0]), g)[1]


def _largest(g):
  return jnp.where(g >= jax.lax.top_k(g.ravel(), 3)[0][-1], g, 0.0)


def _first_rows(g):
  def add(i, x):
    return x + jax.lax.dynamic_index_in_dim(g, i, keepdims=False)

  return g - jax.lax.fori_loop(0, len(g), add, jnp.zeros_like(g[0]))


@pytest.mark.parametrize(
  'function',
  [
    lambda g: g / jnp.median(jnp.abs(g)),
    lambda g: jnp.clip(g, *jnp.percentile(g, jnp.array([5.0, 95.0]))),
    _largest,
    lambda g: g / jnp.sqrt(jnp.vdot(g, g)),
    lambda g: g / jnp.sum(jnp.square(g.ravel())),
    lambda g: g / jnp.linalg.norm(_rows(g), 2),
    lambda g: jnp.where(jnp.any(jnp.isnan(g)), 0.0, g),
    lambda g: jnp.cumsum(g, 0),
    lambda g: g + jnp.argmax(g, 0),
    lambda g: jnp.roll(g, 1, 0),
    lambda g: g[::-1],
    lambda g: g - g[:1],
    lambda g: jnp.sort(g, 0),
    lambda g: jnp.einsum('abc,dbc->adc', g, g).sum(1, keepdims=True) * g,
    _running,
    _first_rows,
    lambda g: jax.lax.cond(g.sum() > 0, jnp.negative, jnp.positive, g),
  ],
)
def test_a_function_of_several_layers_is_refused(function):
  tree = {'layers': {'w': jnp.ones((3, 4, 6))}}
  with pytest.raises(NotSeparable, match=r'layers/w (sums|takes)'):
    Separate(_of_each(function), tree, _ALONE)


@pytest.mark.parametrize(
  'function',
  [
    lambda g: g / g.shape[0],
    lambda g: g / g.size,
    lambda g: g * 0.9 ** jnp.arange(len(g)).reshape(-1, *[1] * (g.ndim - 1)),
  ],
)
def test_what_knows_how_many_layers_there_are_is_refused(function):
  """As rates that fall from layer to layer do: one layer has no number."""
  with pytest.raises(NotSeparable, match='how many layers'):
    Separate(_of_each(function), {'layers': {'w': jnp.ones((3, 4, 6))}}, _ALONE)


@pytest.mark.parametrize(
  'function',
  [
    _by_row,
    jax.vmap(lambda x: x / jnp.median(jnp.abs(x))),
    jax.vmap(lambda x: x * jnp.linalg.svd(x, compute_uv=False)[0]),
    jax.vmap(lambda x: jnp.linalg.qr(x @ x.T)[0] @ x),
    jax.vmap(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: x @ y.T @ y, x)),
    jax.vmap(
      lambda x: jax.lax.cond(x.sum() > 0, jnp.negative, jnp.positive, x)
    ),
    jax.vmap(lambda x: x[jnp.argsort(x[:, 0])]),
    jax.vmap(lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x)[1]),
    lambda g: (_rows(g) / _rows(g).max(1, keepdims=True)).reshape(g.shape),
    lambda g: jnp.pad(g, ((0, 0), (1, 1), (0, 0)), mode='edge')[:, 1:-1] / 2,
    lambda g: jnp.cumsum(jnp.sort(g, -1)[..., ::-1], 1),
    lambda g: jnp.take_along_axis(g, jnp.argmax(g, 1, keepdims=True), 1) - g,
    lambda g: (
      jnp.moveaxis(jnp.stack([g, -g]), 0, 1)
      .reshape(-1, 6)[::1]
      .reshape(len(g), 2, 4, 6)
      .sum(1)
    ),
  ],
)
def test_a_function_of_each_layer_is_accepted_and_applied(function):
  draw = np.random.default_rng(1)
  tree = {'layers': {'w': jnp.asarray(draw.normal(size=(3, 4, 6)))}}
  separate = Separate(_of_each(function), tree, _ALONE)
  want = function(tree['layers']['w'])
  for i in range(3):
    layer = jax.tree.map(lambda x, i=i: x[i : i + 1], tree)
    got, _ = separate.update('layers', layer, {}, layer)
    np.testing.assert_allclose(
      got['layers']['w'][0], want[i], rtol=1e-5, atol=1e-6
    )


def test_rates_of_all_layers_in_an_array_are_refused():
  rates = np.array([1.0, 0.9, 0.8], np.float32)[:, None, None]
  with pytest.raises(NotSeparable, match='3 layers and not with one more'):
    Separate(
      _of_each(lambda g: rates * g),
      {'layers': {'w': jnp.ones((3, 4, 6))}},
      _ALONE,
    )


def test_norms_that_muon_takes_for_one_matrix_are_refused():
  """Optax's Muon orthogonalizes all leaves of two axes, those too."""
  tree = _tree()
  with pytest.raises(NotSeparable, match='layers'):
    Separate(optax.contrib.muon(0.1), tree, _PARTS)


def _noise(draw):
  """SGD on gradients with noise; `draw` gives that of one leaf."""

  def update(updates, state, params=None):
    del params
    noise = jax.tree.map(lambda g: draw(jax.random.key(0), g), updates)
    return jax.tree.map(jnp.add, updates, noise), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _whole(key, g):
  return jax.random.normal(key, g.shape)


def _by_split_keys(key, g):
  keys = jax.random.split(key, len(g))
  return jax.vmap(lambda key: jax.random.normal(key, g.shape[1:]))(keys)


def _one_by_one(key, g):
  rows = [
    jax.random.normal(jax.random.fold_in(key, i), g.shape[1:])
    for i in range(len(g))
  ]
  return jnp.stack(rows)


def _sometimes(key, g):
  return jax.lax.cond(
    g.sum() > 0, lambda: _whole(key, g), lambda: jnp.zeros_like(g)
  )


@pytest.mark.parametrize(
  'tx',
  [
    *map(_noise, (_whole, _by_split_keys, _one_by_one, _sometimes)),
    optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.adam(1.0)),
  ],
)
def test_a_draw_that_gives_each_layer_its_own_numbers_is_refused(tx):
  """Of one layer alone it would be the same for all."""
  with pytest.raises(NotSeparable, match=r'random numbers of the shape \('):
    Separate(tx, _tree(), _PARTS)


def test_a_draw_that_layers_share_is_accepted():
  def shared(key, g):
    return jax.random.normal(key, g.shape[-1:])

  Separate(_noise(shared), _tree(), _PARTS)


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
