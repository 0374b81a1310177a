"""The rules that keep the package readable, checked on its syntax trees.

What each layer may import is one table below; a new dependency is one word in
it. The checkers are tested on sources that break the rules.
"""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'research' / 'frugax'
CODE = ('research', 'configs', 'launch', 'tests', 'colabs')

ARRAYS = ('jax', 'numpy', 'ml_dtypes')  # what comes with JAX


class Layer(NamedTuple):
  """What a layer may import beside itself, `names` and the standard library."""

  below: tuple[str, ...] = ()
  libraries: tuple[str, ...] = ()
  lazy: tuple[str, ...] = ()  # libraries that only functions may import


LAYERS = {
  '': Layer(),  # frugax/__init__.py
  'names': Layer(),
  'config': Layer(libraries=('ml_collections',)),
  'quant': Layer(libraries=ARRAYS),
  'kernels': Layer(below=('quant',), libraries=ARRAYS),
  'lowbit': Layer(below=('quant', 'kernels'), libraries=ARRAYS),
  'optim': Layer(below=('quant', 'kernels'), libraries=(*ARRAYS, 'optax')),
  'models': Layer(
    below=('lowbit', 'kernels'),
    libraries=(*ARRAYS, 'flax'),
    lazy=('safetensors',),
  ),
  'train': Layer(
    below=('config', 'quant', 'kernels', 'lowbit', 'optim', 'models'),
    libraries=(*ARRAYS, 'flax', 'optax', 'absl', 'ml_collections', 'tqdm'),
    lazy=(
      'array_record',
      'grain',
      'orbax',
      'sentencepiece',
      'tensorboard',
      'tensorflow_datasets',
      'tokenizers',
      'wandb',
    ),
  ),
  'plan': Layer(
    below=('config', 'quant', 'kernels', 'lowbit', 'optim', 'models', 'train'),
    libraries=(*ARRAYS, 'flax', 'optax', 'absl', 'ml_collections'),
  ),
  'report': Layer(libraries=('numpy', 'matplotlib')),
}

# Each of these is imported in exactly one file of the package, lazily.
ONE_FILE = (
  *('array_record', 'orbax', 'grain', 'tensorflow_datasets', 'tensorboard'),
)

