"""Training runs of a study: launched from configs, and not twice.

    from studies import sweep

    runs = [sweep.Run('adamw-1e-3', 'size=tiny,opt=adamw', {'seed': 1})]
    for run, result in zip(runs, sweep.Sweep(workdir, jobs=2).train(runs)):
      ...

`research/` is on the path of an editable install.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from frugax import report

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


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Runs under one folder, `jobs` at a time, each on its own cores."""

  workdir: pathlib.Path
  jobs: int = 1

  def train(self, runs: Sequence[Run]) -> list[report.Run]:
    """Trains those that are not done.

    Args:
      runs: any number of runs.

    Returns:
      What each left in its folder. The loss of one that diverged ends in a
      number that is not finite, and it has no final evaluation.

    Raises:
      SystemExit: a run failed otherwise; the message has the end of its log.
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
      return list(pool.map(self._train, runs))

  def _shares(self):
    """As many parts of the cores as jobs; None where they cannot be parted."""
    if self.jobs == 1 or not hasattr(os, 'sched_setaffinity'):
      return [None] * self.jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i :: self.jobs]) or None for i in range(self.jobs)]

  def _train(self, run):
    folder = self.workdir / run.name
    log = folder / 'log.txt'
    if not (folder / 'summary.json').exists() and not _diverged(log):
      folder.mkdir(parents=True, exist_ok=True)
      with log.open('w') as out:
        code = subprocess.run(
          run.command(self.workdir), stdout=out, stderr=subprocess.STDOUT
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


def origin(runs: Sequence[report.Run]) -> str:
  """One line: which code ran on what."""
  summaries = [r.summary for r in runs if 'commit' in r.summary]
  first = summaries[0]
  commits = ', '.join(sorted({s['commit'][:12] for s in summaries}))
  return (
    f'commit {commits}{" (changed)" * bool(first["dirty"])},'
    f' jax {first["jax"]}, {first["hardware"]["device_kind"]},'
    f' {os.cpu_count()} cores'
  )
