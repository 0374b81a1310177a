"""Learning-rate schedules for runs whose end is open, or is not the last."""

import jax
import jax.numpy as jnp
import optax

from frugax import names
from frugax.optim.leaves import check_positive

COOLDOWNS = ('cosine', 'inverse_sqrt')
DECAYS = ('linear', 'cosine', 'sqrt', 'exponential')


def infinite_schedule(
  peak_value: float,
  constant_value: float,
  warmup_steps: int,
  cooldown_steps: int,
  anneal_begin: int | None = None,
  anneal_steps: int = 0,
  end_value: float = 0.0,
  cooldown: str = 'cosine',
) -> optax.Schedule:
  r"""Warm up, cool down to a constant, stay there, and anneal when asked to.

  .. math::
    \eta = \begin{cases}
      \eta_{max} \, s / N_w & \text{warm-up} \\
      \eta_{c} + \frac{\eta_{max} - \eta_{c}}{2} (1 + \cos \pi t)
        & \text{cool-down, } t = (s - N_w) / N_c \\
      \eta_{c} & \text{for as long as wanted} \\
      \eta_{c} \, (\eta_{min} / \eta_{c})^{t} & \text{annealing}
    \end{cases}

  A run has no length until it is annealed. Train without, keep the checkpoints,
  and from any of them either go on with more or other data or anneal: the same
  schedule with `anneal_begin` at that checkpoint's step. What is trained later
  goes on from the checkpoint before the annealing.

  Args:
    peak_value: :math:`\eta_{max}`.
    constant_value: :math:`\eta_c`; usual are 0.1 to 0.5 of the peak.
    warmup_steps: :math:`N_w`, linear from 0; usual is 1 % to 5 % of a run.
    cooldown_steps: :math:`N_c`; usual is up to 15 % or 60 % of a run.
    anneal_begin: the step at which annealing begins; None for never.
    anneal_steps: its length. It ends at `end_value` exactly.
    end_value: :math:`\eta_{min}`, above 0 when annealing is asked for.
    cooldown: 'cosine', or 'inverse_sqrt': :math:`\eta_{max} + (\eta_c -
      \eta_{max}) f(t) / f(1)` with :math:`f(t) = (1 + 10 t)^{-1/2} - 1`.

  Returns:
    step -> learning rate.

  Raises:
    ValueError: an unknown cool-down, annealing that begins before the constant
      phase, has no length or ends at 0.

  Examples:
    >>> schedule = infinite_schedule(1.0, 0.25, 10, 20, 100, 10, 0.01)
    >>> [round(float(schedule(s)), 3) for s in (0, 5, 10, 20, 30, 90, 105, 110)]
    [0.0, 0.5, 1.0, 0.625, 0.25, 0.25, 0.05, 0.01]

  References:
    Ibrahim et al., `Simple and Scalable Strategies to Continually Pre-train
    Large Language Models <https://arxiv.org/abs/2403.08763>`_, 2024
  """
  if cooldown not in COOLDOWNS:
    raise names.unknown('cooldown', cooldown, COOLDOWNS)
  _check_steps(warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)

  def cool(step):
    t = jnp.clip(step / max(cooldown_steps, 1), 0.0, 1.0)
    if cooldown_steps == 0:
      t = 1.0
    if cooldown == 'cosine':
      return constant_value + (peak_value - constant_value) * _falling_cosine(t)

    def f(t):
      return (1 + 10 * t) ** -0.5 - 1

    return peak_value + (constant_value - peak_value) * f(t) / f(1.0)

  phases = [optax.linear_schedule(0.0, peak_value, warmup_steps), cool]
  boundaries = [warmup_steps]
  if anneal_begin is not None:
    _check_steps(anneal_begin=anneal_begin)
    if anneal_begin < warmup_steps + cooldown_steps:
      raise ValueError(
        f'anneal_begin={anneal_begin!r} lies before the end of warm-up and '
        f'cool-down, {warmup_steps} + {cooldown_steps} steps: begin later, or '
        'shorten them'
      )
    phases.append(
      _decay('exponential', constant_value, end_value, anneal_steps)
    )
    boundaries.append(anneal_begin)
  return optax.join_schedules(phases, boundaries)


