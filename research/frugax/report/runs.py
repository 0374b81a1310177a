"""A run as its folder tells it."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# What summary.json says in numbers; all else in it is text or structure.
_NUMBERS = (
  'steps',
  'tokens',
  'seconds',
  'train_loss',
  'eval_loss',
  'bits_per_byte',
  'tokens_per_second',
  'step_seconds',
  'mfu',
  'parameters',
  'optimizer_state_bytes',
  'adam_state_bytes',
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run: its rows of metrics as columns, its config and its summary.

  Attributes:
    path: the run's folder.
    train: rows that have a `loss`: one array a metric, NaN where a row lacks
      it, in the order of `step`.
    eval: rows that have an `eval_loss`, likewise.
    config: config.json, the resolved config; empty if missing.
    summary: info.json, the facts that are known when a run begins, and
      summary.json, if it is of the last row's step: else it is of what the
      folder held before the run was resumed or begun anew. What these lack is
      what the rows tell: steps, tokens, seconds, train_loss (the mean over the
      last 2 %), eval_loss, bits_per_byte, tokens_per_second, step_seconds,
      mfu. None is unknown.
    skipped: what was broken and is left out, a text for each line or file.
  """

  path: pathlib.Path
  train: Mapping[str, np.ndarray]
  eval: Mapping[str, np.ndarray]
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  skipped: Sequence[str] = ()


def read_run(path: str | os.PathLike) -> Run:
  """Reads the folder of a run, finished or not; writes nothing into it.

  A last line that is cut off is left out: the run is writing it, or was killed
  while it did. Any other line that is no row of metrics is left out and told
  of in `Run.skipped`. Of rows of one kind and step the last one counts. Each
  file is opened once and read from its beginning to its end, as is best where
  the folder is a mounted bucket.

  Args:
    path: the run's --workdir. Its metrics.jsonl must exist; config.json,
      info.json and summary.json need not.

  Returns:
    The run.

  Raises:
    ValueError: no such folder, or no metrics in it.
    OSError: a file that cannot be read.

  Examples:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder, 'metrics.jsonl')
    ...   _ = file.write_text('''{"step": 1, "loss": 5.5, "tokens": 64}
    ... {"step": 2, "loss": "nan", "tokens": 128}
    ... oops
    ... {"step": 2, "eval_loss": 4.5}
    ... {"step": 3, "lo''')
    ...   run = read_run(folder)
    >>> run.train['loss'], run.eval['eval_loss']
    (array([5.5, nan]), array([4.5]))
    >>> run.summary['steps'], run.summary['tokens']
    (2.0, 128.0)
    >>> run.skipped
    ("metrics.jsonl, line 3: not JSON: b'oops'",)
  """
  if '://' in os.fspath(path):
    raise ValueError(
      f'{path} is no folder: mount the bucket (gcsfuse, say) and give the'
      " run's folder below the mount point"
    )
  path = pathlib.Path(path)
  metrics = path / 'metrics.jsonl'
  skipped: list[str] = []
  try:
    with metrics.open('rb') as lines:
      rows = list(_rows(lines, skipped))
  except (FileNotFoundError, NotADirectoryError):
    if not path.is_dir():
      raise ValueError(
        f'{path}: no such folder; give the --workdir of a run'
      ) from None
    raise ValueError(
      f'{path} has no metrics.jsonl; give the --workdir of a run that has begun'
    ) from None
  train, evaluation = _columns(rows, 'loss'), _columns(rows, 'eval_loss')
  if not train and not evaluation:
    broken = f' ({len(skipped)} broken lines)' if skipped else ''
    raise ValueError(f'{metrics} has no row with a loss or eval_loss{broken}')
  config = _object(path / 'config.json', skipped)
  info, summary = (
    _object(path / name, skipped, _NUMBERS)
    for name in ('info.json', 'summary.json')
  )
  derived = _derive(train, evaluation, config)
  known = derived | info
  if summary.get('steps') == derived['steps']:  # a last step has its row
    known |= summary
  return Run(path, train, evaluation, config, known, tuple(skipped))


