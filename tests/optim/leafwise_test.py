"""Functions of trees taken apart by leaf, and what is elementwise in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import config as fx_config
from frugax.optim import leafwise
from frugax.train import step


def program(function, shapes):
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  owners = [0, 1][: len(shapes)]
  return leafwise.Program(function, inputs, owners)


@pytest.mark.parametrize(
  ('function', 'elementwise'),
  [
    (lambda x: [jnp.where(x > 0, x, 0) * 2], True),
    (lambda x: [x + jnp.ones_like(x)], True),
    (lambda x: [x / jnp.linalg.norm(x)], False),
    (lambda x: [x.T], False),
    (lambda x: [x[::-1]], False),
    (lambda x: [jnp.cumsum(x, 0)], False),
    (lambda x: [x + jnp.arange(4.0)], False),
    (lambda x: [x / jnp.sum(jnp.ones_like(x) * 2)], False),
    (lambda x: [x + jax.random.normal(jax.random.key(0), x.shape)], False),
    (lambda x: [x + np.arange(4, dtype=np.float32)], False),
  ],
)
def test_what_is_elementwise(function, elementwise):
  assert program(function, [(4, 4)]).elementwise([0], (4, 4)) == elementwise


@pytest.mark.parametrize(
  ('function', 'apart'),
  [
    (lambda x, y: [x * 2, jnp.tanh(y)], True),
    (lambda x, y: list(jax.jit(lambda a, b: (a + 1, b + 2))(x, y)), True),
    (lambda x, y: [x + y.sum(), y], False),
    (lambda x, y: [y, x], False),
    (
      lambda x, y: jax.lax.cond(x[0] > 0, lambda: [x, y], lambda: [y, x]),
      False,
    ),
  ],
)
def test_what_is_apart(function, apart):
  found = program(function, [(4,), (4,)])
  assert found.separates([0, 1]) == apart
  if apart:
    x, y = jnp.arange(4.0), jnp.ones(4)
    want = function(x, y)
    np.testing.assert_array_equal(found.run([0], {0: x})[0], want[0])
    np.testing.assert_array_equal(found.run([1], {1: y})[0], want[1])


def test_a_schedule_is_elementwise():
  """Whatever it is made of: it is a number, the same for all elements."""

  def function(x, count):
    return [x * optax.cosine_decay_schedule(0.1, 10)(count)]

  inputs = [jax.ShapeDtypeStruct((4, 4), 'float32')]
  inputs.append(jax.ShapeDtypeStruct((), 'int32'))
  found = leafwise.Program(function, inputs, [0, leafwise.SHARED])
  assert found.elementwise([0], (4, 4))


def test_conds_and_barriers_of_several_leaves_are_taken_apart():
  def inner(x, y):
    return jax.lax.cond(x.ndim == 1, lambda: (x * 2, y), lambda: (x, y * 3))

  def function(x, y, count):
    x, y = jax.lax.cond(count > 0, inner, lambda x, y: (x, y + 1), x, y)
    return list(jax.lax.optimization_barrier((x, y)))

  inputs = [jax.ShapeDtypeStruct((4,), 'float32')] * 2
  inputs.append(jax.ShapeDtypeStruct((), 'int32'))
  found = leafwise.Program(function, inputs, [0, 1, leafwise.SHARED])
  assert found.separates([0, 1])
  x, y = jnp.arange(4.0), jnp.ones(4)
  for count in (0, 1):
    want = function(x, y, count)
    np.testing.assert_array_equal(found.run([0], {0: x, 2: count})[0], want[0])
    np.testing.assert_array_equal(found.run([1], {1: y, 2: count})[0], want[1])


@pytest.mark.parametrize(
  ('name', 'wanted'), [('adamw', 'elementwise'), ('galore', 'separates')]
)
def test_a_run_decodes_one_leaf_at_a_time(name, wanted, monkeypatch):
  """With its schedule, and with the refreshes of all leaves in one cond."""
  config = fx_config.load(f'configs/llama.py:size=tiny,opt={name}')
  with config.optimizer.unlocked():
    config.optimizer.state_codec = 'dynamic8'
  found, original = [], getattr(leafwise.Program, wanted)

  def watched(*args):
    found.append(original(*args))
    return found[-1]

  monkeypatch.setattr(leafwise.Program, wanted, watched)
  step.build(config, jax.devices()[:1])  # traces an update
  assert found
  assert all(found)
