"""The notebooks: what lies in git, how they install, and that they run."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
COLABS = ROOT / 'colabs'
NAMES = ('low_bit_matmul', 'optimizers', 'plan_and_read_runs')


def _cells(name, kind='code'):
  cells = json.loads((COLABS / f'{name}.ipynb').read_text())['cells']
  return [cell for cell in cells if cell['cell_type'] == kind]


def _source(cell):
  return ''.join(cell['source'])


def test_all_notebooks_are_here():
  assert sorted(path.stem for path in COLABS.glob('*.ipynb')) == [*NAMES]


@pytest.mark.parametrize('name', NAMES)
def test_no_output_is_in_git(name):
  nbformat.validate(json.loads((COLABS / f'{name}.ipynb').read_text()))
  for cell in _cells(name):
    assert cell['outputs'] == []
    assert cell['execution_count'] is None
    assert set(cell['metadata']) <= {'tags', 'cellView'}


@pytest.mark.parametrize('name', NAMES)
def test_cells_have_names_that_stay(name):
  ids = [c['id'] for kind in ('code', 'markdown') for c in _cells(name, kind)]
  assert len(ids) == len({*ids})
  assert [i for i in ids if not re.fullmatch(r'[a-z]+(_[a-z]+)*', i)] == []


@pytest.mark.parametrize('name', NAMES)
def test_the_text_promises_no_result(name):
  """Numbers of a run belong into its output."""
  text = '\n'.join(_source(cell) for cell in _cells(name, 'markdown'))
  assert re.findall(r'\d+\.\d+|\d+ ?%', text) == []


def test_all_install_in_the_same_way():
  first = {_source(_cells(name)[0]) for name in NAMES}
  assert len(first) == 1


def _install(monkeypatch, folder, values=(), installed=False):
  """Runs the first cell; returns the commands that it would have run."""
  monkeypatch.chdir(folder)
  commands = []
  monkeypatch.setattr(subprocess, 'run', lambda c, check: commands.append(c))
  if not installed:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  source = _source(_cells('optimizers')[0])
  for name, value in dict(values).items():
    changed = re.sub(
      f"^{name} = '.*?'", f'{name} = {value!r}', source, flags=re.M
    )
    assert changed != source
    source = changed
  exec(compile(source, 'install', 'exec'), {})
  return commands


def test_where_frugax_is_nothing_is_installed(monkeypatch, tmp_path):
  assert _install(monkeypatch, tmp_path, installed=True) == []


@pytest.mark.parametrize(
  ('python', 'pins'),
  [((3, 11, 9), 'py311'), ((3, 12, 3), 'py312'), ((3, 13, 0), 'py312')],
)
def test_it_is_installed_at_a_commit_with_pinned_versions(
  monkeypatch, tmp_path, python, pins
):
  monkeypatch.setattr(sys, 'version_info', python)
  values = {'REPOSITORY': 'https://x/y', 'COMMIT': 'v1', 'EXTRA': 'tpu'}
  clone, checkout, pip = _install(monkeypatch, tmp_path, values)
  assert clone[-2:] == ('https://x/y', 'frugax_source')
  assert checkout == ('git', '-C', 'frugax_source', 'checkout', '--quiet', 'v1')
  assert pip[:4] == (sys.executable, '-m', 'pip', 'install')
  assert './frugax_source[tpu]' in pip
  (constraint,) = [a for a in pip if a.startswith('--constraint=')]
  path = constraint.removeprefix('--constraint=frugax_source/')
  assert path == f'launch/constraints/{pins}.txt' and (ROOT / path).is_file()


def test_an_installation_that_was_interrupted_goes_on(monkeypatch, tmp_path):
  (tmp_path / 'frugax_source').mkdir()
  checkout, pip = _install(monkeypatch, tmp_path)
  assert 'checkout' in checkout and './frugax_source' in pip


def test_without_a_repository_it_says_so(monkeypatch, tmp_path):
  with pytest.raises(ValueError, match='REPOSITORY is empty'):
    _install(monkeypatch, tmp_path)


def test_every_picture_is_that_of_a_cell():
  tagged = {
    f'{name}_{cell["id"]}.png'
    for name in NAMES
    for cell in _cells(name)
    if 'picture' in cell['metadata'].get('tags', ())
  }
  assert {path.name for path in (COLABS / 'pictures').iterdir()} == tagged


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_it_runs_from_start_to_end(tmp_path, name):
  """That it does so in 4 minutes on a CPU of its own is not tested.

  `render.py` prints the seconds that it took, for whoever runs it to judge; the
  limit here only ends what hangs, as other work may share the machine.
  """
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  subprocess.run(
    [sys.executable, COLABS / 'render.py', name, f'--out={tmp_path}'],
    env=environment,
    check=True,
    timeout=1800,
  )
  kept = {path.name for path in (COLABS / 'pictures').glob(f'{name}_*')}
  assert {path.name for path in tmp_path.iterdir()} == kept
