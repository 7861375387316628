"""Who a process is, by flags and environment; the meeting before jax's own, in threads."""

import contextlib
import itertools
import json
import socket
import threading
import time

import pytest

from ftjax.cluster import distributed
from ftjax.cluster.distributed import Launch, find, meet
from ftjax.runtime.errors import ConfigError, StoppedEarly

SLURM = {'SLURM_NTASKS': '4', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1'}
MPI = {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '1'}


def test_alone_without_flags_and_environment():
  assert find(None, None, None, {'JAX_PLATFORMS': 'cpu'}) is None
  assert find('here:1', 1, 0, {}) is None


def test_flags_describe_the_launch():
  assert find('host:1234', 8, 5, {}) == Launch('host:1234', 8, 5)
  assert find('[::1]:1234', 2, 0, {}) == Launch('[::1]:1234', 2, 0)


def test_ranks_come_from_slurm_or_mpi_without_flags():
  assert find('host:1', None, None, SLURM) == Launch('host:1', 4, 3)
  assert find('host:1', None, None, MPI) == Launch('host:1', 2, 1)
  assert find('host:1', None, None, {'PMI_SIZE': '6', 'PMI_RANK': '0'}) == Launch('host:1', 6, 0)
  assert find('host:1', 9, 8, SLURM).process_id == 8


def test_mpi_inside_a_slurm_job_goes_by_mpi():
  both = SLURM | {'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'} | MPI
  assert find('host:1', None, None, both | {'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}) == Launch(
    'host:1', 2, 1, (1,)
  )
  with pytest.raises(ConfigError, match='--coordinator=HOST:PORT'):
    find(None, None, None, MPI | {'JAX_PLATFORMS': 'cpu'})


def test_processes_that_share_a_machine_have_a_gpu_each_and_one_alone_has_all():
  shared = SLURM | {'SLURM_STEP_TASKS_PER_NODE': '2(x2)'}
  assert find('host:1', None, None, shared).local_devices == (1,)
  alone = SLURM | {'SLURM_STEP_TASKS_PER_NODE': '1(x4)', 'SLURM_LOCALID': '0'}
  assert find('host:1', None, None, alone).local_devices is None
  assert find('host:1', None, None, MPI | {'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}).local_devices == (1,)


def test_slurm_is_detected_by_itself():
  """By jax's own detection, on one node; across nodes a loopback coordinator is refused."""
  job = SLURM | {
    'SLURM_JOB_ID': '17',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_JOB_NUM_NODES': '1',
  }
  with pytest.MonkeyPatch.context() as patch:
    for key, value in job.items():
      patch.setenv(key, value)
    found = find(None, None, None)
    assert (found.num_processes, found.process_id) == (4, 3)
    assert found.coordinator.startswith('localhost:')
    patch.setenv('SLURM_JOB_NUM_NODES', '2')
    with pytest.raises(ConfigError, match='loopback'):
      find(None, None, None)


def test_a_cluster_that_does_not_answer_is_no_process_alone(monkeypatch):
  for key in ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID'):
    monkeypatch.setenv(key, 'nonsense')
  monkeypatch.setenv('SLURM_LOCALID', '0')
  with pytest.raises(ConfigError, match=r'of a cluster \(slurm\).*--num_processes=1'):
    find(None, None, None)
  assert find(None, 1, None) is None


@pytest.mark.parametrize(
  'flags, message',
  [
    ((None, 2, None), '--num_processes=2'),
    (('host', 2, 0), 'expected HOST:PORT'),
    (('host:1', 2, None), 'missing'),
    (('host:1', 2, 2), 'expected 0 to 1'),
  ],
)
def test_flags_that_cannot_be_meant(flags, message):
  with pytest.raises(ConfigError, match=message):
    find(*flags, {})


def attend(launches, timeout):
  """What each process of a meeting raised, or None."""
  out = [None] * len(launches)

  def go(i):
    try:
      meet(launches[i], timeout)
    except (ConfigError, StoppedEarly) as error:
      out[i] = error

  threads = [threading.Thread(target=go, args=(i,)) for i in range(len(launches))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  return out


@pytest.fixture
def address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def test_all_meet_and_the_port_is_free_again(address):
  for _ in range(2):
    assert attend([Launch(address, 4, i) for i in (3, 1, 0, 2)], 20) == [None] * 4
    socket.create_server(('', int(address.rpartition(':')[2]))).close()


def test_everybody_learns_who_is_missing(address):
  errors = attend([Launch(address, 5, i) for i in (0, 2, 3)], 4)
  for error in errors:
    assert isinstance(error, StoppedEarly) and 'missing: process 1, 4.' in str(error)
    assert '--init_timeout_s' in str(error) and 'loopback' in str(error)


def test_without_process_0_the_address_is_named(address):
  (error,) = attend([Launch(address, 2, 1)], 0.5)
  assert isinstance(error, StoppedEarly) and f'no process 0 at {address}' in str(error)


def test_numbers_that_contradict(address):
  errors = attend([Launch(address, 3, 0), Launch(address, 3, 1), Launch(address, 3, 1)], 10)
  assert any('two processes have number 1' in str(e) for e in errors)
  errors = attend([Launch(address, 3, 0), Launch(address, 4, 1)], 10)
  assert all(isinstance(e, ConfigError) and 'expects 4 processes' in str(e) for e in errors)


def test_a_stranger_at_the_port_does_no_harm(address):
  host, _, port = address.rpartition(':')
  words = [b'GET / HTTP/1.1\r\n\r\n', b'{}\n', b'[1]\n', b'{"process": "1", "host": 2, "of": 2}\n']
  words = itertools.cycle(words)

  def knock():
    while not done.is_set():
      try:
        with socket.create_connection((host, int(port)), timeout=1) as s:
          s.sendall(next(words))
      except OSError:
        done.wait(0.05)

  done = threading.Event()
  stranger = threading.Thread(target=knock)
  stranger.start()
  try:
    assert attend([Launch(address, 2, 0), Launch(address, 2, 1)], 20) == [None, None]
  finally:
    done.set()
    stranger.join()


@contextlib.contextmanager
def after_a_death(address, timeout):
  """What process 0 of three raised, once the block is done; number 1 came before it, and died."""
  host, _, port = address.rpartition(':')
  out = []
  main = threading.Thread(target=lambda: out.extend(attend([Launch(address, 3, 0)], timeout)))
  main.start()
  with knocking(host, int(port)) as first:
    first.sendall(json.dumps({'process': 1, 'host': 'here', 'of': 3}).encode() + b'\n')
    time.sleep(0.3)
  yield out
  main.join()


def test_a_process_that_is_started_anew_is_no_second_one(address):
  with after_a_death(address, 20) as out:
    assert attend([Launch(address, 3, 1), Launch(address, 3, 2)], 20) == [None, None]
  assert out == [None]


@pytest.mark.full
def test_a_process_that_has_died_again_is_missing(address):
  with after_a_death(address, 6) as out:
    pass
  assert isinstance(out[0], StoppedEarly) and 'missing: process 1, 2.' in str(out[0])


def knocking(host, port):
  """A connection to a server that is about to be opened."""
  for _ in range(100):
    try:
      return socket.create_connection((host, port), timeout=5)
    except OSError:
      time.sleep(0.05)
  raise TimeoutError(port)


def test_stale_slices_are_refused(monkeypatch):
  monkeypatch.setenv('MEGASCALE_NUM_SLICES', '2')
  with pytest.raises(ConfigError, match='MEGASCALE_NUM_SLICES=2'):
    distributed._check_slices()
  monkeypatch.setenv('MEGASCALE_NUM_SLICES', '1')
  distributed._check_slices()
