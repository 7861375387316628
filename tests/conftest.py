"""What every test runs under: eight fake CPU devices, exact float32 products, a mesh of one device.

Nothing may import jax before this file does. `tiny_model.py` holds the model most tests use.
"""

import os
from importlib import metadata

# Programs this small take far longer to compile than to run, so XLA is told to do little to them;
# with XLA_FLAGS set, to nothing even, they are compiled as users' are (make optimized).
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  # jaxlib 0.12 dies of this one, which it no longer knows.
  + ' --xla_cpu_use_fusion_emitters=false' * metadata.version('jaxlib').startswith('0.10.'),
)
os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=8'

import math

import jax
import pytest

from ftjax.runtime import sharding

jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_numpy_rank_promotion', 'raise')


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
