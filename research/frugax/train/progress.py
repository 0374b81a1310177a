"""The progress bar and the metrics of a run."""

import sys
from typing import Any

import jax
import numpy as np
import tqdm

from frugax.train import metrics


def finite(row: dict[str, Any]) -> bool:
  """Whether a step's loss, gradient and update are all numbers.

  Examples:
    >>> finite({'loss': 1.0, 'grad_norm': float('inf'), 'update_norm': 0.0})
    False
  """
  values = [row[name] for name in ('loss', 'grad_norm', 'update_norm')]
  return bool(np.isfinite(values).all())


class Progress:
  """Progress bar, clock and metric files of one run.

  Attributes:
    tokens: labels trained on so far, over all processes of the run.
    clock: the training time so far.

  Args:
    config: the run's config.
    workdir: where the metric files go.
    program: the run's `step.Program`.
    info: what `console.describe` found.
    done: completed steps.
    meta: tokens and seconds so far.
  """

  def __init__(self, config, workdir, program, info, done, meta):
    first = jax.process_index() == 0
    self.tokens = meta['tokens']
    self.clock = metrics.Clock(seconds=meta['seconds'])
    self._every = config.log.every
    self._last = config.steps
    self._slots = config.batch_size * config.data.sequence_length
    self._flops_per_token = info['flops_per_token']
    self._devices = list(program.layout.mesh.devices.flat)
    self._rates: list[dict[str, float]] = []
    self._writer = metrics.MetricWriter(
      workdir,
      resume_step=done,
      tensorboard=config.log.tensorboard,
      wandb=config.log.wandb or None,
      active=first,
      config=config.to_dict(),
    )
    self._bar = tqdm.tqdm(
      total=config.steps,
      initial=done,
      unit='step',
      disable=not first,
      dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 30,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()
    self._writer.close()

  def step(self, done: int, on_device: dict[str, jax.Array]) -> dict[str, Any]:
    """Fetches a step's metrics, which waits for it, and logs them."""
    row = {k: v.item() for k, v in jax.device_get(on_device).items()}
    tokens = row.pop('tokens')
    self.tokens += tokens
    self.clock.step(tokens)
    due = self._every and done % self._every == 0
    if not finite(row) or due or done == self._last:
      self.write(done, row | self._window() | metrics.device_memory())
    self._bar.set_postfix(loss=f'{row["loss"]:.3f}', refresh=False)
    self._bar.update()
    return row

  def evaluation(self, done: int, row: dict[str, Any]) -> None:
    """Logs an evaluation."""
    self.write(done, row)
    text = f'step {done}: validation loss {row["eval_loss"]:.4f}'
    if row['bits_per_byte'] is not None:
      text += f', {row["bits_per_byte"]:.4f} bits per byte'
    if 'eval_loss_compat' in row:
      text += f' (published harness: {row["eval_loss_compat"]:.4f})'
    self.tell(text)

  def tell(self, text: str) -> None:
    """Prints a line above the bar (process 0)."""
    if jax.process_index() == 0:
      self._bar.write(text, file=sys.stdout)

  def rates(self) -> dict[str, float]:
    """Medians over the logged windows: without compilation or evaluation."""
    names = self._rates[0] if self._rates else ()
    return {n: float(np.median([r[n] for r in self._rates])) for n in names}

  def _window(self):
    rates = self.clock.rates()
    if rates:
      mfu = metrics.model_flops_utilization(
        self._slots / rates['step_seconds'],
        self._flops_per_token,
        self._devices,
      )
      if mfu is not None:
        rates['mfu'] = mfu
      self._rates.append(rates)
    return rates

  def write(self, done: int, row: dict[str, float]) -> None:
    """Logs scalars."""
    now = {'tokens': self.tokens, 'seconds': self.clock.seconds}
    self._writer.write(done, row | now)
