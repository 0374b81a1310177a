"""Which linear of the model is computed by which recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import lowbit
from frugax.models import llama

TOKENS = jnp.arange(12).reshape(1, 12)
LAYERS = 3


def model(wrap=None, **fields):
  config = llama.config('tiny', n_layers=LAYERS, **fields)
  return llama.Llama(config, wrap=wrap)


PARAMS = model().init(jax.random.key(0))


def logits(**fields):
  return np.asarray(model(**fields).apply(PARAMS, TOKENS))


def stepwise(plain, matmul):
  """The layers one by one, those that `plain` names by the plain model."""
  low, high = model(matmul=matmul), model()
  x = high.embed(PARAMS, TOKENS)
  for i in range(LAYERS):
    layer = jax.tree.map(lambda p: p[i], PARAMS['layers'])  # noqa: B023
    x = (high if i in plain else low).block(layer, x)
  return np.asarray(high.head(PARAMS, x))


# Its weights alone are rounded, so that no activation lies on an edge.
LOW = 'trilm'


@pytest.mark.parametrize(
  ('exempt', 'plain', 'remat'),
  [
    ((1, 0), {0}, 'none'),
    ((1, 1), {0, 2}, 'full'),
    ((0, 2), {1, 2}, 'none'),
    ((2, 2), {0, 1, 2}, 'none'),
  ],
)
def test_first_and_last_layers_are_exempt(exempt, plain, remat):
  got = logits(matmul=LOW, matmul_exempt=exempt, remat=remat)
  np.testing.assert_allclose(got, stepwise(plain, LOW), atol=1e-4)
  assert np.abs(got - stepwise(set(), LOW)).max() > 1e-3


def test_a_layer_walked_alone_knows_its_index():
  low = model(matmul=LOW, matmul_exempt=[1, 1])
  layer = jax.tree.map(lambda p: p[1], PARAMS['layers'])
  x = jax.random.normal(jax.random.key(1), (1, 4, 128))
  plain = model().block(layer, x)
  for index, exempt in ((None, False), (0, True), (1, False), (2, True)):
    same = np.allclose(low.block(layer, x, index=index), plain, atol=1e-5)
    assert same == exempt, index


def test_rules_choose_by_path_and_the_first_wins():
  rules = [['down$', 'int8'], ['mlp', 'quest2'], ['attn/[qk]', 'fp8']]
  config = llama.config('tiny', matmul='none', matmul_rules=rules)
  hash(config)
  assert {p: config.recipe_of(p) for p in ('mlp/down', 'mlp/up', 'attn/k')} == {
    'mlp/down': 'int8',
    'mlp/up': 'quest2',
    'attn/k': 'fp8',
  }
  assert config.recipe_of('attn/o') == 'none'
  assert (logits(matmul_rules=[['lm_head', LOW]]) == logits()).all()
  everywhere = logits(matmul=LOW)
  np.testing.assert_allclose(
    logits(matmul_rules=[['attn|mlp', LOW]]), everywhere, atol=1e-5
  )
  part = logits(matmul=LOW, matmul_rules=[['mlp/', 'none']])
  assert np.abs(part - everywhere).max() > 1e-3


@pytest.mark.parametrize('tied', [False, True])
def test_the_head_has_a_recipe_of_its_own(tied):
  x = jax.random.normal(jax.random.key(1), (1, 4, 128))
  low = model(matmul_head='int8', tie_embeddings=tied)
  high = model(tie_embeddings=tied)
  got, plain = low.head(PARAMS, x), high.head(PARAMS, x)
  assert got.dtype == jnp.float32
  kernel = PARAMS['lm_head']['kernel']
  kernel = PARAMS['embed']['embedding'].T if tied else kernel
  y = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  dot = lowbit.dot_general(lowbit.recipe('int8'))
  want = dot(y, kernel, (((2,), (0,)), ((), ())))
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert jnp.abs(got - plain).max() > 1e-4


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'matmul': 'int9'}, "unknown low-bit recipe 'int9': did you mean 'int"),
    ({'matmul_head': 'in8'}, "unknown low-bit recipe 'in8'"),
    ({'matmul_head': 'w8'}, 'which the head cannot do'),
    ({'activations': 'cote'}, "unknown flow 'cote': did you mean 'coat'"),
    ({'matmul_rules': [['mlp', 'in8']]}, "unknown low-bit recipe 'in8'"),
    ({'matmul_rules': [['(', 'int8']]}, 'is no regular expression'),
    ({'matmul_rules': [['mlp']]}, 'give pairs'),
    ({'matmul_exempt': (1,)}, 'give two numbers'),
    ({'matmul_exempt': (0, -1)}, 'give two numbers'),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    llama.config('tiny', **fields)


def kept(**fields):
  """What the backward pass of a layer finds of 32 tokens, as bytes by shape."""
  low = model(dtype='bfloat16', param_dtype='bfloat16', **fields)
  layer = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape[1:], jnp.bfloat16), PARAMS['layers']
  )
  x = jax.ShapeDtypeStruct((2, 16, 128), jnp.bfloat16)
  back = jax.eval_shape(
    lambda layer, x: jax.vjp(lambda x: low.block(layer, x), x)[1], layer, x
  )
  return [(a.size, a.dtype.itemsize) for a in jax.tree.leaves(back)]


def test_one_copy_of_codes_stays_of_linears_with_one_input():
  """Of q, k and v one instead of three, of gate and up one instead of two."""
  width = 32 * 128  # all but down's input

  def copies(**fields):
    return kept(**fields).count((width, 1))

  assert copies(matmul='int8', wrap=lambda path, dot: dot) == 3 + 1 + 2
  assert copies(matmul='int8') == 1 + 1 + 1
  # Others' recipes: of v, then of all that is not up.
  assert copies(matmul='int8', matmul_rules=[['attn/v', 'halo0']]) == 2 + 1 + 1
  assert copies(matmul='int8', matmul_rules=[['up$', 'none']]) == 1 + 1 + 1


def test_linears_with_one_input_give_what_they_give_alone():
  """Some together, some by rules of their own."""
  rules = [['attn/k', 'e4m3'], ['mlp/up', 'none']]

  def gradients(**options):
    low = model(matmul=LOW, matmul_rules=rules, remat='full', **options)

    def loss(params):
      return jnp.sum(jnp.cos(low.apply(params, TOKENS)))

    return jax.jit(jax.value_and_grad(loss))(PARAMS)

  got, want = gradients(), gradients(wrap=lambda path, dot: dot)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_norms_and_swiglu_keep_what_the_flow_says():
  wide = 32 * 352  # gate, up and hidden

  def widths(size, **fields):
    return {itemsize for n, itemsize in kept(**fields) if n == size}

  assert widths(wide) == {2}
  for name in ('coat', 'jetfire'):
    assert widths(wide, matmul=name) == {1}
    assert widths(wide, matmul=name, activations='none') == {1, 2}
  # Its own choice, beside products that are not rounded.
  assert widths(wide // 2, activations='int4') == {1}  # two a byte
  config = llama.config('tiny', matmul='coat', activations='fp8')
  assert (config.flow, llama.config('tiny', matmul='coat').flow) == (
    'fp8',
    'coat',
  )


def test_an_exempt_layer_keeps_no_flow():
  layer = jax.tree.map(lambda p: p[0], PARAMS['layers'])
  x = jax.random.normal(jax.random.key(1), (1, 4, 128))
  low = model(matmul='jetfire', matmul_exempt=(1, 0))

  @jax.jit
  def blocks(layer, x):
    walked = [low.block(layer, x, index=i) for i in range(2)]
    return model().block(layer, x), *walked

  plain, exempt, rounded = blocks(layer, x)
  np.testing.assert_allclose(exempt, plain, atol=1e-5)
  assert np.abs(rounded - plain).max() > 1e-4
