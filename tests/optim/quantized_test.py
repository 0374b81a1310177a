"""Optimizer state in few bits: what is stored, where, and at what cost."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim, quant
from frugax.optim.quantized import quantize_state

SHAPES = {'wide': (64, 136), 'stack': (3, 32, 64), 'norm': (64,)}


def tree(seed, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return {
    k: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for k, shape in shapes.items()
  }


def run(tx, steps=4, shapes=SHAPES, update=None):
  params = tree(0, shapes)
  state, update = tx.init(params), update or jax.jit(tx.update)
  for i in range(steps):
    updates, state = update(tree(i + 1, shapes), state, params)
  return updates, state


def by_hand(inner, codec, steps=4, min_size=4096):
  """The whole tree at once: decode, update, encode."""

  def keep(path, x):
    if x.ndim < 2 or x.size < min_size:
      return x
    signed = path[0].name == 'mu'
    codec_ = quant.Codec(codec, signed=signed)
    return quant.decode(quant.encode(x, codec_, x.ndim - 2))

  params = tree(0)
  state = inner.init(params)
  for i in range(steps):
    updates, state = jax.jit(inner.update)(tree(i + 1), state, params)
    state = jax.tree.map_with_path(keep, state)
  return updates, state


def on_a_chip(monkeypatch, size):
  """Take the way of one accelerator, in parts of a size."""
  monkeypatch.setattr('frugax.optim.streamed._CHIP', size)
  monkeypatch.setattr(
    jax.lax,
    'platform_dependent',
    lambda *arrays, default, **platforms: default(*arrays),
  )


@pytest.mark.parametrize('codec', quant.codecs.BLOCKS)
@pytest.mark.parametrize('size', [2**8, 2**16, 2**30])
@pytest.mark.parametrize('chip', [False, True], ids=['cpu', 'chip'])
def test_leaf_by_leaf_and_in_parts_is_all_at_once(
  codec, size, chip, monkeypatch
):
  if chip:
    on_a_chip(monkeypatch, size)
  else:
    monkeypatch.setattr('frugax.optim.streamed._CACHED', size)
  got, state = run(quantize_state(optax.scale_by_adam(), codec))
  want, want_state = by_hand(optax.scale_by_adam(), codec)
  assert isinstance(state.inner.mu['stack'], quant.Coded)
  assert state.inner.mu['norm'].dtype == jnp.float32
  for k in SHAPES:
    # Parts are compiled otherwise: a last bit may move a number by a cell.
    near = np.isclose(got[k], want[k], rtol=1e-4, atol=1e-6)
    assert near.mean() > 0.995
    decoded = quant.decode(state.inner.nu[k])
    near = np.isclose(decoded, want_state.nu[k], rtol=1e-4, atol=1e-9)
    assert near.mean() > 0.995


@pytest.mark.parametrize(
  ('shape', 'parts'), [((32000, 512), 8), ((512, 32000), 8), ((50257, 64), 0)]
)
def test_an_embedding_is_cut_on_a_chip(shape, parts, monkeypatch):
  """In whole tiles of rows, or not at all."""
  on_a_chip(monkeypatch, 2**21)
  tx = quantize_state(optax.scale_by_adam(), 'dynamic8')
  params = {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}
  jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params))
  assert re.findall(r'length=(\d+)', str(jaxpr)) == [str(parts)] * bool(parts)


def test_the_update_stays_close_to_adam():
  """Mean relative error of the fifth update."""
  want, _ = run(optax.scale_by_adam())
  for codec, bound in (
    ('f32', 1e-6),
    ('bf16', 0.01),
    ('fp8_e4m3', 0.05),
    ('dynamic8', 0.05),
    ('linear8', 0.2),
    ('dynamic4', 0.6),
  ):
    got, _ = run(quantize_state(optax.scale_by_adam(), codec))
    for k in ('wide', 'stack'):
      error = jnp.abs(got[k] - want[k]).mean() / jnp.abs(want[k]).mean()
      assert error < bound, codec


MATRIX = 2048 * 2048 * 4


@pytest.mark.parametrize(
  ('codec', 'most'),
  # In bfloat16 one of the moments is copied, as it is stored: 12 matrices; and
  # the old moments of two leaves are kept.
  [('dynamic8', 3), ('linear8', 3), ('fp8_e4m3', 3), ('bf16_stochastic', 14.1)],
)
@pytest.mark.parametrize(
  'shapes',
  [{f'w{i}': (2048, 2048) for i in range(24)}, {'w': (24, 2048, 2048)}],
  ids=['leaves', 'stack'],
)
def test_little_is_decoded_at_a_time(codec, most, shapes):
  """24 matrices, whose moments are 48 in float32; gradients give way."""
  tx = quantize_state(optax.scale_by_adam(), codec)
  params = {
    k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()
  }
  state = jax.eval_shape(tx.init, params)
  update = jax.jit(tx.update, donate_argnums=(0, 1))
  memory = update.lower(params, state).compile().memory_analysis()
  assert memory.temp_size_in_bytes < most * MATRIX
  # It is not hidden among the arguments.
  packed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert memory.argument_size_in_bytes <= 24 * MATRIX + packed + 4096
  assert packed < 48 * MATRIX * (0.51 if 'bf16' in codec else 0.26)


@pytest.mark.parametrize('codec', ['dynamic8', 'linear8', 'fp8_e4m3'])
def test_no_updates_are_stored(codec):
  """Update and apply; gradients are arguments that are not given away."""
  tx = optax.chain(
    quantize_state(optax.scale_by_adam(), codec),
    optax.scale_by_learning_rate(1e-3),
  )

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = {
    f'w{i}': jax.ShapeDtypeStruct((2048, 2048), jnp.float32) for i in range(24)
  }
  compiled = (
    jax.jit(step, donate_argnums=(0, 1))
    .lower(params, jax.eval_shape(tx.init, params), params)
    .compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * MATRIX


def test_a_step_needs_no_more_than_its_gradients():
  """With them made in the step and updates applied, in float32 beside them."""
  matrix = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
  params = {f'w{i}': matrix for i in range(24)}
  tx = optax.chain(
    quantize_state(optax.scale_by_adam()), optax.scale_by_learning_rate(1e-3)
  )

  def step(params, state, x):
    def loss(params):
      return sum(jnp.sum(jnp.tanh(x @ p)) for p in params.values())

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  compiled = (
    jax.jit(step, donate_argnums=(0, 1))
    .lower(params, jax.eval_shape(tx.init, params), jnp.zeros((8, 2048)))
    .compile()
  )
  temp = compiled.memory_analysis().temp_size_in_bytes
  assert temp < (24 + 3) * MATRIX


def names(tx, params):
  """Formats by path, of the leaves that are not left alone."""
  state = jax.eval_shape(tx.init, params)
  leaves = jax.tree.leaves_with_path(
    state, is_leaf=lambda x: isinstance(x, quant.Coded)
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): x.codec.format
    if isinstance(x, quant.Coded)
    else x.dtype.name
    for path, x in leaves
  }


def test_which_leaves_are_stored_how():
  params = {'w': jnp.zeros((64, 64), jnp.bfloat16), 'b': jnp.zeros(64)}
  found = names(quantize_state(optax.scale_by_adam()), params)
  assert found == {
    'inner/count': 'int32',
    'inner/mu/w': 'dynamic8',
    'inner/nu/w': 'dynamic8',
    'inner/mu/b': 'float32',
    'inner/nu/b': 'float32',
  }
  small = names(quantize_state(optax.scale_by_adam(), min_size=0), params)
  assert small['inner/mu/b'] == 'dynamic8'
  large = names(quantize_state(optax.scale_by_adam(), min_size=4097), params)
  assert large['inner/mu/w'] == 'float32'
  for mask in ({'w': False, 'b': True}, lambda p: {'w': False, 'b': True}):
    tx = quantize_state(optax.scale_by_adam(), min_size=0, mask=mask)
    assert names(tx, params)['inner/nu/w'] == 'float32'
    assert names(tx, params)['inner/nu/b'] == 'dynamic8'
  one = {'nu': 'f32'}
  found = names(quantize_state(optax.scale_by_adam(), fields=one), params)
  assert (found['inner/mu/w'], found['inner/nu/w']) == ('dynamic8', 'float32')


def test_second_moments_have_their_own_map():
  state = quantize_state(optax.scale_by_adam()).init(tree(0))
  assert state.inner.mu['wide'].codec.signed
  assert not state.inner.nu['wide'].codec.signed
  given = quant.Codec('dynamic8', 4096, signed=True)
  tx = quantize_state(optax.scale_by_adam(), given)
  assert tx.init(tree(0)).inner.nu['wide'].codec == given


def test_sizes_count_by_layer_where_layers_are_known():
  params = {'w': jnp.zeros((8, 32, 64))}
  axes = {'w': optim.MatrixAxes((1,), (2,))}
  tx = quantize_state(optax.scale_by_adam(), axes=axes)
  assert names(tx, params)['inner/mu/w'] == 'float32'
  tx = quantize_state(optax.scale_by_adam())
  assert names(tx, params)['inner/mu/w'] == 'dynamic8'


def test_accumulated_gradients_are_left_alone():
  tx = quantize_state(optax.MultiSteps(optax.scale_by_adam(), 2))
  found = names(tx, tree(0))
  assert found['inner/acc_grads/wide'] == 'float32'
  assert found['inner/inner_opt_state/mu/wide'] == 'dynamic8'
  _, state = run(tx)
  assert state.inner.gradient_step == 2


@pytest.mark.parametrize(
  ('codec', 'item', 'scale', 'block'),
  [
    ('dynamic8', 1, 4, 256),
    ('linear8', 1, 4, 256),
    ('dynamic4', 0.5, 4, 128),
    ('linear4', 0.5, 4, 128),
    ('fp8_e4m3', 1, 5, 128),
    ('bf16', 2, 0, 1),
  ],
)
@pytest.mark.parametrize('shape', [(512, 1376), (2048, 5461), (4, 64, 4096)])
def test_bytes(codec, item, scale, block, shape):
  tx = quantize_state(optax.scale_by_adam(), codec)
  got = optim.state_bytes(tx, {'w': jax.ShapeDtypeStruct(shape, jnp.float32)})
  rows, width = math.prod(shape[:-1]), shape[-1]
  one = rows * (math.ceil(width * item) + scale * math.ceil(width / block))
  assert got['moments'] == 2 * one
  assert got['total'] == 2 * one + 4


def test_whole_trees_where_leaves_mix():
  """A global norm in the middle: nothing is computed apart."""
  inner = optax.chain(
    optax.clip_by_global_norm(0.1), optax.scale_by_adam(eps=1e-2)
  )
  want, _ = run(inner)
  got, state = run(quantize_state(inner, 'fp8_e4m3'))
  for k in SHAPES:
    error = jnp.abs(got[k] - want[k]).mean() / jnp.abs(want[k]).mean()
    assert error < 0.05
  assert isinstance(state.inner[1].mu['wide'], quant.Coded)


def test_leaves_that_have_norms_of_their_own():
  """Trust ratios are of whole leaves: no leaf is computed in parts."""
  inner = optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio())
  want, _ = run(inner)
  got, _ = run(quantize_state(inner, 'fp8_e4m3'))
  for k in SHAPES:
    error = jnp.abs(got[k] - want[k]).mean() / jnp.abs(want[k]).mean()
    assert error < 0.05


@pytest.mark.parametrize('outside', [False, True])
@pytest.mark.parametrize('codec', ['dynamic8', 'bf16', 'dynamic4'])
def test_with_low_rank(codec, outside):
  axes = {
    'wide': optim.MatrixAxes((0,), (1,)),
    'stack': optim.MatrixAxes((1,), (2,)),
    'norm': None,
  }

  def low_rank(inner):
    return optim.low_rank(inner, rank=16, update_interval=3, axes=axes)

  adam = optim.scale_by_adam_hf()
  want, _ = run(low_rank(adam), 5)
  quantize = {'codec': codec, 'min_size': 1024}
  if outside:
    tx = quantize_state(low_rank(adam), **quantize)
  else:
    tx = low_rank(quantize_state(adam, **quantize))
  got, state = run(tx, 5)
  state = state.inner.inner
  assert jax.tree.leaves(state.mu['wide'])[0].dtype.itemsize < 4
  assert state.mu['wide'].shape == (16, 136)
  assert state.mu['stack'].shape == (3, 16, 64)
  np.testing.assert_allclose(got['norm'], want['norm'], rtol=1e-5)
  bound = 0.8 if codec == 'dynamic4' else 0.1
  for k in ('wide', 'stack'):
    error = jnp.abs(got[k] - want[k]).mean() / jnp.abs(want[k]).mean()
    assert error < bound


@pytest.mark.parametrize('make', [optim.galore, optim.coap])
def test_a_codec_inside_of_low_rank_stores_what_one_around_it_does(make):
  axes = {'w': optim.MatrixAxes((1,), (2,)), 'norm': ('layers', 'embed')}
  shapes = {'w': (3, 64, 192), 'norm': (3, 64)}
  low = {'rank': 32, 'update_interval': 2, 'axes': axes}

  def trained(tx):
    params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(5):
      draw = np.random.default_rng(step)
      grads = {
        k: jnp.asarray(draw.normal(size=shape), jnp.float32)
        for k, shape in shapes.items()
      }
      updates, state = update(grads, state, params)
    return updates, optim.state_bytes(tx, params)

  got, size = trained(make(0.1, codec='dynamic8', **low))
  around = quantize_state(make(0.1, **low), 'dynamic8', axes=axes)
  want, same = trained(around)
  assert size == same
  assert size['moments'] < 0.3 * trained(make(0.1, **low))[1]['moments']
  for k in shapes:
    # A moment at the edge of two codes may fall to either side, which changes
    # its column of the update.
    off = jnp.abs(got[k] - want[k]).max(axis=-2) > 1e-5
    assert off.mean() < 0.05


def mesh():
  return jax.make_mesh(
    (2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


@pytest.mark.parametrize('codec', ['dynamic8', 'dynamic4', 'fp8_e4m3'])
def test_codes_are_sharded_as_their_parameter(codec):
  shapes = {'w': (16, 1024), 'odd': (16, 1000), 'stack': (2, 512, 512)}
  specs = {
    'w': P('data', 'fsdp'),
    'odd': P(None, 'fsdp'),
    'stack': P(None, 'fsdp', 'data'),
  }
  shardings = {k: NamedSharding(mesh(), spec) for k, spec in specs.items()}
  tx = quantize_state(optax.scale_by_adam(), codec, block=128)
  of_state = optim.state_shardings(tx, tree(0, shapes), shardings)
  spec = {
    k: (x.codes.spec, x.scales.spec) for k, x in of_state.inner.mu.items()
  }
  assert spec['w'] == (P('data', 'fsdp'), P('data', 'fsdp'))
  # 250 columns a shard are no whole blocks.
  assert spec['odd'] == (P(None, 'fsdp'), P(None, None))
  assert spec['stack'] == (P(None, 'fsdp', 'data'), P(None, 'fsdp', 'data'))
  params = jax.device_put(tree(0, shapes), shardings)
  state = jax.jit(tx.init, out_shardings=of_state)(params)
  update = jax.jit(tx.update, out_shardings=(shardings, of_state))
  grads = jax.device_put(tree(1, shapes), shardings)
  updates, _ = update(grads, state)
  want, _ = jax.jit(tx.update)(tree(1, shapes), tx.init(tree(0, shapes)))
  for k in shapes:
    np.testing.assert_allclose(updates[k], want[k], rtol=1e-5)


def test_random_bits_do_not_depend_on_the_mesh():
  tx = quantize_state(optax.scale_by_adam(), 'bf16_stochastic', key=7)
  _, want = run(tx, 3)
  specs = {'wide': P('data', 'fsdp'), 'stack': P(None, 'fsdp'), 'norm': P()}
  shardings = {k: NamedSharding(mesh(), spec) for k, spec in specs.items()}
  of_state = optim.state_shardings(tx, tree(0), shardings)
  update = jax.jit(tx.update, out_shardings=(shardings, of_state))
  state = jax.jit(tx.init, out_shardings=of_state)(
    jax.device_put(tree(0), shardings)
  )
  for i in range(3):
    _, state = update(jax.device_put(tree(i + 1), shardings), state)
  for k in ('wide', 'stack'):
    assert state.inner.mu[k].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.inner.mu[k], want.inner.mu[k])
    np.testing.assert_array_equal(state.inner.nu[k], want.inner.nu[k])


@pytest.mark.parametrize('size', [2**8, 2**30])
@pytest.mark.parametrize('chip', [False, True], ids=['cpu', 'chip'])
def test_random_bits_do_not_depend_on_parts(size, chip, monkeypatch):
  tx = quantize_state(optax.scale_by_adam(), 'bf16_stochastic', key=7)
  _, want = run(tx, 3)
  if chip:
    on_a_chip(monkeypatch, size)
  else:
    monkeypatch.setattr('frugax.optim.streamed._CACHED', size)
  _, got = run(tx, 3)
  for k in ('wide', 'stack'):
    np.testing.assert_array_equal(got.inner.nu[k], want.inner.nu[k])


def test_stochastic_moments_are_unbiased():
  """A sum of 400 steps of which none is seen by nearest rounding."""
  momentum = optax.trace(decay=1.0)
  n, steps, step = 2**14, 400, 2.0**-12  # the spacing at 1 is 2^-7
  params = {'w': jnp.zeros((1, n))}
  grads = {'w': jnp.full((1, n), step)}

  def total(codec):
    tx = quantize_state(momentum, codec, key=3)
    state = tx.init(params)
    _, state = tx.update({'w': jnp.ones((1, n))}, state)
    state = jax.lax.fori_loop(
      0, steps, lambda _, s: tx.update(grads, s)[1], state
    )
    return np.asarray(state.inner.trace['w'], np.float64)

  assert (total('bf16') == 1).all()
  got = total('bf16_stochastic')
  # Each step rounds with a variance of at most a quarter of a spacing squared.
  deviation = math.sqrt(steps * step * (2**-7 - step) / n)
  assert abs(got.mean() - (1 + steps * step)) < 4.5 * deviation
  # What rounds up in one step says nothing of the next.
  assert 0.5 < got.std() / (deviation * math.sqrt(n)) < 1.5


def test_second_moments_can_shrink():
  """In bfloat16 they cannot, with a decay of 0.999; in 8 bits they can."""
  inner = optax.scale_by_adam()
  shapes = {'w': (16, 256)}
  one = jax.tree.map(jnp.ones_like, tree(0, shapes))
  zero = jax.tree.map(jnp.zeros_like, one)
  for codec, shrinks in (
    ('bf16', False),
    ('bf16_stochastic', True),
    ('f32', True),
  ):
    tx = quantize_state(inner, codec)
    state = tx.init(one)
    _, state = tx.update(one, state)
    before = state.inner.nu['w']
    after = jax.lax.fori_loop(
      0, 300, lambda _, s, tx=tx: tx.update(zero, s)[1], state
    )
    ratio = float(
      jnp.mean(after.inner.nu['w'].astype(jnp.float32))
      / jnp.mean(before.astype(jnp.float32))
    )
    assert (abs(ratio - 0.999**300) < 0.01) == shrinks, codec
    assert shrinks or ratio == 1


def test_bad_input():
  with pytest.raises(ValueError, match="unknown codec 'int8'"):
    quantize_state(optax.scale_by_adam(), 'int8')
  with pytest.raises(ValueError, match='block=0'):
    quantize_state(optax.scale_by_adam(), block=0)
