"""Why a job of launch/slurm.sbatch has ended, and whether it starts again."""

import shlex
import subprocess

import pytest

from . import slurm_test
from .conftest import ROOT

cluster = slurm_test.cluster


@pytest.mark.parametrize(
  ('ends', 'status', 'requeues'),
  [
    (['exit 1', 'kill -KILL $$'], 1, False),
    (['exit 2', 'exit 134'], 2, False),
    (['exit 134', 'exit 1'], 1, False),
    (['kill -KILL $$', 'exit 134'], 137, True),
    (['kill -KILL $$', 'exit 1'], 137, True),
    (['exit 134', 'exit 134'], 134, True),
    (['kill -TERM $$', 'exit 134'], 134, True),
  ],
)
def test_the_first_that_failed_by_itself_is_the_cause(
  launcher, ends, status, requeues
):
  """Not the status that srun gives, the highest of all."""
  task = shlex.quote(str(ROOT / 'launch' / 'slurm_task.sh'))
  lines = [f'bash {task} sh -c {shlex.quote(end)}; {{}}' for end in ends]
  srun = launcher.folder / 'bin' / 'srun'
  for _ in range(2):  # the second start does not take the first's word
    srun.write_text(
      '#!/bin/sh\nhighest=0\n'
      + '\n'.join(
        line.format('s=$?; [ $s -le $highest ] || highest=$s') for line in lines
      )
      + '\nexit $highest\n'
    )
    run = launcher.folder / 'run'
    done = slurm_test.job(launcher, ROOT, f'--workdir={run}')
    assert done.returncode == status
    again = launcher.calls('scontrol')
    assert bool(again) == requeues
    assert list(run.glob('*')) == []
    lines = ['sh -c "exit 137"; {}']
    status, requeues = 137, True


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_not_started_again(cluster, tmp_path):
  """On a cluster, with another process that is lost by it."""
  workdir, log = tmp_path / 'run', tmp_path / 'job.log'
  trainer = tmp_path / 'python'
  trainer.write_text("""#!/bin/sh
[ "$1" = -m ] || exit 0
[ "$SLURM_PROCID" = 1 ] || { trap 'exit 134' TERM; sleep 60 & wait; }
exit 1
""")
  trainer.chmod(0o755)
  done = subprocess.run(
    [
      *('bash', str(ROOT / 'launch' / 'slurm.sbatch'), '--tasks-per-node=2'),
      *(f'--sbatch-flag=--output={log}', '--sbatch-flag=--parsable'),
      *(f'--workdir={workdir}', '--config=configs/llama.py:data=c4'),
    ],
    cwd=ROOT,
    env=cluster.environ | {'PYTHON': str(trainer)},
    capture_output=True,
    text=True,
    check=False,
  )
  job = done.stdout.strip()
  cluster.wait(
    lambda: cluster.state(job) in ('COMPLETED', 'FAILED'), 'end', 100
  )
  told = cluster.call('scontrol', 'show', 'job', job)
  assert 'JobState=FAILED' in told and 'ExitCode=1:0' in told, told
  assert 'Restarts=0' in told and 'queued again' not in log.read_text()
