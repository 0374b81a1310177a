"""What research/studies/state_savings.py says of published savings."""

import pathlib
import runpy

import jax
import pytest

from frugax import optim
from frugax.models import llama

_ROOT = pathlib.Path(__file__).parents[2]
STUDY = runpy.run_path(str(_ROOT / 'research/studies/state_savings.py'))
# (inputs, outputs) of a layer's matrices, and the number of layers.
SHAPES = {
  '1b': ([(2048, 2048)] * 4 + [(2048, 5461)] * 3, 24),
  '7b': ([(4096, 4096)] * 4 + [(4096, 11008)] * 3, 32),
}
# For each bar a row that keeps it beside Adam in bfloat16.
KEEPING = ('8-bit galore, int8 P', '8-bit coap, int8 P', 'snsm')


@pytest.fixture(scope='module')
def tables():
  return {size: STUDY['table'](size) for size in SHAPES}


def linear_bytes(size, of_matrix):
  """Bytes of the linear layers, from a matrix's short side, long side, rank."""
  shapes, layers = SHAPES[size]
  rank = STUDY['RANKS'][size]
  return layers * sum(of_matrix(m, n, rank) for m, n in shapes)


# Two moments in codes of 8 bits; a scale of four bytes for each block.
def coded(m, n, rank, block=256):
  return 2 * rank * n + 2 * 4 * rank * n // block


@pytest.mark.parametrize(
  ('bar', 'keeping'),
  [*zip(STUDY['BARS'], KEEPING, strict=True)],
)
def test_the_bars_that_are_kept(bar, keeping, tables):
  share = STUDY['saved'](tables[bar.size], keeping)
  assert share >= bar.saved
  assert STUDY['verdict'](share, bar).endswith('kept')
  assert ('bfloat16', keeping) in bar.readings


def test_the_bytes_of_the_linear_layers_of_7b(tables):
  def of(name):
    return tables['7b'][name]['linear']

  def count(of_matrix):
    return linear_bytes('7b', of_matrix)

  assert of('adamw') == count(lambda m, n, r: 4 * m * n)
  assert of('8-bit adamw') == count(lambda m, n, r: coded(m, n, m))
  assert of('galore') == count(lambda m, n, r: 2 * (r * m + 2 * r * n))
  assert of('8-bit galore') == count(lambda m, n, r: 2 * r * m + coded(m, n, r))
  assert of('8-bit galore, int8 P') == count(
    lambda m, n, r: r * m + 4 * r * m // 256 + coded(m, n, r)
  )
  assert of('snsm') == count(lambda m, n, r: 2 * (r * m + r * n + n))
  assert of('adam_sn') == count(lambda m, n, r: 2 * (m * n + n))


def test_snsm_of_1b(tables):
  want = linear_bytes('1b', lambda m, n, r: 2 * (r * m + r * n + n))
  assert tables['1b']['snsm']['linear'] == want
  assert want <= 0.2 * tables['1b']['adamw']['linear']


def test_at_twice_the_rank_no_bar_is_kept():
  for bar in STUDY['BARS']:
    rows = STUDY['table'](bar.size, rank=2 * STUDY['RANKS'][bar.size])
    for dtype, name in bar.readings:
      if dtype == 'bfloat16':
        share = STUDY['saved'](rows, name)
        assert STUDY['verdict'](share, bar).endswith('missed'), (bar, name)


def test_groups_hold_the_whole_state(tables):
  model = llama.Llama(llama.config('1b', param_dtype='bfloat16'))
  params = jax.eval_shape(model.init, jax.random.key(0))
  axes = optim.matrix_axes(model.axes(), whole=('vocab',))
  made = STUDY['optimizers'](STUDY['RANKS']['1b'], axes, axes)
  for name, tx in made.items():
    if name not in ('adam_sn', 'snsm'):  # of other axes in the table
      groups = tables['1b'][name].values()
      assert sum(groups) == optim.state_bytes(tx, params)['total']


def test_the_settings_that_keep_the_bars_train():
  params = {'w': jax.random.normal(jax.random.key(0), (64, 256))}
  low = {'rank': 32, 'update_interval': 3, 'projector_dtype': 'int8'}

  def loss(params):
    return (params['w'] ** 2).mean()

  for make in (optim.galore, optim.coap):
    tx = make(0.1, scale=1.0, codec='dynamic8', **low)

    @jax.jit
    def step(params, state, tx=tx):
      updates, state = tx.update(jax.grad(loss)(params), state)
      return jax.tree.map(lambda p, u: p + u, params, updates), state

    trained, state = params, tx.init(params)
    for _ in range(12):
      trained, state = step(trained, state)
    assert loss(trained) < 0.7 * loss(params)
