"""Tokenizing in several processes: the same bytes as in one, whatever dies on the way."""

import datetime
import decimal
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_gcs import BUCKET
from test_token_cache import chat_rows, write
from tiny_tokenizer import tiny_files

from ftjax.data import blocks, corpus_builder, token_cache, tokenize_pool
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError
from ftjax.storage import files

HERE = pathlib.Path(__file__).resolve().parent
BLOCK = 20


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """A source of some hundred rows has many blocks, and is given to processes."""
  monkeypatch.setattr(blocks, 'BLOCK_ROWS', BLOCK)
  monkeypatch.setattr(corpus_builder, '_FEW_BLOCKS', 2)


def source(spec, cache_dir, **changes):
  settings = {'seq_len': 64, 'loss_on': 'assistant', 'on_overlength': 'error', 'progress': False}
  tokenizer = Tokenizer(tiny_files())
  return token_cache.Source(
    spec, tokenizer, cache_dir=cache_dir, **(settings | {'workers': 1} | changes)
  )


def content(cache_dir):
  """{file name: bytes} of the one finished cache in a folder, and nothing else lies there."""
  (folder,) = pathlib.Path(cache_dir).iterdir()
  assert not folder.name.startswith('building')
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def fresh(spec, tmp_path, **changes):
  source(spec, tmp_path / 'fresh', **changes).open()
  return content(tmp_path / 'fresh')


@pytest.fixture
def counted(monkeypatch):
  """Numbers of the blocks that this process tokenizes."""
  numbers, tokenize = [], blocks.BlockTokenizer.tokenize
  monkeypatch.setattr(
    blocks.BlockTokenizer,
    'tokenize',
    lambda self, block: numbers.append(block.number) or tokenize(self, block),
  )
  return numbers


def mixed(tmp_path):
  """Rows of one format with some that cannot be used, in two files."""
  folder = tmp_path / 'rows'
  folder.mkdir()
  rows = chat_rows(90)
  rows[3] = rows[50] = {'messages': []}
  rows[41] = {'other': 1}
  write(folder / '1.jsonl', [{'other': 1}, *rows])
  write(folder / '2.jsonl', chat_rows(50))
  return Spec(str(folder))


def dated(tmp_path):
  """Parquet rows with values that have no JSON form, also where a text should be."""
  date = datetime.datetime(2020, 1, 2)
  texts = [
    [{'role': 'user', 'content': f'q{i}'}, {'role': 'assistant', 'content': 'a'}] for i in range(70)
  ]
  table = {'messages': texts, 'at': [date] * 70, 'price': [decimal.Decimal('1.5')] * 70}
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table(table), path)
  return Spec(str(path))


def wrong_type(tmp_path):
  path = tmp_path / 'b.parquet'
  pq.write_table(pa.table({'text': [b'a'] * 70}), path)
  return Spec(str(path))


@pytest.mark.parametrize('make', [mixed, dated])
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path, make, counted):
  spec = make(tmp_path)
  want = fresh(spec, tmp_path, on_bad_row='drop')
  counted.clear()
  for workers in (2, 3):
    found = source(spec, tmp_path / str(workers), workers=workers, on_bad_row='drop').open()
    assert content(tmp_path / str(workers)) == want and len(found) > 60
  assert not counted


@pytest.mark.parametrize('make', [mixed, wrong_type])
def test_errors_do_not_depend_on_the_number_of_processes(tmp_path, make):
  spec, told = make(tmp_path), []
  for workers in (1, 2):
    with pytest.raises(DataError) as caught:
      source(spec, tmp_path / 'cache', workers=workers).open()
    told.append(str(caught.value))
  assert told[0] == told[1] and 'rows that cannot be used' in told[0]
  assert make is mixed or "'text' is bytes" in told[0]


def test_small_sources_start_no_process(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_builder, 'Pool', None)
  spec = write(tmp_path / 'a.jsonl', chat_rows(2 * BLOCK))
  assert len(source(spec, tmp_path / 'cache', workers=2).open()) == 2 * BLOCK


def test_few_but_long_rows_are_no_small_source(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_builder, '_FEW_BYTES', 1000)
  spec = write(tmp_path / 'a.jsonl', chat_rows(BLOCK))
  monkeypatch.setattr(corpus_builder, 'Pool', None)
  with pytest.raises(TypeError, match='not callable'):
    source(spec, tmp_path / 'cache', workers=2).open()


def test_a_worker_imports_no_jax():
  code = 'import sys, ftjax.data.tokenize_worker; sys.exit("jax" in sys.modules)'
  environment = os.environ | {'PYTHONPATH': str(HERE.parent)}
  assert subprocess.run([sys.executable, '-c', code], env=environment, check=False).returncode == 0


