"""Every implementation of the loss without logits against float64."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from frugax import kernels
from frugax.kernels.linear_cross_entropy import reference

IMPLEMENTATIONS = {
  'xla': {'implementation': 'xla'},
  'mosaic': {'implementation': 'mosaic', 'interpret': True},
  'triton': {'implementation': 'triton', 'interpret': True},
}
each_implementation = pytest.mark.parametrize('name', IMPLEMENTATIONS)
few = hypothesis.settings(deadline=None, max_examples=8, derandomize=True)


def data(n, vocabulary, d, mean=0.0, seed=0, layout='NN', ignored=0.2):
  """x, w, labels; the first feature shifts all logits by `mean`."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)).astype('f')
  w = (rng.normal(size=(d, vocabulary)) * 2 / d**0.5).astype('f')
  x[:, 0], w[0] = 1, mean
  labels = rng.integers(0, vocabulary, n)
  labels[rng.random(n) < ignored] = -1
  return x, np.ascontiguousarray(w if layout == 'NN' else w.T), labels


def twin(x, w, labels, layout='NN', softcap=None, z_loss=0.0, g=None):
  """Losses, log-partitions, and gradients of sum(g * losses), in float64."""
  x, w = (np.asarray(a, np.float64) for a in (x, w))
  w = w if layout == 'NN' else w.T
  z = x @ w
  if softcap:
    z = softcap * np.tanh(z / softcap)
  top = z.max(1, keepdims=True)
  lse = np.log(np.exp(z - top).sum(1)) + top[:, 0]
  counts, rows = labels >= 0, np.arange(len(labels))
  losses = np.where(counts, lse - z[rows, labels] + z_loss * lse**2, 0)
  g = np.where(counts, np.ones(len(x)) if g is None else g, 0)
  dz = np.exp(z - lse[:, None]) * (g * (1 + 2 * z_loss * lse))[:, None]
  dz[rows, labels] -= g
  if softcap:
    dz *= 1 - (z / softcap) ** 2
  dw = x.T @ dz
  gradients = dz @ w.T, dw if layout == 'NN' else dw.T
  return losses, np.where(counts, lse, 0), *gradients


def relative(got, want):
  return np.abs(got - want).max() / np.abs(want).max()


def run(x, w, labels, g=None, **options):
  """As `twin`, in one compilation."""

  def both(x, w, labels, g):
    def loss(x, w):
      losses, lse = kernels.linear_cross_entropy(
        x, w, labels, return_lse=True, **options
      )
      return jnp.vdot(losses, g), (losses, lse)

    return jax.grad(loss, (0, 1), has_aux=True)(x, w)

  g = jnp.ones(labels.shape) if g is None else jnp.asarray(g, 'f')
  gradients, values = jax.jit(both)(x, w, labels, g)
  return *values, *gradients


@each_implementation
@pytest.mark.parametrize('mean', [0, -4])
@pytest.mark.parametrize('vocabulary', [2304, 5003, 32000, 50257])
def test_losses_and_gradients_of_any_vocabulary(vocabulary, mean, name):
  operands = data(24, vocabulary, 32, mean)
  got, want = run(*operands, **IMPLEMENTATIONS[name]), twin(*operands)
  counts = operands[2] >= 0
  np.testing.assert_allclose(got[0][counts], want[0][counts], rtol=1e-6)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
  for i in (2, 3):
    assert relative(got[i], want[i]) < 1e-5
  assert not np.any(got[0][~counts]) and not np.any(got[2][~counts])


