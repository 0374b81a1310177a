"""Metrics: the file, resuming it, the clock, chips, and where code is from."""

import json
import math
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from frugax.train import metrics


def _rows(workdir):
  lines = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _writer(workdir, **kwargs):
  return metrics.MetricWriter(workdir, tensorboard=False, **kwargs)


class FakeTime:
  """A clock that stands still until it is told to go on."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


def test_rows_are_json_with_step_first(tmp_path):
  with _writer(tmp_path / 'new' / 'run') as writer:
    writer.write(
      jnp.int32(3),
      {
        'loss': jnp.float32(1.5),
        'tokens': np.int64(64),
        'bf16': jnp.bfloat16(0.25),
        'skipped': 2,
        'not_measured': None,
      },
    )
  text = (tmp_path / 'new' / 'run' / 'metrics.jsonl').read_text()
  assert text == (
    '{"step": 3, "loss": 1.5, "tokens": 64, "bf16": 0.25, "skipped": 2}\n'
  )


def test_float32_losses_come_back_bit_for_bit(tmp_path):
  losses = np.random.default_rng(0).normal(size=50).astype(np.float32)
  with _writer(tmp_path) as writer:
    for i, loss in enumerate(losses):
      writer.write(i + 1, {'loss': jnp.asarray(loss)})
  read = np.array([row['loss'] for row in _rows(tmp_path)], np.float32)
  np.testing.assert_array_equal(read, losses)


def test_rows_are_on_disk_before_the_writer_is_closed(tmp_path):
  writer = _writer(tmp_path)
  writer.write(1, {'loss': 2.0})
  assert _rows(tmp_path) == [{'step': 1, 'loss': 2.0}]
  writer.close()
  writer.close()


def test_non_finite_values_are_strict_json(tmp_path):
  values = {'a': math.nan, 'b': jnp.inf, 'c': np.float32('-inf')}
  with _writer(tmp_path) as writer:
    writer.write(1, values)

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  text = (tmp_path / 'metrics.jsonl').read_text()
  row = json.loads(text, parse_constant=refuse)
  assert row == {'step': 1, 'a': 'nan', 'b': 'inf', 'c': '-inf'}


@pytest.mark.parametrize('value', ['high', np.zeros(3), [1.0]])
def test_what_is_not_a_number_is_refused(tmp_path, value):
  with (
    _writer(tmp_path) as writer,
    pytest.raises(ValueError, match="metric 'loss' is not one number"),
  ):
    writer.write(1, {'loss': value})
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_an_inactive_writer_leaves_no_trace(tmp_path):
  folder = tmp_path / 'run'
  with metrics.MetricWriter(folder, active=False, wandb='project') as writer:
    writer.write(1, {'loss': 1.0})
  assert not folder.exists()


def test_resuming_drops_the_rows_past_the_checkpoint(tmp_path):
  with _writer(tmp_path) as writer:
    for step in range(1, 8):
      writer.write(step, {'loss': step + 0.1})
      if step % 2 == 0:
        writer.write(step, {'eval_loss': step + 0.2})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 8, "lo')  # killed here
  with _writer(tmp_path, resume_step=4) as writer:
    writer.write(5, {'loss': -5.0})
  train = [row for row in _rows(tmp_path) if 'loss' in row]
  evals = [row['step'] for row in _rows(tmp_path) if 'eval_loss' in row]
  assert [row['step'] for row in train] == [1, 2, 3, 4, 5]
  assert train[-1]['loss'] == -5.0
  assert evals == [2, 4]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_resuming_at_the_last_step_keeps_a_line_without_newline(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}')
  with _writer(tmp_path, resume_step=2) as writer:
    writer.write(3, {'loss': 1.0})
  assert [row['loss'] for row in _rows(tmp_path)] == [3.0, 2.0, 1.0]


def test_resuming_without_a_file_starts_one(tmp_path):
  with _writer(tmp_path, resume_step=9) as writer:
    writer.write(10, {'loss': 1.0})
  assert _rows(tmp_path) == [{'step': 10, 'loss': 1.0}]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
  # Killed before its first checkpoint: the step-0 evaluation comes again.
  with _writer(tmp_path) as writer:
    writer.write(0, {'eval_loss': 5.0})
    writer.write(1, {'loss': 5.0})
  with _writer(tmp_path) as writer:
    writer.write(0, {'eval_loss': 5.0})
  assert _rows(tmp_path) == [{'step': 0, 'eval_loss': 5.0}]


@pytest.mark.parametrize('line', ['{"step": 2, "lo', '[1]', '{"loss": 1.0}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
  file = tmp_path / 'metrics.jsonl'
  text = f'{{"step": 1, "loss": 3.0}}\n{line}\n{{"step": 3, "loss": 1.0}}\n'
  file.write_text(text)
  with pytest.raises(ValueError, match=r'metrics\.jsonl, line 2 is not a row'):
    _writer(tmp_path, resume_step=3)
  assert file.read_text() == text


def _tensorboard(workdir):
  events = event_accumulator.EventAccumulator(str(workdir / 'tensorboard'))
  events.Reload()
  return {
    tag: [(e.step, e.value) for e in events.Scalars(tag)]
    for tag in events.Tags()['scalars']
  }


def test_tensorboard_reads_the_scalars(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(1, {'loss': jnp.float32(2.5), 'tokens': 64})
    writer.write(2, {'loss': 1.5, 'tokens': 128})
  assert _tensorboard(tmp_path) == {
    'loss': [(1, 2.5), (2, 1.5)],
    'tokens': [(1, 64.0), (2, 128.0)],
  }


def test_tensorboard_hides_the_steps_that_are_taken_again(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    for step in (1, 2, 3, 4):
      writer.write(step, {'loss': 1.0})
  with metrics.MetricWriter(tmp_path, resume_step=2) as writer:
    writer.write(3, {'loss': -3.0})
  assert _tensorboard(tmp_path)['loss'] == [(1, 1.0), (2, 1.0), (3, -3.0)]


class FakeWandb(types.ModuleType):
  """Records what the real package would send."""

  def __init__(self):
    super().__init__('wandb')
    self.inits, self.logs, self.finished = [], [], 0

  def init(self, **kwargs):
    self.inits.append(kwargs)
    self.id = kwargs['id'] or f'run{len(self.inits)}'
    return self

  def log(self, scalars, step):
    self.logs.append((step, scalars))

  def finish(self):
    self.finished += 1


def test_wandb_goes_on_with_the_run_that_is_resumed(tmp_path, monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  for resume_step in (0, 5, 0):
    with _writer(
      tmp_path, wandb='frugal', resume_step=resume_step, config={'steps': 9}
    ) as writer:
      writer.write(resume_step + 1, {'loss': jnp.float32(1.5)})
  assert [init['id'] for init in fake.inits] == [None, 'run1', None]
  assert fake.inits[0]['project'] == 'frugal'
  assert fake.inits[0]['config'] == {'steps': 9}
  assert fake.logs[:2] == [(1, {'loss': 1.5}), (6, {'loss': 1.5})]
  assert fake.finished == 3


def test_a_missing_wandb_is_one_clear_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match=r"'frugal' needs .*frugax\[wandb\]"):
    _writer(tmp_path, wandb='frugal')


def test_rates_leave_out_the_compiling_step_and_pauses():
  time = FakeTime()
  clock = metrics.Clock(now=time)
  time.sleep(30)  # compiles
  clock.step(1000)
  assert clock.rates() == {}
  for _ in range(4):
    time.sleep(0.5)
    clock.step(1000)
  with clock.paused():
    time.sleep(100)
  assert clock.rates() == {'tokens_per_second': 2000.0, 'step_seconds': 0.5}
  assert clock.seconds == 32.0


def test_each_window_starts_where_the_last_one_ended():
  time = FakeTime()
  clock = metrics.Clock(now=time)
  clock.step(10)
  for seconds in (1.0, 4.0):
    time.sleep(seconds)
    clock.step(10)
    time.sleep(1.0)
    rates = clock.rates()
    assert rates['step_seconds'] == seconds + 1.0
    assert rates['tokens_per_second'] == 10 / (seconds + 1.0)
  assert clock.rates() == {}


def test_a_window_may_begin_in_front_of_a_pause():
  time = FakeTime()
  clock = metrics.Clock(now=time)
  with clock.paused():  # evaluation before the first step
    time.sleep(7)
  clock.step(10)
  with clock.paused():
    time.sleep(7)
  time.sleep(2)
  clock.step(10)
  assert clock.rates()['step_seconds'] == 2.0
  assert clock.seconds == 2.0


def test_seconds_stand_still_in_a_pause_and_survive_a_restart():
  time = FakeTime()
  clock = metrics.Clock(now=time)
  time.sleep(5)
  with clock.paused():
    time.sleep(3)
    with clock.paused():  # a checkpoint inside an evaluation
      time.sleep(1)
    time.sleep(2)
    saved = clock.seconds
  assert saved == 5.0
  resumed = metrics.Clock(saved, now=time)
  time.sleep(4)
  assert resumed.seconds == 9.0


def test_the_clock_runs_again_after_an_exception_in_a_pause():
  time = FakeTime()
  clock = metrics.Clock(now=time)
  with pytest.raises(KeyError), clock.paused():
    raise KeyError
  time.sleep(2)
  assert clock.seconds == 2.0


@pytest.mark.parametrize(
  ('kind', 'dtype', 'expected'),
  [
    ('TPU v4', 'bfloat16', 275e12),
    ('TPU v5 lite', 'bfloat16', 197e12),
    ('TPU v5e', 'int8', 394e12),
    ('TPU v5p', 'bfloat16', 459e12),
    ('TPU v5', 'bfloat16', 459e12),
    ('TPU v6 lite', 'int8', 1836e12),
    ('TPU v6e', 'bfloat16', 918e12),
    ('TPU7x', 'bfloat16', 2307e12 / 2),
    ('TPU7x', 'int8', None),
    ('NVIDIA A100-SXM4-40GB', 'bfloat16', 312e12),
    ('NVIDIA A100-SXM4-40GB', 'float8_e4m3fn', None),
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989e12),
    ('NVIDIA H100 PCIe', 'bfloat16', 756e12),
    ('NVIDIA H200', 'float8_e4m3fn', 1979e12),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'bfloat16', None),
    ('NVIDIA L4', 'int8', 242e12),
    ('NVIDIA L40S', 'bfloat16', None),
    ('TPU v9', 'bfloat16', None),
    ('cpu', 'bfloat16', None),
  ],
)
def test_peaks(kind, dtype, expected):
  assert metrics.peak_flops(kind, dtype) == expected


def test_an_unknown_dtype_is_refused():
  with pytest.raises(ValueError, match="'int9': did you mean 'int8'"):
    metrics.peak_flops('TPU v4', 'int9')


def test_model_flops_utilization():
  device = types.SimpleNamespace(device_kind='TPU v5 lite')
  # 6 x 1e9 FLOPs a token: 197e12 / 6e9 tokens/s would be all of one chip.
  full = 197e12 / 6e9
  mfu = metrics.model_flops_utilization(full, 6e9, [device] * 4)
  assert mfu == pytest.approx(0.25)
  assert metrics.model_flops_utilization(full, 6e9, jax.devices()) is None


def test_device_memory_is_of_the_fullest_device(monkeypatch):
  assert metrics.device_memory() == {}  # CPU does not count
  stats = [
    {'bytes_in_use': 10, 'peak_bytes_in_use': 90, 'num_allocs': 1},
    {'bytes_in_use': 20, 'peak_bytes_in_use': 70, 'num_allocs': 1},
  ]
  devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
  monkeypatch.setattr(jax, 'local_devices', lambda: devices)
  assert metrics.device_memory() == {
    'device_bytes_in_use': 20,
    'device_peak_bytes': 90,
  }


def test_run_info_is_json():
  info = metrics.run_info()
  assert json.loads(json.dumps(info)) == info
  assert info['jax'] == jax.__version__
  assert info['hardware'] == {
    'platform': 'cpu',
    'device_kind': jax.devices()[0].device_kind,
    'devices': 8,
    'processes': 1,
  }


def _git(folder, *arguments):
  identity = ('user.name=a', 'user.email=a@b', 'commit.gpgsign=false')
  options = [word for setting in identity for word in ('-c', setting)]
  command = ('git', *options, *arguments)
  return subprocess.run(
    command, cwd=folder, check=True, capture_output=True, text=True
  ).stdout.strip()


def test_git_state(tmp_path, monkeypatch):
  file = tmp_path / 'package' / 'code.py'
  file.parent.mkdir()
  file.write_text('x = 1\n')
  # So that no repository around the temporary folder answers.
  monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
  assert metrics._git_state(file) == (None, None)
  _git(tmp_path, 'init')
  assert metrics._git_state(file) == (None, None)  # somebody else's repository
  _git(tmp_path, 'add', '.')
  assert metrics._git_state(file) == (None, None)  # no commit yet
  _git(tmp_path, 'commit', '-m', 'first')
  commit = _git(tmp_path, 'rev-parse', 'HEAD')
  assert metrics._git_state(file) == (commit, False)
  (tmp_path / 'untracked.txt').write_text('a note')
  assert metrics._git_state(file) == (commit, False)
  file.write_text('x = 2\n')
  assert metrics._git_state(file) == (commit, True)


def test_git_state_without_git(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert metrics._git_state(pathlib.Path(__file__)) == (None, None)
