"""Runs side by side, as text and as JSON."""

import json
import math
from collections.abc import Sequence
from typing import Any

from frugax.report import runs as runs_lib
from frugax.report.runs import Run


def table(runs: Sequence[Run]) -> str:
  """One row a run: what it was, how far it came, what it cost.

  A run that is not done has its steps as a part of the config's. `time` is that
  of training, without evaluation. `train loss` is the mean over the last 2 % of
  the run, `eval loss` that over the whole evaluation set, both in nats per
  token. `MFU` is the share of the devices' bfloat16 peak that the model's
  operations come to; no peak is known of a CPU. `state bytes` is the
  optimizer's state and `of Adam's` its share of what Adam would keep for the
  same parameters (in their dtype). A dash is unknown. Below stands how many
  broken lines of which run were left out.

  Args:
    runs: any number of runs.

  Returns:
    The aligned table, without a newline at its end.

  Examples:
    >>> import pathlib
    >>> summary = {
    ...   'optimizer': 'galore',
    ...   'parameters': 1_575_936,
    ...   'steps': 1000,
    ...   'tokens': 8_192_000,
    ...   'seconds': 300.2,
    ...   'train_loss': 1.125,
    ...   'eval_loss': 1.25,
    ...   'bits_per_byte': 1.8034,
    ...   'tokens_per_second': 27345.6,
    ...   'optimizer_state_bytes': 3_151_872,
    ...   'adam_state_bytes': 12_607_488,
    ... }
    >>> run = Run(pathlib.Path('runs/tiny'), {}, {}, {}, summary)
    >>> print(table([run]))
    run   optimizer  params  steps  tokens        time  train loss ...
    tiny  galore      1.58M  1,000   8.19M  5 min 00 s      1.1250 ...
  """
  rows = [_HEADER]
  labels = runs_lib.names(runs)
  for name, run in zip(labels, runs, strict=True):
    get = run.summary.get
    rows.append(
      (
        name,
        str(get('optimizer') or '-'),
        _short(get('parameters')),
        _steps(get('steps'), run.config.get('steps')),
        _short(get('tokens')),
        _time(get('seconds')),
        _format(get('train_loss'), '.4f'),
        _format(get('eval_loss'), '.4f'),
        _format(get('bits_per_byte'), '.4f'),
        _format(get('tokens_per_second'), ',.0f'),
        _format(get('mfu'), '.1%'),
        _short(get('optimizer_state_bytes')),
        _share(get('optimizer_state_bytes'), get('adam_state_bytes')),
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [_line(row, widths) for row in rows]
  broken = [
    f'{name}: {len(run.skipped)} broken left out, first {run.skipped[0]}'
    for name, run in zip(labels, runs, strict=True)
    if run.skipped
  ]
  return '\n'.join([*lines, *broken])


def to_json(runs: Sequence[Run]) -> str:
  """Runs as JSON: what the table says in full, and the curves.

  Args:
    runs: any number of runs.

  Returns:
    An object with a list `runs` of objects: name, path, summary and config as
    `Run` has them, skipped, and `train` and `eval` with a list for each metric.
    Numbers that are not finite are 'nan', 'inf' and '-inf', as in
    metrics.jsonl.

  Examples:
    >>> import numpy as np, pathlib
    >>> train = {'step': np.array([1.0]), 'loss': np.array([np.nan])}
    >>> run = Run(pathlib.Path('runs/tiny'), train, {})
    >>> json.loads(to_json([run]))['runs'][0]['train']
    {'step': [1.0], 'loss': ['nan']}
  """
  return json.dumps(
    {
      'runs': [
        {
          'name': name,
          'path': str(run.path),
          'summary': _plain(run.summary),
          'config': _plain(run.config),
          'skipped': list(run.skipped),
          'train': _plain({k: v.tolist() for k, v in run.train.items()}),
          'eval': _plain({k: v.tolist() for k, v in run.eval.items()}),
        }
        for name, run in zip(runs_lib.names(runs), runs, strict=True)
      ]
    },
    allow_nan=False,
  )


_HEADER = (
  'run',
  'optimizer',
  'params',
  'steps',
  'tokens',
  'time',
  'train loss',
  'eval loss',
  'bits/byte',
  'tokens/s',
  'MFU',
  'state bytes',
  "of Adam's",
)


def _line(row, widths):
  # Words to the left, numbers to the right.
  cells = [
    text.ljust(width) if i < 2 else text.rjust(width)
    for i, (text, width) in enumerate(zip(row, widths, strict=True))
  ]
  return '  '.join(cells).rstrip()


def _format(value, spec):
  return '-' if value is None else format(value, spec)


def _short(value):
  """Three digits and a power of 1000.

  Examples:
    >>> [_short(x) for x in (7, 1234, 999_999, 12_607_488, 6.738e9, None)]
    ['7', '1.23k', '1.00M', '12.6M', '6.74G', '-']
  """
  if value is None or not math.isfinite(value):
    return _format(value, '')
  for unit in ('', 'k', 'M', 'G', 'T'):
    # What would round to 1000 goes on to the next unit.
    if value < 999.5 or unit == 'T':
      break
    value /= 1000
  whole = not unit or value >= 99.95
  digits = 0 if whole else 1 if value >= 9.995 else 2
  return f'{value:.{digits}f}{unit}'


def _steps(steps, planned):
  """How many, and of a run that is not done of how many."""
  text = _format(steps, ',.0f')
  if isinstance(planned, int) and steps is not None and steps < planned:
    return f'{text} of {planned:,}'
  return text


def _time(seconds):
  """The two largest units.

  Examples:
    >>> [_time(x) for x in (0.25, 59.96, 3599, 7500, 2e5, None)]
    ['0.2 s', '1 min 00 s', '59 min 59 s', '2 h 05 min', '2 d 07 h', '-']
  """
  if seconds is None or not math.isfinite(seconds):
    return _format(seconds, '')
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  whole = round(seconds)
  for size, unit, small, small_unit in (
    (86400, 'd', 3600, 'h'),
    (3600, 'h', 60, 'min'),
    (60, 'min', 1, 's'),
  ):
    if whole >= size:
      return f'{whole // size} {unit} {whole % size // small:02d} {small_unit}'


def _share(state, adam):
  return f'{100 * state / adam:.1f} %' if state is not None and adam else '-'


def _plain(value: Any) -> Any:
  """Without the floats that JSON has not."""
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_plain(item) for item in value]
  return value