@each_implementation
@few
@hypothesis.given(
  st.integers(1, 300),
  st.integers(1, 2600),
  st.integers(1, 150),
  st.sampled_from(['NN', 'NT']),
  st.sampled_from([None, 2.0]),
  st.sampled_from([0.0, 0.1]),
)
def test_any_shape_cap_and_z_loss(
  name, n, vocabulary, d, layout, softcap, z_loss
):
  operands = data(n, vocabulary, d, 1.0, vocabulary, layout)
  g = np.random.default_rng(1).normal(size=n)
  options = dict(layout=layout, softcap=softcap, z_loss=z_loss, g=g)
  got = run(*operands, **options, **IMPLEMENTATIONS[name])
  want = twin(*operands, **options)
  for i, (a, b) in enumerate(zip(got, want, strict=True)):
    np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=[2e-6, 2e-6, 1e-5, 1e-5][i]
    )


@each_implementation
@pytest.mark.parametrize(
  ('layout', 'filter_eps'), [('NN', 1e-3), ('NT', (1e-3, None))]
)
def test_a_filter_errs_by_no_more_than_its_bound(name, layout, filter_eps):
  n, vocabulary, eps = 300, 5000, 1e-3
  x, w, labels = data(n, vocabulary, 40, layout=layout)
  of_tokens = w if layout == 'NN' else w.T
  of_tokens[0, 700:] = -15  # so that these have little probability
  labels = np.where(labels >= 0, labels % 700, -1)
  labels[0] = vocabulary - 1  # where nothing else would be kept
  g = np.random.default_rng(1).normal(size=n).astype('f')
  options = dict(layout=layout, g=g)
  *_, dx, dw = run(
    x, w, labels, filter_eps=filter_eps, **options, **IMPLEMENTATIONS[name]
  )
  *_, want_dx, want_dw = twin(x, w, labels, **options)
  if layout == 'NT':
    dw, want_dw = dw.T, want_dw.T
  size = np.abs(np.where(labels >= 0, g, 0))
  bound = eps * np.outer(size, np.abs(of_tokens).sum(1))
  assert (np.abs(dx - want_dx) <= bound + 1e-5).all()
  np.testing.assert_allclose(dw[:, -1], want_dw[:, -1], atol=1e-5)
  left_out = slice(2600, 3300)  # in no block with a label
  assert np.all(want_dw[:, left_out] != 0)
  if isinstance(filter_eps, tuple):
    np.testing.assert_allclose(dw, want_dw, atol=1e-5)
  else:
    bound = eps * (size @ np.abs(x))[:, None]
    assert (np.abs(dw - want_dw) <= bound + 1e-5).all()
    assert not np.any(dw[:, left_out])


def test_leading_axes_scan_remat_and_vmap():
  x, w, labels = data(12, 300, 8)
  losses, lse, dx, dw = twin(x, w, labels)
  f = functools.partial(kernels.linear_cross_entropy, return_lse=True)
  shaped = f(x.reshape(2, 3, 2, 8), w, labels.reshape(2, 3, 2))
  np.testing.assert_allclose(shaped[0].ravel(), losses, atol=2e-6)
  stacked = jax.vmap(f, (0, None, 0))(
    x.reshape(3, 4, 8), w, labels.reshape(3, 4)
  )
  np.testing.assert_allclose(stacked[1].ravel(), lse, atol=2e-6)

  def scanned(x, w):
    @jax.checkpoint
    def one(total, row):
      return total + kernels.linear_cross_entropy(row[0], w, row[1]), None

    return jax.lax.scan(one, 0.0, (x, labels))[0]

  value, gradients = jax.value_and_grad(scanned, (0, 1))(x, w)
  np.testing.assert_allclose(value, losses.sum(), rtol=1e-6)
  np.testing.assert_allclose(gradients[0], dx, atol=1e-6)
  np.testing.assert_allclose(gradients[1], dw, atol=1e-6)


def mesh(**sizes):
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


