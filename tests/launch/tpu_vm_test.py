"""launch/tpu_vm.sh, with a TPU that is played by folders and processes."""

import itertools
import json
import pathlib
import re
import shutil
import subprocess
import time

import pytest

from .conftest import AWKWARD, ROOT

TPU = ('--topology=v5e:4x4', '--zone=us-west4-a')
BUCKET = '--workdir=gs://my-bucket/runs/1b'
RUN = (*TPU, BUCKET, '--config=configs/llama.py:size=1b,opt=stable_spam')
SECRET = 'not-to-be-seen'


def flag(argv, name):
  """The value of one flag of a command."""
  (value,) = [a.partition('=')[2] for a in argv if a.startswith(f'--{name}=')]
  return value


def runs(launcher):
  """What the trainer saw, each time that a host started it."""
  file = (
    launcher.folder / 'buckets' / 'my-bucket' / 'runs' / '1b' / 'runs.jsonl'
  )
  lines = file.read_text().splitlines() if file.exists() else []
  return [json.loads(line) for line in lines]


def test_one_command_starts_a_run(launcher):
  """The command of the README, as gcloud gets it."""
  planned = launcher.dry_run('tpu_vm.sh', 'all', *RUN, '--spot')
  create = [
    'gcloud',
    'compute',
    'tpus',
    'tpu-vm',
    'create',
    'frugax-1b-4deecbdc',
  ]
  create += ['--zone=us-west4-a', '--accelerator-type=v5litepod-16']
  create += ['--version=v2-alpha-tpuv5-lite', '--spot', '--quiet']
  assert planned[0] == create
  assert [c[4] if c[0] == 'gcloud' else c[0] for c in planned] == [
    *('create', 'ssh', 'bash', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'delete')
  ]
  start = flag(planned[5], 'command')
  assert start == (
    'bash frugax/code/launch/worker.sh start 4 --workdir=gs://my-bucket/runs/1b'
    ' --config=configs/llama.py:size=1b,opt=stable_spam'
  )
  assert flag(planned[5], 'worker') == 'all'


def test_all_steps(launcher):
  """Create, send, install, train on two hosts, tear down; all as planned."""
  (launcher.folder / 'steps').write_text('0')
  data = '--config.data.data_dir=gs://my-data/tfds'
  arguments = ('all', *RUN, *AWKWARD, data)
  arguments += ('--labels=team=a', '--project=my-project')
  secrets = {'WANDB_API_KEY': SECRET + "'$(id)' \n", 'HF_TOKEN': ''}
  planned = launcher.dry_run('tpu_vm.sh', *arguments, **secrets)
  done = launcher.run('tpu_vm.sh', *arguments, **secrets)
  assert done.returncode == 0, done.stderr
  assert 'a step' in done.stdout

  def gcloud(calls):
    calls = [c for c in calls if c[0] == 'gcloud' and c[4] != 'describe']
    return [call for call, _ in itertools.groupby(calls)]  # asked repeatedly

  assert gcloud(launcher.calls()) == gcloud(planned)
  seen = runs(launcher)
  assert len(seen) == 2  # one a host
  for run in seen:
    assert run['argv'][3:-1] == [RUN[-1], *AWKWARD]
    assert run['argv'][-1].endswith('/frugax/buckets/my-data/tfds')
    workdir = flag(run['argv'], 'workdir')
    assert re.search(r'hosts/\d/frugax/buckets/my-bucket/runs/1b$', workdir)
    assert run['environ'] == {
      'WANDB_API_KEY': secrets['WANDB_API_KEY'],
      'JAX_NUM_PROCESSES': '4',
    }
  assert not (launcher.folder / 'state').exists()
  # The secret is in no command, in no output, and no longer on this machine.
  told = json.dumps([planned, launcher.calls()]) + done.stdout + done.stderr
  assert SECRET not in told
  left = [p for p in (launcher.folder / 'home').rglob('*') if p.is_file()]
  assert left == []


