"""Optimizer memory and peak HBM of LLaMA-60m to 7b, beside published figures.

    make memory-table
    python research/studies/memory_table.py --peaks=1b --methods=adamw,galore

Nothing is trained and no chip is needed. State: the trees of the optimizers
that `configs/llama.py` makes, in the abstract, counted to the byte (bfloat16
weights, as in the papers, so that optax's and our moments are bfloat16 too;
rank 128, 256, 256, 512, 1024; embedding and head are Adam's where the papers'
code has it so). Peak: the real training step, compiled for one v5p chip by
the TPU's compiler (8 sequences of 256 tokens, remat 'full'): what the program
takes of its memory, as `python -m frugax.plan` tells. A peak takes half a
minute to minutes to compile, and is kept in --cache_dir; `--peaks` names the
sizes that get one.
Projectors by an SVD, which that compiler does not finish in half an hour, are
made by the sketch, which holds as much.

Published figures are of weights and state together, in GB (1e9 bytes), and each
has a status. Nominal: computed by its authors from ranks, not what their code
holds; GaLore's and APOLLO's tables leave out a part of the state that their
code has (embedding and head, or the projectors). Recomputed: by the authors of
SCALE, from state. Measured: read from a run, of the state alone.
"""

import os

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU

import argparse
import inspect
import pathlib
import sys

import jax

from frugax import config as fx_config
from frugax import optim
from frugax.models import llama
from frugax.plan import compile as fx_compile
from frugax.train import metrics
from frugax.train import optimizer as fx_optimizer

SIZES = ('60m', '130m', '350m', '1b', '7b')
RANKS = dict(zip(SIZES, (128, 256, 256, 512, 1024), strict=True))
TOPOLOGY = 'v5p:1x1x1'
_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'
_GB, _GIB = 1e9, 2**30

# Row -> what it sets in the config.
METHODS = {
  'adamw': {},
  'adamw, 8 bits': {'state_codec': 'dynamic8'},
  'adamw, 4 bits': {'state_codec': 'dynamic4'},
  'galore': {},
  'galore, 8 bits': {'state_codec': 'dynamic8'},
  'q_galore': {},
  'coap': {},
  'coap, 8 bits': {'state_codec': 'dynamic8'},
  **{
    name: {}
    for name in (
      *('fira', 'flora', 'frugal', 'apollo', 'apollo_mini', 'ldadam'),
      *('subspace_momentum', 'grad_norm_lorp', 'snsm', 'adam_sn', 'adamw_sn'),
      *('adagrad_sn', 'spam', 'stable_spam', 'sgd_sai', 'lamb', 'lisa', 'muon'),
    )
  },
}

# Method -> (status, source, figures by size); GB of weights and state unless
# the status says otherwise.
PUBLISHED = {
  'adamw': (
    ('nominal', 'GaLore', (0.36, 0.76, 2.06, 7.80, None)),
    ('recomputed', 'SCALE', (0.35, 0.81, 2.21, 8.04, None)),
  ),
  'adamw, 8 bits': (('nominal', 'GaLore', (None, None, None, None, 26.0)),),
  'galore': (
    ('nominal', 'GaLore', (0.24, 0.52, 1.22, 4.38, None)),
    ('recomputed', 'SCALE', (0.28, 0.61, 1.59, 4.76, None)),
  ),
  'galore, 8 bits': (('nominal', 'GaLore', (None, None, None, None, 18.0)),),
  'q_galore': (
    ('nominal, int8 weights', 'Q-GaLore', (0.18, 0.39, 0.88, 3.08, 15.0)),
  ),
  'coap': (
    (
      'measured, state',
      'COAP',
      (None, None, None, 1988.34 * 2**20 / _GB, None),
    ),
  ),
  'coap, 8 bits': (
    (
      'measured, state',
      'COAP',
      (None, None, None, None, 5380.51 * 2**20 / _GB),
    ),
  ),
  'apollo': (('nominal', 'APOLLO', (0.24, 0.52, 1.22, 4.38, None)),),
  'apollo_mini': (('nominal', 'APOLLO', (0.12, 0.25, 0.69, 2.60, None)),),
  'stable_spam': (('recomputed', 'SCALE', (0.35, 0.81, 2.21, 8.04, None)),),
  'muon': (('recomputed', 'SCALE', (0.23, 0.54, 1.47, 5.36, None)),),
}


