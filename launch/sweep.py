#!/usr/bin/env python3
"""Runs a training command for each point of a sweep, by any of the launchers.

A sweep is a Python file with a function `sweep()` that yields one dict a point:

    def sweep():
      for rank in (8, 16, 32):
        yield {
          'config': 'configs/llama.py:size=tiny,opt=galore',
          'optimizer.rank': rank,  # --config.optimizer.rank=8
        }

    launch/sweep.py print FILE.py --workdir=runs/rank   one command a point
    launch/sweep.py run   FILE.py --workdir=runs/rank   one after the other
    launch/sweep.py table FILE.py --workdir=runs/rank   the results so far

A point's folder is its `name`, if it has one, or else tells its values. One
that has its summary.json is done and is left out, unless it is to take more
steps: give the same command again after a failure, or after adding points. (Of
a workdir in a bucket all that is beside the checkpoints is copied to .cache
first, by print as well: by what is there now all steps say what is left.)
Options after -- go to the launcher, which is launch/local.sh unless --launcher
says another:

    launch/sweep.py run FILE.py --workdir=runs/rank \\
      --launcher=launch/slurm.sbatch -- --nodes=1 --gpus-per-node=8
    launch/sweep.py run FILE.py --workdir=gs://BUCKET/rank --jobs=4 \\
      --launcher='launch/tpu_vm.sh all' -- --topology=v5e:2x2 --zone=us-west4-a

A sweep is code: run only those that you have read.
"""

import argparse
import concurrent.futures
import difflib
import hashlib
import itertools
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CACHE = _ROOT / '.cache' / 'sweeps'  # copies of what is in buckets
_FOLDER = r'[A-Za-z0-9][-\w.=,+]*'  # the name of a point's
_LONGEST = 60  # letters of a folder's name
# What gcloud says of a folder that a bucket has not.
_NO_FOLDER = 'Did not find existing container at'


class Point(NamedTuple):
  """A point: the name of its folder and the trainer's arguments."""

  name: str
  arguments: tuple[str, ...]
  steps: int | None  # what the point itself asks for


def points(path: str) -> list[Point]:
  """The points of a sweep, checked.

  Args:
    path: the file that defines `sweep()`.

  Returns:
    The points, in order.

  Raises:
    ValueError: no such file or function; a point without a config, or with the
      name of another.
  """
  if not os.path.isfile(path):
    raise ValueError(f'sweep file {path!r} does not exist')
  sweep = runpy.run_path(path).get('sweep')
  if not callable(sweep):
    raise ValueError(
      f'{path} defines no sweep(), which yields one dict a point'
    )
  found = [_point(values, i) for i, values in enumerate(sweep())]
  seen = {}
  for i, point in enumerate(found):
    if point.name in seen:
      raise ValueError(
        f'points {seen[point.name]} and {i} are both {point.name!r}: give one'
        " of them another 'name', or leave it out"
      )
    seen[point.name] = i
  return found


