"""The fingerprint is of the content alone, and costs no second reading of what a load has read."""

import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from parity.toy_gguf import Toy, write_toy

from ftjax.families import table as families
from ftjax.hf import file_marks, layout, load, safetensors, tensor_source
from ftjax.hf.gguf import GGUFSource
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.hf.tensor_source import TensorInfo
from ftjax.runtime import trees

GOLDEN = Path(__file__).parent / 'parity' / 'golden'
TENSORS = {
  'a': np.arange(60, dtype=np.float32).reshape(6, 5, 2),
  'b': np.arange(7, dtype=np.int64),
  'c': np.full((4, 3), 1.5, ml_dtypes.bfloat16),
  'd': np.float32(3).reshape(()),
  'e': np.zeros((0, 3), np.float32),
}


def write(folder, tensors, max_shard_bytes=safetensors.MAX_SHARD_BYTES):
  folder.mkdir()
  info = {name: TensorInfo(x.shape, x.dtype) for name, x in tensors.items()}
  safetensors.write_folder(folder, info, tensors.__getitem__, max_shard_bytes)
  return folder


@pytest.fixture
def read(monkeypatch):
  """Bytes that were read of safetensors files behind their headers, per tensor."""
  counts, whole = {}, SafetensorsFolder._rows

  def counted(self, name, begin, shape, dtype):
    out = whole(self, name, begin, shape, dtype)
    counts[name] = counts.get(name, 0) + out.nbytes
    return out

  monkeypatch.setattr(SafetensorsFolder, '_rows', counted)
  return counts


def test_the_fingerprint_is_that_of_names_types_shapes_and_bytes(tmp_path):
  known = SafetensorsFolder(write(tmp_path / 'one', TENSORS)).fingerprint()
  backwards = dict(reversed(TENSORS.items()))
  assert SafetensorsFolder(write(tmp_path / 'b', backwards)).fingerprint() == known
  sharded = write(tmp_path / 'shards', TENSORS, max_shard_bytes=64)
  assert len(list(sharded.glob('*.safetensors'))) > 2
  assert SafetensorsFolder(sharded).fingerprint() == known
  for i, other in enumerate(
    (
      {'a': TENSORS['a'].reshape(6, 10)},
      {'a': TENSORS['a'].view(np.int32)},
      {'a': TENSORS['a'] + np.eye(6, 5, dtype=np.float32)[..., None] * 1e-3},
      {'f': TENSORS['e']},
    )
  ):
    changed = SafetensorsFolder(write(tmp_path / str(i), TENSORS | other))
    assert changed.fingerprint() != known


@pytest.mark.parametrize('block', [8, 100, 1 << 20])
def test_whatever_was_read_before_the_fingerprint_is_the_same(tmp_path, monkeypatch, block):
  known = SafetensorsFolder(write(tmp_path / 'm', TENSORS)).fingerprint()
  monkeypatch.setattr(tensor_source, 'BLOCK_BYTES', block)
  monkeypatch.setattr(safetensors, 'BLOCK_BYTES', block)
  for reads in (
    [('a', None), ('a', None), ('d', None), ('b', None)],
    [('a', (slice(0, 3),)), ('a', (slice(2, 6),))],  # overlapping shards, in order
    [('a', (slice(3, 6),)), ('a', (slice(0, 3),))],  # out of order
    [('a', (slice(0, 6), slice(1, 3))), ('a', (slice(0, 6), slice(3, 5)))],  # columns
    [('b', (slice(2, 2),)), ('e', None), ('c', (slice(0, 2),))],
  ):
    source = SafetensorsFolder(tmp_path / 'm')
    source.hash_reads()
    for name, index in reads:
      source.read(name, index)
    assert source.fingerprint() == known


def shardings(arch, axis):
  mesh = jax.make_mesh((4,), ('x',), devices=jax.devices()[:4])
  shapes = layout.leaf_shapes(arch)
  specs = {}
  for name, shape in shapes.items():
    fits = [i for i in range(len(shape)) if shape[i] % 4 == 0] if axis is not None else []
    specs[name] = PartitionSpec(*[None] * fits[axis], 'x') if fits else PartitionSpec()
  return trees.unflatten({n: NamedSharding(mesh, s) for n, s in specs.items()})


@pytest.mark.parametrize(
  ('model', 'axis'), [('llama_untied_gqa', None), ('llama_untied_gqa', 0), ('qwen2_tied', -1)]
)
def test_a_load_and_the_fingerprint_read_the_weights_once(tmp_path, read, model, axis):
  path = shutil.copytree(GOLDEN / model, tmp_path / 'm')
  known = SafetensorsFolder(GOLDEN / model).fingerprint()
  size = {n: info.nbytes for n, info in SafetensorsFolder(path).tensors.items()}
  arch = families.architecture(load.read_config(path))
  read.clear()
  load.open_source(path).hash_reads()
  load.load_params(path, arch, shardings(arch, axis), np.float32)
  loaded = dict(read)
  assert load.fingerprint(path) == known
  assert read == loaded == size, 'each tensor once, for load and fingerprint together'
  read.clear()
  assert load.fingerprint(path) == known and not read


def test_a_load_that_needs_no_fingerprint_hashes_nothing(tmp_path, monkeypatch):
  path = shutil.copytree(GOLDEN / 'llama_tied', tmp_path / 'm')
  arch = families.architecture(load.read_config(path))
  monkeypatch.setattr(tensor_source._Cursor, 'feed', None)
  load.load_params(path, arch, shardings(arch, None), np.float32)


def test_files_that_changed_are_opened_again(tmp_path):
  path = write(tmp_path / 'm', TENSORS)
  first = load.open_source(path)
  assert load.open_source(path) is first
  known = load.fingerprint(path)
  stamped = file_marks.stamp(path)
  raw = bytearray((path / 'model.safetensors').read_bytes())
  raw[-1] ^= 1
  times = (path / 'model.safetensors').stat()
  (path / 'model.safetensors').write_bytes(raw)
  os.utime(path / 'model.safetensors', ns=(times.st_atime_ns, times.st_mtime_ns))
  assert file_marks.stamp(path) != stamped, 'the time of change cannot be set back'
  assert load.open_source(path) is not first
  assert load.fingerprint(path) != known


def test_quantized_bytes_are_hashed_while_they_are_dequantized(tmp_path, monkeypatch):
  path = tmp_path / 'toy.gguf'
  write_toy(path, Toy(types=('Q8_0', 'F16')), 'gpt2')
  known = GGUFSource(path).fingerprint()
  source, bytes_read = GGUFSource(path), []
  source.hash_reads()
  for name in source.tensors:
    source.read(name)
  whole = GGUFSource.read_bytes
  monkeypatch.setattr(
    GGUFSource, 'read_bytes', lambda *args: bytes_read.append(args[1]) or whole(*args)
  )
  assert source.fingerprint() == known
  assert set(bytes_read) <= {'rope_freqs.weight'}, 'nothing that was loaded is read again'
