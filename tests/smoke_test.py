"""The shortest proof that an installation works: import, train, resume."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

import frugax

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('name', frugax.__all__)
def test_every_subpackage_imports(name):
  assert getattr(frugax, name) is importlib.import_module(f'frugax.{name}')


@pytest.mark.parametrize('step', ['ordinary', 'layerwise'])
def test_trains_and_resumes(tmp_path, step):
  def run(module, *arguments):
    return subprocess.run(
      [sys.executable, '-m', module, *arguments],
      capture_output=True,
      text=True,
      check=True,
    ).stdout

  data, workdir = tmp_path / 'data', tmp_path / 'run'
  assert 'wrote' in run('frugax.train.corpus', f'--data_dir={data}')
  train = (
    'frugax.train',
    f'--config={_ROOT / "configs" / "llama.py"}:size=tiny,opt=galore',
    f'--workdir={workdir}',
    f'--config.data.data_dir={data}',
    f'--config.step={step}',
    '--config.mesh=fsdp=-1',
    '--config.batch_size=8',
    '--config.eval.batch_size=8',
    '--config.data.sequence_length=64',
    '--config.eval.tokens=1000',
    '--config.log.every=1',
  )
  assert 'validation loss' in run(*train, '--config.steps=3')
  assert 'resuming from the checkpoint at step 3' in run(
    *train, '--config.steps=5'
  )
  rows = (workdir / 'metrics.jsonl').read_text().splitlines()
  steps = [row['step'] for row in map(json.loads, rows) if 'loss' in row]
  assert steps == [1, 2, 3, 4, 5]
  out = workdir / 'report'
  assert 'galore' in run('frugax.report', str(workdir), f'--out={out}')
  assert (out / 'loss_by_tokens.png').read_bytes().startswith(b'\x89PNG')
