"""Every recipe's product and both gradients against a twin in float64."""

import dataclasses
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import lowbit
from frugax.lowbit import Operand, Product, Recipe
from frugax.quant import element, hadamard

# ------------------------------------------------------------------ the twin


def numbers_of(name):
  x = np.array(element(name).numbers())
  return np.unique(np.concatenate([-x, x]))


def near(numbers, x):
  at = np.clip(np.searchsorted(numbers, x), 1, len(numbers) - 1)
  low, high = numbers[at - 1], numbers[at]
  return np.where(x - low <= high - x, low, high)


def step_of(rows, scaling, top, tensor):
  statistic = {
    'absmax': lambda x: np.abs(x).max(),
    'rms': lambda x: np.sqrt(np.mean(x * x)),
    'mean': lambda x: np.abs(x).mean(),
    'median': lambda x: np.median(np.abs(x)),
  }[scaling.statistic](rows)
  alpha = max(scaling.factor * statistic + scaling.eps, scaling.floor)
  step = alpha / top
  if scaling.scale == 'power_up':
    step = 2.0 ** np.ceil(np.log2(step))
  elif scaling.scale == 'power_down':
    step = 2.0 ** np.floor(np.log2(step))
  elif scaling.scale == 'ocp':
    step = 2.0 ** (np.floor(np.log2(alpha)) - math.floor(math.log2(top)))
  elif scaling.scale == 'nv':
    step = near(numbers_of('fp8_e4m3'), step / tensor) * tensor
  return step * scaling.stretch


def rounded(operand, x):
  """A matrix and its mask, tile by tile."""
  if operand.format is None:
    return x, np.ones(x.shape, bool)
  scaling = operand.scaling
  if operand.simulated:  # has tests of its own
    out = operand.simulated(jnp.asarray(x, jnp.float32))
    return np.asarray(out, np.float64), np.ones(x.shape, bool)
  numbers = numbers_of(operand.format)
  top = numbers[-1]
  margin = {'none': np.inf, 'clip': 0}.get(operand.mask)
  if margin is None:
    margin = (numbers[-1] - numbers[-2]) / 2
  tensor = np.abs(x).max() / (top * 448)
  out, mask = np.empty_like(x), np.empty(x.shape, bool)
  sizes = [n or m for n, m in zip(scaling.tile, x.shape, strict=True)]
  starts = [range(0, m, n) for n, m in zip(sizes, x.shape, strict=True)]
  for i, j in itertools.product(*starts):
    at = slice(i, i + sizes[0]), slice(j, j + sizes[1])
    step = step_of(x[at], scaling, top, tensor)
    out[at] = step * near(numbers, np.clip(x[at] / step, -top, top))
    mask[at] = np.abs(x[at]) <= step * (top + margin) * (1 + 1e-7)
    if operand.keep == '2:4':
      away = pruned(x)[at]
      out[at] = np.where(away, 0, out[at])
      mask[at] &= ~away | (np.abs(x[at]) <= step * margin)
  return out * scaling.gain, mask


def pruned(x):
  """Of each four pairs of neighbours the two of the least norm."""
  rows, columns = x.shape
  pairs = np.pad(x, [(0, 0), (0, -columns % 8)]).reshape(rows, -1, 4, 2)
  norms = np.linalg.norm(pairs, axis=-1)
  out = np.zeros(norms.shape, bool)
  least = np.argsort(-norms, -1, kind='stable')[..., 2:]
  np.put_along_axis(out, least, True, -1)
  return np.repeat(out.reshape(rows, -1), 2, -1)[:, :columns]


def turn(rotation, size):
  """The matrix to multiply with from the right."""
  if rotation is None:
    return np.eye(size)
  key = jax.random.key(0) if rotation.signs == 'fixed' else None
  rows = hadamard(jnp.eye(size), -1, rotation.block, key)
  return np.asarray(rows, np.float64)