def wsd_schedule(
  peak_value: float,
  warmup_steps: int,
  decay_begin: int,
  decay_steps: int,
  end_value: float = 0.0,
  decay: str = 'linear',
) -> optax.Schedule:
  r"""Warm up, stay, decay: one long run, and a branch for each budget.

  The learning rate is :math:`\eta_{min} + (\eta_{max} - \eta_{min}) f(t)` in
  the last phase, with t from 0 to 1.

  Args:
    peak_value: :math:`\eta_{max}`.
    warmup_steps: linear from 0.
    decay_begin: the step at which the decay begins.
    decay_steps: its length; usual is 10 % to 20 % of a run.
    end_value: :math:`\eta_{min}`, at which it stays.
    decay: 'linear', :math:`1 - t`; 'cosine'; 'sqrt', :math:`1 - \sqrt t`; or
      'exponential', :math:`\eta_{max} (\eta_{min} / \eta_{max})^t`.

  Returns:
    step -> learning rate.

  Raises:
    ValueError: an unknown decay, one that begins before the end of the warm-up
      or has no length, or an exponential one to 0.

  Examples:
    >>> schedule = wsd_schedule(1.0, 10, decay_begin=90, decay_steps=10)
    >>> [round(float(schedule(s)), 3) for s in (0, 5, 10, 90, 95, 100, 200)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]

  References:
    Hu et al., `MiniCPM: Unveiling the Potential of Small Language Models with
    Scalable Training Strategies <https://arxiv.org/abs/2404.06395>`_, 2024

    Hägele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations <https://arxiv.org/abs/2405.18392>`_, 2024
  """
  _check_steps(warmup_steps=warmup_steps, decay_begin=decay_begin)
  if decay_begin < warmup_steps:
    raise ValueError(
      f'decay_begin={decay_begin!r} lies in the warm-up of {warmup_steps} '
      'steps: begin later, or shorten it'
    )
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak_value, warmup_steps),
      optax.constant_schedule(peak_value),
      _decay(decay, peak_value, end_value, decay_steps),
    ],
    [warmup_steps, decay_begin],
  )


def rewarm_schedule(
  peak_value: float,
  begin: int,
  warmup_steps: int,
  decay_steps: int,
  start_value: float = 0.0,
  end_value: float = 0.0,
) -> optax.Schedule:
  r"""Warm up and decay once more, to go on with a run that had decayed.

  From step `begin`, the step of the checkpoint: linear from `start_value`,
  where the first run ended, to the peak, then a cosine to `end_value`.

  Args:
    peak_value: the highest rate; the first run's, or less for data that is
      much like the first.
    begin: the step at which the warm-up begins; before it the rate is
      `start_value`.
    warmup_steps: length of the warm-up.
    decay_steps: length of the cosine.
    start_value: the rate at `begin`.
    end_value: the rate from `begin + warmup_steps + decay_steps` on.

  Returns:
    step -> learning rate.

  Raises:
    ValueError: a number of steps that is negative or no int; no decay steps.

  Examples:
    >>> schedule = rewarm_schedule(1.0, 100, 10, 40, 0.1, 0.1)
    >>> [round(float(schedule(s)), 3) for s in (99, 105, 110, 130, 150, 200)]
    [0.1, 0.55, 1.0, 0.55, 0.1, 0.1]

  References:
    Ibrahim et al., `Simple and Scalable Strategies to Continually Pre-train
    Large Language Models <https://arxiv.org/abs/2403.08763>`_, 2024
  """
  _check_steps(begin=begin, warmup_steps=warmup_steps)
  return optax.join_schedules(
    [
      optax.constant_schedule(start_value),
      optax.linear_schedule(start_value, peak_value, warmup_steps),
      _decay('cosine', peak_value, end_value, decay_steps),
    ],
    [begin, begin + warmup_steps],
  )


def _falling_cosine(t):
  return 0.5 * (1 + jnp.cos(jnp.pi * t))


def _decay(name, start, end, steps):
  """From start to end in so many steps; it stays there."""
  if name not in DECAYS:
    raise names.unknown('decay', name, DECAYS)
  check_positive('decay or anneal steps', steps)
  if name == 'exponential' and not (start > 0 and end > 0):
    raise ValueError(
      f'an exponential goes from {start} to no rate but one above 0, not to '
      f'{end}: give end_value a small number'
    )

  def schedule(step: jax.typing.ArrayLike):
    t = jnp.clip(step / steps, 0.0, 1.0)
    if name == 'exponential':
      return start * (end / start) ** t
    left = {
      'linear': lambda: 1 - t,
      'cosine': lambda: _falling_cosine(t),
      'sqrt': lambda: 1 - jnp.sqrt(t),
    }[name]()
    return end + (start - end) * left

  return schedule


def _check_steps(**steps):
  for name, value in steps.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      raise ValueError(f'{name}={value!r}: give an int of 0 or more')
