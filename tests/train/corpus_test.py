"""The corpus: real files, no tests, split by name."""

import subprocess
import sys

from frugax.train import corpus, datasets


def write(root, files):
  for name, raw in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def all_documents(root=None):
  return [
    [d for d in corpus.documents(root, validation=validation)]
    for validation in (False, True)
  ]


def test_what_is_left_out(tmp_path):
  kept = {f'pkg/m{i}.py': f'x = {i}\n'.encode() for i in range(60)}
  kept['unittest/é.py'] = 'é = 1\n'.encode()
  write(tmp_path, kept)
  left_out = [
    'test/a.py', 'pkg/tests/a.py', 'idlelib/idle_test/a.py', 'a.txt', 'a.pyc',
    'site-packages/p/a.py', 'dist-packages/a.py', 'pkg/__pycache__/a.py',
    'encodings/cp1.py', 'pydoc_data/topics.py',
  ]  # fmt: skip
  write(tmp_path, dict.fromkeys(left_out, b'x'))
  write(tmp_path, {'empty.py': b'', 'latin.py': b'# \xe9\n'})
  train, validation = all_documents(tmp_path)
  found = {d['path']: d['text'].encode() for d in train + validation}
  assert found == kept
  assert len(train) + len(validation) == len(kept)
  assert [d['path'] for d in train] == sorted(d['path'] for d in train)


def test_the_split_depends_on_the_name_alone(tmp_path):
  names = [f'm{i}.py' for i in range(2000)]
  held_out = {n for n in names if corpus.is_validation(n)}
  assert 0.03 < len(held_out) / len(names) < 0.07
  write(tmp_path, dict.fromkeys(names[:300], b'something else'))
  _, validation = all_documents(tmp_path)
  assert {d['path'] for d in validation} == held_out & set(names[:300])


def test_the_standard_library():
  train, validation = all_documents()
  sizes = [sum(len(d['text']) for d in split) for split in (train, validation)]
  assert sum(sizes) > 5_000_000
  assert 0.01 < sizes[1] / sum(sizes) < 0.12
  paths = {d['path'] for d in train}
  assert {'argparse.py', 'json/decoder.py'} <= paths
  assert not paths & {d['path'] for d in validation}
  largest = max(len(d['text']) for d in validation)
  assert largest < sizes[1] / 2  # no file is the validation set


def test_command_line(tmp_path):
  folder = str(tmp_path / 'da ta')
  command = [sys.executable, '-m', 'frugax.train.corpus']
  command += [f'--data_dir={folder}', '--name=code']
  first, second = (
    subprocess.run(command, capture_output=True, text=True, check=True)
    for _ in range(2)
  )
  lines = first.stdout.splitlines()
  assert [line.split()[0] for line in lines] == ['train', 'validation', 'wrote']
  assert 'complete: nothing to do' in second.stdout
  assert first.stderr == second.stderr == ''
  train = datasets.documents('code', folder, 'train', 'text')
  assert len(train) == int(lines[0].split()[1].replace(',', ''))
  for document in (train[0], train[len(train) - 1]):
    assert not corpus.is_validation(document['path'].decode())


_TOGETHER = """
import os, sys, time
from frugax.train import corpus
root, data, own, other = sys.argv[1:]
documents = corpus.documents
def both(*args, validation):  # each has begun before either goes on
  if validation:
    open(own, 'w').close()
    while not os.path.exists(other):
      time.sleep(0.01)
  return documents(*args, validation=validation)
corpus.documents = both
print(corpus.build(data, root=root))
"""


def test_two_processes_build_it_at_once(tmp_path):
  """As jobs that are started together do, on one disk."""
  write(tmp_path / 'root', {f'm{i}.py': b'x = 1\n' * i for i in range(1, 200)})
  ready = [str(tmp_path / f'ready{i}') for i in range(2)]
  started = [
    subprocess.Popen(
      [
        *(sys.executable, '-c', _TOGETHER, str(tmp_path / 'root')),
        *(str(tmp_path / 'data'), *files),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for files in (ready, ready[::-1])
  ]
  told = [process.communicate(timeout=200) for process in started]
  assert [process.returncode for process in started] == [0, 0], told
  assert all('wrote ' in out for out, _ in told)  # neither found it there
  files = (tmp_path / 'data').rglob('*')
  assert [p for p in files if 'incomplete' in p.name] == []
  splits = [
    datasets.documents('stdlib', str(tmp_path / 'data'), split, 'text')
    for split in ('train', 'validation')
  ]
  assert sum(map(len, splits)) == 199