@pytest.mark.slow
def test_installs_with_the_constraints(launcher):
  (launcher.folder / 'steps').write_text('0')
  done = launcher.run('tpu_vm.sh', 'all', *RUN, '--extras=tpu,wandb')
  assert done.returncode == 0, done.stderr
  installs = [c for c in launcher.calls('uv') if c[1:3] == ['pip', 'install']]
  assert len(installs) == 2
  for install in installs:
    where = install[install.index('--editable') + 1]
    assert where.endswith('/frugax/code[tpu,wandb]')
    constraint = pathlib.Path(install[install.index('--constraint') + 1])
    assert constraint.name == 'py312.txt'
    assert (ROOT / 'launch' / 'constraints' / constraint.name).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('hosts', 'status'),
  [
    ('1 1', 1),
    ('2 2', 2),
    ('1 137', 137),
    ('137 134', 137),
    ('134 1', 1),
    ('2 134', 2),
    ('134 143', 134),
    ('0 143', 0),
  ],
)
def test_a_run_gives_its_status_and_the_tpu_back(launcher, hosts, status):
  """That of the cause: a host gives 134 when it has lost another."""
  (launcher.folder / 'steps').write_text(hosts)
  done = launcher.run('tpu_vm.sh', 'all', *RUN)
  assert done.returncode == status
  assert launcher.calls('gcloud')[-1][4] == 'delete'
  # What every host has said of it, not only the first, which is followed.
  for host, own in enumerate(hosts.split() if status else ()):
    assert f'] host {host} ends with {own}\n' in done.stdout


def test_no_tpu_to_be_had(launcher):
  (launcher.folder / 'fail').write_text('create')
  done = launcher.run('tpu_vm.sh', 'all', *RUN)
  assert done.returncode == 3
  assert [c[4] for c in launcher.calls('gcloud')] == ['describe', 'create']


@pytest.mark.parametrize('failing', ['scp', 'ssh'])
def test_a_set_up_that_fails_leaves_the_tpu_and_says_so(launcher, failing):
  (launcher.folder / 'fail').write_text(failing)
  done = launcher.run('tpu_vm.sh', 'all', *RUN, HF_TOKEN=SECRET)
  assert done.returncode == 3
  # The file with the secret is gone.
  left = [p for p in (launcher.folder / 'home').rglob('*') if p.is_file()]
  assert left == []
  assert (
    'frugax-1b-4deecbdc is still there, and costs until the step down'
    in done.stderr
  )
  assert (launcher.folder / 'state').exists()
  assert runs(launcher) == []


@pytest.mark.slow
def test_a_clone_that_fails_leaves_what_answers(launcher):
  """Without its script a host that has had a run would be unreachable."""
  assert launcher.run('tpu_vm.sh', 'up', *RUN).returncode == 0
  (launcher.folder / 'steps').write_text('1')
  assert launcher.run('tpu_vm.sh', 'run', *RUN).returncode == 1
  nowhere = ('--commit=HEAD', f'--repo={launcher.folder / "nowhere"}')
  done = launcher.run('tpu_vm.sh', 'run', *RUN, *nowhere)
  assert done.returncode == 3
  done = launcher.run('tpu_vm.sh', 'report', *RUN)
  assert done.stdout == 'READY 1\n'
  for host in (launcher.folder / 'hosts').iterdir():
    shutil.rmtree(host / 'frugax' / 'code')
  done = launcher.run('tpu_vm.sh', 'report', *RUN)
  assert done.stdout == 'READY none\n'


def test_a_lost_connection_while_waiting_is_no_lost_tpu(launcher):
  (launcher.folder / 'fail').write_text('describe\n' * 4)
  done = launcher.run('tpu_vm.sh', 'up', *RUN, '--queue')
  assert done.returncode == 0, done.stderr
  (launcher.folder / 'fail').write_text('describe\n' * 5)
  assert launcher.run('tpu_vm.sh', 'up', *RUN, '--queue').returncode == 3


