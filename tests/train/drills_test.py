"""Faults that happen to runs: each ends or goes on in a known way.

kill -9, SIGTERM and a loss that is not finite are in loop_test.py, processes
that are lost in hosts_test.py. Nothing already saved is lost in any of them.
"""

import os
import pathlib
import shutil
import subprocess

import jax
import pytest
from running import assert_same_steps, rows, start, start_together, texts

from frugax.train import loop


def _saved(workdir):
  return {p.name: p for p in (workdir / 'checkpoints').iterdir()}


def _largest(folder):
  files = (p for p in folder.rglob('*') if p.is_file())
  return max(files, key=lambda p: p.stat().st_size)


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def _cut(path):
  os.truncate(path, path.stat().st_size // 2)


def _of_state(damage):
  return lambda step: damage(_largest(step / 'state'))


@pytest.mark.parametrize(
  'damage',
  [
    _of_state(_flip),  # which no reader notices on its own
    _of_state(_cut),
    lambda step: (step / 'meta' / 'metadata').write_text('{"stream'),
    lambda step: shutil.rmtree(step / 'data'),
  ],
  ids=['flipped bit', 'truncated', 'half a JSON file', 'missing folder'],
)
def test_a_damaged_checkpoint_is_passed_over(
  damage, make_config, tmp_path, capsys
):
  devices = jax.devices()[:1]
  same = {'mesh': 'data=1', 'checkpoint__every': 2}
  config = make_config(checkpoint__keep=3, **same)
  loop.train(config, tmp_path, devices=devices)
  want = rows(tmp_path)
  (tmp_path / 'metrics.jsonl').unlink()
  damage(_saved(tmp_path)['6'])
  summary = loop.train(config, tmp_path, devices=devices)
  told = capsys.readouterr()
  assert 'warning: the checkpoint at step 6 cannot be read' in told.err
  assert 'resuming from the checkpoint at step 4' in told.out
  assert summary['steps'] == 6
  assert_same_steps(rows(tmp_path), {n: want[n] for n in (5, 6)})
  assert {'2', '4', '6', '6.unreadable'} <= set(_saved(tmp_path))


@pytest.mark.slow
def test_damage_that_one_process_sees_is_passed_over_by_all(
  command_line, tmp_path
):
  run = tmp_path / 'run'
  argv = command_line(
    run, 'size=tiny,opt=adamw', mesh='fsdp=2', checkpoint__every=2,
    checkpoint__keep=3, opt_state='pinned_host',  # sums of both memories
  )  # fmt: skip

  def together(name):
    started = start_together([argv] * 2, 1, tmp_path / name)
    codes = [p.wait(timeout=200) for p in started]
    assert codes == [0, 0], texts(tmp_path / name)
    return texts(tmp_path / name)

  together('first')
  want = rows(run)
  (run / 'metrics.jsonl').unlink()
  _cut(_largest(_saved(run)['6'] / 'state' / 'ocdbt.process_1'))
  told = together('second')
  assert 'warning: the checkpoint at step 6 cannot be read' in told[0]
  assert 'resuming from the checkpoint at step 4' in told[0]
  assert_same_steps(rows(run), {n: want[n] for n in (5, 6)})
  assert {'2', '4', '6', '6.unreadable'} <= set(_saved(run))


def test_no_readable_checkpoint_is_an_error_and_changes_nothing(
  make_config, tmp_path
):
  devices = jax.devices()[:1]
  config = make_config(mesh='data=1', checkpoint__every=3)
  loop.train(config, tmp_path, devices=devices)
  for step in _saved(tmp_path).values():
    _cut(_largest(step / 'state'))
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(ValueError, match=r'no checkpoint .* step 6: .* \(2 in'):
    loop.train(config, tmp_path, devices=devices)
  assert sorted(tmp_path.rglob('*')) == before


@pytest.fixture
def small_disk(tmp_path):
  """A folder with room for 8 MB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(folder)]
  if not shutil.which('mount') or subprocess.run(mount).returncode:
    pytest.skip('only root can mount a small disk')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_loses_nothing(
  small_disk, command_line, tmp_path
):
  run = small_disk / 'run'
  argv = command_line(
    run, 'size=tiny,opt=adamw', mesh='data=1', steps=60, checkpoint__every=2,
    model__dim=128, checkpoint__keep=50,
  )  # fmt: skip
  with open(tmp_path / 'log', 'w', encoding='utf-8') as log:
    assert start(argv, 1, log).wait(timeout=300) == 1
    # TensorStore's threads may tell of what they could not write before.
    told = (tmp_path / 'log').read_text().split('\nerror: ')[1]
    assert 'No space left on device' in told and f'Make room for {run}' in told
    assert 'Traceback' not in told and len(told.splitlines()) == 2
    kept = max(int(n) for n in _saved(run) if n.isdigit())
    assert kept >= 2
    # Room is made; the command that the message gives goes on.
    subprocess.run(
      ['mount', '-o', 'remount,size=512m', str(small_disk)], check=True
    )
    assert start(argv, 1, log).wait(timeout=300) == 0
  text = (tmp_path / 'log').read_text()
  assert f'resuming from the checkpoint at step {kept}' in text
  assert list(rows(run)) == list(range(1, 61))


def test_a_truncated_data_shard_is_named(make_config, data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  (shard,) = pathlib.Path(copy).rglob('*train.array_record*')
  _cut(shard)
  config = make_config(mesh='data=1', data__data_dir=copy)
  with pytest.raises(ValueError, match=f'{shard.name}.* is damaged'):
    loop.train(config, tmp_path / 'run', devices=jax.devices()[:1])
  assert not (tmp_path / 'run').exists()