# Objects that run code when they are read.
PICKLES = ('pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'shelve')

# A training step, from the command line to the update of the parameters.
STEP_PATH = (
  'train/__main__.py',
  'train/loop.py',
  'train/step.py',
  'models/llama/model.py',
  'optim/galore.py',
  'optim/low_rank.py',
)


class Imported(NamedTuple):
  name: str  # absolute and dotted; of `from a import b`, 'a.b'
  line: int
  lazy: bool  # inside a function


def imports(source: str, module: str, is_package=False) -> Iterator[Imported]:
  """Every import in `source`, which is the code of `module`."""
  here = module.split('.')
  package = here if is_package else here[:-1]

  def visit(node, lazy):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield Imported(alias.name, node.lineno, lazy)
    elif isinstance(node, ast.ImportFrom):
      up = package[: len(package) - node.level + 1] if node.level else []
      base = [*up, *([node.module] if node.module else [])]
      for alias in node.names:
        yield Imported('.'.join([*base, alias.name]), node.lineno, lazy)
    elif isinstance(node, ast.Call) and node.args:
      name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
      what = getattr(node.args[0], 'value', None)
      if name in ('import_module', '__import__') and isinstance(what, str):
        yield Imported(what, node.lineno, lazy)
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
      yield from visit(child, lazy or inside)

  yield from visit(ast.parse(source), False)


def layer_of(name: str) -> str:
  """The layer of a dotted name below frugax; '' for frugax itself."""
  return (name.split('.') + [''])[1]


def violations(source: str, module: str, is_package=False) -> list[str]:
  """The imports of a module of the package that its layer does not allow."""
  layer = layer_of(module)
  if layer not in LAYERS:
    return [f'{module}: LAYERS in {__file__} has no layer {layer!r}']
  rule = LAYERS[layer]
  found = []
  for name, line, lazy in imports(source, module, is_package):
    top = name.split('.')[0]
    where = f'{module}, line {line}: {layer or "frugax"} may not import {name}'
    if top == 'frugax':
      if layer_of(name) not in (layer, 'names', *rule.below) or name == top:
        found.append(where)
    elif top in rule.lazy:
      if not lazy:
        found.append(f'{where} outside of a function')
    elif top not in sys.stdlib_module_names and top not in rule.libraries:
      found.append(where)
  return found


def imports_library(library: str, source: str, *module) -> bool:
  return any(i.name.split('.')[0] == library for i in imports(source, *module))


def config_violations(source: str, name: str) -> list[str]:
  """The imports of a file in configs/ that a config does not need."""
  return [
    f'{name}, line {line}: a config may not import {what}'
    for what, line, _ in imports(source, 'config_file')
    if what.split('.')[0] != 'ml_collections'
    and what.split('.')[:2] != ['frugax', 'config']
  ]


def pickles(source: str) -> list[str]:
  """The imports in a file that can run what they read."""
  return [
    f'line {line}: {name}'
    for name, line, _ in imports(source, 'any')
    if name.split('.')[0] in PICKLES
  ]


def modules() -> Iterator[tuple[pathlib.Path, str, str, bool]]:
  """Path, source, dotted name and whether it is a package, of each module."""
  for path in sorted(PACKAGE.rglob('*.py')):
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    is_package = parts[-1] == '__init__'
    name = '.'.join(parts[:-1] if is_package else parts)
    yield path, path.read_text(), name, is_package


def sources() -> list[pathlib.Path]:
  """All Python files of the project."""
  return [p for folder in CODE for p in sorted((ROOT / folder).rglob('*.py'))]


def test_imports_point_downward():
  found = [
    violation
    for _, source, name, is_package in modules()
    for violation in violations(source, name, is_package)
  ]
  assert not found, '\n'.join(found)


@pytest.mark.parametrize('library', ONE_FILE)
def test_a_heavy_library_is_imported_in_one_file(library):
  files = [
    name
    for _, source, name, is_package in modules()
    if imports_library(library, source, name, is_package)
  ]
  assert len(files) == 1, files


def test_heavy_libraries_are_lazy_wherever_they_are_allowed():
  for layer, rule in LAYERS.items():
    assert not set(ONE_FILE) & set(rule.libraries), layer


def test_configs_import_nothing_but_configs():
  files = sorted((ROOT / 'configs').rglob('*.py'))
  assert files
  found = [v for f in files for v in config_violations(f.read_text(), f.name)]
  assert not found, '\n'.join(found)


def test_no_pickle():
  found = [f'{f}, {v}' for f in sources() for v in pickles(f.read_text())]
  assert not found, '\n'.join(found)


def test_no_file_is_longer_than_500_lines():
  lengths = {f: len(f.read_text().splitlines()) for f in sources()}
  assert len(lengths) > 10
  assert not {f: n for f, n in lengths.items() if n > 500}


def test_a_train_step_is_followed_in_6_files_and_1500_lines():
  assert len(STEP_PATH) <= 6
  lengths = {
    name: len((PACKAGE / name).read_text().splitlines()) for name in STEP_PATH
  }
  assert sum(lengths.values()) <= 1500, lengths


BLOCKED = (
  'array_record',
  'grain',
  'matplotlib',
  'ml_collections',
  'orbax',
  'safetensors',
  'sentencepiece',
  'tensorboard',
  'tensorflow_datasets',
  'tokenizers',
  'tqdm',
  'wandb',
)
BARE_MACHINE = f"""
import importlib, sys

class Block:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {BLOCKED!r}:
      raise ImportError(f'{{name}} is blocked')

sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
  importlib.import_module(name)
"""


def _import_on_a_bare_machine(*names):
  return subprocess.run(
    [sys.executable, '-c', BARE_MACHINE, *names], capture_output=True, text=True
  )


def test_optimizers_models_and_step_need_only_jax_flax_and_optax():
  layers = ('quant', 'kernels', 'lowbit', 'optim', 'models')
  there = [n for n in layers if (PACKAGE / n / '__init__.py').exists()]
  assert {'optim', 'models'} <= set(there)
  names = [*(f'frugax.{n}' for n in there), 'frugax.train.step']
  done = _import_on_a_bare_machine(*names)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('library', BLOCKED)
def test_the_bare_machine_is_bare(library):
  done = _import_on_a_bare_machine(f'{library}.anything')
  assert f'ImportError: {library} is blocked' in done.stderr


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('frugax.quant.codec', 'import optax'),
    ('frugax.quant.codec', 'from frugax import kernels'),
    ('frugax.kernels.api', 'from frugax.lowbit import recipe'),
    ('frugax.lowbit.recipe', 'import frugax.models.llama'),
    ('frugax.optim.galore', 'import flax'),
    ('frugax.optim.galore', 'from flax import linen as nn'),
    ('frugax.optim.galore', 'def f():\n  import flax'),
    ('frugax.optim.galore', 'from frugax.train import step'),
    ('frugax.optim.galore', 'from ..models import llama'),
    ('frugax.optim.galore', 'from .. import train'),
    ('frugax.optim.galore', 'import importlib as i\ni.import_module("flax")'),
    ('frugax.models.llama.model', 'import optax'),
    ('frugax.models.llama.model', 'from ...optim import galore'),
    ('frugax.models.llama.hf', 'import safetensors'),
    ('frugax.train.data', 'import grain'),
    ('frugax.train.data', 'class A:\n  import grain.python'),
    ('frugax.train.data', 'if True:\n  from grain import python'),
    ('frugax.train.loop', 'from frugax import plan'),
    ('frugax.train.loop', 'from frugax.report import table'),
    ('frugax.train.loop', 'import frugax as fx'),
    ('frugax.train.loop', 'import launch.local'),
    ('frugax.train.loop', 'def f():\n  from studies import rank'),
    ('frugax.train.loop', 'import colabs'),
    ('frugax.train.loop', 'import torch'),
    ('frugax.report.runs', 'import jax'),
    ('frugax.report.runs', 'from frugax.train import metrics'),
    ('frugax.names', 'from frugax import config'),
    ('frugax.config', 'def f():\n  from frugax import train'),
    ('frugax.novelty.code', 'import math'),
  ],
)
def test_a_broken_rule_is_found(module, source):
  (found,) = violations(source, module)
  assert module in found


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('frugax.quant.codec', 'import math, jax.numpy as jnp'),
    ('frugax.quant.codec', 'from frugax import names'),
    ('frugax.kernels.api', 'from frugax.quant import codec'),
    ('frugax.optim.galore', 'import jax, optax\nfrom . import low_rank'),
    ('frugax.optim.galore', 'from frugax import quant'),
    ('frugax.models.llama.model', 'from .. import axes'),
    ('frugax.models.llama.hf', 'def f():\n  from safetensors import numpy'),
    ('frugax.train.data', 'def f():\n  def g():\n    import grain'),
    ('frugax.train.data', 'async def f():\n  import grain'),
    ('frugax.train.loop', 'from frugax import config, models, optim'),
    ('frugax.report.runs', 'import numpy as np\nfrom matplotlib import figure'),
  ],
)
def test_what_is_allowed_is_not_found(module, source):
  assert violations(source, module) == []


