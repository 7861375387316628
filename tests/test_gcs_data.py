"""Data, models, exports, caches and checkpoints in a bucket are what they are on a disk."""

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_gcs import BUCKET
from jax.sharding import NamedSharding, PartitionSpec
from parity.toy_gguf import Toy, write_toy
from tiny_tokenizer import tiny_files

from ftjax import convert
from ftjax.data import corpus_builder, sources, token_cache
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.families import table as families
from ftjax.hf import export, file_marks, gguf_files, layout, load, safetensors
from ftjax.hf.gguf import GGUFSource
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.hf.tensor_source import TensorInfo
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError, DataError, NonFiniteError
from ftjax.storage import files, gcs
from ftjax.storage.checkpoint import Checkpoints, Retention

GOLDEN = Path(__file__).parent / 'parity' / 'golden'
ROOT = f'gs://{BUCKET}'
ROWS = [{'prompt': f'q{i}', 'completion': f'"ä" {i}\n'} for i in range(50)]


# Data


def write_kinds(folder):
  """One file of each kind that is read, with the same rows."""
  lines = ''.join(json.dumps(r) + '\n' for r in ROWS)
  (folder / 'a.jsonl').write_text(lines)
  (folder / 'b.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  (folder / 'c.json').write_text(json.dumps(ROWS))
  quoted = ''.join(
    f'{r["prompt"]},"{r["completion"].replace(chr(34), chr(34) * 2)}"\n' for r in ROWS
  )
  (folder / 'd.csv').write_text('prompt,completion\n' + quoted)
  pq.write_table(pa.Table.from_pylist(ROWS), folder / 'e.parquet')
  arrow = folder / 'f'
  arrow.mkdir()
  table = pa.Table.from_pylist(ROWS)
  with pa.ipc.new_stream(arrow / 'x.arrow', table.schema) as stream:
    stream.write_table(table)
  (arrow / 'state.json').write_text(json.dumps({'_data_files': [{'filename': 'x.arrow'}]}))
  (arrow / 'dataset_info.json').write_text('{}')


def test_patterns_and_splits_of_a_bucket(bucket, tmp_path):
  for name in ('train-0.jsonl', 'train-1.jsonl', 'test.jsonl'):
    (tmp_path / name).write_text(json.dumps({'n': name}) + '\n')
  with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
    archive.writestr('a.jsonl', '{"n": "zip"}\n')
  (tmp_path / 'y.jsonl.zst').write_bytes(pa.compress(b'{"n": "zst"}\n', 'zstd', asbytes=True))
  bucket.upload(tmp_path, 'd')

  def names(path):
    return [row['n'] for _, row in sources.rows(Spec(f'{ROOT}/{path}'))]

  assert names('d/train-*.jsonl') == names('d:train') == ['train-0.jsonl', 'train-1.jsonl']
  assert names('d/x.zip') == ['zip'] and names('d/y.jsonl.zst') == ['zst']
  with pytest.raises(DataError, match=r"holds the splits \['test', 'train'\]"):
    names('d')
  with pytest.raises(DataError, match='no data file matches'):
    names('d/*.csv')
  with pytest.raises(ConfigError, match='only the last part may be a pattern'):
    names('*/a.jsonl')


def test_every_kind_of_source_reads_the_same_rows(bucket, tmp_path):
  write_kinds(tmp_path)
  bucket.upload(tmp_path, 'data')
  for name in ('a.jsonl', 'b.jsonl.gz', 'c.json', 'd.csv', 'e.parquet', 'f'):
    here, there = Spec(str(tmp_path / name)), Spec(f'{ROOT}/data/{name}')
    assert [r for _, r in sources.rows(there)] == [r for _, r in sources.rows(here)] == ROWS
    assert sources.fingerprint(there) == sources.fingerprint(here)
  place, _ = next(sources.rows(Spec(f'{ROOT}/data/a.jsonl')))
  assert place == f'{ROOT}/data/a.jsonl:1'


def test_a_folder_of_data_and_its_mistakes(bucket, tmp_path):
  for name in ('1.jsonl', '2.jsonl'):
    (tmp_path / name).write_text(json.dumps({'text': name}) + '\n')
  bucket.upload(tmp_path, 'data')
  spec = sources.parse_spec(f'{ROOT}/data::text@2')
  assert (spec.path, spec.format, spec.weight) == (f'{ROOT}/data', 'text', 2.0)
  assert [r['text'] for _, r in sources.rows(spec)] == ['1.jsonl', '2.jsonl']
  files.write_text(f'{ROOT}/data/3.tar', '')
  with pytest.raises(DataError, match=r'3\.tar.*would not be read'):
    list(sources.rows(spec))
  for path in (f'{ROOT}/none', f'{ROOT}/none.jsonl', 'gs://missing/x.jsonl'):
    with pytest.raises(DataError, match='no such file or folder'):
      list(sources.rows(Spec(path)))


def test_unreadable_files_are_reported(bucket):
  for denied in ('objects.get', 'objects.list'):
    bucket.deny = {denied}
    for read in (lambda p: list(sources.rows(Spec(p))), load.read_config):
      with pytest.raises(DataError, match=f'gs://bucket/x.*{denied}.*roles/storage.objectViewer'):
        read(f'{ROOT}/x')


def corpus(tmp_path, spec):
  return token_cache.build_or_open(
    spec,
    Tokenizer(tiny_files()),
    cache_dir=f'{ROOT}/run/data_cache',
    seq_len=64,
    loss_on='all',
    on_overlength='error',
    progress=False,
  )


def test_tokens_built_on_one_machine_are_downloaded_by_another(bucket, tmp_path, monkeypatch):
  (tmp_path / 'a.jsonl').write_text(
    ''.join(json.dumps({'text': f'row {i}'}) + '\n' for i in range(9))
  )
  spec = Spec(str(tmp_path / 'a.jsonl'))
  first = corpus(tmp_path, spec)
  stored = bucket.names('run/data_cache')
  assert len(stored) == len(corpus_builder.DTYPES) + 1  # and meta.json
  monkeypatch.setenv('FTJAX_CACHE', str(tmp_path / 'another machine'))

  def refuse(*_):
    raise AssertionError('tokenized again')

  monkeypatch.setattr(token_cache, '_build', refuse)
  second = corpus(tmp_path, spec)
  assert second.fingerprint == first.fingerprint and len(second) == 9
  np.testing.assert_array_equal(second.example(3)[0], first.example(3)[0])
  bucket.requests.clear()
  corpus(tmp_path, spec)  # and read from its mirror from then on
  assert bucket.sent('run/data_cache') == 0
  # What a killed upload left is no cache.
  files.remove(f'{ROOT}/{next(k for k in stored if k.endswith("meta.json"))}')
  monkeypatch.setenv('FTJAX_CACHE', str(tmp_path / 'a third machine'))
  with pytest.raises(AssertionError, match='tokenized again'):
    corpus(tmp_path, spec)


def test_tokens_that_cannot_be_uploaded_are_used_all_the_same(bucket, tmp_path, caplog):
  (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n')
  bucket.deny = {'objects.create'}
  assert len(corpus(tmp_path, Spec(str(tmp_path / 'a.jsonl')))) == 1
  assert 'not uploaded' in caplog.text and bucket.names() == []


# Models


def load_all(path, shardings=None):
  arch = families.architecture(load.read_config(path))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = trees.unflatten(shardings or dict.fromkeys(layout.leaf_shapes(arch), one))
  return trees.flatten(load.load_params(path, arch, places, np.float32))


@pytest.mark.parametrize('model', ['llama_tied', 'llama_untied_gqa'])
def test_a_model_in_a_bucket_loads_bitwise(bucket, model):
  bucket.upload(GOLDEN / model, model)
  here, there = load_all(GOLDEN / model), load_all(f'{ROOT}/{model}')
  assert here.keys() == there.keys()
  for name, value in here.items():
    np.testing.assert_array_equal(there[name], value)
  assert load.fingerprint(f'{ROOT}/{model}') == load.fingerprint(GOLDEN / model)
  assert load.tokenizer_files(f'{ROOT}/{model}') == load.tokenizer_files(GOLDEN / model)


def test_only_the_rows_that_are_asked_for_cross_the_network(bucket, tmp_path, monkeypatch):
  rows, columns = 4096, 64
  value = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
  info = {n: TensorInfo(value.shape, value.dtype) for n in ('a', 'b')}
  safetensors.write_folder(tmp_path, info, lambda _: value)
  bucket.upload(tmp_path, 'model')
  source = SafetensorsFolder(f'{ROOT}/model')
  assert bucket.sent() <= 1 << 16  # the header
  bucket.requests.clear()
  part = source.read('b', (slice(1024, 2048), slice(8, 16)))
  np.testing.assert_array_equal(part, value[1024:2048, 8:16])
  assert bucket.sent() == 1024 * columns * 4
  # A sharded leaf: one host's devices read their rows, once each.
  monkeypatch.setattr(safetensors, 'BLOCK_BYTES', 1 << 16)
  bucket.requests.clear()
  mesh = jax.make_mesh((4,), ('x',), devices=jax.devices()[:4])
  where = NamedSharding(mesh, PartitionSpec('x'))
  made = jax.make_array_from_callback(value.shape, where, lambda i: source.read('a', i))
  np.testing.assert_array_equal(np.asarray(made), value)
  assert bucket.sent() == value.nbytes


@pytest.mark.parametrize('name', ['../other/x.safetensors', '/etc/x', 'gs://other/x', 'a/b', '..'])
def test_a_shard_name_that_leaves_the_folder_is_refused(bucket, name):
  index = {'metadata': {}, 'weight_map': {'a': name}}
  files.write_text(f'{ROOT}/m/{safetensors.INDEX_FILE}', json.dumps(index))
  with pytest.raises(DataError, match='is refused; a plain name'):
    SafetensorsFolder(f'{ROOT}/m')


def test_folders_without_usable_weights_say_so(bucket, tmp_path):
  with pytest.raises(DataError, match='no such model'):
    load.read_config(f'{ROOT}/m')
  files.write_text(f'{ROOT}/m/pytorch_model.bin', 'x')
  with pytest.raises(DataError, match='pickled'):
    load.open_source(f'{ROOT}/m')
  with pytest.raises(DataError, match=r'config\.json is missing'):
    load.read_config(f'{ROOT}/m')
  content = (GOLDEN / 'llama_tied' / safetensors.SINGLE_FILE).read_bytes()
  (gcs.GcsPath(f'{ROOT}/m') / safetensors.SINGLE_FILE).write_bytes(content[:-1])
  with pytest.raises(DataError, match='truncated'):
    load.open_source(f'{ROOT}/m')


@pytest.mark.parametrize('header', [4096, 16 << 20])
def test_a_gguf_file_is_read_by_ranges(bucket, tmp_path, monkeypatch, header):
  monkeypatch.setattr(gguf_files, '_HEADER_BYTES', header)
  path = tmp_path / 'model' / 'toy.gguf'
  path.parent.mkdir()
  write_toy(path, Toy(tied=False, types=('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0')), 'gpt2')
  bucket.upload(path.parent, 'model')
  here, there = GGUFSource(path), GGUFSource(f'{ROOT}/model/toy.gguf')
  assert there.tensors == here.tensors and there.config() == here.config()
  bucket.requests.clear()
  for name, info in here.tensors.items():
    np.testing.assert_array_equal(there.read(name), here.read(name))
    part = (slice(1, info.shape[0] - 1), *(slice(0, n // 2) for n in info.shape[1:]))
    np.testing.assert_array_equal(there.read(name, part), here.read(name, part))
  stored = sum(nbytes for _, nbytes in here.stored().values())
  assert stored < bucket.sent() <= 2 * stored
  assert load.tokenizer_files(f'{ROOT}/model') == load.tokenizer_files(path)


def test_a_truncated_gguf_file_is_refused(bucket, tmp_path):
  path = tmp_path / 'toy.gguf'
  write_toy(path, Toy(tied=False, types=('F32',)), 'gpt2')
  remote = gcs.GcsPath(f'{ROOT}/toy.gguf')
  for size in (3, 1000, path.stat().st_size - 40):
    remote.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match='not a readable GGUF file'):
      GGUFSource(f'{ROOT}/toy.gguf')


# Exports


def write(target, value=1.0, count=3, limit=1 << 20):
  """A model of `count` tensors float32[8, 8] full of `value`."""
  info = {f't{i}': TensorInfo((8, 8), np.dtype(np.float32)) for i in range(count)}
  small = {'config.json': b'{}', 'tokenizer.json': b'[]'}
  full = lambda name: np.full((8, 8), value(name) if callable(value) else value, np.float32)  # noqa: E731
  export.write_model(target, info, full, small, limit)


def stored_value(target):
  return SafetensorsFolder(target).read('t0')[0, 0]


def test_an_export_is_the_same_folder_as_on_a_disk(bucket, tmp_path):
  for limit in (1 << 20, 256):
    write(tmp_path / 'export', limit=limit)
    write(f'{ROOT}/run/export', limit=limit)
    here = {p.name: p.read_bytes() for p in (tmp_path / 'export').iterdir()}
    there = {p.name: p.read_bytes() for p in gcs.GcsPath(f'{ROOT}/run/export').iterdir()}
    assert there == here
  assert all(k.startswith('run/export/') for k in bucket.names())  # nothing is left beside it


def test_config_json_goes_first_and_comes_last(bucket):
  write(f'{ROOT}/export', limit=256)
  bucket.requests.clear()
  write(f'{ROOT}/export', 2.0, count=2, limit=256)
  touched = [
    (r.permission, r.key.removeprefix('export/'))
    for r in bucket.requests
    if r.key.startswith('export/') and r.permission in ('objects.create', 'objects.delete')
  ]
  config, index = 'config.json', safetensors.INDEX_FILE
  assert touched[:2] == [('objects.delete', config), ('objects.delete', index)]
  assert touched[-2:] == [('objects.create', index), ('objects.create', config)]
  assert stored_value(f'{ROOT}/export') == 2.0
  assert not [k for k in bucket.names() if '-of-00003' in k]


def test_a_failed_export_leaves_the_old_one(bucket):
  write(f'{ROOT}/export', limit=256)
  before = {k: bucket.read(k) for k in bucket.names()}
  with pytest.raises(NonFiniteError):
    write(f'{ROOT}/export', lambda name: np.nan if name == 't2' else 5.0, limit=256)
  assert {k: bucket.read(k) for k in bucket.names()} == before


def test_an_export_killed_in_the_swap_is_no_model_until_the_next_one(bucket, monkeypatch):
  write(f'{ROOT}/export', limit=256)
  copied = []
  real = gcs.GcsPath.copy_to

  def die(path, target):
    if copied:
      raise KeyboardInterrupt
    copied.append(target)
    real(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(gcs.GcsPath, 'copy_to', die)
    patch.setattr(gcs.GcsPath, 'remove_tree', lambda _: None)  # as if killed: nothing cleans up
    with pytest.raises(KeyboardInterrupt):
      write(f'{ROOT}/export', 2.0, limit=256)
  assert [k for k in bucket.names() if '.export.partial/' in k]
  with pytest.raises(DataError, match=r'config\.json is missing'):
    load.read_config(f'{ROOT}/export')
  write(f'{ROOT}/export', 3.0, limit=256)
  assert stored_value(f'{ROOT}/export') == 3.0
  assert not [k for k in bucket.names() if 'partial' in k]


def test_a_hiccup_of_the_store_ends_no_swap(bucket):
  write(f'{ROOT}/export', limit=256)
  bucket.unavailable = {'rewriteTo': 2}
  write(f'{ROOT}/export', 2.0, limit=256)
  assert bucket.unavailable == {'rewriteTo': 0} and stored_value(f'{ROOT}/export') == 2.0


def test_a_swap_that_is_refused_keeps_the_new_export_next_to_it(bucket, monkeypatch):
  write(f'{ROOT}/export', limit=256)
  monkeypatch.setattr(gcs.GcsPath, 'copy_to', lambda *_: files.read_text(f'{ROOT}/none'))
  with pytest.raises(OSError, match=r'the new one is whole in gs://bucket/\.export\.partial'):
    write(f'{ROOT}/export', 2.0, limit=256)
  assert stored_value(f'{ROOT}/.export.partial') == 2.0


def test_what_is_no_model_folder_is_not_replaced(bucket):
  files.write_text(f'{ROOT}/export/thesis.tex', 'x')
  with pytest.raises(DataError, match=r'thesis\.tex'):
    write(f'{ROOT}/export')
  files.write_text(f'{ROOT}/file', 'x')
  with pytest.raises(DataError, match='is a file'):
    write(f'{ROOT}/file')


def test_convert_reads_and_writes_buckets(bucket, tmp_path):
  shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'model')
  bucket.upload(tmp_path / 'model', 'run/export')
  convert.convert(f'{ROOT}/run', f'{ROOT}/converted', None)
  convert.convert(f'{ROOT}/converted', str(tmp_path / 'back'), None)
  here, there = load_all(tmp_path / 'model'), load_all(tmp_path / 'back')
  for name, value in here.items():
    np.testing.assert_array_equal(there[name], value)
  with pytest.raises(DataError, match='no such file or folder'):
    convert.convert(f'{ROOT}/none', str(tmp_path / 'none'), None)


# Checkpoints


def test_checkpoints_are_kept_found_and_restored(bucket):
  folder = f'{ROOT}/run/checkpoints'
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = lambda s: {'a': jax.numpy.arange(100.0) * s, 'step': jax.numpy.int32(s)}  # noqa: E731
  saved = Checkpoints(folder, Retention(2, 'loss', 'min'))
  for step, loss in enumerate((3.0, 1.0, 2.0, 4.0, 5.0), 1):
    saved.save(step, state(step), {'step': step}, loss)
  saved.wait()
  assert (saved.steps(), saved.latest(), saved.best()) == ([2, 4, 5], 5, 2)
  saved.close()
  assert {k.split('/')[2] for k in bucket.names('run/checkpoints')} == {'2', '4', '5'}
  files.remove(f'{folder}/5/commit_success.txt')  # as a killed save leaves it
  opened = Checkpoints(folder, Retention(2, 'loss', 'min'))
  assert (opened.steps(), opened.latest(), opened.best()) == ([2, 4], 4, 2)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state(0))
  for step in (2, 4):
    got = opened.restore(step, abstract)
    np.testing.assert_array_equal(got['a'], state(step)['a'])
    assert opened.meta(step) == {'step': step}
  opened.save(5, state(6), {'step': 5}, 9.0)
  opened.wait()
  np.testing.assert_array_equal(opened.restore(5, abstract)['a'], state(6)['a'])
  opened.close()


def test_opening_checkpoints_deletes_only_what_a_crash_tore(bucket):
  folder, retention = f'{ROOT}/run/checkpoints', Retention(1, '', 'min')
  saved = Checkpoints(folder, retention)
  saved.save(3, {'a': jax.numpy.arange(3.0)}, {}, None)
  saved.wait()
  saved.close()
  mine = [f'{folder}/before_sweep/1/state/d/0', f'{folder}/notes.txt']
  for path in (*mine, f'{folder}/4/state/d/0'):
    files.write_text(path, 'x')
  opened = Checkpoints(folder, retention)
  assert opened.latest() == 3
  opened.close()
  assert all(files.exists(path) for path in mine) and not files.exists(f'{folder}/4')


def test_the_outline_differs_between_revisions(bucket, tmp_path):
  for name, value in (('a', 1.0), ('same', 1.0), ('b', 2.0)):
    write(tmp_path / name, value)
  one, same, other = (file_marks.outline(tmp_path / name) for name in ('a', 'same', 'b'))
  assert one == same != other and [x[:2] for x in one] == [x[:2] for x in other]
  write(f'{ROOT}/model')
  first = file_marks.outline(f'{ROOT}/model')
  write(f'{ROOT}/model', 2.0)
  assert file_marks.outline(f'{ROOT}/model') != first