def names(runs: Sequence[Run]) -> list[str]:
  """What to call each run: its folder, with as many parents as tell them apart.

  Examples:
    >>> names([Run(pathlib.Path(p), {}, {}) for p in ('a/lr1', 'b/lr1')])
    ['a/lr1', 'b/lr1']
    >>> names([Run(pathlib.Path(p), {}, {}) for p in ('a/lr1', 'a/lr2')])
    ['lr1', 'lr2']
  """
  parts = [run.path.resolve().parts for run in runs]
  most = max(map(len, parts), default=1)
  for n in range(1, most + 1):
    short = ['/'.join(p[-n:]) for p in parts]
    if len(set(short)) == len(set(parts)):
      break
  return short


def _rows(
  lines: Iterable[bytes], skipped: list[str]
) -> Iterable[dict[str, float]]:
  """The rows of metrics.jsonl; tells `skipped` of lines that are none."""
  for number, line in enumerate(lines, 1):
    try:
      yield _row(line)
    except ValueError as error:
      if line.endswith(b'\n'):  # else it is being written
        skipped.append(f'metrics.jsonl, line {number}: {error}')


def _row(line: bytes) -> dict[str, float]:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    raise ValueError(f'not JSON: {line.strip()[:60]!r}') from None
  if not isinstance(row, dict) or row.get('step') is None:
    raise ValueError(f'not an object with a step: {line.strip()[:60]!r}')
  row = _floats(row)
  if not math.isfinite(row['step']):
    raise ValueError(f'step is {row["step"]}, not a number of steps')
  return row


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
  """Numbers, and 'nan' and 'inf' as they are spelled in JSON, without null."""
  result = {}
  for key, value in values.items():
    try:
      if value is not None:
        result[key] = float(value)
    except (TypeError, ValueError, OverflowError):
      raise ValueError(f'{key} is {value!r}, not a number') from None
  return result


def _columns(
  rows: Iterable[Mapping[str, float]], loss: str
) -> dict[str, np.ndarray]:
  by_step = {row['step']: row for row in rows if loss in row}
  rows = [by_step[step] for step in sorted(by_step)]
  keys = dict.fromkeys(key for row in rows for key in row)
  return {k: np.array([row.get(k, math.nan) for row in rows]) for k in keys}


def _object(
  path: pathlib.Path, skipped: list[str], numbers: Sequence[str] = ()
) -> dict[str, Any]:
  """A file of facts; empty, as `skipped` is told, if it is broken."""
  try:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
      raise ValueError('not a JSON object')
    return value | _floats({k: value[k] for k in numbers if k in value})
  except FileNotFoundError:
    return {}
  except (ValueError, RecursionError) as error:
    skipped.append(f'{path.name}: {error}')
    return {}


def _derive(train, evaluation, config) -> dict[str, Any]:
  """What the rows tell of the run, without what they do not."""

  def last(key):
    return float(evaluation[key][-1]) if key in evaluation else None

  def most(key):
    values = [t[key] for t in (train, evaluation) if key in t]
    values = np.concatenate([*values, []])
    values = values[np.isfinite(values)]
    return float(values.max()) if values.size else None

  def median(key):
    values = train.get(key, np.array([]))
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else None

  def recent(loss):
    with np.errstate(invalid='ignore'):  # of infinities
      return float(np.mean(loss[-(len(loss) // 50 + 1) :]))

  optimizer = config.get('optimizer')
  found = {
    'steps': most('step'),
    'tokens': most('tokens'),
    'seconds': most('seconds'),
    'train_loss': recent(train['loss']) if train else None,
    'eval_loss': last('eval_loss'),
    'bits_per_byte': last('bits_per_byte'),
    'tokens_per_second': median('tokens_per_second'),
    'step_seconds': median('step_seconds'),
    'mfu': median('mfu'),
    'optimizer': optimizer.get('name') if isinstance(optimizer, dict) else None,
  }
  return {key: value for key, value in found.items() if value is not None}
