"""Pages of algorithms and tutorials, and files at the root: what they state of the code is so."""

import ast
import json
import pathlib
import re
import runpy
import shlex
import sys

import pytest
import yaml

import ftjax
from ftjax.config import algorithms, config_file, keys, overrides, section, validation
from ftjax.data import formats, preference_rows
from ftjax.evaluation import tasks

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEFAULTS = section.flat(keys.default())
TUTORIALS = sorted((ROOT / 'docs').glob('tutorial_*.md'))

_ROW = re.compile(r'^\| `([\w.]+)` \| `([^`]+)` \| ', re.MULTILINE)
_CONFIG = re.compile(r'^```python\n(from ftjax import config\n.*?)^```$', re.DOTALL | re.MULTILINE)
_MODULE = re.compile(r'^```python\n# (my_\w+\.py)\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def read(name):
  return (ROOT / name).read_text(encoding='utf-8')


# Algorithms


def test_every_algorithm_has_a_page():
  pages = {p.stem for p in (ROOT / 'docs').glob('algorithm_*.md')}
  assert pages == {f'algorithm_{name}' for name in algorithms.ALGORITHMS}


@pytest.mark.parametrize('name', list(algorithms.ALGORITHMS))
def test_a_page_has_the_defaults_of_its_keys(name):
  rows = _ROW.findall(read(f'docs/algorithm_{name}.md'))
  assert len(rows) > 5
  assert not [(k, d) for k, d in rows if ast.literal_eval(d) != DEFAULTS[k]]


@pytest.mark.parametrize('name', list(algorithms.ALGORITHMS))
def test_the_keys_of_a_page_are_read_by_its_algorithm(name):
  c = config_file.load(config_file.find(f'tiny_{name}'))
  validation.validate(c)
  assert c.algorithm == name and f'--config=tiny_{name} ' in read(f'docs/algorithm_{name}.md')
  table = section.flat(keys.default())
  sections = {k.partition('.')[0] for k in table if '.' in k}
  owned = {k for a in algorithms.ALGORITHMS.values() for k in a.reads}
  for key, _ in _ROW.findall(read(f'docs/algorithm_{name}.md')):
    part = key.partition('.')[0]
    if key in owned or (part in sections and part in owned):
      assert algorithms.is_read(c, key), key


# Tutorials


@pytest.fixture(params=TUTORIALS, ids=[p.stem for p in TUTORIALS])
def tutorial(request, tmp_path, monkeypatch):
  """The text of a tutorial, whose files are in the working directory."""
  text = request.param.read_text(encoding='utf-8')
  [config] = _CONFIG.findall(text)
  (tmp_path / 'my_config.py').write_text(config)
  for name, block in _MODULE.findall(text):
    (tmp_path / name).write_text(block)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  for name in ('my_config', 'my_rewards'):  # those of another tutorial
    monkeypatch.delitem(sys.modules, name, raising=False)
  return text


def test_the_config_of_a_tutorial_is_accepted(tutorial):
  c = config_file.load('my_config.py')
  validation.validate(c)
  assert c.data.train.startswith('data/shop/')


def test_the_small_config_of_a_tutorial_is_accepted(tutorial):
  if 'my_small_config' in tutorial:
    c = config_file.load('my_small_config.py')
    validation.validate(c)
    assert not c.model.path and (ROOT / c.data.chat_template).is_file()


def test_what_a_tutorial_changes_for_a_pod_is_accepted(tutorial):
  """Flags of the plan and of the launcher, which state the same model, batch and length."""
  found = []
  for line in re.findall(r'^(?:launch/|python -m ftjax\.plan).*', tutorial, re.MULTILINE):
    words = [w.removeprefix('--config.') for w in shlex.split(line) if w.startswith('--config.')]
    changes = dict(w.split('=', 1) for w in words)
    c = config_file.load('my_config.py')
    overrides.apply(c, [overrides.Override(k, v) for k, v in changes.items()])
    validation.validate(c)
    found.append({k: v for k, v in changes.items() if not k.startswith(('data.', 'eval.tasks'))})
  assert len(found) == 2 and found[0] == found[1]


def test_the_tutorials_are_there():
  assert [p.stem.removeprefix('tutorial_') for p in TUTORIALS] == [
    'chat', 'classification', 'dpo', 'grpo_reward',
  ]  # fmt: skip


def test_the_rows_of_the_tutorials_are_read(tmp_path, capsys):
  runpy.run_path(str(ROOT / 'demo' / 'tutorial_rows.py'))['main'](tmp_path)
  files = {p.stem: p.read_text().splitlines() for p in tmp_path.glob('*.jsonl')}
  assert capsys.readouterr().out.count(' rows\n') == len(files) == 8
  found = {name: [json.loads(line) for line in lines] for name, lines in files.items()}
  for row in found['chat'] + found['tickets']:
    assert formats.detect(row) == 'messages' and formats.parse(row, 'messages', has_template=True)
  for row in found['pairs'] + found['pairs_test']:
    assert preference_rows.parse(row, 'pair', None)
  kinds = {'chat_test': 'answer_perplexity', 'tickets_test': 'choice', 'style_test': 'preference'}
  for name, kind in kinds.items():
    task = tasks.load_task(name, kind, str(tmp_path / f'{name}.jsonl'))
    assert len(task.rows) == len(files[name])
  asked = {json.dumps(r['messages'][:1]) for r in found['chat'] + found['tickets']}
  assert not [r for r in found['chat_test'] if json.dumps(r['messages']) in asked]
  pages = '\n'.join(p.read_text() for p in TUTORIALS)
  for name in ('chat', 'tickets', 'tickets_test', 'prompts'):
    assert any(json.dumps(row) in pages for row in found[name]), name


# The root


def test_the_citation_agrees_with_the_package():
  found = yaml.safe_load(read('CITATION.cff'))
  assert found['version'] == ftjax.__version__ and found['cff-version'] == '1.2.0'
  assert f'license = "{found["license"]}"' in read('pyproject.toml')
  assert found['title'].startswith('ftjax') and found['authors'] == [{'name': 'The ftjax authors'}]
  assert not {'doi', 'url', 'repository-code'} & found.keys()


def test_the_guide_for_authors_names_every_toy():
  toys = {p.name for p in (ROOT / 'tests' / 'seams').glob('toy_*.py')} - {'toy_run.py'}
  text = read('CONTRIBUTING.md')
  assert not [name for name in toys if f'`tests/seams/{name}`' not in text]


def test_the_tests_that_prove_a_guarantee_exist():
  named = re.findall(r'`(tests/\w+\.py)`', read('SECURITY.md'))
  assert len(named) > 10 and not [name for name in named if not (ROOT / name).is_file()]