def twin(recipe, x, w, g):
  """x (rows, columns), w (units, columns), g (rows, units)."""
  first = recipe.forward
  h = turn(first.rotation, x.shape[1])
  x_hat, x_mask = rounded(first.left, x @ h)
  w_hat, w_mask = rounded(first.right, w @ h)

  def gradient(product, left, own, forward, mask):
    r = turn(product.rotation, left.shape[1])
    t = np.eye(left.shape[0])
    if product.rotation and product.rotation.along == 'rows':
      t, r = turn(product.rotation, left.shape[0]).T, np.eye(left.shape[1])
    is_own = product.right.source == 'array'
    left, _ = rounded(product.left, t @ left @ r)
    right, _ = rounded(product.right, (own if is_own else forward).T @ r)
    out = t.T @ (left @ right.T)
    out = np.where(mask, out @ h if is_own else out, 0) @ h.T
    return rounded(product.result, out)[0]

  return (
    rounded(first.result, x_hat @ w_hat.T)[0],
    gradient(recipe.input_grad, g, w, w_hat, x_mask),
    gradient(recipe.weight_grad, g.T, x, x_hat, w_mask),
  )


def exact(recipe):
  """The recipe without what is random, and without ties.

  Of a matrix rounded before, 3/4 of many numbers lies half-way.
  """

  def operand(o):
    stretch = 1.7**0.5 if o.scaling.stretch != 1 else 1
    scaling = dataclasses.replace(o.scaling, stretch=stretch)
    return dataclasses.replace(o, stochastic=False, scaling=scaling)

  def product(p):
    rotation = p.rotation
    if rotation and rotation.signs == 'fresh':
      rotation = dataclasses.replace(rotation, signs='fixed')
    sides = operand(p.left), operand(p.right)
    return Product(*sides, rotation, operand(p.result))

  products = (recipe.forward, recipe.input_grad, recipe.weight_grad)
  return Recipe(*map(product, products), recipe.residuals)


# ----------------------------------------------------------------- the tests


def normal(*shape, seed=0, dtype=jnp.float32):
  x = np.random.default_rng(seed).standard_t(5, size=shape)
  return jnp.asarray(x, dtype)


# Dimension numbers as Flax emits them: of a dense layer with several output
# axes, of one that contracts its heads, and of experts.
DIMS = {
  'dense': ((2, 5, 37), (37, 3, 7), (((2,), (0,)), ((), ()))),
  'heads': ((2, 9, 4, 9), (4, 9, 19), (((2, 3), (0, 1)), ((), ()))),
  'experts': ((3, 6, 35), (3, 35, 18), (((2,), (1,)), ((0,), (0,)))),
}


def vjp(dot, dims):
  def value(x, w, g):
    y, back = jax.vjp(lambda x, w: dot(x, w, dims), x, w)
    return y, *back(g.reshape(y.shape))

  return value


def matrices(dims, x, w, g):
  """The three arrays as stacks of matrices."""
  (lc, rc), (lb, rb) = dims

  def view(x, batch, last):
    rows = [i for i in range(x.ndim) if i not in (*batch, *last)]
    columns = math.prod(x.shape[i] for i in last)
    size = math.prod(x.shape[i] for i in batch)
    x = np.asarray(x, np.float64).transpose(*batch, *rows, *last)
    return x.reshape(size, -1, columns)

  x, w = view(x, lb, lc), view(w, rb, rc)
  return x, w, np.asarray(g, np.float64).reshape(len(x), x.shape[1], -1)


def check(name, dims, recipe=None, **arguments):
  x_shape, w_shape, numbers = DIMS[dims]
  recipe = exact(recipe or lowbit.recipe(name))
  dot = lowbit.dot_general(recipe, **arguments)
  x, w = normal(*x_shape), normal(*w_shape, seed=1)
  y = jax.eval_shape(lambda x, w: lax.dot_general(x, w, numbers), x, w)
  g = normal(*y.shape, seed=2)
  got = jax.jit(vjp(dot, numbers))(x, w, g)
  assert [a.shape for a in got] == [y.shape, x.shape, w.shape]
  got_x, got_w, got_y = matrices(numbers, got[1], got[2], got[0])
  views = zip(*matrices(numbers, x, w, g), strict=True)
  want = zip(*(twin(recipe, *view) for view in views), strict=True)
  for a, b in zip((got_y, got_x, got_w), want, strict=True):
    b = np.stack(b)
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