def kill_workers(monkeypatch, times):
  """Kills the process that is given block 2, the first so many times."""
  send, left = tokenize_pool._Worker._send, [times]

  def and_kill(self, block):
    if block.number == 2 and left[0]:
      left[0] -= 1
      os.kill(self._process.pid, signal.SIGKILL)
      self._process.wait()
    send(self, block)

  monkeypatch.setattr(tokenize_pool._Worker, '_send', and_kill)


@pytest.mark.parametrize('at_once', [1, 2])
def test_a_killed_worker_is_replaced(tmp_path, monkeypatch, at_once):
  monkeypatch.setattr(tokenize_pool, '_BLOCKS_EACH', at_once)
  spec = write(tmp_path / 'a.jsonl', chat_rows(5 * BLOCK))
  want = fresh(spec, tmp_path)
  kill_workers(monkeypatch, 1)
  source(spec, tmp_path / 'cache', workers=2).open()
  assert content(tmp_path / 'cache') == want


def alive(parent):
  """Workers of a process."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words = path.read_bytes().split(b'\0')
    except OSError:
      continue
    if b'ftjax.data.tokenize_worker' in words and words[-2] == str(parent).encode():
      found.append(path)
  return found


def test_rows_that_kill_every_worker_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenize_pool, '_BLOCKS_EACH', 1)
  spec = write(tmp_path / 'a.jsonl', chat_rows(5 * BLOCK))
  kill_workers(monkeypatch, 9)
  with pytest.raises(
    DataError, match=r'killed by signal 9, twice.*from line 41 .*to line 60 .*data.workers'
  ):
    source(spec, tmp_path / 'cache', workers=2).open()
  assert not alive(os.getpid())


def test_an_interrupt_ends_all_workers_and_keeps_what_is_finished(tmp_path, monkeypatch, counted):
  spec = write(tmp_path / 'a.jsonl', chat_rows(5 * BLOCK))
  with monkeypatch.context() as patched:
    add = corpus_builder.Writer.add

    def interrupted(self, block):
      add(self, block)
      raise KeyboardInterrupt

    patched.setattr(corpus_builder.Writer, 'add', interrupted)
    with pytest.raises(KeyboardInterrupt):
      source(spec, tmp_path / 'cache', workers=2).open()
  assert not alive(os.getpid())
  source(spec, tmp_path / 'cache').open()
  assert 0 not in counted and len(counted) < 5
  assert content(tmp_path / 'cache') == fresh(spec, tmp_path)


_DIES = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
import test_tokenize_pool as t
from ftjax.data import blocks, corpus_builder
from ftjax.data.sources import Spec
blocks.BLOCK_ROWS, corpus_builder._FEW_BLOCKS = t.BLOCK, 2
add, added = corpus_builder.Writer.add, []
def die_at_the_third(self, block):
  added.append(block)
  if len(added) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  add(self, block)
corpus_builder.Writer.add = die_at_the_third
t.source(Spec(sys.argv[1]), sys.argv[2], workers=2).open()
"""


def test_a_killed_build_resumes_and_leaves_no_process(tmp_path, counted):
  spec = write(tmp_path / 'a.jsonl', chat_rows(12 * BLOCK))
  cache_dir = tmp_path / 'cache'
  words = [sys.executable, '-c', _DIES, spec.path, str(cache_dir), str(HERE), str(HERE.parent)]
  process = subprocess.Popen(words)
  assert process.wait() == -signal.SIGKILL
  while alive(process.pid):
    time.sleep(0.05)
  (path,) = cache_dir.glob('building-*/block-00000001')
  path.write_bytes(path.read_bytes()[:-1])  # torn
  source(spec, cache_dir).open()
  assert not {0, 2} & set(counted) and 1 in counted
  abandoned = [p for p in cache_dir.iterdir() if p.name.startswith('building')]
  for folder in abandoned:  # the files that were put together; swept after a day
    assert {p.suffix for p in folder.iterdir()} == {'.bin'}
    for file in folder.iterdir():
      file.unlink()
    folder.rmdir()
  assert content(cache_dir) == fresh(spec, tmp_path)


def test_bad_rows_found_late_do_not_cost_the_good_ones_twice(tmp_path, counted):
  spec = write(tmp_path / 'a.jsonl', [*chat_rows(5 * BLOCK), {'messages': []}])
  with pytest.raises(DataError, match='1 of 101 rows read'):
    source(spec, tmp_path / 'cache').open()
  assert counted == [0, 1, 2, 3, 4, 5]
  source(spec, tmp_path / 'cache', on_bad_row='drop').open()
  assert len(counted) == 6 and content(tmp_path / 'cache')


