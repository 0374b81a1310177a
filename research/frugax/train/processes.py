"""Several processes, one program: joining, agreeing, and losing one."""

import hashlib
import json
import os
import pathlib
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from frugax import config as fx_config
from frugax.train import metrics

# What a launcher sets for each process of several: the number of processes.
_COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')

# Seconds after which the others give up a process that gives no sign of life.
HEARTBEAT = 60

# Seconds that the processes wait for each other at their start: after a
# preemption some hosts boot minutes later than the others.
JOINING = 600

# What errors say, where another process may be gone: the codes of a call that
# was not answered, and the libraries that send arrays. All else is this
# process's own fault, which the same again would not mend.
_LOSS = re.compile(
  'UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED'
  '|(?i:connection (closed|reset|refused)|broken pipe|task died|heartbeat'
  '|gloo|nccl)'
)
# How errors begin that a process has by itself, whatever else they name.
_OWN = ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'UNIMPLEMENTED')


class CannotGoOn(RuntimeError):
  """A run that had to stop; the message says why, and how to go on."""

  status = 1  # that the process exits with


class LostProcess(CannotGoOn):
  """One of several is gone or never came; launchers start all of them again."""

  status = 134  # JAX's own, where it ends a process that lost the coordinator


def expected(environ: Mapping[str, str] = os.environ) -> int:
  """How many processes the environment says there are.

  Slurm's srun, Open MPI and TPU pods are recognised by what they set; by hand
  set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Examples:
    >>> expected({}), expected({'SLURM_STEP_NUM_TASKS': '4'})
    (1, 4)
    >>> expected({'TPU_WORKER_HOSTNAMES': 'host-0,host-1'})
    2
  """
  hosts = environ.get('TPU_WORKER_HOSTNAMES', '').count(',') + 1
  return max(hosts, *(int(environ.get(name) or 1) for name in _COUNTS))


def join() -> None:
  """Joins the other processes, if there are any; before JAX is used.

  Without it each process would train a run of its own in the same folder. If
  some do not come in `JOINING` seconds, this process ends as one that lost
  another: with the status of `LostProcess`.
  """
  if expected() == 1:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  by_hand = {}
  if 'JAX_PROCESS_ID' in os.environ:
    by_hand['num_processes'] = int(os.environ['JAX_NUM_PROCESSES'])
    by_hand['process_id'] = int(os.environ['JAX_PROCESS_ID'])
  # JAX would abort from C++, naming neither the coordinator nor how many.
  late = threading.Timer(JOINING, _give_up, [f'in {JOINING} seconds'])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      **by_hand,
      heartbeat_timeout_seconds=HEARTBEAT,
      initialization_timeout=JOINING + 60,
    )
  except RuntimeError as e:  # in TPU pods, where no such host is known yet
    _give_up(f'yet: {_first_line(e)}')
  finally:
    late.cancel()
  if jax.default_backend() == 'cpu':
    # A program that XLA loads for CPUs has lost the order of its collectives:
    # two processes then wait in different ones, for ever.
    jax.config.update('jax_enable_compilation_cache', False)


def _give_up(why: str) -> NoReturn:
  address = os.environ.get('JAX_COORDINATOR_ADDRESS') or "the first host's"
  print(
    f'error: the {expected()} processes of this run did not all come to their'
    f' coordinator, {address}, {why}. Some host is late, lost, or not to be'
    ' reached from here. Start all processes again',
    file=sys.stderr,
    flush=True,
  )
  os._exit(LostProcess.status)


def _first_line(error: BaseException) -> str:
  return str(error).strip().split('\n')[0]


def describe() -> str:
  """One line on this process: its number, its devices, its host."""
  local = jax.local_devices()
  kind, ids = local[0].device_kind, ', '.join(str(d.id) for d in local)
  return (
    f'process {jax.process_index()} of {jax.process_count()} on'
    f' {platform.node()}: {len(local)} of {jax.device_count()} devices,'
    f' {kind} {ids}'
  )


def gather(value: bytes) -> list[bytes]:
  """The value of every process, on every process; all must call it.

  Examples:
    >>> gather(b'alone')
    [b'alone']
  """
  if jax.process_count() == 1:
    return [value]
  sizes = multihost_utils.process_allgather(np.int32(len(value)))
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(value)] = np.frombuffer(value, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [row[:n].tobytes() for row, n in zip(rows, sizes, strict=True)]


def merge(own: Mapping[str, Any]) -> dict[str, Any]:
  """The JSON values of all processes by name; all must call it.

  Examples:
    >>> merge({'a': 1})
    {'a': 1}
  """
  merged: dict[str, Any] = {}
  for text in gather(json.dumps(own).encode()):
    merged |= json.loads(text)
  return merged


def agree(config) -> None:
  """Raises unless all processes run the same config and the same code.

  Raises:
    ValueError: on every process, naming what differs.
  """
  if jax.process_count() == 1:
    return
  info = metrics.run_info()
  facts = {
    'config': config.to_dict(),
    **{name: info[name] for name in ('commit', 'jax', 'flax', 'optax')},
    'code': code_hash(),
  }
  all_facts = [json.loads(x) for x in gather(json.dumps(facts).encode())]
  for i, other in enumerate(all_facts):
    if lines := fx_config.differences(all_facts[0], other):
      more = f' (and {len(lines) - 1} more)' if len(lines) > 1 else ''
      raise ValueError(
        f'processes 0 and {i} of {len(all_facts)} differ: {lines[0]}{more}.'
        ' Give all the same command, and install the same commit on every host'
      )


def may_be_lost(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether an error may be that another process is gone.

  Examples:
    >>> may_be_lost(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: memory'))
    False
  """
  text = str(error)
  if jax.process_count() == 1 or text.startswith(_OWN):
    return False
  return bool(_LOSS.search(text))


def lost(error: BaseException, resume: str) -> str:
  """What to tell of an error that the loss of another process may have made."""
  return (
    f'process {jax.process_index()} of {jax.process_count()} cannot go on, most'
    ' likely as another one was lost, whose own log tells why:'
    f' {_first_line(error)}\n'
    f'What was saved is whole. Start all processes again with\n  {resume}'
  )


def run(main: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
  """Calls `main` and ends this process with its status; after failures at once.

  JAX would wait for the other processes, who may not come to an end, up to
  minutes, and libraries tell of each thread that was cut off.
  """
  try:
    status = main(argv)
  except Exception:  # as Python does, but for the wait
    traceback.print_exc()
    status = 1
  if status:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
      time.sleep(2)  # with the coordinator gone JAX ends the others
    os._exit(status)
  sys.exit(status)


def code_hash() -> str:
  """Of the files of this package, hexadecimal."""
  digest = hashlib.sha256()
  package = pathlib.Path(__file__).resolve().parents[1]
  for file in sorted(package.rglob('*.py')):
    digest.update(file.read_bytes())
  return digest.hexdigest()[:16]