def _point(values: Mapping[str, Any], index: int) -> Point:
  if not isinstance(values, Mapping) or 'config' not in values:
    raise ValueError(
      f"point {index} of the sweep has no 'config': yield a dict such as"
      " {'config': 'configs/llama.py:size=tiny', 'optimizer.rank': 8}, not"
      f' {values!r}'
    )
  config, name = values['config'], values.get('name')
  if not isinstance(config, str):
    raise ValueError(
      f"point {index} of the sweep: 'config' is {config!r}; give a text such as"
      " 'configs/llama.py:size=tiny'"
    )
  rest = {k: v for k, v in values.items() if k not in ('config', 'name')}
  for key in rest:
    if not re.fullmatch(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*', str(key)):
      raise ValueError(
        f'point {index} of the sweep: {key!r} is no field of a config; one is'
        " 'optimizer.rank'"
      )
  arguments = [f'--config={config}']
  arguments += [f'--config.{k}={text(v)}' for k, v in rest.items()]
  if name is None:
    name = _name(config, rest)
  if not (isinstance(name, str) and re.fullmatch(_FOLDER, name)):
    raise ValueError(
      f'point {index} of the sweep: {name!r} is no name for a folder; use'
      ' letters, digits and - _ . = , +'
    )
  return Point(name, tuple(arguments), _steps(rest.get('steps')))


def _steps(value: Any) -> int | None:
  """What --config.steps is given, as a number; None if it is not given."""
  if value is None or re.fullmatch(r'\d+', text(value)):
    return None if value is None else int(value)
  raise ValueError(f'steps is {value!r}: give a whole number, as 100')


def text(value: Any) -> str:
  """A value as the trainer reads it.

  Examples:
    >>> [text(v) for v in (True, 1e-3, 'a b', [['mlp/down', 'int8']])]
    ['true', '0.001', 'a b', "[['mlp/down', 'int8']]"]
  """
  if isinstance(value, bool):
    return str(value).lower()
  return value if isinstance(value, str) else repr(value)


def _name(config: str, values: Mapping[str, Any]) -> str:
  """A folder's name that tells the values, and tells them apart."""
  arguments = config.partition(':')[2]
  parts = [re.sub(r'\w+=', '', arguments)]
  parts += [f'{k.rpartition(".")[2]}={text(v)}' for k, v in values.items()]
  plain = ','.join(filter(None, parts))
  name = re.sub(r'[^-\w.=,+]+', '_', plain).strip('_.,=+-')[:_LONGEST]
  if name and name == plain:
    return name
  digest = hashlib.sha256(repr((config, values)).encode()).hexdigest()[:6]
  return f'{name or "point"}-{digest}'


def is_done(
  folder: pathlib.Path, point: Point, options: Sequence[str] = ()
) -> bool:
  """Whether the run of a point has taken all of its steps.

  Args:
    folder: that of all points.
    point: whose steps, if it asks for any, are those to be taken.
    options: the launcher's, among which --config.steps may be.
  """
  try:
    summary = json.loads((folder / point.name / 'summary.json').read_bytes())
  except (OSError, ValueError):
    return False
  if not isinstance(summary, dict):  # as good as none
    return False
  asked = point.steps
  if asked is None:
    asked = _asked(options)
  taken = summary.get('steps', 0)
  return asked is None or (isinstance(taken, int | float) and taken >= asked)


def _asked(options: Sequence[str]) -> int | None:
  """The steps that options of a launcher ask for."""
  steps = None
  for word, after in itertools.pairwise([*options, '']):
    key, equals, value = word.partition('=')
    if key == '--config.steps':
      steps = _steps(value if equals else after)
  return steps


def command(
  point: Point, workdir: str, launcher: str, options: Sequence[str]
) -> list[str]:
  """What trains a point."""
  return [
    *shlex.split(launcher),
    *options,
    f'--workdir={workdir}/{point.name}',
    *point.arguments,
  ]


def line(words: Sequence[str]) -> str:
  """A command as one line that bash reads back word for word.

  Examples:
    >>> print(line(['echo', "it's", 'two\\nlines']))
    echo 'it'"'"'s' $'two\\nlines'
  """
  return ' '.join(
    f"$'{_escaped(word)}'" if re.search(r'[\x00-\x1f]', word) else quoted
    for word, quoted in zip(words, map(shlex.quote, words), strict=True)
  )


def _escaped(word: str) -> str:
  return re.sub(
    r"[\x00-\x1f\\']", lambda m: f'\\x{ord(m[0]):02x}', word
  ).replace(r'\x0a', r'\n')


def _python() -> str:
  """The interpreter that has the package, as the launchers find it."""
  venv = _ROOT / '.venv' / 'bin' / 'python'
  fallback = str(venv) if venv.exists() else sys.executable
  return os.environ.get('PYTHON') or fallback


def _local(workdir: str) -> pathlib.Path:
  """The folder, or a copy of what a bucket now has beside the checkpoints."""
  if not workdir.startswith('gs://'):
    return pathlib.Path(workdir)
  place = workdir.removeprefix('gs://')
  if not re.fullmatch(r'[a-z0-9][-\w.]+/.+', place) or {'', '.', '..'} & set(
    place.split('/')
  ):
    raise ValueError(f'--workdir={workdir}: give gs://BUCKET/DIR')
  folder = _CACHE / place
  folder.mkdir(parents=True, exist_ok=True)
  try:
    copied = subprocess.run(
      _copy(workdir, folder), capture_output=True, text=True
    )
  except FileNotFoundError:
    raise ValueError(
      f'cannot read {workdir}: there is no gcloud on the PATH; install'
      " Google's Cloud SDK"
    ) from None
  if copied.returncode:
    if _NO_FOLDER not in copied.stderr:
      raise ValueError(f'cannot read {workdir}: {copied.stderr.strip()}')
    # A bucket without the folder is one that no point has reached yet.
    shutil.rmtree(folder)
  return folder


def _copy(workdir: str, folder: pathlib.Path) -> tuple[str, ...]:
  return (
    *('gcloud', 'storage', 'rsync', '--recursive', '--quiet'),
    # A run that was deleted there is to be run again.
    '--delete-unmatched-destination-objects',
    *('--exclude=.*(checkpoints|tensorboard)/.*', workdir, str(folder)),
  )


def _run(commands: Sequence[Sequence[str]], jobs: int) -> Iterator[int]:
  """Their exit statuses, as they end; none begins after Ctrl-C."""
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    futures = [pool.submit(subprocess.call, c) for c in commands]
    try:
      for future in concurrent.futures.as_completed(futures):
        yield future.result()
    finally:
      pool.shutdown(cancel_futures=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    prog='launch/sweep.py',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('step', help='print, run or table')
  parser.add_argument('file', metavar='FILE.py')
  parser.add_argument('--workdir', required=True, help='of all points together')
  parser.add_argument(
    '--launcher',
    default=shlex.quote(str(_ROOT / 'launch' / 'local.sh')),
    help='what starts a run, with its step if it has any, as a shell reads it',
  )
  parser.add_argument(
    '--jobs', type=int, default=1, help='how many points to run at once'
  )
  parser.add_argument(
    '--dry-run', action='store_true', help='of run: the same as print'
  )
  at = argv.index('--') if '--' in argv else len(argv)
  args = parser.parse_args(argv[:at])
  steps = ('print', 'run', 'table')
  if args.step not in steps:
    near = difflib.get_close_matches(args.step, steps, n=1, cutoff=0)[0]
    raise ValueError(
      f'unknown step {args.step!r}: did you mean {near!r}? Valid: '
      + ', '.join(steps)
    )
  if args.jobs < 1:
    raise ValueError(f'--jobs={args.jobs}: give 1 or more')
  try:
    program, *_ = shlex.split(args.launcher)
  except ValueError:  # nothing, or a quote that is not closed
    program = ''
  if not shutil.which(program):
    raise ValueError(
      f'--launcher={args.launcher!r}: there is no such program; one is'
      " 'launch/tpu_vm.sh all'"
    )
  args.workdir = args.workdir.rstrip('/')
  return args, list(argv[at + 1 :])


def main(argv: Sequence[str]) -> int:
  """Returns the exit status: 1 if a point failed, 2 if the sweep is wrong."""
  try:
    args, options = _parse(argv)
    found = points(args.file)
    _asked(options)
    printing = args.step == 'print' or args.dry_run
    folder = _local(args.workdir)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if args.step == 'table':
    begun = [
      str(folder / p.name)
      for p in found
      if (folder / p.name / 'metrics.jsonl').exists()
    ]
    if not begun:
      print(f'error: no point of {args.workdir} has begun', file=sys.stderr)
      return 2
    picture = f'--plot={folder / "loss.png"}'
    report = [_python(), '-m', 'frugax.report', *begun, picture]
    return subprocess.call(report)
  left = [p for p in found if not is_done(folder, p, options)]
  commands = [command(p, args.workdir, args.launcher, options) for p in left]
  if printing:
    for words in commands:
      print(line(words))
    return 0
  print(f'{len(left)} of {len(found)} points are left', file=sys.stderr)
  failed = sum(status != 0 for status in _run(commands, args.jobs))
  if failed:
    print(f'error: {failed} points have failed', file=sys.stderr)
  return int(failed > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
