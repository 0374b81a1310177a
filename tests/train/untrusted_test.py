"""A data set, checkpoint or config from someone else cannot run code."""

import ast
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from frugax.models import llama
from frugax.models.llama import model as llama_model
from frugax.train import datasets

_PACKAGE = pathlib.Path(datasets.__file__).parents[1]
# What makes code of data, called by name or as an attribute of anything...
_CALLS = {
  *('eval', 'exec', '__import__', 'import_module', 'exec_module'),
  *('load_module', 'run_path', 'run_module', 'read_pickle', 'Unpickler'),
}
# ... by name alone (re.compile is another) ...
_NAMES = {'compile'}
# ... and all that these modules have. (Of those for pickles layering_test
# forbids the import.)
_MODULES = {
  *('pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'shelve'),
  *('marshal', 'runpy', 'torch'),
}

_ALLOWED = {
  ('__init__.py', 'import_module'): 'one of its own parts, of a list there',
  ('config.py', 'exec_module'): 'a config is a program, as launch/README says',
}


def _found(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from _MODULES & {a.name.split('.')[0] for a in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level:
      yield from _MODULES & {node.module.split('.')[0]}
    if not isinstance(node, ast.Call):
      continue
    yield from (k.arg for k in node.keywords if k.arg == 'allow_pickle')
    names = [n.id for n in ast.walk(node.func) if isinstance(n, ast.Name)]
    if isinstance(node.func, ast.Name):
      name, others = node.func.id, _NAMES
    elif isinstance(node.func, ast.Attribute):
      name, others = node.func.attr, set()
      yield from _MODULES & set(names[:1])
    else:
      continue
    constant = node.args and isinstance(node.args[0], ast.Constant)
    if name in _CALLS | others and not (constant and name == 'import_module'):
      yield name


def test_nothing_makes_code_of_data():
  files = sorted(_PACKAGE.rglob('*.py'))
  assert len(files) > 100
  found = {
    (str(file.relative_to(_PACKAGE)), what)
    for file in files
    for what in _found(ast.parse(file.read_text(encoding='utf-8')))
  }
  assert found == set(_ALLOWED)


@pytest.mark.parametrize(
  ('source', 'bad'),
  [
    ('eval(x)', True),
    ('builtins.exec(x)', True),
    ('compile(x, "", "eval")', True),
    ('re.compile(x)', False),
    ('ast.literal_eval(x)', False),
    ('importlib.import_module(x)', True),
    ('importlib.import_module(f"a.{x}")', True),
    ('importlib.import_module("a.b")', False),
    ('import_module(x)', True),
    ('spec.loader.exec_module(m)', True),
    ('pickle.load(f)', True),
    ('pickle.Unpickler(f).load()', True),
    ('marshal.loads(x)', True),
    ('from marshal import loads', True),
    ('import runpy', True),
    ('pandas.read_pickle(f)', True),
    ('torch.load(f)', True),
    ('np.load(f, allow_pickle=True)', True),
    ('np.load(f)', False),
    ('json.load(f)', False),
  ],
)
def test_code_made_of_data_is_seen(source, bad):
  assert bool(list(_found(ast.parse(source)))) == bad


def test_weights_that_are_pickles_are_not_opened(tmp_path):
  """Next to safetensors they are left alone, without them refused."""
  trace = tmp_path / 'code was run'
  own = llama.LlamaConfig(
    vocab_size=32, dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn=24,
    rope_theta=1e4, norm_eps=1e-5, max_positions=8,
  )  # fmt: skip
  shapes = llama_model.shapes(own)
  folder = tmp_path / 'model'
  llama.to_hf(
    folder, own, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  )
  # A pickle: import os.system, call it.
  code = b'cposix\nsystem\n(S\'touch "' + str(trace).encode() + b'"\'\ntR.'
  for name in ('pytorch_model.bin', 'model.pt', 'model.ckpt', 'training.pkl'):
    (folder / name).write_bytes(code)
  llama.from_hf(folder)
  (folder / 'model.safetensors').write_bytes(code)
  with pytest.raises(ValueError, match=r'model.safetensors is damaged'):
    llama.from_hf(folder)
  (folder / 'model.safetensors').unlink()
  with pytest.raises(ValueError, match=r'\.bin pickles, which run code'):
    llama.from_hf(folder)
  assert not trace.exists()


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
