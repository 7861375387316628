"""Launchers where something goes wrong: a create that fails, a host that is away, an interruption,
machines that vanish; and what is left behind then. With the fake programs of test_launch_life.py.
"""

import os
import signal
import subprocess

import launchers
import pytest
import yaml
from launchers import ROOT

SECRET = 'hf_' + 'n3Vx7TfG2hJ8kL5mP4qR6'
PLACE = ['--zone=us-a', '--accelerator=v5litepod-16', '--name=r1', '--poll=0.1']
RUN = ['--config=tiny_sft', '--workdir=gs://bucket/r1']
GROUP = ['--name=r1', '--project=p', '--zone=us-a', '--accelerator=v6e-8', '--poll=0.1']
GROUP += ['--machine-type=ct6e-standard-4t']


@pytest.fixture
def cloud(tmp_path):
  fake = launchers.FakeCloud(tmp_path / 'the cloud').make()
  yield fake
  fake.close()


def training(cloud, script):
  file = cloud.root / 'training.sh'
  file.write_text(script)
  return cloud.env(FAKE_TRAINING=str(file))


def program(cloud, name, script):
  """Puts a program in front of all others."""
  file = cloud.root / 'bin' / name
  file.write_text(f'#!/bin/bash\n{script}\n')
  file.chmod(0o755)


def home(cloud, host):
  return cloud.home(host) / '.ftjax' / 'r1'


# Creates


def test_a_create_that_fails_is_not_repeated_without_watch(cloud):
  env = cloud.env(FAKE_CLOUD_QUOTA='0')
  code, _, err = launchers.run('tpu_vm.sh', *PLACE, *RUN, *cloud.install, env=env)
  assert code == 1 and 'not ready' in err and 'if it names a quota' in err
  assert len(cloud.of('tpu-vm', 'create')) == 1


def test_a_create_that_fails_is_repeated_after_a_while_with_watch(cloud):
  """--poll is longer than the test: of 50 creates there is time for one."""
  env = cloud.env(FAKE_CLOUD_QUOTA='0')
  words = [*PLACE, '--poll=600', *RUN, '--watch', *cloud.install]
  process = launchers.start('tpu_vm.sh', *words, env=env)
  launchers.until(lambda: cloud.of('tpu-vm', 'create'), process)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(1.5)
  assert len(cloud.of('tpu-vm', 'create')) == 1
  process.kill()


def test_policy_and_template_of_an_earlier_group_are_not_used_again(cloud):
  """They may be of another topology or capacity; the group that used them is gone."""
  words = ['create', *GROUP, *RUN, *cloud.install]
  assert launchers.run('gce.sh', *words, env=cloud.env())[0] == 0
  with cloud.state() as state:
    del state['managed/r1/us-a']
  assert launchers.run('gce.sh', *words, '--spot', env=cloud.env())[0] == 0
  templates = cloud.of('instance-templates', 'create')
  assert ['--provisioning-model=SPOT' in words for words in templates] == [False, True]
  assert len(cloud.of('resource-policies', 'create')) == 2
  assert not cloud.of('instances', 'delete') and not cloud.of('managed', 'delete')


# Ends


def test_machines_are_deleted_when_the_starts_are_used_up(cloud):
  """Not left alone, at a price; what the training printed last is not deleted with them."""
  env = training(cloud, 'echo the reason; exit 75')
  words = [*PLACE, *RUN, '--watch', '--starts=1', *cloud.install]
  code, _, err = launchers.run('tpu_vm.sh', *words, env=env)
  assert code == 1 and 'still not done after 1 starts' in err and 'the reason' in err
  assert len(cloud.of('tpu-vm', 'delete')) == 1 and not cloud.has('tpu-vm', 'r1')


def test_an_interrupted_watch_reports_what_it_leaves(cloud):
  env = training(cloud, 'sleep 60')
  process = launchers.start('tpu_vm.sh', *PLACE, *RUN, '--watch', *cloud.install, env=env)
  launchers.until((home(cloud, 'r1-1') / 'pid').exists, process)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=200)
  assert process.returncode == 130 and 'the machines stay, and cost money' in err
  assert cloud.has('tpu-vm', 'r1') and (home(cloud, 'r1-0') / 'pid').exists()


def test_detach_without_watch_is_refused(cloud):
  code, _, err = launchers.run('tpu_vm.sh', *PLACE, *RUN, '--detach', env=cloud.env())
  assert code == 2 and '--detach: expected with --watch' in err


# Hosts


