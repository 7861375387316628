"""Real trainings of two processes on loopback under the launchers: machines of the fake cloud are
lost and come back, and the run resumes; what SLURM, a JobSet and XPK start, in their environments.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys

import launchers
import pytest
import tiny_run
import yaml
from launchers import ROOT, dry

pytestmark = pytest.mark.full

STEPS = 40
SETTINGS = [
  f'steps={STEPS}',
  'batch_size=8',
  'data.train=sums:100',
  'checkpoint.every=4',
  'checkpoint.keep=20',
  'eval.every=40',
  'eval.tasks=',
  'eval.prompts=()',
  'mesh.data=2',
]
FLAGS = [f'--config.{s}' for s in SETTINGS]


@pytest.fixture
def port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  fake = launchers.FakeCloud(tmp_path / 'cloud').make()
  monkeypatch.setenv('FAKE_CLOUD', str(fake.root))  # so that close() finds all processes
  monkeypatch.setenv('XLA_FLAGS', tiny_run.xla_flags(1))
  # A shared compile cache is for runs of one process.
  for name in tiny_run.CACHE_VARIABLES:
    monkeypatch.delenv(name, raising=False)
  yield fake
  fake.close()


def steps(rows):
  return [r['step'] for r in rows if r['split'] == 'train']


def finished(workdir):
  """All steps are in the metrics once, and the model is exported."""
  rows = launchers.lines(workdir / 'metrics.jsonl')
  assert steps(rows) == list(range(1, STEPS + 1))
  assert (workdir / 'export' / 'config.json').exists()


def checkpoints(workdir):
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.glob('[0-9]*') if p.name.isdigit())


def environment(**more):
  path = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
  return os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'} | more


def bucket_is_finished(bucket):
  rows = [json.loads(x) for x in bucket.read('r1/metrics.jsonl').decode().splitlines()]
  assert steps(rows) == list(range(1, STEPS + 1))
  assert 'r1/export/config.json' in bucket.names()


def has_checkpoint(bucket):
  return any(name.endswith('/commit_success.txt') for name in bucket.names())


def test_a_preempted_queued_resource_resumes_in_the_bucket(cloud, bucket, port):
  """Two hosts that find each other by the environment of a TPU."""
  env = cloud.env(FAKE_CLOUD_PORT=str(port), FAKE_CLOUD_GCS=json.dumps(bucket.env))
  process = launchers.start(
    'queued_resource.sh',
    *('--name=r1', '--zone=us-a', '--accelerator=v5litepod-16', '--poll=1', '--watch', '--spot'),
    *('--config=tiny_sft', '--workdir=gs://bucket/r1', *cloud.install, '--', *FLAGS),
    env=env,
  )
  launchers.until(lambda: has_checkpoint(bucket), process, 300)
  cloud.lose('queued-resources', 'r1', 'SUSPENDED', ['r1-0', 'r1-1'])
  _, err = process.communicate(timeout=400)
  assert process.returncode == 0, err
  assert len(cloud.of('queued-resources', 'create')) == 2
  bucket_is_finished(bucket)
  with cloud.state() as state:
    assert not state


def test_a_group_that_lost_a_machine_is_filled_again(cloud, bucket, port):
  """Compute Engine: a slice of two hosts, whose names are addresses of this machine."""
  env = cloud.env(FAKE_CLOUD_ADDRESSES='1', FAKE_CLOUD_GCS=json.dumps(bucket.env))
  process = launchers.start(
    'gce.sh',
    *('--name=r1', '--project=p', '--zone=us-a', '--accelerator=v6e-8', '--poll=1', '--watch'),
    *('--machine-type=ct6e-standard-4t', f'--port={port}', '--spot', *cloud.install),
    *('--config=tiny_sft', '--workdir=gs://bucket/r1', '--', *FLAGS),
    env=env,
  )
  launchers.until(lambda: has_checkpoint(bucket), process, 300)
  cloud.lose('managed', 'r1', 'TERMINATED', ['127.0.0.1', '127.0.0.2'])
  _, err = process.communicate(timeout=400)
  assert process.returncode == 0, err
  bucket_is_finished(bucket)
  assert [c[-2] for c in cloud.of('resize')] == ['--size=0', '--size=2']
  assert len(cloud.of('managed', 'create')) == 1 and not cloud.of('instances', 'delete')
  with cloud.state() as state:
    assert not state


def test_machines_by_ssh_stop_with_a_checkpoint_and_resume(cloud, port, tmp_path):
  workdir = tmp_path / 'r1'
  place = ['--name=r1', '--hosts=m1,m2', '--poll=0.5', '--platform=tpu']
  words = [*place, '--config=tiny_sft', f'--workdir={workdir}', '--shared-disk']
  words += [f'--coordinator=127.0.0.1:{port}', *cloud.install]
  code, _, err = launchers.run('ssh.sh', *words, '--', *FLAGS, env=cloud.env())
  assert code == 0, err
  launchers.until(lambda: checkpoints(workdir), timeout=300)
  code, out, _ = launchers.run('ssh.sh', 'stop', *place, env=cloud.env())
  assert code == 0 and out.split() == ['stopped', '75'] * 2
  saved = checkpoints(workdir)[-1]
  assert saved < STEPS
  words += ['--watch', '--', *FLAGS]
  code, _, err = launchers.run('ssh.sh', *words, env=cloud.env(), timeout=400)
  assert code == 0, err
  finished(workdir)


SIZES = dict(
  **{'hidden_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2},
  **{'intermediate_size': 64, 'tie_word_embeddings': True, 'max_position_embeddings': 256},
)
CONFIG = """from ftjax import config
from sizes import COMPLETIONS, MODEL


