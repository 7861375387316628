"""An algorithm outside of the package trains, resumes, plans, evaluates and exports by its record
alone; and what is wrong with one is reported before anything is loaded.
"""

import json
import sys

import pytest
import tiny_run
import toy_algorithm
import toy_run

from ftjax import cli, config
from ftjax.config import algorithms, overrides, user_code, validation
from ftjax.runtime.errors import ConfigError

NAME = 'toy_algorithm:FOCAL'
SETTINGS = (
  f'algorithm={NAME}',
  'custom.gamma=1',
  'steps=6',
  'data.train=sums:60',
  'checkpoint.every=3',
  'eval.every=3',
  'eval.prompts=()',
  'checkpoint.best_metric=eval/probability',
  'checkpoint.best_mode=max',
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('toy')
  rows = [{'number': i, 'question': f'{i} + 1 =', 'result': '1' * i} for i in range(1, 4)]
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  settings = (*SETTINGS, f'eval.tasks=long=toy_task:AS_LONG:{folder}/rows.jsonl')
  return folder / 'run', settings, toy_run.train('tiny_sft', folder / 'run', *settings)


def test_it_trains_evaluates_and_exports(whole):
  workdir, _, printed = whole
  train, evaluated = toy_run.rows(workdir, 'train'), toy_run.rows(workdir, 'eval')
  assert train[0]['loss'] > train[-1]['loss'] and 'probability' in train[0]
  assert [r['step'] for r in evaluated] == [3, 6]
  assert 0 < evaluated[0]['probability'] < evaluated[1]['probability'] < 1
  assert f'eval  step 6  probability {evaluated[1]["probability"]:.4f}' in printed
  assert 'the best by eval/probability' in printed
  assert (workdir / 'export' / 'model.safetensors').stat().st_size > 100_000
  assert json.loads((workdir / 'config.json').read_text())['custom.gamma'] == 1.0


def test_the_toy_task_is_compared(whole):
  summary = json.loads((whole[0] / 'eval' / 'summary.json').read_text())['tasks']['long']
  assert (summary['kind'], summary['n']) == ('toy_task:AS_LONG', 3)


def test_resumed_it_ends_bitwise_like_uninterrupted(whole, tmp_path):
  workdir, settings, _ = whole
  assert toy_run.resumed(workdir, tmp_path / 'run', 6, 'tiny_sft', *settings) == []
  ours, theirs = (toy_run.rows(w, 'eval') for w in (tmp_path / 'run', workdir))
  assert [r['probability'] for r in ours] == [r['probability'] for r in theirs]


def test_its_step_is_planned():
  flags = [f'--config.{s}' for s in SETTINGS]
  arguments = ['--config=tiny_sft', *flags, '--topology=cpu:2', '--json']
  code, printed = tiny_run.run('plan', arguments, folder=toy_run.FOLDER)
  assert code == 0, printed
  found = json.loads(printed[printed.index('{') :])
  assert found['fits'] and found['devices'] == 2


def valid(**changes):
  c = config.default()
  c.algorithm, c.model.path, c.data.train, c.steps = NAME, 'somewhere', 'rows.jsonl', 10
  c.update_from_flattened_dict(changes)
  return c


def test_its_own_keys_have_defaults_and_types():
  c = valid()
  validation.validate(c)
  assert c.custom.to_dict() == {'gamma': 2.0}
  c = valid()
  c.custom.gamma = 3
  validation.validate(c)
  assert type(c.custom.gamma) is float and c.custom.gamma == 3
  c = valid()
  overrides.apply(c, [overrides.Override('custom.gamma', '5e-1')])
  assert c.custom.gamma == 0.5


@pytest.mark.parametrize(
  ('key', 'value', 'told'),
  [
    ('gama', 1.0, 'custom.gama: .*its keys are gamma; did you mean custom.gamma?'),
    ('gamma', 'much', "custom.gamma='much'; expected a number"),
    ('gamma', None, 'custom.gamma=None|custom.gamma=<a NoneType>'),
    ('gamma', -1.0, 'custom.gamma=-1.0; expected at least 0'),
  ],
)
def test_its_own_keys_are_checked_by_name(key, value, told):
  c = valid()
  with pytest.raises(ConfigError, match=told):
    c.custom[key] = value
    validation.validate(c)


def test_own_keys_are_for_algorithms_that_have_some():
  c = valid(algorithm='sft')
  c.custom.gamma = 1.0
  with pytest.raises(ConfigError, match=r'custom.gamma: algorithm=sft has no such key'):
    validation.validate(c)


@pytest.mark.parametrize(
  ('name', 'told'),
  [
    ('toy_algoritm:FOCAL', 'cannot import toy_algoritm: ModuleNotFoundError: .*PYTHONPATH'),
    ('toy_algorithm:FOCUS', 'has no FOCUS; did you mean toy_algorithm:FOCAL?'),
    (
      'toy_algorithm:make_loss',
      r'is a function \(forward, c\); expected a ftjax.config.algorithm_record',
    ),
    ('toy_algorithm:', 'package.module:object'),
    ('toy_algorithm', "expected one of .* or 'module:object'"),
  ],
)
def test_a_record_that_is_none_is_refused_by_name(name, told):
  with pytest.raises(ConfigError, match=rf'algorithm=.*{told}'):
    validation.validate(valid(algorithm=name))


def test_a_key_that_it_does_not_read_is_refused():
  with pytest.raises(ConfigError, match=rf'dpo.beta=0.5 does nothing with algorithm={NAME}'):
    validation.validate(valid(**{'dpo.beta': 0.5}))
  with pytest.raises(ConfigError, match=r'set checkpoint.best_mode=max'):
    validation.validate(valid(**{'checkpoint.best_metric': 'eval/probability'}))


def test_its_module_is_imported_after_the_cheap_checks(tmp_path, monkeypatch):
  (tmp_path / 'slow_toy.py').write_text('raise KeyError("imported")\n')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ConfigError, match=r'batch_size=0'):
    validation.validate(valid(algorithm='slow_toy:X', batch_size=0))
  with pytest.raises(ConfigError, match=r'cannot import slow_toy: KeyError: .*slow_toy.py:1'):
    validation.validate(valid(algorithm='slow_toy:X'))
  (tmp_path / 'script_toy.py').write_text('import sys\nsys.exit(0)\n')
  with pytest.raises(ConfigError, match=r'cannot import script_toy: SystemExit: 0 .*toy.py:2'):
    validation.validate(valid(algorithm='script_toy:X'))