def sharded(devices, check, layout, x, w, labels, g, **options):
  """As `run`, of the vocabulary over 'tensor' and the rows over 'data'."""
  cut = P(None, 'tensor') if layout == 'NN' else P('tensor', None)
  f = functools.partial(
    kernels.linear_cross_entropy,
    layout=layout,
    z_loss=0.1,
    return_lse=True,
    vocab_axis='tensor',
    **options,
  )
  rows = P('data')
  f = jax.shard_map(
    f,
    mesh=devices,
    in_specs=(rows, cut, rows),
    out_specs=rows,
    check_vma=check,
  )

  def both(x, w):
    def loss(x, w):
      losses, lse = f(x, w, labels)
      return jnp.vdot(losses, g), (losses, lse)

    return jax.grad(loss, (0, 1), has_aux=True)(x, w)

  gradients, values = jax.jit(both)(x, w)
  return *values, *gradients


@pytest.mark.parametrize(
  ('check', 'layout'), [(False, 'NN'), (True, 'NN'), (True, 'NT')]
)
def test_a_vocabulary_over_devices(check, layout):
  operands = data(16, 4 * 1111, 8, 1.0, layout=layout)
  g = np.random.default_rng(1).normal(size=16).astype('f')
  # A filter of nothing but zeros, to see that it runs.
  options = dict(filter_eps=1e-30) if layout == 'NT' else {}
  got = sharded(mesh(data=2, tensor=4), check, layout, *operands, g, **options)
  want = twin(*operands, layout=layout, z_loss=0.1, g=g)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6)


def collectives(text):
  """Elements of each array that a compiled program communicates."""
  found = re.findall(
    r' = (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|'
    r'collective-permute)(?:-start)?\(',
    text,
  )
  shapes = [s for line in found for s in re.findall(r'\[([\d,]*)\]', line)]
  return [int(np.prod([int(n) for n in s.split(',') if n])) for s in shapes]


@pytest.mark.parametrize(
  ('vocabulary', 'sizes', 'axes', 'options'),
  [
    (50257, {'tensor': 4}, 'tensor', {}),
    (50257, {'data': 2, 'tensor': 4}, ('data', 'tensor'), {'z_loss': 0.1}),
    (35, {'data': 2, 'tensor': 4}, 'tensor', {'softcap': 2.0, 'z_loss': 0.1}),
    (
      35,
      {'tensor': 8},
      'tensor',
      {'layout': 'NT', **IMPLEMENTATIONS['mosaic']},
    ),
    (7, {'tensor': 8}, 'tensor', {'z_loss': 0.1}),  # fewer than devices
  ],
)
def test_any_vocabulary_over_the_axes_of_a_mesh(
  vocabulary, sizes, axes, options
):
  layout = options.get('layout', 'NN')
  x, w, labels = data(16, vocabulary, 8, 1.0, layout=layout)
  labels[:4] = [0, vocabulary - 1, -1, vocabulary - 2]
  g = np.random.default_rng(1).normal(size=16).astype('f')
  others = {k: v for k, v in options.items() if k in ('softcap', 'z_loss')}
  want = twin(x, w, labels, layout, g=g, **others)
  shifted = np.where(labels < 0, -100, labels)
  with jax.set_mesh(mesh(**sizes)):
    got = run(
      *(x, w, shifted, g), vocab_axis=axes, ignore_index=-100, **options
    )
  for i, (a, b) in enumerate(zip(got, want, strict=True)):
    np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=[2e-6, 2e-6, 1e-5, 1e-5][i]
    )


