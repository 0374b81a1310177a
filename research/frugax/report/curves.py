"""Loss curves of runs, as a picture."""

import atexit
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np

from frugax import names
from frugax.report import runs as runs_lib
from frugax.report.runs import Run

X_AXES = {
  'step': 'step',
  'tokens': 'training tokens',
  'seconds': 'training time in {}, without evaluation',
}
_TIMES = (('days', 86400), ('hours', 3600), ('minutes', 60), ('seconds', 1))
# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
_COLOURS = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#000000',
)
_STYLES = ('-', '--', ':')


def figure(runs: Sequence[Run], x: str = 'step'):
  """Training and evaluation loss of runs, as a matplotlib figure.

  Training loss is a thin line, averaged over about 2 % of the run, over its
  faint raw values; evaluation loss is points on a line. A cross marks where a
  loss was not finite. The picture begins at the loss that the runs begin at:
  what diverges above it is cut off.

  Args:
    runs: the runs; each has a colour of its own.
    x: horizontal axis: step, tokens or seconds.

  Returns:
    A matplotlib.figure.Figure, which notebooks show and `savefig` writes.

  Raises:
    ValueError: an unknown axis, or one that a run has not recorded.

  Examples:
    >>> step = np.arange(1, 101)
    >>> train = {'step': step, 'loss': 5 / step**0.25}
    >>> run = Run(pathlib.Path('runs/tiny'), train, {})
    >>> figure([run]).axes[0].get_title(loc='left')
    'Loss of tiny'
  """
  if x not in X_AXES:
    raise names.unknown('x axis', x, X_AXES)
  _check_recorded(runs, x)
  _set_config_folder()
  # Not pyplot: a Figure of its own needs no display and leaves no state.
  from matplotlib import figure as mpl_figure
  from matplotlib import ticker

  fig = mpl_figure.Figure(figsize=(8, 4.5), dpi=160, layout='constrained')
  ax = fig.add_subplot()
  labels = runs_lib.names(runs)
  unit, size = _unit(runs, x)
  for i, (name, run) in enumerate(zip(labels, runs, strict=True)):
    _draw(ax, run, name, lambda rows: rows[x] / size, i, alone=len(runs) == 1)
  limits = _limits(runs)
  if limits:
    ax.set_ylim(*limits)
  ax.set_title(_title(labels), loc='left', fontsize=11)
  ax.set_xlabel(X_AXES[x].format(unit))
  ax.set_ylabel('loss (nats per token)')
  if x == 'tokens':
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  elif x == 'step':
    ax.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:,.0f}'))
  ax.grid(color='#e4e4e4', linewidth=0.7)
  ax.set_axisbelow(True)
  ax.spines[['top', 'right']].set_visible(False)
  explain = 'thin: train, smoothed; points: eval' if len(runs) > 1 else None
  legend = ax.legend(frameon=False, fontsize=9, title=explain)
  legend.get_title().set_fontsize(9)
  return fig