@pytest.mark.parametrize(
  ('source', 'found'),
  [
    ('import grain', True),
    ('def f():\n  from grain.python import DataLoader', True),
    ('import grainy\nx = "import grain"', False),
    ('from . import grain', False),
  ],
)
def test_imports_of_a_library_are_found(source, found):
  assert imports_library('grain', source, 'frugax.train.data') == found


def test_relative_imports_of_a_package_start_at_the_package():
  source = 'from .low_rank import low_rank\nfrom ..train import step'
  assert [i.name for i in imports(source, 'frugax.optim', True)] == [
    'frugax.optim.low_rank.low_rank',
    'frugax.train.step',
  ]


@pytest.mark.parametrize(
  ('source', 'count'),
  [
    ('import ml_collections\nfrom frugax.config import arguments', 0),
    ('from frugax import config', 0),
    ('import frugax', 1),
    ('from frugax import optim, config', 1),
    ('import os', 1),
    ('def get_config():\n  import jax', 1),
  ],
)
def test_config_imports(source, count):
  assert len(config_violations(source, 'a.py')) == count


@pytest.mark.parametrize(
  ('source', 'count'),
  [
    ('import json', 0),
    ('x = "import pickle"', 0),
    ('import pickle', 1),
    ('def f():\n  from cloudpickle import dumps', 1),
    ('import json, dill', 1),
  ],
)
def test_pickle_imports(source, count):
  assert len(pickles(source)) == count