def test_neither_logits_nor_weights_travel():
  n, vocabulary, d = 24, 8 * 2304, 16
  x, w, labels = data(n, vocabulary, d)

  def both(x, w):
    def loss(x, w):
      return kernels.linear_cross_entropy(
        x, w, labels, vocab_axis='tensor'
      ).sum()

    return jax.value_and_grad(loss, (0, 1))(x, w)

  cut = jax.NamedSharding(mesh(tensor=8), P(None, 'tensor'))
  with jax.set_mesh(cut.mesh):
    step = jax.jit(both, out_shardings=(None, (None, cut)))
    compiled = step.lower(x, jax.device_put(w, cut)).compile()
    loss, (dx, dw) = compiled(x, jax.device_put(w, cut))
  sent = collectives(compiled.as_text())
  assert sent and max(sent) == n * d < vocabulary // 8
  # And on no device are there all logits of its part.
  assert not re.search(rf'\[{n},(2304|{vocabulary})\]', compiled.as_text())
  want = twin(x, w, labels)
  np.testing.assert_allclose(loss, want[0].sum(), rtol=1e-6)
  # CPUs sum in other orders: a last bit of the log-partition is in each term.
  lse, rows = want[1][:, None], np.abs(w.T)
  terms = np.exp(np.float64(x) @ w - lse) @ rows + rows[labels]
  bound = np.finfo('f').eps * lse * terms  # 3e-6 at most
  assert (np.abs(dx - want[2]) <= bound).all()
  np.testing.assert_allclose(dw, want[3], atol=2e-6)


@pytest.mark.parametrize('layout', ['NN', 'NT'])
def test_memory_at_the_shapes_of_gemma_2_2b(layout):
  """Compiled, not run: with logits it would be 19 GB."""
  n, vocabulary, d = 8192, 256000, 2304
  shape = (d, vocabulary) if layout == 'NN' else (vocabulary, d)
  operands = [
    jax.ShapeDtypeStruct(s, t)
    for s, t in (((n, d), 'bfloat16'), (shape, 'bfloat16'), ((n,), 'int32'))
  ]

  def loss(x, w, labels):
    return kernels.linear_cross_entropy(x, w, labels, layout=layout).sum()

  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  memory = step.lower(*operands).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 3e9


@each_implementation
def test_bfloat16_operands(name):
  """Gradients come in each operand's own dtype, sums in float32."""
  x, w, labels = data(64, 2304, 32)
  x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
  losses, _, dx, dw = run(x, w, labels, **IMPLEMENTATIONS[name])
  want = twin(*(np.asarray(a, np.float32) for a in (x, w)), labels)
  np.testing.assert_allclose(losses, want[0], rtol=1e-6)
  assert dx.dtype == dw.dtype == jnp.bfloat16
  assert relative(np.float32(dx), want[2]) < 2**-7
  assert relative(np.float32(dw), want[3]) < 2**-7
  mixed = run(x, w.astype(jnp.float32), labels, **IMPLEMENTATIONS[name])
  assert mixed[2].dtype == jnp.bfloat16 and mixed[3].dtype == jnp.float32
  assert relative(mixed[3], want[3]) < 1e-5


def test_labels():
  x, w, _ = data(4, 7, 3)
  labels = jnp.array([0, 7, -1, -5])
  losses, lse, dx, _ = run(x, w, labels)
  np.testing.assert_array_equal(np.isnan(losses), [0, 1, 0, 1])
  assert losses[2] == lse[2] == 0 and not np.any(dx[2])
  ignored = kernels.linear_cross_entropy(x, w, labels, ignore_index=7)
  np.testing.assert_array_equal(np.isnan(ignored), [0, 0, 1, 1])
  assert ignored[1] == 0 and ignored[0] == losses[0]


@pytest.mark.parametrize('dtype', ['uint4', 'uint8', 'uint16', 'uint32'])
def test_a_label_of_any_dtype_is_the_number_that_it_is(dtype):
  """The largest ones are not -1, which they would wrap to."""
  x, w, _ = data(3, 300, 4)
  top = int(jnp.iinfo(dtype).max)
  labels = np.array([top, 5, 7], jnp.dtype(dtype))
  want = kernels.linear_cross_entropy(x, w, np.array([min(top, 300), 5, 7]))
  for given in (labels, jnp.asarray(labels)):
    got = kernels.linear_cross_entropy(x, w, given)
    np.testing.assert_array_equal(got, want)
  assert np.isnan(want[0]) == (top >= 300)
  ignored = kernels.linear_cross_entropy(x, w, labels, ignore_index=top)
  np.testing.assert_array_equal(ignored, [0, *want[1:]])


