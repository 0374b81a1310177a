"""launch/gke_xpk.sh and its manifest, as xpk and kubectl read them."""

import base64
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading

import pytest

from .conftest import AWKWARD, words

JOBSET = (
  *('--via=jobset', '--topology=v5e:4x4', '--image=example.com/frugax:1'),
  *('--workdir=gs://my-bucket/runs/1b', '--config=configs/llama.py:size=1b'),
)
XPK = (
  *('--cluster=c', '--zone=us-west4-a', '--project=my-project'),
  *('--topology=v5e:4x4', '--image=example.com/frugax:1'),
  *('--workdir=/bucket/runs/1b', '--config=configs/llama.py:size=1b'),
)
NAME, XPK_NAME = 'frugax-1b-4deecbdc', 'frugax-1b-4cc8ae48'
DELETE = ['kubectl', 'delete', 'jobset', NAME, '--cascade=foreground', '--wait']
XPK_DELETE = [
  [
    *('xpk', 'workload', 'delete', '--cluster=c', f'--workload={XPK_NAME}'),
    *('--zone=us-west4-a', '--project=my-project', '--force'),
  ],
  [
    *('kubectl', 'wait', 'pod'),
    f'--selector=jobset.sigs.k8s.io/jobset-name={XPK_NAME}',
    *('--for=delete', '--timeout=300s'),
  ],
]
SECRET = 'not-to-be-seen'
# Besides what a shell might do to it, what Kubernetes might.
ALL = (*AWKWARD, '--config.data.data_dir=$(HOME) $$(HOME) $$ \\$(X)\t"')
PATH = os.environ['PATH']


class Api(http.server.BaseHTTPRequestHandler):
  """As much of a cluster's API as kubectl asks for before it parses a file."""

  GROUP, VERSION = 'jobset.x-k8s.io', 'v1alpha2'

  def do_GET(self):
    version = {'groupVersion': f'{self.GROUP}/{self.VERSION}'}
    version['version'] = self.VERSION
    resource = {'name': 'jobsets', 'singularName': 'jobset', 'kind': 'JobSet'}
    resource |= {'namespaced': True, 'verbs': ['create', 'get']}
    group = {'name': self.GROUP, 'versions': [version]}
    answers = {
      '/api': {'kind': 'APIVersions', 'versions': ['v1']},
      '/api/v1': {
        'kind': 'APIResourceList',
        'groupVersion': 'v1',
        'resources': [
          {
            **{'name': 'pods', 'singularName': 'pod', 'kind': 'Pod'},
            **{'namespaced': True, 'verbs': ['get', 'list', 'watch']},
          }
        ],
      },
      '/api/v1/namespaces/default/pods': {
        **{'apiVersion': 'v1', 'kind': 'PodList', 'items': []},
        'metadata': {'resourceVersion': '1'},
      },
      '/apis': {
        'kind': 'APIGroupList',
        'apiVersion': 'v1',
        'groups': [group | {'preferredVersion': version}],
      },
      f'/apis/{self.GROUP}/{self.VERSION}': {
        'kind': 'APIResourceList',
        'groupVersion': version['groupVersion'],
        'resources': [resource],
      },
    }
    answer = answers.get(self.path.partition('?')[0])
    self.send_response(200 if answer else 404)
    self.send_header('Content-Type', 'application/json')
    self.end_headers()
    self.wfile.write(json.dumps(answer or {}).encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def kubectl(tmp_path):
  """Calls kubectl with a cluster that knows what a JobSet is."""
  program = shutil.which('kubectl', path=PATH)
  if not program:
    pytest.skip('no kubectl here')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Api)
  threading.Thread(target=server.serve_forever, daemon=True).start()

  def call(*arguments):
    done = subprocess.run(
      [
        *(program, f'--server=http://127.0.0.1:{server.server_port}'),
        *(f'--cache-dir={tmp_path / "kube"}', *arguments),
      ],
      env={'PATH': PATH, 'HOME': str(tmp_path), 'KUBECONFIG': '/dev/null'},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  yield call
  server.shutdown()
  server.server_close()


def _expand(text):
  """What Kubernetes makes of an argument when no variable of it is set."""
  return re.sub(r'\$\$', '$', text)


def _manifest(launcher, kubectl, *arguments, **environ):
  done = launcher.run('gke_xpk.sh', 'render', *arguments, **environ)
  assert done.returncode == 0, done.stderr
  file = launcher.folder / 'rendered.yaml'
  file.write_text(done.stdout)
  create = ('create', '--dry-run=client', '--validate=false', '-o', 'json')
  return json.loads(kubectl(*create, '-f', str(file)))


def test_kubectl_reads_the_manifest(launcher, kubectl):
  labels = '--labels=team=a,on=true'
  manifest = _manifest(launcher, kubectl, *JOBSET, *ALL, labels)
  assert manifest['kind'] == 'JobSet'
  assert manifest['metadata']['name'] == NAME
  assert manifest['metadata']['labels'] == {
    **{'app': 'frugax', 'team': 'a', 'on': 'true'}
  }
  (jobs,) = manifest['spec']['replicatedJobs']
  job = jobs['template']['spec']
  assert job['parallelism'] == job['completions'] == 4
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x4',
  }
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert [_expand(a) for a in container['args']] == [
    '--workdir=/bucket/runs/1b',
    JOBSET[-1],
    *ALL,
  ]
  assert 'envFrom' not in container and 'tolerations' not in pod
  (volume,) = pod['volumes']
  assert volume['csi']['volumeAttributes']['bucketName'] == 'my-bucket'


