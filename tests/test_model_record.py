"""A fresh run reads its weights once, a resume not at all, and neither misses a changed base."""

import json
import os
import shutil

import pytest
import tiny_model
from test_saved_model import tiny, train

from ftjax.experiment import model_record
from ftjax.hf import load
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.runtime.errors import ConfigError


@pytest.fixture
def read(monkeypatch):
  """[bytes read of weights behind their headers]; stamps count from the first moment on."""
  total, whole = [0], SafetensorsFolder._rows

  def counted(self, name, begin, shape, dtype):
    out = whole(self, name, begin, shape, dtype)
    total[0] += out.nbytes
    return out

  monkeypatch.setattr(SafetensorsFolder, '_rows', counted)
  monkeypatch.setattr(model_record, '_SETTLED_NS', 0)
  return total


def flip_last_bit(path):
  raw = bytearray(path.read_bytes())
  raw[-1] ^= 1
  path.write_bytes(raw)


@pytest.mark.full
def test_weights_are_read_once_by_a_fresh_run_and_not_by_its_resume(tmp_path, read):
  base = tmp_path / 'base'
  tiny_model.write_folder(base)
  size = sum(i.nbytes for i in SafetensorsFolder(base).tensors.values())
  random = {'model.path': str(base), 'model.random': {}}
  train(tiny('sft', **random, steps=2), tmp_path / 'run')
  assert read == [size], 'loaded and hashed in one reading'
  record = json.loads((tmp_path / 'run' / model_record.FILE).read_text())
  known = SafetensorsFolder(base).fingerprint()
  assert list(record['fingerprints'].values()) == [known]
  read[0] = 0
  train(tiny('sft', **random, steps=4), tmp_path / 'run')
  assert read == [0], 'the checkpoint has all weights; the stamp of the base is the recorded one'
  # The same content in other files: all of it is hashed, and the run goes on.
  shutil.copytree(base, tmp_path / 'copy')
  shutil.rmtree(base)
  (tmp_path / 'copy').rename(base)
  train(tiny('sft', **random, steps=5), tmp_path / 'run')
  assert read == [size]
  # One bit, with the old times of modification.
  times = (base / 'model.safetensors').stat()
  flip_last_bit(base / 'model.safetensors')
  os.utime(base / 'model.safetensors', ns=(times.st_atime_ns, times.st_mtime_ns))
  with pytest.raises(ConfigError, match='model: other content'):
    train(tiny('sft', **random, steps=6), tmp_path / 'run')


def test_a_stamp_counts_when_its_times_are_old_enough(tmp_path, monkeypatch):
  base, workdir = tmp_path / 'base', tmp_path / 'run'
  tiny_model.write_folder(base)
  workdir.mkdir()
  known = model_record.fingerprint(str(base), str(workdir))
  assert not (workdir / model_record.FILE).exists(), 'written a moment ago'
  monkeypatch.setattr(model_record, '_SETTLED_NS', 0)
  assert model_record.fingerprint(str(base), str(workdir)) == known
  monkeypatch.setattr(load, 'fingerprint', None)
  assert model_record.fingerprint(str(base), str(workdir)) == known
  (workdir / model_record.FILE).write_text('{"fingerpr')
  monkeypatch.undo()
  assert model_record.fingerprint(str(base), str(workdir)) == known, 'a damaged record is no error'
