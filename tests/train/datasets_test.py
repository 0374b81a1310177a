"""Data sets on disk: written whole or not at all, found, or refused clearly."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from frugax.train import datasets


def build(folder, name='tiny', texts=('a', 'bb', 'ccc'), **kwargs):
  return datasets.prepare(
    name,
    {'train': lambda: ({'text': t} for t in texts)},
    str(folder),
    **kwargs,
  )


def texts_in(name, folder, split='train', field='text'):
  found = datasets.documents(name, str(folder), split, field)
  return sorted(document[field] for document in found)


def test_writes_once_and_quietly(tmp_path, capfd):
  path = build(tmp_path / 'with space')
  assert path == str(tmp_path / 'with space/tiny/1.0.0')
  before = {f: os.stat(os.path.join(path, f)).st_mtime_ns for f in
            os.listdir(path)}  # fmt: skip
  assert build(tmp_path / 'with space', texts=['other']) == path
  after = {f: os.stat(os.path.join(path, f)).st_mtime_ns for f in
           os.listdir(path)}  # fmt: skip
  assert before == after
  assert texts_in('tiny', tmp_path / 'with space') == [b'a', b'bb', b'ccc']
  assert capfd.readouterr() == ('', '')


def test_fields_and_order_are_kept_in_every_build(tmp_path):
  documents = [{'text': f't{i}', 'path': f'p{i}'} for i in range(50)]
  orders = []
  for folder in ('one', 'two'):
    datasets.prepare(
      'tiny',
      {'train': lambda: documents},
      str(tmp_path / folder),
      fields=('text', 'path'),
    )
    found = datasets.documents('tiny', str(tmp_path / folder), 'train', 'path')
    orders.append([document['path'].decode() for document in found])
    assert all(d['text'][1:] == d['path'][1:] for d in found)
  assert orders[0] == orders[1]
  # Not the order of writing: the first n are a sample of all.
  assert orders[0] != sorted(orders[0]) != [d['path'] for d in documents]


def test_finds_names_versions_configs_and_directories(tmp_path):
  path = build(tmp_path / 'a')
  build(tmp_path / 'a', texts=['new'], version='1.10.0')
  build(tmp_path / 'a', texts=['middle'], version='1.9.0')
  config = tmp_path / 'a/c4/en/3.0.1'
  shutil.copytree(path, config)
  os.makedirs(tmp_path / 'a/tiny/9.0.0')  # nothing in it
  for name, expected in {
    'tiny': [b'new'],
    'tiny:1.9.0': [b'middle'],
    'tiny:1.0.0': [b'a', b'bb', b'ccc'],
    'c4/en': [b'a', b'bb', b'ccc'],
    'c4/en:3.0.1': [b'a', b'bb', b'ccc'],
    path: [b'a', b'bb', b'ccc'],
    str(config.parent): [b'a', b'bb', b'ccc'],
  }.items():
    assert texts_in(name, tmp_path / 'a') == expected
  assert texts_in('tiny:1.0.0', tmp_path / 'a', 'train[1:]+train[:1]') == [
    b'a', b'bb', b'ccc'
  ]  # fmt: skip
  assert len(texts_in('tiny:1.0.0', tmp_path / 'a', 'train[:34%]')) == 1


def test_reads_a_registered_data_set_under_mock_data(tmp_path):
  import tensorflow_datasets as tfds

  with tfds.testing.mock_data(num_examples=3):
    texts = texts_in('lm1b', tmp_path)
  assert len(texts) == 3
  assert all(isinstance(text, str) for text in texts)


def test_what_is_missing_comes_with_the_way_to_get_it(tmp_path):
  build(tmp_path)
  shutil.copytree(tmp_path / 'tiny', tmp_path / 'c4' / 'en')
  for name, match in {
    'stdlib': "python -m frugax.train.corpus --data_dir='",
    'tinny': r"tensorflow_datasets.builder\('tinny', data_dir=",
    'lm1b': r"builder\('lm1b', .*file_format='array_record'",
    'c4/de': 'building c4 takes TensorFlow; reading a prepared c4 does not',
    'c4': r"In '.*c4': en",
    'tiny:2.0.0': r"In '.*tiny': 1.0.0",
    str(tmp_path / 'nowhere'): 'neither the directory of a prepared data set',
    '': 'no data set: name one',
  }.items():
    with pytest.raises(ValueError, match=match):
      datasets.documents(name, str(tmp_path), 'train', 'text')


def test_refused_splits_and_fields(tmp_path):
  build(tmp_path)
  for split, field, match in [
    ('test', 'text', "unknown split of data set 'tiny' 'test'.*Valid: train"),
    ('train+tset', 'text', "'tset'"),
    ('train[:0]', 'text', r'is empty; it has train \(3 documents\)'),
    ('train', 'body', "text_field 'body' .* does not exist; its fields: text"),
  ]:
    with pytest.raises(ValueError, match=match):
      datasets.documents('tiny', str(tmp_path), split, field)


def test_a_field_that_is_no_text(tmp_path):
  import tensorflow_datasets as tfds

  with (
    tfds.testing.mock_data(num_examples=3),
    pytest.raises(
      ValueError, match=r"'label' .* is not text; .*: description,"
    ),
  ):
    datasets.documents('ag_news_subset', str(tmp_path), 'train', 'label')


def test_refuses_to_write_nothing(tmp_path):
  with pytest.raises(ValueError, match=r"split 'train' .* has no documents"):
    build(tmp_path, texts=())
  with pytest.raises(ValueError, match='snake_case'):
    build(tmp_path, name='My Data')
  assert os.listdir(tmp_path) == []


def test_a_directory_that_is_no_data_set_is_not_taken_for_one(tmp_path):
  path = build(tmp_path)
  os.remove(os.path.join(path, 'dataset_info.json'))
  with pytest.raises(ValueError, match='is no complete data set: delete it'):
    build(tmp_path)


def test_a_killed_build_leaves_nothing_to_find(tmp_path):
  script = textwrap.dedent(
    """
    import os, sys
    from frugax.train import datasets

    calls = 0
    def documents():
      global calls
      calls += 1
      yield {'text': 'first'}
      if calls > 1:  # the first call only looks whether there is anything
        os.kill(os.getpid(), 9)
      yield {'text': 'second'}

    datasets.prepare('tiny', {'train': documents}, sys.argv[1])
    """
  )
  result = subprocess.run([sys.executable, '-c', script, str(tmp_path)])
  assert result.returncode == -9
  assert any(f.startswith('incomplete') for f in os.listdir(tmp_path / 'tiny'))
  with pytest.raises(ValueError, match='is neither'):
    datasets.documents('tiny', str(tmp_path), 'train', 'text')
  build(tmp_path)
  assert texts_in('tiny', tmp_path) == [b'a', b'bb', b'ccc']