def get_config():
  c = config.default()
  c.algorithm, c.model.random, c.data.train = 'grpo', MODEL, 'sums:100'
  c.steps, c.batch_size, c.seq_len = 4, 2, 64
  c.rollout.group, c.rollout.slots = COMPLETIONS, 2 * COMPLETIONS
  c.rollout.max_tokens, c.rollout.samples = 8, 8
  c.rollout.rewards = (('my_rewards:vowels', 1.0),)
  c.checkpoint.every, c.eval.prompts = 2, ()
  c.mesh.data = 2
  return c
"""


def test_hosts_train_with_a_config_and_a_reward_of_the_user(cloud, bucket, port, tmp_path):
  """The config imports a module, and names a reward whose module imports a package."""
  here = tmp_path / 'my work'
  (here / 'wording').mkdir(parents=True)
  (here / 'my_config.py').write_text(CONFIG)
  (here / 'sizes.py').write_text(f'COMPLETIONS = 4\nMODEL = {SIZES}\n')
  (here / 'wording/__init__.py').write_text("VOWELS = 'aeiou'\n")
  (here / 'my_rewards.py').write_text(
    'import wording\n\n\ndef vowels(completions, **_):\n'
    '  return [sum(x in wording.VOWELS for x in c[0]["content"]) for c in completions]\n'
  )
  env = cloud.env(FAKE_CLOUD_PORT=str(port), FAKE_CLOUD_GCS=json.dumps(bucket.env))
  words = ['tpu_vm.sh', '--name=r1', '--zone=us-a', '--accelerator=v5litepod-16', '--poll=1']
  words += ['--config=my_config.py', '--workdir=gs://bucket/r1', '--watch', *cloud.install]
  code, _, err = launchers.run(*words, cwd=here, env=env)
  assert code == 2 and not cloud.of('create')
  remedy = err[err.index('--code=') :].strip()
  code, _, err = launchers.run(*words, remedy, cwd=here, env=env, timeout=500)
  assert code == 0, err
  rows = [json.loads(x) for x in bucket.read('r1/metrics.jsonl').decode().splitlines()]
  paid = [r['reward/vowels'] for r in rows if r['split'] == 'rollout']
  assert len(paid) == 4 and any(paid) and steps(rows) == [1, 2, 3, 4]
  assert bucket.names('r1/rollouts/')


# Batch systems: what they start, in the environments that they give.

_SRUN = """#!/bin/bash
# Two tasks on this machine.
words=("$@")
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost \\
    SLURM_JOB_NUM_NODES=1 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE='1(x2)' "$@" &
  echo $! >>"$FAKE_SLURM/tasks"
