"""What the README says exists, and its example runs."""

import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_TEXT = (_ROOT / 'README.md').read_text()


def test_examples_run(capsys):
  blocks = re.findall(r'```python\n(.*?)```', _TEXT, re.DOTALL)
  assert blocks
  for block in blocks:
    exec(compile(block, 'README.md', 'exec'), {})
  assert "'total'" in capsys.readouterr().out


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