@pytest.mark.slow
def test_what_another_run_has_left_is_not_of_this_one(launcher):
  name = '--name=shared'
  run = (*RUN, name)
  longer = (*run, '--config.steps=9')
  elsewhere = (*TPU, '--workdir=gs://my-bucket/runs/2b', *RUN[3:], name)
  no_config = (*TPU, BUCKET, name)
  assert launcher.run('tpu_vm.sh', 'up', *run).returncode == 0

  def report(options):
    return launcher.run('tpu_vm.sh', 'report', *options).stdout.split()[1]

  (launcher.folder / 'steps').write_text('0')
  done = launcher.run('tpu_vm.sh', 'run', *run, *AWKWARD)
  assert done.returncode == 0, done.stderr
  assert report((*run, *AWKWARD)) == report(no_config) == '0'
  assert report(run) == report(longer) == report(elsewhere) == 'none'
  done = launcher.run('tpu_vm.sh', 'logs', *longer)
  assert done.returncode == 2 and 'no run with these options' in done.stderr

  (launcher.folder / 'steps').unlink()
  done = launcher.run('tpu_vm.sh', 'run', '--detach', *longer)
  assert done.returncode == 0, done.stderr
  assert report(longer) == report(no_config) == 'running'
  assert report(run) == report(elsewhere) == 'another'
  for other in (run, elsewhere):
    done = launcher.run('tpu_vm.sh', 'run', *other)
    assert done.returncode == 2
    assert 'a run with another workdir or config is going on' in done.stderr
  assert launcher.run('tpu_vm.sh', 'stop', *run).returncode == 0
  assert launcher.run('tpu_vm.sh', 'logs', *longer).returncode == 143


@pytest.mark.slow
def test_a_stopped_run_that_failed_to_save_is_not_told_to_have_saved(launcher):
  (launcher.folder / 'stopped').write_text('1')
  assert launcher.run('tpu_vm.sh', 'up', *RUN).returncode == 0
  done = launcher.run('tpu_vm.sh', 'run', '--detach', *RUN)
  assert done.returncode == 0, done.stderr
  end = time.monotonic() + 60
  while len(runs(launcher)) < 2 and time.monotonic() < end:
    time.sleep(0.1)
  assert launcher.run('tpu_vm.sh', 'stop', *RUN).returncode == 0
  assert launcher.run('tpu_vm.sh', 'logs', *RUN).returncode == 1
  done = launcher.run('tpu_vm.sh', 'report', *RUN)
  assert done.stdout == 'READY 1\n'


def test_a_bucket_that_cannot_be_mounted_is_no_folder(launcher):
  """A run would be saved on a disk that `down` deletes."""
  (launcher.folder / 'fail').write_text('gcsfuse\ngcsfuse')
  done = launcher.run('tpu_vm.sh', 'all', *RUN)
  assert done.returncode == 3
  assert 'gs://my-bucket cannot be mounted' in done.stderr
  assert [c for c in launcher.calls('python') if 'frugax.train' in c] == []
  assert list(launcher.folder.rglob('runs.jsonl')) == []


@pytest.mark.slow
def test_a_bucket_in_two_words_is_mounted(launcher):
  (launcher.folder / 'steps').write_text('0')
  two = ('--config.data.data_dir', 'gs://my-data/tfds')
  done = launcher.run('tpu_vm.sh', 'all', *RUN, *two)
  assert done.returncode == 0, done.stderr
  for run in runs(launcher):
    assert flag(run['argv'], 'config.data.data_dir').endswith(
      '/frugax/buckets/my-data/tfds'
    )


