"""The table of the hosts: what differs between processes is named, with the host."""

import os
import shutil
import subprocess
import sys
import time

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), 'multiprocess'))

import tiny_run
from cluster import ROOT, Processes, arguments, free_port

from ftjax.config import config_file
from ftjax.experiment import host_facts, preflight
from ftjax.experiment.preflight import FAILED, OK, WARNING
from ftjax.runtime import sharding
from ftjax.runtime.errors import CheckError, ConfigError

FACTS = {
  'host': 'a',
  'code': '12' * 32,
  'folders': {'models': '1', 'training': '2'},
  'commit': 'c0ffee',
  'user_code': {},
  'python': '3.12.1',
  'packages': {'jax': '0.12.0', 'jaxlib': '0.12.0', 'libtpu': '0.0.30', 'flax': '1', 'numpy': '2'},
  'runtime': 'cpu',
  'kinds': ['TPU v5 lite'],
  'devices': 4,
  'flags': {},
}
MESH = dict.fromkeys(sharding.AXES, 1)


def hosts(**changes):
  """Facts of three hosts, of which the last one differs."""
  packages = FACTS['packages'] | changes.pop('packages', {})
  other = FACTS | {'packages': packages} | changes | {'host': 'c'}
  return [FACTS, FACTS | {'host': 'b'}, other]


def failed(facts):
  """{name: text} of the rows that are not ok."""
  report = preflight._report([f['host'] for f in facts], tuple(preflight.compare(facts)))
  return {r.name: (r.result, r.text) for r in report.rows if r.result != OK}


def test_equal_hosts_are_ok():
  assert failed(hosts()) == {}
  rows = {r.name: r.text for r in preflight.compare(hosts())}
  assert rows['libtpu'] == '0.0.30' and rows['code'] == 'digest 121212121212, commit c0ffee'
  without = FACTS | {'packages': {'jax': '0.12.0', 'jaxlib': '0.12.0'}}
  assert 'libtpu' not in {r.name for r in preflight.compare([without] * 2)}


@pytest.mark.parametrize(
  ('changes', 'name', 'result', 'text'),
  [
    ({'folders': {'models': '9', 'training': '2'}}, 'code', FAILED, 'other files in models'),
    ({'commit': 'beef'}, 'code', WARNING, 'the commits differ: process 2 (c): beef instead of'),
    ({'user_code': {'algorithm': 'x'}}, 'own modules', FAILED, 'other algorithm'),
    ({'python': '3.11.9'}, 'python', FAILED, '3.11.9 instead of 3.12.1'),
    ({'packages': {'jaxlib': '0.11.0'}}, 'jaxlib', FAILED, '0.11.0 instead of 0.12.0'),
    ({'packages': {'libtpu': '1'}}, 'libtpu', FAILED, '1 instead of 0.0.30'),
    ({'packages': {'flax': '2', 'x': '1'}}, 'packages', FAILED, 'flax 2 instead of 1, x 1 instead'),
    ({'runtime': 'libtpu 7'}, 'runtime', FAILED, 'libtpu 7 instead of cpu'),
    ({'flags': {'XLA_FLAGS': '-a'}}, 'settings', WARNING, 'XLA_FLAGS -a instead of missing'),
  ],
)
def test_what_differs_is_named_with_its_host(changes, name, result, text):
  found = failed(hosts(**changes))
  assert list(found) == [name] and found[name][0] == result
  assert text in found[name][1] and 'process 2 (c)' in found[name][1]
  assert 'process 0' not in found[name][1] and 'process 1' not in found[name][1]


def test_the_usual_value_is_that_of_most_processes():
  first = [FACTS | {'python': '3.13.0', 'host': 'a'}, *hosts()[:2]]
  assert failed(first)['python'][1].startswith('process 0 (a): 3.13.0 instead of 3.12.1')
  many = [FACTS | {'python': str(i)} for i in range(100)]
  assert 'and 93 more processes' in failed(many)['python'][1]


