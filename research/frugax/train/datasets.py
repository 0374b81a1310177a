"""Data sets on disk, the TFDS way: write one, open one, or say what is missing.

No TensorFlow: array records give random access to the documents of a split.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from frugax import names

_FEATURES = 'tensorflow_datasets.core.features.'
# Under which TFDS has a class: protobuf takes both spellings of its own, and
# before TFDS 4.5 it was 'type'.
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')


def prepare(
  name: str,
  splits: dict[str, Callable[[], Iterable[dict[str, str]]]],
  data_dir: str,
  *,
  fields: Sequence[str] = ('text',),
  version: str = '1.0.0',
  description: str = '',
) -> str:
  """Writes documents as a TFDS data set, array records, without TensorFlow.

  The data set appears under its name only once it is complete: TFDS writes to
  a directory called incomplete.* and renames it. One that is there already is
  left as it is. Several processes may write it at once: the first one's stays.

  Args:
    name: what to call it, in snake_case.
    splits: split name -> function that yields documents, dicts of `fields`.
    data_dir: the TFDS directory to put it in.
    fields: the features, all of them text.
    version: version of the data set.
    description: goes into the data set's metadata.

  Returns:
    The directory of the data set, `data_dir/name/version`.

  Raises:
    ValueError: a split without documents, or a name that TFDS refuses.

  Examples:
    >>> import tempfile
    >>> docs = [{'text': 'one'}, {'text': 'two'}, {'text': 'three'}]
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...   _ = prepare('tiny', {'train': lambda: docs}, tmp)
    ...   sorted(d['text'] for d in documents('tiny', tmp, 'train', 'text'))
    [b'one', b'three', b'two']
  """
  import tensorflow_datasets as tfds

  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise ValueError(f'data set name {name!r} is not snake_case, as TFDS wants')
  for split, documents in splits.items():
    if next(iter(documents()), None) is None:
      raise ValueError(f'split {split!r} of data set {name!r} has no documents')

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)
    code_path = None  # there are no checksums of downloads beside this file

    def _info(self):
      text = {field: tfds.features.Text() for field in fields}
      return tfds.core.DatasetInfo(
        builder=self,
        description=description,
        features=tfds.features.FeaturesDict(text),
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {s: self._generate_examples(f) for s, f in splits.items()}

    def _generate_examples(self, documents):
      yield from enumerate(documents())

  Builder.name = name
  tfds.disable_progress_bar()
  with _quiet(), contextlib.redirect_stdout(io.StringIO()):
    builder = Builder(data_dir=data_dir)
    try:
      builder.download_and_prepare(
        file_format='array_record',
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
    except OSError:
      # Another process, which wrote the same, may have been first.
      builder = Builder(data_dir=data_dir)
      if not builder.is_prepared():
        raise
    complete = builder.is_prepared()
  if not complete:
    raise ValueError(
      f'{builder.data_dir!r} exists and is no complete data set: delete it'
    )
  return os.fspath(builder.data_dir)


def documents(name: str, data_dir: str, split: str, text_field: str):
  """Random access to the documents of a split.

  Args:
    name: a TFDS name, with or without config and version ('lm1b', 'c4/en',
      'c4/en:3.0.1'), that is prepared under `data_dir`, or the directory of a
      prepared data set.
    data_dir: the TFDS directory.
    split: a TFDS split; slices such as 'train[:90%]' work.
    text_field: the feature that must hold text.

  Returns:
    A sequence of dicts, at least one. Text is bytes from disk, and str under
    tfds.testing.mock_data.

  Raises:
    ValueError: the data set is not there, has no such split or text field, or
      the split is empty.
  """
  with _quiet():
    builder = _builder(name, data_dir)
    known = builder.info.splits
    for part in split.split('+'):
      base = part.split('[')[0].strip()
      if known and base != 'all' and base not in known:
        raise names.unknown(f'split of data set {name!r}', base, known)
    if known and not known[split].num_examples:
      raise ValueError(
        f'split {split!r} of data set {name!r} is empty; it has '
        + ', '.join(
          f'{s} ({i.num_examples} documents)' for s, i in known.items()
        )
      )
    try:
      source = builder.as_data_source(split)
    except (AssertionError, NotImplementedError) as e:
      raise _missing(name, data_dir, builder) from e
    files = [
      os.fspath(file)
      for part in (known.values() if known else ())
      for file in part.filepaths
    ]
    what = f'split {split!r} of data set {name!r}'
    source = _Source(source, what, text_field, files)
    example = source[0]
  text = example.get(text_field)
  if not isinstance(text, str | bytes):
    what = 'is not text' if text_field in example else 'does not exist'
    raise ValueError(
      f'text_field {text_field!r} of data set {name!r} {what}; its '
      f'fields: {", ".join(sorted(example))}'
    )
  return source


class _Source:
  """A TFDS source that says what is wrong when a file is damaged."""

  def __init__(self, source, what: str, text_field: str, files: Sequence[str]):
    self._source, self._files = source, files
    self._what, self._text_field = what, text_field

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f'document {index} of the {len(self)} of {self._what}')
    try:
      example = self._source[index]
    except RuntimeError as e:  # array_record's, over a file of other bytes
      raise self._damaged(index, str(e)) from e
    # Of a file that was cut off it gives records of nothing.
    if example.get(self._text_field, '') is None:
      raise self._damaged(index, 'an empty record')
    return example

  def _damaged(self, index, why):
    bad = [file for file in self._files if not _is_whole(file)]
    file = f'{bad[0]} is damaged' if bad else 'a file is damaged'
    lines = why.strip().splitlines() or ['no reason given']
    return ValueError(
      f'document {index} of {self._what} cannot be read, {file}:'
      f' {lines[0][:300]}. Copy or build the data set again; a run goes on from'
      ' its latest checkpoint'
    )


def _is_whole(file: str) -> bool:
  """Whether an array record has its end, which tells of all its records."""
  from array_record.python import array_record_data_source

  try:
    return len(array_record_data_source.ArrayRecordDataSource([file])) > 0
  except (RuntimeError, ValueError, OSError):
    return False


def _builder(name: str, data_dir: str):
  """The TFDS builder of a directory, or of a name.

  Not tfds.builder: for a name without code of TFDS's own it looks for
  directories by itself, which no one has checked, and fetches code.
  """
  import tensorflow_datasets as tfds

  if not name:
    raise ValueError(
      "no data set: name one of TFDS, a prepared directory, or 'stdlib'"
    )
  data_dir = os.path.expanduser(data_dir)
  for path in _directories(os.path.expanduser(name), data_dir):
    if os.path.isfile(os.path.join(path, 'dataset_info.json')):
      _check_features(path)
      return tfds.builder_from_directory(path)
  stem, _, version = name.partition(':')
  base, _, config = stem.partition('/')
  try:
    cls = tfds.builder_cls(base)
    for path, _, files in os.walk(os.path.join(data_dir, cls.name)):
      if 'dataset_info.json' in files:
        _check_features(path)  # is read where the code names no features
    own = {'config': config or None, 'version': version or None}
    return cls(data_dir=data_dir, **own)
  except (tfds.core.DatasetNotFoundError, ImportError, AssertionError) as e:
    raise _missing(name, data_dir) from e
  except _Foreign:
    raise
  except ValueError as e:  # no such config or version
    raise _missing(name, data_dir) from e


class _Foreign(ValueError):
  """A data set that names code which is not of TFDS."""


def _check_features(path: str) -> None:
  """Raises if a data set names features that are not TFDS's own.

  TFDS imports the module of any class that its JSON files name: a data set
  from someone else would choose what code runs.
  """
  for file in ('features.json', 'dataset_info.json'):
    try:
      with open(os.path.join(path, file), encoding='utf-8') as f:
        value = json.load(f)
    except FileNotFoundError:
      continue
    if file == 'dataset_info.json':  # the rest of it says 'type' of columns
      value = value.get('features') if isinstance(value, dict) else None
    for name in _class_names(value):
      if not name.startswith(_FEATURES):
        raise _Foreign(
          f'the data set in {path!r} has a feature of class {name!r}, which is'
          ' not one of TFDS: its code would be run. Prepare the data set anew'
          ' with features of tensorflow_datasets.features'
        )


def _class_names(features: Any) -> Iterator[str]:
  """Every class that TFDS may take from a value of JSON, at any depth."""
  if isinstance(features, list):
    for value in features:
      yield from _class_names(value)
  elif isinstance(features, dict):
    for key, value in features.items():
      if key in _CLASS_KEYS and isinstance(value, str):
        yield value
      else:
        yield from _class_names(value)
  elif isinstance(features, str):  # some hold JSON of their own
    with contextlib.suppress(ValueError):
      yield from _class_names(json.loads(features))


def _directories(name: str, data_dir: str) -> list[str]:
  """Where a prepared data set of this name may be, the best first."""
  import tensorflow_datasets as tfds

  stem, _, version = name.partition(':')
  places = [name]
  for root in (stem, os.path.join(data_dir, stem)):
    entries = os.listdir(root) if os.path.isdir(root) else []
    versions = filter(tfds.core.Version.is_valid, entries)
    newest = sorted(versions, key=tfds.core.Version, reverse=True)
    places += [os.path.join(root, v) for v in newest if version in ('', v)]
  return places


def _missing(name: str, data_dir: str, builder=None) -> ValueError:
  """The error for a data set that is not on disk."""
  where = os.path.abspath(data_dir)
  here = os.path.join(data_dir, name.partition(':')[0])
  if name == 'stdlib':
    way = (
      f"build it with: python -m frugax.train.corpus --data_dir='{data_dir}'"
    )
  else:
    way = (
      f"build it with: tensorflow_datasets.builder('{name}', data_dir="
      f"'{data_dir}').download_and_prepare(file_format='array_record')"
    )
  if builder is not None and builder.is_prepared():
    way = (
      f'there it is as {builder.info.file_format.value}, which has no random '
      f'access: take another data_dir and {way}'
    )
  if name.split('/')[0] == 'c4':
    way += ' (building c4 takes TensorFlow; reading a prepared c4 does not)'
  if os.path.isdir(here):
    way += f'. In {here!r}: {", ".join(sorted(os.listdir(here)))}'
  return ValueError(
    f'data set {name!r} is neither the directory of a prepared data set nor '
    f'ready for random access under data_dir {where!r}; {way}'
  )


@contextlib.contextmanager
def _quiet():
  """TFDS without its log lines."""
  from absl import logging

  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)