@pytest.mark.full
def test_a_machine_with_a_new_disk_is_started_again(cloud):
  """As after a repair: ready, and without a file of ours."""
  script = '[[ -f "$FAKE_CLOUD/done" ]] && exit 0; sleep 60'
  env = training(cloud, script)
  words = [*PLACE, *RUN, '--watch', '--after-done=keep', *cloud.install]
  process = launchers.start('tpu_vm.sh', *words, env=env)
  launchers.until(lambda: all((home(cloud, f'r1-{i}') / 'pid').exists() for i in (0, 1)), process)
  (cloud.root / 'done').touch()
  cloud.power_off(['r1-0', 'r1-1'])
  _, err = process.communicate(timeout=200)
  assert process.returncode == 0, err
  assert len(cloud.of('tpu-vm', 'create')) == 1


@pytest.mark.full
def test_machines_that_are_no_longer_listed_are_lost(cloud):
  """A spot group whose machines were taken back and deleted."""
  env = training(cloud, '[[ -f "$FAKE_CLOUD/done" ]] && exit 0; sleep 60')
  words = [*GROUP, *RUN, '--watch', '--after-done=keep', *cloud.install]
  process = launchers.start('gce.sh', *words, env=env)
  hosts = [home(cloud, f'r1-{x}') for x in 'xz']
  launchers.until(lambda: all((h / 'pid').exists() for h in hosts), process)
  (cloud.root / 'done').touch()
  cloud.power_off(['r1-x', 'r1-z'])
  with cloud.state() as state:
    state['managed/r1/us-a']['size'] = 0
  _, err = process.communicate(timeout=200)
  assert process.returncode == 0, err
  assert [c[-2] for c in cloud.of('resize')] == ['--size=0', '--size=2']


def test_a_group_that_cannot_be_asked_for_its_machines_is_no_success(cloud):
  for verb in ('stop', 'logs', 'status'):
    code, _, err = launchers.run('gce.sh', verb, *GROUP, env=cloud.env())
    assert code != 0 and 'NOT_FOUND' in err, verb


def test_a_copy_that_fails_on_the_first_host_is_no_success(cloud):
  program(cloud, 'scp', '[[ "${!#}" != m1:* ]]')
  words = ['--name=r1', '--hosts=m1,m2', '--platform=tpu', *RUN, *cloud.install]
  env = training(cloud, 'exit 0')
  code, _, err = launchers.run('ssh.sh', *words, env=env)
  assert code == 1 and 'install or start failed' in err
  assert not any('host.sh start' in w for c in cloud.calls() for w in c)


def test_the_environment_of_a_running_training_is_kept(cloud):
  """A newer wheel would be installed under its feet."""
  env = training(cloud, 'sleep 60')
  words = ['--name=r1', '--hosts=m1', '--platform=tpu', *RUN, *cloud.install]
  assert launchers.run('ssh.sh', *words, env=env)[0] == 0
  made = (home(cloud, 'm1') / 'env/.made-from').read_text()
  (cloud.root / 'ftjax-0-py3-none-any.whl').write_text('a newer wheel')
  code, out, _ = launchers.run('ssh.sh', *words, env=env)
  assert code == 0 and 'its environment is kept' in out and 'already running' in out
  assert (home(cloud, 'm1') / 'env/.made-from').read_text() == made
  assert launchers.run('ssh.sh', 'stop', '--name=r1', '--hosts=m1', env=env)[0] == 0
  assert launchers.run('ssh.sh', *words, env=env)[0] == 0
  assert (home(cloud, 'm1') / 'env/.made-from').read_text() != made


# Secrets


def test_secrets_are_forgotten_when_the_copy_is_interrupted(cloud, tmp_path):
  (tmp_path / 'tmp').mkdir()
  program(cloud, 'scp', 'touch "$FAKE_CLOUD/copying"; sleep 1')
  words = ['--name=r1', '--hosts=m1', '--platform=tpu', *RUN, *cloud.install]
  env = cloud.env(HF_TOKEN=SECRET, TMPDIR=str(tmp_path / 'tmp'))
  process = launchers.start('ssh.sh', *words, env=env)
  launchers.until((cloud.root / 'copying').exists, process)
  (file,) = (tmp_path / 'tmp').rglob('secrets.env')
  assert SECRET in file.read_text()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=200)
  assert process.returncode != 0 and not list((tmp_path / 'tmp').iterdir())


