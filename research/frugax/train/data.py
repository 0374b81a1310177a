"""Documents on disk to batches of tokens.

Documents are read, shuffled, tokenized, packed into rows and batched by grain,
which no other file imports:

    source, shuffle, repeat, this host's streams (see `streams`), tokenize,
    rows, shuffle, batch

The state of a stream is the index of its next document, and in packed mode how
much of the current one is already used, so that a checkpoint holds a few
numbers and a resumed run sees the very next batch.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from frugax import names
from frugax.train import datasets
from frugax.train import rows as rows_lib
from frugax.train import streams as streams_lib
from frugax.train import tokenizer as tokenizer_lib
from frugax.train.batches import Batch, Batches

_MODES = ('packed', 'c4_protocol')
_PREFETCH = 4  # batches ready ahead of the step
_NEXT = 'next_document'  # in the state of a stream


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the text is and how it becomes rows.

  The functions of this module take any object with these attributes, an
  ml_collections ConfigDict included.

  Attributes:
    name: a TFDS name ('stdlib', 'c4/en', 'lm1b:1.1.0') prepared under
      `data_dir`, or the directory of a prepared data set.
    data_dir: the TFDS directory.
    train_split: a TFDS split; slices such as 'train[:90%]' work.
    eval_split: likewise.
    text_field: the feature that holds the text.
    mode: 'packed' concatenates documents and cuts the stream into rows;
      'c4_protocol' makes each document one row, truncated or padded.
    sequence_length: tokens per row.
    seed: of the shuffle; every epoch has its own order.
    shuffle_rows: shuffle rows too, among this many at a time: the rows of a
      long document follow each other and would fill whole batches. 0 keeps the
      documents' order.
    num_workers: processes that read and tokenize; 0 does it in this one. The
      batches are the same for every number.
    repeat: go through the data again and again; False stops after one epoch.
    streams: how many streams of documents a batch is dealt from, see `streams`;
      it divides the batch. 0: up to 16, one for a single epoch.
  """

  name: str = 'stdlib'
  data_dir: str = 'data'
  train_split: str = 'train'
  eval_split: str = 'validation'
  text_field: str = 'text'
  mode: str = 'packed'
  sequence_length: int = 256
  seed: int = 0
  shuffle_rows: int = 0
  num_workers: int = 0
  repeat: bool = True
  streams: int = 0


def check(
  cfg: Any, tok: tokenizer_lib.Tokenizer, model_vocab_size: int
) -> None:
  """Raises if a run with `cfg` would fail later: nothing is compiled yet.

  Args:
    cfg: see `DataConfig`.
    tok: the tokenizer.
    model_vocab_size: rows of the model's embedding.

  Raises:
    ValueError: data set, split or text field missing; a split empty; a mode
      that does not exist; ids that the model has no embedding for.
  """
  if tok.vocab_size > model_vocab_size:
    raise ValueError(
      f'tokenizer {tok.name!r} has {tok.vocab_size} ids, the model only '
      f'{model_vocab_size}: ids beyond would silently read a wrong embedding; '
      f"set the model's vocab_size to {tok.vocab_size} or more"
    )
  for split in (cfg.train_split, cfg.eval_split):
    example = _source(cfg, split)[0]
    ids = tok.encode(example[cfg.text_field])
    if ids.size and not 0 <= ids.min() <= ids.max() < model_vocab_size:
      raise ValueError(
        f'tokenizer {tok.name!r} gives ids from {ids.min()} to {ids.max()}, '
        f'outside the vocabulary [0, {model_vocab_size}) of the model'
      )


def stream_count(cfg: Any, batch_size: int) -> int:
  """How many streams a new run of `cfg` deals its batches from."""
  if cfg.streams:
    return cfg.streams
  if not cfg.repeat:
    return 1
  return streams_lib.count(batch_size, len(_source(cfg, cfg.train_split)))


