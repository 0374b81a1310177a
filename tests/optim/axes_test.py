"""Matrix axes: views, logical names, and the errors that name the leaf."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import axes as axes_lib

Axes = optim.MatrixAxes


def test_is_a_leaf():
  assert jax.tree.leaves({'w': Axes((0,), (1,))}) == [Axes((0,), (1,))]


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(st.data())
def test_view_and_back(data):
  shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
  order = data.draw(st.permutations(range(len(shape))))
  stop = data.draw(st.integers(2, len(shape)))
  split = data.draw(st.integers(1, stop - 1))
  negative = data.draw(st.booleans())
  named = [i - len(shape) if negative else i for i in order]
  axes = Axes(tuple(named[:split]), tuple(named[split:stop]))
  x = np.arange(np.prod(shape)).reshape(shape)
  y = optim.as_matrix(jnp.asarray(x), axes)
  rows, cols = order[:split], order[split:stop]
  batch = sorted(order[stop:])
  # Truth: one entry at a time, by the definition of row and column index.
  for index in np.ndindex(*shape):
    at = tuple(index[i] for i in batch)
    for group in (rows, cols):
      sizes = [shape[i] for i in group]
      at += (int(np.ravel_multi_index([index[i] for i in group], sizes)),)
    assert y[at] == x[index]
  np.testing.assert_array_equal(optim.from_matrix(y, axes, x.shape), x)


@pytest.mark.parametrize(
  ('names', 'want'),
  [
    (('layers', 'embed', 'heads', 'head_dim'), Axes((1,), (2, 3))),
    (('layers', 'heads', 'head_dim', 'embed'), Axes((1, 2), (3,))),
    (('layers', 'experts', 'embed', 'mlp'), Axes((2,), (3,))),
    (('embed', 'layers', 'mlp'), Axes((0,), (2,))),
    (('vocab', 'embed'), Axes((0,), (1,))),
    (('embed', 'mlp'), Axes((0,), (1,))),
    (('layers', 'norm'), None),
    (('embed',), None),
    ((), None),
  ],
)
def test_from_names(names, want):
  assert Axes.from_names(names) == want


@pytest.mark.parametrize(
  'names',
  [('heads', 'head_dim'), ('a', 'embed', 'b'), ('embed', 'embed')],
)
def test_from_names_refuses_what_is_unclear(names):
  with pytest.raises(ValueError, match=re.escape(repr(names))) as error:
    optim.matrix_axes({'block': {'w': names}})
  assert 'block/w' in str(error.value)
  assert 'MatrixAxes(rows=..., cols=...)' in str(error.value)


def test_matrix_axes_of_a_tree():
  names = {'embed': ('vocab', 'embed'), 'w': ('embed', 'mlp'), 'b': ('mlp',)}
  assert optim.matrix_axes(names) == {
    'embed': Axes((0,), (1,)),
    'w': Axes((0,), (1,)),
    'b': None,
  }
  whole = optim.matrix_axes(names, whole=('vocab',))
  assert whole == {'embed': None, 'w': Axes((0,), (1,)), 'b': None}


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Axes((), (1,)), r'rows=\(\).*at least one axis'),
    (lambda: Axes((0,), ('x',)), r"cols=\('x',\)"),
    (lambda: axes_lib.matrix_shape((2, 3), Axes((0,), (2,))), 'names axis 2'),
    (lambda: axes_lib.matrix_shape((2, 3), Axes((-3,), (1,))), 'axes from -2'),
    (lambda: axes_lib.matrix_shape((2, 3), Axes((0,), (-2,))), 'axis twice'),
    (lambda: axes_lib.matrix_shape((), Axes((0,), (1,))), 'on a scalar'),
  ],
)
def test_bad_axes(make, message):
  with pytest.raises(ValueError, match=message):
    make()


PARAMS = {
  'a': {'w': jnp.zeros((2, 3)), 'stack': jnp.zeros((4, 2, 3))},
  'b': jnp.zeros(3),
  'empty': jnp.zeros((0, 3)),
}


def resolve(axes, params=PARAMS):
  """Resolved axes in the order a/stack, a/w, b, empty."""
  return axes_lib.resolve(params, axes)


@pytest.mark.parametrize(
  'spec',
  [
    Axes((1,), (2,)),
    Axes((-2,), (-1,)),
    optax.contrib.GaLoreDimensionNumbers(1, 2),
    optax.contrib.MuonDimensionNumbers((1,), (2,)),
  ],
)
def test_resolve_a_tree_or_function(spec):
  tree = {'a': {'w': None, 'stack': spec}, 'b': None, 'empty': Axes((0,), (1,))}
  for axes in (tree, lambda params: tree):
    stack, *others = resolve(axes)
    assert axes_lib.matrix_shape((4, 2, 3), stack) == (4, 2, 3)
    assert others == [None, None, None]


def test_resolve_by_default():
  params = {'w': jnp.zeros((2, 3)), 'b': jnp.zeros(3), 's': jnp.zeros(())}
  assert resolve(None, params) == [None, None, Axes((0,), (1,))]
  with pytest.raises(ValueError, match=r'a/stack has 3 axes.*MatrixAxes'):
    resolve(None)


def test_resolve_passes_over_masked_leaves():
  params = {'w': jnp.zeros((2, 3)), 'x': optax.MaskedNode()}
  axes = {'w': Axes((0,), (1,)), 'x': Axes((0,), (1,))}
  assert resolve(None, params) == resolve(axes, params) == [axes['w']]
  assert resolve(axes, {'x': optax.MaskedNode()}) == []


@pytest.mark.parametrize(
  ('w', 'message'),
  [
    ('rows', r"a/w are 'rows'"),
    ((0, 1), r'a/w are \(0, 1\)'),
    (Axes((0,), (2,)), r'a/w: .*names axis 2'),
    (Axes((0,), (0,)), r'a/w: .*axis twice'),
  ],
)
def test_resolve_errors_name_the_leaf(w, message):
  axes = {'a': {'w': w, 'stack': None}, 'b': None, 'empty': None}
  with pytest.raises(ValueError, match=message):
    resolve(axes)


@pytest.mark.parametrize('axes', [{'a': None}, {'a': {'w': None}, 'b': None}])
def test_resolve_refuses_another_structure(axes):
  with pytest.raises(ValueError, match='same structure as the parameters'):
    resolve(axes)
