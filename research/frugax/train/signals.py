"""SIGTERM and Ctrl-C, turned into a question that the loop asks."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """Answers whether the run was asked to stop, on every process alike.

  While the context is open, SIGTERM (preemption) and the first SIGINT (Ctrl-C)
  only make `requested` true; a second Ctrl-C interrupts at once. Of several
  processes, one that is signalled tells the others.

  Attributes:
    raised: whether this process was signalled.

  Examples:
    >>> with StopSignal() as stop:
    ...   before = stop.requested(1)
    ...   os.kill(os.getpid(), signal.SIGTERM)
    ...   before, stop.requested(2)
    (False, True)
  """

  def __enter__(self) -> 'StopSignal':
    self.raised = False
    self._handlers = {}
    # Python delivers signals to the main thread only. Several processes leave
    # SIGTERM to JAX's preemption service, which tells them all.
    if threading.current_thread() is threading.main_thread():
      caught = [signal.SIGINT, signal.SIGTERM]
      for number in caught[: 1 if jax.process_count() > 1 else 2]:
        self._handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    if self.raised and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.raised = True
    if jax.process_count() > 1:  # to JAX's preemption service
      os.kill(os.getpid(), signal.SIGTERM)

  def requested(self, step: int) -> bool:
    """Whether to stop after `step`; every process gets the same answer."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.raised
