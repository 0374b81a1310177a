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
  'eval_loss',
  'bits_per_byte',
  'tokens_per_second',
  'step_seconds',
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
    summary: summary.json. Of a run that has none (yet), or that was resumed
      and is past it, what the rows tell: steps, tokens, seconds, eval_loss,
      bits_per_byte, tokens_per_second, step_seconds. None is unknown.
  """

  path: pathlib.Path
  train: Mapping[str, np.ndarray]
  eval: Mapping[str, np.ndarray]
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_run(path: str | os.PathLike) -> Run:
  """Reads the folder of a run, finished or not.

  A last line that is cut off is left out: the run is writing it, or was killed
  while it did. Of rows of one kind and step the last one counts.

  Args:
    path: the run's --workdir. Its metrics.jsonl must exist; config.json and
      summary.json need not.

  Returns:
    The run.

  Raises:
    ValueError: no such folder, no metrics in it, or a broken file; the message
      names the file and the line.

  Examples:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   file = pathlib.Path(folder, 'metrics.jsonl')
    ...   _ = file.write_text('''{"step": 1, "loss": 5.5, "tokens": 64}
    ... {"step": 2, "loss": "nan", "tokens": 128}
    ... {"step": 2, "eval_loss": 4.5}
    ... {"step": 3, "lo''')
    ...   run = read_run(folder)
    >>> run.train['loss'], run.eval['eval_loss']
    (array([5.5, nan]), array([4.5]))
    >>> run.summary['steps'], run.summary['tokens']
    (2.0, 128.0)
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise ValueError(f'{path}: no such folder; give the --workdir of a run')
  metrics = path / 'metrics.jsonl'
  if not metrics.is_file():
    raise ValueError(
      f'{path} has no metrics.jsonl; give the --workdir of a run that has begun'
    )
  rows = _read_rows(metrics)
  train, evaluation = _columns(rows, 'loss'), _columns(rows, 'eval_loss')
  if not train and not evaluation:
    raise ValueError(f'{metrics} has no row with a loss or eval_loss yet')
  config = _read_object(path / 'config.json')
  summary = _read_summary(path / 'summary.json')
  derived = _derive(train, evaluation, config)
  if summary.get('steps') is None or summary['steps'] < derived['steps']:
    summary |= {k: v for k, v in derived.items() if v is not None}
  return Run(path, train, evaluation, config, summary)


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


def _read_rows(path: pathlib.Path) -> list[dict[str, float]]:
  lines = path.read_bytes().splitlines()
  rows = []
  for i, line in enumerate(lines):
    try:
      row = json.loads(line)
    except ValueError:
      if i == len(lines) - 1:
        break
      raise _broken(path, i, f'not JSON: {line[:60]!r}') from None
    if not isinstance(row, dict) or 'step' not in row:
      raise _broken(path, i, f'not an object with a step: {line[:60]!r}')
    try:
      rows.append(_floats(row))
    except ValueError as error:
      raise _broken(path, i, str(error)) from None
  return rows


def _broken(path, i, why):
  return ValueError(f'{path}, line {i + 1}: {why}; mend or remove the line')


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
  """Numbers, and 'nan' and 'inf' as they are spelled in JSON, without null."""
  result = {}
  for key, value in values.items():
    try:
      if value is not None:
        result[key] = float(value)
    except (TypeError, ValueError):
      raise ValueError(f'{key} is {value!r}, not a number') from None
  return result


def _columns(
  rows: Iterable[Mapping[str, float]], loss: str
) -> dict[str, np.ndarray]:
  by_step = {row['step']: row for row in rows if loss in row}
  rows = [by_step[step] for step in sorted(by_step)]
  keys = dict.fromkeys(key for row in rows for key in row)
  return {k: np.array([row.get(k, math.nan) for row in rows]) for k in keys}


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} is not a JSON object')
  return value


def _read_summary(path: pathlib.Path) -> dict[str, Any]:
  summary = _read_object(path)
  try:
    return summary | _floats({key: summary.get(key) for key in _NUMBERS})
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None


def _derive(train, evaluation, config) -> dict[str, Any]:
  """What the rows tell of the run, None where they do not."""

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

  optimizer = config.get('optimizer')
  return {
    'steps': most('step'),
    'tokens': most('tokens'),
    'seconds': most('seconds'),
    'eval_loss': last('eval_loss'),
    'bits_per_byte': last('bits_per_byte'),
    'tokens_per_second': median('tokens_per_second'),
    'step_seconds': median('step_seconds'),
    'optimizer': optimizer.get('name') if isinstance(optimizer, dict) else None,
  }
