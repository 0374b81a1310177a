"""Configs: a Python file, typed arguments in its name, overrides, one error.

  --config=configs/llama.py:size=60m,opt=galore  calls get_config('size=60m,..')
  --config.optimizer.rank=64                     sets one value of the result

A config file is code: load only files that you would run.
"""

import argparse
import ast
import importlib.util
import json
import os
import pathlib
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections

from frugax import names

# Sections that take the arguments of what they name (an optimizer, a model
# size): new keys are allowed and checked where the thing itself is built.
OPEN_SECTIONS = ('model', 'optimizer', 'groups', 'schedule')


class ConfigError(ValueError):
  """A config that cannot be loaded; the message is meant for the user."""


def is_ours(error: ValueError) -> bool:
  """Whether this package raised it: its message then says what to do.

  Any other error deserves its traceback.
  """
  raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
  package = pathlib.Path(__file__).resolve().parent
  return package in pathlib.Path(raised_in).resolve().parents


def arguments(arg: str | None, **defaults) -> ml_collections.ConfigDict:
  """Parses the arguments after a config file's colon.

  Args:
    arg: 'name=value,name=value', or empty.
    **defaults: every argument that exists; values are parsed to its type.

  Returns:
    A ConfigDict of the defaults with `arg` applied.

  Raises:
    ConfigError: an unknown name (with the nearest valid one) or a wrong type.

  Examples:
    >>> arguments('size=60m,layers=3', size='tiny', layers=0).to_dict()
    {'layers': 3, 'size': '60m'}
    >>> arguments('sise=60m', size='tiny')
    Traceback (most recent call last):
    ...
    frugax.config.ConfigError: unknown config argument 'sise': did you mean
    'size'? Valid: size
  """
  result = ml_collections.ConfigDict(defaults)
  for item in filter(None, (arg or '').split(',')):
    name, equals, value = item.partition('=')
    if not equals:
      raise ConfigError(
        f'config argument {item!r} is not of the form name=value'
      )
    if name not in defaults:
      raise ConfigError(str(names.unknown('config argument', name, defaults)))
    result[name] = _parse(value, defaults[name], name)
  return result


def check_choice(name: str, value: str, valid: Sequence[str]) -> None:
  """Raises a ConfigError unless `value` is one of the `valid` ones."""
  if value not in valid:
    raise ConfigError(str(names.unknown(name, value, valid)))


