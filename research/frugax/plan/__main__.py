"""python -m frugax.plan --config=configs/llama.py:size=7b --topology=v5e:4x4"""

import argparse
import itertools
import json
import logging
import os
import sys

from frugax import config as fx_config
from frugax.plan import compile as fx_compile
from frugax.plan import search, table, topologies

_HOME = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m frugax.plan',
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description=(
      'Compile the training step of a config for chips that are not here:\n'
      'does it fit, what does it cost. Any value of the config can be set:\n'
      '  --config.batch_size=16 --config.model.remat=inputs'
    ),
  )
  add = parser.add_argument
  add('--config', required=True, metavar='FILE.py[:name=value,...]')
  add(
    '--topology',
    required=True,
    metavar='NAME',
    help='v5e:2x2, v5p:2x2x1, v6e:1x1, h100:8, h200, cpu:8, ...',
  )
  add('--search', choices=search.KINDS, help='find the best that fits')
  add(
    '--compare',
    nargs='+',
    default=[],
    metavar='NAME=A,B,...',
    help='a row for each of these arguments of the config file',
  )
  add('--json', action='store_true', help='JSON on the standard output')
  add('--cache_dir', default=os.path.join(_HOME, 'frugax', 'plan'))
  add('--no_cache', action='store_true', help='compile in any case')
  return parser


def variants(path_and_args: str, compared: list[str]) -> list[tuple[str, str]]:
  """Names and config files of all combinations of what is compared.

  Examples:
    >>> variants('a.py:size=1b', ['opt=adamw,galore'])
    [('opt=adamw', 'a.py:size=1b,opt=adamw'),
     ('opt=galore', 'a.py:size=1b,opt=galore')]
  """
  axes = []
  for item in compared:
    name, equals, values = item.partition('=')
    if not equals or not all(values.split(',')):
      raise fx_config.ConfigError(
        f'--compare {item!r} is not of the form name=value,value'
      )
    axes.append([f'{name}={value}' for value in values.split(',')])
  path, _, given = path_and_args.partition(':')
  found = []
  for chosen in itertools.product(*axes):
    arguments = ','.join(filter(None, (given, *chosen)))
    found.append((' '.join(chosen), f'{path}:{arguments}'))
  return found


def _load(path_and_args, overrides):
  config = fx_config.load(path_and_args)
  fx_config.override_all(config, overrides)
  return config


def run(argv: list[str]) -> None:
  """Plans and prints.

  Args:
    argv: the arguments of the command line.

  Raises:
    ValueError: a config that cannot run, or no such topology.
  """
  args, rest = _parser().parse_known_args(argv)
  topologies.prepare(args.topology)
  configs = [
    (name, _load(path, rest))
    for name, path in variants(args.config, args.compare)
  ]
  if args.search and args.compare:
    raise fx_config.ConfigError('give --search or --compare, not both')

  def planner(config):
    return fx_compile.plan(
      config,
      args.topology,
      cache=None if args.no_cache else args.cache_dir,
      tell=lambda line: print(line, file=sys.stderr, flush=True),
    )

  if args.search:
    tried, best = search.search(
      args.search, configs[0][1], args.topology, planner
    )
    plans = [(t.name, t.plan) for t in tried]
  else:
    plans = [(name, planner(config)) for name, config in configs]
    best = search.Tried('', configs[0][1], plans[0][1])
  if args.json:
    print(json.dumps(_json(args, plans, best), indent=1))
    return
  if args.search or args.compare:
    print(table.many(plans))
    if args.search:
      print(f'\nbest: {best.name}' if best else '\nnothing that fits was found')
  if best and not args.compare:
    flops = fx_compile.model_flops(best.config, best.plan.devices)
    print(table.one(best.plan, flops))


def _json(args, plans, best):
  if args.search:
    return {
      'best': best.name if best else None,
      'tried': {name: plan.to_dict() for name, plan in plans},
    }
  if args.compare:
    return {name: plan.to_dict() for name, plan in plans}
  return plans[0][1].to_dict()


def main(argv: list[str]) -> int:
  """Runs the command; returns the exit status, 2 for a bad argument."""
  logger = logging.getLogger('frugax')
  level = logger.level
  try:
    # What is left to XLA on which chip is part of no table.
    logger.setLevel(logging.ERROR)
    run(argv)
  except ValueError as e:
    if not fx_config.is_ours(e):
      raise
    print(f'error: {e}', file=sys.stderr)
    return 2
  finally:
    logger.setLevel(level)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