@pytest.mark.parametrize(
  ('facts', 'mesh', 'count', 'text'),
  [
    (hosts(), {'fsdp': -1}, 12, ''),
    (hosts(), {'data': 3, 'fsdp': 4}, 12, ''),
    (hosts(kinds=['TPU v6 lite']), {'fsdp': -1}, 12, '<2>: TPU v6 lite instead of TPU v5 lite'),
    (hosts(devices=3), {'fsdp': -1}, 11, '<2>: 3 devices instead of 4 devices'),
    (hosts(), {'fsdp': -1}, 4, 'the processes have 12 together, and jax counts 4'),
  ],
)
def test_devices_of_the_hosts(facts, mesh, count, text):
  row = preflight.devices(facts, MESH | mesh, count)
  assert (row.result == FAILED) == bool(text) and text in row.text and not row.is_flag


def test_a_mesh_that_needs_other_devices_is_a_wrong_key():
  row = preflight.devices(hosts(), MESH | {'fsdp': 8}, 12)
  assert row.result == FAILED and row.is_flag and 'mesh.fsdp=8' in row.text


@pytest.mark.parametrize(
  ('times', 'result', 'text'),
  [
    ([5.0, 5.2, 5.9], OK, '0.900 s apart'),
    ([5.0, 5.2, 7.9], WARNING, '<2> is 2.7 s ahead'),
    ([100.0, 100.1, 20.0], FAILED, '<2> is 80.0 s behind'),
  ],
)
def test_clocks(times, result, text):
  row = preflight.clock(times)
  assert row.result == result and text in row.text


# One process


def tiny(**changes):
  c = config_file.load(config_file.find('tiny_sft'))
  c.update_from_flattened_dict(changes)
  return c


def test_a_process_alone_prints_nothing_and_is_quick(tmp_path, capfd):
  preflight.check(tiny(), str(tmp_path), is_training=True)
  begin = time.perf_counter()
  preflight.check(tiny(), str(tmp_path), is_training=True)
  assert time.perf_counter() - begin < 2  # 0.03 s
  assert capfd.readouterr() == ('', '') and list(tmp_path.iterdir()) == []


def test_devices_of_processes_that_are_not_connected(tmp_path, monkeypatch):
  """A TPU lists the devices of its whole slice to each host."""
  monkeypatch.setattr(host_facts.jax, 'process_count', lambda: 4)
  with pytest.raises(CheckError, match='devices of 4 processes, and 1 are connected'):
    preflight.check(tiny(), str(tmp_path), is_training=True)


def test_numbers_that_arrive_wrong_are_found(monkeypatch):
  assert host_facts.exchange() == ''
  monkeypatch.setattr(host_facts.processes, 'gather', lambda own: [own ^ 1])
  assert 'process 0 arrived wrong' in host_facts.exchange()


@pytest.mark.parametrize(
  ('free', 'changes', 'is_training', 'error'),
  [
    (500 << 20, {}, True, ''),
    (500 << 20, {'model.path': 'MODEL'}, True, 'CheckError'),  # 300 MB of weights, twice
    (500 << 20, {'model.path': 'MODEL', 'lora.rank': 4}, True, ''),
    (500 << 20, {'model.path': 'MODEL'}, False, ''),
    (1500 << 20, {'model.path': 'MODEL'}, True, 'warning'),
    (5000 << 20, {'model.path': 'MODEL'}, True, ''),
    (1 << 20, {}, False, 'CheckError'),
  ],
)
def test_room_on_the_disk(tmp_path, monkeypatch, capfd, free, changes, is_training, error):
  model = tmp_path / 'model'
  model.mkdir()
  with open(model / 'model.safetensors', 'wb') as file:
    file.truncate(300 << 20)
  usage = shutil.disk_usage(tmp_path)._replace(free=free)
  monkeypatch.setattr(host_facts.shutil, 'disk_usage', lambda _: usage)
  c = tiny(**{k: str(model) if v == 'MODEL' else v for k, v in changes.items()})
  if error == 'CheckError':
    with pytest.raises(CheckError, match=r'disk: .* free on process 0'):
      preflight.check(c, str(tmp_path / 'run'), is_training)
  else:
    preflight.check(c, str(tmp_path / 'run'), is_training)
  assert ('disk' in capfd.readouterr().err) == bool(error)


