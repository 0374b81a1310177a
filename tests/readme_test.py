"""What the README says exists, and its example runs."""

import pathlib
import re
import shlex

import jax
import pytest

from frugax import config as fx_config
from frugax.plan import __main__ as plan_command
from frugax.train import step

_ROOT = pathlib.Path(__file__).parents[1]
_TEXT = (_ROOT / 'README.md').read_text()


def test_examples_run(capsys):
  blocks = re.findall(r'```python\n(.*?)```', _TEXT, re.DOTALL)
  assert blocks
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), {})
  assert "'total'" in capsys.readouterr().out


def _commands(module):
  """Arguments of the README's calls of a module."""
  text = _TEXT.replace('\\\n', ' ')
  lines = re.findall(rf'^    python -m {module} (.*)', text, re.MULTILINE)
  assert lines
  return [shlex.split(line) for line in lines]


def test_commands_are_read(monkeypatch):
  monkeypatch.chdir(_ROOT)
  for argv in _commands('frugax.plan'):
    args, rest = plan_command._parser().parse_known_args(argv)
    fx_config.override_all(fx_config.load(args.config), rest)
  found = [
    fx_config.parse_command_line(a, '')[0] for a in _commands('frugax.train')
  ]
  # The one that is for a single chip can run on it.
  (config,) = [c for c in found if c.step == 'layerwise']
  program = step.build(config, jax.devices()[:1])
  length = config.data.sequence_length
  program.layout.check_batch(config.eval.batch_size, length, 'eval')
  assert (config.batch_size, config.eval.batch_size, length) == (1, 1, 2048)


def test_paths_and_targets_exist():
  paths = re.findall(r'\]\(([\w/.]+)\)', _TEXT)
  paths += re.findall(r'^\| `([\w/]+)` \|', _TEXT, re.MULTILINE)
  assert len(paths) > 5
  assert [p for p in paths if not (_ROOT / p).exists()] == []
  targets = set(re.findall(r'^    make ([\w-]+)', _TEXT, re.MULTILINE))
  assert {'train', 'test', 'parity', 'bench'} <= targets
  rules = (_ROOT / 'Makefile').read_text()
  assert [t for t in targets if not re.search(f'^{t}:', rules, re.M)] == []


@pytest.mark.parametrize(
  'path', re.findall(r'`((?:train|models|optim)/[\w/]+\.py)`', _TEXT)
)
def test_the_path_of_a_step_is_there(path):
  assert (_ROOT / 'research' / 'frugax' / path).is_file()
