"""The launchers' scripts beside programs that only record their arguments."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = (
  *('gcloud', 'kubectl', 'xpk', 'sbatch', 'srun', 'scontrol', 'scancel'),
  *('python', 'python3', 'uv', 'gcsfuse', 'mountpoint', 'findmnt', 'ssh-add'),
)
# What a shell must not touch on its way to the trainer.
AWKWARD = (
  '--config.data.name=a "quoted"  $HOME $(date) `id` it\'s\ntwo\\n & * ~ é',
  "--config.model.matmul_rules=[['mlp/down', 'int8']]",
  '--config.log.wandb=',
)


def words(line):
  """The arguments that bash makes of a line."""
  printed = subprocess.run(
    ['bash', '-c', 'eval "all=($1)"; printf "%s\\0" "${all[@]}"', '-', line],
    capture_output=True,
    text=True,
    check=True,
  )
  return printed.stdout.split('\0')[:-1]


class Launcher:
  """Runs scripts of launch/ in a folder of their own.

  Attributes:
    folder: what the fake programs read and write; see fake.py.
    environ: of the scripts.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    (folder / 'bin').mkdir()
    (folder / 'home').mkdir()
    script = ROOT / 'tests' / 'launch' / 'fake.py'
    for name in PROGRAMS:
      program = folder / 'bin' / name
      call = (
        f'import runpy, sys; sys.exit(runpy.run_path({str(script)!r})["main"]'
        f'({str(program)!r}, sys.argv[1:]))'
      )
      # A path with a space cannot be in the first line itself.
      python = shlex.join([sys.executable, '-c', call])
      program.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
      program.chmod(0o755)
    path = f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}'
    keep = ('LANG', 'LC_ALL', 'TMPDIR')
    self.environ = {k: os.environ[k] for k in keep if k in os.environ}
    self.environ |= {
      'PATH': path,
      'FAKE': str(folder),
      'FAKE_PATH': path,
      'HOME': str(folder / 'home'),
      'FRUGAX_POLL': '0',
    }

  def command(self, script, *arguments):
    """The command line of a script."""
    return ['bash', str(ROOT / 'launch' / script), *arguments]

  def run(self, script, *arguments, timeout=120, **environ):
    """Runs a script to its end; output is text."""
    return subprocess.run(
      self.command(script, *arguments),
      cwd=self.folder,
      env=self.environ | environ,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
    )

  def dry_run(self, script, *arguments, **environ):
    """The commands that a script would run; none must have been."""
    before = self.calls(), self._files()
    done = self.run(script, *arguments, '--dry-run', **environ)
    assert done.returncode == 0, done.stderr
    assert (self.calls(), self._files()) == before
    return [words(line) for line in done.stdout.splitlines()]

  def _files(self):
    return sorted((self.folder / 'home').rglob('*'))

  def calls(self, *programs):
    """What was called so far, of some programs or of all."""
    file = self.folder / 'calls.jsonl'
    lines = file.read_text().splitlines() if file.exists() else []
    calls = [json.loads(line) for line in lines]
    return [c for c in calls if not programs or c[0] in programs]


@pytest.fixture
def launcher(tmp_path):
  """A `Launcher` in a temporary folder."""
  return Launcher(tmp_path)
