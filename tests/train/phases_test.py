"""A run in high precision first and with low-bit matmuls after."""

import json

import jax
import numpy as np
import pytest

from frugax.quant import element
from frugax.train import loop, phases, signals, step


def test_the_optimal_fraction():
  """The fit's own formula, and what its authors find at both ends."""
  for s in (5.0, 100.0, 1e4):
    got = phases.low_bit_fraction(s * 1000 / 2, 1000, 4)
    want = np.exp(np.log(s) - 6.7297 / np.log(s)) / s
    np.testing.assert_allclose(got, want, rtol=1e-12)
  # More tokens or fewer bits, a larger part of them; at most all.
  longer = [phases.low_bit_fraction(t, 1e8, 4) for t in (1e9, 1e10, 1e12)]
  assert 0 < longer[0] < longer[1] < longer[2] < 1
  assert phases.low_bit_fraction(1e9, 1e8, 1) > longer[0]
  with pytest.raises(ValueError, match='give matmul_switch a fraction'):
    phases.low_bit_fraction(4e7, 1e8, 4)


def test_the_step_of_the_switch(make_config):
  def switch(value, matmul='int4', **overrides):
    config = make_config(
      f'size=tiny,opt=adamw,matmul={matmul}', matmul_switch=value, **overrides
    )
    program = step.build(config, jax.devices()[:1])
    return phases.switch_step(config, program.model.config)

  assert switch('0') == switch('0.0', matmul='f32') == 0
  assert switch('0.5') == 3 and switch(1) == 6
  # 2 layers of q, k, v and o (two heads of 8 share k and v), and the MLP.
  weights = 2 * (32 * 32 * 3 + 3 * 32 * 44)
  tokens = 40_000 * 8 * 32
  for matmul, bits in (
    ('int4', element('int4').bits),
    ('b1.58', np.log2(3)),
    ('stable_spam_int4', 4),
  ):
    low = phases.low_bit_fraction(tokens, weights, bits)
    assert switch('optimal', matmul, steps=40_000) == round(40_000 * (1 - low))
  for value, matmul, message in (
    ('optimum', 'int4', "matmul_switch='optimum': give a fraction"),
    ('1.5', 'int4', 'from 0 to 1'),
    ('0.5', 'f32', 'switches to nothing'),
    ('0.5', 'w8', 'from the first step on'),
    ('optimal', 'masked_e8m3', 'no bits a weight'),
    ('optimal', 'int8', 'tokens a byte'),
  ):
    with pytest.raises(ValueError, match=message):
      switch(value, matmul)


def _rows(workdir, key='loss'):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = map(json.loads, lines)
  return {row['step']: row for row in rows if key in row}


@pytest.mark.slow
def test_a_run_switches_once_and_resumes_in_either_phase(
  make_config, tmp_path, monkeypatch, capsys
):
  config = make_config(
    'size=tiny,opt=adamw,matmul=int8',
    mesh='data=1',
    matmul_switch='0.5',
    eval__every=3,
    log__quantization=5,
  )
  traced = []
  make = step.make_train_step

  def remember(model, *args, **kwargs):
    train_step = make(model, *args, **kwargs)

    def traced_step(*inputs):
      traced.append(model.config.matmul)
      return train_step(*inputs)

    return traced_step

  monkeypatch.setattr(step, 'make_train_step', remember)
  devices = jax.devices()[:1]
  loop.train(config, tmp_path / 'whole', devices=devices)
  printed = capsys.readouterr().out
  assert 'in high precision until step 3, then int8' in printed
  assert printed.count('from here on matmuls are int8') == 1
  want = _rows(tmp_path / 'whole')
  assert [row['low_bit'] for row in want.values()] == [0, 0, 0, 1, 1, 1]
  # One compiled step for each phase.
  assert traced == ['none', 'int8']

  # What rounding does, layer by layer.
  (rates,) = _rows(
    tmp_path / 'whole', 'quantization/0/attn/q/weights/error'
  ).values()
  rates = {k: v for k, v in rates.items() if k.startswith('quantization/')}
  assert len(rates) == 2 * 7 * 3 * 3
  for name, value in rates.items():
    if name.endswith('error'):
      # Half of a 127th of the greatest, over the root mean square.
      assert 1e-3 < value < 0.1, (name, value)
    elif name.endswith('saturation'):
      assert value == 0, name
    else:
      assert 0 <= value < 0.9, (name, value)
  down = [rates[f'quantization/{i}/mlp/down/gradients/error'] for i in (0, 1)]
  assert down[0] != down[1]

  for stop in (2, 4):
    monkeypatch.setattr(
      signals.StopSignal, 'requested', lambda _, done, n=stop: done == n
    )
    loop.train(config, tmp_path / 'parts', devices=devices)
  monkeypatch.setattr(signals.StopSignal, 'requested', lambda *_: False)
  loop.train(config, tmp_path / 'parts', devices=devices)
  got = _rows(tmp_path / 'parts')
  assert list(got) == list(want)
  for n, row in want.items():
    for key in ('loss', 'grad_norm', 'param_norm', 'low_bit', 'tokens'):
      assert got[n][key] == row[key], (n, key)


def test_quantization_of_nothing_is_an_error(make_config):
  config = make_config(log__quantization=2)
  with pytest.raises(ValueError, match='no linear is rounded'):
    loop.train(config, 'unused', devices=jax.devices()[:1])
