"""Checkpoints: what was saved comes back, or is known not to be it."""

import errno
import json
import os
import re

import jax
import numpy as np
import pytest

from frugax.train import checkpoint, processes

_STREAM = {'seed': 1}


def _state(kind='device', step=0):
  [device] = jax.devices()[:1]
  sharding = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
  draw = np.random.default_rng(step)
  return {
    name: jax.device_put(draw.normal(size=2**14).astype(dtype), sharding)
    for name, dtype in (('w', 'float32'), ('m', jax.numpy.bfloat16))
  } | {'n': jax.device_put(np.array([-step, 7], np.int8), sharding)}


@pytest.fixture
def saved(tmp_path):
  """(kind of memory) -> Checkpoints that hold steps 2, 4 and 6, opened anew."""
  opened = []

  def open_one():
    opened.append(checkpoint.Checkpoints(tmp_path, keep=9))
    return opened[-1]

  def make(kind='device', steps=(2, 4, 6)):
    first = open_one()
    for step in steps:
      meta = {'stream': _STREAM, 'tokens': 1000 * step, 'seconds': 0.1 * step}
      data = {'0': {'position': 12345 + step}}
      first.save(step, _state(kind, step), data, meta)
    first.wait()
    return open_one()

  yield make
  for one in opened:
    one.close()


def _restore(checkpoints, kind='device'):
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _state(kind),
  )
  return checkpoints.restore(like, _STREAM)


def _names(folder):
  return sorted(os.listdir(folder))


def _largest(folder):
  files = (p for p in folder.rglob('*') if p.is_file())
  return max(files, key=lambda p: p.stat().st_size)


def _flip_numbers(path):
  """Another digit, of the same size, in each number of some digits."""
  text = path.read_text()
  changed = re.sub(r'\d(?=\d\d)', lambda m: str((int(m[0]) + 1) % 9), text)
  assert changed != text
  json.loads(changed)
  path.write_text(changed)


@pytest.mark.parametrize('kind', ['device', 'pinned_host'])
def test_comes_back_as_it_was(kind, saved, tmp_path):
  step, state, data, meta = _restore(saved(kind), kind)
  assert step == 6 and data == {'0': {'position': 12351}}
  assert meta['tokens'] == 6000 and meta['stream'] == _STREAM
  for name, x in _state(kind, 6).items():
    np.testing.assert_array_equal(state[name], x)
    assert state[name].sharding.memory_kind == kind
  # Names may not depend on where it was: it may come back to other memory.
  assert meta['sums'] == checkpoint._sums(_state('device', 6))
  assert _names(tmp_path) == ['2', '4', '6']


@pytest.mark.parametrize('what', ['data', 'meta'])
def test_values_that_changed_on_disk_are_noticed(what, saved, tmp_path, capsys):
  """They are JSON still: of other data, or of another model."""
  checkpoints = saved()
  _flip_numbers(tmp_path / '6' / what / 'metadata')
  step, _, data, _ = _restore(checkpoints)
  assert step == 4 and data == {'0': {'position': 12349}}
  assert 'step 6 cannot be read: ValueError: data and' in capsys.readouterr()[1]


@pytest.mark.parametrize('kind', ['device', 'pinned_host'])
def test_a_flipped_bit_is_noticed_in_any_memory(kind, saved, tmp_path, capsys):
  checkpoints = saved(kind)
  file = _largest(tmp_path / '6' / 'state')
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x10
  file.write_bytes(content)
  assert _restore(checkpoints, kind)[0] == 4
  assert 'does not hold what was saved' in capsys.readouterr().err


def _loop(path):
  """Reading it fails, as over a network: it is there, with an error."""
  path.rename(path.with_suffix('.kept'))
  path.symlink_to(path.name)


@pytest.mark.parametrize('what', ['meta', 'state'])
def test_an_error_of_the_disk_is_not_taken_for_damage(what, saved, tmp_path):
  checkpoints = saved()
  file = _largest(tmp_path / '6' / what)
  _loop(file)
  with pytest.raises(OSError, match='symbolic links') as caught:
    _restore(checkpoints)
  assert caught.value.errno == errno.ELOOP
  assert _names(tmp_path) == ['2', '4', '6']
  file.with_suffix('.kept').rename(file)
  assert _restore(checkpoints)[0] == 6