def test_weights_of_a_model(tmp_path, bucket):
  for place in (tmp_path / 'hf', tmp_path / 'run' / 'export'):
    place.mkdir(parents=True)
    (place / 'model.safetensors').write_bytes(b'x' * 10)
    (place / 'config.json').write_bytes(b'x' * 5)
  (tmp_path / 'a.gguf').write_bytes(b'x' * 7)
  bucket_model = 'gs://bucket/model'
  host_facts.files.write_bytes(f'{bucket_model}/model.safetensors', b'x' * 3)
  found = [tmp_path / 'hf', tmp_path / 'run', tmp_path / 'a.gguf', bucket_model, 'org/name', '']
  sizes = [host_facts.weight_bytes(str(p) if p else '') for p in found]
  assert sizes == [10, 10, 7, 3, 0, 0]


def test_a_table_fits_the_terminal_and_errors_have_their_code():
  long = preflight.Row('disk', FAILED, 'word ' * 60)
  flag = preflight.Row('workdir', FAILED, 'refused', is_flag=True)
  report = preflight.Report(('a', 'b'), (preflight.Row('code', OK, 'x'), long, flag))
  lines = report.text().splitlines()
  assert max(map(len, lines)) <= 100 and lines[0] == 'Pre-flight: 2 processes on 2 hosts'
  assert lines[-1] == 'Verdict: not started: disk, workdir'
  with pytest.raises(CheckError, match='disk: word'):
    report.enforce()
  with pytest.raises(ConfigError, match='workdir: refused'):
    preflight.Report(('a',), (flag,)).enforce()


# Several processes


def test_two_processes_that_agree(tmp_path):
  words = [*arguments(tmp_path / 'a run'), '--preflight']
  with Processes(2, words, tmp_path / 'logs') as both:
    assert both.wait(timeout=100) == [0, 0], both.said()
    first, second = (log.read_text() for log in both.logs)
  assert 'Pre-flight: 2 processes on ' in first and 'Verdict: ready\n' in first
  assert first.count(' ok ') == 14 and 'every process received the numbers of all 2' in first
  assert 'Pre-flight' not in second
  assert list((tmp_path / 'a run').iterdir()) == []


@pytest.mark.parametrize('is_preflight', [True, pytest.param(False, marks=pytest.mark.full)])
def test_two_processes_that_differ(tmp_path, is_preflight):
  """Other code, another lock, other devices and a workdir that refuses, on process 1: once by
  --preflight, once at the start of a run.
  """
  copy = tmp_path / 'copy'
  ignored = shutil.ignore_patterns('__pycache__')
  shutil.copytree(ROOT / 'ftjax', copy / 'ftjax', ignore=ignored)
  (copy / 'configs').symlink_to(ROOT / 'configs')
  with open(copy / 'ftjax' / 'losses' / 'masked.py', 'a') as file:
    file.write('# another commit\n')
  lock = copy / 'flax-9.9.9.dist-info'  # found before the installed one
  lock.mkdir()
  (lock / 'METADATA').write_text('Metadata-Version: 2.1\nName: flax\nVersion: 9.9.9\n')
  shutil.copy(ROOT / 'pyproject.toml', copy)
  (tmp_path / 'file').write_text('')
  port, running = free_port(), []
  for i in range(2):
    folder = copy if i else ROOT
    workdir = tmp_path / 'file' / 'run' if i else tmp_path / 'run'
    words = [*arguments(workdir), f'--coordinator=127.0.0.1:{port}', '--num_processes=2']
    words += [f'--process_id={i}', *(['--preflight'] if is_preflight else [])]
    variables = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(folder)}
    variables |= {'XLA_FLAGS': tiny_run.xla_flags(3 if i else 1)}
    command = [sys.executable, '-m', 'ftjax.train', *words]
    running.append(
      subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  printed = [p.communicate(timeout=150) for p in running]
  assert [p.returncode for p in running] == [5, 5], printed
  table = printed[0][0] if is_preflight else printed[0][1]
  one = ' '.join(table.split())
  for text in (
    'code FAILED process 1 (',
    'other files in losses',
    'flax 9.9.9 instead of ',
    'devices FAILED process 1 (',
    '3 devices instead of 1 devices',
    'exchange not run',
    'workdir FAILED process 1 (',
    'cannot create the folder',
    'Verdict: not started: code, packages, devices, workdir',
  ):
    assert text in one, table
  assert 'Pre-flight:' not in printed[1][0]
