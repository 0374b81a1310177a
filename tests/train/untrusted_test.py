"""A data set, checkpoint or config from someone else cannot run code."""

import ast
import json
import pathlib
import shutil
import sys

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


_EVIL = {'type': 'data.planted.Text', 'content': {}}
_DICT = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'


def _a_class(key):
  def plant(features, info):
    del info
    text = features['featuresDict']['features']['text']
    del text['pythonClassName']
    text[key] = 'data.planted.Text'

  return plant


def _legacy(features, info):
  del info
  features.clear()
  features |= {'type': _DICT, 'content': {'text': _EVIL}}


def _json_in_a_string(features, info):
  del info
  features.clear()
  text = json.dumps({'text': _EVIL})
  features |= {'pythonClassName': _DICT, 'jsonFeature': {'json': text}}


def _in_the_info(features, info):
  _a_class('pythonClassName')(features, info)
  info['features'] = dict(features)
  features.clear()  # then the file is removed


@pytest.fixture
def plant(data_dir, tmp_path, monkeypatch):
  """(how, layout) -> data directory, the data set's own one; and the trace.

  The code lies in the data, from where the current directory makes it a module.
  """
  trace = tmp_path / 'code was run'

  def make(how, layout='words/1.0.0'):
    (file,) = data_dir.rglob('features.json')
    data = tmp_path / 'data'
    own = data / layout
    shutil.copytree(file.parent, own)
    features = json.loads(file.read_text())
    info = json.loads((own / 'dataset_info.json').read_text())
    how(features, info)
    # Names may be spelled in escapes.
    text = json.dumps(features).replace('lass', r'\u006cass')
    (own / 'features.json').write_text(text)
    if not features:
      (own / 'features.json').unlink()
    (own / 'dataset_info.json').write_text(json.dumps(info))
    (data / 'planted.py').write_text(f'open({str(trace)!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path)
    return data, own

  yield make
  for name in ('data', 'data.planted'):
    sys.modules.pop(name, None)
  assert not trace.exists()


@pytest.mark.parametrize(
  'how',
  [
    _a_class('pythonClassName'),
    _a_class('python_class_name'),
    _legacy,
    _json_in_a_string,
    _in_the_info,
  ],
  ids=['class', 'other spelling', 'legacy', 'JSON in a string', 'info'],
)
def test_a_data_set_does_not_choose_what_is_imported(how, plant):
  data, own = plant(how)
  for name in ('words', 'words:1.0.0', str(own)):
    with pytest.raises(
      ValueError, match=r"class 'data\.planted\.Text', which is not"
    ):
      datasets.documents(name, str(data), 'train', 'text')


@pytest.mark.parametrize(
  ('name', 'layout'),
  [('evil', 'evil/main/1.0.0'), ('evil:1.*.*', 'evil/1.0.0')],
  ids=['default config', 'any version'],
)
def test_nor_does_one_that_only_tfds_would_find(name, layout, plant):
  data, own = plant(_a_class('pythonClassName'), layout)
  if 'main' in layout:
    config = own.parents[1] / '.config'
    config.mkdir()
    default = {'default_config_name': 'main'}
    (config / 'metadata.json').write_text(json.dumps(default))
  with pytest.raises(ValueError, match='is neither the directory of'):
    datasets.documents(name, str(data), 'train', 'text')


def test_nor_one_that_has_the_name_of_code(plant):
  """Of which TFDS reads the features where its code names none."""
  data, _ = plant(_legacy, 'lm1b/main/1.1.0')
  with pytest.raises(ValueError, match=r"class 'data\.planted\.Text'"):
    datasets.documents('lm1b', str(data), 'train', 'text')


def test_features_of_old_data_sets_are_read(plant):
  text = 'tensorflow_datasets.core.features.text_feature.Text'

  def old(features, info):
    del info
    features.clear()
    own = {'text': {'type': text, 'content': {}}}
    features |= {'type': _DICT, 'content': own}

  data, own = plant(old)
  assert len(datasets.documents(str(own), str(data), 'train', 'text')) == 200
