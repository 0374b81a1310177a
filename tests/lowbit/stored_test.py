"""Weights that are stored in 8 bits, and train so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import lowbit, optim, quant
from frugax.models import llama
from frugax.train import step


def test_a_model_of_stored_weights_trains():
  fields = dict(n_layers=2, dim=32, ffn=44, n_heads=2, n_kv_heads=1)
  config = llama.config('tiny', matmul='w8', remat='full', **fields)
  model, tx = llama.Llama(config), optax.adam(3e-3)
  state = jax.jit(lambda k: step.init_state(model, tx, k))(jax.random.key(0))
  arrays = lowbit.load_weights(state.params)
  stored = state.params['layers']['mlp']['down']['kernel']
  assert isinstance(stored, quant.QTensor) and stored.shape == (2, 44, 32)
  # A byte each, and a step and a zero point for 256 of them.
  assert stored.nbytes == 2 * (44 * 32 + 4 * 6)
  layers = jax.tree.leaves(
    state.params['layers'], is_leaf=lambda p: isinstance(p, quant.QTensor)
  )
  assert sum(isinstance(p, quant.QTensor) for p in layers) == 7
  for name in ('embed', 'lm_head', 'final_norm'):
    leaves = jax.tree.leaves(state.params[name])
    assert all(x.dtype == jnp.float32 for x in leaves)

  tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 320)
  batch = dict(
    tokens=tokens,
    labels=jnp.roll(tokens, -1, 1),
    segment_ids=jnp.zeros_like(tokens),
    positions=jnp.broadcast_to(jnp.arange(16), tokens.shape),
  )
  train = step.make_train_step(model, tx, rounding='stochastic')
  train = jax.jit(train)

  # The gradient is that of a model whose weights are these numbers, and the
  # update is rounded to a neighbour.
  plain = llama.Llama(llama.config('tiny', remat='full', **fields))
  low, high = state, None
  for m, s in (
    (train, low),
    (
      jax.jit(step.make_train_step(plain, tx)),
      step.TrainState(state.step, arrays, state.opt_state, state.key, 0),
    ),
  ):
    s, metrics = m(s, batch)
    if high is None:
      low, want = s, metrics
    high = s
  for key in ('loss', 'grad_norm', 'update_norm'):
    np.testing.assert_allclose(metrics[key], want[key], rtol=1e-5)
  got = lowbit.load_weights(low.params)
  assert jax.tree.structure(got) == jax.tree.structure(high.params)
  for path, a in jax.tree.leaves_with_path(got):
    b = high.params
    old = state.params
    for part in path:
      b, old = b[part.key], old[part.key]
    error = np.abs(a - b)
    if not isinstance(old, quant.QTensor):
      np.testing.assert_allclose(a, b, atol=1e-6)
      continue
    spacing = np.ptp(np.asarray(b)) / 254
    assert 0 < error.max() < 1.1 * spacing
    # Without bias: the mean error is that of as many dice, and no more.
    bias = np.mean(np.asarray(a - b))
    assert abs(bias) < 6 * spacing / np.sqrt(a.size)

  losses = [float(want['loss'])]
  for _ in range(40):
    low, metrics = train(low, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.5 * losses[0]
  again = low.params['layers']['mlp']['down']['kernel']
  assert jax.tree.structure(again) == jax.tree.structure(stored)


@pytest.mark.slow
def test_any_format_can_be_trained():
  """`apply_updates` keeps the format and its scaling, stacked or not."""
  x = jax.random.normal(jax.random.key(0), (2, 8, 24))
  for format in ('int8', 'nvfp4', 'fp8_e4m3'):
    stack = quant.quantize(x, format, batch_axes=1)
    new = optim.apply_updates({'w': stack}, {'w': 0.5 + 0 * x}, key=0)['w']
    assert jax.tree.structure(new) == jax.tree.structure(stack)
    mean = quant.dequantize(new).mean() - quant.dequantize(stack).mean()
    assert 0.4 < mean < 0.6
