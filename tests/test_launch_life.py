"""The life of a run under a launcher, with fake programs of the cloud and a training that is a
shell script: created, lost, created again, ended, stopped. Real training: test_launch_training.py.
"""

import hashlib
import os
import signal
import stat
import subprocess
import zipfile

import launchers
import pytest

SECRET = 'hf_' + 'q8Zr5TfG7hJ9kL1mN2pQ4'
PLACE = ['--zone=us-a', '--accelerator=v5litepod-16', '--name=r1', '--poll=0.1']
RUN = ['--config=tiny_sft', '--workdir=gs://bucket/r1', '--watch', '--after-done=keep']


@pytest.fixture
def cloud(tmp_path):
  fake = launchers.FakeCloud(tmp_path / 'the cloud').make()
  yield fake
  fake.close()


def training(cloud, script):
  """The environment of a launcher whose hosts run this script in place of a training."""
  file = cloud.root / 'training.sh'
  file.write_text(script)
  return cloud.env(FAKE_TRAINING=str(file))


def home(cloud, host):
  return cloud.home(host) / '.ftjax' / 'r1'


@pytest.mark.parametrize('code', [0, 2, 5])
def test_the_end_of_the_training_is_the_end_of_the_launcher(cloud, code):
  env = training(cloud, f'exit {code}')
  got, _, err = launchers.run('tpu_vm.sh', *PLACE, *RUN, *cloud.install, env=env)
  assert got == code, err
  assert len(cloud.of('tpu-vm', 'create')) == 1 and not cloud.of('delete')
  assert 'kept, and cost money' in err


def test_a_suspended_queued_resource_is_deleted_and_created_again(cloud):
  """With secrets that only files of mode 600 hold, and the machines deleted at the end."""
  env = training(cloud, 'for i in {1..600}; do [[ -f go ]] && exit 0; sleep 0.1; done; exit 1')
  env |= {'HF_TOKEN': SECRET}
  words = [*PLACE, *RUN, *cloud.install, '--spot', '--after-done=auto', '--', '--config.seed=7']
  process = launchers.start('queued_resource.sh', *words, env=env)
  hosts = [home(cloud, f'r1-{i}') for i in range(2)]
  launchers.until(lambda: all((h / 'pid').exists() for h in hosts), process)
  for host in hosts:
    file = host / 'secrets.env'
    assert file.read_text() == f'HF_TOKEN={SECRET}\n'
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
  process.send_signal(signal.SIGHUP)  # the terminal is closed
  cloud.lose('queued-resources', 'r1', 'SUSPENDED', ['r1-0', 'r1-1'])
  launchers.until(lambda: all((h / 'pid').exists() for h in hosts), process)
  for host in hosts:
    (host / 'go').touch()
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  creates, deletes = cloud.of('queued-resources', 'create'), cloud.of('queued-resources', 'delete')
  assert len(creates) == 2 and creates[0] == creates[1] and '--spot' in creates[0]
  assert len(deletes) == 2 and '--force' in deletes[0]
  with cloud.state() as state:
    assert not state
  starts = [c for c in cloud.calls() if any('host.sh start' in w for w in c)]
  assert len(starts) == 2 and all('--config.seed=7' in c[-2] for c in starts)
  assert SECRET not in out + err + (cloud.root / 'calls.log').read_text()


def test_the_next_zone_is_asked_after_a_failure(cloud):
  env = training(cloud, 'sleep 60')
  words = [*RUN, *cloud.install, *PLACE, '--zone=us-a,us-b']
  process = launchers.start('queued_resource.sh', *words, env=env)
  launchers.until(lambda: cloud.has('queued-resources', 'r1'), process)
  cloud.lose('queued-resources', 'r1', 'FAILED', [])
  launchers.until(lambda: (home(cloud, 'r1-1') / 'pid').exists(), process)
  creates = cloud.of('queued-resources', 'create')
  assert [c[6] for c in creates] == ['--zone=us-a', '--zone=us-b']
  code, out, _ = launchers.run('queued_resource.sh', 'status', *PLACE, '--zone=us-a,us-b', env=env)
  assert code == 0 and 'machines: ready' in out and out.count('running') == 2
  code, _, err = launchers.run(
    'queued_resource.sh', 'stop', *PLACE, '--zone=us-a,us-b', '--stop-seconds=5', env=env
  )
  assert code == 0, err
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75 and 'stopped by hand' in err


