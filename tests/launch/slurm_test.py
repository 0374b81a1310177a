"""launch/slurm.sbatch: what it gives to sbatch and srun, and on a cluster.

The cluster is this machine: munged, slurmctld and slurmd of Debian's slurm-wlm,
started for the test in a folder of their own.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from .conftest import AWKWARD, ROOT

RUN = ('--workdir=runs/a b', '--config=configs/llama.py:size=60m,data=c4')
DAEMONS = ('munged', 'slurmctld', 'slurmd')
_PATH = f'{os.environ["PATH"]}:/usr/sbin:/sbin'


def test_arguments_arrive(launcher):
  arguments = (*RUN, *AWKWARD, '--nodes=2', '--gpus-per-node=8')
  more = ('--time=24:00:00', '--partition=gpu', '--sbatch-flag=--exclusive')
  submitted, trained = launcher.dry_run('slurm.sbatch', *arguments, *more)
  script = str(ROOT / 'launch' / 'slurm.sbatch')
  assert submitted == [
    *('sbatch', f'--chdir={ROOT}', submitted[2], '--nodes=2'),
    *('--ntasks-per-node=8', '--dependency=singleton', '--gpus-per-node=8'),
    *('--time=24:00:00', '--partition=gpu', '--exclusive'),
    *(script, *arguments, *more),
  ]
  assert re.fullmatch(r'--job-name=frugax-a-b-[0-9a-f]{8}', submitted[2])
  assert trained == [
    *('srun', '--kill-on-bad-exit=1', '--nodes=2', '--ntasks-per-node=8'),
    *('bash', str(ROOT / 'launch' / 'slurm_task.sh')),
    *(trained[6], '-m', 'frugax.train', *RUN, *AWKWARD),
  ]
  done = launcher.run('slurm.sbatch', *arguments, *more, WANDB_API_KEY='secret')
  assert done.returncode == 0, done.stderr
  assert launcher.calls() == [submitted]


def job(launcher, folder, *options, **environ):
  """Runs the script as Slurm does, a copy of it."""
  copy = launcher.folder / 'slurm_script'
  shutil.copy(ROOT / 'launch' / 'slurm.sbatch', copy)
  return subprocess.run(
    ['bash', str(copy), *RUN, *AWKWARD, *options],
    cwd=folder,
    env=launcher.environ
    | {'PYTHON': str(launcher.folder / 'bin' / 'python'), 'SLURM_JOB_ID': '7'}
    | environ,
    capture_output=True,
    text=True,
    check=False,
  )


def test_in_the_job(launcher):
  """Slurm runs a copy, in the repository; the steps get the arguments."""
  done = job(launcher, ROOT)
  (step,) = launcher.calls('srun')
  assert step[-len(RUN) - len(AWKWARD) :] == [*RUN, *AWKWARD]
  # The step that was played wrote no summary: the run is not done.
  assert done.returncode == 143
  assert launcher.calls('scontrol') == []
  done = job(launcher, launcher.folder)
  assert done.returncode == 2
  assert "submit the job from the repository's folder" in done.stderr


@pytest.mark.parametrize(
  ('status', 'before', 'requeues'),
  [
    (137, '', True),
    (134, '9', True),
    (134, '10', False),
    (143, '', False),
    (1, '', False),
    (2, '', False),
    (127, '', False),
  ],
)
def test_a_lost_process_queues_the_job_again(
  launcher, status, before, requeues
):
  """Not for ever, and not when the run itself has failed."""
  (launcher.folder / 'srun').write_text(str(status))
  count = {'SLURM_RESTART_COUNT': before} if before else {}
  done = job(launcher, ROOT, **count)
  assert done.returncode == status
  requeued = launcher.calls('scontrol')
  assert requeued == [['scontrol', 'requeue', '7']] * requeues
  told = {'9': 'is queued again, 9 times so', '10': 'giving up'}
  assert told.get(before, '') in done.stderr


@pytest.mark.parametrize(
  ('end', 'status'),
  [('kill -TERM $$', 0), ('kill -KILL $$', 137), ('exit 2', 2), ('exit 0', 0)],
)
def test_srun_is_told_of_tasks_that_failed_not_of_those_it_ended(end, status):
  """It gives the highest status: 143 of one that it ended would hide 137."""
  task = ROOT / 'launch' / 'slurm_task.sh'
  done = subprocess.run(['bash', str(task), 'sh', '-c', end], check=False)
  assert done.returncode == status


def test_a_cancelled_job_is_not_queued_again(launcher):
  """Its steps are killed as well, if they take long to save."""
  srun = launcher.folder / 'bin' / 'srun'
  srun.write_text('#!/bin/sh\nkill -TERM $PPID\nsleep 0.2\nexit 137\n')
  done = job(launcher, ROOT)
  assert done.returncode == 137
  assert launcher.calls('scontrol') == []


@pytest.mark.parametrize(
  ('options', 'ids'),
  [
    (['--gpus-per-node=4', '--tasks-per-node=1'], '0,1,2,3'),
    (['--gpus-per-node=4'], None),
    (['--gpus-per-node=1'], None),
    (['--tasks-per-node=2'], None),
  ],
)
def test_one_process_has_all_gpus_of_its_node(launcher, options, ids):
  """By itself JAX would take the first alone."""
  job(launcher, ROOT, *options)
  saw = json.loads((launcher.folder / 'srun.json').read_text())
  assert saw.get('JAX_LOCAL_DEVICE_IDS') == ids


def test_the_steps_have_the_jobs_cpus(launcher):
  """Since Slurm 22.05 srun takes them from this variable alone."""
  job(launcher, ROOT, SLURM_CPUS_PER_TASK='8')
  saw = json.loads((launcher.folder / 'srun.json').read_text())
  assert saw['SRUN_CPUS_PER_TASK'] == '8'
  job(launcher, ROOT)
  saw = json.loads((launcher.folder / 'srun.json').read_text())
  assert 'SRUN_CPUS_PER_TASK' not in saw


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (['--nodes=two'], "nodes 'two' is not valid: a number"),
    (['--gpus-per-node=0'], "gpus-per-node '0' is not valid"),
    (['--time=soon'], "time 'soon' is not valid: minutes"),
    (['--partition=a b'], "partition 'a b' is not valid"),
    (['--secret=NOT_SET_HERE'], 'secret NOT_SET_HERE is not set'),
    (['--workdir='], '--workdir is empty'),
    (['--restarts=no'], "restarts 'no' is not valid"),
    (
      ['--gpus-per-node=8', '--tasks-per-node=4'],
      '--tasks-per-node=4 with --gpus-per-node=8: give 1',
    ),
  ],
)
def test_wrong_options(launcher, change, message):
  done = launcher.run('slurm.sbatch', *RUN, *change)
  assert done.returncode == 2
  assert message in done.stderr
  assert launcher.calls() == []


def _free_ports(count):
  with_sockets = [socket.socket() for _ in range(count)]
  for s in with_sockets:
    s.bind(('', 0))
  ports = [s.getsockname()[1] for s in with_sockets]
  for s in with_sockets:
    s.close()
  return ports


_CONF = """
ClusterName=frugax
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,defer_batch
JobCompType=jobcomp/none
KillWait=250
ReturnToService=2
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} \\
  RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
  """One machine as a Slurm cluster.

  Args:
    folder: where its daemons keep all they write.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._daemons = []
    self.environ = os.environ | {
      'SLURM_CONF': str(folder / 'slurm.conf'),
      'PATH': _PATH,
    }

  def start(self):
    """Starts the daemons and waits for the node; raises if it does not come."""
    folder = self._folder
    folder.chmod(0o755)
    for name in ('state', 'spool'):
      (folder / name).mkdir()
    key = folder / 'munge.key'
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition('.')[0]
    (folder / 'slurm.conf').write_text(
      _CONF.format(
        host=host,
        user=subprocess.getoutput('id -un'),
        folder=folder,
        ports=_free_ports(2),
        cpus=max(2, os.cpu_count()),
      )
    )
    self._daemon(
      *('munged', '--foreground', '--force', f'--key-file={key}'),
      *(f'--socket={folder}/munge.socket', f'--pid-file={folder}/munge.pid'),
      *(f'--log-file={folder}/munge.log', f'--seed-file={folder}/munge.seed'),
    )
    self.wait(lambda: (folder / 'munge.socket').exists(), 'munged')
    self._daemon('slurmctld', '-D')
    self._daemon('slurmd', '-D', '-N', host)
    self.wait(lambda: 'idle' in self.call('sinfo', '-h', '-o', '%t'), 'slurmd')

  def _daemon(self, *command):
    log = (self._folder / f'{command[0]}.out').open('w')
    self._daemons.append(
      subprocess.Popen(
        [shutil.which(command[0], path=_PATH), *command[1:]],
        env=self.environ,
        stdout=log,
        stderr=subprocess.STDOUT,
      )
    )
    log.close()

  def call(self, *command):
    """The output of one of Slurm's programs."""
    return subprocess.run(
      command, env=self.environ, capture_output=True, text=True, check=False
    ).stdout

  def wait(self, condition, what, seconds=60):
    """Waits; says what the daemons said if it was in vain."""
    end = time.monotonic() + seconds
    while not condition():
      if time.monotonic() > end:
        logs = ''.join(
          f'{p}:\n{p.read_text()[-2000:]}\n' for p in self._folder.glob('*.out')
        )
        raise AssertionError(f'waited {seconds} s for {what}\n{logs}')
      time.sleep(0.2)

  def state(self, job):
    """RUNNING, COMPLETED ... of a job."""
    return re.search(
      r'JobState=(\S+)', self.call('scontrol', 'show', 'job', job)
    )[1]

  def stop(self):
    """Kills the jobs and ends the daemons."""
    self.call('scancel', '--signal=KILL', '--full', *self.call_lines('%A'))
    end = time.monotonic() + 20
    while self.call_lines('%A') and time.monotonic() < end:
      time.sleep(0.5)
    for daemon in reversed(self._daemons):
      daemon.terminate()
      try:
        daemon.wait(10)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    # What a daemon has left behind, by the variable that all have from here.
    mine = f'SLURM_CONF={self.environ["SLURM_CONF"]}\0'.encode()
    for process in pathlib.Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError):
        if mine in (process / 'environ').read_bytes():
          os.kill(int(process.name), signal.SIGKILL)

  def call_lines(self, what):
    """A column of the jobs that are queued or run."""
    return self.call('squeue', '--noheader', f'--format={what}').split()


