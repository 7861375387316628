"""Data sets by their names on the hub: the rows of their files, against a hub on loopback."""

import json
import subprocess
import sys
from pathlib import Path

import fake_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftjax.data import hub_dataset, sources
from ftjax.data.sources import Spec
from ftjax.runtime.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/a.csv
  - split: test
    path: [main/b.csv, main/c.csv]
- config_name: tabs
  data_files: main/t.csv
  sep: "\\t"
- config_name: far
  data_files: https://example.com/x.jsonl
---
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
  with fake_hub.asked(tmp_path, monkeypatch) as fake:
    yield fake


def push(hub, name, files):
  return hub.repo(name, 'datasets').push({'README.md': b'# x', **files})


def parquet(table):
  out = pa.BufferOutputStream()
  pq.write_table(table, out)
  return out.getvalue().to_pybytes()


def rows(path):
  return list(sources.rows(Spec(path)))


def test_rows_are_those_of_the_files_with_their_places(hub, tmp_path):
  table = pa.table({'a': [{'x': 1, 'y': None}, {'x': None, 'y': 2**62 + 1}], 'n': [None, 3]})
  commit = push(
    hub,
    'org/d',
    {
      'data/train-00000-of-00002.jsonl': (
        b'{"text": "a", "n": 12345678901234567890}\n\n{"text": null}\n'
      ),
      'data/train-00001-of-00002.jsonl': b'{"text": "b"}\n',
      'data/test-00000-of-00001.jsonl': b'{"text": "c"}\n',
      'notes.bin': b'x',
    },
  )
  home = f'{tmp_path}/hf/hub/datasets--org--d/snapshots/{commit}/data'
  assert rows('org/d') == [
    (f'{home}/train-00000-of-00002.jsonl:1', {'text': 'a', 'n': 12345678901234567890}),
    (f'{home}/train-00000-of-00002.jsonl:3', {'text': None}),
    (f'{home}/train-00001-of-00002.jsonl:1', {'text': 'b'}),
  ]
  assert 'test-00000-of-00001.jsonl' not in hub.fetched() and 'notes.bin' not in hub.fetched()
  assert [r for _, r in rows('org/d:test')] == [{'text': 'c'}]
  push(hub, 'org/p', {'a.parquet': parquet(table)})
  assert [r for _, r in rows('org/p')] == [{'a': {'x': 1}}, {'a': {'y': 2**62 + 1}, 'n': 3}]
  for name, content in (('x', b'{"text": "c"}\n'), ('y', b'{"text": "d"}\n')):
    (tmp_path / f'{name}.jsonl').write_bytes(content)
  same = sources.fingerprint(Spec(f'{tmp_path}/x.jsonl'))
  assert sources.fingerprint(Spec('org/d:test')) == same
  assert sources.fingerprint(Spec(f'{tmp_path}/y.jsonl')) != same


def test_configs_and_splits_are_those_of_the_card(hub):
  csv = {f'main/{n}.csv': f'id,text\n00{i},"{n}"\n'.encode() for i, n in enumerate('abct')}
  hub.repo('org/two', 'datasets').push({'README.md': CARD.encode(), **csv})
  assert [r for _, r in rows('org/two/main')] == [{'id': '000', 'text': 'a'}]
  assert [r['text'] for _, r in rows('org/two/main:test')] == ['b', 'c']
  for path, error, words in (
    ('org/two', ConfigError, r"\['main', 'tabs', 'far'\].*write org/two/CONFIG"),
    ('org/two/none', ConfigError, "'none' not found"),
    ('org/two/main:dev', ConfigError, r"no split 'dev' in it; it holds \['test', 'train'\]"),
    ('org/two/tabs', DataError, r"its card sets sep='\\t' for its files, which is not applied"),
    ('org/two/far', DataError, 'finds no data files|is not a file of the data set'),
  ):
    with pytest.raises(error, match=words):
      rows(path)


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    ({'d.py': b'raise SystemExit'}, 'code of a data set is never run.*refs/convert/parquet'),
    (
      {'README.md': b'---\nconfigs: [\n---\n'},
      r'its card \(README.md\) cannot be read: ParserError',
    ),
    (
      {'README.md': b'---\ndataset_info:\n  features: 5\n---\n'},
      r'its card \(README.md\) cannot be read: TypeError',
    ),
  ],
)
def test_a_data_set_that_the_library_refuses(hub, content, words):
  rows_file = {} if 'd.py' in content else {'a.jsonl': b'{"text": "a"}\n'}
  push(hub, 'org/d', rows_file | content)
  with pytest.raises(DataError, match=words):
    rows('org/d')