def test_edited_code_is_another_algorithm(tmp_path, monkeypatch):
  text = 'from ftjax.config.algorithms import ALGORITHMS\nX = ALGORITHMS["sft"]\n'
  path = tmp_path / 'edited_toy.py'
  path.write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  before = user_code.fingerprints(valid(algorithm='edited_toy:X'))
  path.write_text(f'{text}# a comment\n')
  assert user_code.fingerprints(valid(algorithm='edited_toy:X')) == before
  path.write_text(f'{text}Y = 1\n')
  assert user_code.fingerprints(valid(algorithm='edited_toy:X')).keys() == before.keys()
  assert user_code.fingerprints(valid(algorithm='edited_toy:X')) != before
  sys.modules.pop('edited_toy')


def test_a_module_without_the_functions_is_refused(tmp_path, monkeypatch):
  text = 'from ftjax.config.algorithms import ALGORITHMS\nimport dataclasses\n'
  text += 'X = dataclasses.replace(ALGORITHMS["sft"], module=__name__)\n'
  (tmp_path / 'bare_toy.py').write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ConfigError, match=r'algorithm=bare_toy:make_loss: bare_toy has no make_loss'):
    cli.algorithm('bare_toy:X')
  assert cli.algorithm(NAME) is toy_algorithm


def test_the_record_of_a_name_or_an_object():
  assert algorithms.find(NAME) is toy_algorithm.FOCAL
  assert algorithms.find('sft').module == 'ftjax.algorithms.sft'
  with pytest.raises(ConfigError, match=r'algorithm='):
    algorithms.find('nothing')
