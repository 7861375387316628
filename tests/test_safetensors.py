"""Hostile and broken files are refused by name; what is written is read back bitwise."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from ftjax.hf import safetensors
from ftjax.hf.safetensors import SafetensorsFolder, write_folder
from ftjax.hf.tensor_source import TensorInfo
from ftjax.runtime.errors import DataError, NonFiniteError

RNG = np.random.default_rng(0)
TENSORS = {
  'a': RNG.normal(size=(7, 5, 3)).astype(np.float32),
  'b': RNG.normal(size=(4, 6)).astype(ml_dtypes.bfloat16),
  'c': np.arange(5, dtype=np.int64),
  'd': RNG.normal(size=(3, 2)).astype(np.float16),
  'e': np.float32(3.5).reshape(()),
  'f': np.zeros((0, 4), np.float32),
  'g': RNG.normal(size=(9,)).astype(ml_dtypes.float8_e4m3fn),
}


def infos(tensors):
  return {name: TensorInfo(value.shape, value.dtype) for name, value in tensors.items()}


def write(folder, tensors=TENSORS, **options):
  folder.mkdir(exist_ok=True)
  write_folder(folder, infos(tensors), tensors.__getitem__, **options)
  return folder


def write_raw(folder, header, data, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  (folder / 'model.safetensors').write_bytes(struct.pack('<Q', length) + text + data)


@pytest.mark.parametrize('max_shard_bytes', [10**9, 200, 1])
def test_written_tensors_are_read_back_bitwise(tmp_path, max_shard_bytes):
  source = SafetensorsFolder(write(tmp_path, max_shard_bytes=max_shard_bytes))
  assert source.tensors == infos(TENSORS)
  for name, value in TENSORS.items():
    got = source.read(name)
    assert got.dtype == value.dtype
    assert got.tobytes() == value.tobytes()
  assert (tmp_path / 'model.safetensors').exists() == (max_shard_bytes == 10**9)


def test_layout_of_the_file_by_hand(tmp_path):
  write(tmp_path, {'x': np.array([1.0, 2.0], np.float32)})
  raw = (tmp_path / 'model.safetensors').read_bytes()
  (length,) = struct.unpack('<Q', raw[:8])
  assert length % 8 == 0
  header = json.loads(raw[8 : 8 + length])
  assert header['x'] == {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
  assert header['__metadata__'] == {'format': 'pt'}
  assert raw[8 + length :] == struct.pack('<2f', 1.0, 2.0)


def test_index_reads_the_selected_part(tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors, 'BLOCK_BYTES', 100)
  source, a = SafetensorsFolder(write(tmp_path)), TENSORS['a']
  for index in [
    (slice(2, 5),),
    (slice(None), slice(1, 4)),
    (slice(1, 6), slice(0, 2), slice(2, 3)),
    (slice(3, 3),),
    None,
  ]:
    np.testing.assert_array_equal(source.read('a', index), a[index or ...])
  with pytest.raises(ValueError, match='step-1'):
    source.read('a', (slice(0, 6, 2),))


def test_only_the_bytes_of_selected_rows_are_read(tmp_path, monkeypatch):
  source = SafetensorsFolder(write(tmp_path))
  read, shapes = SafetensorsFolder._rows, []
  spy = lambda *args: shapes.append(args[3]) or read(*args)  # noqa: E731
  monkeypatch.setattr(SafetensorsFolder, '_rows', spy)
  source.read('a', (slice(2, 4),))
  source.read('a', (slice(5, 6), slice(0, 1)))
  assert shapes == [(2, 5, 3), (1, 5, 3)]


GOOD = {'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}


@pytest.mark.parametrize(
  ('header', 'data', 'length', 'message'),
  [
    (GOOD, b'\0' * 8, 10**9, 'header of 1000000000 bytes'),
    (GOOD, b'\0' * 8, 2**63, 'header of'),
    (GOOD, b'', None, 'truncated'),
    (GOOD, b'\0' * 9, None, 'bytes no tensor owns'),
    (b'{"x"', b'', None, 'not JSON'),
    (b'[1]', b'', None, 'expected a JSON object'),
    (b'\xff\xfe', b'', None, 'not UTF-8'),
    (b'[' * 50000, b'', None, 'nested too deep'),
    (b'{"x":1,"x":2}', b'', None, "'x' occurs twice"),
    (
      {'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 12]}},
      b'\0' * 12,
      None,
      '8 expected',
    ),
    ({'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [8, 0]}}, b'\0' * 8, None, '-8 bytes'),
    (
      {'x': {'dtype': 'F32', 'shape': [-2], 'data_offsets': [0, 8]}},
      b'\0' * 8,
      None,
      'list of counts',
    ),
    (
      {'x': {'dtype': 'F32', 'shape': [True, 2], 'data_offsets': [0, 8]}},
      b'',
      None,
      'list of counts',
    ),
    (
      {'x': {'dtype': 'F32', 'shape': [2**40, 2**40], 'data_offsets': [0, 8]}},
      b'\0' * 8,
      None,
      'expected for',
    ),
    ({'x': {'dtype': 'Q9', 'shape': [2], 'data_offsets': [0, 8]}}, b'\0' * 8, None, 'dtype'),
    ({'x': {'dtype': ['F32'], 'shape': [2], 'data_offsets': [0, 8]}}, b'\0' * 8, None, 'dtype'),
    (
      {'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0.0, 8]}},
      b'\0' * 8,
      None,
      'data_offsets',
    ),
    ({'x': 3}, b'', None, 'expected dtype, shape'),
    (GOOD | {'y': GOOD['x']}, b'\0' * 8, None, 'overlap'),
    ({'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [4, 12]}}, b'\0' * 12, None, 'hole'),
  ],
)
def test_hostile_headers_are_refused(tmp_path, header, data, length, message):
  write_raw(tmp_path, header, data, length)
  with pytest.raises(DataError, match=message):
    SafetensorsFolder(tmp_path)


def test_every_truncation_is_refused(tmp_path):
  write(tmp_path)
  raw = (tmp_path / 'model.safetensors').read_bytes()
  for cut in range(0, len(raw), 7):
    (tmp_path / 'model.safetensors').write_bytes(raw[:cut])
    with pytest.raises(DataError):
      SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
  'name', ['../secret', '/etc/passwd', '..', '.', '', 'a\0b', 'sub/x', 'a\\b', 3, None, ['x'], {}]
)
def test_shard_names_are_plain_names(tmp_path, name):
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'x': name}}))
  with pytest.raises(DataError, match='refused'):
    SafetensorsFolder(tmp_path)


def test_links_may_not_leave_the_folder(tmp_path):
  write(tmp_path / 'other')
  (tmp_path / 'model').mkdir()
  link = tmp_path / 'model' / 'model.safetensors'
  link.symlink_to('../other/model.safetensors')
  with pytest.raises(DataError, match='leaves the model folder'):
    SafetensorsFolder(tmp_path / 'model')
  link.unlink()
  (tmp_path / 'model' / 'real').write_bytes((tmp_path / 'other' / 'model.safetensors').read_bytes())
  link.symlink_to('real')
  assert SafetensorsFolder(tmp_path / 'model').tensors.keys() == TENSORS.keys()


def test_the_layout_of_the_hub_cache_is_accepted(tmp_path):
  blobs, snapshot = tmp_path / 'blobs', tmp_path / 'snapshots' / '0a1b'
  write(blobs)
  os.rename(blobs / 'model.safetensors', blobs / 'f00d')
  snapshot.mkdir(parents=True)
  (snapshot / 'model.safetensors').symlink_to('../../blobs/f00d')
  (tmp_path / 'mine').symlink_to(snapshot)
  assert SafetensorsFolder(snapshot).tensors.keys() == TENSORS.keys()
  assert SafetensorsFolder(tmp_path / 'mine').tensors.keys() == TENSORS.keys()
  # The same link from a folder that is no snapshot, or into something beside blobs, is nobody's
  # cache.
  other = tmp_path / 'elsewhere' / '0a1b'
  other.mkdir(parents=True)
  (other / 'model.safetensors').symlink_to('../../blobs/f00d')
  (tmp_path / 'secret').write_bytes((blobs / 'f00d').read_bytes())
  (snapshot / 'model.safetensors').unlink()
  (snapshot / 'model.safetensors').symlink_to('../../secret')
  for folder in (other, snapshot):
    with pytest.raises(DataError, match='leaves the model folder'):
      SafetensorsFolder(folder)


def test_index_and_shards_must_agree(tmp_path):
  write(tmp_path, max_shard_bytes=200)
  index = tmp_path / 'model.safetensors.index.json'
  told = json.loads(index.read_text())
  files = sorted(set(told['weight_map'].values()))
  assert len(files) > 1
  wrong = [
    told['weight_map'] | {'zz': files[0]},
    {k: v for k, v in told['weight_map'].items() if k != 'c'},
    told['weight_map'] | {'c': next(f for f in files if f != told['weight_map']['c'])},
  ]
  for weight_map in wrong:
    index.write_text(json.dumps({'weight_map': weight_map}))
    with pytest.raises(DataError, match='disagree'):
      SafetensorsFolder(tmp_path)
  index.write_text(json.dumps(told))
  (tmp_path / files[0]).unlink()
  with pytest.raises(DataError, match='missing'):
    SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
  write(tmp_path, {'x': np.ones(2, np.float32)})
  for name in ('p.safetensors', 'q.safetensors'):
    (tmp_path / name).write_bytes((tmp_path / 'model.safetensors').read_bytes())
  (tmp_path / 'model.safetensors').unlink()
  index = {'weight_map': {'x': 'p.safetensors', 'y': 'q.safetensors'}}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(DataError, match='x is also in p'):
    SafetensorsFolder(tmp_path)


def index_of(folder, weight_map):
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


@pytest.mark.parametrize('has_shards', [True, False])
def test_a_single_file_next_to_the_index_of_other_shards_is_refused(tmp_path, has_shards):
  """S9: the older index would win, and the older weights with it."""
  shards = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'
  write(tmp_path)
  index_of(tmp_path, {'a': shards[0], 'b': shards[1]})
  for name in shards if has_shards else ():
    (tmp_path / name).write_bytes((tmp_path / 'model.safetensors').read_bytes())
  named = r'holds model\.safetensors and model\.safetensors\.index\.json, which names model-00001'
  with pytest.raises(DataError, match=named):
    SafetensorsFolder(tmp_path)


def test_an_index_that_names_the_single_file_is_one_model(tmp_path):
  write(tmp_path)
  index_of(tmp_path, dict.fromkeys(TENSORS, 'model.safetensors'))
  assert SafetensorsFolder(tmp_path).tensors.keys() == TENSORS.keys()


def test_an_index_whose_shards_are_not_there_names_them(tmp_path):
  index_of(tmp_path, {c: f'model-0000{i}-of-00005.safetensors' for i, c in enumerate('abcde', 1)})
  (tmp_path / 'model-00002-of-00005.safetensors').write_bytes(b'')
  with pytest.raises(
    DataError, match=r'names 5 files, of which model-00001.* and 1 more are missing'
  ):
    SafetensorsFolder(tmp_path)


def test_shards_without_their_index_are_named(tmp_path):
  (tmp_path / 'model-00001-of-00002.safetensors').write_bytes(b'')
  with pytest.raises(DataError, match=r'model-00001-of-00002\.safetensors, but neither'):
    SafetensorsFolder(tmp_path)


@pytest.mark.parametrize('name', ['adapter_config.json', 'adapter_model.safetensors'])
def test_an_adapter_is_never_left_out_silently(tmp_path, name):
  (tmp_path / name).write_bytes(b'{}')
  with pytest.raises(DataError, match=r'LoRA adapter, not a whole model.*ftjax.convert'):
    SafetensorsFolder(tmp_path)
  write(tmp_path)
  with pytest.raises(DataError, match=rf'a whole model and a LoRA adapter \({name}\)'):
    SafetensorsFolder(tmp_path)


def test_pickled_weights_are_refused_with_the_recipe(tmp_path):
  with pytest.raises(DataError, match='neither'):
    SafetensorsFolder(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'x')
  with pytest.raises(DataError, match='save_pretrained'):
    SafetensorsFolder(tmp_path)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_non_finite_tensors_are_not_written(tmp_path, dtype, bad):
  value = np.ones((3, 4), dtype)
  value[1, 2] = bad
  with pytest.raises(NonFiniteError, match=r'weights\[1, 2\]'):
    write(tmp_path, {'weights': value})
