"""What a run tells: at its start, at its end and when it cannot go on."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import optax

from frugax import config as fx_config
from frugax import optim
from frugax.models import llama
from frugax.train import metrics, processes


def describe(config, program) -> dict[str, Any]:
  """The facts of a run that do not change while it lasts.

  Args:
    config: the run's config.
    program: its `step.Program`.

  Returns:
    parameters, flops_per_token, optimizer, optimizer_state_bytes (by
    category), adam_state_bytes (what Adam would hold for the same parameters),
    mesh, commit, versions and hardware.
  """
  state = optim.state_bytes(program.tx, program.shapes)
  adam = optim.state_bytes(optax.adam(1.0), program.shapes)
  return {
    'optimizer': config.optimizer.name,
    'parameters': sum(x.size for x in jax.tree.leaves(program.shapes)),
    'flops_per_token': llama.flops_per_token(
      program.model.config, config.data.sequence_length
    ),
    'optimizer_state_bytes': state['total'],
    'optimizer_state_bytes_by_category': state,
    'adam_state_bytes': adam['total'],
    'mesh': str(program.layout),
    **metrics.run_info(),
  }


def announce(
  config,
  workdir: str,
  info: Mapping[str, Any],
  done: int,
  saved_config: Mapping[str, Any] | None,
) -> None:
  """Prints what is about to run and saves that and the config (process 0).

  Of several processes each prints which one it is.
  """
  if jax.process_count() > 1:
    print(processes.describe(), flush=True)
  if jax.process_index():
    return
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, 'config.json')
  with open(path, 'w', encoding='utf-8') as f:
    f.write(fx_config.to_json(config))
  # For those who read the run before it has a summary.
  _write_json(os.path.join(workdir, 'info.json'), info)
  slots = config.batch_size * config.data.sequence_length
  print(
    f'model      llama {config.model.size}, {info["parameters"]:,} parameters'
  )
  print(f'optimizer  {_state_line(info)}')
  categories = info['optimizer_state_bytes_by_category'].items()
  parts = [f'{k} {v:,}' for k, v in categories if v and k != 'total']
  print(f'           ({", ".join(parts)})')
  if info['optimizer_state_bytes'] > info['adam_state_bytes']:
    print('           more than Adam: give a lower rank, if it has one')
  print(
    f'data       {config.data.name},'
    f' {config.data.mode}, {slots:,} tokens a step'
  )
  if info['switch_step']:
    print(
      f'matmuls    in high precision until step {info["switch_step"]}, then'
      f' {config.model.matmul}'
    )
  print(f'mesh       {info["mesh"]}')
  print(f'code       {_code_line(info)}')
  print(f'workdir    {workdir}')
  if done:
    print(f'resuming from the checkpoint at step {done}')
    changed = fx_config.differences(
      json.loads(json.dumps(saved_config or {})),
      json.loads(json.dumps(config.to_dict())),
    )
    for line in changed:
      print(f'  changed since: {line}')


def advice(
  done: int,
  row: Mapping[str, float],
  checkpoint: int | None,
  workdir: str,
  resume: str,
) -> str:
  """The message of a run that its loss stopped."""
  if checkpoint is None:
    kept = 'There is no checkpoint before it'
  else:
    kept = f'The last good checkpoint is step {checkpoint} in {workdir}'
  return (
    f'step {done} is not finite: loss {row["loss"]}, grad_norm'
    f' {row["grad_norm"]}, update_norm {row["update_norm"]}. Nothing of it'
    f' was saved. {kept}. Go on with a lower learning rate or leaving such'
    f' steps out:\n  {resume} --config.skip_nonfinite=true'
  )


def not_written(error: Exception, workdir: str, resume: str) -> str:
  """The message of a run that could not write into its folder."""
  full = 'No space left' in str(error) or 'quota' in str(error)
  todo = f'Make room for {workdir}' if full else f'See to {workdir}'
  return (
    f'{error}. What was saved is whole. {todo}, then go on with\n  {resume}'
  )


def stopped(done: int, resume: str) -> None:
  """Prints how to resume a run that a signal ended (process 0)."""
  if jax.process_index() == 0:
    print(
      f'\nstopped by a signal; saved at step {done}. Resume with\n  {resume}'
    )


def summarise(
  workdir: str, summary: dict[str, Any], config, resume: str
) -> None:
  """Writes summary.json and prints the result (process 0).

  Args:
    workdir: the run's folder.
    summary: the facts and results; the two commands are added to it.
    config: the run's config.
    resume: the command that started the run.
  """
  summary['command'] = resume
  summary['resume_command'] = (
    f'{resume} --config.steps={2 * config.steps}' if resume else None
  )
  if jax.process_index():
    return
  _write_json(os.path.join(workdir, 'summary.json'), summary)
  bpb = summary['bits_per_byte']
  print()
  print(
    f'validation loss   {summary["eval_loss"]:.4f} nats a token'
    f' (over {summary["eval_tokens"]:,} tokens)'
  )
  if bpb is not None:
    print(f'bits per byte     {bpb:.4f}')
  if 'tokens_per_second' in summary:
    print(
      f'speed             {summary["tokens_per_second"]:,.0f} tokens/s,'
      f' {summary["step_seconds"]:.3f} s a step'
    )
  print(f'optimizer state   {_state_line(summary)}')
  if summary['skipped']:
    print(f'skipped steps     {summary["skipped"]} (not finite)')
  if resume:
    print('train on from here with')
    print(f'  {summary["resume_command"]}')


def _code_line(info) -> str:
  commit = info['commit'] or 'no commit: not in a git repository'
  changed = ' (changed)' if info['dirty'] else ''
  return (
    f'{commit[:12] if info["commit"] else commit}{changed}, jax {info["jax"]}'
  )


def _write_json(path: str, values: Mapping[str, Any]) -> None:
  with open(path, 'w', encoding='utf-8') as f:
    json.dump(values, f, indent=2, sort_keys=True)
    f.write('\n')


def _state_line(info) -> str:
  ours, adam = info['optimizer_state_bytes'], info['adam_state_bytes']
  return (
    f'{info["optimizer"]}, {ours:,} bytes of state,'
    f" {100 * ours / adam:.1f} % of Adam's {adam:,}"
  )
