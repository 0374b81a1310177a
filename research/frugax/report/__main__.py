"""`python -m frugax.report RUN... [--plot FILE.png] [--x tokens]`."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from frugax import report
from frugax.report import curves


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the table, draws the curves; 2 if there is nothing to read."""
  parser = argparse.ArgumentParser(
    prog='python -m frugax.report',
    description='Compare runs: a table and a picture of their loss curves.',
  )
  parser.add_argument(
    'runs', nargs='+', metavar='RUN', help='the --workdir of a training run'
  )
  parser.add_argument(
    '--plot',
    metavar='FILE.png',
    help='the picture (default: RUN/loss.png; of several runs, loss.png)',
  )
  parser.add_argument(
    '--x', choices=tuple(curves.X_AXES), default='step', help='horizontal axis'
  )
  parser.add_argument(
    '--curves-only', action='store_true', help='print no table'
  )
  args = parser.parse_args(argv)
  folder = pathlib.Path(args.runs[0] if len(args.runs) == 1 else '.')
  picture = args.plot or folder / 'loss.png'
  try:
    runs = [report.read_run(path) for path in args.runs]
    if not args.curves_only:
      print(report.table(runs), end='\n\n')
    report.plot(runs, picture, args.x)
  except (ValueError, OSError) as error:
    print(f'frugax.report: {error}', file=sys.stderr)
    return 2
  print(f'loss curves: {picture}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
