"""Executes the notebooks and keeps their pictures.

    python colabs/render.py                  # all of them
    python colabs/render.py optimizers --out=/tmp/pictures

Each runs from start to end, with this interpreter, in an empty folder of its
own. Of each cell that is tagged `picture` the picture is written to
OUT/NOTEBOOK_CELL.png. The notebooks themselves stay without output.
"""

import argparse
import base64
import pathlib
import sys
import tempfile
import time

import nbclient
import nbformat

HERE = pathlib.Path(__file__).resolve().parent


def execute(path: pathlib.Path, timeout: float | None = None):
  """Runs a notebook.

  Args:
    path: of the notebook.
    timeout: seconds that a cell may take.

  Returns:
    The notebook with its output.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed; it has its traceback.
    nbclient.exceptions.CellTimeoutError: a cell took too long.
  """
  notebook = nbformat.read(path, as_version=4)
  with tempfile.TemporaryDirectory() as folder:
    resources = {'metadata': {'path': folder}}
    return nbclient.NotebookClient(
      notebook, timeout=timeout, resources=resources
    ).execute()


def pictures(notebook) -> dict[str, bytes]:
  """The PNGs of the cells that are tagged `picture`, by the cell's id.

  Raises:
    ValueError: such a cell shows none, or several.
  """
  found = {}
  for cell in notebook.cells:
    if 'picture' not in cell.metadata.get('tags', ()):
      continue
    shown = [
      output.data['image/png']
      for output in cell.outputs
      if 'image/png' in output.get('data', {})
    ]
    if len(shown) != 1:
      raise ValueError(
        f'cell {cell.id!r} is tagged `picture` and shows {len(shown)}'
      )
    found[cell.id] = base64.b64decode(shown[0])
  return found


def main(argv: list[str]) -> None:
  names = sorted(path.stem for path in HERE.glob('*.ipynb'))
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('names', nargs='*', metavar='NOTEBOOK', default=names)
  parser.add_argument('--out', type=pathlib.Path, default=HERE / 'pictures')
  parser.add_argument(
    '--timeout', type=float, default=240, help='seconds that a cell may take'
  )
  args = parser.parse_args(argv)
  if unknown := sorted({*args.names} - {*names}):
    parser.error(f'no notebook {unknown[0]!r}: there are {", ".join(names)}')
  args.out.mkdir(parents=True, exist_ok=True)
  for name in args.names:
    start = time.monotonic()
    notebook = execute(HERE / f'{name}.ipynb', args.timeout)
    for cell, png in pictures(notebook).items():
      (args.out / f'{name}_{cell}.png').write_bytes(png)
    print(f'{name}: {time.monotonic() - start:.0f} s', flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