def test_the_search_for_more_bad_rows_ends(tmp_path, monkeypatch, counted):
  monkeypatch.setattr(corpus_builder, '_BLOCKS_AFTER_REFUSED', 2)
  spec = write(tmp_path / 'a.jsonl', [{'messages': []}, *chat_rows(8 * BLOCK)])
  with pytest.raises(DataError, match=f'1 of {3 * BLOCK} rows read'):
    source(spec, tmp_path / 'cache').open()
  assert len(counted) < 5


@pytest.mark.parametrize('hosts', [2, 3])
def test_hosts_that_share_a_folder_tokenize_a_part_each(tmp_path, counted, hosts):
  spec = write(tmp_path / 'a.jsonl', chat_rows(6 * BLOCK))
  want, shares = fresh(spec, tmp_path), []
  for host in range(hosts):
    counted.clear()
    source(spec, tmp_path / 'cache').tokenize_share(host, hosts)
    shares.append(list(counted))
  assert shares == [list(range(host, 6, hosts)) for host in range(hosts)]
  counted.clear()
  source(spec, tmp_path / 'cache').open()
  assert content(tmp_path / 'cache') == want and not counted
  source(spec, tmp_path / 'cache').tokenize_share(0, hosts)  # all is there
  assert content(tmp_path / 'cache') == want and not counted


def test_a_host_without_a_shared_folder_tokenizes_all(tmp_path, counted):
  spec = write(tmp_path / 'a.jsonl', chat_rows(6 * BLOCK))
  source(spec, tmp_path / 'other').tokenize_share(1, 2)
  source(spec, tmp_path / 'cache').open()
  assert content(tmp_path / 'cache') == fresh(spec, tmp_path)


def peak_bytes(tmp_path, rows):
  spec = write(tmp_path / f'{rows}.jsonl', chat_rows(rows))
  tracemalloc.start()
  try:
    source(spec, tmp_path / 'cache').open()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_source(tmp_path):
  peak_bytes(tmp_path, 5 * BLOCK)  # first uses: caches of libraries
  assert peak_bytes(tmp_path, 100 * BLOCK) < 1.5 * peak_bytes(tmp_path, 10 * BLOCK) + 100_000


def test_the_first_rows_are_read_alone(tmp_path, monkeypatch):
  spec = write(tmp_path / 'a.jsonl', [*chat_rows(10 * BLOCK), {'messages': []}])
  read, scan = [], corpus_builder.sources.scan
  monkeypatch.setattr(corpus_builder.sources, 'fingerprint', None)
  monkeypatch.setattr(
    corpus_builder.sources, 'scan', lambda spec: (read.append(row) or row for row in scan(spec))
  )
  for rows in (1, 7, 3 * BLOCK + 1):
    read.clear()
    corpus = token_cache.head(source(spec, tmp_path / 'cache'), rows)
    assert len(corpus) == len(read) == corpus.counts.rows == rows


def test_what_a_row_holds_survives_the_way_to_a_process():
  rows = [
    {'a': 1, 'b': [1.5, None, True, {'c': 'ü\ud800'}], 'd': 2**70},
    {'a': datetime.date(2020, 1, 2), 'b': [{'c': decimal.Decimal('1.10')}]},
    blocks.Bad('not JSON'),
  ]
  (block,) = blocks.split([(0, i, row) for i, row in enumerate(rows)], None, 'text')
  found = [blocks.unpack(packed) for packed in block.packed]
  assert found[0] == (0, 0, rows[0]) and found[2] == (0, 2, rows[2])
  for got, want in (
    (found[1][2]['a'], rows[1]['a']),
    (found[1][2]['b'][0]['c'], rows[1]['b'][0]['c']),
  ):
    assert (str(got), repr(got), type(got).__name__) == (str(want), repr(want), type(want).__name__)
    with pytest.raises(TypeError, match=f'Object of type {type(want).__name__} is not JSON'):
      json.dumps(got)


def test_hosts_share_the_work_through_a_bucket(bucket, tmp_path, monkeypatch, counted):
  spec = write(tmp_path / 'a.jsonl', chat_rows(6 * BLOCK))
  want, cache_dir, machines = fresh(spec, tmp_path), f'gs://{BUCKET}/run/data_cache', []
  for host in range(2):
    machines.append(str(tmp_path / f'machine {host}'))
    monkeypatch.setenv('FTJAX_CACHE', machines[-1])
    source(spec, cache_dir).tokenize_share(host, 2)
  assert len(bucket.names('run/data_cache')) == 3  # of the second host
  counted.clear()
  for machine in machines:  # the first one puts the parts together, the second one downloads them
    monkeypatch.setenv('FTJAX_CACHE', machine)
    source(spec, cache_dir).open()
  assert not counted
  assert {name.rpartition('/')[2] for name in bucket.names('run/data_cache')} == set(want)
  mirror = files.local_mirror(cache_dir)
  found = [p for p in mirror.iterdir() if not p.name.startswith('building')]
  assert {p.name: p.read_bytes() for p in found[0].iterdir()} == want