def test_labels_of_64_bits_are_not_cut_off():
  x, w, _ = data(3, 300, 4)
  labels = np.array([2**32, 2**32 - 1, 5])
  losses = kernels.linear_cross_entropy(x, w, labels)
  np.testing.assert_array_equal(np.isnan(losses), [1, 1, 0])


@each_implementation
@pytest.mark.parametrize('shape', [(0,), (2, 0)])
def test_no_tokens_have_no_losses(name, shape):
  x, labels = np.zeros((*shape, 4), 'f'), np.zeros(shape, int)
  _, w, _ = data(1, 300, 4)
  losses, lse, dx, dw = run(x, w, labels, **IMPLEMENTATIONS[name])
  assert losses.shape == lse.shape == shape and dx.shape == x.shape
  assert losses.dtype == lse.dtype == jnp.float32
  np.testing.assert_array_equal(dw, np.zeros_like(w))


@each_implementation
def test_large_logits_stay_finite(name):
  """Also beside what fills up a block, whose logits are none."""
  x, w, labels = data(8, 5000, 4)
  for shift in (-3e4, 3e4):
    w[0] = shift
    got = run(x, w, labels, **IMPLEMENTATIONS[name])
    want = twin(x, w, labels)
    np.testing.assert_allclose(got[0], want[0], atol=0.02)
    np.testing.assert_allclose(got[2], want[2], atol=0.01 * 3e4)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'layout': 'TN'}, "unknown layout 'TN': did you mean 'NT'"),
    ({'layout': 'NT'}, "layout='NN' for w of"),
    ({'softcap': -1.0}, r'softcap=-1.0: give a positive number'),
    ({'filter_eps': 2.0}, 'filter_eps=2.0: give None, a probability'),
    ({'filter_eps': ('auto', 'all')}, "'all'.*'auto', or a pair of these"),
    ({'vocab_axis': 'tensr'}, "has the axis 'tensr', but none"),
    ({'labels': jnp.zeros(4)}, 'labels of float32: give integers'),
    ({'labels': jnp.zeros(5, int)}, r'labels of shape \(5,\)'),
    ({'w': jnp.zeros((3, 7), int)}, 'w of int32: give floating-point'),
    ({'w': jnp.zeros((3, 0))}, 'an empty operand'),
  ],
)
def test_bad_input(change, message):
  x, w, labels = data(4, 7, 3)
  operands = {'x': x, 'w': w, 'labels': labels} | change
  with pytest.raises(ValueError, match=message):
    kernels.linear_cross_entropy(**operands)


def test_parts_cover_the_vocabulary():
  for n in (1, 100, 8192, 2**20):
    for vocabulary in (1, 2048, 2049, 2304, 5003, 32000, 50257, 256000):
      size = reference.columns(n, vocabulary)
      assert 0 < size <= 2048 and (size == vocabulary or size % 128 == 0)
      parts = -(-vocabulary // size)
      assert parts == 1 or parts * size - vocabulary < 128 * parts


@pytest.mark.parametrize(
  ('device_kind', 'dtype', 'kernel'),
  [
    ('TPU v5 lite', 'bfloat16', True),
    ('TPU7x', 'bfloat16', True),
    ('TPU v6 lite', 'float32', False),
    ('NVIDIA H200', 'bfloat16', True),
    ('NVIDIA H200', 'float32', False),
  ],
)
def test_the_chip_decides(device_kind, dtype, kernel):
  device = jax.sharding.AbstractDevice(
    device_kind=device_kind,
    num_cores=1,
    platform='tpu' if device_kind.startswith('TPU') else 'gpu',
  )
  abstract = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  x, w, labels = data(8, 16, 8)
  with jax.sharding.use_abstract_mesh(abstract):
    traced = jax.jit(kernels.linear_cross_entropy).trace(
      x.astype(dtype), w.astype(dtype), labels
    )
  assert ('pallas_call' in str(traced.jaxpr)) == kernel
