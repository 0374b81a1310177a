"""Checkpoints: the one file that knows Orbax."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from frugax.train import processes


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
      directory: a local path or one that Orbax knows (gs://...).
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
      # Named here, so that a directory can be read before anything is saved.
      item_names=('state', 'data', 'meta'),
    )
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
    sums = {k: int(v) for k, v in jax.device_get(_sums(state)).items()}
    self.wait()
    self._writing = step
    with self._told():
      self._manager.save(
        step,
        args=args.Composite(
          state=args.StandardSave(state),
          data=args.JsonSave(data),
          meta=args.JsonSave({**meta, 'shapes': _shapes(state), 'sums': sums}),
        ),
        metrics=None if eval_loss is None else {'eval_loss': eval_loss},
        force=True,
      )

  def restore(
    self, state: Any, stream: dict[str, Any]
  ) -> tuple[int, Any, dict[str, Any], dict[str, Any]] | None:
    """Reads the newest checkpoint, onto the mesh that the abstract state names.

    One that cannot be read, or does not hold what was saved, is passed over for
    the one before it with a warning, and renamed to STEP.unreadable: nothing is
    deleted.

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
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    problems: dict[int, str] = {}
    for step in steps:
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
    """State, data and meta of a checkpoint, and why they cannot be read."""
    args = self._ocp.args

    def read(**items):
      return self._manager.restore(step, args=args.Composite(**items))

    def read_values():
      found = read(data=args.JsonRestore(), meta=args.JsonRestore())
      return dict(found['data']), dict(found['meta'])

    def read_state():
      arrays = read(state=args.StandardRestore(state))['state']
      _check_sums(meta['sums'], _sums(arrays))
      return arrays

    values, problem = _attempt(read_values)
    if problem:
      return None, problem
    data, meta = values
    self._check(step, meta['shapes'], _shapes(state))
    self._check_stream(step, meta['stream'], stream)
    arrays, problem = _attempt(read_state)
    return (arrays, data, meta), problem

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
        os.rename(path, f'{path}.unreadable')
        print(
          f'warning: the checkpoint at step {bad} cannot be read: {problem}.'
          f' The run goes on from step {step}; {path} was renamed to'
          f' {bad}.unreadable',
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
      with self._told():
        self._manager.close()

  @contextlib.contextmanager
  def _told(self):
    """Errors of writing as `NotSaved`."""
    try:
      yield
    except (OSError, ValueError) as e:  # TensorStore's are ValueErrors
      kept = [s for s in self._manager.all_steps() if s != self._writing]
      last = f'step {max(kept)} is the last one' if kept else 'there is none'
      raise NotSaved(
        f'the checkpoint at step {self._writing} could not be written to'
        f' {self.directory}: {_first_line(e)}. Of those before it {last}'
      ) from e


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
  """What `read` returns, and what went wrong: '' if it did on no process."""
  try:
    value, problem = read(), ''
  except jax.errors.JaxRuntimeError:  # devices, other processes: not the file
    raise
  # Over a damaged file Orbax raises Exception itself, among others.
  except Exception as e:
    value, problem = None, _first_line(e)
  found = processes.gather(problem.encode())
  return value, next((p.decode() for p in found if p), '')


def _first_line(error: Exception) -> str:
  line = str(error).strip().split('\n')[0]
  if len(line) > 240:  # what TensorStore did comes first, the cause last
    line = f'{line[:80]} ... {line[-150:]}'
  return f'{type(error).__name__}: {line}'


def _check_sums(saved: dict[str, int], read: dict[str, jax.Array]) -> None:
  read = jax.device_get(read)
  wrong = [k for k in saved if k in read and saved[k] != int(read[k])]
  if wrong:
    raise ValueError(
      f'{wrong[0]} does not hold what was saved ({len(wrong)} such leaves)'
    )


@jax.jit
def _sums(state) -> dict[str, jax.Array]:
  """The sum of each leaf's bits as unsigned numbers, modulo 2**32, by its path.

  The files have no check sums of their own: a bit that was flipped on disk
  reads as another number. Leaves in the host's memory are left out.
  """
  sums = {}
  for name, x in _named(state):
    if jax.typeof(x).memory_space == jax.memory.Space.Host:
      continue
    if jnp.issubdtype(x.dtype, jnp.floating):
      x = jax.lax.bitcast_convert_type(x, f'uint{jnp.finfo(x.dtype).bits}')
    sums[name] = jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)
  return sums


def _shapes(state) -> dict[str, str]:
  """'dtype(shape)' of every leaf by its path."""
  return {name: f'{x.dtype}{list(x.shape)}' for name, x in _named(state)}


def _named(state) -> Iterator[tuple[str, Any]]:
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), x
