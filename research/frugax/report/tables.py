"""Runs side by side, as text."""

import math
from collections.abc import Sequence

from frugax.report import runs as runs_lib
from frugax.report.runs import Run


def table(runs: Sequence[Run]) -> str:
  """One row a run: what it was, how far it came, what it cost.

  `state bytes` is the optimizer's state and `of Adam's` its share of what Adam
  would keep for the same parameters (in their dtype). The loss is in nats
  per token, over the whole evaluation set. A dash is unknown.

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
    ...   'eval_loss': 1.25,
    ...   'bits_per_byte': 1.8034,
    ...   'tokens_per_second': 27345.6,
    ...   'optimizer_state_bytes': 3_151_872,
    ...   'adam_state_bytes': 12_607_488,
    ... }
    >>> run = Run(pathlib.Path('runs/tiny'), {}, {}, {}, summary)
    >>> print(table([run]))  # doctest: -NORMALIZE_WHITESPACE
    run   optimizer  params  steps  tokens  eval loss  bits/byte  tokens/s ...
    tiny  galore      1.58M  1,000   8.19M     1.2500     1.8034    27,346 ...
  """
  rows = [_HEADER]
  for name, run in zip(runs_lib.names(runs), runs, strict=True):
    get = run.summary.get
    rows.append(
      (
        name,
        get('optimizer') or '-',
        _short(get('parameters')),
        _format(get('steps'), ',.0f'),
        _short(get('tokens')),
        _format(get('eval_loss'), '.4f'),
        _format(get('bits_per_byte'), '.4f'),
        _format(get('tokens_per_second'), ',.0f'),
        _short(get('optimizer_state_bytes')),
        _share(get('optimizer_state_bytes'), get('adam_state_bytes')),
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(_line(row, widths) for row in rows)


_HEADER = (
  'run',
  'optimizer',
  'params',
  'steps',
  'tokens',
  'eval loss',
  'bits/byte',
  'tokens/s',
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


def _share(state, adam):
  return f'{100 * state / adam:.1f} %' if state is not None and adam else '-'