def config_of(method: str, size: str):
  """The config of a cell of the table."""
  name = method.split(',')[0]
  config = fx_config.load(f'{_CONFIG}:size={size},opt={name},data=c4')
  known = inspect.signature(fx_optimizer.find_optimizer(name)).parameters
  with config.optimizer.unlocked(), config.model.unlocked():
    config.optimizer.update(METHODS[method])
    if 'rank' in known and name not in ('apollo_mini', 'frugal'):
      config.optimizer.rank = RANKS[size]
    for argument in ('projector', 'first_projector'):
      if argument in known and known[argument].default == 'svd':
        config.optimizer[argument] = 'sketch'
    config.model.param_dtype = 'bfloat16'
    config.model.remat = 'full'
  config.rounding = 'stochastic'
  config.batch_size = 8
  return config


def state(method: str, size: str) -> tuple[int, dict[str, int]]:
  """Bytes of the weights, and those of the state by category."""
  config = config_of(method, size)
  fields = config.model.to_dict()
  model = llama.Llama(llama.config(fields.pop('size'), **fields))
  shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  tx, _ = fx_optimizer.make_optimizer(config, shapes, model.axes())
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  return weights, optim.state_bytes(tx, shapes)


def peak(method: str, size: str, cache: str) -> fx_compile.Plan:
  """The plan of a cell, compiled if it is not kept."""
  return fx_compile.plan(
    config_of(method, size),
    TOPOLOGY,
    cache,
    tell=lambda line: print(line, file=sys.stderr, flush=True),
  )


def published(method: str, size: str) -> str:
  """What was published of a cell: '0.24 (nominal, GaLore)'."""
  found = []
  for status, source, figures in PUBLISHED.get(method, ()):
    figure = figures[SIZES.index(size)]
    if figure is not None:
      found.append(f'{figure:.2f} ({status}, {source})')
  return '; '.join(found) or '-'


def row(method: str, size: str, cache: str | None) -> str:
  """A line of the table."""
  weights, found = state(method, size)
  projector, moments = found['projector'], found['moments']
  other = found['total'] - projector - moments
  line = (
    f'{method:18s}{found["total"] / _GB:9.3f}{projector / _GB:9.3f}'
    f'{moments / _GB:9.3f}{other / _GB:7.3f}'
    f'{(weights + found["total"]) / _GB:9.3f}'
  )
  if cache is None:
    return f'{line}{"-":>9s}  {published(method, size)}'
  plan = peak(method, size, cache)
  return f'{line}{plan.needed / _GIB:9.3f}  {published(method, size)}'


def main(methods: list[str], sizes: list[str], peaks: list[str], cache: str):
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}; GB are 1e9 bytes, GiB 2**30; bfloat16 weights'
  )
  for size in sizes:
    weights, _ = state('adamw', size)
    print(
      f'\nLLaMA-{size}, rank {RANKS[size]}, weights {weights / _GB:.3f} GB\n'
      f'{"":18s}{"state":>9s}{"project.":>9s}{"moments":>9s}{"other":>7s}'
      f'{"with W":>9s}{"HBM":>9s}  published, weights and state\n'
      f'{"":18s}{"GB":>9s}{"GB":>9s}{"GB":>9s}{"GB":>7s}{"GB":>9s}{"GiB":>9s}'
      '  GB'
    )
    for method in methods:
      print(row(method, size, cache if size in peaks else None), flush=True)
  print(
    f'\nHBM: the whole step on one chip of {TOPOLOGY}, compiled, 8 x 256'
    ' tokens; - where it was not compiled.'
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--methods', help=f'of {"; ".join(METHODS)}; by ;')
  parser.add_argument('--sizes', default=','.join(SIZES))
  parser.add_argument('--peaks', default=','.join(SIZES), help='or none')
  parser.add_argument('--cache_dir', default='.cache/plan')
  arguments = parser.parse_args()
  wanted = arguments.methods.split(';') if arguments.methods else list(METHODS)
  for method in wanted:
    if method not in METHODS:
      raise SystemExit(f'no method {method!r}: {"; ".join(METHODS)}')
  main(
    wanted,
    arguments.sizes.split(','),
    arguments.peaks.split(','),
    arguments.cache_dir,
  )
