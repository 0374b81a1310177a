"""What gcloud itself, where it is, says of the commands that it is given."""

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import threading

import pytest

from .conftest import AWKWARD
from .sweep_test import sweep
from .tpu_vm_test import RUN, SECRET

GCLOUD = shutil.which('gcloud')
pytestmark = pytest.mark.skipif(not GCLOUD, reason='no gcloud here')

# One that its parser refuses, so that its word can be relied on.
WRONG = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'create', 'a', '--nonsense=1']


def _environ(folder, **more):
  return {
    'PATH': os.environ['PATH'],
    'CLOUDSDK_CONFIG': str(folder),
    'CLOUDSDK_CORE_PROJECT': 'my-project',
    # Nor may a machine in Google's cloud lend it an account.
    'CLOUDSDK_CORE_CHECK_GCE_METADATA': 'false',
    'HOME': str(folder),
  } | more


def _refusal(argv, folder):
  """What gcloud says of its arguments; '' if it got as far as to log in."""
  done = subprocess.run(
    [GCLOUD, *argv[1:]],
    env=_environ(folder),
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode
  if 'do not currently have an active account' in done.stderr:
    return ''
  return done.stderr


def _planned(launcher, *arguments, **environ):
  planned = launcher.dry_run('tpu_vm.sh', *arguments, **environ)
  return [c for c in planned if c[0] == 'gcloud']


@pytest.mark.slow
@pytest.mark.parametrize('options', [('--spot',), ('--spot', '--queue')])
def test_it_takes_every_command_of_tpu_vm(launcher, options):
  arguments = (*RUN, *options, *AWKWARD, '--labels=team=a,run=b')
  create_flag = '--create-flag=--network=default'
  planned = _planned(
    launcher, 'all', *arguments, create_flag, WANDB_API_KEY=SECRET
  )
  for step in ('report', 'stop', 'logs', 'last', 'run'):
    more = _planned(launcher, step, *arguments)
    planned += [c for c in more if c not in planned]
  assert {c[4] for c in planned} >= {
    *('create', 'describe', 'ssh', 'scp', 'delete')
  }
  for argv in planned:
    assert _refusal(argv, launcher.folder) == '', argv
  assert 'unrecognized arguments' in _refusal(WRONG, launcher.folder)


def test_it_takes_the_command_that_creates(launcher):
  create, *_ = _planned(launcher, 'up', *RUN, '--spot')
  assert _refusal(create, launcher.folder) == ''
  assert 'unrecognized arguments' in _refusal(WRONG, launcher.folder)


def test_it_takes_the_command_that_copies_a_sweep(launcher):
  argv = sweep._copy('gs://my-bucket/rank', launcher.folder / 'rank')
  assert _refusal(argv, launcher.folder) == ''


class _Bucket(http.server.BaseHTTPRequestHandler):
  """Cloud Storage with the bucket my-bucket, which is empty, and no other."""

  def do_GET(self):
    listing = self.path.startswith('/storage/v1/b/my-bucket/o?')
    missing = {'error': {'code': 404, 'message': 'does not exist'}}
    answer = {'kind': 'storage#objects'} if listing else missing
    body = json.dumps(answer).encode()
    self.send_response(200 if listing else 404)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture
def storage(launcher, monkeypatch):
  """gcloud reads a `_Bucket`, as no one."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Bucket)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}/storage/v1/'
  environ = _environ(
    launcher.folder,
    CLOUDSDK_AUTH_DISABLE_CREDENTIALS='true',
    CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE=url,
  )
  for key, value in environ.items():
    monkeypatch.setenv(key, value)
  monkeypatch.setattr(sweep, '_CACHE', launcher.folder / '.cache/sweeps')
  with contextlib.closing(server.socket):
    yield
    server.shutdown()


def test_a_sweep_begins_in_a_folder_that_a_bucket_has_not_yet(storage):
  assert not sweep._local('gs://my-bucket/rank').exists()
  with pytest.raises(ValueError, match='cannot read gs://no-bucket/rank: ERR'):
    sweep._local('gs://no-bucket/rank')
