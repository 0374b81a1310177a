"""Learning-rate schedules against their formulas, written out in numpy."""

import jax
import numpy as np
import pytest

from frugax import optim

PEAK, CONSTANT, END = 2e-3, 5e-4, 1e-5


def infinite(step, warmup, cooldown, begin, steps, shape):
  if step < warmup:
    return PEAK * step / warmup
  if step < warmup + cooldown:
    t = (step - warmup) / cooldown
    if shape == 'cosine':
      return CONSTANT + (PEAK - CONSTANT) / 2 * (1 + np.cos(np.pi * t))
    fall = (1 / np.sqrt(1 + 10 * t) - 1) / (1 / np.sqrt(11) - 1)
    return PEAK + (CONSTANT - PEAK) * fall
  if begin is None or step < begin:
    return CONSTANT
  return CONSTANT * (END / CONSTANT) ** min((step - begin) / steps, 1)


@pytest.mark.parametrize('shape', ['cosine', 'inverse_sqrt'])
@pytest.mark.parametrize(
  ('warmup', 'cooldown', 'begin'),
  [(10, 30, None), (10, 30, 60), (7, 13, 20), (0, 30, 40), (10, 0, 25)],
)
def test_infinite(warmup, cooldown, begin, shape):
  schedule = jax.jit(
    optim.infinite_schedule(
      PEAK, CONSTANT, warmup, cooldown, begin, 20, END, shape
    )
  )
  for step in range(100):
    want = infinite(step, warmup, cooldown, begin, 20, shape)
    np.testing.assert_allclose(schedule(step), want, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize('begin', [40, 57, 1000])
def test_annealing_leaves_what_came_before_alone(begin):
  """So it can be asked for when a run has long begun, and ends exactly."""
  forever = optim.infinite_schedule(PEAK, CONSTANT, 10, 30)
  annealed = optim.infinite_schedule(PEAK, CONSTANT, 10, 30, begin, 20, END)
  for step in range(0, begin + 1):
    assert forever(step) == annealed(step)
  assert annealed(begin + 10) < forever(begin + 10)
  np.testing.assert_allclose(annealed(begin + 20), END, rtol=1e-6)
  assert annealed(begin + 20) == annealed(begin + 10**6)


FALLS = {
  'linear': lambda t: 1 - t,
  'cosine': lambda t: (1 + np.cos(np.pi * t)) / 2,
  'sqrt': lambda t: 1 - np.sqrt(t),
}


@pytest.mark.parametrize('decay', [*FALLS, 'exponential'])
@pytest.mark.parametrize('warmup', [0, 10])
def test_wsd(decay, warmup):
  schedule = jax.jit(optim.wsd_schedule(PEAK, warmup, 50, 25, END, decay))
  for step in range(100):
    t = np.clip((step - 50) / 25, 0, 1)
    if decay == 'exponential':
      want = PEAK * (END / PEAK) ** t
    else:
      want = END + (PEAK - END) * FALLS[decay](t)
    want = PEAK * step / warmup if step < warmup else want
    np.testing.assert_allclose(schedule(step), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(('begin', 'warmup'), [(0, 10), (100, 10), (100, 0)])
def test_rewarm(begin, warmup):
  schedule = jax.jit(
    optim.rewarm_schedule(PEAK, begin, warmup, 40, CONSTANT, END)
  )
  for step in range(200):
    if step < begin:
      want = CONSTANT
    elif step < begin + warmup:
      want = CONSTANT + (PEAK - CONSTANT) * (step - begin) / warmup
    else:
      t = min((step - begin - warmup) / 40, 1)
      want = END + (PEAK - END) / 2 * (1 + np.cos(np.pi * t))
    np.testing.assert_allclose(schedule(step), want, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: optim.infinite_schedule(1, 0.1, 10, 30, cooldown='cos'), 'cosine'),
    (lambda: optim.infinite_schedule(1, 0.1, 10, 30, 39, 5, 0.01), 'before'),
    (lambda: optim.infinite_schedule(1, 0.1, 10, 30, 50, 0, 0.01), 'at least'),
    (lambda: optim.infinite_schedule(1, 0.1, 10, 30, 50, 5), 'above 0'),
    (lambda: optim.infinite_schedule(1, 0.1, 0.5, 30), 'warmup_steps=0.5'),
    (lambda: optim.wsd_schedule(1, 10, 5, 5), 'warm-up'),
    (lambda: optim.wsd_schedule(1, 10, 50, 5, decay='linea'), 'linear'),
    (lambda: optim.wsd_schedule(1, 1, 5, 5, decay='exponential'), 'above 0'),
    (lambda: optim.rewarm_schedule(1, -1, 5, 5), 'begin=-1'),
    (lambda: optim.rewarm_schedule(1, 5, 5, 0), 'at least 1'),
  ],
)
def test_bad_arguments_say_so(make, match):
  with pytest.raises(ValueError, match=match):
    make()
