"""What `make parity` finds when a golden file is not written again as it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from parity import reproduce

REQUIREMENTS = Path(__file__).parents[2] / 'third_party' / 'requirements'
CASE = 'peft/llama_lora'


@pytest.fixture
def written(tmp_path):
  """A few of the golden files, as if they had been written again; and a place for the originals."""
  golden, new = tmp_path / 'golden', tmp_path / 'new'
  shutil.copytree(reproduce.GOLDEN / CASE, golden / CASE)
  for name in ('nf4', 'adamw'):
    shutil.copy(reproduce.GOLDEN / 'peft' / f'{name}.npz', golden / 'peft')
  shutil.copytree(golden, new)
  return golden, new


def rewrite(path, name, change):
  """Changes an array of a .npz file."""
  stored = dict(np.load(path))
  stored[name] = change(stored[name])
  np.savez_compressed(path, **stored)


def found(written, left_out=()):
  golden, new = written
  return reproduce.compare(new, golden, left_out)


def test_the_same_files_agree(written):
  assert found(written) == []


def test_sets_may_come_in_any_order(written):
  path = written[1] / CASE / 'adapter_config.json'
  config = json.loads(path.read_text())
  config['target_modules'].reverse()
  path.write_text(json.dumps(config))
  assert found(written) == []


def add_nan(x):
  x = x.copy()
  x.flat[3] = np.nan
  return x


@pytest.mark.parametrize(
  ('file', 'name', 'change', 'expected'),
  [
    (f'{CASE}/found.npz', 'logits', lambda x: x * np.float32(1.00003), 'max |delta|'),
    (f'{CASE}/found.npz', 'logits', add_nan, 'max |delta| nan'),
    (f'{CASE}/found.npz', 'logits', lambda x: x[:1], 'golden float32[2, 24, 128]'),
    (f'{CASE}/found.npz', 'loss', lambda x: x.astype(np.float64), 'is float64'),
    ('peft/nf4.npz', 'weights_codes', lambda x: x ^ (np.arange(256) == 9), '16 of 4096 places'),
    ('peft/adamw.npz', 'losses', lambda x: x * 1.002, 'max |delta|'),
  ],
)
def test_a_change_is_seen(written, file, name, change, expected):
  rewrite(written[1] / file, name, change)
  (line,) = found(written)
  assert line.startswith(f'{file}: {name}') and expected in line


def test_files_that_are_missing_or_new_are_seen(written):
  _, new = written
  (new / 'peft' / 'nf4.npz').rename(new / 'peft' / 'nf5.npz')
  config = json.loads((new / CASE / 'adapter_config.json').read_text()) | {'r': 5}
  (new / CASE / 'adapter_config.json').write_text(json.dumps(config))
  assert found(written) == [
    'peft/nf4.npz: not written',
    'peft/nf5.npz: not among the golden files',
    f'{CASE}/adapter_config.json: says something else',
  ]
  assert len(found(written, ('peft/nf',))) == 2  # what could not be written is left out


def test_the_lock_names_no_index_and_has_a_hash_for_each_package():
  text = (REQUIREMENTS / 'parity.txt').read_text()
  assert '://' not in text and '--index' not in text and '--find-links' not in text
  packages = [p for p in text.split('\n') if '==' in p and not p.startswith(' ')]
  assert len(packages) > 40 and all(p.endswith('\\') for p in packages)
  wanted = (REQUIREMENTS / 'parity.in').read_text().split('\n')
  pinned = {p.split('=')[0] for p in packages}
  assert {w.split('=')[0].split('>')[0] for w in wanted if w and w[0] != '#'} <= pinned
