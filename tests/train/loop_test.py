"""Whole runs: what they write, how they stop, and that they resume exactly."""

import errno
import itertools
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from running import assert_same_steps, rows, start, wait_for_step

from frugax.train import __main__ as cli
from frugax.train import checkpoint, data, loop, signals, step, tokenizer


def _stop_at(monkeypatch, step):
  """As if SIGTERM arrived during this step."""
  monkeypatch.setattr(
    signals.StopSignal, 'requested', lambda _, done: done == step
  )


def test_a_run_writes_what_it_promises(make_config, tmp_path, capsys):
  config = make_config(mesh='data=1', eval__every=2, log__tensorboard='true')
  devices = jax.devices()[:1]
  summary = loop.train(
    config, tmp_path, command=['run', 'x y'], devices=devices
  )
  found = rows(tmp_path)
  assert list(found) == [1, 2, 3, 4, 5, 6]
  assert all(np.isfinite(row['loss']) for row in found.values())
  assert found[1]['learning_rate'] == 0 and found[3]['learning_rate'] > 0
  batches = data.train_batches(
    config.data, tokenizer.tokenizer('bytes'), batch_size=8
  )
  counted = [int((next(batches)['labels'] >= 0).sum()) for _ in range(6)]
  batches.close()
  assert [row['tokens'] for row in found.values()] == np.cumsum(
    counted
  ).tolist()
  assert list(rows(tmp_path, 'eval_loss')) == [2, 4, 6]
  assert summary == json.loads((tmp_path / 'summary.json').read_text())
  assert summary['eval_tokens'] == 500 and summary['steps'] == 6
  # Every token of the byte-level text is a byte or the end of a document.
  nats = summary['eval_loss'] * summary['eval_tokens']
  n_bytes = nats / np.log(2) / summary['bits_per_byte']
  assert 480 <= round(n_bytes) < 500
  assert summary['optimizer_state_bytes'] < summary['adam_state_bytes']
  assert json.loads((tmp_path / 'config.json').read_text())['steps'] == 6
  info = json.loads((tmp_path / 'info.json').read_text())
  assert info.items() <= summary.items() and 'optimizer_state_bytes' in info
  assert any((tmp_path / 'tensorboard').iterdir())
  printed = capsys.readouterr().out
  assert "run 'x y' --config.steps=12" in printed
  assert f'{summary["eval_loss"]:.4f}' in printed
  # Once more: nothing is left to train, the result is the same.
  again = loop.train(config, tmp_path, command=['run'], devices=devices)
  assert again['eval_loss'] == summary['eval_loss']
  assert rows(tmp_path) == found


