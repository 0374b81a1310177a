"""Batches of one host, and where they are in their streams."""

import atexit
import json
import weakref
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


class Batches:
  """This host's batches; `data.train_batches` makes them.

  Between two batches the state says, of each stream that this host goes
  through, which document is next and how much of it is used. It depends on
  data set, seed, sequence length and number of streams; the numbers of hosts
  and of workers are free.
  """

  def __init__(self, iterator):
    self._iterator = iterator
    # Threads that outlive the interpreter's modules would end in a traceback.
    atexit.register(_close, weakref.ref(self))

  def __iter__(self) -> 'Batches':
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      raise ValueError('these batches are closed: make new ones')
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """The position after the batches so far, {stream: JSON values}.

    Those of all hosts together, `a | b`, are one for any number of hosts.
    """
    return json.loads(json.dumps(self._iterator.get_state()))

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes where `state` was taken: the next batch is the one that followed."""
    self._iterator.set_state(_tuples(state))

  def close(self) -> None:
    """Stops threads and worker processes; there are no more batches."""
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def _close(reference: weakref.ref) -> None:
  batches = reference()
  if batches is not None:
    batches.close()


def _tuples(state: Any) -> Any:
  """JSON made lists of tuples, and grain's packer tells them apart.

  It would take the list [-1, -1], its mark for 'no document is cut here', for
  an empty piece of the next document, and lose that document.
  """
  if isinstance(state, dict):
    return {key: _tuples(value) for key, value in state.items()}
  return tuple(state) if isinstance(state, list) else state