def plot(runs: Sequence[Run], path: str | os.PathLike, x: str = 'step') -> None:
  """Writes `figure` to a file.

  Args:
    runs: the runs; each has a colour of its own.
    path: the file to write, its ending says the format (.png, .svg, .pdf);
      missing folders are made.
    x: horizontal axis: step, tokens or seconds.

  Raises:
    ValueError: as `figure`, or a file format that matplotlib does not write.

  Examples:
    >>> step = np.arange(1, 101)
    >>> train = {'step': step, 'loss': 5 / step**0.25}
    >>> run = Run(pathlib.Path('runs/tiny'), train, {})
    >>> folder = tempfile.TemporaryDirectory()
    >>> plot([run], f'{folder.name}/loss.png')
    >>> os.listdir(folder.name)
    ['loss.png']
    >>> folder.cleanup()
  """
  fig = figure(runs, x)
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  fig.savefig(path)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
  """A centred moving average that leaves out what is not finite.

  Args:
    values: a vector.
    width: how many values each average spans, an odd number; fewer at the
      ends.

  Returns:
    The averages; NaN where no value in reach is finite.

  Examples:
    >>> smooth(np.array([1.0, 2.0, np.nan, 6.0]), 3)
    array([1.5, 1.5, 4. , 6. ])
  """
  finite = np.isfinite(values)
  ones = np.ones(width)
  # 'full' and a cut, as 'same' is as long as the longer of the two.
  cut = slice(width // 2, width // 2 + len(values))
  sums = np.convolve(np.where(finite, values, 0.0), ones)[cut]
  counts = np.convolve(finite.astype(float), ones)[cut]
  return np.divide(
    sums, counts, out=np.full(len(values), np.nan), where=counts > 0
  )


def _unit(runs, x):
  """The name and size of what the horizontal axis counts."""
  if x != 'seconds':
    return '', 1
  times = [rows[x] for run in runs for rows in (run.train, run.eval) if rows]
  longest = np.nanmax(np.concatenate([*times, [0.0]]))
  # No unit of which the runs have but a few.
  return next(u for u in _TIMES if longest >= 3 * u[1] or u[1] == 1)


def _draw(ax, run, name, at_of, i, *, alone):
  colour = _COLOURS[i % len(_COLOURS)]
  style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
  if run.train:
    at, loss = at_of(run.train), run.train['loss']
    line = _smooth_train(run)
    bad = ~np.isfinite(loss)
    ax.plot(at, loss, color=colour, alpha=0.3, linewidth=0.5)
    label = 'train, smoothed' if alone else f'{name}, train'
    show_label = alone or not run.eval
    ax.plot(
      at,
      line,
      color=colour,
      linewidth=1.1,
      linestyle=style,
      label=label if show_label else None,
    )
    if bad.any():
      ax.plot(
        at[bad],
        _last_finite(line)[bad],
        'x',
        color='#b00020',
        markersize=8,
        zorder=5,
        label='loss not finite' if alone else f'{name}, loss not finite',
      )
  if run.eval:
    loss = run.eval['eval_loss']
    label = 'eval' if alone else f'{name}, eval'
    ax.plot(
      at_of(run.eval),
      loss,
      color=_COLOURS[1] if alone else colour,
      linewidth=1.5,
      linestyle=style,
      marker='o',
      markersize=4,
      label=f'{label} {loss[-1]:.3f}',
    )


def _smooth_train(run):
  loss = run.train['loss']
  return smooth(loss, 2 * (len(loss) // 100) + 1)


def _last_finite(values):
  """Each value, or the last finite one before it."""
  indices = np.where(np.isfinite(values), np.arange(len(values)), 0)
  return values[np.maximum.accumulate(indices)]


def _limits(runs):
  """From the least loss to the one that the runs begin at; None if none."""
  curves = [_smooth_train(run) for run in runs if run.train]
  curves += [run.eval['eval_loss'] for run in runs if run.eval]
  curves = [c[np.isfinite(c)] for c in curves]
  curves = [c for c in curves if c.size]
  if not curves:
    return None
  low = min(c.min() for c in curves)
  high = max(c[0] for c in curves)
  margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
  return low - margin, high + margin


def _title(labels):
  if len(labels) > 4:
    return f'Loss of {len(labels)} runs'
  return 'Loss of ' + ', '.join(labels)


def records(run: Run, x: str) -> bool:
  """Whether all rows of a run that have a loss can be drawn along an axis.

  Examples:
    >>> run = Run(pathlib.Path('runs/tiny'), {'step': 1, 'loss': 2}, {})
    >>> records(run, 'step'), records(run, 'seconds')
    (True, False)
  """
  return all(x in rows for rows in (run.train, run.eval) if rows)


def _check_recorded(runs, x):
  for run in runs:
    if not records(run, x):
      raise ValueError(
        f'{run.path / "metrics.jsonl"} does not record {x!r} with'
        f' every kind of loss; choose another --x: {", ".join(X_AXES)}'
      )


def _set_config_folder():
  """Where matplotlib keeps its font cache, if the home cannot take it."""
  home = os.path.expanduser('~')
  if os.environ.get('MPLCONFIGDIR') or os.access(home, os.W_OK):
    return
  folder = tempfile.mkdtemp(prefix='frugax-matplotlib-')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  os.environ['MPLCONFIGDIR'] = folder
