"""Runs of several processes: real ones, on loopback."""

import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
import slow_network
from running import free_port, rows, start_together, texts, wait_for_step

from frugax.train import loop, processes

# Seconds, as launch/README.md says.
_ENDED = 90
# The loss of a run is a sum whose order depends on the mesh, and no more.
_ADAMW = 'size=tiny,opt=adamw'


def _together(
  command_line, folder, n, arguments=_ADAMW, around=None, **overrides
):
  """A whole run of four devices in n processes: what each told."""
  logs = folder.with_name(f'{folder.name} log')
  argv = command_line(folder, arguments, **overrides)
  started = start_together([argv] * n, 4 // n, logs, **(around or {}))
  codes = [p.wait(timeout=300) for p in started]
  assert codes == [0] * n, texts(logs)
  return texts(logs)


@pytest.fixture
def four_hosts():
  """20 ms from each other."""
  with tempfile.TemporaryDirectory() as folder:  # of a short name, for a socket
    made = slow_network.Network(pathlib.Path(folder), hosts=4, delay=0.02)
    yield made
    made.close()


@pytest.fixture
def network(four_hosts):
  if why := slow_network.missing():
    pytest.skip(f'no network of our own: {why}')
  return four_hosts


def _assert_close(got, want):
  assert list(got) == list(want)
  for n in want:
    assert got[n]['tokens'] == want[n]['tokens']
    for key in ('loss', 'grad_norm', 'param_norm'):
      np.testing.assert_allclose(got[n][key], want[n][key], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize(
  'mesh', ['data=4', 'data=2,fsdp=2', 'fsdp=4', 'tensor=4']
)
def test_processes_equal_one(mesh, n, make_config, command_line, tmp_path):
  one = loop.train(
    make_config(_ADAMW, mesh=mesh), tmp_path / 'one', devices=jax.devices()[:4]
  )
  told = _together(command_line, tmp_path / 'some', n, mesh=mesh)
  some = json.loads((tmp_path / 'some' / 'summary.json').read_text())
  assert some['hardware']['processes'] == n
  _assert_close(rows(tmp_path / 'some'), rows(tmp_path / 'one'))
  np.testing.assert_allclose(some['eval_loss'], one['eval_loss'], rtol=1e-5)
  assert some['eval_tokens'] == one['eval_tokens'] == 500
  # Each says who it is, and one tells the rest.
  for i, text in enumerate(told):
    assert f'process {i} of {n} on ' in text
    assert f': {4 // n} of 4 devices, cpu' in text
  assert 'validation loss' in told[0] and 'code       ' in told[0]
  for text in told[1:]:  # (Gloo tells of its connections)
    text = text.replace(platform.node(), '')
    assert not [w for w in ('model', 'loss', 'step', 'code') if w in text]
  # Each wrote the arrays it has, none of them a copy of another's.
  (step,) = (tmp_path / 'some' / 'checkpoints').iterdir()
  own = {p.name for p in (step / 'state').glob('ocdbt.process_*')}
  if mesh == 'fsdp=4':
    assert own == {f'ocdbt.process_{i}' for i in range(n)}


@pytest.mark.slow
def test_processes_on_cpus_load_no_program(command_line, tmp_path, monkeypatch):
  """Loaded ones wait for ever in collectives whose order was lost."""
  cache = tmp_path / 'cache'
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  for i in range(2):
    _together(command_line, tmp_path / f'run{i}', 2, mesh='fsdp=4', steps=3)
  assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.slow
def test_a_slow_network_changes_nothing(
  network, make_config, command_line, tmp_path
):
  same = {'mesh': 'fsdp=4', 'steps': 3}
  loop.train(
    make_config(_ADAMW, **same), tmp_path / 'one', devices=jax.devices()[:4]
  )
  around = {'host': slow_network.address(0), 'within': network.command}
  _together(command_line, tmp_path / 'far', 4, around=around, **same)
  _assert_close(rows(tmp_path / 'far'), rows(tmp_path / 'one'))
  assert network.packets > 1000  # that is the way they took


def test_the_slow_network_outlives_a_host(four_hosts):
  four_hosts.join(0, os.open('/', os.O_RDONLY))  # there is no reading it
  packet = bytes([4 << 4, *[0] * 18, 2])  # IPv4, to host 1
  pairs = [socket.socketpair(type=socket.SOCK_DGRAM) for _ in range(3)]
  for i, (_, tun) in enumerate(pairs, 1):
    four_hosts.join(i, tun.detach())
  hosts = [host for host, _ in pairs]
  hosts[2].send(packet)
  hosts[0].settimeout(20)
  assert hosts[0].recv(100) == packet
  hosts[0].close()
  hosts[2].send(packet)
  packet = packet[:-1] + bytes([3])
  hosts[2].send(packet)
  hosts[1].settimeout(20)
  assert hosts[1].recv(100) == packet
  for host in hosts:
    host.close()


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(4, 2), (2, 4), (4, 1)])
def test_saved_by_some_goes_on_with_others(
  before, after, make_config, command_line, tmp_path
):
  same = {'mesh': 'fsdp=4', 'schedule__name': 'constant', 'data__seed': 3}
  loop.train(
    make_config(_ADAMW, **same), tmp_path / 'whole', devices=jax.devices()[:4]
  )
  _together(command_line, tmp_path / 'run', before, steps=3, **same)
  (tmp_path / 'run log').rename(tmp_path / 'first log')
  told = _together(command_line, tmp_path / 'run', after, **same)
  assert 'resuming from the checkpoint at step 3' in told[0]
  _assert_close(rows(tmp_path / 'run'), rows(tmp_path / 'whole'))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('victim', 'after'), [(1, 2), (0, 4)], ids=['worker', 'coordinator']
)
def test_a_lost_process_ends_the_others(
  victim, after, make_config, command_line, tmp_path
):
  """Within the time that README states, and the run goes on from its save.

  With half of the processes, say, and as if nothing had happened.
  """
  run = tmp_path / 'run'
  same = {
    'mesh': 'fsdp=4',
    'checkpoint__every': 5,
    'schedule__name': 'constant',
  }

  def argv(steps):
    return command_line(run, _ADAMW, steps=steps, **same)

  started = start_together([argv(100_000)] * 4, 1, tmp_path / 'log')
  wait_for_step(run, 12, started[0])
  os.kill(started[victim].pid, signal.SIGKILL)
  begin = time.monotonic()
  codes = [p.wait(timeout=2 * _ENDED) for p in started]
  assert time.monotonic() - begin < _ENDED
  assert codes.pop(victim) == -signal.SIGKILL
  assert {abs(code) for code in codes} <= {134, signal.SIGABRT}, codes
  for i, text in enumerate(texts(tmp_path / 'log')):
    # JAX ends a process that has lost its coordinator, and says so itself.
    if i != victim:
      assert (
        'most likely as another one was lost' in text
        or 'another task died' in text
      ), text
  reached = max(rows(run))
  steps = reached + 5
  again = start_together([argv(steps)] * after, 4 // after, tmp_path / 'again')
  codes = [p.wait(timeout=300) for p in again]
  assert codes == [0] * after, texts(tmp_path / 'again')
  told = texts(tmp_path / 'again')[0]
  assert f'process 0 of {after} on ' in told
  kept = int(told.split('resuming from the checkpoint at step ')[1].split()[0])
  assert reached - kept <= 2 * 5  # the save that was under way may be lost
  loop.train(
    make_config(_ADAMW, steps=steps, **same),
    tmp_path / 'one',
    devices=jax.devices()[:4],
  )
  _assert_close(rows(run), rows(tmp_path / 'one'))


def test_the_time_is_that_of_the_operations_page():
  text = (
    pathlib.Path(__file__).parents[2].joinpath('launch/README.md').read_text()
  )
  assert f'The others end within {_ENDED} seconds' in text
  assert f'{processes.HEARTBEAT} of them the time' in text


_JOIN = """
import sys
from frugax.train import processes
processes.JOINING = 2
processes.join()
"""


@pytest.mark.parametrize('who', [0, 1])
def test_a_process_that_never_comes(who):
  """The status has launchers start all again: a host may boot late."""
  argv = [sys.executable, '-c', _JOIN]
  address = f'localhost:{free_port()}'
  join = {
    'JAX_COORDINATOR_ADDRESS': address,
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': str(who),
  }
  done = subprocess.run(
    argv, env=os.environ | join, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == loop.LostProcess.status == 134
  assert 'error: the 2 processes of this run did not all come' in done.stderr
  assert f'{address}, in 2 seconds' in done.stderr


def test_a_host_that_is_not_known_yet(monkeypatch, capsys):
  """As JAX tells of it in a TPU pod."""
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b,c')

  def initialize(**_):
    raise RuntimeError('Failed to recognize coordinator address a:8482')

  ended = []
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(os, '_exit', ended.append)
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  processes.join()
  assert ended == [134]
  error = capsys.readouterr().err
  assert 'the 3 processes' in error and 'address a:8482' in error


@pytest.mark.parametrize(
  ('text', 'lost'),
  [
    ('UNAVAILABLE: failed to connect to all addresses', True),
    ('ABORTED: Barrier failed because a task died', True),
    ('DEADLINE_EXCEEDED: Barrier timed out', True),
    ('CANCELLED: CANCELLED', True),
    (
      'INTERNAL: Gloo all-reduce failed: [/gloo/transport/tcp/pair.cc:547]'
      ' Connection closed by peer [127.0.0.1]:4232',
      True,
    ),
    ('FAILED_PRECONDITION: Read error: Connection reset by peer', True),
    ('INTERNAL: NCCL operation ncclAllReduce failed: remote error', True),
    ('INTERNAL: Mosaic failed to compile TPU kernel', False),
    ('INTERNAL: ptxas exited with status 255', False),
    ('NOT_FOUND: No algorithm worked!', False),
    ('FAILED_PRECONDITION: Buffer was donated', False),
    ('UNIMPLEMENTED: the NCCL of this build has no fp8', False),
    ('RESOURCE_EXHAUSTED: out of memory in nccl-all-gather.3', False),
  ],
)
def test_which_errors_are_a_loss(text, lost, monkeypatch):
  error = jax.errors.JaxRuntimeError(text)
  assert not processes.may_be_lost(error)  # of a process that is alone
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert processes.may_be_lost(error) == lost


@pytest.mark.parametrize(
  ('change', 'message'),
  [({'seed': 7}, 'processes 0 and 1 of 2 differ: config.seed: 0 -> 7')],
)
def test_processes_that_differ_stop(change, message, command_line, tmp_path):
  argvs = [
    command_line(tmp_path / 'run', _ADAMW, mesh='fsdp=4', **more)
    for more in ({}, change)
  ]
  started = start_together(argvs, 2, tmp_path / 'log')
  first, second = (p.wait(timeout=100) for p in started)
  told = texts(tmp_path / 'log')
  assert first == 2
  # Where the second is slow, JAX ends it as the first, its coordinator, goes.
  assert second == 2 or abs(second) in (134, signal.SIGABRT)
  for text in told if second == 2 else told[:1]:
    assert f'error: {message}' in text
    assert 'Give all the same command' in text
  assert not (tmp_path / 'run').exists()


def test_one_that_fails_by_itself_ends_the_others(
  command_line, data_dir, tmp_path
):
  """Here for a data set that only one host has."""
  argv = command_line(
    tmp_path / 'run', _ADAMW, mesh='fsdp=4', data__data_dir='.'
  )

  def within(i, argv):
    return ['env', f'--chdir={tmp_path if i else data_dir}', *argv]

  one, failing = start_together([argv] * 2, 2, tmp_path / 'log', within=within)
  assert failing.wait(timeout=100) == 2
  begin = time.monotonic()
  assert abs(one.wait(timeout=2 * _ENDED)) in (134, signal.SIGABRT)
  assert time.monotonic() - begin < _ENDED
  assert "error: data set 'words' is neither" in texts(tmp_path / 'log')[1]


def test_code_that_differs_is_named(monkeypatch, make_config):
  config = make_config(_ADAMW)
  gathered = []

  def gather(value):
    gathered.append(value)
    return [value, value.replace(b'"code": "', b'"code": "0')]

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, 'gather', gather)
  with pytest.raises(ValueError, match='processes 0 and 1 of 2 differ: code'):
    processes.agree(config)
  assert len(gathered) == 1