def test_a_secret_that_is_no_longer_set_is_removed_from_the_host(cloud):
  env = training(cloud, 'exit 0')
  words = ['--name=r1', '--hosts=m1', '--platform=tpu', *RUN, *cloud.install]
  assert launchers.run('ssh.sh', *words, env=env | {'HF_TOKEN': SECRET})[0] == 0
  assert (home(cloud, 'm1') / 'secrets.env').exists()
  launchers.until((home(cloud, 'm1') / 'exit_code').exists)
  assert launchers.run('ssh.sh', *words, env=env)[0] == 0
  assert not (home(cloud, 'm1') / 'secrets.env').exists()


def test_stopping_a_job_set_deletes_its_secret(cloud):
  env = training(cloud, 'sleep 60 & trap "exit 75" TERM; wait $!') | {'HF_TOKEN': SECRET}
  name = ['--name=r1', '--platform=cpu', '--grace-seconds=5']
  code, _, err = launchers.run('gke.sh', *name, '--image=i', *RUN, env=env)
  assert code == 0, err
  assert SECRET in (cloud.root / 'secret-r1-secrets').read_text()
  launchers.until((cloud.root / 'jobset-r1.json').exists)
  code, _, err = launchers.run('gke.sh', 'stop', *name[:2], env=env)
  assert code == 0, err
  assert not (cloud.root / 'secret-r1-secrets').exists()


# Batch systems and containers


def sbatch(folder, **programs):
  """Runs train.sbatch with fake programs of SLURM; returns its exit code and their calls."""
  for name, text in programs.items():
    (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{folder}/calls\n{text}\n')
    (folder / name).chmod(0o755)
  env = {'PATH': f'{folder}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
  if (folder / 'setup.sh').exists():
    env['FTJAX_SETUP'] = str(folder / 'setup.sh')
  done = subprocess.run(
    ['bash', str(ROOT / 'launch/train.sbatch'), 'python', '--config=c'],
    env=env,
    capture_output=True,
    text=True,
    timeout=60,
  )
  return done.returncode, (folder / 'calls').read_text(), done.stderr


def test_a_step_that_ends_while_it_is_signalled_is_requeued(tmp_path):
  """scancel returns after the step has ended: the code is still that of the step."""
  code, calls, err = sbatch(
    tmp_path, srun='kill -TERM $PPID; sleep 0.3; exit 75', scancel='sleep 1', scontrol=''
  )
  assert code == 75, err
  assert 'scancel --signal=TERM 7' in calls and 'scontrol requeue 7' in calls


def test_a_setup_file_may_read_variables_that_are_not_set(tmp_path):
  (tmp_path / 'setup.sh').write_text('[ "$NO_SUCH_VARIABLE" = x ] || export FROM_SETUP=yes\n')
  code, calls, err = sbatch(tmp_path, srun='[[ $FROM_SETUP == yes ]]')
  assert code == 0, err
  assert '-m ftjax.train --config=c' in calls


def test_a_container_that_has_ended_gives_its_name_back(cloud, tmp_path):
  script = 'echo "$*" >>"$FAKE_CLOUD/docker"; [[ $1 != ps ]] || cat "$FAKE_CLOUD/ended" 2>/dev/null'
  program(cloud, 'docker', f'{script}; true')
  words = ['docker.sh', '--name=r1', '--config=tiny_sft', f'--workdir={tmp_path}/a run']
  assert launchers.run(*words, env=cloud.env())[0] == 0
  calls = (cloud.root / 'docker').read_text()
  assert 'run --detach --name=r1' in calls and 'rm r1' not in calls
  (cloud.root / 'ended').write_text('0123abcd\n')
  assert launchers.run(*words, env=cloud.env())[0] == 0
  calls = (cloud.root / 'docker').read_text().splitlines()
  assert calls[-2] == 'rm r1' and calls[-1].startswith('run --detach --name=r1')


def test_a_config_whose_first_line_is_indented_is_a_config_map(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text('  # a comment\n\ndef get_config():\n  return None\n')
  words = ['--name=r1', '--accelerator=v6e-8', '--image=i', *RUN, f'--config={file}']
  out = launchers.dry('gke.sh', *words)
  config = next(d for d in yaml.safe_load_all(out.rpartition('kubectl ')[0]) if d)
  assert config['data']['mine.py'] == file.read_text()


def test_the_image_and_the_hosts_lock_what_builds_packages():
  """Else pip fetches build tools that no hash was given for."""
  dockerfile = (ROOT / 'launch/docker/Dockerfile').read_text()
  assert dockerfile.count('--require-hashes') == 2 and '--no-build-isolation' in dockerfile
  for name in ('tpu_vm_v6e', 'ssh', 'gce_v5p', 'sky_gpu'):
    text = (ROOT / f'tests/golden/launch/{name}.txt').read_text()
    assert 'third_party/requirements/build.txt' in text, name
