"""A data set, checkpoint or config from someone else cannot run code."""

import ast
import json
import pathlib
import shutil

import pytest

from frugax.train import datasets

_PACKAGE = pathlib.Path(datasets.__file__).parents[1]
# What makes code of data. (No module for pickles is imported: layering_test.)
_CALLS = {'eval', 'exec', 'compile', '__import__'}


def _found(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      name = node.func.id if isinstance(node.func, ast.Name) else None
      if name in _CALLS:
        yield name
      yield from (k.arg for k in node.keywords if k.arg == 'allow_pickle')


def test_nothing_makes_code_of_data():
  files = sorted(_PACKAGE.rglob('*.py'))
  assert len(files) > 100
  for file in files:
    tree = ast.parse(file.read_text(encoding='utf-8'))
    assert not list(_found(tree)), file
  for bad in ('eval(x)', 'np.load(f, allow_pickle=True)'):
    assert list(_found(ast.parse(bad)))


@pytest.mark.parametrize('key', ['pythonClassName', 'python_class_name'])
def test_a_data_set_does_not_choose_what_is_imported(
  key, data_dir, tmp_path, monkeypatch
):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  (file,) = copy.rglob('features.json')
  features = json.loads(file.read_text())
  text = features['featuresDict']['features']['text']
  del text['pythonClassName']
  text[key] = 'planted.Text'
  # Names may be spelled in escapes.
  file.write_text(json.dumps(features).replace('lass', r'\u006cass'))
  (tmp_path / 'planted.py').write_text('raise SystemExit("code was run")')
  monkeypatch.syspath_prepend(tmp_path)
  for name in ('words', str(file.parent)):
    with pytest.raises(
      ValueError, match=r"class 'planted\.Text', which is not"
    ):
      datasets.documents(name, str(copy), 'train', 'text')
