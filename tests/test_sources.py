"""Reading rows: every kind of file gives the same rows; faults name file, line, reason."""

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import zipfile

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
    ('a.jsonl', b'{"a": {"b": 1, "b": 2}}\n', r"a\.jsonl:1: not JSON: the key 'b' occurs twice"),
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


def test_fingerprint_is_of_content(tmp_path):
  for name, text in (('a', '{"n": 1}\n'), ('b', '{"n": 1}\n'), ('c', '{"n": 2}\n')):
    (tmp_path / f'{name}.jsonl').write_text(text)
  one, same, other = (sources.fingerprint(Spec(f'{tmp_path}/{n}.jsonl')) for n in 'abc')
  assert one == same != other
  assert sources.fingerprint(Spec(f'{tmp_path}/a.jsonl', 'text', 2.0)) == one


LINES = ''.join(json.dumps(r) + '\n' for r in ROWS).encode()


def zipped(**members):
  def write(path):
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in members.items():
        archive.writestr(name.replace('__', '/').replace('_', '.'), content)

  return write


@pytest.mark.parametrize(
  ('name', 'write'),
  [
    ('a.jsonl.zst', lambda p: p.write_bytes(pa.compress(LINES, 'zstd', asbytes=True))),
    ('a.jsonl.bz2', lambda p: p.write_bytes(bz2.compress(LINES))),
    ('a.jsonl.xz', lambda p: p.write_bytes(lzma.compress(LINES))),
    ('a.json.gz', lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
    ('a.csv.gz', lambda p: p.write_bytes(gzip.compress(csv_of(ROWS).encode()))),
    ('a.tsv.bz2', lambda p: p.write_bytes(bz2.compress(csv_of(ROWS, '\t').encode()))),
    ('a.zip', zipped(a_jsonl=LINES)),
    ('a.zip', zipped(data__a_jsonl_gz=gzip.compress(LINES), README_md='x')),
  ],
)  # fmt: skip
def test_compressed_files_and_archives(tmp_path, name, write):
  write(tmp_path / name)
  assert [row for _, row in read(tmp_path / name)] == ROWS
  assert [row for _, row in read(tmp_path)] == ROWS  # also in a folder


def csv_of(rows, delimiter=','):
  out = [delimiter.join(rows[0])]
  out += [delimiter.join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in rows]
  return '\n'.join(out) + '\n'


def test_places_inside_of_archives_and_their_fingerprint(tmp_path):
  zipped(b_jsonl='{"n": 1}\n\n{"n": 2}\n', a_jsonl='{"n": 0}\n')(tmp_path / 'x.zip')
  found = read(tmp_path / 'x.zip')
  assert [place.removeprefix(f'{tmp_path}/') for place, _ in found] == [
    'x.zip/a.jsonl:1', 'x.zip/b.jsonl:1', 'x.zip/b.jsonl:3',
  ]  # fmt: skip
  first = sources.fingerprint(Spec(str(tmp_path / 'x.zip')))
  zipped(b_jsonl='{"n": 1}\n', a_jsonl='{"n": 0}\n')(tmp_path / 'y.zip')
  assert sources.fingerprint(Spec(str(tmp_path / 'y.zip'))) != first


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl.zst', pa.compress(LINES, 'zstd', asbytes=True)[:-5], r'zst:1: cannot be read: Trunc'),
    ('a.jsonl.zst', b'{"a": 1}', 'cannot be read'),
    ('a.jsonl.xz', lzma.compress(LINES)[:-9], 'cannot be read'),
    ('a.jsonl.bz2', b'BZh9x', 'cannot be read'),
    ('a.csv.gz', b'a,b', r'csv\.gz:2 or later: cannot be read'),
    ('a.json.gz', b'[]', r'json\.gz: cannot be read'),
    ('a.zip', b'PK', 'cannot be read'),
  ],
)
def test_damaged_archives_name_themselves(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message):
    read(tmp_path / name)


def test_archives_leave_nothing_out_silently(tmp_path):
  zipped(a_jsonl=LINES, b_tar='x')(tmp_path / 'a.zip')
  with pytest.raises(DataError, match=r"'b\.tar' in it would not be read"):
    read(tmp_path / 'a.zip')
  zipped(README_md='x')(tmp_path / 'b.zip')
  with pytest.raises(DataError, match='no data file in it'):
    read(tmp_path / 'b.zip')


def test_text_files_are_documents_or_lines(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfone\ntwo\r\n\nthree')
  (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(b'four\n'))
  path = str(tmp_path / 'a.txt')
  assert list(sources.rows(Spec(path))) == [(f'{path}:1', {'text': 'one\ntwo\r\n\nthree'})]
  assert [r for _, r in sources.rows(Spec(str(tmp_path), 'text'))] == [
    {'text': 'one\ntwo\r\n\nthree'}, {'text': 'four\n'}
  ]  # fmt: skip
  spec = parse_spec(f'{path}::lines')
  assert [(p.rpartition(':')[2], r['text']) for p, r in sources.rows(spec)] == [
    ('1', 'one'), ('2', 'two'), ('4', 'three'),
  ]  # fmt: skip
  with pytest.raises(ConfigError, match=r'name the format text .* or lines'):
    list(sources.rows(Spec(path, 'messages')))
  (tmp_path / 'c.jsonl').write_text('{"text": "a"}\n')
  with pytest.raises(ConfigError, match=r'c\.jsonl is no \.txt'):
    list(sources.rows(Spec(str(tmp_path / 'c.jsonl'), 'lines')))
  # Beside rows, a .txt is a licence, and a compressed one is data.
  assert [r['text'] for _, r in read(tmp_path)] == ['four\n', 'a']


def test_patterns(tmp_path, monkeypatch):
  for name in ('b.jsonl', 'a.jsonl', 'c.csv', 'd[1].jsonl'):
    (tmp_path / name).write_text('n\n9\n' if name == 'c.csv' else f'{{"n": "{name[0]}"}}\n')
  assert [r['n'] for _, r in read(tmp_path / '?.jsonl')] == ['a', 'b']
  assert [r['n'] for _, r in read(tmp_path / '[bc].*')] == ['b', '9']
  assert [r['n'] for _, r in read(tmp_path / 'd[1].jsonl')] == ['d']  # a file by that name
  with pytest.raises(DataError, match='no data file matches this pattern'):
    read(tmp_path / '*.parquet')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert [r['n'] for _, r in read('~/b.jsonl')] == ['b']
  assert [r['n'] for _, r in read('~/?.jsonl')] == ['a', 'b']
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'e.jsonl').write_text('{"n": "e"}\n')
  assert [r['n'] for _, r in read(tmp_path / '**' / '[ae].jsonl')] == ['a', 'e']
  with pytest.raises(DataError, match='narrow the pattern'):
    read(tmp_path / '*')


@pytest.mark.parametrize(
  ('names', 'splits', 'chosen'),
  [
    (('train-00000-of-00001.parquet', 'validation-00000-of-00001.parquet',
      'test-00000-of-00001.parquet'), "['test', 'train', 'validation']", {'train': 1, 'val': 1}),
    (('train.jsonl', 'test.jsonl'), "['test', 'train']", {'train': 1, 'test': 1}),
    (('train.jsonl.zst', 'dev.jsonl', 'README.md'), "['dev', 'train']", {'validation': 1}),
    (('train-1.csv', 'train-2.csv', 'eval.csv'), "['eval', 'train']", {'train': 2}),
    (('data/train-00000-of-00003.parquet', 'data/train-00001-of-00003.parquet',
      'data/test-00000-of-00001.parquet', 'README.md'), "['test', 'train']", {'train': 2}),
    (('train/a.jsonl', 'train/b.jsonl', 'test/a.jsonl'), "['test', 'train']", {'train': 2}),
    (('data/train_sft-00000-of-00001.parquet', 'data/test_sft-00000-of-00001.parquet',
      'data/train_gen-00000-of-00001.parquet'), "['test_sft', 'train_gen', 'train_sft']",
     {'train_sft': 1, 'test': 1}),
    (('gsm8k_train.jsonl', 'gsm8k_test.jsonl'), "['test', 'train']", {'train': 1}),
    (('rows.jsonl', 'rows_test.jsonl'), "['test'] beside 1 files of none", {'test': 1}),
    (('x.zip',), "['test', 'train']", {'train': 1}),
  ],
)  # fmt: skip
def test_a_folder_of_several_splits_is_no_source(tmp_path, names, splits, chosen):
  folder = tmp_path / 'd'
  for name in names:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    if name.endswith('.parquet'):
      pq.write_table(pa.table({'n': [name]}), path)
    elif name.endswith('.zip'):
      zipped(train_jsonl='{"n": "train"}\n', deep__test__a_jsonl='{"n": "test"}\n')(path)
      folder = path
    else:
      text = f'n\n{name}\n' if name.endswith('.csv') else json.dumps({'n': name}) + '\n'
      data = text.encode()
      path.write_bytes(pa.compress(data, 'zstd', asbytes=True) if 'zst' in name else data)
  with pytest.raises(DataError) as error:
    read(folder)
  assert f'{folder}: holds the splits {splits}' in str(error.value)
  assert f'name one of them, as in {folder}:' in str(error.value)
  for split, count in chosen.items():
    found = read(f'{folder}:{split}')
    assert len(found) == count
    word = 'dev' if (split, 'dev.jsonl' in names) == ('validation', True) else split
    assert all(word in row['n'] for _, row in found)
  with pytest.raises(DataError, match="no split 'gold' in it; it holds"):
    read(f'{folder}:gold')


def test_a_folder_of_one_split_and_words_that_are_none(tmp_path):
  for name in ('train-0.jsonl', 'train-1.jsonl', 'latest.jsonl', 'contest.jsonl', 'intrain.jsonl'):
    (tmp_path / name).write_text('{"n": 1}\n')
  assert len(read(tmp_path)) == 5
  with pytest.raises(DataError, match='name one of them'):
    (tmp_path / 'test.jsonl').write_text('{"n": 1}\n')
    read(tmp_path / '*.jsonl')
  assert len(read(tmp_path / 'train-*.jsonl')) == 2


def test_folders_of_configurations_are_named(tmp_path):
  for name in ('main', 'socratic'):
    (tmp_path / name).mkdir()
    pq.write_table(pa.table({'n': [1]}), tmp_path / name / 'train-00000-of-00001.parquet')
  with pytest.raises(DataError, match=r'name one, as in .*/main'):
    read(tmp_path)
  assert len(read(tmp_path / 'main')) == len(read(f'{tmp_path}/main:train')) == 1


def test_a_split_of_a_saved_dataset(tmp_path):
  datasets = pytest.importorskip('datasets')
  datasets.disable_progress_bars()
  one = datasets.Dataset.from_list(ROWS)
  datasets.DatasetDict({'train': one, 'test': one.select([1])}).save_to_disk(tmp_path / 'd')
  with pytest.raises(
    DataError, match=r"splits \['test', 'train'\]; name one of them, as in .*:test"
  ):
    read(tmp_path / 'd')
  assert [r for _, r in read(f'{tmp_path}/d:test')] == ROWS[1:2]
  assert [r for _, r in read(tmp_path / 'd' / 'train')] == ROWS


def test_values_that_json_does_not_know(tmp_path):
  moment = datetime.datetime(2024, 5, 1, 12, 30)
  table = pa.table(
    {
      'when': pa.array([moment], pa.timestamp('us')),
      'day': pa.array([moment.date()]),
      'price': pa.array([decimal.Decimal('1.50')]),
      'count': pa.array([decimal.Decimal('7')]),
      'tags': pa.array([[('a', None), ('b', 1)]], pa.map_(pa.string(), pa.int64())),
      'many': pa.array([[{'x': None, 'y': 'z'}, None]], pa.large_list(pa.struct(
        [('x', pa.int32()), ('y', pa.dictionary(pa.int8(), pa.string()))]))),
      'json': pa.array(['{"x": null}'], pa.json_()),
      'image': pa.array([b'\x89PNG']),
    }
  )  # fmt: skip
  pq.write_table(table, tmp_path / 'a.parquet')
  ((_, row),) = read(tmp_path)
  assert row == {
    'when': '2024-05-01T12:30:00',
    'day': '2024-05-01',
    'price': 1.5,
    'count': 7,
    'tags': {'a': None, 'b': 1},  # a map's keys are the row's own
    'many': [{'y': 'z'}, None],
    'json': {'x': None},  # what JSON says itself stays
    'image': b'\x89PNG',
  }


def test_json_columns_of_a_library_that_does_not_know_the_type(tmp_path):
  """Their name then stands in the field's metadata alone."""
  field = pa.field('a', pa.string(), metadata={'ARROW:extension:name': 'arrow.json'})
  table = pa.table([pa.array(['{"x": 1}', '{'])], schema=pa.schema([field]))
  pq.write_table(table, tmp_path / 'a.parquet')
  found = [row for _, _, row in sources.scan(Spec(str(tmp_path)))]
  assert found[0] == {'a': {'x': 1}} and 'is no JSON' in found[1].reason


def test_two_columns_of_one_name(tmp_path):
  table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=['a', 'a'])
  with pa.ipc.new_stream(tmp_path / 'a.arrow', table.schema) as out:
    out.write_table(table)
  with pytest.raises(DataError, match='two columns have one name'):
    read(tmp_path / 'a.arrow')


def test_shards_with_a_hash_in_their_name_belong_to_the_whole_split(tmp_path):
  folder = tmp_path / 'data'
  folder.mkdir()
  for split in ('train_sft', 'train_gen', 'test_sft'):
    name = f'{split}-00000-of-00001-a3ecf92756993583.jsonl'
    (folder / name).write_text('{"text": "a"}\n')
  with pytest.raises(DataError, match="'test_sft', 'train_gen', 'train_sft'"):
    sources.list_files(sources.Spec(str(tmp_path)))
  (file,) = sources.list_files(sources.Spec(f'{tmp_path}:train_sft'))
  assert file.name.startswith('train_sft-')
  with pytest.raises(DataError, match="no split 'train'"):
    sources.list_files(sources.Spec(f'{tmp_path}:train'))
