"""research/studies/bench_peers.py, against a program that plays PyTorch."""

import json
import pathlib
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import optim
from studies import bench_optim, bench_peers, peers_problem

_ROOT = pathlib.Path(__file__).parents[2]
_NAMES = {alias for alias, *_ in (*bench_peers.PEERS, *bench_peers.OPTAX)}


@pytest.fixture
def small(monkeypatch):
  """A stack of two matrices and a vector in the place of LLaMA-60m."""
  params = {'w': jnp.ones((2, 128, 160)), 'b': jnp.ones(4)}
  grads = {
    k: jax.random.normal(jax.random.key(0), x.shape) for k, x in params.items()
  }
  tensors = params, grads, {'w': optim.MatrixAxes((1,), (2,)), 'b': None}
  monkeypatch.setattr(bench_optim, 'parameters', lambda: tensors)
  return tensors


@pytest.fixture
def torch(tmp_path):
  """Makes a program that answers jobs as peers_torch.py does."""

  def make(**said):
    script = tmp_path / 'script.py'
    script.write_text(
      'import sys\n'
      f'open({str(tmp_path / "job")!r}, "w").write(sys.stdin.readline())\n'
      f'print({json.dumps(said)!r}, flush=True)\n'
      'for _ in sys.stdin:\n'
      '  print(2.0, flush=True)\n'
    )
    program = tmp_path / 'python'
    # No path to Python in the first line: it may have a space.
    run = shlex.join(['exec', sys.executable, str(script)])
    program.write_text(f'#!/bin/sh\n{run}\n')
    program.chmod(0o755)
    return str(program)

  return make


@pytest.mark.parametrize(
  ('argv', 'told'),
  [
    (['--only', 'galor'], "--only 'galor': choose from galore, apollo, "),
    (['--only', 'fira', 'adam'], "--only 'adam': choose from"),
    (['--pairs', '0'], '--pairs 0: choose from 1 to'),
    (['--pairs', '200'], '--pairs 200: choose from 1 to'),
    (['--python', 'nowhere/python'], "--python 'nowhere/python' is no program"),
  ],
)
def test_bad_arguments_have_a_line(capsys, argv, told):
  with pytest.raises(SystemExit):
    bench_peers.parse(['--python', sys.executable, *argv])
  line = capsys.readouterr().err.splitlines()[-1]
  assert told in line
  if '--only' in argv:
    assert all(name in line for name in _NAMES)


def test_the_small_rank_is_a_fourth_of_every_shorter_side():
  shorter = {min(shape) for shape in peers_problem.SHAPES}
  assert shorter == {4 * bench_peers._RANK} == {64}


def test_every_peer_has_one_version():
  (*_, before) = (_ROOT / 'Makefile').read_text().partition('PEERS := ')
  rule = before.partition('\nbench-peers:')[0]
  pinned = set(re.findall(r'([\w-]+)==[\d.]+', rule))
  packages = {package.split('.')[0] for _, package, *_ in bench_peers.PEERS}
  assert {package.replace('_', '-') for package in packages} <= pinned
  words = rule.replace('PEERS += ', '').split()
  assert {word.partition('==')[0] for word in words} == pinned
  assert 'torch' in pinned


def run(capsys, python, *only):
  bench_peers.main(['--python', python, '--pairs', '1', '--only', *only])
  lines = capsys.readouterr().out.splitlines()
  at = next(i for i, line in enumerate(lines) if ' ratio ' in line)
  return lines[at - 1], lines[at + 1 :]


def test_a_peer_that_does_not_compile_is_told(small, torch, tmp_path, capsys):
  own = bench_peers.losses(bench_peers.ours_small('apollo'))
  python = torch(
    **{'versions': {'torch': '7'}, 'compiled': 0, 'eager': 'Bad: no compiler'},
    **{'bytes': 3_000_000, 'losses': list(1.25 * own)},
  )
  versions, lines = run(capsys, python, 'apollo')
  assert versions == 'torch 7'
  assert len(lines) == 4  # of two packages
  (
    name,
    ours,
    _,
    who,
    theirs,
    _,
    ratio,
    _,
    state,
    loss,
    other,
    apart,
    compiled,
  ) = lines[0].split()
  assert (name, who) == ('apollo', 'apollo_torch.APOLLOAdamW')
  assert (theirs, state, apart, compiled) == ('2000.0', '3.0', '2.0e-01', '0')
  assert float(ours) / 2000 == pytest.approx(float(ratio), abs=1e-3)
  assert float(other) == pytest.approx(1.25 * float(loss), abs=1e-4)
  assert lines[1].strip() == '^ eager, it did not compile: Bad: no compiler'
  job = json.loads((tmp_path / 'job').read_text())
  assert job['matrices'] == [[160, 128]] * 2  # one a layer, (out, in)
  assert job['others'] == [[4]]
  assert (job['group']['rank'], job['small']['rank']) == (128, 16)


def test_a_peer_that_does_not_run_is_told(small, torch, capsys):
  python = torch(versions={}, error='ImportError: none')
  _, lines = run(capsys, python, 'fira')
  (line,) = lines
  assert line.split(maxsplit=2)[1:] == [
    'pytorch_optimizer.Fira',
    'does not run: ImportError: none',
  ]


def test_a_peer_that_ends_is_told(small, tmp_path):
  program = tmp_path / 'python'
  program.write_text('#!/bin/sh\nexit 1\n')
  program.chmod(0o755)
  with pytest.raises(SystemExit, match=r'pytorch_optimizer\.Fira ended'):
    bench_peers.main(['--python', str(program), '--only', 'fira'])


def test_rows_of_optax(small, torch, capsys):
  python = torch(versions={}, error='ImportError: none')
  versions, lines = run(capsys, python, 'galore long', 'muon dynamic8')
  assert versions.startswith('optax ')
  long, muon = (re.split(r'\s{2,}| ms', line) for line in lines)
  assert [x for x in long if 'optax' in x] == ['optax.contrib.galore']
  assert [x for x in muon if 'optax' in x] == ['optax.contrib.muon']
  assert lines[0].split()[-1] == lines[1].split()[-1] == 'jit'


def states(alias, name, small):
  params, grads, axes = small
  peer = bench_peers.in_optax(name, params, grads, axes)
  assert peer.timed() > 0
  own = optim.state_bytes(bench_peers.ours(alias, axes), params)['total']
  return own, peer.said['bytes'], np.array(peer.said['losses'])


def test_galore_of_optax_projects_the_longer_side(small):
  # Per layer a basis of 160 x 128 and moments of 128 x 128; counters.
  own, theirs, losses = states('galore long', 'galore', small)
  held = 4 * (2 * (160 * 128 + 2 * 128 * 128) + 2 * 4)
  assert 0 <= own - held < 100
  assert 0 <= theirs - held < 100
  ours = bench_peers.losses(bench_peers.ours_small('galore long'))
  assert losses[-1] < 0.9 * losses[0]
  np.testing.assert_allclose(losses, ours, rtol=0.01)
  short = bench_peers.losses(bench_peers.ours_small('galore'))
  assert np.max(abs(losses - short) / short) > 0.01


def test_muon_in_8_bits_is_close_to_muon(small):
  own, theirs, losses = states('muon dynamic8', 'muon', small)
  # A momentum, and both of Adam for the vector.
  assert 0 <= theirs - 4 * (2 * 128 * 160 + 2 * 4) < 100
  assert own < 0.27 * theirs
  ours = bench_peers.losses(bench_peers.ours_small('muon dynamic8'))
  assert losses[-1] < 0.9 * losses[0]
  np.testing.assert_allclose(losses, ours, rtol=0.1)
