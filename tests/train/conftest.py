"""A data set and a model that take seconds."""

import pathlib
import random

import pytest

from frugax import config as fx_config
from frugax.train import datasets

_ROOT = pathlib.Path(__file__).parents[2]
_SMALL = {
  'model.n_layers': 2,
  'model.dim': 32,
  'model.ffn': 44,
  'model.vocab_size': 264,
  'data.name': 'words',
  'data.sequence_length': 32,
  'batch_size': 8,
  'steps': 6,
  'schedule.warmup_steps': 2,
  'eval.every': 0,
  'eval.tokens': 500,
  'eval.batch_size': 8,
  'checkpoint.every': 100,
  'log.every': 1,
  'log.tensorboard': 'false',
}


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """Documents of 3 to 60 made-up words."""
  draw = random.Random(0)
  words = [
    ''.join(draw.choices('abcdefgh', k=draw.randint(1, 8))) for _ in range(50)
  ]

  def documents(n):
    return [
      {'text': ' '.join(draw.choices(words, k=draw.randint(3, 60)))}
      for _ in range(n)
    ]

  splits = {'train': documents(200), 'validation': documents(20)}
  path = tmp_path_factory.mktemp('data')
  datasets.prepare(
    'words', {k: lambda v=v: v for k, v in splits.items()}, str(path)
  )
  return path


@pytest.fixture
def command_line(data_dir):
  """(workdir, arguments='...', key=value...) -> command-line arguments."""

  def make(workdir, arguments='size=tiny,opt=galore', **overrides):
    values = {**_SMALL, 'data.data_dir': data_dir}
    if 'galore' in arguments:
      values |= {'optimizer.rank': 8, 'optimizer.update_interval': 3}
    values |= {k.replace('__', '.'): v for k, v in overrides.items()}
    return [
      f'--config={_ROOT / "configs" / "llama.py"}:{arguments}',
      f'--workdir={workdir}',
      *(f'--config.{k}={v}' for k, v in values.items()),
    ]

  return make


@pytest.fixture
def make_config(command_line):
  """Like `command_line`, but returns the config."""

  def make(arguments='size=tiny,opt=galore', **overrides):
    argv = command_line('unused', arguments, **overrides)
    return fx_config.parse_command_line(argv, 'test')[0]

  return make
