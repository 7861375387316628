"""What every test runs under: eight fake CPU devices, exact float32 products, a mesh of one device.

Nothing may import jax before this file does. `tiny_model.py` holds the model most tests use.
"""

import hashlib
import os
import shutil
import tempfile
from importlib import metadata

# Programs this small take far longer to compile than to run, so XLA is told to do little to them;
# with XLA_FLAGS set, to nothing even, they are compiled as users' are (make optimized).
os.environ['HF_HUB_OFFLINE'] = '1'  # no test asks the real hub; fake_hub.py has settings of its own
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  # jaxlib 0.12 dies of this one, which it no longer knows.
  + ' --xla_cpu_use_fusion_emitters=false' * metadata.version('jaxlib').startswith('0.10.'),
)
os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=8'
# XLA aborts the process when a device waits 40 s for the others; a busy machine may take longer.
os.environ['XLA_FLAGS'] += ' --xla_cpu_collective_call_terminate_timeout_seconds=300'
os.environ['NPROC'] = '128'  # as runtime/host_threads.py sets it for eight devices

# Programs are compiled once a session, also for the processes that tests start; FTJAX_TEST_CACHE
# names a folder to keep them in from session to session. JAX's keys hold the versions of jax and
# jaxlib, the flags of XLA and the devices, so one folder serves all.
if 'FTJAX_TEST_SESSION' not in os.environ:  # in the first process: xdist's workers inherit it
  _FOLDER = os.environ.get('FTJAX_TEST_CACHE') or tempfile.mkdtemp(prefix='ftjax-test-cache-')
  os.environ['FTJAX_TEST_SESSION'] = str(os.getpid())
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _FOLDER
  # Writing an entry costs some 10 ms.
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.05'

import gc
import itertools
import math
import pathlib

import jax
import pytest

from ftjax.runtime import sharding

jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
jax.config.update('jax_numpy_rank_promotion', 'raise')


# Files that take longest come first, so that no worker is left alone with one of them at the end.
_LONGEST = (
  'multiprocess/test_processes.py',
  'test_algorithm_resume.py',
  'test_entries.py',
  'multiprocess/test_rollouts.py',
  'multidevice/test_meshes.py',
  'test_resume.py',
  'test_gcs_run.py',
)


def pytest_addoption(parser):
  parser.addoption('--full', action='store_true', help='also the tests marked `full`')
  parser.addoption(
    '--shard', metavar='I/N', help='of the tests marked `full` alone, part I (from 0) of N'
  )


def pytest_configure(config):
  config.addinivalue_line('markers', 'full: longer than the everyday suite allows: make test-all')


def pytest_unconfigure(config):
  if os.environ.get('FTJAX_TEST_SESSION') == str(os.getpid()) and not (
    os.environ.get('FTJAX_TEST_CACHE')
  ):
    shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


def _is_in_shard(item, index, count):
  digest = hashlib.sha256(item.nodeid.encode()).digest()
  return int.from_bytes(digest[:4], 'big') % count == index


def pytest_collection_modifyitems(config, items):
  """Leaves out what the options do not ask for, and puts the longest files first."""

  def is_wanted(item):
    is_full = item.get_closest_marker('full') is not None
    if shard := config.getoption('--shard'):
      index, count = map(int, shard.split('/'))
      return is_full and _is_in_shard(item, index, count)
    return not is_full or config.getoption('--full')

  left_out = [item for item in items if not is_wanted(item)]
  if left_out:
    config.hook.pytest_deselected(items=left_out)
  kept = [item for item in items if is_wanted(item)]
  tests = pathlib.Path(__file__).parent
  places = {name: place for place, name in enumerate(_LONGEST)}
  items[:] = sorted(
    kept,
    key=lambda item: places.get(item.path.relative_to(tests).as_posix(), len(places)),
  )


def _set(sizes):
  sizes = dict.fromkeys(sharding.AXES, 1) | sizes
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  jax.set_mesh(mesh)
  return mesh


@pytest.fixture(autouse=True, scope='session')
def _one_device():
  """Before fixtures of any scope, so that those may make arrays."""
  _set({})


@pytest.fixture(autouse=True)
def _back_to_one_device():
  """A program under test may set a mesh of its own (`experiment.start` does)."""
  yield
  _set({})
  _drop_programs()


_tests = itertools.count(1)
_MOST_MAPPINGS = 20_000


def _drop_programs():
  """Frees the compiled programs of a process that has many, now and then: each has memory mappings,
  and at vm.max_map_count (65,530 of Linux) XLA dies by a segmentation fault.
  """
  maps = pathlib.Path('/proc/self/maps')
  if next(_tests) % 16 or not maps.exists():
    return
  if maps.read_bytes().count(b'\n') > _MOST_MAPPINGS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def users_programs():
  """What a module's tests start as processes of their own is compiled as users' runs are."""
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('XLA_FLAGS')
    yield


@pytest.fixture
def use_mesh():
  """`use_mesh(fsdp=2, tensor=2)` sets a mesh over the first devices for the rest of the test."""
  return lambda **sizes: _set(sizes)


@pytest.fixture(scope='session')
def _gcs_server():
  """A bucket on loopback, to which this process and those it starts are sent instead."""
  from fake_gcs import FakeGcs

  with FakeGcs() as fake, pytest.MonkeyPatch.context() as patch:
    for name, value in fake.env.items():
      patch.setenv(name, value)
    yield fake


@pytest.fixture
def bucket(_gcs_server, tmp_path, monkeypatch):
  """The server with an empty bucket, gs://bucket; mirrors lie below tmp_path."""
  _gcs_server.reset()
  monkeypatch.setenv('FTJAX_CACHE', str(tmp_path / 'mirror'))
  return _gcs_server
