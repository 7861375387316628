"""The folder of compiled programs: what is damaged goes, what is whole stays and is used."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tiny_run

from ftjax.storage import program_cache

WHOLE = zlib.compress(np.random.default_rng(0).bytes(4000))


def flipped(content, at):
  out = bytearray(content)
  out[at] ^= 0x10
  return bytes(out)


DAMAGED = {
  'cut in half': WHOLE[:2000],
  'cut by one byte': WHOLE[:-1],
  'empty': b'',
  'one byte': WHOLE[:1],
  'a flipped bit': flipped(WHOLE, 1234),
  'a flipped bit of the checksum': flipped(WHOLE, -1),
  'zeros, as a file system leaves them': bytes(len(WHOLE)),
  'text': b'<html>404</html>',
}


@pytest.mark.parametrize('name', DAMAGED)
@pytest.mark.parametrize('is_recorded', [True, False])
def test_a_damaged_entry_is_removed_and_reported(name, is_recorded, tmp_path, caplog):
  folder = str(tmp_path)
  for entry in ('good-1-cache', 'bad-2-cache'):
    (tmp_path / entry).write_bytes(WHOLE)
  (tmp_path / 'other').write_bytes(b'')  # not jax's
  if is_recorded:
    program_cache.record(folder)
  (tmp_path / 'bad-2-cache').write_bytes(DAMAGED[name])
  assert program_cache.check(folder) == ['bad-2-cache']
  assert {'good-1-cache', 'other'} == {p.name for p in tmp_path.iterdir()} - {'sha256.json'}
  (record,) = caplog.records
  assert 'bad-2-cache is damaged: removed' in record.getMessage()
  assert program_cache.check(folder) == []
  # Written anew, perhaps with other bytes.
  (tmp_path / 'bad-2-cache').write_bytes(zlib.compress(b'another compilation'))
  assert program_cache.check(folder) == []
  assert json.loads((tmp_path / 'sha256.json').read_text()).keys() == {
    'good-1-cache',
    'bad-2-cache',
  }


def test_an_entry_of_an_unknown_compression_is_known_by_its_checksum(tmp_path):
  """zstd without a checksum of its own decompresses to something else."""
  content = b'\x28\xb5\x2f\xfd' + bytes(100)
  (tmp_path / 'a-cache').write_bytes(content)
  program_cache.record(str(tmp_path))
  assert program_cache.check(str(tmp_path)) == []
  (tmp_path / 'a-cache').write_bytes(flipped(content, 50))
  assert program_cache.check(str(tmp_path)) == ['a-cache']


@pytest.mark.parametrize('record', ['', '{"a-cache": ', '[]', '{"a-cache": 3}', '\0'])
def test_a_damaged_record_costs_no_more_than_a_compilation(record, tmp_path):
  (tmp_path / 'a-cache').write_bytes(WHOLE)
  (tmp_path / 'sha256.json').write_text(record)
  assert program_cache.check(str(tmp_path)) == (['a-cache'] if '3' in record else [])


def test_there_need_be_no_folder(tmp_path):
  assert program_cache.check(str(tmp_path / 'none')) == []
  program_cache.record(str(tmp_path / 'none'))
  assert program_cache.check('gs://bucket/run/xla_cache') == []
  assert not list(tmp_path.iterdir())


STARTS = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from ftjax.storage import program_cache
folder = pathlib.Path(sys.argv[1])
jax.config.update('jax_compilation_cache_dir', str(folder))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
counts = {}
def see(event, **_):
  counts[event.rpartition('_')[2]] = counts.get(event.rpartition('_')[2], 0) + 1
jax.monitoring.register_event_listener(see)
def start(is_checked):
  counts.clear()
  jax.clear_caches()
  compilation_cache.reset_cache()
  if is_checked:
    program_cache.check(str(folder))
  jax.jit(lambda x: jnp.sin(x) @ x.T).lower(jnp.ones((8, 4))).compile()
  return counts.get('hits', 0)
def damage():
  for path in folder.glob('*-cache'):
    path.write_bytes(path.read_bytes()[:100])
x = jnp.ones((8, 4))
start(True)
whole = start(True)
damage()
print(whole > 0, start(False) < whole, start(False) < whole, start(True) < whole,
      start(True) == whole)
"""


def test_jax_misses_a_damaged_entry_for_ever_unless_it_is_removed(tmp_path):
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', STARTS, str(tmp_path)],
    cwd=tiny_run.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.split() == ['True'] * 5, done.stdout + done.stderr
