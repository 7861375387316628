"""Shipped configs and the rows that they name: tasks load, and training rows pass the check of
data with the config's own seq_len and policies. On the real rows of .cache, which `make assets
eval-data gemma` fetches.
"""

import functools
import runpy
import types
from pathlib import Path

import pytest

from ftjax.config import config_file, task_specs, validation
from ftjax.data.tokenizer import Tokenizer
from ftjax.evaluation import tasks
from ftjax.experiment import data as examples
from ftjax.experiment import data_check, evaluation_names, label_names
from ftjax.hf import load
from ftjax.runtime.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / '.cache'


def _load(name):
  c = config_file.load(str(ROOT / 'configs' / f'{name}.py'))
  validation.validate(c)
  return c


def _paths(c):
  found = [path for key in ('train', 'eval') if (path := c.data[key])]
  return found + [spec.path for spec in task_specs.parse_all(c.eval.tasks)]


NAMES = [
  path.stem
  for path in sorted((ROOT / 'configs').glob('*.py'))
  if any(p.startswith('.cache') for p in _paths(_load(path.stem)))
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a .cache of links to what is there, and the rows that scripts of demo/ make of
  it.
  """
  folder = tmp_path_factory.mktemp('shipped')
  for path in (*CACHE.glob('*'), *CACHE.glob('data/*')):
    link = folder / '.cache' / path.relative_to(CACHE)
    link.parent.mkdir(parents=True, exist_ok=True)
    if path.name != 'data':
      link.symlink_to(path)
  if (CACHE / 'data' / 'sentiment').exists():
    for name in ('sentiment_rewards', 'gemma_sentiment'):
      runpy.run_path(str(ROOT / 'demo' / f'{name}.py'))['main'](folder / '.cache')
  return folder


@pytest.fixture
def config(folder, monkeypatch):
  """A config by name, in a folder where its paths lead somewhere."""
  monkeypatch.chdir(folder)

  def load(name):
    c = _load(name)
    for path in (c.model.path, *_paths(c)):
      if path.startswith('.cache') and not Path(path).exists():
        pytest.skip(f'{path} is missing: the docstring of configs/{name}.py has what makes it')
    return c

  return load


@functools.cache
def _tokenizer(path):
  return Tokenizer(load.tokenizer_files(path), path)


def test_there_are_such_configs():
  assert len(NAMES) >= 14


LONG = ('lora_gemma3_270m', 'sft_summarization', 'sft_translation')


@pytest.mark.parametrize('name', NAMES)
def test_the_tasks_of_a_config_load(config, name):
  c = config(name)
  evaluation_names.check(c)
  own = tasks.load_tasks(task_specs.parse_all(c.eval.tasks))
  assert all(len(task.rows) >= 100 for task in own)


@pytest.mark.parametrize(
  'name',
  # The tokenizer of one takes some ten times as long, and the others have thousands of rows.
  [pytest.param(n, marks=pytest.mark.full) if n in LONG else n for n in NAMES],
)
def test_the_training_rows_of_a_config_pass_its_checks(config, folder, name):
  c = config(name)
  c.data.cache, c.data.workers = str(folder / 'tokens'), 1
  label_names.resolve(c, str(folder / 'run'))
  data = examples.open_data(c, _tokenizer(c.model.path), str(folder / 'run'))
  data_check.check(types.SimpleNamespace(config=c, data=data))
  data.log_summary()


def test_a_row_that_is_too_long_is_found(config, folder):
  c = config('sft_math')
  c.data.cache, c.data.workers, c.seq_len = str(folder / 'tokens'), 1, 32
  with pytest.raises(DataError, match=r'train\.jsonl.*data\.on_overlength'):
    examples.open_data(c, _tokenizer(c.model.path), str(folder / 'run'))