def train_batches(
  cfg: Any,
  tok: tokenizer_lib.Tokenizer,
  *,
  batch_size: int,
  streams: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """This host's rows of the batches, forever (unless `cfg.repeat` is off).

  Every epoch visits each document once, in an order of its own. The hosts'
  batches side by side are those of one host: see `streams`. With x the tokens
  of one document (bos and eos included, as far as the tokenizer has them),
  labels are

      labels[i] = x[i + 1],   labels[last] = -1

  and in packed mode a document that is cut by the end of a row goes on in the
  next one of its stream, labels included: each is counted exactly once.

  Args:
    cfg: see `DataConfig`.
    tok: the tokenizer.
    batch_size: rows of the global batch, over all hosts.
    streams: how many streams it is dealt from, as a checkpoint says; default
      `stream_count`.
    process_index: which host this is.
    process_count: how many hosts there are.

  Returns:
    An iterator of dicts of int32[batch_size / process_count, sequence_length]:
      tokens; labels, -1 where none counts; segment_ids, 0 for padding and 1, 2,
      .. for the documents of a row; positions, from 0 at each document's start
      in the row. `get_state()` and `set_state(state)` resume exactly: with any
      number of workers and hosts, in the middle of a document; `close()` stops
      its threads and processes.

  Raises:
    ValueError: what `check` raises; a batch size that the hosts or the streams
      cannot share.

  Examples:
    >>> import tempfile
    >>> tok = tokenizer_lib.tokenizer('bytes')
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   split = {'train': lambda: [{'text': 'abc'}]}
    ...   _ = datasets.prepare('tiny', split, tmp)
    ...   cfg = DataConfig(name='tiny', data_dir=tmp, sequence_length=7)
    ...   batches = train_batches(cfg, tok, batch_size=1)
    ...   batch = next(batches)
    ...   batches.close()
    >>> batch['tokens'], batch['labels']
    (array([[  1, 100, 101, 102,   2,   1, 100]], dtype=int32),
     array([[100, 101, 102,   2,  -1, 100, 101]], dtype=int32))
    >>> batch['segment_ids'].tolist(), batch['positions'].tolist()
    ([[1, 1, 1, 1, 1, 2, 2]], [[0, 1, 2, 3, 4, 0, 1]])
  """
  import grain

  size = _rows_per_host(batch_size, process_count)
  rows = range(process_index * size, (process_index + 1) * size)
  source = _source(cfg, cfg.train_split)
  count = stream_count(cfg, batch_size) if streams is None else streams
  if count < 1 or batch_size % count or count > len(source):
    advice = 'choose data.streams so that it divides batch_size, or 0'
    if streams:
      advice = (
        'they are those of the checkpoint, which goes on with a batch_size of'
        f' {count} or a multiple of it'
      )
    raise ValueError(
      f'{count} streams cannot deal batches of {batch_size} rows from the'
      f' {len(source)} documents of {cfg.train_split!r}: {advice}'
    )
  if count > 1 and not cfg.repeat:
    raise ValueError(
      f'data.repeat=false with {count} streams: they end at different steps,'
      ' and what is left would be lost; set data.streams to 0'
    )
  for name in ('num_workers', 'shuffle_rows'):
    if getattr(cfg, name) < 0:
      raise ValueError(f'{name} must be 0 or more, got {getattr(cfg, name)}')
  own = streams_lib.of_rows(rows, batch_size, count)
  documents = (
    grain.MapDataset.source(source)
    .seed(cfg.seed)
    .shuffle()
    .repeat(None if cfg.repeat else 1)
  )
  if count > 1:
    documents = grain.MapDataset.mix(
      [documents.slice(slice(s, None, count)) for s in own]
    )
  documents = documents.map(_document_function(cfg, tok))
  dealer = _dealer(documents, len(own), cfg.num_workers)
  of_streams = []
  for i, s in enumerate(own):
    stream = _rows(cfg, tok, _stream(dealer, i))
    if cfg.shuffle_rows:
      stream = grain.experimental.WindowShuffleIterDataset(
        stream, window_size=-(-cfg.shuffle_rows // count), seed=cfg.seed + s
      )
    of_streams.append(stream)
  dataset = _joined(of_streams, own, rows, batch_size // count, dealer)
  # A thread keeps batches ready and remembers the state that goes with each.
  dataset = grain.experimental.ThreadPrefetchIterDataset(
    dataset, prefetch_buffer_size=_PREFETCH
  )
  return Batches(iter(dataset))


def eval_batches(
  cfg: Any,
  tok: tokenizer_lib.Tokenizer,
  *,
  batch_size: int,
  tokens: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> 'EvalBatches':
  """The same evaluation set every time it is iterated.

  The rows of the eval split in the order of its files, until exactly `tokens`
  labels are counted (or the split ends). Which labels these are depends on
  neither the batch size nor the number of hosts: every host goes through all
  rows and keeps its own, so that the hosts' batches side by side are the batch
  of one host. The last batch is filled with rows that count for nothing: all
  hosts see the same number of batches, all of one shape.

  Args:
    cfg: see `DataConfig`; seed, num_workers and repeat play no part.
    tok: the tokenizer.
    batch_size: rows of the global batch, over all hosts.
    tokens: labels to count over all hosts; None takes the whole split.
    process_index: which host this is.
    process_count: how many hosts there are.

  Returns:
    An iterable of batches as `train_batches` gives them.

  Raises:
    ValueError: as `train_batches`, and for a number of tokens below 1.
  """
  if tokens is not None and tokens < 1:
    raise ValueError(f'tokens must be 1 or more, or None for all: got {tokens}')
  rows = _rows_per_host(batch_size, process_count)
  source = _source(cfg, cfg.eval_split)
  share = slice(process_index * rows, (process_index + 1) * rows)
  return EvalBatches(cfg, tok, source, batch_size, tokens, share)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
  """A fixed evaluation set; see `eval_batches`, which makes it."""

  cfg: Any
  tok: tokenizer_lib.Tokenizer
  source: Any
  batch_size: int
  tokens: int | None
  share: slice  # this host's rows of each global batch

  def __iter__(self) -> Iterator[Batch]:
    batch = []
    for row in self._counted_rows():
      batch.append(row)
      if len(batch) == self.batch_size:
        yield self._own(batch)
        batch = []
    if batch:
      nothing = rows_lib.fit(
        np.zeros(0, np.int32), self.cfg.sequence_length, self.tok.pad_id
      )
      missing = self.batch_size - len(batch)
      yield self._own(batch + [nothing] * missing)

  def _counted_rows(self) -> Iterator[Batch]:
    import grain

    documents = grain.MapDataset.source(self.source).map(
      _document_function(self.cfg, self.tok)
    )
    documents = _stream(_dealer(documents, streams=1, num_workers=0), 0)
    left = self.tokens
    for row in _rows(self.cfg, self.tok, documents):
      if left is not None:
        counted = np.flatnonzero(row['labels'] != rows_lib.IGNORE)
        row['labels'][counted[left:]] = rows_lib.IGNORE
        left -= len(counted)
      yield row
      if left is not None and left <= 0:
        return

  def _own(self, batch: list[Batch]) -> Batch:
    return {
      key: np.stack([row[key] for row in batch[self.share]]) for key in batch[0]
    }


def _source(cfg: Any, split: str):
  """The documents of `split`, after all checks on cfg."""
  if cfg.mode not in _MODES:
    raise names.unknown('data mode', cfg.mode, _MODES)
  if cfg.sequence_length < 1:
    raise ValueError(
      f'sequence_length must be 1 or more, got {cfg.sequence_length}'
    )
  return datasets.documents(cfg.name, cfg.data_dir, split, cfg.text_field)


def _rows_per_host(batch_size: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size {batch_size} must be a positive multiple of the '
      f'{process_count} hosts that share it'
    )
  return batch_size // process_count


# From documents to rows.


def _document_function(
  cfg: Any, tok: tokenizer_lib.Tokenizer
) -> Callable[[dict[str, Any]], Batch]:
  """What the workers do to one document; picklable."""
  if cfg.mode == 'packed':
    return functools.partial(rows_lib.packable, tok, cfg.text_field)
  return functools.partial(
    rows_lib.one_row, tok, cfg.text_field, cfg.sequence_length
  )


def _rows(cfg: Any, tok: tokenizer_lib.Tokenizer, documents):
  """The grain data set of rows over the one of documents."""
  import grain

  if cfg.mode == 'c4_protocol':
    return documents  # already one row each
  length = cfg.sequence_length
  return grain.experimental.ConcatThenSplitIterDataset(
    documents, length_struct={'tokens': length, 'labels': length}
  ).map(functools.partial(rows_lib.from_grain, tok.pad_id))


def _dealer(documents, streams: int, num_workers: int) -> streams_lib.Dealer:
  """Deals `documents`, those of so many streams in turn.

  grain's own state of a pool of processes names each of them, which would tie a
  checkpoint to their number. Processes take turns, so that the order does not
  depend on them; starting again at an index is therefore all there is to do.
  """
  import grain
  from absl import flags

  # grain asks absl for its flags when it starts a process, and absl refuses
  # where nothing parsed a command line (notebooks, tests).
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
  workers = grain.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=8
  )

  def read(start):
    rest = documents.slice(slice(start, None)).to_iter_dataset(options)
    if num_workers:
      rest = rest.mp_prefetch(workers, _in_worker)
    return iter(rest)

  return streams_lib.Dealer(read, streams)


def _stream(dealer: streams_lib.Dealer, index: int):
  """The documents of one stream; their state is the index of the next one."""
  import grain

  class Documents(grain.DatasetIterator):
    def __next__(self):
      return dealer.next(index)

    def get_state(self):
      return {_NEXT: dealer.dealt[index]}

    def set_state(self, state):
      if state != self.get_state():
        dealt = list(dealer.dealt)
        dealt[index] = state[_NEXT]
        dealer.move(dealt)

    def close(self):
      dealer.close()
      super().close()

  return _dataset(Documents)


def _joined(of_streams, own, rows: range, size: int, dealer):
  """Batches of `rows` of the global batch, to which a stream gives `size`."""
  import grain

  class Joined(grain.DatasetIterator):
    def __init__(self):
      super().__init__()
      self._streams = [iter(stream) for stream in of_streams]

    def __next__(self):
      batch = []
      for s, stream in zip(own, self._streams, strict=True):
        given = list(itertools.islice(stream, size))
        if len(given) < size:  # the data ended
          raise StopIteration
        first = s * size
        batch += [x for i, x in enumerate(given, first) if i in rows]
      return {key: np.stack([row[key] for row in batch]) for key in batch[0]}

    def get_state(self):
      states = (stream.get_state() for stream in self._streams)
      return {str(s): x for s, x in zip(own, states, strict=True)}

    def set_state(self, state):
      # All documents first: streams may read when they are told where they are.
      states = [state[str(s)] for s in own]
      dealer.move([_next_document(x) for x in states])
      for stream, x in zip(self._streams, states, strict=True):
        stream.set_state(x)

    def close(self):
      for stream in self._streams:
        stream.close()
      super().close()

  return _dataset(Joined)


def _dataset(iterator):
  """The data set whose iterators are these."""
  import grain

  class Dataset(grain.IterDataset):
    def __iter__(self):
      return iterator()

  return Dataset()


def _next_document(state: Any) -> int | None:
  """What the state of a stream's rows says of its documents."""
  if not isinstance(state, dict):
    return None
  if _NEXT in state:
    return state[_NEXT]
  found = (_next_document(value) for value in state.values())
  return next((n for n in found if n is not None), None)


def _in_worker(index: int, count: int) -> None:
  """Ties a worker's life to its parent's alone."""
  del index, count
  # A preemption notice or Ctrl-C that reaches the whole group is the parent's
  # to act on: it still wants batches, or a clean end.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def follow():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
