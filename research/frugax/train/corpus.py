"""The text that is on every machine: Python's own standard library.

    python -m frugax.train.corpus --data_dir=data

writes it as the data set 'stdlib', 10 MB without tests and generated tables, no
download. One file in twenty or so is held out for validation, chosen by nothing
but its name.
"""

import argparse
import hashlib
import os
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence

from frugax.train import datasets

_VALIDATION = 0.05
_TESTS = {'idle_test', 'test', 'tests'}
_OTHERS = {'__pycache__', 'dist-packages', 'site-packages'}
# Tables and manuals written by programs: near copies of each other, or one file
# that would outweigh all others of its split.
_GENERATED = {'encodings', 'pydoc_data'}
_SKIPPED = _TESTS | _OTHERS | _GENERATED


def documents(
  root: str | os.PathLike | None = None, *, validation: bool
) -> Iterator[dict[str, str]]:
  """The .py files of one split, in the order of their paths.

  Args:
    root: the directory to read; the running interpreter's library if None.
    validation: which of the two splits to give.

  Yields:
    text, and path relative to `root` with '/' between its parts. Tests,
    installed packages, generated files, empty files and what is not UTF-8 are
    left out.

  Examples:
    >>> names = [d['path'] for d in documents(validation=False)]
    >>> 'argparse.py' in names, any('/tests/' in name for name in names)
    (True, False)
  """
  root = pathlib.Path(root or sysconfig.get_paths()['stdlib'])
  for path in _files(root):
    name = path.relative_to(root).as_posix()
    if is_validation(name) != validation:
      continue
    try:
      text = path.read_bytes().decode('utf-8')
    except UnicodeDecodeError:
      continue
    if text:
      yield {'text': text, 'path': name}


def is_validation(name: str) -> bool:
  """Whether the file called `name` is held out: one in twenty, by its hash.

  Examples:
    >>> is_validation('traceback.py'), is_validation('argparse.py')
    (True, False)
  """
  digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big') < _VALIDATION * 2**64


def build(
  data_dir: str,
  name: str = 'stdlib',
  *,
  root: str | os.PathLike | None = None,
  echo: Callable[[str], None] = print,
) -> str:
  """Writes the corpus as a TFDS data set, if it is not there yet.

  Args:
    data_dir: the TFDS directory to put it in.
    name: what to call it.
    root: the directory to read; the running interpreter's library if None.
    echo: is given lines to show.

  Returns:
    The directory of the data set.

  Raises:
    ValueError: no .py files under `root`, in either of the splits.
  """
  start = time.monotonic()
  path = os.path.join(data_dir, name, '1.0.0')
  if os.path.isfile(os.path.join(path, 'dataset_info.json')):
    echo(f'{path} is complete: nothing to do')
    return path
  sizes = {}

  def counted(split: str) -> Iterator[dict[str, str]]:
    count = size = 0
    for document in documents(root, validation=split == 'validation'):
      count += 1
      size += len(document['text'].encode())
      yield document
    sizes[split] = count, size

  version = '.'.join(map(str, sys.version_info[:3]))
  path = datasets.prepare(
    name,
    {s: lambda s=s: counted(s) for s in ('train', 'validation')},
    data_dir,
    fields=('text', 'path'),
    description=f'The .py files of the standard library of Python {version}.',
  )
  for split, (count, size) in sizes.items():
    echo(f'{split:10} {count:6,} documents {size:12,} bytes')
  echo(f'wrote {path} in {time.monotonic() - start:.1f} s')
  return path


def main(argv: Sequence[str] | None = None) -> None:
  """The command line; see the head of this file."""
  parser = argparse.ArgumentParser(
    prog='python -m frugax.train.corpus',
    description="Writes Python's standard library as a TFDS data set.",
  )
  parser.add_argument('--data_dir', default='data', help='TFDS directory')
  parser.add_argument('--name', default='stdlib', help='name of the data set')
  args = parser.parse_args(argv)
  build(args.data_dir, args.name)


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(set(folders) - _SKIPPED)
    yield from (
      pathlib.Path(folder, f) for f in sorted(files) if f[-3:] == '.py'
    )


if __name__ == '__main__':
  main()
