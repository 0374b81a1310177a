"""A run in two phases: in high precision first, with low-bit matmuls after."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from frugax import lowbit
from frugax.models import llama
from frugax.models.llama import model
from frugax.quant import ELEMENTS
from frugax.train import step

_A = 6.7297  # of the fit, see `low_bit_fraction`

# What the linears of the first phase do instead of what the config says.
_HIGH = {
  'matmul': 'none',
  'matmul_rules': (),
  'matmul_head': 'none',
  'activations': 'none',
}


def low_bit_fraction(tokens: float, parameters: float, bits: float) -> float:
  r"""The share of the training that low-bit matmuls had best get.

  With :math:`D` tokens, :math:`N` weights of :math:`B` bits and
  :math:`S = 8 D / (N B)` tokens for each byte of them

  .. math:: f = S^{-1} \exp(\log S - a / \log S) = \exp(-a / \log S)

  with a = 6.7297, fitted to weights of 1, 2, 4 and 6 bits, models of 86 M to
  2.2 B parameters and 2.3 B to 1.4 T tokens (mean absolute error 0.091). The
  longer a run is, the larger is the share.

  Args:
    tokens: of the whole run.
    parameters: number of weights.
    bits: of one.

  Returns:
    A number between 0 and 1.

  Raises:
    ValueError: not more than one token a byte, for which there is no law.

  Examples:
    >>> round(low_bit_fraction(86e6 * 100, 86e6, 4), 2)
    0.28

  References:
    Dremov et al., `Compute-Optimal Quantization-Aware Training
    <https://arxiv.org/abs/2509.22935>`_, 2025
  """
  s = 8 * tokens / (parameters * bits)
  if s <= 1:
    raise ValueError(
      f'{tokens:.3g} tokens for {parameters:.3g} weights of {bits} bits are '
      f'{s:.2g} tokens a byte: the optimal switch is known for more than one; '
      'give matmul_switch a fraction'
    )
  return math.exp(-_A / math.log(s))


def switch_step(config, model_config: llama.LlamaConfig) -> int:
  """The number of steps in high precision, before the low-bit ones.

  Args:
    config: the run's config: `matmul_switch` is a fraction of `steps`, or
      'optimal', which is one less `low_bit_fraction`; the weights are then all
      but the embedding and the head, in the format of `model.matmul`.
    model_config: the model's.

  Returns:
    0 to `config.steps`.

  Raises:
    ValueError: neither a fraction nor 'optimal'; a switch of what has but one
      phase; 'optimal' for weights that are not rounded.
  """
  value = config.matmul_switch
  if value != 'optimal':
    try:
      fraction = float(value)
    except (TypeError, ValueError):
      fraction = math.nan
    if not 0 <= fraction <= 1:
      raise ValueError(
        f"matmul_switch={value!r}: give a fraction from 0 to 1, or 'optimal'"
      )
    if not fraction:
      return 0
  recipes = {model_config.matmul, model_config.matmul_head}
  recipes |= {name for _, name in model_config.matmul_rules}
  if any(lowbit.recipe(name).weights != 'none' for name in recipes):
    raise ValueError(
      f'matmul_switch={value!r} with weights that are stored in few bits from '
      'the first step on: set it to 0'
    )
  if recipes <= {'none', 'bf16'}:
    raise ValueError(
      f'matmul_switch={value!r} switches to nothing: name a recipe in '
      'model.matmul, or set it to 0'
    )
  if value == 'optimal':
    low = low_bit_fraction(
      config.steps * config.batch_size * config.data.sequence_length,
      _weights(model_config),
      _bits(model_config.matmul),
    )
    fraction = 1 - low
  return round(fraction * config.steps)


def _weights(config):
  layers = model.shapes(config)['layers']
  return sum(
    x.size
    for path, x in jax.tree.leaves_with_path(layers)
    if path[-1].key == 'kernel'
  )


def _bits(name):
  format = lowbit.recipe(name).forward.right.format
  if format in ELEMENTS:
    return ELEMENTS[format].bits if format != 'ternary' else math.log2(3)
  if format and '4' in format:  # simulated
    return 4
  raise ValueError(
    f"matmul_switch='optimal' with matmul={name!r}, which has no bits a weight:"
    ' give it a fraction'
  )


class Phases:
  """The programs of a run's phases; which one a step has, its number tells.

  So a resumed run is in the right one, and each is compiled once.

  Attributes:
    low: the program of the second phase, which is that of the config.
    high: that of the first; the same if there is but one.
    switch: the number of steps in the first phase.

  Args:
    config: the run's config.
    devices: the devices of the mesh; default all.

  Raises:
    ValueError: a config that cannot run.
  """

  def __init__(self, config, devices: Sequence[jax.Device] | None = None):
    self.low = self.high = step.build(config, devices)
    self.switch = switch_step(config, self.low.model.config)
    self._name = self.low.model.config.matmul
    if self.switch:
      high = config.copy_and_resolve_references()
      with high.unlocked(), high.ignore_type():
        high.model.update(_HIGH)
      self.high = step.build(high, devices)

  def at(self, done: int) -> step.Program:
    """The program of the step that follows on so many."""
    return self.high if done < self.switch else self.low

  def train_step(self, done: int, state: step.TrainState, batch):
    """Takes the step that follows on so many; see `step.Program`.

    Where there are two phases its metrics tell which it was: `low_bit`, 0 or 1.
    """
    program = self.at(done)
    state, metrics = program.train_step(state, program.put(batch))
    if self.switch:
      metrics['low_bit'] = np.int32(done >= self.switch)
    return state, metrics

  def eval_step(self, bytes_per_id: np.ndarray) -> Callable[..., Any]:
    """(done, params, batch) -> sums, by the model of the last step taken."""
    low, high = (
      jax.jit(step.make_eval_step(p.model, bytes_per_id))
      for p in (self.low, self.high)
    )

    def evaluate(done, params, batch):
      which = high if done <= self.switch and self.switch else low
      return which(params, self.low.put(batch))

    return evaluate

  def announcement(self, done: int) -> str | None:
    """What to tell before the step that follows on so many, at a switch."""
    if self.switch and done == self.switch:
      return f'step {done}: from here on matmuls are {self._name}'
    return None