NAMES = [
  'int8',
  'int4',
  'fp8',
  'fp8_block',
  'mxfp8',
  'mxfp4',
  'nvfp4',
  'quest1',
  'quest2',
  'quest4',
  'quest8',
  'quest4_weights',
  'quest_fp4',
  'halo0',
  'halo1',
  'halo2',
  'halo2_fp6',
  'b1.58',
  'b1.58_median',
  'trilm',
  'stable_spam_int4',
  'stable_spam_fp4',
  'e2m1',
  'e4m3',
  'int16',
  'jetfire',
  'mxfp4_nearest',
  'quest1.58',
  'quest_fp4_sparse',
  'masked_e8m3',
  'masked_e5m7',
]
ONE_OF_EACH = [(n, list(DIMS)[i % 3]) for i, n in enumerate(NAMES)]
# The simulated formats run through all experts.
ONE_OF_EACH = [
  (n, 'dense' if n.startswith('stable') else dims) for n, dims in ONE_OF_EACH
]
MORE = [(n, d) for n in ('int8', 'quest4', 'mxfp4', 'nvfp4') for d in DIMS]


@pytest.mark.parametrize(
  ('name', 'dims'), sorted({*ONE_OF_EACH, *MORE}), ids=str
)
def test_product_and_gradients_are_the_twins(name, dims):
  check(name, dims)


@pytest.mark.parametrize('name', ['quest4', 'nvfp4'])
def test_arrays_as_residuals_give_the_same(name):
  recipe = dataclasses.replace(lowbit.recipe(name), residuals='arrays')
  check(name, 'dense', recipe)


def test_the_gain_of_quartet():
  """It makes up for what rounding takes from a normal array's own product."""
  operand = lowbit.recipe('mxfp4_nearest').weight_grad.left
  x = np.random.default_rng(0).normal(size=(64, 4096))
  plain = dataclasses.replace(operand.scaling, gain=1.0)
  q, _ = rounded(dataclasses.replace(operand, scaling=plain), x)
  gain = operand.scaling.gain
  np.testing.assert_allclose((x * x).sum() / (x * q).sum(), gain, atol=5e-4)


@pytest.mark.parametrize('name', ['int8', 'quest8', 'b1.58', 'halo0', 'fp8'])
@pytest.mark.parametrize('native', [True, False])
def test_native_and_simulated_products_are_the_twins(name, native):
  check(name, 'experts', native=native)


@pytest.mark.parametrize(
  ('name', 'element', 'count'), [('int8', 'i8', 3), ('fp8', 'f8E', 3)]
)
def test_codes_are_multiplied_as_they_are(name, element, count):
  x_shape, w_shape, dims = DIMS['dense']
  dot = lowbit.dot_general(lowbit.recipe(name), native=True)
  x, w = normal(*x_shape), normal(*w_shape)
  text = jax.jit(vjp(dot, dims)).lower(x, w, normal(2, 5, 3, 7)).as_text()
  products = [t for t in text.splitlines() if 'dot_general' in t]
  operands = [t.split(' : ')[-1].split('->')[0] for t in products]
  assert sum(o.count(element) == 2 for o in operands) == count == len(products)


