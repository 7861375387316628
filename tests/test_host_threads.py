"""XLA's CPU backend has threads for all collectives that may wait at once."""

import collections
import os
import subprocess
import sys

import pytest

from ftjax.runtime import host_threads

EIGHT = '--xla_dump_to=x --xla_force_host_platform_device_count=8 --xla_cpu_max_isa=AVX'


@pytest.mark.parametrize(
  ('environment', 'processes', 'expected'),
  [
    ({'XLA_FLAGS': EIGHT}, 1, '128'),
    ({'XLA_FLAGS': EIGHT, 'NPROC': '12'}, 1, '12'),
    ({'XLA_FLAGS': '--xla_cpu_max_isa=AVX', 'JAX_PLATFORMS': 'cpu'}, 1, None),
    ({'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}, 1, None),
    ({'JAX_PLATFORMS': 'tpu'}, 4, None),
    ({}, 1, None),
  ],
)
def test_where_more_threads_are_reserved(environment, processes, expected):
  host_threads.reserve(processes, environment)
  assert environment.get('NPROC') == expected


def test_processes_on_cpus_reserve_threads_too():
  environment = {'JAX_PLATFORMS': 'cpu'}
  host_threads.reserve(2, environment)
  assert int(environment['NPROC']) >= 16


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='names of threads are in /proc')
def test_the_backend_has_them():
  """Also in the tests themselves: conftest.py reserves threads for its eight devices."""
  assert int(os.environ['NPROC']) >= 128
  names = collections.Counter()
  for thread in os.listdir('/proc/self/task'):
    with open(f'/proc/self/task/{thread}/comm') as file:
      names[file.read().strip()] += 1
  assert names['tf_XLAEigen'] >= 128


def test_an_entry_reserves_them_before_jax_is_imported():
  code = """
import os, sys
from ftjax import cli
def main():
  assert 'jax' not in sys.modules
  print(os.environ['NPROC'])
cli.run(main)
"""
  environment = {k: v for k, v in os.environ.items() if k != 'NPROC'} | {'XLA_FLAGS': EIGHT}
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False
  )
  assert done.stdout == '128\n', done.stderr
