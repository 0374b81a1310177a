"""Checkpoints: the one file that knows Orbax."""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frugax.train import processes

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of a file that is missing or something else: the checkpoint's own fault.
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class NotSaved(RuntimeError):
  """A checkpoint could not be written; earlier ones are as they were."""


class Checkpoints:
  """The checkpoints of a run: state, data position and clock, written async.

  The latest ones are kept and, besides, the one with the lowest evaluation
  loss. A checkpoint is written under a temporary name and renamed when it is
  complete, so one that a crash cut off is never picked.

  Attributes:
    directory: where they are.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 2):
    """Opens or creates a directory of checkpoints.

    Args:
      directory: a path of a file system; a bucket must be mounted.
      keep: how many of the latest to keep.

    Raises:
      ValueError: keep is not positive.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers

    if keep < 1:
      raise ValueError(f'checkpoint.keep must be 1 or more, got {keep}')
    directory = os.fspath(directory)
    if '://' not in directory:
      directory = os.path.abspath(directory)
    self.directory = directory
    self._ocp = ocp

    def loss(metrics):
      return metrics['eval_loss']

    policies = [
      checkpoint_managers.LatestN(keep),
      checkpoint_managers.BestN(
        # Orbax keeps the last ones of an ascending order: reverse it.
        get_metric_fn=loss,
        reverse=True,
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        best_fn=loss,
        best_mode='min',
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
      ),
      item_names=('state', 'data', 'meta'),
    )
    # The manager's own way to read ends in a barrier, in which a process that
    # sees damage would leave the others. By these each reads for itself.
    self._values = ocp.JsonCheckpointHandler()
    self._arrays = ocp.StandardCheckpointHandler()
    self._writing: int | None = None

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, None if there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step of the lowest evaluation loss, None if none was evaluated."""
    return self._manager.best_step()

  def save(
    self,
    step: int,
    state: Any,
    data: dict[str, Any],
    meta: dict[str, Any],
    eval_loss: float | None = None,
  ) -> None:
    """Starts to write a checkpoint; returns when the arrays may be reused.

    Args:
      step: completed steps; a step that is there already is left alone.
      state: pytree of arrays.
      data: where the batches are, JSON values, the same on every process.
      meta: JSON values (clock, token count, config).
      eval_loss: the state's evaluation loss, where it is known.

    Raises:
      NotSaved: this checkpoint or the one before it could not be written.
    """
    if step in self._manager.all_steps():
      return
    args = self._ocp.args
    meta = {**meta, 'shapes': _shapes(state), 'sums': _sums(state)}
    meta['sha256'] = _digest(data, meta)
    self.wait()
    self._writing = step
    with self._told():
      self._manager.save(
        step,
        args=args.Composite(
          state=args.StandardSave(state),
          data=args.JsonSave(data),
          meta=args.JsonSave(meta),
        ),
        metrics=None if eval_loss is None else {'eval_loss': eval_loss},
        force=True,
      )

  def restore(
    self, state: Any, stream: dict[str, Any]
  ) -> tuple[int, Any, dict[str, Any], dict[str, Any]] | None:
    """Reads the newest checkpoint, onto the mesh that the abstract state names.

    One that twice cannot be read, or does not hold what was saved, on any
    process, is passed over for the one before it with a warning, and renamed to
    STEP.unreadable: nothing is deleted.

    Args:
      state: pytree of ShapeDtypeStructs with shardings.
      stream: what the position in the data depends on; compared with
        meta['stream'] as it was saved, as far as that has it.

    Returns:
      Step, state, data and meta as they were saved; None if there are none.

    Raises:
      ValueError: the checkpoint holds other shapes or other leaves (another
        model or optimizer) than `state`, or is of another stream; or there are
        checkpoints, and none can be read.
      OSError, MemoryError: reading failed for a reason that is not the
        checkpoint's; nothing was renamed.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    problems: dict[int, str] = {}
    for step in steps:
      found, problem = self._read(step, state, stream)
      if problem:  # it may have been on the way, not on the disk
        found, problem = self._read(step, state, stream)
      if not problem:
        self._set_aside(problems, step)
        return step, *found
      problems[step] = problem
    if not steps:
      return None
    raise ValueError(
      f'no checkpoint in {self.directory} can be read: step {steps[0]}:'
      f' {problems[steps[0]]} ({len(steps)} in all). Nothing was changed; give'
      ' another --workdir to begin anew'
    )

  def _read(self, step, state, stream):
    """State, data and meta of a checkpoint, or why they cannot be read."""
    args = self._ocp.args
    folder = self._manager.directory / str(step)

    def read_values():
      found = []
      for name in ('data', 'meta'):
        _look_at(folder / name)
        item = self._values.restore(folder / name, args=args.JsonRestore())
        found.append(dict(item))
      data, meta = found
      if meta.pop('sha256', None) != _digest(data, meta):
        raise ValueError('data and meta do not hold what was saved')
      return data, meta

    def read_state():
      wanted = args.StandardRestore(state)
      _look_at(folder / 'state')
      return self._arrays.restore(folder / 'state', args=wanted)

    values, problem = _attempt(read_values)
    if problem:
      return None, problem
    data, meta = values
    self._check(step, meta['shapes'], _shapes(state))
    self._check_stream(step, meta['stream'], stream)
    arrays, problem = _attempt(read_state)
    # All have read theirs: only then can they sum together.
    problem = problem or _differences(meta['sums'], _sums(arrays))
    return (None if problem else (arrays, data, meta)), problem

  def _check(self, step, saved, wanted):
    """One clear error instead of Orbax's, before any array is read."""
    wrong = [
      f'{name} is {saved.get(name, "absent")}, not {wanted.get(name, "absent")}'
      for name in sorted({*saved, *wanted})
      if saved.get(name) != wanted.get(name)
    ]
    if wrong:
      raise ValueError(
        f'the checkpoint at step {step} of {self.directory} is of another'
        f' model or optimizer: {wrong[0]} ({len(wrong)} such leaves). Give'
        ' the config of its run, or another --workdir'
      )

  def _check_stream(self, step, saved, wanted):
    for name, value in wanted.items():
      if saved.get(name) != value:
        raise ValueError(
          f'the checkpoint at step {step} of {self.directory} is in the middle'
          f' of other data: {name} was {saved.get(name)!r}, now it is'
          f' {value!r}. Set it back, or give another --workdir'
        )

  def _set_aside(self, problems: dict[int, str], step: int) -> None:
    for bad, problem in problems.items():
      if jax.process_index() == 0:
        path = os.path.join(self.directory, str(bad))
        aside = _free(f'{path}.unreadable')
        os.rename(path, aside)
        print(
          f'warning: the checkpoint at step {bad} cannot be read: {problem}.'
          f' The run goes on from step {step}; {path} was renamed to'
          f' {os.path.basename(aside)}',
          file=sys.stderr,
        )
    if problems:
      processes.gather(b'')  # the others see it renamed
      self._manager.reload()

  def wait(self) -> None:
    """Returns when everything that was saved is complete on disk.

    Raises:
      NotSaved: it could not be written.
    """
    with self._told():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the threads; raises as `wait` does."""
    try:
      self.wait()
    finally:
      self._arrays.close()
      with self._told():
        self._manager.close()

  @contextlib.contextmanager
  def _told(self):
    """Errors of writing as `NotSaved`."""
    try:
      yield
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as e:
      # Of several processes the one whose disk is full waits for the others in
      # a barrier, whose error is then the one that comes out.
      told = next((x for x in _chain(e) if _errno(x) in _FULL), e)
      if isinstance(told, jax.errors.JaxRuntimeError):
        raise
      kept = [s for s in self._manager.all_steps() if s != self._writing]
      last = f'step {max(kept)} is the last one' if kept else 'there is none'
      raise NotSaved(
        f'the checkpoint at step {self._writing} could not be written to'
        f' {self.directory}: {_first_line(told)}. Of those before it {last}'
      ) from told


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
  """What `read` returns, and what went wrong: '' if it did on no process.

  Errors that are not the checkpoint's are raised, on the process that has them.
  """
  try:
    value, problem = read(), ''
  except (jax.errors.JaxRuntimeError, MemoryError):  # devices, other processes
    raise
  # Over a damaged file Orbax raises Exception itself, among others.
  except Exception as e:
    codes = [code for code in map(_errno, _chain(e)) if code is not None]
    code = next((c for c in codes if c not in _OF_THE_FILE), None)
    if code is not None:  # the disk's or the network's
      raise OSError(code, f'{os.strerror(code)}: {_first_line(e)}') from e
    value, problem = None, _first_line(e)
  found = processes.gather(problem.encode())
  return value, next((p.decode() for p in found if p), '')


def _look_at(folder: os.PathLike) -> None:
  """Raises the system's error where libraries say that nothing is there."""
  for entry in os.scandir(folder):
    os.stat(entry.path)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """An error and those that it came from."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def _errno(error: BaseException) -> int | None:
  """The system's number of an error, None if it is none of the system's.

  Examples:
    >>> _errno(ValueError("DATA_LOSS: ... [os_error_code='5']"))
    5
  """
  if isinstance(error, OSError):
    return error.errno
  if isinstance(error, ValueError):  # TensorStore's
    found = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return int(found[1]) if found else None
  return None


def _free(path: str) -> str:
  """The path, or the first of path-2, path-3, ... that is not there."""
  name, n = path, 1
  while os.path.lexists(name):
    n += 1
    name = f'{path}-{n}'
  return name


def _first_line(error: Exception) -> str:
  line = str(error).strip().split('\n')[0]
  if len(line) > 240:  # what TensorStore did comes first, the cause last
    line = f'{line[:80]} ... {line[-150:]}'
  return f'{type(error).__name__}: {line}'


def _digest(data: dict[str, Any], meta: dict[str, Any]) -> str:
  """Of JSON values, the same before they are written and after."""
  values = json.loads(json.dumps([data, meta]))
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _differences(saved: dict[str, int], read: dict[str, int]) -> str:
  wrong = [k for k in sorted(read) if saved.get(k) != read[k]]
  if not wrong:
    return ''
  return f'{wrong[0]} does not hold what was saved ({len(wrong)} such leaves)'


def _sums(state) -> dict[str, int]:
  """The sum of each leaf's bits as unsigned numbers, modulo 2**32, by its path.

  The files have no check sums of their own: a bit that was flipped on disk
  reads as another number. All processes must call it.
  """
  leaves = dict(_named(state))
  in_host = {
    name: _sum_in_host(leaves.pop(name))
    for name, x in list(leaves.items())
    if jax.typeof(x).memory_space == jax.memory.Space.Host
  }
  sums = {k: int(v) for k, v in jax.device_get(_device_sums(leaves)).items()}
  if in_host:  # the same leaves on every process, of each its part
    for part in processes.gather(json.dumps(in_host).encode()):
      for name, value in json.loads(part).items():
        sums[name] = (sums.get(name, 0) + value) % 2**32
  return sums


@jax.jit
def _device_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  sums = {}
  for name, x in leaves.items():
    if jnp.issubdtype(x.dtype, jnp.floating):
      x = jax.lax.bitcast_convert_type(x, f'uint{jnp.finfo(x.dtype).bits}')
    sums[name] = jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)
  return sums


def _sum_in_host(x: jax.Array) -> int:
  """Of what this process has of a leaf, each part once, where it is."""
  total = 0
  for shard in x.addressable_shards:
    if shard.replica_id == 0:
      part = np.asarray(shard.data)
      if jnp.issubdtype(part.dtype, jnp.floating):
        part = part.view(f'uint{8 * part.dtype.itemsize}')
      elif part.dtype.kind == 'V':  # int4, which NumPy does not know
        part = part.astype(np.int8)
      total += int(part.sum(dtype=np.uint32))
  return total % 2**32


def _shapes(state) -> dict[str, str]:
  """'dtype(shape)' of every leaf by its path."""
  return {name: f'{x.dtype}{list(x.shape)}' for name, x in _named(state)}


def _named(state) -> Iterator[tuple[str, Any]]:
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), x