@pytest.mark.parametrize('name', ['int8', 'quest4', 'nvfp4', 'halo2'])
def test_sharded_equals_one_device(name):
  """Rows of activations on eight devices, weights cut along both axes."""
  dims = (((2,), (0,)), ((), ()))
  value = jax.jit(vjp(lowbit.dot_general(lowbit.recipe(name)), dims))
  arrays = normal(16, 12, 64), normal(64, 32, seed=1), normal(16, 12, 32)
  mesh = jax.make_mesh(
    (4, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  specs = P('data'), P('data', 'tensor'), P('data', None, 'tensor')
  put = [
    jax.device_put(a, NamedSharding(mesh, s))
    for a, s in zip(arrays, specs, strict=True)
  ]
  for a, b in zip(value(*put), value(*arrays), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_stochastic_gradients_have_no_bias():
  dims = (((1,), (0,)), ((), ()))
  recipe = lowbit.recipe('int4')
  x, w, g = normal(8, 16), normal(16, 12, seed=1), normal(8, 12, seed=2)

  @jax.jit
  @jax.vmap
  def draws(key):
    return vjp(lowbit.dot_general(recipe, key=key), dims)(x, w, g)[1]

  got = np.asarray(draws(jax.random.split(jax.random.key(0), 512)), np.float64)
  w_hat, _ = rounded(Operand('int8'), np.asarray(w, np.float64))
  want = np.asarray(g, np.float64) @ w_hat.T
  spread = got.std(0)
  assert spread.min() > 0
  assert (np.abs(got.mean(0) - want) < 6 * spread / np.sqrt(512)).all()


def test_random_bits_change_with_the_arrays_and_the_key():
  dims = (((1,), (0,)), ((), ()))
  x, w, g = normal(8, 16), normal(16, 12, seed=1), normal(8, 12, seed=2)

  @jax.jit
  def gradient(g, key=None):
    dot = lowbit.dot_general(lowbit.recipe('int8'), key)
    return vjp(dot, dims)(x, w, g)[1]

  np.testing.assert_array_equal(gradient(g), gradient(g))
  # Another number elsewhere draws other bits for the first row.
  assert (gradient(g) != gradient(g.at[7, 0].add(0.1)))[0].any()
  a, b = (gradient(g, jax.random.key(i)) for i in range(2))
  assert (a != b).any()


def residual_bytes(name, x, w):
  """Bytes that the backward pass keeps beside the weights."""
  dot = lowbit.dot_general(lowbit.recipe(name))
  dims = (((2,), (0,)), ((), ()))
  back = jax.eval_shape(lambda: jax.vjp(lambda x: dot(x, w, dims), x)[1])
  kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(back))
  return kept - w.size * w.dtype.itemsize


@pytest.mark.parametrize(
  ('name', 'bits', 'scales'),
  [
    ('int8', 8, 4 * 256),  # one a feature
    ('fp8', 8, 4),
    ('nvfp4', 4, 8 * 256 + 4),  # one in 16 of 128 tokens, and one for all
    ('quest4', 4 + 1, 4 * 128),  # with the mask
    ('b1.58', 8, 4 * 128),
  ],
)
def test_residuals_are_codes(name, bits, scales):
  x, w = normal(2, 64, 256, dtype=jnp.bfloat16), normal(256, 32)
  got = residual_bytes(name, x, w.astype(jnp.bfloat16))
  assert got == x.size * bits // 8 + scales


def test_dtypes_are_those_of_the_operands():
  x_shape, w_shape, dims = DIMS['dense']
  x, w = normal(*x_shape, dtype=jnp.bfloat16), normal(*w_shape)
  recipe_dot = lowbit.dot_general(lowbit.recipe('quest4'))
  dot = jax.jit(recipe_dot, static_argnums=(2, 3, 4))
  w16 = w.astype(jnp.bfloat16)
  assert jax.eval_shape(lambda: dot(x, w16, dims)).dtype == jnp.bfloat16
  assert jax.eval_shape(lambda: dot(x, w, dims)).dtype == jnp.float32

  def wide(x, w):
    return dot(x, w, dims, None, jnp.float32)

  y = wide(x, w16)
  assert y.dtype == jnp.float32
  grads = jax.eval_shape(lambda: jax.vjp(wide, x, w16)[1](y))
  assert [a.dtype for a in grads] == [jnp.bfloat16] * 2
  # The numbers that are multiplied are exact in bfloat16.
  plain = dot(x.astype(jnp.float32), w16.astype(jnp.float32), dims)
  np.testing.assert_allclose(y, plain, atol=1e-5 * jnp.abs(plain).max())


@pytest.mark.parametrize('name', ['int8', 'quest4', 'mxfp4', 'nvfp4', 'halo2'])
def test_nothing_becomes_nan_and_nan_stays(name):
  dims = (((1,), (0,)), ((), ()))
  value = jax.jit(vjp(lowbit.dot_general(lowbit.recipe(name)), dims))
  w, g = normal(40, 12), normal(8, 12)
  hard = normal(8, 40).at[1, 2].set(jnp.inf).at[1, 3].set(-jnp.inf)
  hard = hard.at[2].set(0).at[3].set(1e-41).at[4].set(0.3)
  for x in (jnp.zeros((8, 40)), hard):
    for a in value(x, w, g):
      assert not np.isnan(a).any()
  y, _, dw = value(hard.at[5, 0].set(jnp.nan), w, g)
  assert np.isnan(y[5]).all() and np.isnan(dw).any()


def test_no_rounding_is_the_plain_product():
  for name in ('none', 'bf16'):
    assert lowbit.dot_general(lowbit.recipe(name)) is lax.dot_general


def test_the_scaling_law_leaves_the_activations_alone():
  names = [n for n in lowbit.RECIPES if n[0] == 'e' and n[2] == 'm']
  assert len(names) == 28
  for name in names:
    r = lowbit.recipe(name)
    assert r.forward.right.format == r.input_grad.right.format == name
    assert r.weight_grad.right.format == name
    lefts = (r.forward.left, r.input_grad.left, r.weight_grad.left)
    assert lefts == (Operand(),) * 3


def test_the_bits_of_quest():
  for bits in (1, 1.58, *range(2, 9)):
    operand = lowbit.recipe(f'quest{bits}').forward.left
    assert operand.format == (f'rise{bits}' if bits != 1.58 else 'ternary')
    # The clip loses the least on a normal distribution, among its neighbours.
    x = np.random.default_rng(0).normal(size=20000)[None]
    factor = operand.scaling.factor
    losses = [
      np.square(rounded(_at(operand, f), x)[0] - x).mean()
      for f in (0.9 * factor, factor, 1.1 * factor)
    ]
    assert min(losses) == losses[1], bits


def _at(operand, factor):
  scaling = dataclasses.replace(operand.scaling, factor=factor)
  return dataclasses.replace(operand, scaling=scaling)


@pytest.mark.parametrize(
  'recipe', [pytest.param('int4', marks=pytest.mark.slow), 'quest4']
)
def test_the_codes_of_weights_are_gathered(recipe, monkeypatch):
  """Packed, where the product of the backward pass rounds them again, too."""
  seen = []

  def gather(cut, codes, axes):
    seen.append((codes.shape, codes.dtype.name, axes))
    return codes

  monkeypatch.setattr(lowbit.Cut, 'gather', gather)
  monkeypatch.setattr(lowbit.Cut, 'parts', lambda *args: None)
  x, w = jnp.ones((3, 4, 6)), jnp.arange(6 * 2 * 4.0).reshape(6, 2, 4)
  dims = (((2,), (0,)), ((), ()))
  layout = types.SimpleNamespace(mesh=types.SimpleNamespace(size=8))
  cut = lowbit.Cut(layout, ('batch', 'sequence'), ('embed', 'heads', None))
  dot = lowbit.dot_general(lowbit.recipe(recipe), cut=cut)
  plain = lowbit.dot_general(lowbit.recipe(recipe))
  for got, want in zip(
    jax.grad(lambda x, w: (dot(x, w, dims) ** 2).sum(), (0, 1))(x, w),
    jax.grad(lambda x, w: (plain(x, w, dims) ** 2).sum(), (0, 1))(x, w),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)
  forward = ((2, 4, 3), 'uint8', (1, 2, 0))
  again = ((6, 8), 'int8', (0, 1))
  assert seen == [forward, again if recipe == 'int4' else forward]