def test_a_group_on_compute_engine_is_filled_again_and_deleted(cloud):
  """The group, never its machines; each process gets the address of the first by name."""
  env = training(cloud, 'echo "$@"; for i in {1..600}; do [[ -f go ]] && exit 0; sleep 0.1; done')
  place = ['--name=r1', '--project=p', '--zone=us-a', '--accelerator=v6e-8', '--poll=0.1']
  machine = '--machine-type=ct6e-standard-4t'
  words = [*place, machine, '--spot', *RUN, '--after-done=auto', *cloud.install]
  process = launchers.start('gce.sh', *words, env=env)
  hosts = [home(cloud, f'r1-{x}') for x in 'xz']
  launchers.until(lambda: all((h / 'pid').exists() for h in hosts), process)
  cloud.lose('managed', 'r1', 'TERMINATED', ['r1-x', 'r1-z'])
  launchers.until(lambda: all((h / 'pid').exists() for h in hosts), process)
  code, out, _ = launchers.run('gce.sh', 'logs', *place, machine, env=env)
  assert code == 0 and '--coordinator=r1-x:8476 --num_processes=2 --process_id=0' in out
  for host in hosts:
    (host / 'go').touch()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert [c[-2] for c in cloud.of('resize')] == ['--size=0', '--size=2']
  assert len(cloud.of('managed', 'create')) == 1 and not cloud.of('instances', 'delete')
  with cloud.state() as state:
    assert not state


def test_a_restarted_machine_starts_the_training_again(cloud):
  script = '[[ -f ~/once ]] && { touch ~/twice; exit 0; }; touch ~/once; sleep 60'
  env = training(cloud, script)
  process = launchers.start('tpu_vm.sh', *PLACE, *RUN, *cloud.install, env=env)
  homes = [cloud.home(f'r1-{i}') for i in range(2)]
  launchers.until(lambda: all((h / 'once').exists() for h in homes), process)
  cloud.restart(['r1-0', 'r1-1'])  # no exit code is written: the wrapper dies too
  _, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert all((h / 'twice').exists() for h in homes)


def test_a_zone_without_the_type_is_refused(cloud):
  env = cloud.env(FAKE_CLOUD_TYPES='v5litepod-8,v5litepod-4')
  code, _, err = launchers.run('tpu_vm.sh', *PLACE, *RUN, *cloud.install, env=env)
  assert code == 2 and 'us-a does not offer v5litepod-16; it offers v5litepod-8 v5litepod-4' in err
  assert not cloud.of('create')


def test_what_exists_is_not_created_again(cloud):
  words = ['create', *PLACE, *RUN, *cloud.install]
  assert launchers.run('tpu_vm.sh', *words, env=cloud.env())[0] == 0
  code, _, err = launchers.run('tpu_vm.sh', *words, env=cloud.env())
  assert code == 2 and 'r1 exists already' in err
  assert launchers.run('tpu_vm.sh', 'delete', *PLACE, env=cloud.env())[0] == 0


def test_detached_it_goes_away_from_the_terminal(cloud):
  env = training(cloud, 'sleep 0.5') | {'HOME': str(cloud.root)}
  words = [*PLACE, *RUN, *cloud.install, '--detach']
  code, _, err = launchers.run('tpu_vm.sh', *words, env=env, timeout=10)
  assert code == 0 and 'in the background' in err
  log = cloud.root / '.ftjax' / 'r1.launch.log'
  launchers.until(lambda: log.exists() and 'r1: done' in log.read_text())


def test_machines_by_ssh(cloud):
  """The first is process 0; logs and stop reach them."""
  env = training(cloud, 'trap "exit 75" TERM; echo "$@"; touch ~/ready; sleep 60 & wait $!')
  hosts = ['--hosts=me@m1,m2', '--name=r1', '--poll=0.1']
  words = [*hosts, '--config=tiny_sft', '--workdir=/mnt/r1', '--platform=tpu', *cloud.install]
  code, _, err = launchers.run('ssh.sh', *words, env=env)
  assert code == 2 and '--shared-disk' in err
  code, _, err = launchers.run('ssh.sh', *words, '--shared-disk', env=env)
  assert code == 0, err
  launchers.until(lambda: all((cloud.home(m) / 'ready').exists() for m in ('m1', 'm2')))
  code, out, _ = launchers.run('ssh.sh', 'logs', *hosts, env=env)
  assert '--coordinator=m1:8476 --num_processes=2 --process_id=0' in out
  assert '--preflight -- ' in out and '--workdir=/mnt/r1' in out
  code, out, _ = launchers.run('ssh.sh', 'stop', *hosts, env=env)
  assert code == 0 and out.split() == ['stopped', '75'] * 2