@pytest.fixture
def cluster(tmp_path):
  """A `Cluster` that runs; its paths are short, for munge's socket."""
  missing = [d for d in DAEMONS if not shutil.which(d, path=_PATH)]
  if missing:
    pytest.skip(f'no {", ".join(missing)} here: on Debian, slurm-wlm has them')
  try:
    socket.gethostbyname(socket.gethostname())
  except OSError:
    pytest.skip("this machine does not know its own name's address")
  folder = tmp_path / 'slurm'
  folder.mkdir()
  it = Cluster(folder)
  try:
    it.start()
    yield it
  finally:
    it.stop()


def _steps(workdir):
  file = workdir / 'metrics.jsonl'
  lines = file.read_text().splitlines() if file.exists() else []
  rows = []
  for line in lines:
    try:
      rows.append(json.loads(line))
    except ValueError:  # it is being written
      break
  return {r['step']: r['loss'] for r in rows if 'loss' in r}


@pytest.mark.slow
def test_a_job_trains_is_cancelled_and_resumes(cluster, tmp_path):
  """Two processes; ended by scancel, by the time limit, and by their end."""
  workdir, data = tmp_path / 'runs' / 'a b', tmp_path / 'data'
  environ = cluster.environ | {
    'PYTHON': sys.executable,
    'PYTHONPATH': str(ROOT / 'research'),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
  }
  subprocess.run(
    [sys.executable, '-m', 'frugax.train.corpus', f'--data_dir={data}'],
    env=environ,
    check=True,
    capture_output=True,
  )
  log = tmp_path / 'job.log'
  last = 100

  def submit(*options):
    done = subprocess.run(
      [
        *('bash', str(ROOT / 'launch' / 'slurm.sbatch'), *options),
        *('--tasks-per-node=2', f'--sbatch-flag=--output={log}'),
        *('--sbatch-flag=--parsable', f'--workdir={workdir}'),
        '--config=configs/llama.py:size=tiny',
        *(f'--config.data.data_dir={data}', f'--config.steps={last}'),
        *('--config.batch_size=8', '--config.data.sequence_length=64'),
        *('--config.eval.tokens=1000', '--config.eval.batch_size=8'),
        *('--config.eval.every=0', '--config.checkpoint.every=0'),
        *('--config.log.every=1', '--config.log.tensorboard=false'),
      ],
      cwd=ROOT,
      env=environ,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

  def ended(job):
    return cluster.state(job) in ('COMPLETED', 'CANCELLED', 'FAILED')

  def trains_beyond(step):
    return max(_steps(workdir), default=0) > step

  # It trains, is cancelled, and has saved where it stopped.
  job = submit()
  cluster.wait(lambda: trains_beyond(5) or ended(job), 'the first steps', 600)
  assert trains_beyond(5), log.read_text()
  second = submit()  # waits for the first: one folder, one writer
  assert cluster.state(second) == 'PENDING'
  cluster.call('scancel', second)
  cluster.call('scancel', job)
  cluster.wait(lambda: ended(job), 'the end of the job', 300)
  assert 'stopped by a signal; saved at step' in log.read_text()
  stopped = int(re.findall(r'saved at step (\d+)', log.read_text())[-1])
  assert 5 < stopped < last
  assert not (workdir / 'summary.json').exists()

  # The same command goes on. Near its time limit the job's shell has SIGUSR1:
  # the run saves and is queued again.
  job = submit()
  beyond = stopped + 3
  cluster.wait(lambda: trains_beyond(beyond) or ended(job), 'more steps', 600)
  text = log.read_text()
  assert trains_beyond(beyond), text
  assert f'resuming from the checkpoint at step {stopped}' in text
  cluster.call('scancel', '--batch', '--signal=USR1', job)
  again = 'the time is over: the run has saved, and the job is queued again'
  cluster.wait(lambda: again in log.read_text(), 'the requeue', 300)
  saved = int(re.findall(r'saved at step (\d+)', log.read_text())[-1])
  assert stopped + 3 < saved < last
  cluster.wait(lambda: ended(job), 'the last step', 600)
  assert f'resuming from the checkpoint at step {saved}' in log.read_text()
  assert cluster.state(job) == 'COMPLETED', log.read_text()
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['steps'] == last
  assert summary['hardware']['processes'] == 2
  assert sorted(_steps(workdir)) == list(range(1, last + 1))


@pytest.mark.slow
def test_slurm_starts_a_job_again_that_lost_a_process(cluster, tmp_path):
  """A trainer is killed once: what srun says of it is what the job acts on."""
  workdir, log = tmp_path / 'run', tmp_path / 'job.log'
  workdir.mkdir()
  trainer = tmp_path / 'python'
  trainer.write_text(f"""#!/bin/sh
[ "$1" != -c ] || exec {shlex.quote(sys.executable)} "$@"
[ -e {workdir}/again ] || {{
  [ "$SLURM_PROCID" = 1 ] || exec sleep 60
  touch {workdir}/again
  kill -9 $$
}}
echo '{{}}' >{workdir}/summary.json
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
  job_id = done.stdout.strip()
  ends = ('COMPLETED', 'FAILED', 'CANCELLED')
  cluster.wait(lambda: cluster.state(job_id) in ends, 'the second start', 300)
  assert cluster.state(job_id) == 'COMPLETED', log.read_text()
  assert 'a process was lost (137): the job is queued again' in log.read_text()
  assert (workdir / 'summary.json').exists()