def test_no_pods_are_gone(launcher, kubectl):
  """To wait for those of a job that had none left is no error."""
  _, wait = launcher.dry_run('gke_xpk.sh', 'down', *XPK)
  assert kubectl(*wait[1:]) == ''


def test_spot_and_secrets_in_the_manifest(launcher, kubectl):
  manifest = _manifest(
    launcher, kubectl, *JOBSET, '--spot', WANDB_API_KEY=SECRET
  )
  assert SECRET not in json.dumps(manifest)
  pod = manifest['spec']['replicatedJobs'][0]['template']['spec']['template']
  assert pod['spec']['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
  (toleration,) = pod['spec']['tolerations']
  assert toleration['key'] == 'cloud.google.com/gke-spot'
  (source,) = pod['spec']['containers'][0]['envFrom']
  assert source == {'secretRef': {'name': NAME}}


def test_a_pod_that_was_stopped_is_started_again(launcher, kubectl):
  """143 restarts the job; what the trainer itself gives, 1 and 2, does not."""
  job = _manifest(launcher, kubectl, *JOBSET)['spec']
  (rule,) = job['replicatedJobs'][0]['template']['spec']['podFailurePolicy'][
    'rules'
  ]
  assert rule['action'] == 'FailJob'
  assert rule['onExitCodes'] == {
    **{'containerName': 'train', 'operator': 'In', 'values': [1, 2]}
  }
  assert job['failurePolicy']['maxRestarts'] == 100


def test_jobset_commands(launcher):
  planned = launcher.dry_run('gke_xpk.sh', 'run', *JOBSET, '--namespace=ml')
  stage = f'{launcher.folder}/home/.cache/frugax/launch/{NAME}'
  assert planned[0][:4] == ['kubectl', 'get', 'jobset', NAME]
  secret = ['kubectl', 'delete', 'secret', NAME, '--ignore-not-found']
  assert planned[1:] == [
    [*secret, '--namespace=ml'],
    ['kubectl', 'apply', f'--filename={stage}/jobset.yaml', '--namespace=ml'],
  ]
  planned = launcher.dry_run('gke_xpk.sh', 'run', *JOBSET, HF_TOKEN=SECRET)
  done = launcher.run('gke_xpk.sh', 'run', *JOBSET, HF_TOKEN=SECRET)
  assert done.returncode == 0, done.stderr
  assert launcher.calls() == planned
  assert [c[1] for c in planned] == ['get', 'delete', 'create', 'apply']
  assert SECRET not in json.dumps(planned) + done.stdout + done.stderr
  assert [p for p in (launcher.folder / 'home').rglob('*') if p.is_file()] == []
  (logs,) = launcher.dry_run('gke_xpk.sh', 'logs', *JOBSET)
  assert f'--selector=jobset.sigs.k8s.io/jobset-name={NAME},' in logs[2]
  (report,) = launcher.dry_run('gke_xpk.sh', 'report', *JOBSET)
  assert report == ['kubectl', 'get', 'jobset', NAME]
  # Whether or not this one has a secret, an earlier one may have had.
  down = launcher.dry_run('gke_xpk.sh', 'down', *JOBSET)
  assert down == [DELETE, secret]


@pytest.mark.parametrize(
  ('conditions', 'deleted'),
  [
    ('Failed', True),
    ('StartupPolicyCompleted Completed', True),
    ('StartupPolicyCompleted', False),
    ('', False),
  ],
)
def test_a_job_that_has_ended_makes_room_for_the_next(
  launcher, conditions, deleted
):
  """To apply it again would say that it is unchanged, and start nothing."""
  (launcher.folder / 'jobset').write_text(conditions)
  done = launcher.run('gke_xpk.sh', 'run', *JOBSET)
  assert done.returncode == 0, done.stderr
  _, *deletes, _, apply = launcher.calls('kubectl')
  assert deletes == [DELETE] * deleted
  assert apply[1] == 'apply'
  # With xpk as well, which refuses to create what there is.
  done = launcher.run('gke_xpk.sh', 'run', *XPK)
  assert done.returncode == 0, done.stderr
  calls = [c for c in launcher.calls() if XPK_NAME in ' '.join(c)]
  listed, asked, *deletes, created = calls
  assert listed[:3] == ['xpk', 'workload', 'list']
  assert asked[:4] == ['kubectl', 'get', 'jobset', XPK_NAME]
  assert deletes == XPK_DELETE * deleted
  assert created[:3] == ['xpk', 'workload', 'create']


def test_a_secret_of_several_lines_arrives_unseen(launcher):
  values = {'HF_TOKEN': SECRET, 'MY_KEY': f'one\n{SECRET}=$(id)\n'}
  options = ('--secret=MY_KEY', '--secret=HF_TOKEN')
  done = launcher.run('gke_xpk.sh', 'run', *JOBSET, *options, **values)
  assert done.returncode == 0, done.stderr
  assert json.loads((launcher.folder / 'secret.json').read_text()) == values
  told = json.dumps(launcher.calls()) + done.stdout + done.stderr
  assert SECRET not in told
  assert [p for p in (launcher.folder / 'home').rglob('*') if p.is_file()] == []


def test_kubectl_takes_the_secret(launcher, kubectl):
  values = {'HF_TOKEN': SECRET, 'MY_KEY': f'one\n{SECRET}\n'}
  planned = launcher.dry_run(
    'gke_xpk.sh', 'run', *JOBSET, '--secret=MY_KEY', **values
  )
  (create,) = [c for c in planned if c[1] == 'create']
  for argument in create:
    if argument.startswith('--from-file='):
      name, path = argument.split('=')[1:]
      file = pathlib.Path(path)
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(values[name])
  secret = kubectl(*create[1:], '--dry-run=client', '-o', 'json')
  data = json.loads(secret)['data']
  assert {k: base64.b64decode(v).decode() for k, v in data.items()} == values


def _container_argv(command):
  """What bash, in the container, calls: the words after exec."""
  assert '\n' not in command
  assert not re.search(r'\$\(|\$\$', command)  # Kubernetes would expand them
  assert command.startswith('cd /frugax && exec ')
  return words(command.removeprefix('cd /frugax && exec '))


def test_xpk_commands(launcher):
  arguments = ('run', *XPK, *ALL, '--spot')
  planned = launcher.dry_run('gke_xpk.sh', *arguments, WANDB_API_KEY=SECRET)
  done = launcher.run('gke_xpk.sh', *arguments, WANDB_API_KEY=SECRET)
  assert done.returncode == 0, done.stderr
  assert launcher.calls() == planned
  listed, asked, (*argv, command) = planned
  assert listed == [
    *('xpk', 'workload', 'list', '--cluster=c', '--zone=us-west4-a'),
    *('--project=my-project', f'--filter-by-job={XPK_NAME}'),
  ]
  assert asked[:4] == ['kubectl', 'get', 'jobset', XPK_NAME]
  assert argv == [
    *('xpk', 'workload', 'create', '--cluster=c', f'--workload={XPK_NAME}'),
    *('--zone=us-west4-a', '--project=my-project', '--tpu-type=v5litepod-16'),
    *('--docker-image=example.com/frugax:1', '--max-restarts=100'),
    *('--termination-grace-period-seconds=120', '--spot'),
    f'--env-file={launcher.folder}/home/.cache/frugax/launch/{XPK_NAME}/env',
  ]
  assert _container_argv(command.removeprefix('--command=')) == [
    *('bash', 'launch/local.sh', '--workdir=/bucket/runs/1b', XPK[-1], *ALL)
  ]
  assert SECRET not in json.dumps(planned) + done.stdout + done.stderr
  assert launcher.dry_run('gke_xpk.sh', 'down', *XPK) == XPK_DELETE


@pytest.mark.skipif(not shutil.which('xpk'), reason='no xpk here')
def test_xpk_takes_the_command(launcher):
  """xpk's own dry run prints the manifest that it would apply."""
  *_, planned = launcher.dry_run('gke_xpk.sh', 'run', *XPK, *ALL)
  done = subprocess.run(
    [shutil.which('xpk', path=PATH), *planned[1:], '--dry-run'],
    env={'PATH': PATH, 'HOME': str(launcher.folder)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (line,) = re.findall(r'^ *\((cd /frugax .*)\) & PID=', done.stdout, re.M)
  assert _container_argv(line)[2:] == [
    '--workdir=/bucket/runs/1b',
    XPK[-1],
    *ALL,
  ]
  assert 'google.com/tpu: 4' in done.stdout


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([*XPK, '--workdir=gs://b/a'], 'xpk mounts no bucket for a run'),
    ([*XPK, '--workdir=/bucket/../x'], 'give it without . and ..'),
    ([*JOBSET, '--workdir=gs://bucket/../x'], 'give it without . and ..'),
    ([*XPK, '--topology=v5e:2x2'], 'xpk has no v5e slices below v5e:2x4'),
    ([*XPK, '--cluster=C_1'], "cluster 'C_1' is not valid"),
    ([*XPK, '--via=xkp'], "unknown via 'xkp': did you mean 'xpk'?"),
    ([*XPK, f'--name={"a" * 41}'], '40 at most'),
    ([*JOBSET, '--workdir=/a'], "workdir '/a' is not valid: give gs://"),
    ([*JOBSET, '--image=a b'], "image 'a b' is not valid"),
    ([*JOBSET, '--labels=A=b'], "label 'A=b' is not valid"),
    ([*JOBSET, '--topology=v5e:3x3'], "did you mean 'v5e:"),
    ([*JOBSET, '--namespace=My'], "namespace 'My' is not valid"),
    (JOBSET[:3], '--workdir is missing'),
    (JOBSET[:4], 'no config'),
  ],
)
def test_wrong_options(launcher, arguments, message):
  done = launcher.run('gke_xpk.sh', 'run', *arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert launcher.calls() == []


def test_a_control_character_is_refused(launcher):
  done = launcher.run(
    'gke_xpk.sh', 'render', *JOBSET, '--config.data.name=\x01'
  )
  assert done.returncode == 2
  assert "has a control character: $'--config.data.name=\\001'" in done.stderr
