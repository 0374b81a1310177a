import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import optim, quant
from frugax.optim import refreshes
from frugax.quant import codecs

M, N, RANK = 96, 128, 48


def grads(step, shape=(M, N)):
  draw = np.random.default_rng(step)
  return draw.normal(size=shape).astype(np.float32)


def rounded(x, codec):
  """Through a codec and back, by itself."""
  return np.asarray(codecs.decode(codecs.encode(jnp.asarray(x), codec)))


def test_against_the_method_written_out():
  """Singular vectors in 4 bits, Adam on moments that are rounded to 8."""
  tx = optim.q_galore(0.1, rank=RANK, update_interval=4)
  params = {'w': jnp.zeros((M, N))}
  state, update = tx.init(params), jax.jit(tx.update)
  m, v = np.zeros((2, RANK, N), np.float32)
  first = codecs.Codec('dynamic8')
  second = codecs.Codec('dynamic8', signed=False)
  for t in range(1, 7):
    g = grads(t)
    updates, state = update({'w': jnp.asarray(g)}, state)
    if t % 4 == 1:
      u = np.linalg.svd(g, full_matrices=False)[0][:, :RANK]
      u *= np.sign(u[np.abs(u).argmax(0), np.arange(RANK)])
      want = quant.dequantize(quant.quantize(jnp.asarray(u), 'int4'))
      p = np.asarray(quant.dequantize(state[0].projectors['w']))
      # A number at the edge of two codes may fall to either side.
      assert (np.abs(p - want) > 1e-6).mean() < 1e-3
    r = p.T @ g
    m = 0.9 * m + 0.1 * r
    v = 0.999 * v + 0.001 * r * r
    n = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    want = -0.1 * 0.25 * p @ n
    # So may a moment, which then changes its column of the update only.
    off = np.abs(updates['w'] - want).max(axis=0) > 1e-5
    assert off.mean() < 0.05
    m, v = rounded(m, first), rounded(v, second)


def test_bytes_of_a_model_in_4_and_8_bits():
  params = {
    'layers': jax.ShapeDtypeStruct((24, 2048, 5461), jnp.bfloat16),
    'norm': jax.ShapeDtypeStruct((2048,), jnp.bfloat16),
  }
  axes = {'layers': optim.MatrixAxes((-2,), (-1,)), 'norm': None}
  sizes = optim.state_bytes(optim.q_galore(1e-2, rank=512, axes=axes), params)
  assert sizes['projector'] == 24 * 2048 * 512 * (1 / 2 + 4 / 256)
  moments = 2 * 24 * 512 * 5461 * (1 + 4 / 256) + 2 * 4 * 2048
  # 5461 is no multiple of a block.
  assert moments <= sizes['moments'] < 1.001 * moments
  adam = optim.state_bytes(optax.adamw(1.0), params)
  assert sizes['total'] < 0.17 * adam['total']


def test_small_moments_are_rounded_on_request():
  params = {'w': jnp.zeros((16, 64))}

  def moments(**arguments):
    return optim.state_bytes(optim.q_galore(0.1, 4, **arguments), params)[
      'moments'
    ]

  assert moments() == 2 * 4 * 64 * 4
  assert moments(min_size=256) == 2 * 4 * 64 * (1 + 4 / 256)


def test_layers_that_stay_are_refreshed_less():
  lazy = refreshes.lazy(window=2)
  stack = {'w': jnp.zeros((2, M, N))}
  tx = optim.q_galore(
    0.1,
    rank=4,
    update_interval=1,
    refresh=lazy,
    axes={'w': optim.MatrixAxes((-2,), (-1,))},
  )
  state, update = tx.init(stack), jax.jit(tx.update)
  still = grads(0, (M, 4)) @ grads(1, (4, N))
  for t in range(8):
    turning = grads(2 * t + 5, (M, 4)) @ grads(2 * t + 6, (4, N))
    _, state = update({'w': jnp.stack([still, turning])}, state)
  calm, wild = state[0].refreshes['w'].interval
  assert calm > 1 and wild == 1


def test_stacked_vectors_are_rounded_as_those_of_a_layer():
  """Not as a matrix, which would have enough elements to be in 8 bits."""
  axes = {'w': optim.MatrixAxes((-2,), (-1,)), 'norm': ('layers', 'embed')}
  stack = {'w': jnp.zeros((8, M, N)), 'norm': jnp.zeros((8, 512))}
  layer = {'w': stack['w'][0], 'norm': stack['norm'][0]}
  found = []
  for params, names in ((stack, axes), (layer, axes | {'norm': ('embed',)})):
    tx = optim.q_galore(0.1, rank=RANK, axes=names)
    state = jax.eval_shape(tx.init, params)
    found.append(jax.tree.structure(state))
  assert found[0] == found[1]
