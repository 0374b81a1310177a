"""Checkpoints: the one file that knows Orbax."""

import os
from typing import Any

import jax


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
    data: Any,
    meta: dict[str, Any],
    eval_loss: float | None = None,
  ) -> None:
    """Starts to write a checkpoint; returns when the arrays may be reused.

    Args:
      step: completed steps; a step that is there already is left alone.
      state: pytree of arrays.
      data: Orbax arguments that save the data iterator (`data.save_args`).
      meta: JSON values (clock, token count, config).
      eval_loss: the state's evaluation loss, where it is known.
    """
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=self._ocp.args.Composite(
        state=self._ocp.args.StandardSave(state),
        data=data,
        meta=self._ocp.args.JsonSave({**meta, 'shapes': _shapes(state)}),
      ),
      metrics=None if eval_loss is None else {'eval_loss': eval_loss},
      force=True,
    )

  def restore(
    self, step: int, state: Any, data: Any, stream: dict[str, Any]
  ) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint, onto whatever mesh the abstract state names.

    Args:
      step: one of the steps that were saved.
      state: pytree of ShapeDtypeStructs with shardings.
      data: Orbax arguments that restore the iterator (`data.restore_args`).
      stream: what the iterator's position depends on; compared with
        meta['stream'] as it was saved.

    Returns:
      The state and the meta values.

    Raises:
      ValueError: the checkpoint holds other shapes or other leaves (another
        model or optimizer) than `state`, or is of another stream.
    """
    args = self._ocp.args
    composite = args.Composite(meta=args.JsonRestore())
    meta = dict(self._manager.restore(step, args=composite)['meta'])
    self._check(step, meta.pop('shapes'), _shapes(state))
    for name, value in stream.items():
      if meta['stream'].get(name) != value:
        raise ValueError(
          f'the checkpoint at step {step} of {self.directory} is in the middle'
          f' of other data: {name} was {meta["stream"].get(name)!r}, now it is'
          f' {value!r}. Set it back, or give another --workdir'
        )
    composite = args.Composite(state=args.StandardRestore(state), data=data)
    return self._manager.restore(step, args=composite)['state'], meta

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

  def wait(self) -> None:
    """Returns when everything that was saved is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the threads."""
    self._manager.wait_until_finished()
    self._manager.close()


def _shapes(state) -> dict[str, str]:
  """'dtype(shape)' of every leaf by its path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      f'{x.dtype}{list(x.shape)}'
    )
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }
