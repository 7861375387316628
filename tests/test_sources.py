"""Reading rows: every kind of file gives the same rows; faults name file, line, reason."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftjax.data import sources
from ftjax.data.sources import Spec, parse_spec, parse_specs
from ftjax.runtime.errors import ConfigError, DataError

ROWS = [{'text': 'a,"b"\nc', 'n': '1'}, {'text': 'é\u2028😀', 'n': '2'}, {'text': ' ', 'n': '3'}]


def read(path):
  return list(sources.rows(Spec(str(path))))


@pytest.mark.parametrize(
  'text, spec',
  [
    ('a.jsonl', Spec('a.jsonl')),
    ('a.jsonl::alpaca', Spec('a.jsonl', 'alpaca')),
    ('a.jsonl::text@2.5', Spec('a.jsonl', 'text', 2.5)),
    ('a.jsonl@1e-1', Spec('a.jsonl', None, 0.1)),
    ('/home/me@host/a@b.jsonl', Spec('/home/me@host/a@b.jsonl')),
    ('/x@3/a.jsonl', Spec('/x@3/a.jsonl')),
    ('me@host/a.csv@3', Spec('me@host/a.csv', None, 3.0)),
    ('org/name:test::messages@1', Spec('org/name:test', 'messages', 1.0)),
  ],
)
def test_parse_spec(text, spec):
  assert parse_spec(text) == spec


@pytest.mark.parametrize('text', ['a::nope', 'a@0', '::text', 'a::text@0.0', 'a::'])
def test_parse_spec_refuses(text):
  with pytest.raises(ConfigError, match='data: '):
    parse_spec(text)


def test_parse_specs():
  assert parse_specs('a@1, b::text') == parse_specs(('a@1', 'b::text')) == [
    Spec('a', None, 1.0),
    Spec('b', 'text'),
  ]  # fmt: skip
  assert parse_specs('') == []


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
  lines = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in ROWS).encode()
  (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + lines)
  (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(lines))
  (tmp_path / 'c.json').write_text(json.dumps(ROWS))
  (tmp_path / 'd.json').write_text(json.dumps({'data': ROWS, 'version': 1}))
  quoted = ['"' + r['text'].replace('"', '""') + '",' + r['n'] for r in ROWS]
  (tmp_path / 'e.csv').write_text('text,n\n' + '\n'.join(quoted) + '\n', encoding='utf-8')
  pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / 'f.parquet')
  for path in sorted(tmp_path.iterdir()):
    assert [row for _, row in read(path)] == ROWS, path
  assert [w for w, _ in read(tmp_path / 'a.jsonl')] == [
    f'{tmp_path}/a.jsonl:{i}' for i in (1, 2, 3)
  ]
  assert [w.rsplit(':')[1] for w, _ in read(tmp_path / 'e.csv')] == ['3', '4', '5']
  assert len(read(tmp_path)) == 6 * len(ROWS)  # a folder is all its files


def test_blank_lines_count(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"n": 1}\n\n  \n{"n": 2}')
  assert [w[-1] for w, _ in read(tmp_path / 'a.jsonl')] == ['1', '4']


def test_folder_of_a_saved_dataset(tmp_path):
  """A stream of Arrow batches with the two JSON files that `datasets` writes beside it."""
  table = pa.Table.from_pylist(
    [{'messages': [{'role': 'user', 'content': str(i)}]} for i in range(5)]
  )
  for split in ('train', 'test'):
    (tmp_path / split).mkdir()
    with pa.ipc.new_stream(tmp_path / split / 'data-0.arrow', table.schema) as out:
      out.write_table(table, max_chunksize=2)
    state = {'_data_files': [{'filename': 'data-0.arrow'}]}
    (tmp_path / split / 'state.json').write_text(json.dumps(state))
    (tmp_path / split / 'dataset_info.json').write_text('{}')
  found = read(tmp_path / 'train')
  assert [row['messages'][0]['content'] for _, row in found] == list('01234')
  assert found[4][0] == f'{tmp_path}/train/data-0.arrow:5'
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  with pytest.raises(DataError, match=r"splits \['test', 'train'\]; name one"):
    read(tmp_path)
  (tmp_path / 'test' / 'state.json').write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
  with pytest.raises(DataError, match='not a file name inside'):
    read(tmp_path / 'test')


def test_folder_saved_by_datasets_itself(tmp_path):
  datasets = pytest.importorskip('datasets')
  datasets.disable_progress_bars()
  datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / 'd')
  assert [row for _, row in read(tmp_path / 'd')] == ROWS


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.jsonl', b'{"a": 1}\n{"a": \n', r'a\.jsonl:2: not JSON'),
    ('a.jsonl', b'{"a": 1}\n[1]\n', r'a\.jsonl:2: a JSON list, expected an object'),
    ('a.jsonl', b'{"a": "\xff"}\n', r'a\.jsonl:1: not UTF-8'),
    ('a.jsonl', b'[' * 100_000, r'a\.jsonl:1: not'),
    ('a.jsonl.gz', b'{"a": 1}\n', r'a\.jsonl\.gz:1: cannot be read'),
    (
      'a.jsonl.gz',
      gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9],
      r'a\.jsonl\.gz:\d+: cannot be read',
    ),
    ('a.json', b'{"a": 1}', 'expected a list of rows'),
    ('a.json', b'[{"a": 1}, 3]', r'a\.json:2: a JSON int'),
    ('a.json', b'{"a": 1}\n{"a": 2}', 'not JSON'),
    ('a.csv', b'a,b\n1,2\n3\n', r'a\.csv:3: 1 fields, expected 2'),
    ('a.csv', b'a,b\n1,2,3\n', r'a\.csv:2: 3 fields, expected 2'),
    ('a.csv', b'a,b\n1,"2\n', r'a\.csv:\d+: not CSV'),
    ('a.csv', b'a,b\n1,\xff\n', r'a\.csv:\d+ or later: not UTF-8'),
    ('a.parquet', b'PAR1nope', r'a\.parquet:1: not readable Parquet'),
    ('a.xlsx', b'x', 'unknown kind of file'),
    ('a.csv', b'a,b,a\n1,2,3\n', r"a\.csv:1: the header names the column 'a' twice"),
    ('a.jsonl', b'{"a": {"b": 1, "b": 2}}\n', r"a\.jsonl:1: not JSON: the key 'b' stands twice"),
  ],
)
def test_faults_name_their_place(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message):
    read(tmp_path / name)


@pytest.mark.parametrize('name', ['part-1.tar', 'part-2.parquet.gz', 'sub/part.jsonl'])
def test_a_folder_leaves_nothing_out_silently(tmp_path, name):
  (tmp_path / 'part-0.jsonl').write_text('{"text": "a"}\n')
  (tmp_path / 'README.md').write_text('about')
  assert len(read(tmp_path)) == 1
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_bytes(b'x')
  with pytest.raises(DataError, match=f"'{name.partition('/')[0]}' lies beside"):
    read(tmp_path)


def test_nulls_that_arrow_invents_are_left_out(tmp_path):
  calls = [{'city': 'Oslo'}, {'query': 'x'}]
  table = pa.table({'messages': [[{'tool_calls': [{'arguments': c}]}] for c in calls]})
  pq.write_table(table, tmp_path / 'a.parquet')
  found = [row['messages'][0]['tool_calls'][0]['arguments'] for _, row in read(tmp_path)]
  assert found == calls


def test_nothing_there(tmp_path):
  with pytest.raises(DataError, match='no such file'):
    read(tmp_path / 'a.jsonl')
  with pytest.raises(DataError, match='no data file in this folder'):
    read(tmp_path)


def test_hub_name_without_datasets(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'datasets', None)
  with pytest.raises(ConfigError, match=r'ftjax\[datasets\]'):
    list(sources.rows(Spec('org/name:test')))


def test_hub_name_asks_datasets_for_the_split(monkeypatch):
  """No hub is reached: a stand-in for the library shows what it would be asked."""

  class Library:
    @staticmethod
    def load_dataset(name, split):
      return [{'text': f'{name} {split}'}]

  monkeypatch.setitem(__import__('sys').modules, 'datasets', Library)
  assert list(sources.rows(Spec('org/name:test'))) == [
    ('org/name:test:1', {'text': 'org/name test'})
  ]
  assert [r['text'] for _, r in sources.rows(Spec('org/name'))] == ['org/name train']


def test_fingerprint_is_of_content(tmp_path):
  for name, text in (('a', '{"n": 1}\n'), ('b', '{"n": 1}\n'), ('c', '{"n": 2}\n')):
    (tmp_path / f'{name}.jsonl').write_text(text)
  one, same, other = (sources.fingerprint(Spec(f'{tmp_path}/{n}.jsonl')) for n in 'abc')
  assert one == same != other
  assert sources.fingerprint(Spec(f'{tmp_path}/a.jsonl', 'text', 2.0)) == one