@pytest.mark.slow
def test_a_run_outlives_the_connection(launcher):
  """Started detached, looked at, refused a second time, stopped, resumed."""
  assert launcher.run('tpu_vm.sh', 'up', *RUN).returncode == 0
  done = launcher.run('tpu_vm.sh', 'report', *RUN)
  assert done.stdout == 'READY none\n'
  done = launcher.run('tpu_vm.sh', 'run', '--detach', *RUN)
  assert done.returncode == 0, done.stderr
  done = launcher.run('tpu_vm.sh', 'report', *RUN)
  assert done.stdout == 'READY running\n'
  done = launcher.run('tpu_vm.sh', 'run', '--detach', *RUN)
  assert done.returncode == 0 and 'a run is going on' in done.stderr
  assert len(runs(launcher)) == 2

  # The first connection that follows is cut, the second sees the end.
  follow = subprocess.Popen(
    launcher.command('tpu_vm.sh', 'logs', *RUN),
    cwd=launcher.folder,
    env=launcher.environ,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert 'a step' in follow.stdout.readline()
  _kill_connection(launcher)
  assert 'a step' in follow.stdout.readline()
  done = launcher.run('tpu_vm.sh', 'stop', *RUN)
  assert done.returncode == 0, done.stderr
  assert follow.wait(30) == 143
  follow.stdout.close()
  done = launcher.run('tpu_vm.sh', 'report', *RUN)
  assert done.stdout == 'READY cancelled\n'

  (launcher.folder / 'steps').write_text('0')
  done = launcher.run('tpu_vm.sh', 'run', *RUN)
  assert done.returncode == 0, done.stderr
  assert len(runs(launcher)) == 4


def _kill_connection(launcher):
  """Ends the `tail` that follows the log of the first host."""
  log = str(launcher.folder / 'hosts' / '0' / 'frugax' / 'log')
  for process in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      argv = (process / 'cmdline').read_bytes().decode().split('\0')
    except OSError:
      continue
    if argv[0].endswith('tail') and log in argv:
      subprocess.run(['kill', process.name], check=True)
      return
  raise AssertionError('nothing follows the log')


@pytest.mark.slow
def test_a_queued_resource(launcher):
  (launcher.folder / 'steps').write_text('0')
  planned = launcher.dry_run('tpu_vm.sh', 'all', *RUN, '--queue', '--spot')
  assert planned[0][2:] == [
    *(
      'tpus',
      'queued-resources',
      'create',
      'frugax-1b-4deecbdc',
      '--zone=us-west4-a',
    ),
    *('--node-id=frugax-1b-4deecbdc', '--accelerator-type=v5litepod-16'),
    *('--runtime-version=v2-alpha-tpuv5-lite', '--spot', '--quiet'),
  ]
  done = launcher.run('tpu_vm.sh', 'all', *RUN, '--queue', '--spot')
  assert done.returncode == 0, done.stderr
  assert 'the TPU frugax-1b-4deecbdc is WAITING_FOR_RESOURCES' in done.stderr
  calls = launcher.calls('gcloud')
  assert planned[0] in calls
  assert calls[-1] == planned[-1]
  assert calls[-1][3:] == [
    *('queued-resources', 'delete', 'frugax-1b-4deecbdc', '--zone=us-west4-a'),
    *('--force', '--quiet'),
  ]


def test_a_clone_of_a_commit(launcher):
  commit = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True
  ).stdout.strip()
  repo = "https://example.com/it's mine.git"
  planned = launcher.dry_run(
    'tpu_vm.sh', 'run', *RUN, '--commit=HEAD', f'--repo={repo}'
  )
  assert [c[4] for c in planned] == ['ssh'] * 5  # nothing is copied
  command = flag(planned[1], 'command')
  swap = 'rm -rf frugax/code && mv frugax/new frugax/code'
  assert f'checkout --quiet {commit} && {swap} && bash ' in command
  quoted = command.partition('clone --quiet ')[2].partition(' frugax/new')[0]
  assert (
    subprocess.run(
      ['sh', '-c', f'printf %s {quoted}'], capture_output=True, text=True
    ).stdout
    == repo
  )


