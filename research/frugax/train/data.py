"""Documents on disk to batches of tokens.

Documents are read, shuffled, tokenized, packed into rows and batched by grain,
which no other file imports:

    source, shuffle, this host's share, repeat, tokenize, rows, shuffle, batch

The state of the whole pipeline is the index of the next document, and in packed
mode how much of the current one is already used, so that a checkpoint holds a
few numbers and a resumed run sees the very next batch.
"""

import atexit
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from frugax import names
from frugax.train import datasets
from frugax.train import rows as rows_lib
from frugax.train import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]

_MODES = ('packed', 'c4_protocol')
_PREFETCH = 4  # batches ready ahead of the step


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


def train_batches(
  cfg: Any,
  tok: tokenizer_lib.Tokenizer,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> 'Batches':
  """This host's batches, forever (unless `cfg.repeat` is off).

  Every epoch visits each document once, in an order of its own; hosts share out
  the documents of an epoch. With x the tokens of one document (bos and eos
  included, as far as the tokenizer has them), labels are

      labels[i] = x[i + 1],   labels[last] = -1

  and in packed mode a document that is cut by the end of a row goes on in the
  next, labels included: each is counted exactly once.

  Args:
    cfg: see `DataConfig`.
    tok: the tokenizer.
    batch_size: rows of the global batch, over all hosts.
    process_index: which host this is.
    process_count: how many hosts there are.

  Returns:
    An iterator of dicts of int32[batch_size / process_count, sequence_length]:
      tokens; labels, -1 where none counts; segment_ids, 0 for padding and 1, 2,
      .. for the documents of a row; positions, from 0 at each document's start
      in the row. `get_state()` and `set_state(state)` resume exactly: with any
      number of workers, in the middle of a document; `close()` stops its
      threads and processes.

  Raises:
    ValueError: what `check` raises; a batch size that the hosts cannot share.

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

  rows = _rows_per_host(batch_size, process_count)
  source = _source(cfg, cfg.train_split)
  if len(source) < process_count:
    raise ValueError(
      f'split {cfg.train_split!r} of {cfg.name!r} has {len(source)} documents '
      f'for {process_count} hosts: each needs at least one'
    )
  for name in ('num_workers', 'shuffle_rows'):
    if getattr(cfg, name) < 0:
      raise ValueError(f'{name} must be 0 or more, got {getattr(cfg, name)}')
  documents = (
    grain.MapDataset.source(source)
    .seed(cfg.seed)
    .shuffle()
    .slice(slice(process_index, None, process_count))
    .repeat(None if cfg.repeat else 1)
    .map(_document_function(cfg, tok))
  )
  dataset = _rows(cfg, tok, _stream(documents, cfg.num_workers))
  if cfg.shuffle_rows:
    dataset = grain.experimental.WindowShuffleIterDataset(
      dataset, window_size=cfg.shuffle_rows, seed=cfg.seed
    )
  dataset = dataset.batch(rows, drop_remainder=True)
  # A thread keeps batches ready and remembers the state that goes with each.
  dataset = grain.experimental.ThreadPrefetchIterDataset(
    dataset, prefetch_buffer_size=_PREFETCH
  )
  return Batches(iter(dataset))


class Batches:
  """This host's batches, and where they are; see `train_batches`.

  Between two batches the state says which document is next and how much of it
  is used. It depends on the data set, seed, sequence length and number of
  hosts; the number of workers is free.
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

  def get_state(self) -> bytes:
    """The position after the batches so far, as JSON."""
    return json.dumps(self._iterator.get_state(), indent=2).encode()

  def set_state(self, state: bytes) -> None:
    """Goes where `state` was taken: the next batch is the one that followed."""
    self._iterator.set_state(_tuples(json.loads(state)))

  def start_prefetch(self) -> None:
    """Begins to read ahead before the first batch is asked for."""
    self._iterator.start_prefetch()

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
    left = self.tokens
    for row in _rows(self.cfg, self.tok, _stream(documents, num_workers=0)):
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


def save_args(batches: Batches):
  """The Orbax argument that saves `batches`: Composite(data=save_args(b))."""
  import grain

  return grain.checkpoint.CheckpointSave(batches)


def restore_args(batches: Batches):
  """The Orbax argument that moves fresh `batches`, in place, to the saved ones.

  Each host has a state of its own: restore with as many hosts as saved.
  """
  import grain

  return grain.checkpoint.CheckpointRestore(batches)


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


def _stream(documents, num_workers: int):
  """Documents in order, and a state that is the index of the next one.

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
  read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
  workers = grain.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=8
  )

  class Documents(grain.DatasetIterator):
    def __init__(self):
      super().__init__()
      self._next = 0
      self._iterator = None

    def __next__(self):
      if self._iterator is None:
        rest = documents.slice(slice(self._next, None)).to_iter_dataset(read)
        if num_workers:
          rest = rest.mp_prefetch(workers, _in_worker)
        self._iterator = iter(rest)
      document = next(self._iterator)
      self._next += 1
      return document

    def get_state(self):
      return {'next_document': self._next}

    def set_state(self, state):
      self._stop()
      self._next = state['next_document']

    def close(self):
      self._stop()
      super().close()

    def _stop(self):
      if self._iterator is not None:
        self._iterator.close()
      self._iterator = None

  class Stream(grain.IterDataset):
    def __iter__(self):
      return Documents()

  return Stream()


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
