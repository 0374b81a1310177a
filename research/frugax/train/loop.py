"""The loop: the one place where the order of a run's events is visible."""

import contextlib
import errno
import os
import shlex
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from frugax.train import (
  checkpoint,
  console,
  data,
  evaluation,
  phases,
  processes,
  progress,
  quantization,
  tokenizer,
)
from frugax.train.processes import CannotGoOn, LostProcess
from frugax.train.signals import StopSignal


class NonFiniteLoss(CannotGoOn):
  """The loss stopped being a number."""


def train(
  config,
  workdir: str | os.PathLike,
  *,
  command: Sequence[str] = (),
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Trains to `config.steps`, from the latest checkpoint if there is one.

  Args:
    config: the run's ConfigDict (configs/llama.py shows every field).
    workdir: gets config.json, info.json, metrics.jsonl, tensorboard/,
      checkpoints/ and, when all steps are done, summary.json.
    command: the command line that started the run, to be printed for resuming.
    devices: the devices of the mesh; default all.

  Returns:
    The summary that summary.json holds; only steps and stopped=True when a
    signal ended the run before its last step.

  Raises:
    ValueError: a config that cannot run, found before anything is compiled.
    NonFiniteLoss: the loss, gradient or update was not finite. Nothing of that
      step is saved.
    CannotGoOn: the disk is full, or (LostProcess) another process was lost.
      What was saved before is whole.
  """
  workdir, resume = os.fspath(workdir), shlex.join(command)
  try:
    with StopSignal() as stop, contextlib.ExitStack() as opened:
      return _train(config, workdir, stop, resume, devices, opened)
  except (checkpoint.NotSaved, OSError) as e:
    if isinstance(e, OSError) and e.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise CannotGoOn(console.not_written(e, workdir, resume)) from e
  except jax.errors.JaxRuntimeError as e:
    if not processes.may_be_lost(e):
      raise
    raise LostProcess(processes.lost(e, resume)) from e


def _train(config, workdir, stop, resume, devices, opened):
  processes.agree(config)
  # What can be wrong is found here, before any compilation.
  steps = phases.Phases(config, devices)
  program = steps.low
  tok = tokenizer.tokenizer(config.data.tokenizer)
  data.check(config.data, tok, program.model.config.vocab_size)
  program.layout.check_batch(
    config.eval.batch_size, config.data.sequence_length, 'eval.batch_size'
  )
  _check_workdir(workdir)
  index, count = program.layout.share()
  hosts = {'process_index': index, 'process_count': count}
  eval_data = data.eval_batches(
    config.data,
    tok,
    batch_size=config.eval.batch_size,
    tokens=config.eval.tokens,
    **hosts,
  )
  eval_step = steps.eval_step(tok.bytes_per_id())
  rates = quantization.probe(config, program)

  # State and data: the latest checkpoint's, or new ones.
  stream = {name: config.data[name] for name in _STREAM}
  if config.data.streams:
    stream['streams'] = config.data.streams
  checkpoints = checkpoint.Checkpoints(
    os.path.join(workdir, 'checkpoints'), config.checkpoint.keep
  )
  opened.callback(checkpoints.close)
  saved = checkpoints.restore(program.abstract_state(), stream)
  if saved:
    done, state, positions, meta = saved
    stream = meta['stream']
  else:
    done, meta = 0, {'seconds': 0.0, 'tokens': 0, 'best': None}
    stream['streams'] = data.stream_count(config.data, config.batch_size)
  train_data = data.train_batches(
    config.data,
    tok,
    batch_size=config.batch_size,
    streams=stream['streams'] if saved else None,
    **hosts,
  )
  opened.callback(train_data.close)
  if saved:
    train_data.set_state(positions)
  else:
    state = program.init(jax.random.PRNGKey(config.seed))
  info = console.describe(config, program) | {'switch_step': steps.switch}
  console.announce(config, workdir, info, done, meta.get('config'))
  log = progress.Progress(config, workdir, program, info, done, meta)
  best, eval_row, stopping = meta['best'], None, False

  def save(eval_loss=None):
    now = {'seconds': log.clock.seconds, 'tokens': log.tokens, 'best': best}
    now |= {'config': config.to_dict(), 'stream': stream}
    positions = processes.merge(train_data.get_state())
    checkpoints.save(done, state, positions, now, eval_loss)

  def settle(step_and_metrics):
    row = log.step(*step_and_metrics)
    if not (progress.finite(row) or config.skip_nonfinite):
      checkpoints.wait()
      kept = checkpoints.latest_step()
      at = step_and_metrics[0]
      raise NonFiniteLoss(console.advice(at, row, kept, workdir, resume))

  def evaluate():
    sums = []
    for batch in eval_data:
      sums.append(eval_step(done, state.params, batch))
      # A preempted run has seconds: saving comes first. (Several processes
      # learn of it together, after a step.)
      if stop.raised and jax.process_count() == 1:
        return None
    return evaluation.means(jax.device_get(sums), config.compat_eval)

  with jax.set_mesh(program.layout.mesh), log:
    late = None
    while done < config.steps:
      # A step is dispatched before the metrics of the one before it are
      # fetched, so the device never waits for the host.
      batch = next(train_data, None)
      if batch is None:
        raise ValueError(
          f'the data ended after {done} steps, {config.steps} were asked'
          ' for; set --config.data.repeat=true or fewer --config.steps'
        )
      if text := steps.announcement(done):
        log.tell(text)
      state, on_device = steps.train_step(done, state, batch)
      if late:
        settle(late)
      done += 1
      late = (done, on_device)
      last = done == config.steps
      stopping = stop.requested(done)
      evaluating = not stopping and (last or _due(done, config.eval.every))
      saving = last or stopping or _due(done, config.checkpoint.every)
      probing = _due(done, config.log.quantization)
      if not (evaluating or saving or probing):
        continue
      # Nothing is evaluated or saved before its loss is known to be finite.
      settle(late)
      late = None
      with log.clock.paused():
        if probing:
          log.write(done, rates(state.params, program.put(batch)))
        eval_loss, eval_row = None, evaluate() if evaluating else None
        if eval_row:
          log.evaluation(done, eval_row)
          if np.isfinite(eval_row['eval_loss']):
            eval_loss = eval_row['eval_loss']
            if best is None or eval_loss < best:
              best, saving = eval_loss, True
        stopping = stopping or (evaluating and not eval_row)
        if saving or stopping:
          save(eval_loss)
      if stopping:
        break
    checkpoints.wait()  # completes what is being written
    if not (stopping or eval_row):  # every step was done before this run began
      eval_row = evaluate()
    if not eval_row:
      console.stopped(done, resume)
      return {'stopped': True, 'steps': done}
  summary = (
    info
    | eval_row
    | log.rates()
    | {
      'stopped': False,
      'steps': done,
      'tokens': log.tokens,
      'seconds': log.clock.seconds,
      'skipped': int(state.skipped),
    }
  )
  console.summarise(workdir, summary, config, resume)
  return summary


# What the position in the stream of training batches depends on.
_STREAM = (
  *('name', 'train_split', 'text_field', 'tokenizer', 'mode'),
  *('sequence_length', 'seed', 'shuffle_rows', 'repeat'),
)


def _check_workdir(workdir):
  if '://' in workdir:
    raise ValueError(
      f'workdir {workdir!r} is no folder: give one on a disk that all processes'
      ' see (a mounted bucket, say)'
    )
  try:
    os.makedirs(workdir, exist_ok=True)
    # (Several processes may do this at once.)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise ValueError(
      f'workdir {workdir!r} cannot be written: {e.strerror}; give another one'
    ) from e


def _due(done: int, every: int) -> bool:
  return bool(every) and done % every == 0