def test_packs_the_working_tree(tmp_path):
  """What is committed, changed, new and deleted, without what is ignored."""

  def git(*arguments):
    subprocess.run(
      ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments],
      cwd=tmp_path / 'a b',
      check=True,
      capture_output=True,
    )

  folder = tmp_path / 'a b'
  (folder / 'launch').mkdir(parents=True)
  for script in ('lib.sh', 'pack.sh'):
    shutil.copy(ROOT / 'launch' / script, folder / 'launch')
  files = {'kept': '1', 'changed': '1', 'deleted': '1', '.gitignore': 'data/\n'}
  for name, text in files.items():
    (folder / name).write_text(text)
  git('init', '--quiet')
  git('add', '.')
  git('commit', '--quiet', '-m', 'first')
  (folder / 'changed').write_text('2')
  (folder / 'new file').write_text('3')
  (folder / 'deleted').unlink()
  (folder / 'data').mkdir()
  (folder / 'data' / 'large').write_text('4')
  status = _git_status(folder)

  packed = tmp_path / 'code.tgz'
  subprocess.run(['bash', folder / 'launch' / 'pack.sh', packed], check=True)
  assert _git_status(folder) == status  # nothing was staged
  there = tmp_path / 'there'
  there.mkdir()
  subprocess.run(['tar', '-xzf', packed, '-C', there], check=True)
  names = {p.name for p in there.iterdir()}
  assert names == {
    'kept',
    'changed',
    'new file',
    '.gitignore',
    'launch',
    '.git',
  }
  assert (there / 'changed').read_text() == '2'
  # The commit, and that the code differs from it, can be told.
  assert _git_status(there) == status


def _git_status(folder):
  return [
    subprocess.run(
      ['git', '-C', folder, *command],
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for command in (['rev-parse', 'HEAD'], ['status', '--porcelain'])
  ]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (['--topology=v5e:4x5'], "did you mean 'v5e:4x4'"),
    (['--topology=tpu7x:2x2x1'], 'no TPU VMs of tpu7x:2x2x1: use launch/gke'),
    (['--zone=us-west4'], "zone 'us-west4' is not valid: one is us-west4-a"),
    (['--name=Big_TPU'], "name 'Big_TPU' is not valid: lower-case"),
    (['--name=tpu\n'], 'is not valid: lower-case'),
    (['--project=My Project'], "project 'My Project' is not valid"),
    (['--labels=Team=a'], "label 'Team=a' is not valid"),
    (['--workdir=runs/1b'], "workdir 'runs/1b' is not valid: give gs://"),
    (['--workdir=gs://b'], "workdir 'gs://b' is not valid: give gs://"),
    (['--commit=nothing-of-that-name'], 'git knows no such commit'),
    (
      ['--commit=HEAD', f'--repo=https://me:{SECRET}@example.com/a'],
      'has a password',
    ),
    (['--commit=HEAD', f'--repo=https://{SECRET}@example.com/a'], 'or a token'),
    (['--commit=HEAD', f'--repo=HTTP://{SECRET}@a.b:80/c'], 'or a token'),
    (['--commit=HEAD', f'--repo=ssh://me:{SECRET}@a.b/c'], 'has a password'),
    (['--workdir=gs://bucket/../x'], 'give it without . and ..'),
    (['--workdir=/bucket/../x'], 'give it without . and ..'),
    (['--workdir=/bucket/x/..'], 'give it without . and ..'),
    (['--repo=https://example.com/a'], '--repo without --commit'),
    (['--secret=NOT_SET_HERE'], 'secret NOT_SET_HERE is not set'),
    ([f'--secret={SECRET}'], 'give the name of an environment variable'),
    (['--extras=tpu;id'], "extras 'tpu;id' is not valid"),
  ],
)
def test_wrong_options_are_found_early(launcher, change, message):
  done = launcher.run('tpu_vm.sh', 'all', *RUN, *change)
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.startswith('error: ')
  assert launcher.calls() == []
  if '--commit=HEAD' in change:
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize(
  'repo',
  [
    'https://example.com/a@b/c.git',
    'ssh://git@example.com/a.git',
    'git@example.com:a/b.git',
    '/a folder/of: mine@here',
  ],
)
def test_a_repository_without_a_secret_in_its_name(launcher, repo):
  arguments = ('run', *RUN, '--commit=HEAD', f'--repo={repo}')
  clone = flag(launcher.dry_run('tpu_vm.sh', *arguments)[1], 'command')
  assert repo in clone


def test_an_unknown_step(launcher):
  done = launcher.run('tpu_vm.sh', 'al', *RUN)
  assert "unknown step 'al': did you mean 'all'?" in done.stderr