def test_too_little_memory_is_not_taken_for_damage(
  saved, tmp_path, monkeypatch
):
  checkpoints = saved()

  def restore(*args, **kwargs):
    raise MemoryError

  monkeypatch.setattr(checkpoints._arrays, 'restore', restore)
  with pytest.raises(MemoryError):
    _restore(checkpoints)
  assert _names(tmp_path) == ['2', '4', '6']


@pytest.mark.parametrize('reader', ['_values', '_arrays'])
def test_a_read_is_tried_twice(reader, saved, tmp_path, monkeypatch, capsys):
  checkpoints = saved()
  own = getattr(checkpoints, reader)
  whole, calls = own.restore, []

  def restore(*args, **kwargs):
    calls.append(args)
    if len(calls) == 1:
      raise ValueError('DATA_LOSS: cut off on the way')
    return whole(*args, **kwargs)

  monkeypatch.setattr(own, 'restore', restore)
  assert _restore(checkpoints)[0] == 6
  assert len(calls) > 1 and capsys.readouterr().err == ''
  assert _names(tmp_path) == ['2', '4', '6']


def test_a_step_may_be_damaged_again(saved, tmp_path, capsys):
  for n in range(3):
    checkpoints = saved(steps=(4, 6))
    _flip_numbers(tmp_path / '6' / 'meta' / 'metadata')
    assert _restore(checkpoints)[0] == 4
    name = f'6.unreadable-{n + 1}' if n else '6.unreadable'
    assert f'6 was renamed to {name}\n' in capsys.readouterr().err
    assert name in _names(tmp_path)
  assert len(_names(tmp_path)) == 4


def test_no_process_sums_before_all_have_read(
  saved, tmp_path, monkeypatch, capsys
):
  """Sums are taken together: one that could not read would be missing."""
  checkpoints = saved()
  bad, summed = (str(tmp_path / '6'), [])
  restore, sums = checkpoints._arrays.restore, checkpoint._sums
  reading = []

  def read(folder, **kwargs):
    reading[:] = [str(folder)]
    return restore(folder, **kwargs)

  def gather(value):
    other = reading and reading[0].startswith(bad)
    return [value, b'damaged there' if other else b'']

  def sum_all(state):
    summed.append(reading[0])
    return sums(state)

  monkeypatch.setattr(checkpoints._arrays, 'restore', read)
  monkeypatch.setattr(checkpoint, '_sums', sum_all)
  monkeypatch.setattr(processes, 'gather', gather)
  reading.clear()
  values = checkpoints._values.restore

  def read_values(folder, **kwargs):
    reading.clear()
    return values(folder, **kwargs)

  monkeypatch.setattr(checkpoints._values, 'restore', read_values)
  assert _restore(checkpoints)[0] == 4
  assert 'damaged there' in capsys.readouterr().err
  assert summed == [str(tmp_path / '4' / 'state')]


def _barrier():
  return jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: Barrier timed out')


@pytest.mark.parametrize(
  'full',
  [
    OSError(errno.ENOSPC, 'No space left on device'),
    OSError(errno.EDQUOT, 'Disk quota exceeded'),
    ValueError("RESOURCE: No space left on device [os_error_code='28']"),
  ],
  ids=['disk', 'quota', 'TensorStore'],
)
def test_a_full_disk_is_told_of_behind_a_barrier(full, saved, monkeypatch):
  """Of several processes one is full, and waits for the others in vain."""
  checkpoints = saved()

  def save(*args, **kwargs):
    try:
      raise full
    finally:
      raise _barrier()

  monkeypatch.setattr(checkpoints._manager, 'save', save)
  with pytest.raises(checkpoint.NotSaved, match=r'8 could .*(space|quota)'):
    checkpoints.save(8, _state(), {}, {})


def test_a_lost_process_is_no_full_disk(saved, monkeypatch):
  checkpoints = saved()

  def save(*args, **kwargs):
    raise _barrier()

  monkeypatch.setattr(checkpoints._manager, 'save', save)
  with pytest.raises(jax.errors.JaxRuntimeError, match='DEADLINE'):
    checkpoints.save(8, _state(), {}, {})
