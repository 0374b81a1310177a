"""python -m frugax.train --config=configs/llama.py:size=tiny --workdir=DIR"""

import os
import sys

from absl import logging

from frugax import config as fx_config
from frugax.train import loop, processes


def main(argv: list[str]) -> int:
  """Trains; returns the exit status.

  1 is a failed run, 2 a bad config, 134 a process that lost another one.
  """
  logging.set_verbosity(logging.FATAL)  # what Orbax and TFDS tell, we do
  try:
    config, args = fx_config.parse_command_line(argv, 'python -m frugax.train')
    processes.join()
    loop.train(config, args.workdir, command=_command(argv))
  except loop.CannotGoOn as e:
    print(f'error: {e}', file=sys.stderr)
    return e.status
  except ValueError as e:
    if not fx_config.is_ours(e):
      raise
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 0


def _command(argv):
  """The command line of this run, for the same folder."""
  python = os.path.relpath(sys.executable)
  if python.startswith(os.pardir):
    python = sys.executable
  return [python, '-m', 'frugax.train', *argv]


if __name__ == '__main__':
  processes.run(main, sys.argv[1:])