done
code=0
for pid in $(jobs -p); do wait $pid || code=$?; done
exit $code
"""


def test_a_slurm_job_is_requeued_with_its_checkpoint(cloud, tmp_path):
  workdir, slurm = tmp_path / 'r1', tmp_path / 'slurm'
  slurm.mkdir()
  programs = {
    'srun': _SRUN,
    'scancel': '#!/bin/bash\nkill -TERM $(cat "$FAKE_SLURM/tasks")\n',
    'scontrol': '#!/bin/bash\necho "$@" >>"$FAKE_SLURM/requeued"\n',
  }
  for name, text in programs.items():
    (slurm / name).write_text(text)
    (slurm / name).chmod(0o755)
  line = dry(
    'slurm.sh',
    *('--name=r1', '--nodes=2', f'--python={on_path(tmp_path)}/python', '--config=tiny_sft'),
    *(f'--workdir={workdir}', '--', *FLAGS),
  )
  words = shlex.split(line)
  arguments = words[words.index('launch/train.sbatch') :]
  # The job id gives jax its port.
  env = environment(
    PATH=f'{slurm}:{os.environ["PATH"]}', FAKE_SLURM=str(slurm), SLURM_JOB_ID=str(os.getpid())
  )
  log = (tmp_path / 'log').open('w')
  more = {'cwd': ROOT, 'env': env, 'stdout': log, 'stderr': log}
  first = subprocess.Popen(['bash', *arguments], **more)
  launchers.until(lambda: checkpoints(workdir) or first.poll() is not None, timeout=300)
  assert first.poll() is None, (tmp_path / 'log').read_text()
  first.send_signal(signal.SIGTERM)  # as --signal=B:TERM does
  assert first.wait(timeout=200) == 75, (tmp_path / 'log').read_text()
  assert (slurm / 'requeued').read_text() == f'requeue {os.getpid()}\n'
  assert checkpoints(workdir)[-1] < STEPS
  (slurm / 'tasks').unlink()
  subprocess.run(['bash', *arguments], **more, check=True, timeout=400)
  finished(workdir)


def run_all(commands, environments, logs):
  """Starts commands; returns their processes."""
  return [
    subprocess.Popen(c, cwd=ROOT, env=e, stdout=log.open('w'), stderr=subprocess.STDOUT)
    for c, e, log in zip(commands, environments, logs, strict=True)
  ]


def on_path(tmp_path):
  """A folder with `python`, as an image has it on PATH; without the pre-flight while it is new."""
  folder = tmp_path / 'python'
  folder.mkdir()
  program = folder / 'python'
  image = launchers.machines._PYTHON
  program.write_text(image.format(bin=folder, root=ROOT, python=sys.executable))
  program.chmod(0o755)
  return folder


def test_the_pods_of_a_job_set_are_one_run(cloud, port, tmp_path):
  workdir = tmp_path / 'r1'
  out = dry(
    'gke.sh',
    *('--name=r1', '--platform=cpu', '--hosts=2', '--image=i:1', '--config=tiny_sft'),
    *('--claim=c', '--workdir=/runs/r1', '--', *FLAGS),
  )
  (job,) = [d for d in yaml.safe_load_all(out.rpartition('kubectl ')[0]) if d]
  spec = job['spec']['replicatedJobs'][0]['template']['spec']
  assert spec['completions'] == 2 and spec['completionMode'] == 'Indexed'
  (container,) = spec['template']['spec']['containers']
  here = [
    w.replace('r1-train-0-0.r1:8476', f'127.0.0.1:{port}').replace('/runs/r1', str(workdir))
    for w in (*container['command'], *container['args'])
  ]
  path = f'{on_path(tmp_path)}:{os.environ["PATH"]}'
  logs = [tmp_path / f'{i}.log' for i in range(2)]
  pods = run_all(
    [here] * 2, [environment(PATH=path, JOB_COMPLETION_INDEX=str(i)) for i in range(2)], logs
  )
  assert [p.wait(timeout=400) for p in pods] == [0, 0], logs[0].read_text()
  finished(workdir)
  assert 'process 0 of 2' in logs[0].read_text()


# How XPK runs a command; src/xpk/core/docker_container.py. The signal goes to the child alone.
_XPK = """_sigterm() (kill -SIGTERM $! 2>/dev/null;); trap _sigterm SIGTERM
({command}) & PID=$!; while kill -0 $PID 2>/dev/null; do sleep 0.5; done; wait $PID"""


def test_an_xpk_workload_that_is_stopped_ends_with_42_and_resumes(cloud, port, tmp_path):
  """The environment of a TPU pod: host names and the worker's number."""
  workdir = tmp_path / 'r1'
  line = dry(
    'xpk.sh',
    *('--name=r1', '--cluster=c', '--zone=us-a', '--accelerator=v5litepod-8', '--image=i:1'),
    *('--config=tiny_sft', '--workdir=gs://b/r1', '--', *FLAGS),
  )
  (word,) = [w for w in shlex.split(line) if w.startswith('--command=')]
  command = word.removeprefix('--command=').replace('gs://b/r1', str(workdir))
  assert '--translate=75:42' in command
  from programs import tpu_environments

  path = f'{on_path(tmp_path)}:{os.environ["PATH"]}'
  pods = [
    environment(PATH=path) | more | {'JAX_COORDINATOR_PORT': str(port)}
    for more in tpu_environments(2)
  ]
  words = ['bash', '-c', _XPK.format(command=command)]
  logs = [tmp_path / f'{i}.log' for i in range(2)]
  first = run_all([words] * 2, pods, logs)
  launchers.until(lambda: checkpoints(workdir) or first[0].poll() is not None, timeout=300)
  assert first[0].poll() is None, logs[0].read_text()
  for pod in first:
    pod.send_signal(signal.SIGTERM)
  assert [p.wait(timeout=200) for p in first] == [42, 42], logs[0].read_text()
  assert checkpoints(workdir)[-1] < STEPS
  second = run_all([words] * 2, pods, logs)
  assert [p.wait(timeout=400) for p in second] == [0, 0], logs[0].read_text()
  finished(workdir)
