"""What traces tell of the mesh, and what is asked of XLA there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim
from frugax.optim import meshes


def mesh_with(kind=AxisType.Auto, shape=(4, 2)):
  return jax.make_mesh(shape, ('fsdp', 'tensor'), axis_types=(kind,) * 2)


def on(mesh, x):
  return jax.device_put(x, NamedSharding(mesh, P('fsdp', 'tensor')))


def test_whole_along_an_axis_only():
  x = on(mesh_with(), jnp.arange(64.0).reshape(8, 8))
  y = jax.jit(lambda x: meshes.uncut(2 * x, -2))(x)
  assert y.sharding.spec == P(None, 'tensor')
  np.testing.assert_array_equal(y, 2 * np.asarray(x))


def test_the_mesh_may_be_that_of_the_context():
  with jax.set_mesh(mesh_with()):
    text = str(jax.make_jaxpr(lambda x: meshes.uncut(x, 0))(jnp.ones((8, 8))))
  assert 'sharding_constraint' in text


@pytest.mark.parametrize(
  'options',
  [None, {'shape': (1, 1)}, {'shape': (8, 1)}, {'kind': AxisType.Explicit}],
  ids=['no mesh', 'one device', 'one axis', 'explicit'],
)
def test_elsewhere_nothing_is_asked(options):
  x = jnp.ones((8, 8))
  x = x if options is None else on(mesh_with(**options), x)
  text = str(jax.make_jaxpr(lambda x: meshes.uncut(x, 0))(x))
  assert 'sharding_constraint' not in text


def test_nor_is_it_without_a_trace():
  x = on(mesh_with(), jnp.ones((8, 8)))
  assert meshes.uncut(x, 0) is x


def test_a_trace_for_parts_knows_the_mesh_and_weak_types():
  mesh = meshes.mesh_of([jnp.ones(3), on(mesh_with(), jnp.ones((8, 8)))])
  x = jax.eval_shape(lambda: jnp.asarray(1.0) * 2)
  weak = jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)
  for given in (x, weak):
    told = meshes.lying_on(mesh, given)
    assert (told.shape, told.dtype) == (given.shape, given.dtype)
    assert told.weak_type == given.weak_type
    seen = []
    jax.make_jaxpr(lambda x: seen.append(jax.typeof(x).sharding.mesh))(told)  # noqa: B023
    assert seen == [mesh]
  assert meshes.lying_on(None, weak) is weak


def test_frugal_on_two_mesh_axes_is_as_on_one_device():
  params = {'w': jnp.zeros((64, 96)), 'o': jnp.zeros((96, 64))}
  specs = {'w': P('fsdp', 'tensor'), 'o': P('tensor', 'fsdp')}
  shardings = {k: NamedSharding(mesh_with(), s) for k, s in specs.items()}
  tx = optim.frugal(1e-2, rank=8, update_interval=2, min_size=0)
  of_state = optim.state_shardings(tx, params, shardings)
  update = jax.jit(tx.update)

  def train(params, state, put):
    rng = np.random.default_rng(0)
    for _ in range(3):
      grads = {
        k: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        for k, x in sorted(params.items())
      }
      updates, state = update(put(grads), state, params)
      params = optax.apply_updates(params, updates)
    return params

  def put(x):
    return jax.device_put(x, shardings)

  want = train(params, tx.init(params), lambda x: x)
  state = jax.device_put(tx.init(params), of_state)
  got = train(put(params), state, put)
  for k, x in want.items():
    np.testing.assert_allclose(got[k], x, atol=1e-4)