def load(path_and_args: str) -> ml_collections.ConfigDict:
  """Loads 'FILE.py' or 'FILE.py:arguments' by calling its get_config.

  Args:
    path_and_args: the file's path, then optionally a colon and arguments.

  Returns:
    The file's config, locked: unknown keys raise from here on.

  Raises:
    ConfigError: no such file, no get_config in it, or bad arguments.
  """
  path, _, arg = path_and_args.partition(':')
  if not os.path.isfile(path):
    raise ConfigError(
      f'config file {path!r} does not exist; try configs/llama.py:size=tiny'
    )
  spec = importlib.util.spec_from_file_location('frugax_config_file', path)
  if spec is None:
    raise ConfigError(f'config file {path!r} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'config file {path!r} defines no get_config(arg)')
  return module.get_config(arg).lock()


def override(config: ml_collections.ConfigDict, key: str, value: str) -> None:
  """Sets one value of a config in place, with the type it has there.

  Args:
    config: the config.
    key: dotted path, e.g. 'optimizer.rank'.
    value: the new value as text; in an open section (the arguments of an
      optimizer, say) a new key takes a Python literal, or else a string.

  Raises:
    ConfigError: unknown key (with the nearest valid one) or a wrong type.

  Examples:
    >>> config = ml_collections.ConfigDict({'data': {'seed': 0}})
    >>> override(config, 'data.seed', '7')
    >>> config.data.seed
    7
    >>> override(config, 'data.sede', '7')
    Traceback (most recent call last):
    ...
    frugax.config.ConfigError: unknown config key 'data.sede': did you mean
    'data.seed'? Valid: data.seed
  """
  *sections, last = key.split('.')
  node = config
  for i, name in enumerate(sections):
    if name not in node and i and sections[0] == 'groups':
      with node.unlocked():
        node[name] = ml_collections.ConfigDict()
    if not isinstance(node.get(name), ml_collections.ConfigDict):
      raise _unknown_key(key, '.'.join(sections[:i]), node)
    node = node[name]
  if last in node:
    if isinstance(node[last], ml_collections.ConfigDict):
      raise ConfigError(
        f'config key {key!r} is a section; set one of its keys:'
        f' {", ".join(f"{key}.{k}" for k in sorted(node[last]))}'
      )
    node[last] = _parse(value, node[last], key)
  elif sections == ['groups']:
    raise ConfigError(
      f'a group is a section: set {key}.match=REGEX and {key}.ARGUMENT=VALUE'
    )
  elif sections and sections[0] in OPEN_SECTIONS:
    with node.unlocked():
      node[last] = _parse(value, None, key)
  else:
    raise _unknown_key(key, '.'.join(sections), node)


def parse_command_line(
  argv: Sequence[str], prog: str
) -> tuple[ml_collections.ConfigDict, argparse.Namespace]:
  """Reads --config, --workdir and --config.key=value overrides.

  Args:
    argv: the arguments, without the program's name.
    prog: the program's name in the usage message.

  Returns:
    The config with its overrides applied, locked, and the other arguments.

  Raises:
    ConfigError: as `load` and `override`, or an argument that is neither.
  """
  parser = argparse.ArgumentParser(
    prog=prog,
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description=(
      'Train from a config file. Any value of the config can be set:\n'
      '  --config.steps=1000 --config.optimizer.rank=64\n'
      'A run whose WORKDIR has checkpoints goes on from the latest.'
    ),
  )
  parser.add_argument(
    '--config', required=True, metavar='FILE.py[:name=value,...]'
  )
  parser.add_argument('--workdir', required=True, metavar='DIR')
  known, rest = parser.parse_known_args(argv)
  config = load(known.config)
  override_all(config, rest)
  return config, known


def override_all(
  config: ml_collections.ConfigDict, arguments: Sequence[str]
) -> None:
  """Applies arguments --config.key=value, or --config.key value, in place.

  Args:
    config: the config.
    arguments: what is left of a command line.

  Raises:
    ConfigError: as `override`, or an argument that is another.
  """
  rest = list(arguments)
  while rest:
    item = rest.pop(0)
    if not item.startswith('--config.'):
      raise ConfigError(
        f'unknown argument {item!r}; config values are set by'
        ' --config.key=value'
      )
    key, equals, value = item.removeprefix('--config.').partition('=')
    if not equals:
      if not rest:
        raise ConfigError(f'{item} needs a value: {item}=VALUE')
      value = rest.pop(0)
    override(config, key, value)


def to_json(config: ml_collections.ConfigDict) -> str:
  """The resolved config as indented JSON (tuples become lists)."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def differences(old: dict, new: dict, prefix: str = '') -> list[str]:
  """Lines 'key: old -> new' for every value in which two configs differ.

  Examples:
    >>> differences({'a': {'b': 1}}, {'a': {'b': 2}, 'c': 0})
    ['a.b: 1 -> 2', 'c: (absent) -> 0']
  """
  lines = []
  for key in sorted({*old, *new}):
    a, b = old.get(key, '(absent)'), new.get(key, '(absent)')
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f'{prefix}{key}.')
    elif a != b:
      lines.append(f'{prefix}{key}: {a} -> {b}')
  return lines


def _parse(text: str, like: Any, key: str) -> Any:
  """`text` as a value of the type of `like` (None: any literal or a string)."""
  try:
    if isinstance(like, bool):
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    if isinstance(like, int):
      return int(text)
    if isinstance(like, float):
      return float(text)
    if isinstance(like, str):
      return text
    value = ast.literal_eval(text)
  except (KeyError, ValueError, SyntaxError):
    if like is None:
      return text
    raise ConfigError(
      f'{key}={text!r} is no {type(like).__name__}; it is {like!r} now'
    ) from None
  if like is not None and not isinstance(value, type(like)):
    raise ConfigError(
      f'{key}={text!r} is no {type(like).__name__}; it is {like!r} now'
    )
  return value


def _unknown_key(key, section, node):
  prefix = f'{section}.' if section else ''
  return ConfigError(
    str(names.unknown('config key', key, [prefix + k for k in node]))
  )
