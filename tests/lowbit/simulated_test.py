"""Simulated 4-bit layers, and the model in every kind of recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import lowbit
from frugax.lowbit.operands import SIMULATED
from frugax.models import llama
from frugax.quant import Scaling, simulated

# Formats of activations and weights.
RECIPES = {
  'fp4_sim': ('fp4_e1m2', 'fp4_e1m2'),
  'int4_sim': ('int4_absmax', 'int4_min_max'),
}
CONFIG = llama.config('tiny', n_layers=2)


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def rounded(x, format, block=256):
  return np.asarray(SIMULATED[format](x, block), np.float64)


@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize('ffn', [352, 5461])
def test_product_and_gradients_are_those_of_the_rounded_operands(name, ffn):
  """Groups lie along the input of a weight as torch stores it, (out, in)."""
  activations, weights = RECIPES[name]
  x, w, up = normal(2, 3, ffn), normal(ffn, 16, seed=1), normal(2, 3, 16)
  dot = lowbit.dot_general(lowbit.recipe(name))
  y, back = jax.vjp(lambda x, w: dot(x, w, (((2,), (0,)), ((), ()))), x, w)
  x_hat = rounded(x, activations)
  w_hat = rounded(w.T, weights).T
  want = (
    x_hat @ w_hat,
    up @ w_hat.T,
    np.einsum('btd,bto->do', x_hat, np.asarray(up, np.float64)),
  )
  for got, exact in zip((y, *back(up)), want, strict=True):
    np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-3)
  assert np.abs(y - x @ w).max() > 0.1


def test_heads_are_flattened_as_torch_does():
  """The kernel of the output projection contracts its two leading axes."""
  x, w = normal(2, 3, 4, 32), normal(4, 32, 16, seed=1)
  dot = lowbit.dot_general(lowbit.recipe('fp4_sim'))
  got = dot(x, w, (((2, 3), (0, 1)), ((), ())))
  flat = rounded(w.reshape(128, 16).T, 'fp4_e1m2').T
  want = rounded(x, 'fp4_e1m2').reshape(2, 3, 128) @ flat
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_one_operand_may_be_left_alone():
  weights = lowbit.Operand('int4_min_max', Scaling((1, 256)))
  weights_only = lowbit.Recipe(lowbit.Product(right=weights))
  x, w = normal(4, 300), normal(300, 5, seed=1)
  got = lowbit.dot_general(weights_only)(x, w, (((1,), (0,)), ((), ())))
  want = x @ rounded(w.T, 'int4_min_max').T
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def loss(config, params, tokens):
  logits = llama.Llama(config).apply(params, tokens[:, :-1])
  logp = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean()


def of(name, **overrides):
  return llama.config('tiny', n_layers=2, matmul=name, **overrides)


@pytest.mark.parametrize(
  ('name', 'remat'),
  [
    pytest.param('fp4_sim', 'none', marks=pytest.mark.slow),
    ('int4_sim', 'full'),
    ('quest4', 'linears'),
  ],
)
def test_the_model_trains_in_it(name, remat):
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 0, 320)
  params = llama.Llama(CONFIG).init(jax.random.key(0))
  value = jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)
  plain, plain_grad = value(CONFIG, params, tokens)
  got, grad = value(of(name, remat=remat), params, tokens)
  assert jnp.isfinite(got) and 0 < abs(got - plain) < 0.5
  for path, g in jax.tree.leaves_with_path(grad):
    assert jnp.isfinite(g).all() and (g != 0).any(), path

  def cosine(a, b):
    return jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)

  similar = jax.tree.map(cosine, grad, plain_grad)
  assert all(0.7 < s < 0.99999 for s in jax.tree.leaves(similar)), similar


def test_head_embedding_and_norms_are_left_alone():
  """With kernels of zero the layers add nothing: the loss is that without."""
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 0, 320)
  params = llama.Llama(CONFIG).init(jax.random.key(0))
  params['layers'] = jax.tree.map_with_path(
    lambda path, p: 0 * p if path[-1].key == 'kernel' else p, params['layers']
  )
  assert loss(of('fp4_sim'), params, tokens) == loss(CONFIG, params, tokens)


def test_an_odd_ffn_trains():
  config = of('int4_sim', ffn=341)
  params = llama.Llama(config).init(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (1, 10), 0, 320)
  assert jnp.isfinite(loss(config, params, tokens))


def test_sharded_equals_one_device():
  """Rows of activations on eight devices, weights cut along both axes."""
  x, w = normal(16, 24, 300), normal(300, 64, seed=1)
  dot = lowbit.dot_general(lowbit.recipe('fp4_sim'))

  @jax.jit
  def product(x, w):
    return dot(x, w, (((2,), (0,)), ((), ())))

  mesh = jax.make_mesh(
    (4, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

  got = product(put(x, 'data'), put(w, 'data', 'tensor'))
  np.testing.assert_allclose(got, product(x, w), rtol=1e-4, atol=1e-4)


def test_an_injected_product_takes_the_place_of_the_recipe():
  tokens = jnp.arange(8)[None]
  params = llama.Llama(CONFIG).init(jax.random.key(0))
  model = llama.Llama(of('fp4_sim'), dot_general=lax.dot_general)
  want = llama.Llama(CONFIG).apply(params, tokens)
  np.testing.assert_array_equal(model.apply(params, tokens), want)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: lowbit.recipe('fp4_simm'), "'fp4_simm': did you mean 'fp4_sim'"),
    (lambda: of('int3'), "unknown low-bit recipe 'int3'"),
  ],
)
def test_bad_arguments(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_every_format_has_a_recipe():
  for name, formats in RECIPES.items():
    first = lowbit.recipe(name).forward
    assert (first.left.format, first.right.format) == formats
  assert {f for pair in RECIPES.values() for f in pair} == set(SIMULATED)
  assert SIMULATED['fp4_e1m2'] is simulated.fp4_e1m2