@pytest.mark.parametrize(
  ('arguments', 'mesh', 'overrides'),
  [
    ('size=tiny,opt=galore', 'data=1', {'accumulation': 4}),
    pytest.param(
      *('size=tiny,opt=galore', 'fsdp=2,tensor=2,context=2'),
      {'accumulation': 4},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *('size=tiny,opt=adamw,matmul=bf16', 'data=2,fsdp=4'),
      {'model__param_dtype': 'bfloat16', 'data__num_workers': 1},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *('size=tiny,opt=adafactor', 'data=1', {'data__mode': 'c4_protocol'}),
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_resuming_equals_running_on_bit_for_bit(
  arguments, mesh, overrides, make_config, tmp_path, monkeypatch
):
  config = make_config(arguments, mesh=mesh, **overrides)
  devices = jax.devices()[: 1 if mesh == 'data=1' else 8]
  whole = loop.train(config, tmp_path / 'whole', devices=devices)
  # Once twice, the second time from a resumed run.
  for stop in (2, 5) if 'galore' in arguments else (3,):
    _stop_at(monkeypatch, stop)
    part = loop.train(config, tmp_path / 'parts', devices=devices)
    assert part == {'stopped': True, 'steps': stop}
  monkeypatch.undo()
  parts = loop.train(config, tmp_path / 'parts', devices=devices)
  assert_same_steps(rows(tmp_path / 'parts'), rows(tmp_path / 'whole'))
  assert parts['eval_loss'] == whole['eval_loss']
  assert parts['tokens'] == whole['tokens']


@pytest.mark.slow
def test_a_checkpoint_restores_onto_another_mesh(
  make_config, tmp_path, monkeypatch
):
  whole = loop.train(make_config(mesh='fsdp=8'), tmp_path / 'whole')
  _stop_at(monkeypatch, 3)
  loop.train(make_config(mesh='fsdp=8'), tmp_path / 'moved')
  monkeypatch.undo()
  moved = loop.train(make_config(mesh='data=2,tensor=4'), tmp_path / 'moved')
  np.testing.assert_allclose(moved['eval_loss'], whole['eval_loss'], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('step', ['ordinary', 'layerwise'])
def test_a_checkpoint_restores_into_another_memory_bit_for_bit(
  step, make_config, tmp_path, monkeypatch
):
  def config(memory):
    return make_config(mesh='fsdp=4,tensor=2', step=step, opt_state=memory)

  loop.train(config('device'), tmp_path / 'whole')
  for first, then in itertools.permutations(('device', 'pinned_host')):
    _stop_at(monkeypatch, 3)
    loop.train(config(first), tmp_path / first)
    monkeypatch.undo()
    loop.train(config(then), tmp_path / first)
    assert_same_steps(rows(tmp_path / first), rows(tmp_path / 'whole'))


def _kill_in_a_save(process, checkpoints):
  """Kills it while a checkpoint is half written: the names of its folders."""

  def half():
    return [p.name for p in checkpoints.glob('*tmp*')]  # until it is whole

  deadline = time.monotonic() + 60
  while time.monotonic() < deadline:
    if half():
      # It may be whole before a signal arrives: then the next one will do.
      process.send_signal(signal.SIGSTOP)
      os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
      if found := half():
        process.send_signal(signal.SIGKILL)
        process.wait()
        return found
      process.send_signal(signal.SIGCONT)
  pytest.fail('no save was seen')


@pytest.mark.parametrize(
  'n_devices', [1, pytest.param(8, marks=pytest.mark.slow)]
)
def test_kill_9_then_sigterm_then_resume_is_bit_for_bit(
  n_devices, command_line, tmp_path
):
  steps = {'steps': 120, 'accumulation': 2, 'mesh': 'fsdp=-1', 'batch_size': 16}
  every = 10

  def argv(name):
    return command_line(tmp_path / name, checkpoint__every=every, **steps)

  with open(tmp_path / 'log', 'w', encoding='utf-8') as log:
    whole = start(argv('whole'), n_devices, log)
    assert whole.wait(timeout=300) == 0
    part = start(argv('part'), n_devices, log)
    wait_for_step(tmp_path / 'part', 25, part)
    checkpoints = tmp_path / 'part' / 'checkpoints'
    half = _kill_in_a_save(part, checkpoints)
    kept = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    reached = max(rows(tmp_path / 'part'))
    assert kept < reached < 80
    # An interval, and the one whose save was under way.
    assert reached - kept <= 2 * every
    part = start(argv('part'), n_devices, log)
    # Beyond the rows that the killed run left.
    wait_for_step(tmp_path / 'part', reached + 20, part)
    assert not [p for p in checkpoints.glob('*tmp*') if p.name in half]
    part.send_signal(signal.SIGTERM)
    assert part.wait(timeout=120) == 0
    assert not (tmp_path / 'part' / 'summary.json').exists()
    stopped = max(rows(tmp_path / 'part'))
    assert start(argv('part'), n_devices, log).wait(timeout=300) == 0
  text = (tmp_path / 'log').read_text()
  assert f'resuming from the checkpoint at step {kept}\n' in text
  # With notice no step is lost.
  assert f'stopped by a signal; saved at step {stopped}.' in text
  assert f'resuming from the checkpoint at step {stopped}\n' in text
  assert_same_steps(rows(tmp_path / 'part'), rows(tmp_path / 'whole'))


def test_nonfinite_loss_stops_and_says_how_to_go_on(
  command_line, tmp_path, capsys
):
  argv = command_line(
    tmp_path,
    'size=tiny,opt=sgd',
    optimizer__learning_rate=1e30,
    clip_norm=0,
    mesh='fsdp=8',
    checkpoint__every=1,
    log__every=4,  # the step that stops the run is logged all the same
  )
  assert cli.main(argv) == 1
  error = capsys.readouterr().err
  found = rows(tmp_path)
  bad = max(found)
  assert f'step {bad} is not finite: loss' in error
  values = {found[bad][k] for k in ('loss', 'grad_norm', 'update_norm')}
  assert bad % 4 and values & {'nan', 'inf'}
  # The last good state is on disk, the bad one is not.
  kept = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert str(bad - 1) in kept and str(bad) not in kept
  assert f'The last good checkpoint is step {bad - 1}' in error
  # The way out that the message gives works.
  assert cli.main([*argv, '--config.skip_nonfinite=true']) == 0
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['skipped'] >= 1 and np.isfinite(summary['eval_loss'])


def test_compat_eval_prints_the_published_value(make_config, tmp_path):
  config = make_config(mesh='fsdp=8', compat_eval=True, steps=2)
  summary = loop.train(config, tmp_path)
  plain, compat = summary['eval_loss'], summary['eval_loss_compat']
  # 500 tokens are at least two batches of 8 x 32 and at most three.
  assert any(abs(compat - plain * n / (n + 1)) < 0.05 * plain for n in (2, 3))
  assert compat < plain
  assert rows(tmp_path, 'eval_loss_compat')


def test_another_models_checkpoint_is_refused(
  make_config, tmp_path, monkeypatch
):
  _stop_at(monkeypatch, 1)
  loop.train(make_config(mesh='fsdp=8'), tmp_path)
  with pytest.raises(ValueError, match='of another model or optimizer: '):
    loop.train(make_config(mesh='fsdp=8', model__ffn=48), tmp_path)
  with pytest.raises(ValueError, match='of another model or optimizer: '):
    loop.train(make_config('size=tiny,opt=adamw', mesh='fsdp=8'), tmp_path)


def test_the_best_checkpoint_is_kept(make_config, tmp_path, monkeypatch):
  losses = iter([float('nan'), 1.0, 2.0, 2.0, 2.0, 2.0])

  def evaluation(sums, compat):
    del sums, compat
    return {'eval_loss': next(losses), 'bits_per_byte': 1.0, 'eval_tokens': 1}

  monkeypatch.setattr(loop.evaluation, 'means', evaluation)
  config = make_config(
    mesh='fsdp=8', eval__every=1, checkpoint__every=1, checkpoint__keep=2
  )
  loop.train(config, tmp_path)
  kept = {p.name for p in (tmp_path / 'checkpoints').iterdir() if p.is_dir()}
  assert kept == {'2', '5', '6'}


def test_a_data_set_that_ends_is_one_error(make_config, tmp_path):
  config = make_config(mesh='fsdp=8', data__repeat=False, steps=10_000)
  with pytest.raises(ValueError, match='the data ended after'):
    loop.train(config, tmp_path)


def test_preemption_does_not_wait_for_an_evaluation(
  make_config, tmp_path, monkeypatch
):
  config = make_config(mesh='fsdp=8', eval__every=3)
  put = step.Program.put

  def put_and_stop(program, batch):
    put_and_stop.calls += 1
    if put_and_stop.calls == 4:  # three steps, then the first of evaluation
      os.kill(os.getpid(), signal.SIGTERM)
    return put(program, batch)

  put_and_stop.calls = 0
  monkeypatch.setattr(step.Program, 'put', put_and_stop)
  assert loop.train(config, tmp_path) == {'stopped': True, 'steps': 3}
  assert put_and_stop.calls == 4 and not rows(tmp_path, 'eval_loss')
  monkeypatch.undo()
  assert loop.train(config, tmp_path)['steps'] == 6


def test_resuming_in_the_middle_of_other_data_is_refused(
  make_config, tmp_path, monkeypatch
):
  _stop_at(monkeypatch, 1)
  loop.train(make_config(mesh='fsdp=8'), tmp_path)
  for change, message in (
    ({'data__sequence_length': 16}, 'sequence_length was 32, now it is 16'),
    ({'data__shuffle_rows': 8}, 'shuffle_rows was 4096, now it is 8'),
    ({'data__mode': 'c4_protocol'}, "mode was 'packed', now"),
  ):
    with pytest.raises(ValueError, match=message):
      loop.train(make_config(mesh='fsdp=8', **change), tmp_path)


@pytest.mark.slow
def test_a_batch_that_the_checkpoints_streams_cannot_share(
  make_config, tmp_path, monkeypatch
):
  _stop_at(monkeypatch, 1)
  loop.train(make_config(mesh='fsdp=8', batch_size=16), tmp_path)
  with pytest.raises(ValueError, match='a batch_size of 16 or a multiple of'):
    loop.train(make_config(mesh='fsdp=8', batch_size=8), tmp_path)
  with pytest.raises(ValueError, match='streams was 16, now it is 8'):
    loop.train(
      make_config(mesh='fsdp=8', batch_size=8, data__streams=8), tmp_path
    )
  # As the message says.
  _stop_at(monkeypatch, 2)
  loop.train(make_config(mesh='fsdp=8', batch_size=32), tmp_path)


@pytest.mark.parametrize('failing', ['restore', 'announce', 'close'])
def test_whatever_fails_all_that_was_opened_is_closed(
  failing, make_config, tmp_path, monkeypatch
):
  closed = []

  def record(owner, name):
    close = owner.close

    def closing(self):
      closed.append(name)
      close(self)
      if failing == 'close' and name == 'checkpoints':
        raise checkpoint.NotSaved('step 1 could not be written')

    monkeypatch.setattr(owner, 'close', closing)

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  record(checkpoint.Checkpoints, 'checkpoints')
  record(data.Batches, 'data')
  if failing == 'restore':
    monkeypatch.setattr(checkpoint.Checkpoints, 'restore', full)
  if failing == 'announce':
    monkeypatch.setattr(loop.console, 'announce', full)
  with pytest.raises(loop.CannotGoOn, match='What was saved is whole'):
    loop.train(make_config(mesh='fsdp=8', steps=1), tmp_path)
  assert closed == ['data', 'checkpoints'][failing == 'restore' :]


def test_a_workdir_that_cannot_be_is_refused(make_config, tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', '/proc/nowhere', 'gs://bucket/run'):
    with pytest.raises(ValueError, match='workdir'):
      loop.train(make_config(mesh='fsdp=8'), workdir)
