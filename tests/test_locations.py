"""Paths that cannot be meant, and the hints for a path that does not exist."""

import pathlib

import pytest

from ftjax.config import keys, validation
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files, locations

MANGLED = [
  ('gs:/bucket/run1', 'write gs://bucket/run1'),
  (str(pathlib.PurePosixPath('gs://bucket/run1')), 'write gs://bucket/run1'),
  ('gs:bucket/run1', 'write gs://bucket/run1'),
  ('gs:///bucket/run1', 'write gs://bucket/run1'),
  ('gs://', 'write gs://BUCKET/FOLDER'),
  ('GS://bucket/run1', 'write gs://bucket/run1'),
  ('gcs://bucket/run1', 'write gs://bucket/run1'),
  ('s3:/bucket/x', 's3:// cannot be read; only local paths and gs:// work'),
  ('s3://bucket/x', 's3:// cannot be read'),
  ('abfss://c@a.dfs.core.windows.net/x', 'abfss:// cannot be read'),
  ('hdfs://host/x', 'hdfs:// cannot be read'),
  ('file:///data/x', 'write the path itself, /data/x'),
  ('hf://org/name', 'is written without hf://, as org/name'),
  ('hf:/datasets/org/name', 'is written without hf://, as org/name'),
  ('https://huggingface.co/datasets/org/name/resolve/main/a.jsonl', 'on the hub is org/name'),
  ('http:/huggingface.co/org/name', 'on the hub is org/name'),
  ('https://storage.googleapis.com/bucket/a.jsonl', 'in a bucket write gs://bucket/a.jsonl'),
  ('https://example.com/rows.jsonl', 'download it, and give its local path'),
]
GOOD = [
  'gs://bucket/run1',
  '/a/b',
  'a/b',
  'runs/gs',
  'org/name',
  'sums:400',
  'name:train',
  '',
  'a:b',
]
KEYS = ['model.path', 'init_from', 'data.cache', 'data.train', 'data.eval', 'eval.tasks']


@pytest.mark.parametrize(('path', 'message'), MANGLED)
def test_a_path_that_cannot_be_meant(path, message):
  with pytest.raises(ConfigError) as caught:
    locations.check('data.train', path)
  assert str(caught.value).startswith(f'data.train={path}: ') and message in str(caught.value)


@pytest.mark.parametrize('path', GOOD)
def test_a_path_that_is_fine(path):
  locations.check('data.train', path)


@pytest.mark.parametrize('key', [*KEYS, 'rollout.reward_model', 'ppo.value_from'])
@pytest.mark.parametrize('path', ['gs:/bucket/x', 's3:/bucket/x', 'https://example.com/x'])
def test_every_key_that_names_a_path_is_checked_at_the_start(key, path):
  c = keys.default()
  c.model.path, c.data.train = 'somewhere', 'rows.jsonl'
  if key == 'eval.tasks':
    c.eval.tasks = ('a=match:rows.jsonl', f'b=math:{path}')
  else:
    section, _, name = key.rpartition('.')
    (c[section] if section else c)[name] = path
  with pytest.raises(ConfigError, match=f'{key}={path}: '):
    validation.validate(c)


@pytest.mark.parametrize(
  'sources', ['a.jsonl,gs:/b/c.jsonl@0.5', ('a.jsonl', 'gs:/b/c.jsonl::alpaca'), 'gs:/b/c.jsonl']
)
def test_every_source_is_checked(sources):
  c = keys.default()
  c.model.path, c.data.train = 'somewhere', sources
  with pytest.raises(ConfigError, match=r'data.train=gs:/b/c.jsonl.*: write gs://b/c.jsonl'):
    validation.validate(c)


def test_the_home_folder_is_not_expanded_in_keys():
  c = keys.default()
  c.model.path, c.data.train, c.init_from = 'somewhere', 'rows.jsonl', '~/runs/1'
  with pytest.raises(ConfigError, match=r'init_from=~/runs/1: write the whole path, /.*runs/1'):
    validation.validate(c)


@pytest.mark.parametrize('call', [files.probe, files.read_text, files.exists, files.makedirs])
@pytest.mark.parametrize('path', ['gs:/bucket/run1', 'gs:/bucket'])
def test_no_file_operation_takes_a_mangled_path(call, path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match='write gs://bucket'):
    call(path)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('data/trian.jsonl', '; did you mean data/train.jsonl?'),
    ('data/train.json', '; did you mean data/train.jsonl?'),
    ('data/TRAIN.jsonl', '; did you mean data/train.jsonl?'),
    ('dta/train.jsonl', '; did you mean data?'),
    ('data/nothing/like/it', ''),
    ('.cache/smollm2', '; `make assets` fetches the files of the shipped configs into .cache'),
    ('.cache/data/x/train.jsonl', '; `make assets` fetches'),
    ('.cache', '; `make assets` fetches'),
    ('.cache/safety/bbq.jsonl', '; `make safety-data` fetches'),
    ('.cache/eval/math/train.jsonl', '; `make eval-data` fetches'),
  ],
)
def test_the_nearest_existing_name(path, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'train.jsonl').write_text('')
  output = locations.nearest(path)
  assert output == message if not message.startswith('; `make') else output.startswith(message)
  absolute = locations.nearest(tmp_path / path)
  if 'did you mean' in message:
    assert absolute == message.replace('mean ', f'mean {tmp_path}/')


def test_where_relative_paths_are_looked_up(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert locations.nearest('rows.jsonl') == f'; paths are looked up from {tmp_path}'