def test_the_error_for_a_name_without_usable_rows(hub, monkeypatch):
  push(hub, 'org/d', {'a.jsonl': b'{"text": "a"}\n'})
  push(hub, 'org/empty', {})
  push(hub, 'org/pictures', {'a.png': b'x', 'b.png': b'x'})
  push(hub, 'org/gated', {'a.jsonl': b'{}\n'})
  hub.repo('org/gated', 'datasets').needs, hub.repo('org/gated', 'datasets').gated = 'hf_x', True
  for path, error, words in (
    ('org/none', ConfigError, 'no such dataset .*check the name'),
    ('org/d@v9', ConfigError, 'no such revision'),
    ('org/empty', DataError, r"finds no data files for it: .* doesn't contain any data files"),
    ('org/pictures', DataError, 'a.png. is not read as rows'),
    ('org/gated', DataError, f'gated .*accept its terms at {hub.url}/datasets/org/gated'),
  ):
    with pytest.raises(error, match=words):
      rows(path)
  hub.status = 503
  with pytest.raises(DataError, match='HTTP 503: try again later'):
    rows('org/other')


def test_a_later_run_needs_no_network(hub, monkeypatch):
  import datasets
  from huggingface_hub import constants

  first = push(hub, 'org/d', {'a.jsonl': b'{"text": "a"}\n'})
  wanted = rows('org/d')
  fake_hub.forget()
  monkeypatch.setattr(datasets, 'load_dataset_builder', None)
  hub.requests.clear()
  assert rows('org/d') == wanted
  assert len(hub.requests) == 1, 'only what the branch stands for now'
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  fake_hub.forget()
  assert rows('org/d') == wanted
  with pytest.raises(DataError, match='HF_HUB_OFFLINE is set'):
    rows('org/e')
  monkeypatch.undo()
  with pytest.raises(DataError, match='HF_HUB_OFFLINE is set'):
    rows('org/f')  # as conftest.py sets it
  assert first in wanted[0][0]


def test_a_commit_can_be_named(hub):
  first = push(hub, 'org/d', {'a.jsonl': b'{"text": "a"}\n'})
  push(hub, 'org/d', {'a.jsonl': b'{"text": "b"}\n', 'b.jsonl': b'{"text": "c"}\n'})
  assert [r['text'] for _, r in rows('org/d')] == ['b', 'c']
  assert [r['text'] for _, r in rows(f'org/d@{first}')] == ['a']
  (spec,) = sources.parse_specs(f'org/d@{first}:train::text@0.5')
  assert (spec.path, spec.format, spec.weight) == (f'org/d@{first}:train', 'text', 0.5)


def test_what_is_a_name(hub, tmp_path):
  (Path.cwd() / 'here').mkdir()
  for path in ('org/d', 'org/d:test', 'org/d/main', 'org/d/main:test', 'org/d@v1', 'o-1/d.x_y'):
    assert hub_dataset.is_name(path), path
  for path in (
    'd',
    'org/a.jsonl',
    'org/d/a.csv.gz',
    'org/a.zip',
    'here/d',
    '/a/b',
    'sums:9',
    '../d',
  ):
    assert not hub_dataset.is_name(path), path


def test_neither_library_is_imported_for_local_rows(tmp_path):
  (tmp_path / 'a.jsonl').write_text(json.dumps({'text': 'a'}))
  code = (
    'import sys, ftjax.data.sources as s; print(len(list(s.rows(s.Spec(sys.argv[1])))), '
    "*(m for m in ('datasets', 'transformers', 'huggingface_hub', 'pandas') if m in sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, '-c', code, tmp_path / 'a.jsonl'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.split() == ['1'], done.stdout + done.stderr