# host.sh alone


def host(folder, *words, **env):
  """(exit code, both outputs) of host.sh in a folder, with next to no environment."""
  file = folder / 'host.sh'
  if not file.exists():
    file.write_text((launchers.ROOT / 'launch/host.sh').read_text())
  done = subprocess.run(
    ['bash', str(file), *words],
    env={'PATH': os.environ['PATH'], 'HOME': str(folder), 'FTJAX_LEAST_FREE_MB': '1'} | env,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout + done.stderr


def wheel(folder, name, text):
  path = folder / f'{name}-1-py3-none-any.whl'
  with zipfile.ZipFile(path, 'w') as z:
    info = f'{name}-1.dist-info'
    z.writestr(f'{name}.py', text)
    z.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1\n')
    z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
    z.writestr(f'{info}/RECORD', '')
  return path


@pytest.mark.full
def test_boot_installs_the_wheel_and_the_lock_by_hashes_once(tmp_path):
  """A real environment, in a folder with a space; the lock's package is a wheel on disk."""
  folder, store = tmp_path / 'a host', tmp_path / 'store'
  folder.mkdir()
  store.mkdir()
  wheel(folder, 'ftjax', 'x = 1')
  locked = wheel(store, 'locked', 'x = 2')
  digest = hashlib.sha256(locked.read_bytes()).hexdigest()
  lock = folder / 'cpu.txt'
  lock.write_text(f'locked @ {locked.as_uri()} --hash=sha256:{"0" * 64}\n')
  code, out = host(folder, 'boot')
  assert code != 0 and 'HASH' in out.upper(), out
  lock.write_text(f'locked @ {locked.as_uri()} --hash=sha256:{digest}\n')
  code, out = host(folder, 'boot')
  assert code == 0 and 'installed' in out, out
  run = [folder / 'env/bin/python', '-c', 'import ftjax, locked; print(ftjax.x + locked.x)']
  assert subprocess.check_output(run, cwd=folder) == b'3\n'
  code, out = host(folder, 'boot')
  assert code == 0 and 'up to date' in out
  tool = wheel(store, 'backend', 'x = 3')  # what builds packages without a wheel, by a lock too
  digest = hashlib.sha256(tool.read_bytes()).hexdigest()
  (folder / 'build.txt').write_text(f'backend @ {tool.as_uri()} --hash=sha256:{digest}\n')
  code, out = host(folder, 'boot')
  assert code == 0 and 'installed' in out, out
  subprocess.run([folder / 'env/bin/python', '-c', 'import backend, locked'], check=True)
  code, out = host(folder, 'boot', FTJAX_LEAST_FREE_MB='999999999')
  assert code == 1 and 'make the boot disk larger' in out


def test_what_ignores_the_signal_is_killed_with_its_children(tmp_path, cloud):
  script = 'trap "" TERM; sleep 300 & echo $! >child; wait; wait'
  env = training(cloud, script)
  place = ['--hosts=m1', '--name=r1']
  words = [*place, '--config=tiny_sft', '--workdir=/r1', '--platform=tpu', *cloud.install]
  assert launchers.run('ssh.sh', *words, env=env)[0] == 0
  launchers.until((home(cloud, 'm1') / 'child').exists)
  code, out, err = launchers.run('ssh.sh', 'stop', *place, '--stop-seconds=1', env=env)
  assert code == 0 and out == 'stopped 137\n' and 'killed' in err
  assert not cloud.processes('m1')


def test_host_without_a_run(tmp_path):
  assert host(tmp_path, 'status') == (0, 'not started\n')
  assert host(tmp_path, 'stop') == (0, 'not started\n')
  code, out = host(tmp_path, 'what')
  assert code == 1 and 'expected boot, start' in out
  code, out = host(tmp_path, 'boot')
  assert code == 1 and 'no lock for Python' in out
