"""Streams of documents: what makes a batch the same on any number of hosts.

A batch is dealt from a fixed number S of streams. Documents go to them in turn,
document i of the run to stream i % S; each stream packs its own into rows, and
each gives the same number of rows to a batch:

    rows of a batch      0 .. r-1 | r .. 2r-1 | ...      r = batch size / S
    from stream              0    |     1     | ...

A host goes through the streams that its rows come from, and no others. So the
batches of a run depend on neither the number of hosts nor their devices, and a
run that was saved by four hosts goes on with two.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_MOST = 16  # of `count`


def count(batch_size: int, documents: int) -> int:
  """How many streams a run gets unless its config says.

  The largest power of two up to 16 that divides the batch and leaves each
  stream a document. More hosts than streams share them: each stream is then
  tokenized by several.

  Examples:
    >>> count(512, 10_000), count(24, 10_000), count(512, 5), count(3, 10_000)
    (16, 8, 4, 1)
  """
  n = _MOST
  while batch_size % n or n > documents:
    n //= 2
  return n


def of_rows(rows: range, batch_size: int, streams: int) -> range:
  """The streams that these rows of a batch come from.

  Examples:
    >>> of_rows(range(4, 8), batch_size=16, streams=8)
    range(2, 4)
    >>> of_rows(range(4, 8), batch_size=16, streams=2)
    range(0, 1)
  """
  size = batch_size // streams
  return range(rows.start // size, -(-rows.stop // size))


class Dealer:
  """Deals the documents of several streams, which are read together.

  Streams ask at their own pace, that of their tokens. What is read on behalf of
  one and belongs to others waits for them. How far apart they are grows with
  the root of the run: after n documents each, about 1.6 sqrt(n) a stream wait,
  times the standard deviation of the documents' lengths over their mean; as
  many are read again when a run is resumed. A host with 16 streams of a million
  documents, 500 tokens each, keeps 25,000 of them (100 MB).

  Args:
    read: (start) -> an iterator of documents from index `start` on, those of
      the k streams in turn: of stream 0, 1, .., k-1, 0, ... `close()` ends it.
    streams: k.

  Attributes:
    dealt: how many documents each stream was given.

  Examples:
    >>> dealer = Dealer(lambda start: iter('aAbBcC'[start:]), streams=2)
    >>> dealer.next(0), dealer.next(0), dealer.next(1)
    ('a', 'b', 'A')
    >>> dealer.move([1, 1])
    >>> dealer.next(0), dealer.next(1)
    ('b', 'B')
  """

  def __init__(self, read: Callable[[int], Iterator[Any]], streams: int):
    self.dealt = [0] * streams
    self._read = read
    self._documents: Iterator[Any] | None = None

  def next(self, stream: int) -> Any:
    """The next document of a stream."""
    if self._documents is None:
      # Of streams that are ahead some are read again, and passed over.
      k = len(self.dealt)
      self._index = k * min(self.dealt)
      self._documents = self._read(self._index)
      self._waiting = [collections.deque() for _ in range(k)]
      self._first = list(self.dealt)
    while not self._waiting[stream]:
      document = next(self._documents)
      round_, owner = divmod(self._index, len(self.dealt))
      self._index += 1
      if round_ >= self._first[owner]:
        self._waiting[owner].append(document)
    self.dealt[stream] += 1
    return self._waiting[stream].popleft()

  def move(self, dealt: Sequence[int]) -> None:
    """Goes to where the streams were given so many documents each."""
    self.close()
    self.dealt = list(dealt)

  def close(self) -> None:
    """Stops reading; `next` begins again."""
    if hasattr(self._documents, 'close'):
      self._documents.close()
    self._documents = None
