"""Stands in for the programs that launchers call, by the name it has.

Each call is a line of $FAKE/calls.jsonl: the program's name, its arguments. A
cloud is played as well: TPUs with as many hosts as $FAKE_HOSTS says, each a
folder that is the home of what `gcloud ... ssh` runs there. $FAKE/fail holds
the names of calls, such as create, that are to fail, each line once.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

_FAKE = pathlib.Path(os.environ.get('FAKE', '.'))
_HOSTS = int(os.environ.get('FAKE_HOSTS', '2'))


def _record(name, arguments):
  with (_FAKE / 'calls.jsonl').open('a') as f:
    f.write(json.dumps([name, *arguments]) + '\n')


def _fails(call):
  file = _FAKE / 'fail'
  lines = file.read_text().splitlines() if file.exists() else []
  if call not in lines:
    return False
  lines.remove(call)
  file.write_text('\n'.join(lines))
  return True


def _flag(arguments, name):
  found = [a for a in arguments if a.startswith(f'--{name}=')]
  return found[0].partition('=')[2] if found else None


def _homes(arguments):
  worker = _flag(arguments, 'worker')
  numbers = range(_HOSTS) if worker == 'all' else [int(worker)]
  return [_FAKE / 'hosts' / str(i) for i in numbers]


def gcloud(arguments):
  """The part of gcloud that the launchers use, for one TPU at a time."""
  call, state = arguments[3], _FAKE / 'state'
  if _fails(call):
    return 1
  if call == 'create':
    for i in range(_HOSTS):
      (_FAKE / 'hosts' / str(i)).mkdir(parents=True)
    queued = arguments[2] == 'queued-resources'
    # A queue answers at first that it waits.
    state.write_text('WAITING_FOR_RESOURCES\nACTIVE' if queued else 'READY')
  elif call == 'describe':
    if not state.exists():
      print('NOT_FOUND: no such resource', file=sys.stderr)
      return 1
    now, *later = state.read_text().split()
    if later:
      state.write_text('\n'.join(later))
    print(now)
    print('WARNING: a new version is available.', file=sys.stderr)
  elif call == 'delete':
    state.unlink(missing_ok=True)
    preempt()
  elif call == 'scp':
    *files, target = [a for a in arguments[4:] if not a.startswith('--')]
    assert target.endswith(':'), target
    for home in _homes(arguments):
      for file in files:
        shutil.copy(file, home)
  elif call == 'ssh':
    statuses = []
    for home in _homes(arguments):
      env = os.environ | {'HOME': str(home), 'PATH': os.environ['FAKE_PATH']}
      done = subprocess.run(
        # As sshd does: the command is one string for the user's shell.
        ['bash', '-c', _flag(arguments, 'command')],
        cwd=home,
        env=env,
        check=False,
      )
      statuses.append(done.returncode)
    return next(filter(None, statuses), 0)
  return 0


def preempt():
  """Ends what the hosts run, at once, and removes them."""
  for pid in (_FAKE / 'hosts').glob('*/trainer'):
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(pid.read_text()), signal.SIGKILL)
  shutil.rmtree(_FAKE / 'hosts', ignore_errors=True)


def python3(arguments):
  """A host's Python: `pip install uv`, or any other program."""
  if arguments[:3] != ['-m', 'pip', 'install']:
    os.execv(sys.executable, [sys.executable, *arguments])
  uv = pathlib.Path(os.environ['HOME'], '.local', 'bin', 'uv')
  uv.parent.mkdir(parents=True, exist_ok=True)
  uv.unlink(missing_ok=True)
  uv.symlink_to(_FAKE / 'bin' / 'uv')
  return 0


def uv(arguments):
  """uv: makes an environment whose Python is the trainer below."""
  if arguments[0] == 'venv':
    python = pathlib.Path(arguments[-1], 'bin', 'python')
    python.parent.mkdir(parents=True)
    python.symlink_to(_FAKE / 'bin' / 'python')
  return 0


