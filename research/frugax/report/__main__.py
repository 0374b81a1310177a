"""`python -m frugax.report RUN... [--out DIR] [--json]`."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from frugax import report
from frugax.report import curves

_PICTURES = {'tokens': 'loss_by_tokens.png', 'seconds': 'loss_by_time.png'}


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the table, draws the curves.

  Args:
    argv: the arguments of the command line.

  Returns:
    The exit status: 1 if some of the runs could not be read, 2 if none could
    or there is no writing what was asked for.
  """
  parser = _parser()
  args = parser.parse_args(argv)
  if args.x and not args.plot:
    parser.error(
      f'--x={args.x} without --plot: the folder has a picture for each axis but'
      ' step; add --plot=FILE.png'
    )
  runs = []
  for path in args.runs:
    try:
      runs.append(report.read_run(path))
    except (ValueError, OSError) as error:
      print(f'frugax.report: {error}', file=sys.stderr)
  if not runs:
    return 2
  try:
    _show(args, runs)
  except (ValueError, OSError) as error:
    print(f'frugax.report: {error}', file=sys.stderr)
    return 2
  return int(len(runs) < len(args.runs))


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m frugax.report',
    description=(
      'Compare runs: a table, pictures of their loss curves by tokens and by'
      ' time, and all of it as JSON. Nothing is written into the folders of'
      ' the runs.'
    ),
  )
  parser.add_argument(
    'runs', nargs='+', metavar='RUN', help='the --workdir of a training run'
  )
  parser.add_argument(
    '--out',
    metavar='DIR',
    default='report',
    help=f'gets {", ".join(_PICTURES.values())} and report.json'
    ' (default: %(default)s)',
  )
  parser.add_argument(
    '--plot',
    metavar='FILE.png',
    help='write this one picture, along --x, instead of the folder',
  )
  parser.add_argument(
    '--x',
    choices=tuple(curves.X_AXES),
    help='axis of --plot (default: step)',
  )
  only = parser.add_mutually_exclusive_group()
  only.add_argument(
    '--json',
    action='store_true',
    help='JSON on the standard output, and nothing else but what --plot asks',
  )
  only.add_argument('--curves-only', action='store_true', help='print no table')
  return parser


def _show(args, runs):
  if args.json:
    print(report.to_json(runs))
  elif not args.curves_only:
    print(report.table(runs), end='\n\n')
  if args.plot:
    report.plot(runs, args.plot, args.x or 'step')
    if not args.json:
      print(f'loss curves: {args.plot}')
  if args.plot or args.json:
    return
  out = pathlib.Path(args.out)
  for x, name in _PICTURES.items():
    drawn = [run for run in runs if curves.records(run, x)] or runs
    report.plot(drawn, out / name, x)
    print(f'loss curves: {out / name}')
    for run in runs:
      if not curves.records(run, x):
        print(f'  without {run.path}, whose rows do not record {x!r}')
  (out / 'report.json').write_text(report.to_json(runs) + '\n')
  print(f'all of it as JSON: {out / "report.json"}')


if __name__ == '__main__':
  sys.exit(main())
