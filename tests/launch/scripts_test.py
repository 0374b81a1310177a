"""What all scripts have in common, and the names that they know."""

import math
import re
import shutil
import subprocess

import pytest

from frugax.plan import topologies

from .conftest import ROOT

SCRIPTS = sorted(
  p.name for p in (ROOT / 'launch').iterdir() if p.suffix in ('.sh', '.sbatch')
)
HELPERS = ('lib.sh', 'worker.sh', 'pack.sh', 'slurm_task.sh')
LAUNCHERS = [s for s in SCRIPTS if s not in HELPERS]


def lib(expression):
  """What bash prints, with the functions of launch/lib.sh."""
  return subprocess.run(
    ['bash', '-c', f'set -eu; . "$0"/launch/lib.sh; {expression}', str(ROOT)],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize('script', SCRIPTS)
def test_bash_reads_it(script):
  path = ROOT / 'launch' / script
  done = subprocess.run(
    ['bash', '-n', path], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  lines = path.read_text().splitlines()
  assert [x for x in lines if len(x) > 80 and '://' not in x] == []
  if script != 'lib.sh':
    assert lines[0] == '#!/usr/bin/env bash'
    assert 'set -euo pipefail' in lines
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize('script', SCRIPTS)
def test_macos_bash_knows_all_of_it(script):
  """Version 3.2 has none of these."""
  text = (ROOT / 'launch' / script).read_text()
  newer = r'mapfile|readarray|declare -[Agn]|local -[Agn]|\$\{\w+(\^|,|@)|\|&'
  assert re.findall(newer, text) == []
  # It takes the empty array for an unbound variable. These never are empty:
  # `check_train` and `parse` see to that, or what is beside them.
  never_empty = {'TRAIN', 'names', 'all', 'flags', 'arguments'}
  for name in set(re.findall(r'(\w+)=\(\)', text)) - never_empty:
    plain = rf'(?<!\+)"\$\{{{name}\[@\]\}}"'
    assert re.findall(plain, text) == [], name


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='no shellcheck here')
def test_shellcheck_has_no_remark():
  paths = [f'launch/{script}' for script in SCRIPTS]
  done = subprocess.run(
    # `parse` sets the variables opt_..., which it cannot see.
    ['shellcheck', '-x', '-s', 'bash', '-e', 'SC2154,SC2034,SC2016', *paths],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', LAUNCHERS)
def test_help_names_every_option(launcher, script):
  text = launcher.run(script, '--help').stdout
  assert f'launch/{script}' in text and '--dry-run' in text
  assert '#' not in text and 'SBATCH' not in text
  bad = launcher.run(script, *_step(script), '--nonsense=1')
  assert bad.returncode == 2
  valid = bad.stderr.partition('Valid: ')[2].split()
  assert len(valid) > 1
  if script != 'tpu_babysit.sh':  # whose help refers to that of tpu_vm.sh
    assert [option for option in valid if option not in text] == []


def _step(script):
  return ['run'] if script in ('tpu_vm.sh', 'gke_xpk.sh') else []


def test_options_have_their_nearest_name(launcher):
  done = launcher.run('local.sh', '--wrkdir=runs/a')
  assert done.returncode == 2
  assert "unknown option '--wrkdir': did you mean '--workdir'?" in done.stderr
  done = launcher.run('local.sh', '--workdir')
  assert '--workdir needs a value: --workdir=VALUE' in done.stderr
  done = launcher.run('local.sh', '--dry-run=yes')
  assert "--dry-run takes no value, '--dry-run=yes' has one" in done.stderr
  done = launcher.run('local.sh', 'runs/a')
  assert "unexpected argument 'runs/a'" in done.stderr


def test_topologies_are_those_of_the_planner():
  done = lib(
    'for t in v5e v6e; do for s in $FLAT; do topology $t:$s;'
    ' echo $t:$s $ACCELERATOR $CHIPS $HOSTS $CHIPS_A_HOST; done; done;'
    'for t in v4 v5p tpu7x; do for s in $CUBE; do topology $t:$s;'
    ' echo $t:$s $ACCELERATOR $CHIPS $HOSTS $CHIPS_A_HOST; done; done'
  )
  rows = [line.split() for line in done.stdout.splitlines()]
  planned = {
    n for n in topologies.valid() if n.partition(':')[0] in topologies.TPUS
  }
  # One chip of a cube can be planned for, and not be had.
  planned -= {f'{chip}:1x1x1' for chip in ('v4', 'v5p', 'tpu7x')}
  assert {row[0] for row in rows} == planned
  for name, accelerator, chips, hosts, a_host in rows:
    shape = name.partition(':')[2]
    assert int(chips) == math.prod(map(int, shape.split('x')))
    assert int(hosts) * int(a_host) == int(chips)
    cores = 1 if name[:3] in ('v5e', 'v6e') else 2
    assert accelerator.endswith(f'-{cores * int(chips)}')


@pytest.mark.parametrize(
  ('name', 'accelerator', 'hosts', 'runtime'),
  [
    ('v5e:4x4', 'v5litepod-16', 4, 'v2-alpha-tpuv5-lite'),
    ('v5e:2x4', 'v5litepod-8', 1, 'v2-alpha-tpuv5-lite'),
    ('v6e:16x16', 'v6e-256', 64, 'v2-alpha-tpuv6e'),
    ('v5p:2x2x1', 'v5p-8', 1, 'v2-alpha-tpuv5'),
    ('v4:2x2x4', 'v4-32', 4, 'tpu-ubuntu2204-base'),
  ],
)
def test_a_topology(name, accelerator, hosts, runtime):
  done = lib(f'topology {name}; echo $ACCELERATOR $HOSTS $RUNTIME')
  assert done.stdout.split() == [accelerator, str(hosts), runtime]


@pytest.mark.parametrize(
  ('name', 'near'),
  [
    ('v5e:4x5', 'v5e:4x4'),
    ('v5p:1x1x1', 'v5p:2x2x1'),
    ('v5:4x4', 'v5e:4x4'),
    ('v5e', 'v5e:4x4'),
    ('h100:8', 'v6e:1x1'),
  ],
)
def test_an_unknown_topology(name, near):
  done = lib(f"topology '{name}'")
  assert done.returncode == 2
  assert f"unknown topology '{name}': did you mean" in done.stderr
  shown = re.search(r"mean '([^']+)'", done.stderr)[1]
  assert shown.partition(':')[0] == near.partition(':')[0] or name == 'h100:8'
  if name not in ('v5e', 'h100:8'):
    assert shown == near


def test_names_of_workdirs():
  names = [
    lib(f"default_name '{folder}'").stdout
    for folder in (
      *('gs://b/adamw/1b', 'gs://b/galore/1b', 'runs/1B', 'runs/a_b', 'runs/a'),
      *(f'runs/{"x" * 50}{i}' for i in range(2)),
    )
  ]
  assert names[0].startswith('frugax-1b-')
  assert lib("default_name 'gs://b/adamw/1b/'").stdout == names[0]
  assert len(set(names)) == len(names)
  for name in names:
    assert re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', name), name


@pytest.mark.parametrize(
  ('labels', 'good'),
  [
    ('team=a,run-1=b_2', True),
    ('team=', True),
    ('Team=a', False),
    ('team', False),
    ('team=a,', False),
    ('team=a b', False),
    ('team=a\nb=c', False),
    (f'team={"a" * 64}', False),
  ],
)
def test_labels(labels, good):
  done = lib(f"check_labels '{labels}'")
  assert (done.returncode == 0) == good
  assert good or 'is not valid' in done.stderr


def test_the_image_copies_what_there_is():
  text = (ROOT / 'launch' / 'Dockerfile').read_text()
  sources = [
    source
    for line in re.findall(r'^COPY (.*)', text, re.M)
    for source in line.split()[:-1]
  ]
  assert 'pyproject.toml' in sources
  sources += re.findall(r'--constraint (\S+)', text)
  sources += re.findall(r'launch/\w+\.sh', text)
  assert [s for s in sources if not (ROOT / s).exists()] == []


def test_a_signal_just_before_the_end_is_not_taken_for_the_status():
  """The child ends between the wait that was interrupted and what asks."""
  done = lib(
    'kill() { [ "$1" != -0 ] || sleep 1; builtin kill "$@"; };'
    "trap ':' USR1; sh -c 'sleep 0.6; exit 7' & child=$!;"
    '(sleep 0.2; builtin kill -USR1 $$) & status=0;'
    'wait_for $child || status=$?; echo $status'
  )
  assert done.stdout == '7\n', done.stderr


@pytest.mark.parametrize(
  ('when', 'status'), [('before', 143), ('after', 143), ('never', 5)]
)
def test_a_signal_is_handed_on_whenever_it_comes(when, status):
  kills = {'before': 'kill -TERM $$;', 'after': '', 'never': ''}
  later = '(sleep 0.3; kill -TERM $$) &' if when == 'after' else ''
  program = "sh -c 'echo began; sleep 1; exit 5'"
  done = lib(
    f'trap forward TERM INT; {kills[when]} {later} status=0;'
    f'tend {program} || status=$?; echo $status'
  )
  began = '' if when == 'before' else 'began\n'
  assert done.stdout == f'{began}{status}\n', done.stderr
