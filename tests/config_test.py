"""Config files, their arguments and the command line."""

import pathlib
import runpy
import subprocess
import sys

import pytest

from frugax import config as fx_config
from frugax import lowbit
from frugax.models import llama

_FILE = str(pathlib.Path(__file__).parents[1] / 'configs' / 'llama.py')


def _parse(*overrides, arguments='size=tiny'):
  argv = [f'--config={_FILE}:{arguments}', '--workdir=w', *overrides]
  return fx_config.parse_command_line(argv, 'test')[0]


def test_arguments_choose_the_presets():
  c = _parse(arguments='size=60m,opt=adamw,matmul=bf16')
  assert (c.model.size, c.optimizer.name, c.steps) == ('60m', 'adamw', 10_000)
  assert c.model.dtype == 'bfloat16'
  assert _parse(arguments='size=60m,matmul=f32').model.dtype == 'float32'


def test_low_bit_matmuls_are_the_recipes_of_the_model():
  c = _parse(arguments='size=60m,matmul=fp4_sim')
  assert c.model.matmul == 'fp4_sim' and c.model.dtype == 'bfloat16'
  fields = c.model.to_dict()
  assert llama.config(fields.pop('size'), **fields).matmul == 'fp4_sim'
  assert 'matmul' not in _parse(arguments='size=60m,matmul=bf16').model
  names = runpy.run_path(_FILE)['_LOW_BIT']
  assert sorted([*names, 'none', 'bf16']) == sorted(lowbit.RECIPES)


@pytest.mark.parametrize(
  ('override', 'key', 'value'),
  [
    ('--config.steps=7', 'steps', 7),
    ('--config.clip_norm=2', 'clip_norm', 2.0),
    ('--config.skip_nonfinite=true', 'skip_nonfinite', True),
    ('--config.data.name=a=b c', 'data.name', 'a=b c'),
    ('--config.optimizer.learning_rate=1e-4', 'optimizer.learning_rate', 1e-4),
    ('--config.optimizer.nesterov=True', 'optimizer.nesterov', True),
    ('--config.model.rope_theta=5e5', 'model.rope_theta', 5e5),
    ('--config.groups.head.match=lm_head', 'groups.head.match', 'lm_head'),
  ],
)
def test_overrides_are_typed(override, key, value):
  node = _parse(override)
  for part in key.split('.'):
    node = node[part]
  assert node == value and type(node) is type(value)


def test_override_takes_its_value_from_the_next_argument():
  assert _parse('--config.steps', '7').steps == 7


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('--config.stepss=7', "unknown config key 'stepss': did you mean 'steps'?"),
    ('--config.data.sed=7', "did you mean 'data.seed'?"),
    ('--config.dat.seed=7', "unknown config key 'dat.seed'"),
    ('--config.steps=1.5', "steps='1.5' is no int; it is 1200 now"),
    ('--config.skip_nonfinite=maybe', "='maybe' is no bool"),
    ('--config.data=7', 'is a section; set one of its keys'),
    ('--config.groups.head=5', 'a group is a section: set groups.head.match'),
    ('--config.steps', 'needs a value'),
    ('--steps=7', "unknown argument '--steps=7'"),
  ],
)
def test_bad_overrides_name_the_way_out(override, message):
  with pytest.raises(fx_config.ConfigError) as e:
    _parse(override)
  assert message in str(e.value)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('sise=60m', "did you mean 'size'?"),
    ('size=61m', "unknown size '61m'"),
    ('matmul=int3', "unknown matmul 'int3'"),
    ('60m', 'not of the form name=value'),
  ],
)
def test_bad_arguments_name_the_way_out(arguments, message):
  with pytest.raises(fx_config.ConfigError) as e:
    _parse(arguments=arguments)
  assert message in str(e.value)


def test_missing_file_is_one_error():
  with pytest.raises(
    fx_config.ConfigError, match=r"'nowhere\.py' does not exist"
  ):
    fx_config.load('nowhere.py:size=tiny')


def test_bad_config_is_one_line_and_exit_code_2(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'frugax.train',
      f'--config={_FILE}:size=tiny',
      f'--workdir={tmp_path}',
      '--config.optimizer.learning_rat=1',
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert "did you mean 'learning_rate'" in done.stderr