def gcsfuse(arguments):
  """A bucket that is a folder of the cloud."""
  if arguments == ['--help']:
    print('--metadata-cache-negative-ttl-secs')
    return 0
  *_, bucket, folder = arguments
  if _fails('gcsfuse'):
    print('bucket does not exist', file=sys.stderr)
    return 1
  there = _FAKE / 'buckets' / bucket
  there.mkdir(parents=True, exist_ok=True)
  os.rmdir(folder)
  os.symlink(there, folder)
  return 0


def mountpoint(arguments):
  """Whether a folder is a bucket."""
  return 0 if os.path.islink(arguments[-1]) else 32


def findmnt(arguments):
  """A disk of its own below $FAKE/shared; all else is on that of the host."""
  folder = pathlib.Path(arguments[-1])
  shared = folder.is_relative_to(_FAKE / 'shared')
  print('server:/share nfs4' if shared else '/dev/root ext4')
  return 0


def kubectl(arguments):
  """A JobSet with the conditions in $FAKE/jobset, and what secrets hold."""
  if arguments[:2] == ['get', 'jobset']:
    conditions = _FAKE / 'jobset'
    print(conditions.read_text() if conditions.exists() else '', end='')
  if arguments[:2] == ['create', 'secret']:
    files = [a.split('=', 2)[1:] for a in arguments if '--from-file=' in a]
    values = {k: pathlib.Path(file).read_text() for k, file in files}
    (_FAKE / 'secret.json').write_text(json.dumps(values))
  return 0


def srun(_):
  """The steps of a job, with the status in $FAKE/srun."""
  kept = ('JAX_', 'SRUN_')
  environ = {k: v for k, v in os.environ.items() if k.startswith(kept)}
  (_FAKE / 'srun.json').write_text(json.dumps(environ))
  status = _FAKE / 'srun'
  return int(status.read_text()) if status.exists() else 0


def python(arguments):
  """The trainer: takes steps until $FAKE/steps are done or SIGTERM comes.

  Its status is that in $FAKE/steps, or after SIGTERM in $FAKE/stopped, or 0.
  """
  if arguments[0] == '-c':
    os.execv(sys.executable, [sys.executable, *arguments])
  if arguments[:2] == ['-m', 'frugax.train.corpus']:
    return 0
  workdir = pathlib.Path(_flag(arguments, 'workdir'))
  workdir.mkdir(parents=True, exist_ok=True)
  pathlib.Path(os.environ['HOME'], 'trainer').write_text(str(os.getpid()))
  stopped = []
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
  saw = {k: os.environ.get(k) for k in ('WANDB_API_KEY', 'JAX_NUM_PROCESSES')}
  with (workdir / 'runs.jsonl').open('a') as f:
    f.write(json.dumps({'argv': arguments, 'environ': saw}) + '\n')
  print('a step', flush=True)
  end = time.monotonic() + 60
  while time.monotonic() < end:
    if stopped:
      print('stopped', flush=True)
      status = _FAKE / 'stopped'
      return int(status.read_text()) if status.exists() else 0
    if (_FAKE / 'steps').exists():
      # One status for all hosts, or one for each.
      statuses = (_FAKE / 'steps').read_text().split()
      host = pathlib.Path(os.environ['HOME']).name
      status = int(statuses[int(host) if len(statuses) > 1 else 0])
      print(f'host {host} ends with {status}', flush=True)
      if status == 0:
        (workdir / 'summary.json').write_text(json.dumps({'steps': 1}))
      return status
    time.sleep(0.05)
  return 1


def main(program, arguments):
  """Plays one program; those without a part above only record."""
  name = pathlib.Path(program).name
  _record(name, arguments)
  return globals().get(name, lambda _: 0)(arguments)


if __name__ == '__main__':
  sys.exit(main(sys.argv[0], sys.argv[1:]))
