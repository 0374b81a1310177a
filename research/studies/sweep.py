"""Training runs of a study: launched from configs, and not twice.

    from studies import sweep

    runs = [sweep.Run('adamw-1e-3', 'size=tiny,opt=adamw', {'seed': 1})]
    for run, result in zip(runs, sweep.Sweep(workdir, jobs=2).train(runs)):
      ...

`Results` keeps their validation losses in a file that outlives the folders.

`research/` is on the path of an editable install.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from frugax import config as fx_config
from frugax import report
from frugax.train import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
_NOT_FINITE = 'is not finite: loss'  # in what a run that diverged prints last


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    name: of its folder.
    arguments: of configs/llama.py, what stands after the colon.
    values: overrides, {'optimizer.b1': 0.9}.
  """

  name: str
  arguments: str
  values: Mapping[str, Any]

  def command(self, workdir: pathlib.Path) -> list[str]:
    """The command line."""
    return [
      *(sys.executable, '-m', 'frugax.train'),
      f'--config={ROOT}/configs/llama.py:{self.arguments}',
      f'--workdir={workdir / self.name}',
      *(f'--config.{k}={v}' for k, v in self.values.items()),
    ]

  def config(self) -> ml_collections.ConfigDict:
    """Its config, for what is done in this process."""
    config = fx_config.load(f'{ROOT}/configs/llama.py:{self.arguments}')
    for key, value in self.values.items():
      fx_config.override(config, key, str(value))
    return config


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Runs under one folder, `jobs` at a time, each on its own core.

  Attributes:
    workdir: has a folder for each run.
    jobs: runs at a time.
  """

  workdir: pathlib.Path
  jobs: int = 1

  def train(self, runs: Iterable[Run]) -> Iterator[report.Run]:
    """Trains those that are not done.

    Args:
      runs: any number of runs.

    Yields:
      What each left in its folder, in their order. The loss of one that
      diverged ends in a number that is not finite, and it has no final
      evaluation.

    Raises:
      SystemExit: a run failed otherwise; the message has the end of its log.
    """
    return self.each(self._train, runs)

  def each(
    self, function: Callable[[Run], Any], runs: Iterable[Run]
  ) -> Iterator[Any]:
    """Calls a function, which may start processes, on cores as `train` does.

    Args:
      function: takes a run.
      runs: any number of runs.

    Yields:
      What it returns, in the order of the runs.
    """
    os.environ.setdefault(
      'JAX_COMPILATION_CACHE_DIR', str(self.workdir.resolve() / 'jax_cache')
    )
    cores = queue.SimpleQueue()
    for share in self._shares():
      cores.put(share)

    def settle():
      # A run inherits the cores of the thread that starts it.
      if share := cores.get():
        os.sched_setaffinity(0, share)

    with concurrent.futures.ThreadPoolExecutor(
      self.jobs, initializer=settle
    ) as pool:
      yield from pool.map(function, runs)

  def done(self, run: Run) -> bool:
    """Whether a run came to its end, be it that it diverged."""
    folder = self.workdir / run.name
    return (folder / 'summary.json').exists() or _diverged(folder / 'log.txt')

  def _shares(self):
    """A core for each job, so that numbers are the same on larger machines.

    None, all of them, for one job alone, which may have a GPU to feed, and
    where processes cannot be bound.
    """
    if self.jobs == 1 or not hasattr(os, 'sched_setaffinity'):
      return [None] * self.jobs
    cores = sorted(os.sched_getaffinity(0))
    return [{cores[i % len(cores)]} for i in range(self.jobs)]

  def _train(self, run):
    folder = self.workdir / run.name
    log = folder / 'log.txt'
    if not self.done(run):
      folder.mkdir(parents=True, exist_ok=True)
      with log.open('w') as out:
        code = subprocess.run(
          run.command(self.workdir),
          stdout=out,
          stderr=subprocess.STDOUT,
        ).returncode
      if code and not _diverged(log):
        raise SystemExit(
          f'{run.name} failed ({log}):\n{log.read_text()[-2000:]}'
        )
    result = report.read_run(folder)
    said = 'diverged'
    if not _diverged(log):
      said = f'{result.summary["eval_loss"]:.4f}'
    print(f'{run.name}: {said}', file=sys.stderr, flush=True)
    return result


def _diverged(log):
  return log.exists() and _NOT_FINITE in log.read_text()


@dataclasses.dataclass(frozen=True)
class Result:
  """What a file keeps of a run.

  Attributes:
    origin: which code ran on what.
    eval_step: the steps after which the validation loss was taken.
    eval_loss: that loss, where it was finite.
  """

  origin: str
  eval_step: list[float]
  eval_loss: list[float]

  @classmethod
  def of_run(cls, run: report.Run) -> 'Result':
    """What is kept of a run that is done."""
    steps = run.eval.get('step', np.zeros(0))
    losses = run.eval.get('eval_loss', np.zeros(0))
    finite = np.isfinite(losses)
    return cls(
      origin([run]),
      steps[finite].tolist(),
      [round(loss, 5) for loss in losses[finite].tolist()],
    )


Key = tuple[str | float, ...]


class Results:
  """Results by key, in a JSON file that spares their runs another time.

  Args:
    path: the file; read if it is there.
    fields: what a key consists of.
    run: the run of a key.
    sweep: what trains them.
    kind: what is kept of each, a dataclass with `of_run`.
  """

  def __init__(
    self,
    path: pathlib.Path,
    fields: Sequence[str],
    run: Callable[[Key], Run],
    sweep: Sweep,
    kind: type[Result] = Result,
  ):
    self._path, self._fields = path, fields
    self._run, self._sweep, self._kind = run, sweep, kind
    self.of: dict[Key, Result] = {}
    rows = read_json(path, [])
    try:
      for row in rows:
        key = tuple(row.pop(field) for field in fields)
        self.of[key] = kind(**row)
    except (AttributeError, KeyError, TypeError) as error:
      raise SystemExit(
        f'{path} has a row that is no {kind.__name__} ({error!r}): move it'
        ' away, and the runs whose folders are still there are read anew'
      ) from None

  def get(self, keys: Iterable[Key], train: bool = True) -> None:
    """Adds the results of keys; those without a run only if it may train."""
    runs = {key: self._run(key) for key in keys if not self.known(key)}
    if not train:
      runs = {key: run for key, run in runs.items() if self._sweep.done(run)}
    results = self._sweep.train(runs.values())
    for key, result in zip(runs, results, strict=True):
      self.of[key] = self._kind.of_run(result)
      self._save()

  def known(self, key: Key) -> bool:
    """Whether the result of a key is there, and not of another config."""
    digest = getattr(self.of.get(key), 'digest', '')
    return key in self.of and self._run(key).name.endswith(digest)

  def origins(self, keys: Iterable[Key]) -> list[str]:
    """One line for each code: how many of the runs it ran."""
    return counted(self.of[key].origin for key in keys)

  def _save(self):
    rows = [
      dict(zip(self._fields, key, strict=True)) | dataclasses.asdict(result)
      for key, result in self.of.items()
    ]
    write_json(self._path, rows)


def counted(origins: Iterable[str]) -> list[str]:
  """How many runs are of each.

  Examples:
    >>> counted(['commit a', 'commit b', 'commit a'])
    ['2 runs of commit a', '1 runs of commit b']
  """
  counts = collections.Counter(origins)
  return [f'{count} runs of {origin}' for origin, count in counts.items()]


def read_json(path: pathlib.Path, default: Any) -> Any:
  """What a file holds, or the default where there is none.

  Raises:
    SystemExit: the file holds something else than JSON.
  """
  if not path.exists():
    return default
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise SystemExit(
      f'{path} cannot be read ({error}): move it away, and the runs whose'
      ' folders are still there are read anew'
    ) from None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file as a whole: one that is there stays whole until then."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix('.new')
  new.write_text(json.dumps(value, indent=1) + '\n')
  new.replace(path)


def parser(description: str) -> argparse.ArgumentParser:
  """The arguments that studies of many runs share.

  Args:
    description: of which the first line is shown.
  """
  made = argparse.ArgumentParser(description=description.splitlines()[0])
  made.add_argument('workdir', type=pathlib.Path)
  made.add_argument('--data_dir', default='data')
  made.add_argument(
    '--jobs',
    type=int,
    default=2,
    help='runs at a time, each on its own core; 1: with all cores',
  )
  made.add_argument(
    '--report', action='store_true', help='train nothing, tell what is there'
  )
  return made


def here() -> str:
  """Which code this is, on what: of what is measured in this process."""
  info = metrics.run_info()
  return _origin([info['commit']], info)


def origin(runs: Sequence[report.Run]) -> str:
  """One line: which code ran on what."""
  summaries = [r.summary for r in runs if 'commit' in r.summary]
  if not summaries:
    return 'a commit unknown, as they diverged'
  return _origin([s['commit'] for s in summaries], summaries[0])


def _origin(commits, first):
  names = ', '.join(sorted({commit[:12] for commit in commits}))
  return (
    f'commit {names}{" (changed)" * bool(first["dirty"])},'
    f' python {first["python"]}, jax {first["jax"]},'
    f' {first["hardware"]["device_kind"]}, {os.cpu_count()} cores'
  )
